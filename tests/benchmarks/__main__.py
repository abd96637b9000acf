"""Run benchmarks and write their table: `python -m tests.benchmarks [room ...]`.

In: names of rooms in this folder (all fast ones by default). Out: a table on the screen, results/speed.json, and the
part of the README between its markers. Invariant: a row that was not measured again keeps its last figure and date.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.timing import Row

ROOMS = ("importing", "first_order", "against_cooper", "lifting", "exact_speed", "shooting_speed")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "speed.json"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main(names: list[str]) -> None:
    """Measure on one thread in seconds of the processor, print, keep."""
    torch.set_num_threads(1)
    kept: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rooms = names or [r for r in ROOMS if (Path(__file__).parent / f"{r}.py").exists()]
    for room in rooms:
        rows: list[Row] = importlib.import_module(f"tests.benchmarks.{room}").run()
        for row in rows:
            kept[row.name] = asdict(row) | {"date": date.today().isoformat(), "machine": _machine()}
            print(f"{row.value:8.3f}  {row.target:8}  {'ok' if row.reached else 'NOT reached':11}  {row.name}", end="")
            print(f"  ({row.detail})", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    readme = ROOT / "README.md"
    if readme.exists():
        _write_table(readme, kept)


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def _write_table(readme: Path, kept: dict[str, dict[str, Any]]) -> None:
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        return
    lines = ["| what | measured | asked for | times |", "|---|---|---|---|"]
    for name, row in kept.items():
        mark = "" if row["reached"] or not row["target"] else " (not reached)"
        lines.append(f"| {name} | {row['value']:.3g}{mark} | {row['target'] or '-'} | {row['detail']} |")
    machines = sorted({f"{r['machine']} ({r['date']})" for r in kept.values()})
    table = "\n".join([*lines, "", f"One thread, seconds of the processor. Measured on: {'; '.join(machines)}."])
    head, rest = text.split(BEGIN, 1)
    readme.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])

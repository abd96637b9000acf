"""Lift the models of an installed library, glue them, certify them at four stages, and print a table.

python -m tests.coverage timm --out tests/benchmarks/results/coverage    models that succeeded there are not run again
python -m tests.coverage torchvision --name resnet18 --name vit_b_16     two models
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lagcompile.ir.base import LagcompileError
from tests import coverage


def main() -> int:
    """Exit status: 0 where every model lifts, is equal and certified, 1 where one does not, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m tests.coverage")
    parser.add_argument("family", choices=coverage.FAMILIES)
    parser.add_argument("--name", action="append", help="only this model; may be repeated")
    parser.add_argument("--limit", type=int, help="at most so many models")
    parser.add_argument("--out", type=Path, help="folder that keeps results")
    options = parser.parse_args()
    try:
        rows = coverage.run(options.family, options.name, options.limit, folder=options.out)
    except LagcompileError as error:
        print(error, file=sys.stderr)
        return 2
    print(coverage.table(rows))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""A process that dies at a chosen operation on files, without a process: what a test of crashes needs.

Every operation of `os` that changes something under a folder is counted. At the chosen one nothing more is done (of a
write: half), as if the process had been killed: each later operation fails too, handles are closed, locks are gone, and
what was written but never synchronised is cut in half, as after a loss of power (synchronising itself is only noted).
On demand the last names that were made, moved or removed in folders that were not synchronised since are lost as well.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


class Died(BaseException):
    """The process would be gone."""


class Machine:
    """Operations on files under a folder.

    Attributes:
        done: number of operations so far.
        dead: whether the process has died.
    """

    def __init__(self, root: Path, at: int | None, fail: OSError | None = None, lost: float = 0.0) -> None:
        self.root, self.at, self.fail, self.lost = os.path.realpath(root), at, fail, lost
        self.done, self.dead = 0, False
        self.handles: dict[int, str] = {}
        self._dirty: set[tuple[int, int]] = set()
        self._names: list[tuple[str, Callable[[], object]]] = []
        """Folders with a name that is not on the disk yet, and how things were before."""
        self._real: dict[str, Callable[..., Any]] = {}

    def _ours(self, target: Any, folder: int | None) -> bool:
        if isinstance(target, int):
            return target in self.handles
        if folder is not None:
            return folder in self.handles
        return os.path.abspath(os.fspath(target)).startswith(self.root)

    def _counted(self) -> bool:
        """Whether this is the operation to fail at; never returns in a dead process."""
        if self.dead:
            raise Died
        self.done += 1
        return self.done == self.at

    def _ends(self) -> None:
        if self.fail is not None:
            raise type(self.fail)(*self.fail.args)
        self.dead = True
        raise Died

    def _patched(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def operation(target: Any, *args: Any, **kwargs: Any) -> Any:
            folder = kwargs.get("dir_fd") if name != "replace" else kwargs.get("src_dir_fd")
            if not self._ours(target, folder):
                return real(target, *args, **kwargs)
            flags = args[0] if name == "open" else os.O_CREAT
            if not flags & os.O_CREAT:
                if self.dead:
                    raise Died
            elif self._counted():
                if name == "write":
                    real(target, bytes(args[0])[: len(args[0]) // 2])
                self._ends()
            undo = self._undo(name, self._path(target, folder), args) if flags & os.O_CREAT and self.lost else None
            result = None if name == "fsync" else real(target, *args, **kwargs)  # costs more than all the rest
            self._note(name, self._path(target, folder), result)
            if undo is not None:
                self._names.append(undo)
            return result

        return operation

    def _path(self, target: Any, folder: int | None) -> Any:
        if isinstance(target, int):
            return target
        return os.path.join(os.path.realpath("." if folder is None else self.handles[folder]), os.fspath(target))

    def _undo(self, name: str, path: Any, args: tuple[Any, ...]) -> tuple[str, Callable[[], object]] | None:
        """Folder and way back of an operation on names, before it is done."""
        if isinstance(path, int):
            return None
        real, folder = self._real, os.path.dirname(path)
        if name == "open":
            return None if os.path.lexists(path) else (folder, lambda: real["unlink"](path))
        if name == "mkdir":
            return folder, lambda: shutil.rmtree(path)
        if name == "rmdir":
            return folder, lambda: real["mkdir"](path)
        if name == "unlink":
            return folder, _again(path)
        after = os.path.realpath(os.fspath(args[0]))
        stood = _again(after) if os.path.isfile(after) else lambda: None
        return folder, lambda: (real["replace"](after, path), stood())

    def _note(self, name: str, target: Any, result: Any) -> None:
        if name == "open":
            self.handles[result] = target
        elif name in {"write", "pwrite", "ftruncate", "fsync"}:
            found = os.fstat(target)
            change = self._dirty.discard if name == "fsync" else self._dirty.add
            change((found.st_dev, found.st_ino))
            if name == "fsync":
                self._names = [(f, undo) for f, undo in self._names if f != self.handles[target]]

    def _close(self, handle: int) -> None:
        self.handles.pop(handle, None)
        self._real["close"](handle)

    @contextmanager
    def running(self) -> Iterator[None]:
        names = (
            "open",
            "write",
            "pwrite",
            "fsync",
            "ftruncate",
            "replace",
            "rename",
            "mkdir",
            "unlink",
            "rmdir",
            "link",
        )
        self._real = {n: getattr(os, n) for n in (*names, "close")}
        patches = [mock.patch.object(os, n, self._patched(n)) for n in names]
        patches.append(mock.patch.object(os, "close", self._close))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
            if self.dead:
                self._lose_power()

    def _lose_power(self) -> None:
        for handle in list(self.handles):
            os.close(handle)
        for path in Path(self.root).rglob("*"):
            found = path.lstat()
            if (found.st_dev, found.st_ino) in self._dirty and path.is_file():
                os.truncate(path, found.st_size // 2)
        for _, undo in self._names[-round(self.lost * len(self._names)) or len(self._names) :][::-1]:
            undo()


def _again(path: str) -> Callable[[], object]:
    """A way to make a file again as it is."""
    data = Path(path).read_bytes()
    return lambda: Path(path).write_bytes(data)


def died(
    root: Path, at: int | None, action: Callable[[], object], fail: OSError | None = None, lost: float = 0.0
) -> Machine:
    """Run an action in a process that dies at an operation (from 1), or fails there; None for one that lives.

    Args:
        root: the folder whose files count.
        at: the operation.
        action: what is run.
        fail: raised there in the place of a death.
        lost: share of the names not synchronised that a death takes back, from the last on.
    """
    machine = Machine(root, at, fail, lost)
    with machine.running():
        try:
            action()
        except Died:
            if not machine.dead:
                raise
    return machine

"""A process that dies at a chosen operation on files, without a process: what a test of crashes needs.

Every operation of `os` that changes something under a folder is counted. At the chosen one nothing more is done (of a
write: half), as if the process had been killed: each later operation fails too, handles are closed, locks are gone, and
what was written but never synchronised is cut in half, as after a loss of power (synchronising itself is only noted).
"""

from __future__ import annotations

import os
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

    def __init__(self, root: Path, at: int | None, fail: OSError | None = None) -> None:
        self.root, self.at, self.fail = os.path.realpath(root), at, fail
        self.done, self.dead = 0, False
        self.handles: dict[int, str] = {}
        self._dirty: set[tuple[int, int]] = set()
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
            result = None if name == "fsync" else real(target, *args, **kwargs)  # costs more than all the rest
            self._note(name, target, result, args)
            return result

        return operation

    def _note(self, name: str, target: Any, result: Any, args: tuple[Any, ...]) -> None:
        if name == "open":
            self.handles[result] = os.fspath(target)
        elif name in {"write", "pwrite", "ftruncate", "fsync"}:
            found = os.fstat(target)
            change = self._dirty.discard if name == "fsync" else self._dirty.add
            change((found.st_dev, found.st_ino))

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


def died(root: Path, at: int | None, action: Callable[[], object], fail: OSError | None = None) -> Machine:
    """Run an action in a process that dies at an operation (from 1), or fails there; None for one that lives.

    Args:
        root: the folder whose files count.
        at: the operation.
        action: what is run.
        fail: raised there in the place of a death.
    """
    machine = Machine(root, at, fail)
    with machine.running():
        try:
            action()
        except Died:
            if not machine.dead:
                raise
    return machine

"""Files that are replaced whole and folders that appear whole: the one way in which results reach the disk.

In: a path and bytes. Out: a file or a folder. Invariant: after a crash at any operation a name holds what it held
before or all that was written, on the disk itself; no link is followed at a temporary name; what the system refuses is
one problem that names the file, and leaves the old content in place.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lagcompile.ir.base import DataError

LOCK = ".lock"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
"""Errors of file systems without locks, where nothing guards a folder against two processes."""


@contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Turn errors of the system into one problem.

    Raises:
        DataError: an operation inside failed.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be {doing}: {error.strerror or error}") from error


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    with naming(path, "read"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(f"there is no file {path}") from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DataError(f"{path} is not a file")
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)


def replace(path: Path, *chunks: bytes | memoryview) -> None:
    """Replace a file, or make it; write to a device or a stream.

    Raises:
        DataError: it cannot be written; the old content is unchanged.
    """
    with naming(path, "written"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_device(path):
            with path.open("wb") as file:
                file.writelines(chunks)
            return
        part = path.with_name(f".{path.name}.part")
        _remove(part)
        handle = os.open(part, _NEW, 0o666)
        try:
            try:
                for chunk in chunks:
                    _write(handle, chunk)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(part, path)
        except BaseException:
            _remove(part)
            raise
        _sync(path.parent)


def _is_device(path: Path) -> bool:
    """Return whether a path, such as /dev/null or /dev/fd/5, is written to and not replaced by a file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    stream = stat.S_ISLNK(mode) and path.absolute().parts[1:2] in (("dev",), ("proc",))
    return stream or stat.S_ISCHR(mode)


def append(path: Path, data: bytes) -> None:
    """Append to a file that exists.

    Raises:
        DataError: it cannot be written, or it is gone.
    """
    with naming(path, "written"):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _write(handle, data)
        finally:
            os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove unfinished files that dead processes left; only the holder of the folder's lock may."""
    with naming(folder, "written"):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(".") and entry.name.endswith(".part") and not entry.is_dir(follow_symlinks=False):
                _remove(Path(entry.path))


def _write(handle: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk (some file systems cannot, and say so)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)


# ---------------------------------------------------------------- one process at a time
def lock(folder: Path) -> int:
    """Take a folder for this process until `unlock`; a process that dies gives it back.

    Raises:
        DataError: another process has it (named with its host and since when), or it cannot be written.
    """
    path = folder / LOCK
    with naming(folder, "written"):
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                if not _taken(handle):
                    owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                    raise DataError(f"{folder} is in use by {owner}: wait until it has ended, or name another folder")
                if _same(handle, path):
                    since = time.strftime("%Y-%m-%d %H:%M:%S")
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its owner removed it between our opening and taking it


def unlock(folder: Path, handle: int) -> None:
    """Give a folder back."""
    with suppress(OSError):  # the folder is gone, or cannot be written any more: the lock ends with the handle
        if _same(handle, folder / LOCK):
            os.unlink(folder / LOCK)
    os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, and lock it for this process while the context lasts.

    Raises:
        DataError: another process has it, or it cannot be written.
    """
    make(folder)
    handle = lock(folder)
    try:
        remove_parts(folder)
        yield
    finally:
        unlock(folder, handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True


def _same(handle: int, path: Path) -> bool:
    """Return whether a name still belongs to an open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- folders
def make(folder: Path) -> None:
    """Make a folder and its parents where there are none, and bring their names to the disk.

    Raises:
        DataError: it cannot be made.
    """
    with naming(folder, "written"):
        new = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
        os.makedirs(folder, exist_ok=True)
        for made in new:
            _sync(made.parent)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path` to write to, which takes the place of `path` unless an exception is raised.

    Args:
        path: where the folder will be; a folder that is there is replaced. Parents are made. Of a link, the folder
            that it points to is replaced.

    Raises:
        DataError: the folder cannot be made.
    """
    path = _meant(path)
    make(path.parent)
    with naming(path, "written"):
        restore(path)
        token = secrets.token_hex(4)
        part, old = (path.parent / f".{path.name}.{kind}-{token}" for kind in ("part", "old"))
        os.mkdir(part)
        held = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _taken(held)
        yield part
        with naming(path, "written"):
            _sync(part)
            if os.path.lexists(path):
                os.replace(path, old)
            os.replace(part, path)
            _sync(path.parent)
            if os.path.lexists(old):
                shutil.rmtree(old)
    finally:
        os.close(held)
        with suppress(OSError):  # the disk refuses everything; the next `restore` removes it
            if os.path.lexists(part):
                shutil.rmtree(part)


def restore(path: Path) -> None:
    """Undo what a killed process left of `appearing`: the old folder comes back, the rest is removed."""
    path = _meant(path)
    if not path.parent.is_dir():
        return
    for entry in list(os.scandir(path.parent)):
        left, folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        if folder and entry.name.startswith(f".{path.name}.old-"):
            if os.path.lexists(path):
                _sync(path.parent)
                shutil.rmtree(left)
            else:
                os.replace(left, path)
        elif folder and entry.name.startswith(f".{path.name}.part-") and not _in_use(left):
            shutil.rmtree(left)


def _meant(path: Path) -> Path:
    """Return where a folder really is: the target of a link, the name of `.`."""
    return Path(os.path.realpath(path)) if path.is_symlink() or path.name in {"", ".."} else path


def _in_use(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return not _taken(handle)
    finally:
        os.close(handle)

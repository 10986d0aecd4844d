"""Replacing a file as a whole: what was there stays as it was until the new contents are on the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_PREFIX, _SUFFIX = ".dualbin-", ".tmp"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Put what `write` writes to the path that it is given in the place of `path`.

    The mode of a file that was there stays, a new one has what the umask says; a symbolic link stays, and its target is replaced. What
    killed processes left behind in the folder is removed.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    for folder in path.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        _remove_if_left(folder)
    with _folder_beside(path) as folder:
        probe = folder / "mode"
        probe.touch()
        mode = stat.S_IMODE((path if path.exists() else probe).stat().st_mode)
        new = folder / "new"
        write(new)
        new.chmod(mode)
        _sync(new)
        new.replace(path)
        try:
            _sync(path.parent)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a file system that cannot do it with folders
                raise


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder on the same file system, locked as long as this process uses it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=path.parent))
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody takes the folder for left behind, either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():  # else another process came between and took it for left behind
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose process does not live any more: nobody holds its lock."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone, or another user's
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expect_free(out: Path) -> None:
    """Raise `OSError` where something is at a place already."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(errno.EEXIST, "there is something already at", str(out))


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write into; at the end it takes its place, or is deleted."""
    expect_free(out)
    out = out.absolute()  # who looks at it meanwhile stands elsewhere
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / out.name
        folder.mkdir()
        yield folder
        folder.rename(out)


@contextmanager
def writing(path: Path, size: int) -> Iterator[Path]:
    """Give the path of a file of so many bytes. Raises `OSError` where the disk is full.

    Writers in other languages raise errors of their own for a full disk.
    """
    if (free := _free(path)) < size:
        raise full(path, size, free)
    path.touch()
    mode = path.stat().st_mode & 0o777  # some writers leave it to its owner alone
    try:
        yield path
        path.chmod(mode)
    except Exception as problem:
        if getattr(problem, "errno", None) == errno.ENOSPC or _free(path) < size - _written(path):
            raise full(path, size, _free(path)) from problem
        raise


def full(path: Path, size: int, free: int) -> OSError:
    """Return the error of a file that has no room."""
    message = f"no room on the disk: {size:,} bytes are needed, {free:,} are free, for"
    return OSError(errno.ENOSPC, message, path.name)


def write_text(path: Path, text: str) -> None:
    """Write a text as it is, whatever the machine's line ends."""
    data = text.encode()
    with writing(path, len(data)):
        path.write_bytes(data)


def _free(path: Path) -> int:
    return shutil.disk_usage(path.parent).free


def _written(path: Path) -> int:
    return os.path.getsize(path) if path.exists() else 0

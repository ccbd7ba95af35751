"""What is kept on disk from run to run: the parser's tables, and what `kept` makes.

It lies in the user's own folder, `headloom` within `$XDG_CACHE_HOME` or `~/.cache`, and may be
deleted at any time. A file that cannot be read, was made of something else or was cut off is
made anew; where there is no such folder to write to, nothing is kept.

    kept("std", of=[text], make=lambda: parse(text))
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import get_ident
from typing import Any, TypeVar

T = TypeVar("T")

_SIZE = sha256().digest_size


@cache
def folder() -> Path | None:
    """Return the folder, made if need be; None where it is not the user's own to write to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    found = Path(home, "headloom")
    try:
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = os.access(found, os.W_OK) and found.stat().st_uid == os.getuid()
    except OSError:
        return None
    return found if own else None


def kept(name: str, of: Iterable[bytes], make: Callable[[], T]) -> T:
    """Return what `make` gives, from disk where it was made of the same before.

    `of` is what it is made of, besides the modules of this package and Python itself.
    """
    where = folder()
    if where is None:
        return make()
    key = sha256(b"".join((sys.version.encode(), _modules(), *of))).digest()
    path = where / f"{name}.pickle"
    try:
        found: T = _unpacked(path.read_bytes(), key)
    except (OSError, ValueError):
        found = make()
        _write(path, key, pickle.dumps(found, pickle.HIGHEST_PROTOCOL))
    return found


@cache
def _modules() -> bytes:
    """Return a digest of the modules of this package: they say what is kept and how."""
    own = (each for each in Path(__file__).parent.iterdir() if each.suffix in (".py", ".lark"))
    return sha256(b"".join(each.read_bytes() for each in sorted(own))).digest()


def _unpacked(content: bytes, key: bytes) -> Any:
    """Return what a file holds. Raises `ValueError` for another key, or where it is damaged."""
    said, digest, body = content[:_SIZE], content[_SIZE : 2 * _SIZE], content[2 * _SIZE :]
    if said != key or sha256(body).digest() != digest:
        raise ValueError("this was made of something else, or is damaged")
    return pickle.loads(body)


def _write(path: Path, key: bytes, body: bytes) -> None:
    """Write a file whole or not at all, whoever else writes it at the same time."""
    beside = path.with_suffix(f".{os.getpid()}.{get_ident()}")
    try:
        beside.write_bytes(key + sha256(body).digest() + body)
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)

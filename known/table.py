"""Every kind of model that can be read: `model_type` and its row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .config import Config
from .kind import Kind
from .kinds.experts import WITH_EXPERTS
from .kinds.gemma import GEMMAS
from .kinds.gpt import GPT_LIKE
from .kinds.llama import LLAMA_LIKE
from .kinds.recent import RECENT
from .kinds.recurrent import RECURRENT
from .kinds.spaces import SPACES

KINDS: dict[str, Kind | tuple[Kind, ...]] = {
    **LLAMA_LIKE,
    **GEMMAS,
    **GPT_LIKE,
    **WITH_EXPERTS,
    **SPACES,
    **RECURRENT,
    **RECENT,
}


def chosen(config: Config) -> Kind:
    """Return the row of a configuration; of several, the first whose needs it meets.

    Raises `LoomError` (L601, L602).
    """
    if config.kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise config.error("L601", f"the kind `{config.kind}` is not known", "model_type", known)
    rows = KINDS[config.kind]
    several = rows if isinstance(rows, tuple) else (rows,)
    for row in several:
        own = config.of(row.names, row.fixed)
        if not any(True for _ in _unmet(row, own)):
            return row
    name, wanted = next(_unmet(several[-1], config.of(several[-1].names, several[-1].fixed)))
    raise config.unsupported(name, f"{wanted!r} alone")


def _unmet(row: Kind, config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the needs of a row that a configuration does not meet."""
    for name, wanted in row.needs.items():
        if not config.knows(name):
            continue
        found = config.get(name)
        found = list(found) if isinstance(found, tuple) else found
        if found != wanted and not (found is None and not wanted):
            yield name, wanted

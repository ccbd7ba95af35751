"""How Loom writes what a configuration says."""

from __future__ import annotations

import re
from typing import Any


def value(found: Any) -> str:
    """Return a value as Loom writes it: `10_000.0` is 10000, `None` is none."""
    match found:
        case None:
            return "none"
        case bool():
            return str(found).lower()
        case float():
            short = f"{found:g}"
            text = short if float(short) == found else repr(found)
            return re.sub(r"e([+-])0*(\d)", lambda it: f"e{it[1].strip('+')}{it[2]}", text)
        case list() | tuple():
            return f"[{', '.join(map(value, found))}]"
        case _:
            return str(found)

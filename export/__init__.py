"""Taking a block or model elsewhere: a folder that works where Headloom is not installed.

The folder is also the function: `hl.export("gemma.loom", "tiny", to="py", out="made")` is
`export.export`. Once anything in here has been imported, `hl.export` is this module, so the
module can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Export a block or model; see `headloom.export.export.export`."""
        from .export import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

"""Searching the space that holes in a description span.

The folder is also the function: `hl.search("space.loom", trials=50)` is `study.search`. Once
anything in here has been imported, `hl.search` is this module, so the module can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Search a space; see `headloom.search.study.search`."""
        from .study import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

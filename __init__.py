"""Headloom: declare an attention architecture, get a verified, fused `nn.Module`.

    import headloom as hl

    arch = hl.load("gemma.loom")
    block = hl.compile(arch, "local", width=512)

Nothing is imported until it is asked for, so that checking a description needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_DOOR = {
    "load": ".compiler.api",
    "compile": ".compiler.api",
    "reference": ".compiler.api",
    "emit": ".compiler.api",
    "explain": ".compiler.api",
    "show": ".compiler.api",
    "verify": ".compiler.verify.certificate",
    "zoo": ".compiler.api",
    "from_hf": ".known.known",
    "LoomError": ".grammar.diagnostics",
    "NotVerifiedError": ".compiler.verify.certificate",
    "NotExportedError": ".export.request",
    "attention": ".export.attention",
    "register_attention": ".export.attention",
    "Diagnostic": ".grammar.diagnostics",
}

_FOLDERS = ("search", "export")  # a folder of such a name can be called

__all__ = [*_DOOR, *_FOLDERS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f".{name}", __name__)
    if name not in _DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_DOOR[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Exporting: said what stands in the way, written, checked where Headloom is not, put in place.

certificate = export("gemma.loom", "tiny", to="py", out="made", weights="tiny.safetensors")
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..compiler.api import What, architecture
from ..compiler.api import target as target_of
from ..compiler.checking.check import find
from ..compiler.facts.dtypes import DType
from ..compiler.verify.certificate import Certificate
from .place import expect_free, whole
from .request import NotExportedError, Options, Request, of_description, of_module
from .targets import TARGETS, target


def export(
    what: What | nn.Module,
    name: str | None = None,
    *,
    to: str,
    out: str | Path,
    weights: str | Path | None = None,
    dtype: DType | None = None,
    width: int | None = None,
    context_width: int | None = None,
    portable: bool = False,
    aot: bool = False,
) -> Certificate:
    """Write a block or model into the folder `out`, for a target, and return what was checked.

    `what` is a description, or a module of `hl.compile`. Weights come from a file, or are drawn.
    Nothing is left at `out` where anything goes wrong. Raises `NotExportedError` where a part
    cannot be exported, `NotVerifiedError` where the folder computes something else than the module,
    `ValueError` for weights that do not fit, `OSError` where `out` is taken or the disk is full.
    """
    expect_target(to)
    out = Path(out)
    expect_free(out)
    options = Options(portable, aot)
    if not set(options.asked) <= target(to).OPTIONS:
        raise ValueError(f"{to} does not take {' and '.join(options.asked)}")
    if isinstance(what, nn.Module):
        if weights is not None or width is not None or context_width is not None:
            raise ValueError("a module has its weights and widths; leave them out")
        request = of_module(what, dtype, options)
        if name not in (None, request.what.name):
            raise ValueError(f"the module is `{request.what.name}`, not `{name}`")
    else:
        found = find(architecture(what), name, width, context_width)
        request = of_description(found, target_of("torch"), weights, dtype, options)
    return make(request, to, out)


def make(request: Request, to: str, out: Path) -> Certificate:
    """Export what was asked for; see `export`."""
    chosen = target(to)
    if obstacles := chosen.obstacles(request):
        raise NotExportedError(request.what.name, to, obstacles)
    with whole(out) as folder:
        chosen.write(request, folder)
        findings = tuple(chosen.check(request, folder))
        return Certificate(request.what.name, request.code.digest, findings).demanded()


def expect_target(to: str) -> None:
    """Raise `ValueError` where there is no such target."""
    if to not in TARGETS:
        raise ValueError(f"`to` is one of {', '.join(TARGETS)}, not {to!r}")

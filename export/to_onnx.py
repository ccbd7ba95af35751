"""ONNX models, which are run where neither Headloom nor PyTorch is.

made/model.onnx     y = model(x): a batch of whole sequences
made/first.onnx     y, next_0, … = first(x): the same, with what later tokens need
made/decode.onnx    y, next_0, … = decode(x, cache_0, …): one token more for each row
made/README.md      how to load and call them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..compiler.api import construct
from ..compiler.verify.verify import Finding
from .checking import Compared, decoding, forward, found, undecoded, within_precision
from .onnx_apart import Calls, Feeds, run
from .onnx_pieces import with_operators
from .place import write_text
from .program import NoProgramError, Program
from .readme import fenced, readme
from .request import Request
from .to_pt2 import Programs, programs, taken

if TYPE_CHECKING:
    import onnx_ir as ir

OPTIONS: frozenset[str] = frozenset()
MODEL, FIRST, DECODE = "model.onnx", "first.onnx", "decode.onnx"


def obstacles(request: Request) -> Sequence[str]:
    """Say what has no meaning in ONNX: the part, and the operator."""
    if missing := _missing():
        return (missing,)
    if request.dtype != torch.float32:
        return (f"ONNX models are written in float32, the module is in {request.dtype_name}",)
    try:
        _models(request)
    except NoProgramError as problem:
        return (str(problem),)
    return ()


def _missing() -> str:
    """Say which packages are missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    return f"it needs {', '.join(missing)}: pip install 'headloom[onnx]'" if missing else ""


def write(request: Request, folder: Path) -> None:
    """Write every model, and how to run them."""
    from .onnx_graph import save

    for name, model in _models(request).items():
        save(model, folder / name)
    write_text(folder / "README.md", _readme(request))


def check(request: Request, folder: Path) -> Iterator[Finding]:
    """Run the models with onnxruntime alone, on odd sizes and token by token."""
    made, takes = _programs(request), taken(request)
    calls = within_precision(request, forward(request, _least(made.model).get("n", 1)))
    parts: list[Compared] = []
    if made.first is not None:
        parts = within_precision(request, decoding(request, _least(made.first).get("n", 1)))
    plan: list[Calls] = [((MODEL,), _feeds(takes, each)) for each in calls]
    plan += [((FIRST, DECODE), _feeds("x", each)) for each in parts]
    answers = cache(lambda: run(folder, plan))
    yield found(request, "forward", calls, lambda: answers()[: len(calls)], _limits(made.model))
    if made.first is None:
        none = undecoded(request)
        yield replace(none, note=made.why) if made.why else none
        return
    limits = {FIRST: _limits(made.first), DECODE: _limits(made.decode)}
    note = "; ".join(f"{name}: {each}" for name, each in limits.items() if each)
    yield found(request, "decoding", parts, lambda: answers()[len(calls) :], note)


def _least(program: Program | None) -> dict[str, int]:
    """Return the least sizes.

    Where the exporter finds a least size itself it never finds less than 2, and a model has no
    guards: the calls that are compared begin with one token and one row.
    """
    return {} if program is None else {at: size for at, size in program.least.items() if size > 2}


def _limits(program: Program | None) -> str:
    return ", ".join(f"{name} is {size} at least" for name, size in _least(program).items())


def _feeds(takes: str, compared: Compared) -> list[Feeds]:
    return [{takes: x, **given} for x, given in compared.calls]


# ── the models ───────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=1)  # translated for what stands in the way, then written
def _models(request: Request) -> dict[str, ir.Model]:
    """Translate every program. Raises `NoProgramError` where one cannot be."""
    from .onnx_graph import converted

    found = {}
    for name, program in _programs(request).named.items():
        try:
            found[name.replace(".pt2", ".onnx")] = converted(program)
        except NoProgramError as problem:
            part = name.removesuffix(".pt2")
            raise NoProgramError(f"{part}: {problem}") from None
    return found


def _programs(request: Request) -> Programs:
    return programs(_with_pieces(request))


@lru_cache(maxsize=1)
def _with_pieces(request: Request) -> Request:
    """Return the request of the same module in which functions are operators of ONNX."""
    code = replace(request.code, text=with_operators(request.code.text))
    module = construct(code, request.dtype)
    module.load_state_dict(request.module.state_dict())
    return replace(request, code=code, module=module.eval().requires_grad_(False))


# ── the README ───────────────────────────────────────────────────────────────────────────

_DECODES = (
    "`first.onnx` begins sequences and gives their cache too. `decode.onnx` goes on with one more "
    "token of each row, and gives the cache after it."
)


def _readme(request: Request) -> str:
    made = _models(request)
    says = (
        "ONNX models of opset 23, which onnxruntime runs. `model.onnx` is called with a batch of "
        "whole sequences."
    )
    lines = ["import onnxruntime", "", 'model = onnxruntime.InferenceSession("model.onnx")',
             f"(y,) = model.run(None, {_feeding(made[MODEL])})"]  # fmt: skip
    parts = [says, fenced("python", lines)]
    if DECODE in made:
        lines = [
            'first = onnxruntime.InferenceSession("first.onnx")',
            'decode = onnxruntime.InferenceSession("decode.onnx")',
            f"y, *cache = first.run(None, {_feeding(made[FIRST])})",
            'kept = {f"cache_{at}": x for at, x in enumerate(cache)}',
            f"y, *cache = decode.run(None, {_feeding(made[DECODE], 'kept')})  # x [b, 1, …]",
        ]
        parts += [_DECODES, fenced("python", lines)]
    return readme(request, *parts)


def _feeding(model: ir.Model, more: str = "") -> str:
    """Write what a model is given, by name."""
    names = [each.name for each in model.graph.inputs]
    given = [f'"{name}": {name}' for name in names if not (name or "").startswith("cache_")]
    return f"{{{', '.join([*given, *([f'**{more}'] if more else [])])}}}"

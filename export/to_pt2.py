"""Programs of `torch.export`, which are loaded and run where only PyTorch is.

made/model.pt2      y = model(x): a batch of whole sequences
made/first.pt2      y, *cache = first(x): the same, with what later tokens need
made/decode.pt2     y, *cache = decode(x, cache): one token more for each row
made/README.md      how to load and call them
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compiler.model import Block, Model, Pairwise
from ..compiler.verify.cases import Case
from ..compiler.verify.verify import Finding
from . import compiled
from .archive import save
from .checking import decoded, decoding, forward, forwarded
from .place import write_text
from .program import NoProgramError, Program, trace
from .readme import fenced, readme
from .request import Request
from .steps import First, Step, spec_of

OPTIONS = frozenset({"portable", "aot"})
MODEL, FIRST, DECODE = "model.pt2", "first.pt2", "decode.pt2"
DRAWN = Case(3, 37, 23, seed=9)  # what programs are traced with: all sizes are apart
OTHER = Case(2, 29, 19, seed=9)
AXES = {"context": ("b", "m"), "segments": ("b", "n"), "condition": ("b",)}


@dataclass(frozen=True)
class Programs:
    """What is written: one program for whole sequences and, where it decodes, two for steps."""

    model: Program
    first: Program | None = None
    decode: Program | None = None
    why: str = ""  # there are none for steps, though it decodes

    @property
    def named(self) -> dict[str, Program]:
        """The programs by the names of their files."""
        found = {MODEL: self.model, FIRST: self.first, DECODE: self.decode}
        return {name: each for name, each in found.items() if each is not None}


def obstacles(request: Request) -> Sequence[str]:
    """Say what cannot be a program: tokens in turn, whatever else the exporter cannot take."""
    try:
        made = programs(request)
    except NoProgramError as problem:
        return (str(problem),)
    return compiled.obstacles(made.named) if request.options.aot else ()


def _keeps(block: Block) -> bool:
    mixes = (each.mix for each in block.mixings.values())
    return any(isinstance(each, Pairwise) and each.keep is not None for each in mixes)


def write(request: Request, folder: Path) -> None:
    """Write every program, and how to load them."""
    for name, each in programs(request).named.items():
        save(each.exported, folder / name)
        if request.options.aot:
            compiled.write(request, each, folder / compiled.called(name))
    write_text(folder / "README.md", _readme(request))


def check(request: Request, folder: Path) -> Iterator[Finding]:
    """Load the programs with torch alone; run them on odd sizes, and token by token."""
    made = programs(request)
    given: dict[str, Any] = {"folder": str(folder), "takes": taken(request)}
    calls = forward(request, made.model.least.get("n", 1))
    yield forwarded(request, calls, _LOAD + _FORWARD, given, made.model.limits)
    steps: list[Any] = []
    note = ""
    if made.first is not None and made.decode is not None:
        steps = decoding(request, made.first.least.get("n", 1))
        note = "; ".join(
            f"{name}: {each.limits}"
            for name, each in (("first", made.first), ("decode", made.decode))
            if each.limits
        )
    if made.why:
        yield Finding(request.what.name, "decoding", None, note=made.why)
    else:
        yield decoded(request, steps, _LOAD + _DECODE, given, note)
    if request.options.aot:
        yield from compiled.check(request, calls, steps, given, (_FORWARD, _DECODE))
    if request.options.portable:
        yield _portable(request)


def _portable(request: Request) -> Finding:
    """Say which operators are left that are not of PyTorch's core set."""
    made = programs(request).named.values()
    left = sorted({name for each in made for name in each.beyond_core})
    ours = [name for name in left if name.startswith("headloom")]
    note = f"others than core: {', '.join(left)}" if left else ""
    return Finding(request.what.name, "core operators", not ours, len(made), 0.0, note)


# ── the programs ─────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=1)  # traced for what stands in the way, then written
def programs(request: Request) -> Programs:
    """Trace every program. Raises `NoProgramError` where one cannot be."""
    if turns := [each.name for each in request.subject.blocks if _keeps(each)]:
        names = " and ".join(f"`{each}`" for each in dict.fromkeys(turns))
        raise NoProgramError(f"`keep` of {names} takes tokens in turn: no program is for every "
                             "length")  # fmt: skip
    x, given = _drawn(request, DRAWN)
    takes = taken(request)
    axes = {name: _axes(name, each) for name, each in {takes: x, **given}.items()}
    most = _most(request, given)
    portable = request.options.portable
    model = _traced(
        "model", lambda: trace(request.module, {takes: x, **given}, axes, most), portable
    )
    if not request.decodes:
        return Programs(model)
    given = {name: each for name, each in given.items() if name != "segments"}
    axes = {"x": axes[takes], **{name: axes[name] for name in given}}
    try:
        first = _traced(
            "first", lambda: trace(First(request.module), {"x": x, **given}, axes, most), portable
        )
        return Programs(model, first, _traced("decode", lambda: _decode(request), portable))
    except NoProgramError as problem:
        return Programs(model, why=f"no program can: {problem}")


def _traced(which: str, make: Callable[[], Program], portable: bool) -> Program:
    """Trace a program; what stands in its way says which it is."""
    try:
        made: Program = make()
    except NoProgramError as problem:
        raise NoProgramError(f"{which}: {problem}") from None
    return made.decomposed() if portable else made


def _decode(request: Request) -> Program:
    """Trace the step that goes on after a cache."""
    module = request.module
    x, given = _drawn(request, DRAWN)
    given.pop("segments", None)
    spec = spec_of(module, x, given)
    _, *cache = First(module)(x, **given)
    y, more = _drawn(request, OTHER)
    more.pop("segments", None)
    _, *other = First(module)(y, **more)
    known = {(DRAWN.batch, OTHER.batch): "b", (DRAWN.tokens, OTHER.tokens): "c",
             (DRAWN.context, OTHER.context): "m"}  # fmt: skip
    axes, room = [], None
    for at, (one, two) in enumerate(zip(cache, other, strict=True)):
        found: list[str | None] = []
        for pair in zip(one.shape, two.shape, strict=True):
            found.append(None if pair[0] == pair[1] else known.setdefault(pair, f"s{len(known)}"))
        axes.append(tuple(found))
        if "c" in found and spec[at].part >= 0 and room is None:
            room = at
    given.pop("context", None)
    step = Step(module, spec, room)
    sizes = dict.fromkeys([name for each in axes for name in each if name], None)
    along = {"x": ("b", *[None] * (x.ndim - 1)), "cache": axes}
    along |= {name: _axes(name, each) for name, each in given.items()}
    x = x[:, :1].contiguous()
    return trace(step, {"x": x, "cache": cache, **given}, along, {"b": None, **sizes})


def taken(request: Request) -> str:
    """Return what the module calls its first argument."""
    return next(iter(inspect.signature(request.module.forward).parameters))


def _drawn(request: Request, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    subject = request.subject
    return subject.inputs(replace(subject.fitting(case), dtype=request.dtype))


def _axes(name: str, x: Tensor) -> tuple[str | None, ...]:
    free = AXES.get(name, ("b", "n"))
    return (*free, *[None] * (x.ndim - len(free)))


def _most(request: Request, given: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Return how large each size may be, None for any."""
    what = request.what
    own = what.positions if isinstance(what, Model) else 0
    found: dict[str, int | None] = {"b": None, "n": own or None}
    if "context" in given:
        encoder = what.encoder if isinstance(what, Model) else None
        found["m"] = encoder.positions or None if encoder is not None else None
    return found


# ── apart ────────────────────────────────────────────────────────────────────────────────

_LOAD = """\
import torch

def load(folder, name):
    return torch.export.load(folder + "/" + name).module()
"""

_FORWARD = """\
def run(folder, takes, calls):
    model = load(folder, "model.pt2")
    with torch.no_grad():
        return [model(**{takes: x}, **given) for x, given in calls]
"""

_DECODE = """\
def run(folder, takes, calls):
    first, decode, made = load(folder, "first.pt2"), load(folder, "decode.pt2"), []
    with torch.no_grad():
        for _, _, ((x, given), *parts) in calls:
            y, *cache = first(x=x, **given)
            found = [y]
            for x, given in parts:
                y, *cache = decode(x=x, cache=cache, **given)
                found.append(y)
            made.append(found)
    return made
"""


# ── how to load it ───────────────────────────────────────────────────────────────────────

_DECODES = (
    "`first.pt2` begins sequences and gives their cache too: a list of tensors, of which the "
    "first says how many tokens each row has had. `decode.pt2` goes on with one more token of "
    "each row, and gives the cache after it; what grows with the sequence comes back longer by one."
)


def _readme(request: Request) -> str:
    made = programs(request)
    name, least = taken(request), made.model.least.get("n", 1)
    x, given = _drawn(request, Case(2, max(9, least), 7, seed=9))
    more = "".join(f", {each}={each}" for each in given)
    lines = ["import torch", "", _example(request, name, x)]
    lines += [_example(request, each, one) for each, one in given.items()]
    lines += ['model = torch.export.load("model.pt2").module()', f"y = model({name}={name}{more})"]
    parts = ["Programs of `torch.export`, which need PyTorch alone.", fenced("python", lines)]
    if made.decode is not None:
        parts += [_DECODES, fenced("python", _decoding_lines(name, list(given)))]
    parts += [f"It decodes, but {made.why}."] if made.why else []
    limits = [f"In `{file}` {each.limits}." for file, each in made.named.items() if each.limits]
    return readme(request, *parts, *limits, *([_COMPILED] if request.options.aot else []))


_COMPILED = (
    "`model.aot.pt2` and its like are compiled for the processor of the machine that wrote them: "
    '`torch._inductor.aoti_load_package("model.aot.pt2")` is called as the program is.'
)


def _example(request: Request, name: str, x: Tensor) -> str:
    """Return a line that makes an argument."""
    size = tuple(x.shape)
    if name == "segments":
        return f"segments = torch.zeros({size}, dtype=torch.int64)"
    if not x.is_floating_point():
        return f"{name} = torch.randint({int(x.max()) + 1}, {size})"
    dtype = "" if request.dtype_name == "float32" else f", dtype={request.dtype}"
    return f"{name} = torch.randn({size}{dtype})"


def _decoding_lines(name: str, given: list[str]) -> list[str]:
    first = "".join(f", {each}={each}" for each in given if each != "segments")
    later = "".join(f", {each}={each}" for each in given if each not in ("segments", "context"))
    return [
        'first = torch.export.load("first.pt2").module()',
        'decode = torch.export.load("decode.pt2").module()',
        f"y, *cache = first(x={name}{first})",
        f"y, *cache = decode(x={name}[:, -1:].contiguous(), cache=cache{later})  # the next token",
    ]

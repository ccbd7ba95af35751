"""The Python door: what `import headloom as hl` offers, on top of the pipeline.

arch = hl.load("gemma.loom")
block = hl.compile(arch, "local", width=512)
oracle = hl.reference(arch, "local", width=512)
oracle.load_state_dict(block.state_dict())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from rich.console import Console
from rich.text import Text

from .checking.check import find
from .emit import Code
from .emit.layers import wholes
from .facts import decoding
from .facts.cost import Cost, cost
from .facts.dtypes import DType, of_torch
from .loading import load
from .lowerings.experts import sent
from .model import Architecture, Block, Model
from .pipeline import generate, plans
from .pipeline import load as load_code
from .plan.plan import Lowering, Plan, Target
from .reports.drawn import Drawn
from .zoo import Entry, entries, entry

if TYPE_CHECKING:
    import torch
    from torch import nn

BACKENDS = ("auto", "torch", "triton")
OPTIMIZE = ("default", "max")
What = Architecture | str | Path


def architecture(what: What) -> Architecture:
    """Return an architecture, loaded where it is a path."""
    return what if isinstance(what, Architecture) else load(what)


def target(
    backend: str = "auto",
    device: str | torch.device | None = None,
    optimize: str = "default",
) -> Target:
    """Return what to compile for. `auto` takes Triton where a CUDA device is used."""
    if optimize not in OPTIMIZE:
        raise ValueError(f"optimize is one of {', '.join(OPTIMIZE)}, not {optimize!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend != "auto":
        return Target(backend, optimize=optimize)
    import torch

    on_gpu = torch.device(device).type == "cuda" if device else torch.cuda.is_available()
    return Target("triton" if on_gpu else "torch", optimize=optimize)


def compile(
    arch: What,
    name: str | None = None,
    *,
    width: int | None = None,
    context_width: int | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    dtype: DType | None = None,
    seed: int | None = None,
    lowering: str | None = None,
    optimize: str = "default",
) -> nn.Module:
    """Compile a block or model to a module; without a name, the only model or block.

    `width` is the block's input width (by default the one it says, or heads · head_dim);
    `dtype` is a name, "bfloat16", or torch's own; `seed` fixes the first weights. All attentions
    take one `lowering` where it is named, as `explain` names them; the fastest that fits is taken
    otherwise. `optimize` "max" has tiles of attention compiled by `torch.compile` at the first
    call that makes some, which takes a C++ compiler and half a minute. Raises `LoomError` where
    the sizes do not fit, `ValueError` for another dtype, and where the lowering does not fit.
    """
    return build_module(
        find(architecture(arch), name, width, context_width),
        replace(target(backend, device, optimize), lowering=lowering),
        device=device,
        dtype=dtype,
        seed=seed,
    )


def build_module(
    what: Block | Model,
    target: Target,
    *,
    device: str | torch.device | None = None,
    dtype: DType | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Generate, load and construct the module of a checked block or model."""
    import torch

    dtype = of_torch(dtype)
    code = generate(what, target)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        made = construct(code, dtype).to(device=device)
    _ORIGINS[type(made)] = what, target
    return made


_ORIGINS: dict[type[nn.Module], tuple[Block | Model, Target]] = {}  # as long as the process lives


def origin(module: nn.Module) -> tuple[Block | Model, Target]:
    """Return what a module was made of, and what for.

    Raises `ValueError` for one that `compile` has not made in this process.
    """
    if type(module) not in _ORIGINS:
        raise ValueError(
            f"this {type(module).__name__} is not of `hl.compile` in this process: "
            "give its description, and its weights in a file"
        )
    return _ORIGINS[type(module)]


def construct(code: Code, dtype: DType | None = None) -> nn.Module:
    """Load a generated text and construct its module in a dtype, by default PyTorch's own."""
    made, dtype = load_code(code), of_torch(dtype)
    with _exactly(dtype):
        return made().to(dtype=dtype)


@contextmanager
def _exactly(dtype: torch.dtype | None) -> Iterator[None]:
    """Make the tensors of a float64 module in float64: `const`s keep all their digits."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def reference(
    arch: What,
    name: str | None = None,
    *,
    width: int | None = None,
    context_width: int | None = None,
    device: str | torch.device | None = None,
    dtype: DType | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return the dense meaning as a module, with the same state dict keys as the compiled one."""
    from .meaning.reference import reference as meaning

    what = find(architecture(arch), name, width, context_width)
    return meaning(what, dtype=of_torch(dtype), device=device, seed=seed)


def emit(
    arch: What,
    name: str | None = None,
    *,
    width: int | None = None,
    context_width: int | None = None,
    backend: str = "auto",
    optimize: str = "default",
) -> str:
    """Return the standalone Python file of a block or model."""
    what = find(architecture(arch), name, width, context_width)
    return generate(what, target(backend, optimize=optimize)).text


@dataclass(frozen=True, repr=False)
class Report(Drawn):
    """How a block or model is computed, and what it costs."""

    what: Block | Model
    lowerings: tuple[Lowering, ...]
    _cost: Cost

    @property
    def params(self) -> int:
        return self._cost.params

    @property
    def flops(self) -> Callable[..., int]:
        return self._cost.flops

    @property
    def cache_bytes(self) -> Callable[..., int]:
        return self._cost.cache_bytes

    @property
    def activation_bytes(self) -> Callable[..., int]:
        return self._cost.activation_bytes

    def show(self, console: Console | None = None) -> None:
        """Draw every path, and the costs."""
        from .reports.show import costs

        console = console or Console(highlight=False)
        self.show_paths(console)
        console.print(costs(self.what, 4096))

    def show_paths(self, console: Console | None = None) -> None:
        """Print which path every attention takes, and why not another."""
        console = console or Console(highlight=False)
        for each in self.lowerings:
            console.print(Text.assemble((each.node, "bold"), ": ", (each.path, "green")))
            lines = [each.reason, *(f"not {path}: {why}" for path, why in each.obstacles)]
            if each.beside is not None:
                lines.insert(1, f"{each.beside[1]}: {each.beside[0]}")
            for line in lines:
                console.print(f"  {line}", markup=False, soft_wrap=True)


def explain(
    arch: What,
    name: str | None = None,
    *,
    width: int | None = None,
    context_width: int | None = None,
    backend: str = "auto",
    optimize: str = "default",
) -> Report:
    """Say which path every attention and recurrence takes, why, and what stands in the way."""
    what = find(architecture(arch), name, width, context_width)
    return explained(what, target(backend, optimize=optimize))


def _called(plan: Plan, chosen: Lowering) -> str:
    """Name an attention: its block, and the branch it is."""
    return plan.block.name if chosen.node == "o" else f"{plan.block.name}.{chosen.node}"


def explained(what: Block | Model, target: Target) -> Report:
    """Return the report of a checked block or model; why it cannot decode is an obstacle too."""
    found = []
    for plan in plans(what, target):
        why = decoding.obstacle(plan.block)
        also = () if why is None else (("decoding", why),)
        for each in plan.lowerings.values():
            called, obstacles = _called(plan, each), (*each.obstacles, *also)
            found.append(replace(each, node=called, obstacles=obstacles))
    tops = list(what.layers) if isinstance(what, Model) else [what]
    return Report(what, (*found, *sent(wholes(tops))), cost(what))


@dataclass(frozen=True, repr=False)
class View(Drawn):
    """A block or model to look at: its parts, its graph, its mask as a picture, its cost."""

    what: Block | Model
    tokens: int = 4096

    @property
    def figure(self) -> str:
        """Boxes and arrows, in Mermaid's words."""
        from .reports.figure import figure

        return figure(self.what)

    def show(self, console: Console | None = None) -> None:
        """Draw it."""
        from .reports.show import show

        show(self.what, self.tokens, console)


def show(
    arch: What,
    name: str | None = None,
    *,
    width: int | None = None,
    context_width: int | None = None,
    tokens: int = 4096,
) -> View:
    """Return what a notebook draws and `print` prints; `tokens` is a length for the costs."""
    return View(find(architecture(arch), name, width, context_width), tokens)


@overload
def zoo(name: None = None) -> list[Entry]: ...
@overload
def zoo(name: str) -> Entry: ...
def zoo(name: str | None = None) -> list[Entry] | Entry:
    """Return the known mechanisms, or one of them: its `.text`, and its `.arch`.

    Raises `LookupError` where there is none of this name.
    """
    return entries() if name is None else entry(name)

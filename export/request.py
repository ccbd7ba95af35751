"""What is to be exported: a block or model, its text, its module with the weights it goes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compiler.api import construct, origin
from ..compiler.emit import Code
from ..compiler.facts.dtypes import DType, named, of_torch
from ..compiler.model import Block, Model
from ..compiler.pipeline import generate
from ..compiler.plan.plan import Target
from ..compiler.verify.cases import Subject


class NotExportedError(ValueError):
    """Something cannot be exported; `obstacles` say which part and why."""

    def __init__(self, name: str, to: str, obstacles: Sequence[str]) -> None:
        super().__init__(f"`{name}` cannot be exported to {to}: {'; '.join(obstacles)}")
        self.obstacles = tuple(obstacles)


@dataclass(frozen=True)
class Options:
    """What a target may be asked for beside the module; each says which it takes."""

    portable: bool = False  # no operators but PyTorch's smallest set
    aot: bool = False  # compiled for this machine's processor too

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of those that are asked for."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name))


@dataclass(frozen=True)
class Request:
    """A module to export, on the CPU and in evaluation, and where its weights are from."""

    what: Block | Model
    code: Code
    module: nn.Module
    weights: str  # in words
    options: Options = Options()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module."""
        return next((each.dtype for each in self.module.parameters()), torch.get_default_dtype())

    @property
    def dtype_name(self) -> str:
        return named(self.dtype)

    @property
    def subject(self) -> Subject:
        """What draws the arguments of a call."""
        return Subject(self.what, self.module, self.module, self.code)

    @property
    def decodes(self) -> bool:
        """Whether it goes on token by token."""
        classifies = isinstance(self.what, Model) and self.what.classifies
        return self.subject.obstacle is None and not classifies


def of_module(module: nn.Module, dtype: DType | None, options: Options) -> Request:
    """Return the request of a module that was compiled in this process; it is left alone.

    Raises `ValueError` for any other module.
    """
    what, target = origin(module)
    code = generate(what, target)
    state = module.state_dict()
    own = next((each.dtype for each in module.parameters()), None)
    made = _loaded(code, state, dtype or own)
    return Request(what, code, made, "those of the module", options)


def of_description(
    what: Block | Model,
    target: Target,
    weights: str | Path | None,
    dtype: DType | None,
    options: Options,
) -> Request:
    """Return the request of a checked block or model, with weights from a file or drawn.

    Without a dtype it is in that of the weights. Raises `ValueError` where they do not fit.
    """
    code = generate(what, target)
    if weights is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = construct(code, dtype).eval()
        return Request(what, code, made, "drawn, with the seed 0", options)
    path = Path(weights)
    made = _loaded(code, read_weights(path), dtype)
    return Request(what, code, made, f"those of `{path.name}`", options)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file, or of one that `torch.save` wrote.

    Raises `OSError` where it cannot be read, `ValueError` where it is neither.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: object = load_file(path)
        except SafetensorError as problem:
            raise ValueError(f"`{path.name}` is no safetensors file: {problem}") from None
    else:
        with path.open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as problem:
                raise ValueError(f"`{path.name}` holds no weights: {problem}") from None
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise ValueError(f"`{path.name}` holds no state dict: tensors by name")
    return state


def _loaded(code: Code, state: dict[str, Tensor], dtype: DType | None) -> nn.Module:
    """Construct a module with weights. Raises `ValueError` where they do not fit."""
    found = {each.dtype for each in state.values() if each.is_floating_point()}
    made = construct(code, of_torch(dtype) or (found.pop() if len(found) == 1 else None))
    _fitting(made.state_dict(), state)
    made.load_state_dict(state)
    return made.eval()


def _fitting(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, more = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = (
        f"`{name}` is {list(state[name].shape)}, not {list(each.shape)}"
        for name, each in own.items()
        if name in state and state[name].shape != each.shape
    )
    wrong = [
        *([f"there is no `{missing[0]}`{_others(missing)}"] if missing else []),
        *([f"`{more[0]}` is not known{_others(more)}"] if more else []),
        *shapes,
    ]
    if wrong:
        raise ValueError(f"the weights do not fit: {'; '.join(wrong[:3])}")


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

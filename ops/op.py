"""What an operation is: one definition in one place.

An `Op` says how a stage of a pipeline is called, what shapes it takes and gives, which
learned tensors it owns, what it means (`eager`, the reference), how it is written in an
emitted module (`text`) and what it costs. The checker, the reference, the emitter and the
cost model all read the same object; none of them knows an operation by name.

torch is imported only inside `eager`, so that a description can be checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..grammar.syntax import Expr
from .shape import Shape, pooling

if TYPE_CHECKING:
    from torch import Tensor

Options = Mapping[str, Any]


class Mismatch(Exception):
    """The operation does not fit what it is given; `help` says what would.

    `at` is the option that is wrong, `scaling`, or an argument of what was chosen for it,
    `scaling.short`.
    """

    def __init__(self, message: str, label: str = "", help: str = "", at: str = "") -> None:
        super().__init__(message)
        self.message, self.label, self.help, self.at = message, label, help, at


@dataclass(frozen=True, slots=True)
class Option:
    """An argument of a stage.

    `kind` is size, number, positive (a number), positives (a list of them), flag, stream, the
    words allowed, or calls, one of which may stand in place of a number: name → its arguments.
    """

    name: str
    kind: str | tuple[str, ...] | Mapping[str, tuple[Option, ...]]
    default: Any = None
    required: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """The call that was given for an option, `yarn(4, 2048)`, and its arguments by name."""

    name: str
    values: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor the module owns; `init` is a named scheme, or an expression over its indices."""

    name: str
    shape: tuple[int, ...]
    init: Expr | str
    learned: bool = True
    moved: bool = False  # by training, without a gradient; then it is not learned


@dataclass(frozen=True, slots=True)
class Run:
    """What the eager meaning may look at besides its inputs."""

    positions: Mapping[str, Tensor]  # tokens axis → [b or 1, tokens] absolute positions
    training: bool = False
    tokens: str = "n"  # the axis of the operation's own stream
    shapes: tuple[Shape, ...] = ()  # of the inputs, for one along "1" that lacks its batch

    def has_heads(self, at: int, x: Tensor) -> bool:
        """Say whether input `at` has heads; by its dimensions where no shapes are given."""
        return self.shapes[at].heads is not None if self.shapes else x.ndim == 4

    def places(self, x: Tensor) -> Tensor:
        """Return the positions [b or 1, tokens] of the stream's tokens; a list counts from 0."""
        import torch

        if self.tokens.isdecimal():
            return torch.arange(int(self.tokens), device=x.device)[None]
        of, stride = pooling(self.tokens)
        if stride > 1:  # a pooled token stands where its group begins
            return stride * torch.arange(x.shape[-2], device=x.device)[None]
        return self.positions[of]


class Op(ABC):
    """One stage of a pipeline."""

    name: str
    options: tuple[Option, ...] = ()
    suffix: str = ""  # its tensors live in the submodule `<stream>_<suffix>`
    starts: bool = False  # its values are its own; the input only says how large the batch is
    random: bool = False  # two of the same are not equal: each draws
    positional: bool = False  # its text reads `positions`, or `context_positions` along "m"
    by_sequence: bool = False  # its text reads `run`, or `context_run`: whose each token is
    whole_rows: bool = False  # it reads all tokens of a row, not to be told apart
    groups: bool = False  # it makes one token of each group of tokens
    bare: bool = False  # its name alone is a stream, that of x
    instead: str = ""  # how to say without later tokens what reads them, if that can be said
    wide: bool = False  # what it gives stays float32 where the block is in less

    @property
    def defaults(self) -> dict[str, Any]:
        """The options as they are where none is written."""
        return {each.name: each.default for each in self.options}

    @abstractmethod
    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        """Return the output's shape. Raises `Mismatch`."""

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        """Return the shape its first input must have to give `out`, where that is fixed."""
        return out

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        """Fill in what was left out, from the input's shape and the output that is needed."""
        return options

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        """Return the tensors it owns, named within its submodule."""
        return ()

    @abstractmethod
    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        """Return the result: the meaning every other form of the operation is tested against."""

    @abstractmethod
    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        """Return a PyTorch expression for an emitted module; `module` is its submodule."""

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        """Return the text that makes its submodule, if it has one."""
        return ""

    @staticmethod
    def run_of(shape: Shape) -> str:
        """Return the variable that numbers the sequences of a stream's tokens, or `None`."""
        of, stride = pooling(shape.tokens)
        run = {"n": "run", "m": "context_run"}.get(of, "None")
        return run if stride == 1 or run == "None" else f"{run}_{stride}"

    @staticmethod
    def positions_of(shape: Shape) -> str:
        """Return the text of the positions of a stream's tokens; a list counts from 0."""
        if shape.tokens.isdecimal():
            return f"torch.arange({shape.tokens}, device=x.device)"
        of, stride = pooling(shape.tokens)
        if stride > 1:
            return f"{'context_' * (of == 'm')}starts_{stride}"
        return "positions" if shape.tokens == "n" else "context_positions"

    def lookback(self, options: Options) -> int:
        """Return how many earlier tokens the result for a token reads."""
        return 0

    def carries(self, inputs: Sequence[Shape], options: Options) -> int:
        """Return how many numbers it makes of all earlier tokens, to go on from, in float64."""
        return 0

    def reads_earlier(self, inputs: Sequence[Shape], options: Options) -> bool:
        """Say whether the result for a token reads earlier ones."""
        return bool(self.lookback(options) or self.carries(inputs, options))

    def resumed(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        """Return its text where earlier tokens are `before`, and `known` numbers all of them.

        What carries goes on from `past`, and gives what it made so far too.
        """
        raise NotImplementedError

    def reaches(self, options: Options) -> tuple[int, int]:
        """Return the last token of the first group it makes, and how far that of the next is."""
        raise NotImplementedError

    def looks_ahead(self, options: Options) -> bool:
        """Say whether the result for a token reads later ones."""
        return False

    def counts_tokens(self, options: Options) -> str:
        """Say from where on the result for a token depends on how many there are, if it does."""
        return ""

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        """Return floating point operations per token (a multiply-add counts two)."""
        return 0

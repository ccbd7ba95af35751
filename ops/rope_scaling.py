"""How rotary positions reach further than they were trained for: `rope(scaling = yarn(4, 2048))`.

A row says how a way is called, which frequencies it makes of θ^(−2c / r), and by what it
multiplies cos and sin. `length` is the number of tokens that was trained on; `tokens` [b, 1, 1] is
how many a sequence has now. Arguments and formulas are those of the models that use them, under
their names in `transformers`: `factor`, `attention_factor`, `beta_fast`, …

    linear         Chen et al. 2023           every frequency / factor
    dynamic        NTK-aware, "emozilla"      θ grows with the sequence
    yarn           Peng et al. 2023           slow frequencies / factor, blended by number of pair
    longrope       Ding et al. 2024 (Phi-3)   a factor a frequency, two lists of them
    llama3         Llama 3.1, 2024            slow frequencies / factor, blended by turns
    proportional   Gemma 4                    a share of the pairs turns, the others stand still
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .op import Mismatch, Option, Options

if TYPE_CHECKING:
    from torch import Tensor

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plain:
    """Rotary positions without scaling: r turned features, the base, the tokens there are."""

    turned: int
    theta: float
    tokens: Tensor  # [b or 1, 1, 1]

    def frequencies(self, theta: float | Tensor | None = None) -> Tensor:
        """Return θ^(−2c / r), of a base of its own for each sequence if one is given."""
        import torch

        base = self.theta if theta is None else theta
        pairs = torch.arange(0, self.turned, 2, dtype=torch.float64, device=self.tokens.device)
        falling: Tensor = base ** (-pairs / self.turned)
        return falling


@dataclass(frozen=True, slots=True)
class Scaling:
    """One row: `options` make the frequencies, `gain_options` what cos and sin are times."""

    name: str
    options: tuple[Option, ...]
    frequencies: Callable[[Plain, Values], Tensor]
    helper: str
    gain_options: tuple[Option, ...] = ()
    gain: Callable[[Values], float] = lambda _: 1.0
    refuse: Callable[[Values], None] = lambda _: None  # of `turned` and `theta` too
    counts: bool = False  # reads how many tokens there are

    @property
    def arguments(self) -> tuple[Option, ...]:
        return (*self.options, *self.gain_options)


def _linear(plain: Plain, of: Values) -> Tensor:
    slower: Tensor = plain.frequencies() / of["factor"]
    return slower


def _dynamic(plain: Plain, of: Values) -> Tensor:
    tokens, length, factor = plain.tokens.clamp(min=of["length"]), of["length"], of["factor"]
    stretched = factor * tokens / length - (factor - 1)
    return plain.frequencies(plain.theta * stretched ** (plain.turned / (plain.turned - 2)))


def _yarn(plain: Plain, of: Values) -> Tensor:
    import torch

    def pair(turns: float) -> float:
        """Return which pair makes so many turns in `length` tokens."""
        angle = of["length"] / (turns * 2 * math.pi)
        return plain.turned * math.log(angle) / (2 * math.log(plain.theta))

    low, high = pair(of["beta_fast"]), pair(of["beta_slow"])
    if of["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, plain.turned - 1)
    high = high + 0.001 if low == high else high
    number = torch.arange(plain.turned // 2, dtype=torch.float64, device=plain.tokens.device)
    slow = ((number - low) / (high - low)).clamp(0, 1)
    each = plain.frequencies()
    blended: Tensor = each / of["factor"] * slow + each * (1 - slow)
    return blended


def _longrope(plain: Plain, of: Values) -> Tensor:
    import torch

    short, long = (plain.tokens.new_tensor(of[name]) for name in ("short", "long"))
    return plain.frequencies() / torch.where(plain.tokens > of["length"], long, short)


def _llama3(plain: Plain, of: Values) -> Tensor:
    import torch

    each, factor, low, high = plain.frequencies(), of["factor"], of["low"], of["high"]
    wave = 2 * math.pi / each  # tokens a turn
    smooth = (of["length"] / wave - low) / (high - low)
    between = (1 - smooth) * each / factor + smooth * each
    slow = torch.where(wave > of["length"] / low, each / factor, between)
    return torch.where(wave < of["length"] / high, each, slow)


def _proportional(plain: Plain, of: Values) -> Tensor:
    each: Tensor = plain.frequencies() / of["factor"]
    each[int(of["share"] * plain.turned // 2) :] = 0
    return each


def _magnified(scale: float, by: float = 1) -> float:
    return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1


def _yarn_gain(of: Values) -> float:
    if of["attention_factor"] is not None:
        return float(of["attention_factor"])
    if of["mscale"] and of["mscale_all_dim"]:
        above, below = (_magnified(of["factor"], of[each]) for each in ("mscale", "mscale_all_dim"))
        return above / below
    return _magnified(of["factor"])


def _longrope_gain(of: Values) -> float:
    if of["attention_factor"] is not None:
        return float(of["attention_factor"])
    if of["factor"] <= 1:
        return 1.0
    return math.sqrt(1 + math.log(of["factor"]) / math.log(of["length"]))


def _refuse_dynamic(of: Values) -> None:
    if of["turned"] < 4:
        raise Mismatch(
            "`dynamic` needs two pairs of features or more", f"{of['turned']} turn", at="scaling"
        )


def _refuse_yarn(of: Values) -> None:
    if of["theta"] <= 1:
        raise Mismatch("`yarn` needs a base above 1", f"theta = {of['theta']}", at="theta")


def _refuse_longrope(of: Values) -> None:
    for name in ("short", "long"):
        if len(of[name]) != of["turned"] // 2:
            label = f"{len(of[name])} factors, {of['turned'] // 2} frequencies"
            help = f"{of['turned']} features turn, two a frequency"
            raise Mismatch(f"`{name}` has one factor a frequency", label, help, f"scaling.{name}")
    if of["length"] == 1 and of["attention_factor"] is None and of["factor"] > 1:
        raise Mismatch(
            "`longrope` needs a length above 1", "its logarithm is 0", at="scaling.length"
        )


def _refuse_llama3(of: Values) -> None:
    if not of["low"] < of["high"]:
        label = f"low = {of['low']}, high = {of['high']}"
        raise Mismatch("`low` must be less than `high`", label, at="scaling.low")


def _refuse_proportional(of: Values) -> None:
    if of["share"] > 1:
        label = f"it is {of['share']}"
        raise Mismatch("a share lies in 0 < share <= 1", label, at="scaling.share")


_FACTOR = Option("factor", "positive", required=True)
_LENGTH = Option("length", "size", required=True)
_GAIN = Option("attention_factor", "positive")

SCALINGS: dict[str, Scaling] = {
    row.name: row
    for row in (
        Scaling("linear", (_FACTOR,), _linear, "rope_frequencies"),
        Scaling("dynamic", (_FACTOR, _LENGTH), _dynamic, "dynamic_frequencies",
                refuse=_refuse_dynamic, counts=True),
        Scaling("yarn",
                (_FACTOR, _LENGTH, Option("beta_fast", "positive", 32),
                 Option("beta_slow", "positive", 1), Option("truncate", "flag", True)),
                _yarn, "yarn_frequencies",
                (_GAIN, Option("mscale", "positive"), Option("mscale_all_dim", "positive")),
                _yarn_gain, _refuse_yarn),
        Scaling("longrope",
                (Option("short", "positives", required=True),
                 Option("long", "positives", required=True), _LENGTH),
                _longrope, "longrope_frequencies", (Option("factor", "positive", 1), _GAIN),
                _longrope_gain, _refuse_longrope, counts=True),
        Scaling("llama3",
                (_FACTOR, Option("low", "positive", required=True),
                 Option("high", "positive", required=True), _LENGTH),
                _llama3, "llama3_frequencies", refuse=_refuse_llama3),
        Scaling("proportional",
                (Option("share", "positive", required=True), Option("factor", "positive", 1)),
                _proportional, "proportional_frequencies", refuse=_refuse_proportional),
    )
}  # fmt: skip


NONE = Scaling("none", (), lambda plain, _: plain.frequencies(), "rope_frequencies")


def scaling_of(options: Options) -> tuple[Scaling, Values]:
    """Return the row and the arguments of `scaling`; a number is `linear`, 1 is none."""
    said = options["scaling"]
    if said == 1:
        return NONE, {}
    if isinstance(said, int | float):
        return SCALINGS["linear"], {"factor": said}
    return SCALINGS[said.name], dict(said.values)

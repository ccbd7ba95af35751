"""Every way to scale rotary positions: its text against its meaning, and what it does by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headloom.compiler.pieces import positions
from headloom.ops import OPS, Chosen, Run, Shape
from headloom.ops.rope_scaling import SCALINGS, Plain, scaling_of

PIECES = vars(positions)
ROPE, SHAPE, THETA = OPS["rope"], Shape("n", 8, 3), 100
SHORT, LONG = (1, 1.25, 1.5, 2), (2, 3, 4, 8)


def chosen(name: str, **values: Any) -> Chosen:
    """Return `name(…)` with what was left out at its default, as the checker does."""
    return Chosen(
        name,
        tuple(
            (each.name, values.get(each.name, each.default)) for each in SCALINGS[name].arguments
        ),
    )


WAYS = {
    "linear": chosen("linear", factor=4),
    "dynamic": chosen("dynamic", factor=2, length=6),
    "yarn": chosen("yarn", factor=4, length=16),
    "yarn, not truncated": chosen("yarn", factor=4, length=16, truncate=False, beta_fast=4),
    "yarn, two scales": chosen("yarn", factor=4, length=16, mscale=1, mscale_all_dim=0.7),
    "yarn, one pair blends": chosen("yarn", factor=4, length=16, beta_fast=1e-9, beta_slow=1e-9),
    "longrope": chosen("longrope", short=SHORT, long=LONG, length=6, factor=4),
    "longrope, a gain": chosen("longrope", short=SHORT, long=LONG, length=6, attention_factor=1.5),
    "llama3": chosen("llama3", factor=8, low=1, high=4, length=16),
    "proportional": chosen("proportional", share=0.5),
    "proportional, slower": chosen("proportional", share=0.8, factor=2),
}
POSITIONS = {
    "few": torch.arange(4),
    "many": torch.arange(9),
    "later": torch.arange(9) + 3,
    "of each sequence": torch.stack([torch.arange(9), (torch.arange(9) - 5).clamp(min=0)]),
}


def options(scaling: Any, **more: Any) -> dict[str, Any]:
    return ROPE.complete(ROPE.defaults | {"theta": THETA, "scaling": scaling} | more, SHAPE, None)


def drawn(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, n, 8, dtype=torch.float64, generator=generator)


def meant(said: dict[str, Any], x: Tensor, positions: Tensor) -> Tensor:
    assert ROPE.shape([SHAPE], said) == SHAPE
    return ROPE.eager([x], said, {}, Run({"n": positions.expand(2, -1)}))


def written(said: dict[str, Any], x: Tensor, positions: Tensor) -> Tensor:
    text = ROPE.text(["x"], [SHAPE], said, "")
    made: Tensor = eval(text, PIECES | {"x": x, "positions": positions})
    return made


@pytest.mark.parametrize("places", POSITIONS)
@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_the_meaning(way: str, places: str) -> None:
    positions = POSITIONS[places]
    x = drawn(positions.shape[-1])
    for more in ({}, {"style": "interleaved", "inverse": True}):
        said = options(WAYS[way], **more)
        torch.testing.assert_close(
            written(said, x, positions), meant(said, x, positions), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("way", WAYS)
def test_the_inverse_turns_back(way: str) -> None:
    x, positions = drawn(9), POSITIONS["of each sequence"]
    there = meant(options(WAYS[way]), x, positions)
    back = meant(options(WAYS[way], inverse=True), there, positions)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)


def frequencies(way: str, tokens: int = 1) -> Tensor:
    row, values = scaling_of({"scaling": WAYS[way]})
    return row.frequencies(
        Plain(8, THETA, torch.full((1, 1, 1), tokens).double()), values
    ).flatten()


PLAIN = torch.tensor([THETA ** (-c / 4) for c in range(4)]).double()


def test_dynamic_is_plain_up_to_its_length() -> None:
    torch.testing.assert_close(frequencies("dynamic", 6), PLAIN)
    grown = THETA * (2 * 12 / 6 - 1) ** (8 / 6)
    torch.testing.assert_close(frequencies("dynamic", 12), grown ** -(torch.arange(4) / 4).double())


def test_longrope_takes_the_long_factors_beyond_its_length() -> None:
    torch.testing.assert_close(frequencies("longrope", 6), PLAIN / torch.tensor(SHORT))
    torch.testing.assert_close(frequencies("longrope", 7), PLAIN / torch.tensor(LONG))
    row, values = scaling_of({"scaling": WAYS["longrope"]})
    assert math.isclose(row.gain(values), math.sqrt(1 + math.log(4) / math.log(6)))


def test_llama3_divides_what_makes_less_than_a_turn() -> None:
    turns = 16 * PLAIN / (2 * math.pi)  # 2.5, 0.8, 0.25, 0.08
    share = (turns[0] - 1) / 3
    expected = torch.cat([(PLAIN[:1] * (share + (1 - share) / 8)), PLAIN[1:] / 8])
    torch.testing.assert_close(frequencies("llama3"), expected)


def test_proportional_leaves_pairs_still() -> None:
    torch.testing.assert_close(frequencies("proportional"), PLAIN * torch.tensor([1, 1, 0, 0]))
    slower = PLAIN * torch.tensor([0.5, 0.5, 0.5, 0])
    torch.testing.assert_close(frequencies("proportional, slower"), slower)


def test_a_sequence_does_not_depend_on_those_beside_it() -> None:
    positions = POSITIONS["of each sequence"]
    x = drawn(9)
    for way in ("dynamic", "longrope"):
        said = options(WAYS[way])
        both, alone = written(said, x, positions), written(said, x[1:], positions[1])
        torch.testing.assert_close(both[1:], alone)
        assert not torch.allclose(both[:1], written(said, x[:1], positions[1]))

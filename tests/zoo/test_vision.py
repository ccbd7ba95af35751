"""Family `vision`: tokens on a grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .mechanisms import MHA, Mechanism, assert_close, tokens, visible

FULL = MHA.replace("; mask = causal", "")


def clipped(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


Pixel = tuple[int, int]
SETS: dict[str, tuple[int, int, Callable[[int, Pixel, Pixel], bool]]] = {
    "axial": (6, 4, lambda h, a, b: a[0] == b[0] if h < 2 else a[1] == b[1]),
    "criss_cross": (6, 4, lambda h, a, b: a[0] == b[0] or a[1] == b[1]),
    "swin": (8, 8, lambda h, a, b: all(s // 4 == t // 4 for s, t in zip(a, b, strict=True))),
    "swin_shifted": (
        8, 8, lambda h, a, b: all((s + 2) // 4 == (t + 2) // 4 for s, t in zip(a, b, strict=True))),
    "crossformer_sda": (
        8, 8, lambda h, a, b: all(s // 4 == t // 4 for s, t in zip(a, b, strict=True))),
    "crossformer_lda": (
        8, 8, lambda h, a, b: all(s % 2 == t % 2 for s, t in zip(a, b, strict=True))),
    "neighborhood": (
        6, 5, lambda h, a, b: all(0 <= t - clipped(s - 1, 0, size - 3) <= 2
                                  for s, t, size in zip(a, b, (6, 5), strict=True))),
    "stand_alone": (
        6, 5, lambda h, a, b: all(abs(s - t) <= 1 for s, t in zip(a, b, strict=True))),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_who_sees_whom(name):
    rows, cols, sees = SETS[name]
    pixels = [(row, col) for row in range(rows) for col in range(cols)]
    expected = torch.tensor([[[sees(h, a, b) for b in pixels] for a in pixels] for h in range(4)])
    assert torch.equal(visible(name, rows * cols), expected)


WIDE = {
    "axial": (("mask  = h < 2 and row(i) == row(j) or h >= 2 and col(i) == col(j)",
               "mask = row(i) // 6 == row(j) // 6"),),
    "swin": (("relative(4)", "relative(8)"), ("windows(4, 0)", "windows(8, 0)")),
    "crossformer_sda": (("near(4)", "near(8)"),),
    "crossformer_lda": (("relative(2)", "relative(1)"), ("far(4, 2)", "far(8, 1)")),
    "neighborhood": (("grid  = [6, 5]", "grid = [3, 3]"),
                     ("neighbors(3, 6, 5)", "neighbors(3, 3, 3)")),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_one_window_and_no_biases_are_full_attention(name):
    wide = Mechanism(name, *WIDE[name])
    if any(key == "table" for key, _ in wide.meaning.named_parameters()):
        wide.set(table=0)
    if name.startswith("crossformer"):
        wide.set(last=0)  # and a bias of all pixels, which softmax does not see
    x = tokens(9 if name == "neighborhood" else 24 if name == "axial" else 64)
    assert_close(wide(x), Mechanism(FULL, like=wide)(x))


def test_axial_rows_are_sequences_of_their_own():
    mechanism = Mechanism(
        "axial", ("h < 2 and row(i) == row(j) or h >= 2 and col(i) == col(j)", "row(i) == row(j)")
    )
    x = tokens(24)
    alone = Mechanism(FULL, like=mechanism)(x.reshape(12, 4, 32)).reshape(2, 24, 32)
    assert_close(mechanism(x), alone)


def test_two_criss_crosses_reach_the_image():
    seen = visible("criss_cross", 24)[0].double()
    assert ((seen @ seen) > 0).all()


def windows(x: Tensor, size: int) -> Tensor:
    """[b, 64, c] → [b · windows, size², c]"""
    count = 8 // size
    x = x.reshape(2, count, size, count, size, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(2 * count**2, size**2, -1)


def back(x: Tensor, size: int) -> Tensor:
    count = 8 // size
    x = x.reshape(2, count, count, size, size, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(2, 64, -1)


def rolled(x: Tensor, by: int) -> Tensor:
    return x.reshape(2, 8, 8, -1).roll((by, by), (1, 2)).reshape(2, 64, -1)


def swin_bias(table: Tensor, size: int = 4) -> Tensor:
    """The bias [heads, size², size²] of offsets, indexed as in Swin's code."""
    at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    offsets = at.flatten(1)[:, :, None] - at.flatten(1)[:, None] + size - 1
    return table[:, offsets[0], offsets[1]]


def network_of_offsets(mechanism: Mechanism) -> Tensor:
    """CrossFormer's table of biases: what its network gives for every offset, [heads, 7, 7]."""
    p, reach = mechanism.parameter, torch.arange(-3, 4, dtype=torch.float64)
    down, across = torch.meshgrid(reach, reach, indexing="ij")
    x = down[..., None] * p("down") + across[..., None] * p("across") + p("start")
    maps = (
        (p("one"), p("one_bias")), (p("two"), p("two_bias")), (p("last"), p("last_bias")),
    )  # fmt: skip
    for (weight, bias), gain, shift in zip(maps, p("gain"), p("shift"), strict=True):
        x = linear(layer_norm(x, (8,), gain, shift).relu(), weight, bias)
    return x.movedim(-1, 0)


def windowed(mechanism: Mechanism, x: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    """Attention within windows that are cut out, with a bias and a mask added."""
    q, k, v = (
        windows(x @ mechanism.parameter(f"{name}_proj.weight").mT, 4)
        .unflatten(-1, (4, 8))
        .transpose(1, 2)
        for name in "qkv"
    )
    crosses = mechanism.block.name.startswith("crossformer")
    table = network_of_offsets(mechanism) if crosses else mechanism.parameter("table")
    s = q @ k.mT / 8**0.5 + swin_bias(table) + mask
    o = (s.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return back(o, 4) @ mechanism.parameter("o_proj.weight").mT


@pytest.mark.parametrize("name", ["swin", "crossformer_sda"])
def test_windows_may_be_cut_out(name):
    mechanism = Mechanism(name)
    x = tokens(64)
    assert_close(mechanism(x), windowed(mechanism, x))


def test_shifted_windows_are_a_rolled_image_with_swins_mask():
    mechanism = Mechanism("swin_shifted")
    x = tokens(64)
    region = torch.zeros(8, 8, dtype=torch.float64)
    cuts = (slice(0, 4), slice(4, 6), slice(6, 8))
    for number, (rows, cols) in enumerate((r, c) for r in cuts for c in cuts):
        region[rows, cols] = number
    ids = windows(region.reshape(1, 64, 1).expand(2, -1, -1), 4)  # [b · windows, 16, 1]
    apart = torch.where(ids == ids.mT, 0.0, -torch.inf).double()[:, None]
    assert_close(mechanism(x), rolled(windowed(mechanism, rolled(x, -2), apart), 2))


def test_no_shift_is_swin():
    still = Mechanism("swin_shifted", ("windows(4, 2)", "windows(4, 0)"))
    x = tokens(64)
    assert_close(still(x), Mechanism("swin", like=still)(x))


def test_193_an_interval_of_one_is_short_distance():
    near = Mechanism("crossformer_lda", ("relative(2)", "relative(1)"), ("far(4, 2)", "far(4, 1)"))
    x = tokens(64)
    assert_close(near(x), Mechanism("crossformer_sda", like=near)(x))


def test_193_long_distance_is_short_distance_of_gathered_pixels():
    far = Mechanism("crossformer_lda")
    x = tokens(64)
    at = torch.arange(64).reshape(4, 2, 4, 2).permute(1, 0, 3, 2).reshape(64)
    gathered = Mechanism("crossformer_sda", like=far)(x[:, at])
    assert_close(far(x)[:, at], gathered)


def test_193_short_then_long_reach_the_image():
    short, long = (visible(f"crossformer_{name}", 64)[0].double() for name in ("sda", "lda"))
    assert ((short @ long) > 0).all()


def test_every_pixel_of_a_neighborhood_sees_nine():
    assert (visible("neighborhood", 30)[0].sum(-1) == 9).all()


def test_a_neighborhood_away_from_the_border_is_centred():
    inside = [row * 5 + col for row in range(1, 5) for col in range(1, 4)]
    near, alone = visible("neighborhood", 30)[0], visible("stand_alone", 30)[0]
    assert torch.equal(near[inside], alone[inside])
    assert not torch.equal(near, alone)


def test_a_pixel_alone_is_its_value():
    mechanism = Mechanism("stand_alone", ("<= 1", "<= 0"))
    x = tokens(30)
    assert_close(mechanism.mixed(x), mechanism.streams(x)["v"])

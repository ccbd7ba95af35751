"""Mechanisms that choose, sample or gather by content, each written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, leaky_relu, linear

from .mechanisms import MHA, Mechanism, assert_close, mapped, merge, softmax, split, tokens

N = 22
ROPE = "block plain { width = 32; heads = 4; mask = causal; position = rope }"


def out(mechanism: Mechanism, o: Tensor) -> Tensor:
    """Return what the last map makes of mixed heads."""
    return linear(merge(o), mechanism.parameter("o_proj.weight"))


def in_chunks(q: Tensor, k: Tensor, v: Tensor, rows: int, keys: int) -> Tensor:
    """Return causal attention by chunks of keys that are put together, as Rabe & Staats do."""
    n, made = q.shape[-2], []
    for start in range(0, n, rows):
        asked, i = q[..., start : start + rows, :], torch.arange(start, min(start + rows, n))
        parts = []
        for first in range(0, n, keys):
            j = torch.arange(first, min(first + keys, n))
            s = asked @ k[..., first : first + keys, :].mT / q.shape[-1] ** 0.5
            s = s.masked_fill(j > i[:, None], -1e9)
            most = s.amax(-1, keepdim=True).detach()
            e = (s - most).exp()
            parts.append((e @ v[..., first : first + keys, :], e.sum(-1, keepdim=True), most))
        top = torch.stack([most for *_, most in parts]).amax(0)
        whole = sum(value * (most - top).exp() for value, _, most in parts)
        made.append(whole / sum(total * (most - top).exp() for _, total, most in parts))
    return torch.cat(made, -2)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (5, 7), (64, 4), (3, 64)])
def test_164_chunks_put_together_are_what_is_compiled(rows, keys):
    """Output and gradients, for chunks that divide nothing and in both of our own tilings."""
    mechanism, x = Mechanism("chunked_exact"), tokens(N)
    mechanism.module.load_state_dict(mechanism.meaning.state_dict())
    weights = {name: each.detach() for name, each in mechanism.meaning.named_parameters()}

    def by_hand(x: Tensor) -> Tensor:
        q, k, v = (split(linear(x, weights[f"{part}_proj.weight"])) for part in "qkv")
        return linear(merge(in_chunks(q, k, v, rows, keys)), weights["o_proj.weight"])

    found = []
    for function in (by_hand, mechanism.module):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), leaf)))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs)


def test_164_a_constant_in_all_logits_changes_nothing():
    mechanism = Mechanism("chunked_exact")
    moved = Mechanism(MHA.replace(" }", "; score = s + 300 }"), like=mechanism)
    assert_close(moved(tokens(N)), mechanism(tokens(N)))


def sparse_k(z: Tensor, k: int) -> Tensor:
    """The nearest point to z whose numbers lie between 0 and 1 and sum to k."""
    if k >= len(z):
        return torch.ones_like(z)
    low, high = z.detach().min() - 1, z.detach().max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (z - middle).clamp(0, 1).sum() > k else (low, middle)
    p = (z - high).clamp(0, 1)
    inside, full = (p > 1e-12) & (p < 1 - 1e-12), p >= 1 - 1e-12
    tau = (z[inside].sum() + full.sum() - k) / inside.sum() if inside.any() else high
    return (z - tau).clamp(0, 1)


def kept_by_sparse_k(mechanism: Mechanism, x: Tensor, count: int = 3, near: int = 4) -> Tensor:
    """Return the mixed heads of SparseK and a window, row by row."""
    streams = mechanism.meaning.layer(x, {})[1]
    q, k, v, u = (streams[name] for name in "qkvu")
    o = torch.zeros_like(v)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        old = max(i - near + 1, 0)
        gate = sparse_k(u[b, :old, h], count)
        kept = gate.detach().argsort(descending=True, stable=True)[:count].tolist()
        gates = torch.cat([gate[kept], gate.new_ones(i + 1 - old)])
        at = [*kept, *range(old, i + 1)]
        p = (q[b, h, i] @ (gates[:, None] * k[b, h, at]).mT / 8**0.5).softmax(-1)
        o = o.index_put(
            tuple(map(torch.tensor, (b, h, i))), p @ (gates[:, None] * v[b, h, at]))  # fmt: skip
    return o


@pytest.mark.parametrize("scale", [0.2, 1.0, 1e3])
def test_106_keys_are_scaled_by_the_nearest_sum(scale):
    """Forward, and the gradient that reaches the scores through what is kept of each key."""
    mechanism, x = Mechanism("sparsek"), tokens(12, batch=1)
    mechanism.set(u_proj_weight=scale * mechanism.parameter("u_proj.weight"))
    weight = dict(mechanism.meaning.named_parameters())["u_proj.weight"]
    found = []
    for y in (mechanism.meaning(x), out(mechanism, kept_by_sparse_k(mechanism, x))):
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), weight)))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, 1e-7)
    assert_close(mechanism(x), found[1][0])


def test_106_enough_room_is_dense_and_equal_scores_share_it():
    wide, x = Mechanism("sparsek", ("count = 3", "count = 64")), tokens(N)
    assert_close(wide(x), Mechanism(ROPE, like=wide)(x))
    assert_close(
        sparse_k(torch.zeros(7, dtype=torch.float64), 3),
        torch.full((7,), 3 / 7, dtype=torch.float64),
    )
    z = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    entmax = pytest.importorskip("entmax")
    assert_close(sparse_k(z, 1), entmax.sparsemax(z, 0))


def spans(row: int, near: int = 1) -> list[int]:
    """Return where the spans of a query may be found: at square distances, less one."""
    return [row - (t * t - 1) for t in range(near + 1, 99) if row - (t * t - 1) >= 0]


def superlinear(streams: dict[str, Tensor], back: float, ahead: float, near: int = 1) -> Tensor:
    """Return the mixed heads of two spans, each with a softmax of its own."""
    search, asked, k, v = (streams[name] for name in ("search", "asked", "known", "told"))
    o, width = torch.zeros_like(v), (near + 1) ** 2 - 1
    for b, h, i in torch.cartesian_prod(*map(torch.arange, asked.shape[:3])).tolist():
        found = {a: search[b, h, i] @ k[b, h, a] for a in spans(i, near)}
        kept: list[int | None] = sorted(found, key=lambda a: -float(found[a]))[:2]
        kept += [None] * (2 - len(kept))
        lone = torch.tensor(-1e9, dtype=v.dtype)
        share = torch.stack([lone if a is None else found[a] for a in kept]).softmax(0)
        for a, weight in zip(kept, share, strict=True):
            seen = set(range(max(i - width + 1, 0), i + 1))
            if a is not None:
                first = max(0, a - math.ceil(back * (i + 1) ** 0.5))
                last = min(a + math.ceil(ahead * (i + 1) ** 0.5), i, i - width)
                seen |= set(range(first, last + 1))
            at = sorted(seen)
            o[b, h, i] += weight * (
                (asked[b, h, i] @ k[b, h, at].mT / 8**0.5).softmax(0) @ v[b, h, at]
            )
    return o


@pytest.mark.parametrize(("back", "ahead"), [(2, 0), (0.5, 0.3), (0, 0)])
def test_225_spans_around_what_was_found(back, ahead):
    mechanism = Mechanism("superlinear", ("back = 2, ahead = 0", f"back = {back}, ahead = {ahead}"))
    x = tokens(N, batch=1)
    with torch.no_grad():
        streams = mechanism.meaning.layer(x, {})[1]
        assert_close(mechanism(x), out(mechanism, superlinear(streams, back, ahead)))


@pytest.mark.parametrize("change", [("back = 2", "back = 99"), ("near = 1", "near = 9")])
def test_225_spans_or_a_window_of_everything_are_dense(change):
    mechanism, x = Mechanism("superlinear", change), tokens(N)
    mechanism(x)
    with torch.no_grad():
        streams = mechanism.meaning.layer(x, {})[1]
        s = streams["asked"] @ streams["known"].mT / 8**0.5
        dense = softmax(s) @ streams["told"]
        spread = Mechanism("superlinear", change, ("ahead = 0", "ahead = 99"), like=mechanism)
        assert_close(spread(x), out(mechanism, dense))


def test_225_spans_together_reach_everything():
    """No key is out of reach of all of a query's spans, where they reach two roots back."""
    for row in range(400):
        reach = math.ceil(2 * (row + 1) ** 0.5)
        seen = set(range(max(row - 2, 0), row + 1))
        for a in spans(row):
            seen |= set(range(max(0, a - reach), a + 1))
        assert seen == set(range(row + 1))


def sampled_windows(mechanism: Mechanism, x: Tensor) -> Tensor:
    """VSA as its code has it, with PyTorch's `grid_sample`; images are 8 x 8, windows 4 x 4."""
    q, k, v = (mapped(mechanism, f"{name}_proj", x) for name in ("asked", "known", "told"))
    p, b = mechanism.parameter, len(x)

    def cut(image: Tensor) -> Tensor:  # [b, 64, c] → [b, 2, 2, 16, c]
        return image.reshape(b, 2, 4, 2, 4, -1).transpose(2, 3).flatten(3, 4)

    stats = leaky_relu(cut(x).mean(3))  # [b, 2, 2, c]
    said = {name: stats @ p(f"found_sampled_{name}").mT for name in
            ("scale_rows", "scale_cols", "shift_rows", "shift_cols")}  # fmt: skip
    scale = torch.stack([said["scale_cols"], said["scale_rows"]], -1)
    scale = scale + p("found_sampled_scale_bias").flip(-1)  # x before y, [b, 2, 2, heads, 2]
    shift = torch.stack([said["shift_cols"], said["shift_rows"]], -1)
    shift = (shift + p("found_sampled_shift_bias").flip(-1)) / 2  # two windows across
    line = torch.linspace(-1, 1, 8, dtype=x.dtype)
    y, x_ = torch.meshgrid(line, line, indexing="ij")
    place = cut(torch.stack([x_, y], -1).reshape(1, 64, 2).expand(b, -1, -1))  # [b, 2, 2, 16, 2]
    offset = place - place.mean(3, keepdim=True)
    at = place[..., None, :] + offset[..., None, :] * scale[:, :, :, None] + shift[:, :, :, None]

    def sample(z: Tensor) -> Tensor:  # [b, 64, 32] → [b, heads, 2, 2, 16, 8]
        image = split(z).reshape(b * 4, 8, 8, 8).permute(0, 3, 1, 2)
        grid = at.permute(0, 4, 1, 2, 3, 5).reshape(b * 4, 4, 16, 2)
        found = grid_sample(image, grid, align_corners=True, padding_mode="zeros")
        return found.permute(0, 2, 3, 1).reshape(b, 4, 2, 2, 16, 8)

    asked = cut(q).unflatten(-1, (4, 8)).permute(0, 4, 1, 2, 3, 5)
    rows, cols = torch.arange(16) // 4, torch.arange(16) % 4
    bias = p("table")[:, rows[:, None] - rows + 3, cols[:, None] - cols + 3]
    weights = (asked @ sample(k).mT / 8**0.5 + bias[:, None, None]).softmax(-1)
    o = (weights @ sample(v)).permute(0, 2, 3, 4, 1, 5).reshape(b, 2, 2, 4, 4, 32)
    return linear(o.transpose(2, 3).reshape(b, 64, 32), p("o_proj.weight"))


def test_254_keys_are_sampled_where_the_window_says():
    mechanism, x = Mechanism("vsa"), tokens(64)
    assert_close(mechanism(x), sampled_windows(mechanism, x))


SAID = [
    f"found_sampled_{what}_{by}" for what in ("scale", "shift") for by in ("rows", "cols", "bias")
]


def test_254_at_first_it_is_a_window_and_learns_from_there():
    mechanism, x = Mechanism("vsa"), tokens(64)
    mechanism.set(**dict.fromkeys(SAID, 0))
    swin = Mechanism("swin")
    names = {"q": "asked", "k": "known", "v": "told", "o": "o"}
    swin.set(
        table=mechanism.parameter("table"),
        **{
            f"{to}_proj_weight": mechanism.parameter(f"{of}_proj.weight")
            for to, of in names.items()
        },
    )
    assert_close(mechanism(x), swin(x))
    weights = dict(mechanism.meaning.named_parameters())
    grads = torch.autograd.grad(mechanism.meaning(x).sin().sum(), [weights[each] for each in SAID])
    assert all(grad.any() for grad in grads)


def test_254_a_shift_by_pixels_reads_the_image_beside():
    """Two pixels down and one to the right, zero outside."""
    mechanism, x = Mechanism("vsa"), tokens(64)
    mechanism.set(**dict.fromkeys(SAID, 0))
    pixels = torch.tensor([2.0, 1.0], dtype=torch.float64)
    mechanism.set(found_sampled_shift_bias=pixels * 2 / 7 * 2)
    with torch.no_grad():
        streams = mechanism.meaning.layer(x, {})[1]
    for name, part in (("known", streams["k"]), ("told", streams["v"])):
        image = split(mapped(mechanism, f"{name}_proj", x)).reshape(2, 4, 8, 8, 8)
        moved = torch.zeros_like(image)
        moved[:, :, :6, :7] = image[:, :, 2:, 1:]
        assert_close(part, moved.flatten(2, 3))

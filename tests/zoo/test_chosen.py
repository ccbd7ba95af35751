"""Mechanisms that choose, sample or gather by content, each written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import (
    adaptive_avg_pool2d,
    conv2d,
    gelu,
    grid_sample,
    leaky_relu,
    linear,
    rms_norm,
    silu,
)

from .mechanisms import (
    MHA,
    Mechanism,
    assert_close,
    causal,
    mapped,
    merge,
    normed,
    softmax,
    split,
    text_of,
    tokens,
)

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


def block_rows(value: Tensor, size: int) -> Tensor:
    """Return the sums of a row over blocks."""
    return value.unflatten(-1, (-1, size)).sum(-1)


def budget(value: Tensor, gamma: float, size: int) -> int:
    """Return how many blocks: of the largest numbers whose running sum stays within gamma."""
    kept = int((value.sort(descending=True, stable=True).values.cumsum(0) <= gamma).sum())
    return (kept + 1) // size + 1


def flexprefill(
    q: Tensor, k: Tensor, gamma: float, tau: float, least: int, size: int = 4, ends: int = 2
) -> tuple[Tensor, bool]:
    """Return what one head reads [n, n], after `get_active_blocks`, and whether means decide."""
    n, d = q.shape
    count = n // size
    i, j = torch.arange(n)[:, None], torch.arange(n)
    p = (q @ k.mT / d**0.5).masked_fill(j > i, -torch.inf).softmax(-1)[-ends:]
    vertical = p.mean(0)
    slash = torch.zeros(n, dtype=q.dtype)
    for row, at in zip(p, range(n - ends, n), strict=True):
        slash[: at + 1] += row[: at + 1].flip(0) / ends
    means = k.unflatten(0, (count, size)).mean(1)
    told = (q[-ends:].mean(0) @ means.mT / d**0.5).softmax(-1)
    own = block_rows(vertical, size)
    middle = (told + own) / 2
    apart = ((told * (told / middle).log()).sum() + (own * (own / middle).log()).sum()) / 2
    aware = bool(apart.sqrt() < tau)
    tops = []
    for value in (vertical, slash):
        many = least if aware else min(max(budget(value, gamma, size), least), count)
        blocks = block_rows(value, size)
        blocks[0] = torch.inf
        tops.append(set(blocks.argsort(descending=True, stable=True)[:many].tolist()))
    keep = torch.zeros(count, count, dtype=torch.bool)
    for r in range(count):
        for c in range(r + 1):
            keep[r, c] = c in tops[0] or r - c in tops[1]
    if aware:
        mean_q = q.unflatten(0, (count, size)).mean(1)
        s = mean_q @ means.mT / d**0.5
        a = s.masked_fill(~torch.ones_like(keep).tril(), -torch.inf).softmax(-1).flatten()
        order = a.argsort(descending=True, stable=True)
        taken = order[a[order].cumsum(0) <= gamma * count]
        chosen = torch.zeros(count * count, dtype=torch.bool)
        chosen[taken] = True
        keep |= chosen.view(count, count)
    return keep.repeat_interleave(size, 0).repeat_interleave(size, 1) & (j <= i), aware


@pytest.mark.parametrize(("tau", "heads"), [(0.0, 0), (0.3, 2), (1.0, 4)])
def test_31_heads_choose_as_they_do_in_its_code(tau, heads):
    """Of a prompt of 16; with no head, some, or all of them decided by means."""
    mechanism = Mechanism("flexprefill", ("tau = 0.3", f"tau = {tau}"))
    x = tokens(16, batch=1)
    with torch.no_grad():
        streams = mechanism.meaning.layer(x, {})[1]
    q, k, v = (streams[name][0] for name in ("asked", "known", "told"))
    found = [flexprefill(q[h], k[h], 0.7, tau, 1) for h in range(4)]
    seen = torch.stack([keep for keep, _ in found])
    assert sum(aware for _, aware in found) == heads
    assert seen[:, 0, 0].all()
    assert seen.diagonal(dim1=1, dim2=2).all()
    assert not seen.all()
    assert (seen <= causal(16)).all()
    assert_close(mechanism(x), out(mechanism, (softmax(q @ k.mT / 8**0.5, seen) @ v)[None]))


def test_31_a_share_of_everything_is_dense_and_so_is_what_follows_the_prompt():
    wide = Mechanism("flexprefill", ("gamma = 0.7", "gamma = 1.1"))
    with torch.no_grad():
        streams = wide.meaning.layer(tokens(N), {})[1]
    q, k, v = (streams[name] for name in ("asked", "known", "told"))
    dense = out(wide, softmax(q @ k.mT / 8**0.5) @ v)
    assert_close(wide(tokens(N)), dense)
    usual = Mechanism("flexprefill", like=wide)(tokens(N))
    assert_close(usual[:, 16:], dense[:, 16:])
    assert not torch.allclose(usual[:, :16], dense[:, :16])


def fewest(value: Tensor, share: float) -> list[int]:
    """Return the fewest blocks whose sums reach a share of all."""
    kept, mass = [], 0.0
    for at in value.argsort(descending=True, stable=True).tolist():
        if mass >= share * float(value.sum()):
            break
        kept.append(at)
        mass += float(value[at])
    return kept


def stripes(p: Tensor, columns: float, slashes: float) -> Tensor:
    """Return what a head reads [n, n]: the first block, and blocks of columns and diagonals."""
    n = len(p)
    sampled = [i for i in range(n) if i % 8 >= 6 or i >= n - 2]
    column, slash = torch.zeros(n, dtype=p.dtype), torch.zeros(n, dtype=p.dtype)
    for i in sampled:
        for j in range(i + 1):
            column[j] += p[i, j]
            slash[i - j] += p[i, j]
    of_c, of_s = (fewest(block_rows(each, 2), share) for each, share in
                  ((column, columns), (slash, slashes)))  # fmt: skip
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            seen[i, j] = j < 2 or j // 2 in of_c or (i - j) // 2 in of_s
    return seen


@pytest.mark.parametrize(("columns", "slashes"), [(0.4, 0.4), (0.2, 0.7), (1, 0.1), (0.1, 1)])
def test_150_columns_and_diagonals_by_what_the_last_rows_give(columns, slashes):
    mechanism = Mechanism(
        "sample_stripes",
        ("columns_ = 0.4, slashes = 0.4", f"columns_ = {columns}, slashes = {slashes}"),
    )
    x = tokens(N, batch=1)
    q, k, v = (mechanism.streams(x)[name] for name in "qkv")
    s = q @ k.mT / 8**0.5
    seen = torch.stack([stripes(each, columns, slashes) for each in softmax(s)[0]])
    assert (seen == causal(N)).all() == (1 in (columns, slashes))
    assert_close(mechanism(x), out(mechanism, softmax(s, seen) @ v))


def neighbourhoods(k: int, size: int = 8) -> Tensor:
    """Return the pixels [64, k · k] that the window of each reads, kept inside of the image."""
    start = (torch.arange(size) - k // 2).clamp(0, size - k)
    line = start[:, None] + torch.arange(k)
    at = line[:, None, :, None] * size + line[None, :, None, :]
    return at.reshape(size * size, k * k)


def contmix(mechanism: Mechanism, x: Tensor) -> Tensor:
    """ContMix as its code has it, tap by tap, with the borders of neighbourhood attention."""
    p, b = mechanism.parameter, len(x)
    image = x.mT.unflatten(-1, (8, 8))
    regions = adaptive_avg_pool2d(image, 2).flatten(2).mT  # [b, 4, c]
    q = split(mapped(mechanism, "alike_q_proj", x)) * 8**-0.5
    k = split(mapped(mechanism, "alike_k_proj", regions))
    taps = mapped(mechanism, "taps_proj", q @ k.mT)  # [b, groups, 64, 9 + 25]
    rows, cols = torch.arange(64) // 8, torch.arange(64) % 8
    made = []
    for part, name, size in ((taps[..., :9], "near", 3), (taps[..., 9:], "far", 5)):
        at = neighbourhoods(size)
        bias = p(f"{name}_tapped_table")[
            :, rows[at] - rows[:, None] + size - 1, cols[at] - cols[:, None] + size - 1
        ]
        values = split(x[..., :16] if name == "near" else x[..., 16:])[:, :, at]
        made.append(merge(((part + bias).softmax(-1)[..., None] * values).sum(-2)))
    mixed = mapped(mechanism, "mixed_proj", torch.cat(made, -1))
    kernel = p("fixed")[:, None]
    still = conv2d(image, kernel, p("fixed_bias"), padding=3, groups=32)
    both = mixed + still.flatten(2).mT
    whole = gelu(
        mapped(mechanism, "whole_proj_0", both.mean(1, keepdim=True)))  # fmt: skip
    gate = silu(mapped(mechanism, "gate__proj", x))
    both = both * mapped(mechanism, "whole_proj_1", whole).sigmoid() * gate
    assert both.shape == (b, 64, 32)
    return linear(both, p("o_proj.weight"))


def test_218_taps_by_what_regions_say():
    mechanism, x = Mechanism("contmix"), tokens(64)
    assert_close(mechanism(x), contmix(mechanism, x))


def test_218_without_taps_a_window_is_its_mean_and_a_constant_stays():
    mechanism, x = Mechanism("contmix"), tokens(64)
    mechanism.set(taps_proj_weight=0, taps_proj_bias=0, near_tapped_table=0, far_tapped_table=0)
    with torch.no_grad():
        found = mechanism.meaning.layer(x, {})[1]
    mean = split(x[..., :16])[:, :, neighbourhoods(3)].mean(-2)
    assert_close(found["near"], mean)
    usual, even = Mechanism("contmix"), torch.ones(2, 64, 1).double() * tokens(1)
    with torch.no_grad():
        found = usual.meaning.layer(even, {})[1]
    assert_close(merge(found["far"]), even[..., 16:])


def heads_of(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Return plain attention of streams [b, n, d] in four heads; what is not seen is left out."""
    q, k, v = (split(each) for each in (q, k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    s = s if seen is None else s.masked_fill(~seen, -torch.inf)
    return merge(s.softmax(-1) @ v)


def crossed(m: Mechanism, x: Tensor) -> Tensor:
    """Return TextMonkey's tokens after the window that crosses its crops, as a rolled image."""
    low = mapped(m, "low_proj", x)
    y = normed(m, "normed_norm", low)
    q, k, v = (mapped(m, f"crossed_{part}_proj", y) for part in "qkv")
    rows, cols = torch.arange(64) // 8, torch.arange(64) % 8
    region = (rows + 2) // 4 * 8 + (cols + 2) // 4
    seen = region[:, None] == region
    down, across = ((each[:, None] - each).clamp(-3, 3) + 3 for each in (rows, cols))
    q, k, v = (split(each) for each in (q, k, v))
    s = q @ k.mT / 4**0.5 + m.parameter("crossed_relative_table")[:, down, across]
    met = low + mapped(m, "met_proj", merge(s.masked_fill(~seen, -torch.inf).softmax(-1) @ v))
    wide = gelu(mapped(m, "wide_proj", normed(m, "wide_norm", met)))
    told = gelu(mapped(m, "all__proj_0", met + mapped(m, "seen__proj", wide)))
    return x + mapped(m, "all__proj_1", told)


def resampled(m: Mechanism, x: Tensor, count: int) -> Tensor:
    """Return what TextMonkey's resampler makes of tokens [1, n, 32]."""
    unit = x[0] / x[0].norm(dim=-1, keepdim=True)
    near = unit @ unit.mT - 2 * torch.ones(len(unit), len(unit)).tril()
    kept = near.amax(-1).argsort(descending=True)[len(unit) - count :].sort().values
    stay = x[:, kept]
    small, asked = (
        normed(m, "small_norm", mapped(m, "small_proj", x)),
        mapped(m, "asked_proj", stay),
    )
    own = normed(m, "own_norm", asked)
    both = torch.cat([small, own], 1)
    k, v = (mapped(m, f"everything_{part}_linear.o_proj", both) for part in "kv")
    told = asked + mapped(m, "told_proj", heads_of(mapped(m, "wanted_proj", own), k, v))
    inner = gelu(mapped(m, "inner_proj", normed(m, "inner_norm", told)))
    return stay + mapped(m, "o_proj_1", told + mapped(m, "o_proj_0", inner))


@pytest.mark.parametrize("count", [6, 64])
def test_202_the_tokens_least_like_others_stay_in_their_order(count):
    mechanism = Mechanism("textmonkey", ("count = 6", f"count = {count}"))
    x = tokens(64, batch=1)
    y = crossed(mechanism, x)
    assert_close(mechanism(x), resampled(mechanism, y, count))
    if count == 64:
        with torch.no_grad():
            assert_close(mechanism.meaning.layer(x, {})[1]["stay"], y)


def test_202_what_crosses_is_nothing_where_its_last_map_is():
    mechanism, x = Mechanism("textmonkey"), tokens(64)
    mechanism.set(all__proj_1_weight=0, all__proj_1_bias=0)
    with torch.no_grad():
        assert_close(mechanism.meaning.layer(x, {})[1]["all_"], x)


def summed_up(m: Mechanism, x: Tensor, context: Tensor, keep: int, count: int) -> Tensor:
    """Return BUS's summary [b, count, 32], one image after the other."""
    made = []
    for each, text in zip(x, context, strict=True):
        beside = torch.cat([each, text[:1].expand(len(each), -1)], -1)
        hidden = mapped(m, "met_proj", beside).relu()
        hidden = mapped(m, "told_proj_0", hidden).relu()
        score = mapped(m, "told_proj_1", hidden).sigmoid()[:, 0]
        order = 1 + score[1:].argsort(descending=True, stable=True)
        best, rest = order[:keep].sort().values, order[keep:]
        known = [each[:1], each[best]]
        if len(rest):
            known.append((score[rest] / score[rest].sum() @ each[rest])[None])
        sequence = torch.cat(known)[None]
        query = each[None, order[:count].sort().values]
        y = normed(m, "normed_norm", query)
        q, k, v = (mapped(m, f"each_other_{part}_proj", y) for part in "qkv")
        query = query + mapped(m, "then__proj", heads_of(q, k, v))
        q = mapped(m, "wanted_proj", normed(m, "wanted_norm", query))
        k, v = (mapped(m, f"kept_{part}_linear.o_proj", sequence) for part in "kv")
        read = query + mapped(m, "read_proj", heads_of(q, k, v))
        wide = gelu(mapped(m, "wide_proj", normed(m, "wide_norm", read)))
        made.append(read + mapped(m, "o_proj", wide))
    return torch.cat(made)


@pytest.mark.parametrize("keep", [8, 21])
def test_221_the_best_patches_are_kept_and_the_rest_is_one(keep):
    """With as many as there are, nothing is melted, and there is no token of it."""
    mechanism = Mechanism("bus", ("keep = 8", f"keep = {keep}"))
    x, context = tokens(N), tokens(5, seed=3)
    assert_close(mechanism(x, context=context), summed_up(mechanism, x, context, keep, 3))


def test_221_patches_in_another_order_are_the_same_set():
    mechanism, x, context = Mechanism("bus"), tokens(N), tokens(5, seed=3)
    order = torch.cat([torch.zeros(1).long(), torch.arange(N - 1, 0, -1)])
    found = mechanism(x[:, order], context=context)
    assert_close(found.flip(1), mechanism(x, context=context))


def read(m: Mechanism, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what two layers and a norm make of x [1, n, 32], and what the probes say [n]."""
    place = torch.arange(x.shape[1])
    slope = 2.0 ** (-2 * torch.arange(1, 5, dtype=x.dtype))[:, None, None]
    told = x
    for at in (0, 1):
        one = f"layers.{at}"
        y = rms_norm(x, (32,), m.parameter(f"{one}.y_one.o_norm.weight"), 1e-6)
        q, k, v = (split(mapped(m, f"{one}.attn.{part}_linear.o_proj", y)) for part in "qkv")
        s = q @ k.mT / 8**0.5 - slope * (place[:, None] - place)
        o = softmax(s) @ v
        if at == 1:
            probe = m.parameter(f"{one}.attn.sure_proj.weight")
            told = (o @ probe.mT).sigmoid()[0, [0, 2], :, 0].mean(0)
        x = x + mapped(m, f"{one}.attn.o_linear.o_proj", merge(o))
        y = rms_norm(x, (32,), m.parameter(f"{one}.o_two.o_norm.weight"), 1e-6)
        gate, up = (mapped(m, f"{one}.ffn.{part}_proj", y) for part in ("gate", "up"))
        x = x + mapped(m, f"{one}.ffn.down_proj", silu(gate) * up)
    return rms_norm(x, (32,), m.parameter("norm.weight"), 1e-6), told


@pytest.mark.parametrize(("enough", "ends"), [(0.5, {4, 8, 12}), (0, {4}), (1, {12})])
def test_162_a_question_is_read_with_what_was_found_to_be_enough(enough, ends):
    mechanism = Mechanism("when_to_stop", ("enough = 0.5", f"enough = {enough}"))
    found = set()
    for seed in range(9):
        x = tokens(17, batch=1, seed=seed)
        told = read(mechanism, x[:, :12])[1]
        end = next((at for at in (4, 8) if told[at - 1] > enough), 12)
        found.add(end)
        left = torch.cat([x[:, :end], x[:, 12:]], 1)
        assert_close(mechanism(x)[:, 12:], read(mechanism, left)[0][:, end:])
    assert found == ends


def top_of(value: Tensor, count: int) -> list[int]:
    """Return where the largest numbers are, of equal ones the first."""
    return value.argsort(descending=True, stable=True)[:count].tolist()


def a_vl(q: Tensor, k: Tensor, v: Tensor, second: int, core: int, every: int = 3) -> Tensor:
    """Return the mixed heads of A-VL, step by step, of one image [heads, n, d]."""
    heads, n, d = q.shape
    s = q @ k.mT / d**0.5
    o = torch.zeros_like(v)
    got = torch.zeros(heads, n, dtype=q.dtype)
    held: list[list[int]] = [[] for _ in range(heads)]
    image, rest, few = list(range(8)), list(range(8)), list(range(8))
    for i in range(n):
        if i == 12:
            whole = s[:, 11, :12].softmax(-1).mean(0)
            rest = top_of(whole[:8], second)
        if i >= 8:
            held = [[*each, i] for each in held]
        image = [j for j in (rest if i < 12 or i % every == 0 else few) if j <= i]
        weights = []
        for h in range(heads):
            at = image + held[h]
            p = s[h, i, at].softmax(0)
            o[h, i] = p @ v[h, at]
            weights.append(p[: len(image)])
            if held[h]:
                got[h, held[h]] += s[h, i, held[h]].softmax(0)
            if i >= 12:
                old = [j for j in held[h] if i - j >= 3]
                kept = [old[at] for at in top_of(got[h, old], 3)] if old else []
                held[h] = sorted([*kept, *(j for j in held[h] if i - j < 3)])
        if i >= 12 and i % every == 0:
            few = [image[at] for at in top_of(torch.stack(weights).mean(0), core)]
    return o


@pytest.mark.parametrize(("second", "core", "every"), [(5, 2, 3), (4, 1, 2), (5, 5, 3)])
def test_114_few_tokens_of_the_image_are_read_at_most_steps(second, core, every):
    change = f"second = {second}, core = {core}, every = {every}"
    mechanism = Mechanism("a_vl", ("second = 5, core = 2, every = 3", change))
    x = tokens(N, batch=1)
    q, k, v = (mechanism.streams(x)[name][0] for name in "qkv")
    assert_close(mechanism(x), out(mechanism, a_vl(q, k, v, second, core, every)[None]))


def test_114_with_room_for_all_it_is_dense_and_without_an_image_h2o():
    wide = Mechanism(
        "a_vl", ("second = 5, core = 2", "second = 8, core = 8"), ("count = 3", "count = 64")
    )
    assert_close(wide(tokens(N)), Mechanism(ROPE, like=wide)(tokens(N)))
    bare = Mechanism("a_vl", ("vision = 8, prompt = 12", "vision = 0, prompt = 3"))
    h2o = Mechanism("h2o", ("near = 4", "near = 3"), like=bare)
    assert_close(bare(tokens(N)), h2o(tokens(N)))


def dcal(m: Mechanism, x: Tensor, size: int, count: int) -> Tensor:
    """Return the three lanes of two pictures beside each other [1, 2 · size, 96]."""
    n = x.shape[1]
    image = torch.arange(n) // size
    same = image[:, None] == image
    lanes = [x, x]  # within each, and across both
    rollout = torch.eye(n, dtype=x.dtype)
    for at in (0, 1):
        one = f"layers.{at}"
        for lane, seen in enumerate((same, torch.ones_like(same))):
            y = normed(m, f"{one}.y_norm", lanes[lane])
            q, k, v = (split(mapped(m, f"{one}.attn.{part}_proj", y)) for part in "qkv")
            a = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            if lane == 0:
                rollout = (0.5 * a[0].mean(0) + 0.5 * torch.eye(n, dtype=x.dtype)) @ rollout
            y = lanes[lane] + mapped(m, f"{one}.attn.o_proj", merge(a @ v))
            z = gelu(mapped(m, f"{one}.o_proj_0", normed(m, f"{one}.o_norm", y)))
            lanes[lane] = y + mapped(m, f"{one}.o_proj_1", z)
    assert_close(rollout.sum(-1), torch.ones(n, dtype=x.dtype))
    keep = torch.zeros(n, dtype=torch.bool)
    for first in range(0, n, size):
        keep[first] = True
        best = rollout[first, first + 1 : first + size].argsort(descending=True)[:count]
        keep[first + 1 + best] = True
    part = "layers.2.part"
    y = normed(m, f"{part}.y_norm", lanes[0])
    q, k, v = (mapped(m, f"{part}.{name}_proj", y) for name in "qkv")
    met = lanes[0] + mapped(m, f"{part}.met_proj", heads_of(q, k, v, same))
    wide = gelu(mapped(m, f"{part}.wide_proj", normed(m, f"{part}.wide_norm", met)))
    chosen = keep[:, None] * (met + mapped(m, f"{part}.o_proj", wide))
    return torch.cat([*lanes, chosen], -1)


def features(*changes: tuple[str, str]) -> Mechanism:
    """Return the lanes of DCAL, without what tells classes."""
    text = text_of("dcal", *changes)
    return Mechanism(text[: text.index("  head ")] + "  head = x | merge\n}\n")


@pytest.mark.parametrize("count", [3, 8])
def test_67_what_the_class_came_from_reads_once_more(count):
    """Two pictures of nine tokens; with all patches it is one more layer of attention."""
    mechanism = features(("count = 3", f"count = {count}"))
    x = tokens(18, batch=1)
    assert_close(mechanism(x), dcal(mechanism, x, 9, count))


def test_67_a_picture_beside_itself_or_alone_is_read_as_it_is():
    mechanism, x = features(), tokens(9)
    twice, alone = mechanism(torch.cat([x, x], 1)), mechanism(x)
    for y in (twice, alone):
        own, across, _ = y.split(32, -1)
        assert_close(own, across)
    assert_close(twice[:, :9], alone)
    other = mechanism(torch.cat([x, tokens(9, seed=1)], 1))[:, :9]
    assert_close(other[..., :32], alone[..., :32])
    assert not torch.allclose(other[..., 32:64], alone[..., 32:64])

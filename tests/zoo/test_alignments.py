"""Alignments, places and readings: what lies between steps, readings and halves, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import (
    conv1d,
    conv2d,
    gelu,
    layer_norm,
    one_hot,
    pad,
    relu,
    rms_norm,
    sigmoid,
    silu,
)

from .mechanisms import (
    MHA,
    Mechanism,
    assert_close,
    attended,
    causal,
    mapped,
    merge,
    normed,
    softmax,
    split,
    text_of,
    tokens,
)

X = tokens()
N = X.shape[1]
FAR = tokens(9, seed=5)
NARROW = tokens(9, width=24, seed=5)


def loss_of(mechanism: Mechanism, x: Tensor, **given: Tensor) -> Tensor:
    mechanism(x, **given)
    mechanism.module.train()
    try:
        mechanism.module(x, **given)
        loss: Tensor = mechanism.module.auxiliary_loss()
    finally:
        mechanism.module.eval()
    return loss.detach()


# ── several readings ─────────────────────────────────────────────────────────────────────

IDS = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(0))
BASES = (10_000, 15_000, 20_000)


def turned(x: Tensor, base: float, places: Tensor | None = None) -> Tensor:
    """Turn halves of heads [b, h, n, d] by their places, as rotary positions do."""
    half = x.shape[-1] // 2
    places = torch.arange(x.shape[-2]).double() if places is None else places
    angle = places[..., None] * base ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def reading(mechanism: Mechanism, ids: Tensor, base: float) -> Tensor:
    """Return the logits of one reading of the text."""
    p = mechanism.parameter
    x = p("embed_tokens.weight")[ids]
    for at in range(2):
        own = f"layers.{at}"
        y = rms_norm(x, (32,), p(f"{own}.y_norm.weight"), 1e-6)
        q, k, v = (
            split(mapped(mechanism, f"{own}.attn.{each}_proj", y))
            for each in ("asked", "held", "v")
        )
        s = 8**-0.5 * turned(q, base) @ turned(k, base).mT
        x = x + mapped(mechanism, f"{own}.attn.o_proj", merge(softmax(s) @ v))
        z = rms_norm(x, (32,), p(f"{own}.z_norm.weight"), 1e-6)
        hidden = silu(mapped(mechanism, f"{own}.o_proj_0", z))
        hidden = hidden * mapped(mechanism, f"{own}.up_proj", z)
        x = x + mapped(mechanism, f"{own}.o_proj_1", hidden)
    x = rms_norm(x, (32,), p("norm.weight"), 1e-6)
    return mapped(mechanism, "lm_head", x)


def test_138_logits_of_all_readings_by_how_sure_each_is():
    mechanism = Mechanism("attention_buckets")
    z = torch.stack([reading(mechanism, IDS, base) for base in BASES])
    w = z.amax(-1, keepdim=True).softmax(0)
    assert_close(mechanism(IDS), (w * z).sum(0))


def test_138_of_equal_bases_it_is_the_model():
    same = [(f"rope({base:_})", "rope(10_000)") for base in BASES[1:]]
    mechanism = Mechanism("attention_buckets", *same)
    assert_close(mechanism(IDS), reading(mechanism, IDS, 10_000))


def test_138_bases_have_no_order():
    mechanism = Mechanism("attention_buckets")
    text = text_of("attention_buckets")
    order = {10_000: 20_000, 15_000: 10_000, 20_000: 15_000}
    for old in BASES:
        text = text.replace(f"rope({old:_})", f"rope(new {order[old]:_})")
    other = Mechanism(text.replace("rope(new ", "rope("), like=mechanism)
    assert_close(other(IDS), mechanism(IDS))


PICTURE = torch.tensor([[0] * 2 + [1] * 4 + [0] * 2 + [2] * 3]).expand(2, -1)


def two_runs(mechanism: Mechanism, x: Tensor, gain: float = 2) -> Tensor:
    """Return what the model gives with the image, of a second run that does not see it."""
    runs = [x, x]
    for at in range(2):
        own = f"layers.{at}"
        heads = []
        for run, each in enumerate(runs):
            y = rms_norm(each, (32,), mechanism.parameter(f"{own}.y_norm.weight"), 1e-6)
            q, k, v = (split(mapped(mechanism, f"{own}.attn.{it}_proj", y)) for it in "qkv")
            seen = causal() & (PICTURE[0] != 1) if run else causal()
            heads.append(softmax(8**-0.5 * q @ k.mT, seen).nan_to_num(0) @ v)
        apart = (heads[0] - heads[1]).norm(dim=-1).mT  # [b, n, heads]
        usual = apart.mean(-1, keepdim=True) + apart.std(-1, correction=0, keepdim=True)
        apart = torch.where(apart > usual, 0, apart)
        most = (one_hot(apart.topk(2).indices, 4).sum(-2) > 0) & (apart > 0)
        strong = torch.where(most & (PICTURE == 2)[..., None], gain, 1.0).mT[..., None]
        heads[0] = heads[0] * strong
        for run, each in enumerate(runs):
            x = each + mapped(mechanism, f"{own}.attn.o_proj", merge(heads[run]))
            z = rms_norm(x, (32,), mechanism.parameter(f"{own}.z_norm.weight"), 1e-6)
            hidden = silu(mapped(mechanism, f"{own}.o_proj_0", z))
            hidden = hidden * mapped(mechanism, f"{own}.up_proj", z)
            runs[run] = x + mapped(mechanism, f"{own}.o_proj_1", hidden)
    return rms_norm(runs[0], (32,), mechanism.parameter("norm.weight"), 1e-6)


def test_243_heads_that_see_the_image_are_made_stronger():
    mechanism = Mechanism("vision_heads")
    assert_close(mechanism(X, segments=PICTURE), two_runs(mechanism, X))


def test_243_without_gain_or_without_an_image_nothing_changes():
    mechanism = Mechanism("vision_heads")
    even = Mechanism("vision_heads", ("gain = 2", "gain = 1"), like=mechanism)
    assert_close(even(X, segments=PICTURE), two_runs(mechanism, X, gain=1))
    blind = torch.where(PICTURE == 1, 0, PICTURE)
    assert_close(mechanism(X, segments=blind), even(X, segments=blind))
    assert not torch.allclose(mechanism(X, segments=PICTURE), even(X, segments=PICTURE))


# ── places ───────────────────────────────────────────────────────────────────────────────


def greedy(n: int, trained: int = 16, window: int = 4) -> list[float]:
    """The places of a text, by the loop that the method is named after."""
    if n <= trained:
        return [float(at) for at in range(n)]
    parts = math.ceil((n - window) / (trained - window))
    found: list[float] = []
    first = 0
    while trained - first + len(found) < n:
        found += [first + at / parts for at in range(parts)]
        first += 1
    return found[: n - (trained - first)] + [float(at) for at in range(first, trained)]


@pytest.mark.parametrize("n", [9, 16, 17, 19, 28, 29, 40])
def test_167_places_are_those_of_the_loop(n):
    mechanism = Mechanism("gali")
    x = tokens(n)
    found = mechanism.streams(x)["place"]
    expected = torch.tensor(greedy(n), dtype=torch.float64)
    assert_close(found, expected[:, None].expand(2, -1, -1))
    if n > 16:
        assert expected[-1] == 15
        assert (expected.diff() > 0).all()


@pytest.mark.parametrize("n", [11, 23])
def test_167_logits_lie_between_those_of_whole_distances(n):
    mechanism = Mechanism("gali")
    x = tokens(n)
    place = torch.tensor(greedy(n), dtype=torch.float64)
    q, k, v = (split(mapped(mechanism, f"{each}_proj", x)) for each in ("asked", "held", "v"))
    q, up, down = (
        turned(each, 10_000, at)
        for each, at in ((q, place.ceil()), (k, place.ceil()), (k, place.floor()))
    )
    near, far = (8**-0.5 * q @ each.mT for each in (up, down))
    w = place.ceil()[:, None] - place
    a = softmax(near + (far - near) * (w - w.floor()))
    assert_close(mechanism(x), mapped(mechanism, "o_proj", merge(a @ v)))


def test_167_within_the_trained_length_it_is_rope():
    mechanism = Mechanism("gali")
    rope = Mechanism(MHA.replace("causal }", "causal; position = rope }"), like=mechanism)
    q, k = (mechanism.parameter(f"{each}_proj.weight") for each in ("asked", "held"))
    assert_close(mechanism(X), rope.set(q_proj_weight=q, k_proj_weight=k)(X))


def walked(mechanism: Mechanism, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return where each step looks and how wide, [b, heads, n], by a loop over the steps."""
    asked = mapped(mechanism, "walked_walk_asked_proj", x)
    ahead, wide = (
        mapped(mechanism, f"walked_walk_{each}_proj", asked).mT for each in ("ahead", "wide")
    )
    pace, places = 1 / max(count - 1, 1), torch.arange(count).double()
    prev, found = torch.zeros(2, 4, dtype=torch.float64), []
    for t in range(x.shape[1]):
        mu, sigma = prev + pace * relu(ahead[..., t]), (relu(wide[..., t]) + 0.27) / count
        a = torch.exp(-((places * pace - mu[..., None]) ** 2) / (2 * sigma[..., None] ** 2))
        prev = (a * places * pace).sum(-1) / (a.sum(-1) + 1e-20 * count)
        found.append(torch.stack([mu, sigma]))
    mu, sigma = torch.stack(found, -1)
    return mu, sigma


def test_34_a_walk_and_what_tokens_say():
    mechanism = Mechanism("monotonic_location")
    mu, sigma = walked(mechanism, X, 9)
    places = torch.arange(9).double() / 8
    located = (-((places - mu[..., None]) ** 2) / (2 * sigma[..., None] ** 2)).softmax(-1)
    q = split(mapped(mechanism, "q_proj", X))
    k, v = (split(mapped(mechanism, f"{each}_proj", FAR)) for each in "kv")
    said = (8**-0.5 * q @ k.mT).softmax(-1)
    share = mapped(mechanism, "share_proj", X).sigmoid()[:, None]
    o = (share * located + (1 - share) * said) @ v
    assert_close(mechanism(X, context=FAR), mapped(mechanism, "o_proj", merge(o)))


def test_34_a_closed_gate_leaves_what_tokens_say():
    mechanism = Mechanism("monotonic_location").set(share_proj_weight=0, share_proj_bias=-900)
    plain = "block plain { width = 32; heads = 4; source = context }"
    assert_close(mechanism(X, context=FAR), Mechanism(plain, like=mechanism)(X, context=FAR))


def test_34_steps_of_one_copy_the_source():
    """A sharp look that goes one place further each time reads the source from its second word."""
    mechanism = Mechanism("monotonic_location", ("relu(wide) + 0.27", "0.02 * relu(wide) + 0.02"))
    mechanism.set(walked_walk_asked_proj_weight=0, walked_walk_asked_proj_bias=1 / 32)
    mechanism.set(walked_walk_ahead_proj_weight=1, walked_walk_wide_proj_weight=0)
    mechanism.set(share_proj_weight=0, share_proj_bias=900)
    y = mechanism(X[:, :8], context=FAR)
    v = mapped(mechanism, "v_proj", FAR[:, 1:])
    assert_close(y, mapped(mechanism, "o_proj", v))


@pytest.mark.parametrize(
    ("stride", "at"),
    [("sigmoid(5 * x)", 0.5), ("floor(x) + sigmoid(20 * (x - floor(x) - 0.5))", 0.0)],
)
def test_34_other_strides(stride, at):
    """Of a step of zero: half a place by the sigmoid, none by the soft stair."""
    mechanism = Mechanism(
        "monotonic_location", ("stage stride = relu(x)", f"stage stride = {stride}")
    )
    mechanism.set(walked_walk_ahead_proj_weight=0)
    first = mechanism.streams(X, context=FAR)["walked"][:, :, 0, 0]
    assert (first - at / 8).abs().max() < 1e-4


# ── latent alignments ────────────────────────────────────────────────────────────────────

AT = torch.tensor([[0, 1, 3, 4, 5, 8], [1, 2, 3, 4, 6, 7]]).double()
LABELS = torch.cat([tokens(6, width=31), AT[..., None]], -1)


def energies(mechanism: Mechanism, x: Tensor) -> Tensor:
    q = mapped(mechanism, "q_proj", x[..., :31])
    k = mapped(mechanism, "k_proj", NARROW)
    return (q[:, :, None] + k[:, None]).tanh() @ mechanism.parameter("weight")


def aligned(mechanism: Mechanism, a: Tensor) -> Tensor:
    return mapped(mechanism, "o_proj", torch.cat([a @ NARROW, LABELS[..., :31]], -1))


PLACES = torch.arange(9)
BEFORE = pad(AT, (1, 0), value=-1.0)[:, :-1]


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (None, (AT[..., None] - 5 <= PLACES) & (AT[..., None] + 4 >= PLACES)),
        ("last[i] < j and j <= at[i]", (BEFORE[..., None] < PLACES) & (AT[..., None] >= PLACES)),
        ("j == at[i]", AT[..., None] == PLACES),
        ("all", torch.ones(2, 6, 9, dtype=torch.bool)),
    ],
)
def test_177_windows_segments_and_hard_attention(mask, seen):
    changes = () if mask is None else (("at[i] - back <= j and j <= at[i] + ahead", mask),)
    mechanism = Mechanism("latent_monotonic", *changes)
    a = energies(mechanism, LABELS).masked_fill(~seen, -torch.inf).softmax(-1)
    assert_close(mechanism(LABELS, context=NARROW), aligned(mechanism, a))


def test_177_places_are_likely_among_those_that_are_left():
    mechanism = Mechanism("latent_monotonic")
    e = energies(mechanism, LABELS).masked_fill(BEFORE[..., None] >= PLACES, -torch.inf)
    likely = e.log_softmax(-1).gather(-1, AT[..., None].long())
    assert_close(loss_of(mechanism, LABELS, context=NARROW), -0.1 * likely.mean())


def test_177_as_many_places_as_labels_leave_no_choice():
    """Segments of a source that is as long as its labels are one place each."""
    mechanism = Mechanism(
        "latent_monotonic",
        ("at[i] - back <= j and j <= at[i] + ahead", "last[i] < j and j <= at[i]"),
    )
    places = torch.arange(9).double().expand(2, -1)[..., None]
    labels = torch.cat([tokens(9, width=31), places], -1)
    expected = torch.cat([NARROW, labels[..., :31]], -1)
    assert_close(mechanism(labels, context=NARROW), mapped(mechanism, "o_proj", expected))


WORDS = one_hot(torch.randint(6, (2, 7), generator=torch.Generator().manual_seed(1)), 6).double()
TOLD = torch.cat([tokens(7, width=26), WORDS], -1)


def latent(mechanism: Mechanism) -> tuple[Tensor, Tensor, Tensor]:
    """Return the map, the guess and log g(y), all [b, n, m]."""
    state = TOLD[..., :26]
    p, q = (
        (mapped(mechanism, f"{name}q_proj", x) @ NARROW.mT).softmax(-1)
        for name, x in (("", state), ("guess_", TOLD))
    )
    f = (
        mapped(mechanism, "asking_proj", state)[:, :, None]
        + mapped(mechanism, "told_proj", NARROW)[:, None]
    )
    g = (f.tanh() @ mechanism.parameter("words").mT).log_softmax(-1)
    return p, q, (g * WORDS[:, :, None]).sum(-1)


def test_30_the_bound_by_enumeration():
    mechanism = Mechanism("variational_attention")
    p, q, g = latent(mechanism)
    bound = (q * (g + p.log() - q.log())).sum(-1)
    exact = (p * g.exp()).sum(-1).log()
    assert_close(loss_of(mechanism, TOLD, context=NARROW), -bound.mean())
    assert (bound <= exact + 1e-12).all()
    y = torch.cat([p @ NARROW, TOLD[..., :26]], -1)
    assert_close(mechanism(TOLD, context=NARROW), mapped(mechanism, "o_proj", y).tanh())


def test_30_a_guess_that_is_the_map_costs_nothing():
    mechanism = Mechanism("variational_attention", ("alpha = 1", "alpha = 5"))
    weight = mechanism.parameter("guess_q_proj.weight").clone()
    weight[:, :26], weight[:, 26:] = mechanism.parameter("q_proj.weight"), 0
    mechanism.set(guess_q_proj_weight=weight)
    p, _, g = latent(mechanism)
    assert_close(loss_of(mechanism, TOLD, context=NARROW), -(p * g).sum(-1).mean())


def test_30_of_one_word_all_is_exact():
    mechanism = Mechanism("variational_attention")
    one = NARROW[:, :1]
    _, _, g = latent(mechanism)
    assert_close(loss_of(mechanism, TOLD, context=one), -g[..., 0].mean())


# ── pushes ───────────────────────────────────────────────────────────────────────────────


def pushed(x: Tensor, push: Tensor | float = 0.0) -> Tensor:
    return torch.cat([x[..., :31], torch.zeros_like(x[..., :1]) + push], -1)


def test_109_without_a_push_it_is_pooling():
    mechanism = Mechanism("attention_at")
    x = pushed(X)
    e = mapped(mechanism, "k_proj", X[..., :31]).tanh() @ mechanism.parameter("q_latents.weight")[0]
    pooled = (e.softmax(-1)[..., None] * X[..., :31]).sum(1, keepdim=True)
    assert_close(mechanism(x), mapped(mechanism, "o_proj", pooled))


def test_109_the_loss_grows_by_the_length_of_its_gradient():
    """L(a + r) - L(a) is |g| times the length of r, which points along g, to first order."""
    mechanism = Mechanism("attention_at")
    mechanism(pushed(X))
    x = pushed(X).requires_grad_()
    (grad,) = torch.autograd.grad(mechanism.module(x).sin().sum(), x)
    g = grad[..., 31:]
    length = 1e-5
    r = length * g / g.norm(dim=1, keepdim=True)
    with torch.no_grad():
        before, after = (mechanism.module(pushed(X, each)).sin().sum((1, 2)) for each in (0.0, r))
    assert_close((after - before) / length, g.norm(dim=1)[:, 0], atol=1e-5)


# ── steps ────────────────────────────────────────────────────────────────────────────────

TEXT = tokens(5, width=16, seed=5)
NOISE = tokens(7, width=16)


def denoised(
    mechanism: Mechanism,
    steps: int = 6,
    gate: int = 3,
    warm: int = 1,
    every: int = 2,
    guide: float = 7.5,
) -> Tensor:
    """The sampler as a loop, which decides at each step what is read and what is reused."""
    p = "layers.0.part."

    def on(name: str, x: Tensor) -> Tensor:
        return mapped(mechanism, f"{p}{name}_proj", x)

    z, kept, held = NOISE, torch.zeros_like(NOISE), torch.zeros_like(NOISE)
    for t in range(steps):
        if t <= warm or t >= gate - 1 or t % every == 0:
            y = normed(mechanism, f"{p}y_norm", z)
            held = on("fresh", attended(on("own_q", y), on("own_k", y), on("own_v", y)))
        mid = z + held
        if t < gate:
            q = on("asked", normed(mechanism, f"{p}asked_norm", mid))
            halves = [
                on("both", attended(q, on("keys", each), on("told", each)))
                for each in (TEXT[:, 1:], TEXT[:, :1])
            ]
            kept = sum(halves) / 2 if t == gate - 1 else kept
        else:
            halves = [kept]
        found = []
        for each in halves:
            met = mid + each
            hidden = normed(mechanism, f"{p}noise__norm", met)
            hidden = gelu(mapped(mechanism, f"{p}noise__proj_0", hidden))
            found.append(met + mapped(mechanism, f"{p}noise__proj_1", hidden))
        none = found[-1]
        z = z - 0.1 * (none + guide * (found[0] - none))
    return z


def start(x: Tensor = NOISE) -> Tensor:
    return pad(x, (0, 33))


def gated(mechanism: Mechanism) -> Tensor:
    y = mechanism(start(), context=TEXT)
    assert_close(y[..., 48], torch.full((2, 7), 6.0).double())
    return y[..., :16]


def test_58_what_was_read_at_the_gate_is_read_no_more():
    mechanism = Mechanism("t_gate")
    assert_close(gated(mechanism), denoised(mechanism))


@pytest.mark.parametrize(("gate", "warm", "every"), [(6, 0, 1), (4, 1, 3), (2, 0, 5), (1, 0, 1)])
def test_58_gates_and_pauses(gate, warm, every):
    changes = ("gate = 3, warm = 1, every = 2", f"gate = {gate}, warm = {warm}, every = {every}")
    mechanism = Mechanism("t_gate", changes)
    assert_close(gated(mechanism), denoised(mechanism, gate=gate, warm=warm, every=every))


def test_58_a_text_that_says_nothing_needs_no_gate():
    late = ("gate = 3, warm = 1, every = 2", "gate = 6, warm = 0, every = 1")
    mechanism = Mechanism("t_gate", late).set(layers_0_part_told_proj_weight=0)
    early = Mechanism("t_gate", (late[0], "gate = 2, warm = 0, every = 1"), like=mechanism)
    assert_close(gated(early), gated(mechanism))


# ── pointers and channels ────────────────────────────────────────────────────────────────


def test_102_maps_are_weighed_into_one_with_an_end():
    mechanism = Mechanism("oat")
    x, objects = tokens(6, width=33), tokens(9, seed=5)
    q, k = mapped(mechanism, "q_proj", x), mapped(mechanism, "k_proj", objects)
    s = 8**-0.5 * split(q) @ split(k).mT
    s = (mechanism.parameter("share")[:, None, None] * s).sum(1)
    p = pad(s, (0, 1)).softmax(-1)  # the end's logit is zero
    expected = torch.cat([p[..., :-1] @ objects, p[..., -1:]], -1)
    assert_close(mechanism(x, context=objects), expected)
    order = torch.tensor([3, 0, 6, 8, 1, 5, 2, 4, 7])
    assert_close(mechanism(x, context=objects[:, order]), expected)


GRID = tokens(64, width=35)


def plane(x: Tensor) -> Tensor:
    return x.mT.unflatten(-1, (8, 8))


def grid_conv(mechanism: Mechanism, name: str, x: Tensor) -> Tensor:
    """A linear map of nine neighbours as the convolution it is."""
    weight = mechanism.parameter(f"{name}.weight").unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
    found = conv2d(plane(x), weight, mechanism.parameter(f"{name}.bias"), padding=1)
    return found.flatten(2).mT


def test_215_places_and_channels_are_asked_by_the_map():
    mechanism = Mechanism("coam")
    image, map_ = GRID.split((32, 3), -1)
    seen = grid_conv(mechanism, "seen__proj", image)
    q = mapped(mechanism, "places_q_proj_1", grid_conv(mechanism, "places_q_proj_0", map_))
    k, v = (mapped(mechanism, f"places_{each}_proj", seen) for each in "kv")
    places = mapped(mechanism, "main_proj", (32**-0.5 * q @ k.mT).softmax(-1) @ v)
    q, k = grid_conv(mechanism, "kinds_q_proj", map_), grid_conv(mechanism, "other_proj", image)
    a = (q.mT @ k / 64**0.5).softmax(-1)  # of channels
    assert_close(a.sum(-1), torch.ones(2, 32).double())
    kinds = (a @ k.mT) @ mechanism.parameter("place").mT + mechanism.parameter("place_bias")
    expected = torch.cat([image + places + kinds.mT, map_], -1)
    assert_close(mechanism(GRID), expected)


def test_215_closed_maps_leave_the_image():
    closed = ("place", "place_bias", "main_proj_weight", "main_proj_bias")
    mechanism = Mechanism("coam").set(**dict.fromkeys(closed, 0))
    assert_close(mechanism(GRID), GRID)


# ── without pairs ────────────────────────────────────────────────────────────────────────


def short(mechanism: Mechanism, x: Tensor) -> Tensor:
    weight = mechanism.parameter("y_conv.weight")[:, None]
    return silu(conv1d(pad(x.mT, (3, 0)), weight, groups=32).mT)


def test_metala_is_a_map_whose_keys_are_what_is_forgotten():
    mechanism = Mechanism("metala")
    y = short(mechanism, X)
    q, gate, v = (split(mapped(mechanism, f"{each}_proj", y)) for each in "qkv")
    fade = torch.nn.functional.logsigmoid(gate) / 16
    k, total = 1 - fade.exp(), fade.cumsum(2)
    s = torch.einsum(
        "bhic,bhjc,bhijc->bhij", q, k, (total[:, :, :, None] - total[:, :, None]).exp()
    )
    o = 4**-0.5 * (s * causal()) @ v
    own = (q * k * mechanism.parameter("balance")[:, None]).sum(-1, keepdim=True)
    o = layer_norm(o + sigmoid(own * v), (8,))
    g = silu(mapped(mechanism, "g_proj", y))
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(o) * g))


def test_gss_is_a_convolution_with_a_kernel_of_complex_rates():
    mechanism = Mechanism("gss")
    p = mechanism.parameter
    x = normed(mechanism, "normed_norm", X)
    u = gelu(mapped(mechanism, "u_proj", x))
    few = normed(mechanism, "few_norm", gelu(mapped(mechanism, "few_proj", x)))
    rate = torch.complex(-p("slow").exp(), p("turn").exp())
    c = torch.complex(p("c"), p("d")).transpose(0, 1).flatten(1)  # [size, channels]
    lags = torch.arange(N, dtype=torch.float64)
    kernel = (c * ((rate.exp() - 1) / rate)[:, None]).mT @ (rate[:, None] * lags).exp()
    y = conv1d(pad(few.mT, (N - 1, 0)), kernel.real.flip(-1)[:, None], groups=8).mT
    y = mapped(mechanism, "o_proj_0", y + p("direct") * few) * u
    assert_close(mechanism(X), X + mapped(mechanism, "o_proj_1", y))


def test_aft_local_is_a_softmax_for_each_channel_with_biases_of_near_places():
    mechanism = Mechanism("aft_local")
    q, k, v = (mapped(mechanism, f"{each}_proj", X) for each in "qkv")
    gap = torch.arange(N)[:, None] - torch.arange(N)
    w = mechanism.parameter("bias")[:N, :N].where(gap.abs() < 4, 0)
    w = (k[:, None] + w[..., None]).masked_fill(~causal()[..., None], -torch.inf).softmax(2)
    expected = sigmoid(q) * (w * v[:, None]).sum(2)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", expected))


def test_aft_local_without_biases_is_the_simple_form():
    mechanism = Mechanism("aft_local").set(bias=0)
    assert_close(mechanism(X), Mechanism("aft_simple", like=mechanism)(X))

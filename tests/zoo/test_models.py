"""Mechanisms that are more than one attention: whole layers and models, written out by hand."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn.functional import (
    conv1d,
    conv2d,
    fold,
    gelu,
    interpolate,
    layer_norm,
    rms_norm,
    silu,
    unfold,
)

from headloom.compiler.api import build_module
from headloom.compiler.plan.plan import Target

from .mechanisms import (
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


def build(mechanism: Mechanism) -> torch.nn.Module:
    """Return a new module, as it begins."""
    return build_module(mechanism.what, Target("torch"), dtype=torch.float64, seed=0)


class Part:
    """The weights below one name of a mechanism, applied by their own names."""

    def __init__(self, mechanism: Mechanism, name: str = "") -> None:
        self.mechanism, self.name = mechanism, name and f"{name}."

    def __getitem__(self, name: str) -> Tensor:
        return self.mechanism.parameter(self.name + name)

    def map(self, name: str, x: Tensor) -> Tensor:
        """A linear map: `q` is `q_proj`, `o_proj_1` is that."""
        return mapped(self.mechanism, self.name + (name if "_proj" in name else f"{name}_proj"), x)

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        """A layer norm: `y` is `y_norm`, `o_norm_1` is that."""
        name = name if "_norm" in name else f"{name}_norm"
        weight, bias = self[f"{name}.weight"], self[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, eps)

    def rms(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self[f"{name}_norm.weight"], 1e-6)

    def three(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Return queries, keys and values of streams."""
        return [self.map(f"{name}{at}", each) for at, each in zip("qkv", (q, k, v), strict=True)]


def layers(mechanism: Mechanism, part: str) -> list[Part]:
    """Return the weights of a part in every layer that has it."""
    names = dict(mechanism.meaning.named_parameters())
    count = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("layers."))
    found = [f"layers.{at}.{part}" for at in range(count)]
    return [
        Part(mechanism, each)
        for each in found
        if any(name.startswith(f"{each}.") for name in names)
    ]


# ── masked patches ───────────────────────────────────────────────────────────────────────

LAYERS = tokens(9, width=96, seed=5)
MASKED = torch.tensor([[4, 1, 12, 7, 30, 8, 2]]).expand(2, -1)
MASKS = torch.zeros_like(MASKED)


def coded(positions: Tensor, width: int = 32) -> Tensor:
    """Sines and cosines of positions, side by side in pairs."""
    power = 10_000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = positions[..., None] * power
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def test_20_is_a_decoder_of_cross_attention_and_networks():
    mechanism = Mechanism("crossmae")
    whole = Part(mechanism)
    x = whole["embed_tokens.weight"][0] + coded(MASKED)
    found = torch.stack(LAYERS.chunk(3, -1), -1)
    attentions, networks = layers(mechanism, "attn"), layers(mechanism, "ffn")
    for at, (attn, ffn) in enumerate(zip(attentions, networks, strict=True)):
        own = Part(mechanism, f"layers.{at}")
        y = attn.norm("y", found @ torch.stack([attn[it] for it in ("first", "middle", "last")]))
        x = x + attn.map("o", attended(*attn.three("", own.norm("attn", x), y, y)))
        x = x + ffn.map("down", gelu(ffn.map("up", own.norm("ffn", x))))
    pixels = layer_norm(x, (32,), whole["norm.weight"], whole["norm.bias"])
    pixels = pixels @ whole["lm_head.weight"].mT + whole["lm_head.bias"]
    assert_close(mechanism(MASKS, context=LAYERS, positions=MASKED), pixels)


def test_20_masked_patches_do_not_see_each_other():
    mechanism = Mechanism("crossmae")
    y = mechanism(MASKS, context=LAYERS, positions=MASKED)
    some = torch.tensor([5, 2, 3])
    found = mechanism(MASKS[:, some], context=LAYERS, positions=MASKED[:, some])
    assert_close(found, y[:, some])
    order = torch.tensor([3, 0, 6, 8, 1, 5, 2, 4, 7])
    assert_close(mechanism(MASKS, context=LAYERS[:, order], positions=MASKED), y)


def test_20_one_layer_alone_reads_that_layer():
    only = {f"layers_{at}_attn_{it}": it == "last" for at in (0, 1) for it in ("first", "middle")}
    only |= {f"layers_{at}_attn_last": 1 for at in (0, 1)}
    mechanism = Mechanism("crossmae").set(**only)
    other = torch.cat([tokens(9, width=64, seed=6), LAYERS[..., 64:]], -1)
    assert_close(mechanism(MASKS, context=other), mechanism(MASKS, context=LAYERS))


# ── two kinds of tokens in one row ───────────────────────────────────────────────────────

KINDS = torch.tensor([[0] * 5 + [1] * 6]).expand(2, -1)
VIDEO = tokens(9, seed=5)
SLOTS = torch.tensor([[0] * 8 + [1] * 3]).expand(2, -1)
FRAMES = tokens(32, seed=5)  # two frames of 4 x 4
TEXT = torch.where(SLOTS[..., None] == 1, X, 0)


def projected(mechanism: Mechanism, x: Tensor) -> Tensor:
    layer = Part(mechanism, "layers.0.part")
    up, down = ("v_linear_0.o_proj", "v_linear_1.o_proj")
    return layer.map(down, gelu(layer.map(up, x)))


def test_42_frames_are_pooled_and_stand_before_the_text():
    pooled = "alone(pooled(up, down, side, grid))"
    layers = f"[{pooled}, plain, alone(reader(up, down))]"
    mechanism = Mechanism("crosslmm", (layers, f"[{pooled}]"))
    image = FRAMES.unflatten(1, (2, 4, 4)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    small = interpolate(image, size=(2, 2), mode="bilinear", align_corners=False)
    small = small.unflatten(0, (2, 2)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    x = torch.cat([projected(mechanism, small), X[:, 8:]], 1)
    y = rms_norm(x, (32,), mechanism.parameter("norm.weight"), 1e-6)
    assert_close(mechanism(TEXT, context=FRAMES, segments=SLOTS), y)


def test_42_vision_and_text_read_with_weights_of_their_own():
    mechanism = Mechanism("crosslmm").set(
        layers_2_part_visual_gate=0.7, layers_2_part_text_gate=-0.4
    )
    layer = Part(mechanism, "layers.2.part")
    own = attended(*layer.three("", X, X, X), is_causal=True)
    met = layer.norm("met", X + layer.map("met", own))
    video, sides = projected(mechanism, FRAMES), []
    for name, part in (("visual", met[:, :8]), ("text", met[:, 8:])):
        read = attended(*layer.three(f"{name}_", part, video, video))
        sides.append(part + layer[f"{name}_gate"].tanh() * read)
    told = torch.cat(sides, 1)
    y = told + layer.map("o", gelu(layer.map("inner", told)))
    with torch.no_grad():
        block = mechanism.meaning.get_submodule("layers.2.part")
        assert_close(block.layer(X, (), FRAMES, SLOTS)[0], y)


def test_42_closed_gates_leave_the_model_on_pooled_tokens():
    mechanism = Mechanism("crosslmm").set(layers_2_part_visual_gate=0, layers_2_part_text_gate=0)
    centre = FRAMES.unflatten(1, (2, 4, 4)).clone()
    pooled = centre.unflatten(2, (2, 2)).unflatten(4, (2, 2))
    other = pooled.mean((3, 5), keepdim=True).expand_as(pooled).flatten(1, 5)
    assert (other - FRAMES).abs().max() > 0.1
    one, two = (mechanism(TEXT, context=each, segments=SLOTS) for each in (FRAMES, other))
    assert_close(one, two)


def test_65_is_lxmerts_layer():
    from transformers import LxmertConfig
    from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

    theirs = LxmertXLayer(
        LxmertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=128)
    )
    theirs = theirs.double().eval()
    mechanism = Mechanism("lxmert_cross")
    pairs = {
        "visual_attention.output.dense": "met_proj",
        "visual_attention.output.LayerNorm": "met_norm",
    }
    for name, it in (("query", "q"), ("key", "k"), ("value", "v")):
        pairs[f"visual_attention.att.{name}"] = f"cross_{it}_proj"
        pairs[f"lang_self_att.self.{name}"] = f"words_{it}_proj"
        pairs[f"visn_self_att.self.{name}"] = f"objects_{it}_proj"
    for side, own, inner, last in (
        ("lang", "word", "named", "said"),
        ("visn", "object", "seen_", "shown"),
    ):
        pairs[f"{side}_self_att.output.dense"] = f"{own}_proj"
        pairs[f"{side}_self_att.output.LayerNorm"] = f"{own}_norm"
        pairs[f"{side}_inter.dense"] = f"{inner}_proj_0"
        pairs[f"{side}_output.dense"] = f"{inner}_proj_1"
        pairs[f"{side}_output.LayerNorm"] = f"{last}_norm"
    with torch.no_grad():
        for name, mine in pairs.items():
            layer = theirs.get_submodule(name)
            layer.weight.copy_(mechanism.parameter(f"{mine}.weight"))
            layer.bias.copy_(mechanism.parameter(f"{mine}.bias"))
        words, boxes = theirs(X[:, :5], None, X[:, 5:], None)[:2]
    assert_close(mechanism(X, segments=KINDS), torch.cat([words, boxes], 1))


def test_65_objects_have_no_order_and_sides_may_change_places():
    mechanism = Mechanism("lxmert_cross")
    order = torch.tensor([0, 1, 2, 3, 4, 9, 6, 10, 5, 8, 7])
    y = mechanism(X, segments=KINDS)
    assert_close(mechanism(X[:, order], segments=KINDS), y[:, order])
    turned = torch.arange(N).roll(6)
    assert_close(mechanism(X[:, turned], segments=KINDS[:, turned]), y[:, turned])


def test_65_without_what_was_read_sides_do_not_meet():
    mechanism = Mechanism("lxmert_cross").set(met_proj_weight=0)
    other = torch.cat([X[:, :5], tokens(6, seed=7)], 1)
    y = mechanism(X, segments=KINDS)
    assert_close(mechanism(other, segments=KINDS)[:, :5], y[:, :5])


IMAGES = tokens(128)


def windowed(shift: int) -> Tensor:
    """Return which pixels lie in the same window, [64, 64]."""
    at = (torch.arange(8) + shift) // 4
    ids = torch.cartesian_prod(at, at)
    return (ids[:, None] == ids).all(-1)


def two_images(mechanism: Mechanism, x: Tensor) -> Tensor:
    """The authors' way: both directions as one batch, whose halves are exchanged."""
    x = torch.cat(x.chunk(2, 1))  # [2 b, 64, 32]
    for at, part in enumerate(layers(mechanism, "part")):
        shift, cross = (0, 2)[at // 2], at % 2
        far = x.roll(len(x) // 2, 0) if cross else x
        found = attended(*part.three("", x, far, far), heads=1, attn_mask=windowed(shift))
        if not cross:
            x = x + part.norm("o", part.map("o", found))
            continue
        y = part.norm("o_norm_0", part.map("o_proj_0", found))
        y = part.map("o_proj_2", gelu(part.map("o_proj_1", torch.cat([y, x], -1))))
        x = x + part.norm("o_norm_1", y)
    far = x.roll(len(x) // 2, 0)
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
    flow = (32**-0.5 * x @ far.mT).softmax(-1) @ grid - grid
    return torch.cat(flow.chunk(2), 1)


def test_110_is_both_directions_as_one_batch():
    mechanism = Mechanism("unimatch_cross")
    assert_close(mechanism(IMAGES), two_images(mechanism, IMAGES))


def test_110_exchanged_images_exchange_their_flows():
    mechanism = Mechanism("unimatch_cross")
    there, back = mechanism(IMAGES).chunk(2, 1)
    assert_close(mechanism(IMAGES.roll(64, 1)), torch.cat([back, there], 1))


def test_110_equal_images_with_sharp_features_do_not_move():
    """Layers that add nothing leave the features as they are."""
    mechanism = Mechanism("unimatch_cross")
    silent = {
        name.replace(".", "_"): 0
        for name, _ in mechanism.meaning.named_parameters()
        if re.search(r"o_norm(_1)?\.(weight|bias)", name)
    }
    one = 100 * torch.eye(64, dtype=torch.float64)[None, :, :32]
    one = torch.cat([one[:, :32], -one[:, :32]], 1)
    assert_close(mechanism.set(**silent)(torch.cat([one, one], 1)), torch.zeros(1, 128, 2).double())
    even = torch.zeros(1, 128, 32, dtype=torch.float64)
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
    assert_close(mechanism(even)[0, :64], 3.5 - grid)


# ── candidates ───────────────────────────────────────────────────────────────────────────

FAR = tokens(9, width=24, seed=5)


def test_33_one_softmax_over_the_text_and_itself_then_a_network():
    mechanism = Mechanism("mixencoder")
    x, layer = tokens(3), Part(mechanism)
    q, k, v = layer.three("", x, x, x)
    k = torch.cat([layer.map("text_k", FAR), k], 1)
    v = torch.cat([layer.map("text_v", FAR), v], 1)
    told = layer.norm("told", x + layer.map("told", attended(q, k, v)))
    y = layer.norm("o", told + layer.map("o", gelu(layer.map("inner", told))))
    assert_close(mechanism(x, context=FAR), y)


# ── models ───────────────────────────────────────────────────────────────────────────────


def test_121_is_attention_and_linear_maps_of_bounded_norm():
    mechanism = Mechanism("entropy_guided")
    x = X
    for at, (attn, ffn) in enumerate(
        zip(layers(mechanism, "attn"), layers(mechanism, "ffn"), strict=True)
    ):
        q, k, v = (split(each) for each in attn.three("", x, x, x))
        s = 8**-0.5 * q @ k.mT / attn["temper"][:, None, None]
        y = x + attn.map("o", merge(softmax(s) @ v))
        both = torch.eye(32, dtype=torch.float64)
        for name in ("up_proj", "o_proj"):
            weight = ffn[f"{name}.weight"]
            both = ffn[f"{name}.gain"] * weight / torch.linalg.matrix_norm(weight, 2) @ both
        own = Part(mechanism, f"layers.{at}")
        x = own["beta"] * y + own["alpha"] * y @ both.mT
    assert_close(mechanism(X), x)


def test_249_layers_see_all_or_a_window_or_nothing():
    mechanism = Mechanism("layerboost", ("position = rope", "position = none"))
    x = X
    near = causal() & (torch.arange(N)[:, None] - torch.arange(N) < 8)
    for at, ffn in enumerate(layers(mechanism, "ffn")):
        own = Part(mechanism, f"layers.{at}")
        if at < 2:
            attn, y = Part(mechanism, f"layers.{at}.attn"), own.rms("attn", x)
            seen = (causal(), near)[at]
            x = x + attn.map("o", attended(*attn.three("", y, y, y), attn_mask=seen))
        y = own.rms("ffn", x)
        x = x + ffn.map("down", silu(ffn.map("gate", y)) * ffn.map("up", y))
    assert_close(mechanism(X), rms_norm(x, (32,), mechanism.parameter("norm.weight"), 1e-6))


def test_249_a_wide_window_is_softmax_over_all():
    wide = Mechanism("layerboost", ("w = 8", "w = 40"))
    plain = Mechanism("layerboost", ("[full, near,", "[full, full,"), like=wide)
    assert_close(wide(X), plain(X))
    assert not torch.allclose(Mechanism("layerboost", like=wide)(X), plain(X))


def test_249_a_layer_without_attention_has_fewer_weights():
    def count(*changes: tuple[str, str]) -> int:
        module = Mechanism("layerboost", *changes).module
        return sum(each.numel() for each in module.parameters())

    assert count(("swiglu(8 / 3)]", "full]")) - count() == 4 * 32**2 + 32  # and a norm


def plain_rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_17_is_the_parallel_form():
    mechanism = Mechanism("transnormer")
    x = X
    gap = torch.arange(N)[:, None] - torch.arange(N)
    for at, (attn, ffn) in enumerate(
        zip(layers(mechanism, "attn"), layers(mechanism, "ffn"), strict=True)
    ):
        y = plain_rms(x)
        q, k = (split(silu(attn.map(name, y))) for name in ("ask", "told"))
        turn = torch.ones(4, 1, N, N, dtype=torch.float64)  # cosines of every feature
        if at == 0:
            theta = attn["theta"].unflatten(0, (4, 8))
            turn = (gap * theta[..., None, None]).cos()
        s = torch.einsum("bhic,bhjc,hcij->bhij", q, k, turn.expand(4, 8, N, N))
        decay = (-2 * torch.arange(4).double() * (1 - at / 3)).exp()[:, None, None]
        o = plain_rms(merge(s * decay ** gap.clip(min=0) * causal() @ split(attn.map("v", y))))
        x = x + attn.map("o", o * attn.map("u", y))
        y = plain_rms(x)
        x = x + ffn.map("o", ffn.map("one", y) * ffn.map("two", y))
    assert_close(mechanism(X), plain_rms(x))


def test_17_rates_begin_as_those_of_rope_and_at_zero_turn_nothing():
    mechanism = Mechanism("transnormer")
    first = dict(mechanism.module.named_parameters())
    theta = build(mechanism).get_parameter("layers.0.attn.theta")
    assert first.keys() == dict(build(mechanism).named_parameters()).keys()
    assert_close(theta, 10_000 ** (-torch.arange(0, 64, 2) / 32).double())
    still = mechanism.set(layers_0_attn_theta=0)
    streams = Mechanism("transnormer", part="lowest")
    names = {f"layers.0.attn.{name}": name for name, _ in streams.meaning.named_parameters()}
    streams.set(**{mine.replace(".", "_"): still.parameter(it) for it, mine in names.items()})
    found = streams.streams(X)
    plain = [split(silu(mapped(streams, f"{name}_proj", X))) for name in ("ask", "told")]
    assert_close(found["q"] @ found["k"].mT, plain[0] @ plain[1].mT)


# ── one language before the other ────────────────────────────────────────────────────────

IDS = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(0))


def aligned(mechanism: Mechanism, ids: Tensor, other: Tensor) -> Tensor:
    whole = Part(mechanism)
    words = whole["embed_tokens.weight"][ids] + coded(torch.arange(N))
    x = coded(torch.arange(N)).expand_as(words)
    off = ~torch.eye(N, dtype=torch.bool)
    for at, (attn, ffn) in enumerate(
        zip(layers(mechanism, "attn"), layers(mechanism, "ffn"), strict=True)
    ):
        own = Part(mechanism, f"layers.{at}")
        streams = attn.three("", own.norm("attn", x), words, words)
        x = x + attn.map("o", attended(*streams, attn_mask=off))
        if at == 2:
            read = Part(mechanism, "layers.2.read")
            q, k, v = read.three("", own.norm("read", x), other, other)
            null = (read[f"null_{name}_latents.weight"].expand(2, -1, -1) for name in "kv")
            k, v = (torch.cat([one, each], 1) for one, each in zip(null, (k, v), strict=True))
            x = x + read.map("o", attended(q, k, v))
        x = x + ffn.map("down", ffn.map("up", own.norm("ffn", x)).relu())
    return (
        layer_norm(x, (32,), whole["norm.weight"], whole["norm.bias"]) @ whole["lm_head.weight"].mT
    )


def test_88_is_attention_to_words_as_they_are():
    mechanism = Mechanism("mask_align")
    assert_close(mechanism(IDS, context=VIDEO), aligned(mechanism, IDS, VIDEO))


def test_88_a_word_is_not_seen_where_it_is_predicted():
    mechanism = Mechanism("mask_align")
    other = IDS.clone()
    other[:, 4] = (other[:, 4] + 1) % 64
    moved = (mechanism(IDS, context=VIDEO) - mechanism(other, context=VIDEO)).abs().amax((0, 2))
    assert [at for at, each in enumerate(moved) if each < 1e-12] == [4]


# ── what one layer says of another ───────────────────────────────────────────────────────


def second_look(mechanism: Mechanism, x: Tensor, seen: Tensor) -> Tensor:
    """Return what the second look makes of an image of which some patches are seen, [b, n]."""
    mask = seen[:, None, None].expand(-1, 4, N, -1)
    for at in (2, 3):
        own, attn = Part(mechanism, f"layers.{at}"), Part(mechanism, f"layers.{at}.attn")
        ffn, y = Part(mechanism, f"layers.{at}.ffn"), own.norm("attn", x)
        q, k, v = (split(each) for each in attn.three("", y, y, y))
        s = (8**-0.5 * q @ k.mT).masked_fill(~mask, -torch.inf)
        x = x + attn.map("o", merge(s.softmax(-1) @ v))
        x = x + ffn.map("down", gelu(ffn.map("up", own.norm("ffn", x))))
    return layer_norm(
        x, (32,), mechanism.parameter("norm.weight"), mechanism.parameter("norm.bias")
    )


def belonging(mechanism: Mechanism, x: Tensor) -> Tensor:
    """Return what the first look says of the parts of every patch, [b, n, parts + 1]."""
    for at in (0, 1):
        own, attn = Part(mechanism, f"layers.{at}"), Part(mechanism, f"layers.{at}.attn")
        ffn, y = Part(mechanism, f"layers.{at}.ffn"), own.norm("attn", x)
        x = x + attn.map("o", attended(*attn.three("", y, y, y)))
        x = x + ffn.map("down", gelu(ffn.map("up", own.norm("ffn", x))))
    return Part(mechanism, "layers.2.attn").map("belongs", x)


def test_18_the_second_look_sees_what_the_first_chose():
    mechanism = Mechanism("faithful_mask")
    seen = belonging(mechanism, X).argmax(-1) < 3
    seen[:, 0] = True
    assert 0 < seen.sum() < seen.numel()
    # a logit of what is left out is lower by log(1e-10) alone
    assert_close(mechanism(X), second_look(mechanism, X, seen), atol=1e-6)


def test_18_without_background_all_is_seen():
    mechanism = Mechanism("faithful_mask")
    bias = torch.tensor([0.0, 0, 0, -1e3])
    mechanism.set(layers_2_attn_belongs_proj_bias=bias)
    assert_close(mechanism(X), second_look(mechanism, X, torch.ones(2, N).bool()))


def test_18_parts_are_drawn_in_training_and_learn_through_the_draw():
    mechanism = Mechanism("faithful_mask")
    mechanism(X)
    module = mechanism.module.train()
    torch.manual_seed(0)
    one, other = module(X), module(X)
    module.eval()
    assert not torch.allclose(one, other)
    one.sin().sum().backward()
    assert module.get_parameter("layers.2.attn.belongs_proj.weight").grad.abs().max() > 0


def test_18_a_draw_is_that_of_gumbel():
    """Of two parts with odds of three to one the first is drawn so often."""
    (stage,) = re.findall(r"^stage gumbel.*$", text_of("faithful_mask"), re.MULTILINE)
    drawn = "block b { width = 2; heads = 1; out = step(x + (x | gumbel) | softmax | top(1)) }"
    text = f"{stage}\n{drawn}"
    module = Mechanism(text).module.train()
    torch.manual_seed(0)
    logits = torch.tensor([math.log(3.0), 0.0]).double().expand(1, 40_000, 2)
    with torch.no_grad():
        assert abs(module(logits)[..., 0].mean() - 0.75) < 0.01
    module.eval()


def routed(mechanism: Mechanism, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return what comes of a text without rotary positions, and for whom layers see all, [b]."""
    who = []
    gap = torch.arange(N)[:, None] - torch.arange(N)
    near = causal() & ((gap < 4) | (torch.arange(N) < 2))
    for at in range(3):
        own, attn = Part(mechanism, f"layers.{at}"), Part(mechanism, f"layers.{at}.attn")
        ffn, y = Part(mechanism, f"layers.{at}.ffn"), own.rms("attn", x)
        q, k, v = attn.map("own", y), attn.map("k", y), attn.map("v", y)
        read = split(torch.cat([q[:, :2], q[:, -2:]], 1)).mean((1, 2))
        for name in ("inner", "deep"):
            read = attn.map(f"{name}_proj_1", silu(attn.map(f"{name}_proj_0", read)))
        full = attn.map("logit", read).argmax(-1)
        who.append(full)
        o = [attended(q, k, v, attn_mask=each) for each in (near, causal())]
        x = x + attn.map("o", torch.where(full[:, None, None] > 0, o[1], o[0]))
        y = own.rms("ffn", x)
        x = x + ffn.map("down", silu(ffn.map("gate", y)) * ffn.map("up", y))
    return rms_norm(x, (32,), mechanism.parameter("norm.weight"), 1e-6), who


FLUX = ("position = rope", "position = none")


def test_231_a_router_chooses_for_a_whole_text():
    mechanism = Mechanism("flux_attention", FLUX)
    seen = set()
    for shift in (-1, 0, 1):
        bias = torch.tensor([0.0, shift])
        mechanism.set(**{f"layers_{at}_attn_logit_proj_bias": bias for at in range(3)})
        y, who = routed(mechanism, X)
        seen |= {int(each) for one in who for each in one}
        assert_close(mechanism(X), y)
    assert seen == {0, 1}


def test_231_of_few_tokens_both_are_the_same():
    mechanism = Mechanism("flux_attention")
    found = []
    for shift in (-99, 99):
        bias = torch.tensor([0.0, shift])
        mechanism.set(**{f"layers_{at}_attn_logit_proj_bias": bias for at in range(3)})
        found.append(mechanism(tokens(6)))
    assert_close(*found)


def test_231_routers_are_held_to_a_share_and_how_hard_is_learned_against_them():
    mechanism = Mechanism("flux_attention")
    biases = {f"layers_{at}_attn_logit_proj_bias": [0.0, 99.0] for at in (0, 1)}
    mechanism.set(layers_2_attn_logit_proj_bias=[0.0, -99.0], **biases)
    mechanism.set(layers_2_attn_one=0.7, layers_2_attn_two=0.2)
    mechanism(X)
    module = mechanism.module.train()
    torch.manual_seed(0)
    module(X)
    module.eval()
    loss = module.auxiliary_loss()
    off = 1 - 2 / 3 - 0.5
    assert_close(loss, torch.tensor(0.7 * abs(off) + 0.2 * off**2, dtype=torch.float64))
    loss.backward()
    attn = module.get_submodule("layers.2.attn")
    assert_close(attn.one.grad, torch.tensor(-abs(off), dtype=torch.float64))
    assert_close(attn.two.grad, torch.tensor(-(off**2), dtype=torch.float64))
    weight = module.get_parameter("layers.0.attn.inner_proj_0.weight")
    assert weight.grad is not None


SIX = torch.tensor([[0] * 2 + [1] * 2 + [2] + [3] * 2 + [4] * 2 + [5] * 2]).expand(2, -1)


def test_206_queries_look_where_their_masks_are_open():
    mechanism = Mechanism("seem_decoder", part="look")
    layer = Part(mechanism)
    far = tokens(9, seed=5)
    e = layer.norm("asked", X)
    for at in range(3):
        e = layer.map(f"asked_proj_{at}", e)
        e = e.relu() if at < 2 else e
    open_ = e @ layer.map("f", far).mT >= 0
    open_ |= ~open_.any(-1, keepdim=True)
    assert not open_.all()
    read = attended(*layer.three("", X, far, far), attn_mask=open_[:, None])
    looks = (SIX != 2) & (SIX != 4)
    expected = layer.map("o", read) * looks[..., None]
    assert_close(mechanism(X, context=far, segments=SIX), expected)


def test_206_a_closed_mask_opens():
    mechanism = Mechanism("seem_decoder", part="look")
    mechanism.set(asked_proj_2_weight=0, asked_proj_2_bias=-1, f_proj_weight=0, f_proj_bias=1)
    layer, far = Part(mechanism), tokens(9, seed=5)
    expected = layer.map("o", attended(*layer.three("", X, far, far)))
    assert_close(mechanism(X, context=far), expected)


def test_206_a_layer_reads_the_image_then_the_row():
    mechanism = Mechanism("seem_decoder")
    far, own = tokens(9, seed=5), Part(mechanism, "layers.0")
    parts = {"read": "look", "attn": "own"}
    found = {name: Mechanism("seem_decoder", part=part) for name, part in parts.items()}
    for name, each in found.items():
        mine = [it for it, _ in each.meaning.named_parameters()]
        each.set(**{it.replace(".", "_"): own[f"{name}.{it}"] for it in mine})
    y = own.norm("y", X + found["read"](X, context=far, segments=SIX))
    z = own.norm("z", y + found["attn"](y, segments=SIX))
    ffn = Part(mechanism, "layers.0.ffn")
    z = own.norm("o", z + ffn.map("down", ffn.map("up", z).relu()))
    last = layer_norm(
        z, (32,), mechanism.parameter("norm.weight"), mechanism.parameter("norm.bias")
    )
    assert_close(mechanism(X, context=far, segments=SIX), last)


# ── pixels ───────────────────────────────────────────────────────────────────────────────

PIXELS = tokens(64)


def plane(x: Tensor) -> Tensor:
    """[b, 64, c] → [b, c, 8, 8]"""
    return x.mT.unflatten(-1, (8, 8))


def pixels(x: Tensor) -> Tensor:
    """[b, c, 8, 8] → [b, 64, c]"""
    return x.flatten(2).mT


def around(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Every channel's convolution with taps [c, size, size] of its own."""
    size = taps.shape[-1]
    return pixels(conv2d(plane(x), taps[:, None], bias, padding=size // 2, groups=len(taps)))


def test_211_beside_it_channels_read_pixels_with_weights_of_the_image():
    """The authors' way: a kernel for each channel and image, in one convolution by groups."""
    mechanism = Mechanism("inline")
    layer = Part(mechanism)
    v = layer.map("whole", PIXELS)
    inner = PIXELS.mean(1, keepdim=True).mT
    weight = layer["inner_proj.weight"].flatten(0, 1)[..., None]
    inner = gelu(conv1d(inner, weight, layer["inner_bias"], groups=4))
    weight = layer["said_proj.weight"].flatten(0, 1)[..., None]
    kernels = conv1d(inner, weight, layer["taps_bias"], groups=4).reshape(64, 1, 3, 3)
    near = conv2d(plane(v).reshape(1, 64, 8, 8), kernels, padding=1, groups=64)
    near = pixels(near.reshape(2, 32, 8, 8))
    o = merge(mechanism.mixed(PIXELS)) + near
    assert_close(mechanism(PIXELS), layer.map("o", o))


def test_211_without_weights_of_pixels_it_is_its_map_alone():
    mechanism = Mechanism("inline").set(said_proj_weight=0, taps_bias=0)
    o = merge(mechanism.mixed(PIXELS))
    assert_close(mechanism(PIXELS), mapped(mechanism, "o_proj", o))


def turned(x: Tensor) -> Tensor:
    """Turn pairs (c, c + 4) of eight features: two by the row of a pixel, two by its column."""
    rate = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    at = torch.arange(64)
    angle = torch.cat([(at // 8)[:, None] * rate, (at % 8)[:, None] * rate], -1)
    first, second = x[..., :4], x[..., 4:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )


def features(mechanism: Mechanism, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the halves of the features of queries and of keys."""
    q, k = (split(mapped(mechanism, f"{name}_proj", x)) for name in ("asked", "held"))
    n = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + n.tanh())
    return [(each.relu() / n) ** power for each in (q, -q)], [each.relu() ** 3 for each in (k, -k)]


def test_151_features_turn_in_the_numerator_alone():
    mechanism = Mechanism("norm_aware")
    layer = Part(mechanism)
    v = layer.map("values", PIXELS)
    q, k = features(mechanism, PIXELS)
    above = sum(turned(a) @ turned(b).mT for a, b in zip(q, k, strict=True))
    below = sum(a @ b.mT for a, b in zip(q, k, strict=True))
    o = (above @ split(v) / 64) / (below.mean(-1, keepdim=True) + 1e-6)
    o = merge(o) + around(v, layer["taps"], layer["taps_bias"])
    o = layer.norm("o", o) * silu(layer.map("g", PIXELS))
    assert_close(mechanism(PIXELS), layer.map("o", o))


def test_151_without_turns_rows_sum_to_one_and_know_the_length_of_the_query():
    still = (("where(h < 2, 10_000 ** -h, 0)", "0"), ("where(h < 2, 0, 10_000 ** (-h + 2))", "0"))
    mechanism = Mechanism("norm_aware", *still)
    v = torch.ones_like(mechanism.streams(PIXELS)["v"])
    assert_close(mechanism.mixed(PIXELS, v=v), v, 1e-3)
    q, k = features(mechanism, PIXELS)
    longer, _ = features(mechanism, 2 * PIXELS)
    p, other = (sum(a @ b.mT for a, b in zip(each, k, strict=True)) for each in (q, longer))
    p, other = (each / each.sum(-1, keepdim=True) for each in (p, other))
    assert (p >= 0).all()
    assert not torch.allclose(p, other)


def test_234_layers_of_windows_and_of_linear_attention():
    mechanism = Mechanism("l2vit")
    centre, spread = torch.linspace(-1, 1, 32).double(), torch.linspace(0.5, 2, 32).double()
    statistics = {"centre": centre, "spread": spread}
    mechanism.set(**{f"layers_1_c_batch_normed_{name}": x for name, x in statistics.items()})
    x = PIXELS
    one, two = Part(mechanism, "layers.0"), Part(mechanism, "layers.1")

    def near(part: str, x: Tensor) -> Tensor:
        conv = Part(mechanism, part)
        return around(x, conv["taps"], conv["taps_bias"])

    def network(layer: Part, x: Tensor) -> Tensor:
        hidden = gelu(layer.map("ffn.up", layer.norm("ffn", x)))
        return x + layer.map("ffn.down", hidden)

    x = x + near("layers.0.conv", x)
    attn, y = Part(mechanism, "layers.0.attn"), one.norm("attn", x)
    x = x + attn.map("o", attended(*attn.three("", y, y, y), attn_mask=windowed(0)))
    x = network(one, x + near("layers.0.beside", x))
    x = x + near("layers.1.conv", x)
    attn, y = Part(mechanism, "layers.1.attn"), two.norm("attn", x)
    q, k, v = (split(each) for each in attn.three("", y, y, y))
    a = q.relu() @ k.relu().mT
    o = attn["factor"][:, None, None] * (a @ v) / a.sum(-1, keepdim=True).clip(min=100)
    x = x + attn.map("o", merge(o))
    y = gelu(near("layers.1.wide", two.norm("wide", x)))
    y = (y - centre) / (spread + 1e-5).sqrt()
    y = two["c_batch_normed.gain"] * y + two["c_batch_normed.shift"]
    x = network(two, x + near("layers.1.wider", y))
    assert_close(mechanism(PIXELS), normed(mechanism, "norm", x))


def test_234_a_window_over_the_image_is_full_attention():
    wide = Mechanism("l2vit", ("near(size = 4)", "near(size = 8)"), part="near")
    full = Mechanism("block full { width = 32; heads = 4 }", like=wide)
    assert_close(wide(PIXELS), full(PIXELS))


def patches(x: Tensor, size: int, edge: int) -> Tensor:
    """[b, 64, c] → [b, 4 windows, size², c], a window every four pixels, and the edge beyond."""
    parts = unfold(plane(x), size, stride=4, padding=edge)
    return parts.unflatten(1, (x.shape[-1], size**2)).permute(0, 3, 2, 1)


def places(w: int, edge: int) -> tuple[Tensor, Tensor]:
    """Key minus query along both axes, [16, (w + 2 edge)²]."""
    query = torch.cartesian_prod(torch.arange(w), torch.arange(w))
    keys = torch.arange(w + 2 * edge) - edge
    off = torch.cartesian_prod(keys, keys) - query[:, None]
    return off[..., 0], off[..., 1]


def of_windows(part: Part, x: Tensor, edge: int) -> Tensor:
    """Attention of windows of 4 x 4, whose keys reach `edge` pixels beyond, as HAT computes it."""
    q, k, v = part.three("", x, x, x)
    q = patches(q, 4, 0)
    k, v = (patches(each, 4 + 2 * edge, edge) for each in (k, v))
    q, k, v = (each.unflatten(-1, (4, 8)).transpose(2, 3) for each in (q, k, v))
    down, across = places(4, edge)
    bias = part["table"][:, down + 3 + edge, across + 3 + edge]
    o = ((8**-0.5 * q @ k.mT + bias).softmax(-1) @ v).transpose(2, 3).flatten(3)
    return pixels(fold(o.permute(0, 3, 2, 1).flatten(1, 2), 8, 4, stride=4))


def unfolded(weight: Tensor) -> Tensor:
    """[out, 9 · in] → [out, in, 3, 3]: what a linear map of nine neighbours is as a convolution."""
    return weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)


def grid_conv(part: Part, name: str, x: Tensor) -> Tensor:
    weight, bias = part[f"{name}_proj.weight"], part[f"{name}_proj.bias"]
    return pixels(conv2d(plane(x), unfolded(weight), bias, padding=1))


def hybrid(part: Part, x: Tensor, shift: int, alpha: float = 0.01) -> Tensor:
    y = part.norm("normed", x)
    rolled = pixels(plane(y).roll((-shift, -shift), (2, 3)))
    if shift:  # windows that a shift cuts in two do not see their other half
        q, k, v = (split(each) for each in part.three("", y, y, y))
        at = torch.cartesian_prod(torch.arange(8), torch.arange(8))
        off = at - at[:, None] + 3
        bias = part["table"][:, off[..., 0].clip(0, 6), off[..., 1].clip(0, 6)]
        s = (8**-0.5 * q @ k.mT + bias).masked_fill(~windowed(shift), -torch.inf)
        o = merge(s.softmax(-1) @ v)
    else:
        o = of_windows(part, rolled, 0)
    found = grid_conv(part, "found", gelu(grid_conv(part, "inner", y)))
    few = part.map("few", found.mean(1, keepdim=True)).relu()
    found = found * part.map("open_", few).sigmoid()
    x = x + part.map("y", o) + alpha * found
    return x + part.map("o", gelu(part.map("wide", part.norm("wide", x))))


def overlapping(part: Part, x: Tensor) -> Tensor:
    y = part.norm("normed", x)
    x = x + part.map("y", of_windows(part, y, 1))
    return x + part.map("o", gelu(part.map("wide", part.norm("wide", x))))


def test_194_a_group_of_blocks_is_that_of_unfolded_windows():
    mechanism = Mechanism("hat")
    one, two, three, last = layers(mechanism, "part")
    x = overlapping(three, hybrid(two, hybrid(one, PIXELS, 0), 2))
    assert_close(mechanism(PIXELS), PIXELS + grid_conv(last, "o", x))


def test_194_without_overlap_it_is_attention_of_windows():
    """With keys of the window alone, and with one window over the image: full attention."""
    part = Mechanism("hat", ("4, 1)", "4, 0)"), part="overlapping")
    y = Part(part).norm("normed", PIXELS)
    o = of_windows(Bare(part), y, 0)
    x = PIXELS + Part(part).map("y", o)
    x = x + Part(part).map("o", gelu(Part(part).map("wide", Part(part).norm("wide", x))))
    assert_close(part(PIXELS), x)


class Bare(Part):
    """An overlapping block's weights, with the table that its windows alone read."""

    def __getitem__(self, name: str) -> Tensor:
        found = super().__getitem__(name)
        return found[:, 1:-1, 1:-1] if name == "table" else found

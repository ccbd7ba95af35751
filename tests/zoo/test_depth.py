"""Family `depth`: how the parts of layers are joined, and what goes along the depth."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import (
    gelu,
    layer_norm,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)

from ..oracles.others import Widened, file_of
from .layers import Joined, Place, X, given
from .mechanisms import assert_close, tokens

pytest.importorskip("x_transformers", reason="needs x-transformers")
pytest.importorskip("transformers", reason="needs Hugging Face Transformers")

from transformers.models.beam.modeling_beam import depth_scaled_residual_add
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)
from transformers.models.hy_v4.modeling_hy_v4 import HYV4HyperConnection, HYV4HyperHead
from transformers.models.inkling2.modeling_inkling2 import Inkling2BlockAttentionResidual
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkResidualGate
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextGatedResidual
from transformers.models.zaya.modeling_zaya import ZayaResidualScaling
from x_transformers import x_transformers as theirs

LANES = 3


def through(
    joined: Joined, join: Callable[[Place, Tensor], Tensor], count: int | None = None
) -> Callable[[Tensor], Tensor]:
    """Return the whole whose layers, or the first of them, are joined so."""

    def whole(x: Tensor) -> Tensor:
        for place in joined.places[:count]:
            x = join(place, x)
        return x

    return whole


# ── joins that are written in one line ───────────────────────────────────────────────────


def layered(place: Place, norm: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], place[f"{norm}.weight"], place[f"{norm}.bias"], 1e-5)


def sandwich(place: Place, x: Tensor, scale: Callable[[int], tuple[float, float]]) -> Tensor:
    for at, part in enumerate(("attn", "ffn")):
        kept, added = scale(at)
        x = kept * x + added * place.normed(f"{part}_post_norm", place.after(part, x))
    return x


def post_norm(p: Place, x: Tensor) -> Tensor:
    y = layered(p, "y_norm", x + p("attn", x))
    return layered(p, "o_norm", y + p("ffn", y))


def inner_norm(p: Place, x: Tensor) -> Tensor:
    y = x + p.normed("attn_post_norm", p("attn", x))
    return y + p.normed("ffn_post_norm", p("ffn", y))


def parallel(p: Place, x: Tensor) -> Tensor:
    y = layered(p, "y_norm", x)
    return x + p("attn", y) + p("ffn", y)


def parallel_normed(p: Place, x: Tensor) -> Tensor:
    return x + p("attn", layered(p, "attn_norm", x)) + p("ffn", layered(p, "ffn_norm", x))


def macaron(p: Place, x: Tensor) -> Tensor:
    y = x + p("ffn_0", p.normed("ffn_norm_0", x)) / 2
    z = y + p.after("attn", y)
    return z + p("ffn_1", p.normed("ffn_norm_1", z)) / 2


def layer_scale(p: Place, x: Tensor) -> Tensor:
    y = x + p["attn_scale"] * p.after("attn", x)
    return y + p["ffn_scale"] * p.after("ffn", y)


def constant(p: Place, x: Tensor) -> Tensor:
    y = x + 0.22 * p.after("attn", x)
    return y + 0.22 * p.after("ffn", y)


def plain_residual(p: Place, x: Tensor) -> Tensor:
    y = x + p.after("attn", x)
    return y + p.after("ffn", y)


JOINS: dict[str, Callable[[Place, Tensor], Tensor]] = {
    "post_norm": post_norm,
    "inner_norm": inner_norm,
    "sandwich_norm": lambda p, x: sandwich(p, x, lambda _: (1, 1)),
    "parallel_parts": parallel,
    "parallel_parts_normed": parallel_normed,
    "macaron_layers": macaron,
    "layer_scale": layer_scale,
    "rezero": lambda p, x: x + p["g"] * p.after("part", x),
    "constant_residual": constant,
}


@pytest.mark.parametrize("name", JOINS)
def test_D201_D202_joins_are_what_is_written(name):
    joined = Joined(name)
    joined.agrees(through(joined, JOINS[name]))


def shallow(p: Place, x: Tensor) -> Tensor:
    inner, scores = Place(p.layer.get_submodule("part")), linear(x, p["r_proj.weight"])
    rows = []
    for row, own in zip(x, scores, strict=True):
        order = sorted(range(len(row)), key=lambda t: (-float(own[t].detach()), t))
        at = torch.tensor(sorted(order[: max(1, len(row) // 4)]))
        some = row[None, at]
        attn = inner.layer.get_submodule("attn")
        y = attn(inner.normed("attn_norm", some), positions=at)
        made = y + inner.after("ffn", some + y)
        rows.append(row.index_add(0, at, own[at] * made[0]))
    return torch.stack(rows)


def test_the_best_tokens_go_through_and_the_others_pass_by():
    joined = Joined("mixture_of_depths")

    def whole(x: Tensor) -> Tensor:
        for at, place in enumerate(joined.places):
            x = shallow(place, x) if at % 2 else plain_residual(place, x)
        return x

    joined.agrees(whole)
    joined.agrees(whole, tokens(13))


def test_D202_layers_that_are_closed_pass_on_what_comes_in():
    closed = Joined("rezero")
    for place in closed.places:
        place["g"].data.zero_()
    assert_close(closed(X), X)
    closed = Joined("layer_scale")
    for place in closed.places:
        for part in ("attn_scale", "ffn_scale"):
            place[part].data.zero_()
    assert_close(closed(X), X)


def test_D202_scales_of_one_are_the_plain_residual():
    scaled = Joined("layer_scale")
    for place in scaled.places:
        for part in ("attn_scale", "ffn_scale"):
            place[part].data.fill_(1)
    assert_close(scaled(X), through(scaled, plain_residual)(X))


def test_D202_sums_weigh_by_their_number_as_in_beam():
    joined = Joined("depth_scaled_residual")

    def whole(x):
        for at, p in enumerate(joined.places):
            for part, i in (("attn", 2 * at + 2), ("ffn", 2 * at + 3)):
                made = p.normed(f"{part}_post_norm", p.after(part, x))
                x = depth_scaled_residual_add(made, x, i)
        return x

    joined.agrees(whole)


def test_D202_both_sides_are_scaled_as_in_zaya():
    joined = Joined("affine_residual")

    def join(p, x):
        own = given(ZayaResidualScaling(32), {
            "hidden_states_scale": p["part_scale"], "hidden_states_bias": p["part_bias"],
            "residual_scale": p["kept_scale"], "residual_bias": p["kept_bias"],
        })  # fmt: skip
        return own(p.after("part", x), x)

    joined.agrees(through(joined, join))


# ── gates in the place of the sum ────────────────────────────────────────────────────────


def test_D203_gru_is_that_of_x_transformers():
    joined = Joined("gru_residual")

    def join(p, x):
        rows = ("reset", "kept", "candidate")
        weights = {
            f"gru.{kind}_{side}": torch.cat([p[f"{row}_proj_{at}.{kind}"] for row in rows])
            for kind in ("weight", "bias")
            for at, side in enumerate(("ih", "hh"))
        }
        own = given(theirs.GRUGating(32), weights)
        return own(p.after("part", x), x)

    joined.agrees(through(joined, join))


def test_D203_a_gru_that_keeps_all_passes_on_what_comes_in():
    joined = Joined("gru_residual")
    for p in joined.places:
        p["kept_proj_0.bias"].data.fill_(1e4)
    assert_close(joined(X), X)


def test_D203_the_gate_of_two_sides_is_that_of_muse_spark():
    joined = Joined("residual_gate")

    def join(p, x):
        config = SimpleNamespace(hidden_size=32, residual_gate_temperature=2)
        own = given(MuseSparkResidualGate(config), {"gate": p["g"]})
        return own(x, rms_norm(p.after("part", x), (32,), eps=1e-6))

    joined.agrees(through(joined, join))


def test_D203_a_closed_gate_passes_on_what_comes_in():
    joined = Joined("residual_gate")
    for p in joined.places:
        p["g"].data.fill_(-200)
    assert_close(joined(X), X)


def test_D204_the_orthogonal_update_is_that_of_x_transformers():
    joined = Joined("orthogonal_update")
    own = theirs.OrthogonalResidualUpdate(32)  # of all tokens together

    def join(p, x):
        made = p.after("part", x)
        return own(made.reshape(-1, 32), x.reshape(-1, 32)).reshape(x.shape)

    joined.agrees(through(joined, join))


def test_D204_what_is_added_is_at_right_angles():
    joined = Joined(
        "orthogonal_update", ("[orthogonal(local), orthogonal(swiglu)] * 2", "[orthogonal(local)]")
    )
    assert_close(((joined(X) - X) * X).sum(-1), torch.zeros(X.shape[:2], dtype=X.dtype))


def test_D205_mean_and_rest_are_those_of_x_transformers():
    joined = Joined("mean_and_rest")

    def join(p, x):
        weights = {"alpha": p["mean_scale"], "beta": p["rest_scale"]}
        return given(theirs.MVSplitResidualUpdate(32), weights)(p.after("part", x), x)

    joined.agrees(through(joined, join))


def test_D205_the_causal_form_has_running_means():
    joined = Joined("running_mean_and_rest")
    counts = torch.arange(1, X.shape[1] + 1)[:, None]

    def join(p, x):
        f = p.after("part", x)
        mean_f, mean_x = (each.cumsum(1) / counts for each in (f, x))
        return x + p["rest_scale"] * (f - mean_f) + p["mean_scale"] * (mean_f - mean_x)

    joined.agrees(through(joined, join))


def test_D205_where_nothing_is_let_in_all_stays():
    joined = Joined("mean_and_rest")
    for p in joined.places:
        p["mean_scale"].data.zero_()
        p["rest_scale"].data.zero_()
    assert_close(joined(X), X)


# ── lanes ────────────────────────────────────────────────────────────────────────────────


def lanes(x: Tensor, count: int = LANES) -> Tensor:
    """Return copies of what comes in, [b, n, lanes, width]."""
    return x[:, :, None].expand(-1, -1, count, -1)


def test_D206_hyper_connections_are_the_papers():
    joined = Joined("hyper_connections", head=None)

    def join(p, x):  # algorithm 2 of the paper
        w = layer_norm(x, (32,), p["gain"], eps=1e-5)
        read, mix, write = (torch.tanh(w @ p[f"{name}_proj.weight"].T) for name in
                            ("read", "mix", "write"))  # fmt: skip
        alpha = torch.cat([
            p["read_weight"] + p["scale_"] * read,
            torch.eye(LANES) + p["mix_weight"] + p["scale_"] * mix,
        ], -1)  # fmt: skip
        mixed = alpha.mT @ x
        beta = p["write_weight"] + p["write_scale"] * write
        return mixed[:, :, 1:] + beta * p.after("part", mixed[:, :, 0])[:, :, None]

    joined.agrees(lambda x: through(joined, join)(lanes(x)).sum(2))


def test_D206_one_lane_at_first_is_the_plain_residual():
    joined = Joined("hyper_connections", ("lanes  = 3", "lanes  = 1"), head=None)
    for p in joined.places:
        for name, value in {"read_weight": 1, "mix_weight": 0, "write_weight": 1, "scale_": 0,
                            "write_scale": 0}.items():  # fmt: skip
            p[name].data.fill_(value)
    plain = through(joined, lambda p, x: x + p.after("part", x))
    assert_close(joined(X), plain(X))


def connection(kind: Any, p: Place, names: tuple[str, ...]) -> Any:
    """Return a hyper-connection of Transformers with the weights of a place."""
    config = SimpleNamespace(hc_mult=LANES, hidden_size=32, hc_sinkhorn_iters=20, hc_eps=1e-6,
                             rms_norm_eps=1e-6, hc_magnitude=2)  # fmt: skip
    bases = ["mix_base" if name == "logit" else f"{name}_base" for name in names]
    scales = [each.replace("base", "scale") for each in bases]
    return given(kind(config), {
        "fn": torch.cat([p[f"{name}_proj.weight"] for name in names]),
        "base": torch.cat([p[each].flatten() for each in bases]),
        "scale": torch.stack([p[each] for each in scales]),
    })  # fmt: skip


def closing(kind: Any, joined: Joined) -> Any:
    """Return what makes one of all lanes, with the weights of the last layer."""
    p = joined.places[-1]
    config = SimpleNamespace(hc_mult=LANES, hidden_size=32, hc_eps=1e-6, rms_norm_eps=1e-6)
    return given(kind(config), {
        "hc_fn": p["read_proj.weight"], "hc_base": p["base"], "hc_scale": p["scale_"][None]
    })  # fmt: skip


def last_norm(joined: Joined, x: Tensor) -> Tensor:
    return rms_norm(x, (32,), dict(joined.meaning.named_parameters())["norm.weight"], 1e-6)


def test_D207_constrained_lanes_are_those_of_deepseek_v4():
    joined = Joined("manifold_hyper_connections", head=None)

    def join(p, x):
        own = connection(DeepseekV4HyperConnection, p, ("read", "write", "logit"))
        post, comb, read = own(x.contiguous())
        return post[..., None] * p.after("part", read)[:, :, None] + comb.mT @ x

    def whole(x):
        with Widened():
            x = closing(DeepseekV4HyperHead, joined)(through(joined, join, -1)(lanes(x)))
        return last_norm(joined, x)

    joined.agrees(whole)


def test_D207_independent_lanes_are_those_of_hy_v4():
    joined = Joined("independent_hyper_connections", head=None)

    def join(p, x):
        post, read = connection(HYV4HyperConnection, p, ("read", "write"))(x)
        return x + post[..., None] * p.after("part", read)[:, :, None]

    def whole(x):
        with Widened():
            x = closing(HYV4HyperHead, joined)(through(joined, join, -1)(lanes(x)))
        return last_norm(joined, x)

    joined.agrees(whole)


def test_D208_gated_lanes_are_those_of_qwen4():
    joined = Joined("gated_multi_residual", head=None)

    def join(p, x):
        config = SimpleNamespace(hc_count=LANES, hidden_size=32, rms_norm_eps=1e-6, hc_lowrank=8)
        own = given(Qwen4ExpTextGatedResidual(config), {
            "hc_norm.weight": p["gain"].flatten(),
            "input_mix_weight_down.weight": p["read_proj_0.weight"],
            "input_mix_weight_up.weight": p["read_proj_1.weight"],
            "block_inject_weight.weight": p["write_proj.weight"],
        })  # fmt: skip
        read, rest, write = own(x)
        return rest + (p("part", read)[:, :, None] * write[..., None]).flatten(2)

    def whole(x):
        with Widened():
            x = through(joined, join)(lanes(x).flatten(2))
        return last_norm(joined, x.unflatten(-1, (LANES, 32)).mean(2))

    joined.agrees(whole)


# ── along the depth ──────────────────────────────────────────────────────────────────────


def test_D209_attention_over_depth_is_that_of_fla():
    naive = file_of("fla-core", "fla/ops/attnres/naive.py").naive_attnres
    joined = Joined("attention_over_depth")

    def whole(x):
        outs = [x]
        for p in joined.places:
            with Widened():
                read = naive(p["score_proj.weight"], outs, p["score_norm.weight"])
            outs.append(p.after("part", read) if "part_norm.weight" in p.tensors else read)
        return outs[-1]

    joined.agrees(whole)


def test_D209_parts_read_the_blocks_below_as_in_inkling_2():
    joined = Joined("blocks_over_depth")

    def whole(x):
        outs = [x]
        for p in joined.places:
            made: list[Tensor] = []
            for name, part in (("first", "one"), ("second", "two"), ("third", "three")):
                config = SimpleNamespace(hidden_size=32)
                query = {"query": p[f"{name}_proj.weight"][0]}
                own = given(Inkling2BlockAttentionResidual(config), query)
                *blocks, newest = [*outs, sum(made)] if made else outs
                below = torch.stack(blocks, -2) if blocks else newest[..., None, :][..., :0, :]
                with Widened():
                    (read,) = own(below, newest)
                made.append(p.after(part, read))
            outs.append(sum(made))
        return outs[-1]

    joined.agrees(whole)


def test_D209_the_newest_asks_as_in_x_transformers():
    joined = Joined("newest_over_depth")

    def whole(x):
        outs = [x]
        for p in joined.places:
            own = given(theirs.AttentionResidual(32, lora_rank=8), {
                "to_keys.weight": p["score_norm.weight"],
                "to_query.0.weight": p["change_norm.weight"],
                "to_query.1.down.weight": p["change_proj_0.weight"],
                "to_query.1.up.weight": p["change_proj_1.weight"],
                "norm.weight": p["query_norm.weight"],
            })  # fmt: skip
            for norm in (own.to_keys, own.to_query[0], own.norm):
                norm.eps = 1e-7
            outs.append(outs[-1] + p.after("part", own(outs)))
        return outs[-1]

    joined.agrees(whole)


def test_D210_dense_former_sums_what_came_before():
    joined = Joined("dense_former")

    def whole(x):
        outs = [x]
        for p in joined.places:
            y = sum(w * out for w, out in zip(p["weight"], outs, strict=True))
            outs.append(plain_residual(p, y) if "attn_norm.weight" in p.tensors else y)
        return outs[-1]

    joined.agrees(whole)


def test_D210_weights_of_one_on_the_newest_are_no_change():
    joined = Joined("dense_former")
    for p in joined.places:
        p["weight"].data.zero_()
        p["weight"].data[-1] = 1
    assert_close(joined(X), through(joined, plain_but_last)(X))


def plain_but_last(p: Place, x: Tensor) -> Tensor:
    return plain_residual(p, x) if "attn_norm.weight" in p.tensors else x


def lime(p: Place, outs: list[Tensor], name: str) -> Tensor:
    """Return what x-transformers integrates of all layers."""
    own = given(theirs.DynamicLIMe(32, len(outs)), {
        "to_weights.0.g": p[f"{name}_norm.weight"],
        "to_weights.1.weight": p[f"{name}_proj.weight"],
        "to_weights.1.bias": p[f"{name}_proj.bias"],
    })  # fmt: skip
    y: Tensor = own(outs[-1], outs)
    return y


def test_D210_lime_is_that_of_x_transformers():
    joined = Joined("lime")

    def whole(x):
        outs = [x]
        for p in joined.places:
            outs.append(outs[-1] + p.after("part", lime(p, outs, "weights")))
        return outs[-1]

    joined.agrees(whole)


def test_D210_views_of_one_layer_are_that_layer():
    """The first layer has the embedding alone: its views are the norms of plain attention."""
    joined = Joined("lime_views", ("[viewing] * 2", "[viewing]"))
    plain = Joined(
        "lime_views",
        *((f"earlier * of_{name} | sum_heads", "x") for name in "qkv"),
        ("[viewing] * 2", "[viewing]"),
    )
    state = joined.meaning.state_dict()
    plain.meaning.load_state_dict({k: state[k] for k in plain.meaning.state_dict()})
    assert_close(joined(X), plain(X))


def test_D210_views_are_those_of_x_transformers():
    joined = Joined("lime_views")

    def whole(x):
        outs = [x]
        for p in joined.places:
            inner = Place(p.layer.get_submodule("attn"))
            read = {name: lime(inner, outs, f"of_{name}") for name in "qkv"}
            y = outs[-1] + attended(inner, **read)
            outs.append(y + p.after("ffn", y))
        return outs[-1]

    joined.agrees(whole)


def attended(p: Place, **streams: Tensor) -> Tensor:
    """Return causal attention with rotary positions, of streams q, k and v that are normed."""
    return mixed(p, *(
        heads(linear(p.normed(f"{name}_norm", x), p[f"{name}_proj.weight"]))
        for name, x in streams.items()
    ))  # fmt: skip


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).transpose(1, 2)


def mixed(p: Place, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what causal attention with rotary positions makes of heads."""
    o = scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
    return linear(o.transpose(1, 2).flatten(2), p["o_proj.weight"])


def turned(x: Tensor) -> Tensor:
    n, d = x.shape[-2:]
    rates = 10_000 ** -(torch.arange(0, d, 2, dtype=x.dtype) / d)
    angles = torch.arange(n, dtype=x.dtype)[:, None] * rates
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def test_D211_skips_are_joined_as_in_x_transformers():
    joined = Joined("unet_skips")

    def whole(x):
        inputs: list[Tensor] = []
        for at, p in enumerate(joined.places):
            inputs.append(x)
            if at >= 2:
                own = theirs.ConcatCombine(32, len(joined.places) - 1 - at)
                x = given(own, {"combine.weight": p["y_proj.weight"]})(x, inputs)
            x = plain_residual(p, x)
        return x

    joined.agrees(whole)


def test_D211_a_map_that_reads_what_comes_in_alone_is_no_skip():
    joined = Joined("unet_skips")
    for p in joined.places[2:]:
        p["y_proj.weight"].data.copy_(torch.cat([torch.zeros(32, 32), torch.eye(32)], 1))
    assert_close(joined(X), through(joined, plain_residual)(X))


def test_D212_values_are_a_mean_of_each_token_and_head():
    joined = Joined("value_residual")

    def whole(x):
        first = None
        for place in joined.places:
            p = Place(place.layer.get_submodule("attn"))
            y = place.normed("attn_norm", x)
            if first is None:
                first = v = heads(linear(y, p["own_proj.weight"]))
            else:
                share = linear(y, p["share_proj.weight"], p["share_proj.bias"]).sigmoid()
                share = share.mT[..., None]
                v = share * heads(linear(y, p["v_proj.weight"])) + (1 - share) * first
            q, k = (heads(linear(y, p[f"{name}_proj.weight"])) for name in "qk")
            x = x + mixed(p, q, k, v)
            x = x + place.after("ffn", x)
        return x

    joined.agrees(whole)


@pytest.mark.parametrize("share", [0, 1])
def test_D212_values_are_the_first_layers_or_its_own(share):
    joined = Joined("value_residual")
    one = ("share * (x | linear | split) + (1 - share) * own", ("own", "x | linear | split")[share])
    other = Joined("value_residual", one)
    for p in joined.places[1:]:
        p["attn.share_proj.bias"].data.fill_(2e3 * share - 1e3)
        p["attn.share_proj.weight"].data.zero_()
    state = joined.meaning.state_dict()
    other.meaning.load_state_dict({k: state[k] for k in other.meaning.state_dict()})
    assert_close(joined(X), other(X))


def test_D213_the_input_is_added_to_what_parts_read():
    joined = Joined("input_again")

    def whole(first):
        x = first
        for p in joined.places:
            gate = linear(first, p["added_proj_1.weight"], p["added_proj_1.bias"]).sigmoid()
            x = x + p.after("part", x + linear(first, p["added_proj_0.weight"]) * gate)
        return x

    joined.agrees(whole)


def test_D213_the_shared_block_reads_stream_and_embedding():
    joined = Joined("joined_input", head=None)
    alone, shared, other = joined.places

    def join(first, x):
        y = shared.normed("y_norm", torch.cat([x, first], -1))
        z = shared("attn", linear(y, shared["y_proj.weight"]))
        return x + linear(shared.after("ffn", z), shared["z_proj.weight"])

    def whole(first):
        x = join(first, first + alone.after("part", first))
        return last_norm(joined, join(first, x + other.after("part", x)))

    joined.agrees(whole)


def test_D214_shared_layers_are_one_layer_again_and_again():
    joined = Joined("shared_layers")
    (place,) = joined.places

    def whole(x):
        for _ in range(4):
            x = post_norm(place, x)
        return x

    joined.agrees(whole)


def test_D214_the_shared_block_comes_again():
    joined = Joined("shared_block")
    first, core, second = joined.places

    def whole(x):
        for place in (first, core, second, core):
            x = plain_residual(place, x)
        return x

    joined.agrees(whole)


def test_D215_a_loop_is_the_same_layers_again():
    joined = Joined("looped_layers")
    first, one, two, last = joined.places

    def whole(x):
        x = plain_residual(first, x)
        for _ in range(3):
            x = plain_residual(one, x)
            x = x + two.after("ffn", x)
        return plain_residual(last, x)

    joined.agrees(whole)


def test_D215_a_loop_of_one_is_the_layer():
    once = Joined("looped_layers", ("loop(3, ", "loop(1, "))
    plain = Joined("looped_layers", ("loop(3, [local, swiglu])", "[local, swiglu]"))
    plain.meaning.load_state_dict(once.meaning.state_dict())
    assert_close(once(X), plain(X))


def test_D215_a_gate_stands_between_turns():
    joined = Joined("loop_gate")
    (place,) = joined.places
    inner = Place(place.layer.get_submodule("pre"))

    def whole(x):
        for _ in range(3):
            y = plain_residual(inner, x)
            forget, take = (
                linear(y, place[f"{name}_proj.weight"], place[f"{name}_proj.bias"]).sigmoid()
                for name in ("forget", "take")
            )
            x = (1 - forget) * x + take * y
        return x

    joined.agrees(whole)


def test_D215_two_paces_are_two_stacks_and_early_turns_have_no_gradient():
    joined = Joined("two_paces", head=None)
    fast, slow = joined.places[1], joined.places[3]

    def stack(p, x):
        for at in range(2):
            x = x + p(f"attn_{at}", rms_norm(x, (32,), eps=1e-6))
            x = x + p(f"ffn_{at}", rms_norm(x, (32,), eps=1e-6))
        return rms_norm(x, (32,), eps=1e-6)

    def whole(x):
        high, low = x, torch.zeros_like(x)
        for _ in range(2):
            with torch.no_grad():
                low = stack(fast, low + high)
            low = stack(fast, low + high)
            high = stack(slow, high + low)
        return high

    joined.agrees(whole)


# ── further inputs ───────────────────────────────────────────────────────────────────────


def test_D216_a_small_embedding_of_the_token_gates_every_layer():
    joined = Joined("layer_embeddings", head=None)
    weights = dict(joined.meaning.named_parameters())
    ids = torch.tensor([[1, 15, 3, 3], [0, 2, 7, 1]])

    def whole(ids):
        x = first = weights["embed_tokens.weight"][ids]
        for p in joined.places:
            x = sandwich(p, x, lambda _: (1, 1))
            shared = p.normed("first_norm", linear(first, p["first_proj.weight"]) * 32**-0.5)
            e = (shared + p["e_embed.weight"][ids] * 8**0.5) * 2**-0.5
            made = linear(gelu(linear(x, p["o_proj_0.weight"])) * e, p["o_proj_1.weight"])
            x = x + p.normed("o_norm", made)
        return linear(last_norm(joined, x), weights["lm_head.weight"])

    joined.agrees(whole, ids)


def test_D217_a_condition_scales_shifts_and_opens():
    joined = Joined("adaptive_norm")
    condition = tokens(1, 8, seed=3)[:, 0]

    def whole(x, condition):
        for p in joined.places:
            shift, scale, open_ = (
                linear(silu(condition), p[f"{name}_proj.weight"], p[f"{name}_proj.bias"])[:, None]
                for name in ("shift", "scale", "open")
            )
            x = x + open_ * p("part", layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift)
        return x

    joined.agrees(whole, condition=condition)


def test_D217_a_condition_that_opens_nothing_passes_on_what_comes_in():
    joined = Joined("adaptive_norm")
    for p in joined.places:
        for kind in ("weight", "bias"):
            p[f"open_proj.{kind}"].data.zero_()
    assert_close(joined(X, condition=tokens(1, 8)[:, 0]), X)


def test_D217_adaptive_norms_and_scales_are_those_of_x_transformers():
    joined = Joined("adaptive_scale")
    condition = tokens(1, 8, seed=3)[:, 0]

    def whole(x, condition):
        for p in joined.places:
            norm = given(
                theirs.AdaptiveLayerNorm(32, 8), {"to_gamma.weight": p["scale_proj.weight"]}
            )
            own = theirs.AdaptiveLayerScale(torch.nn.Identity(), 32, 8)
            scale = given(own, {f"to_gamma.{k}": p[f"open_proj.{k}"] for k in ("weight", "bias")})
            x = x + scale(p("part", norm(x, condition=condition)), condition=condition)
        return x

    joined.agrees(whole, condition=condition)


@pytest.mark.parametrize("training", [False, True])
def test_D218_in_training_a_part_is_there_or_not(training):
    joined = Joined("layer_drop", ("rate = 0.2", "rate = 0.5"),
                    ("[dropped(local), dropped(swiglu)] * 2", "[dropped(local)]"))  # fmt: skip
    (place,) = joined.places
    whole = X + place.after("part", X).detach()
    joined.module.train(training)
    torch.manual_seed(0)
    found = [joined(X) for _ in range(12)]
    joined.module.eval()
    there = [bool(torch.allclose(each, whole)) for each in found]
    gone = [bool(torch.allclose(each, X)) for each in found]
    assert all(a != b for a, b in zip(there, gone, strict=True))
    assert any(gone) == training
    assert any(there)

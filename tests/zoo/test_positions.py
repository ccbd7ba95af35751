"""Families `positions` and `scores`: what is done to logits, by place and otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import relu, scaled_dot_product_attention

from headloom.grammar.derive import derivative
from headloom.grammar.expr import evaluate
from headloom.grammar.parse import parse_expression
from headloom.grammar.syntax import Name

from .mechanisms import MHA, Mechanism, N, assert_close, causal, softmax, tokens

X = tokens()
PLACES = torch.arange(N, dtype=torch.float64)
GAP = (PLACES[:, None] - PLACES).abs()
ALIBI = 2.0 ** -torch.arange(2, 10, 2, dtype=torch.float64)[:, None, None]  # for four heads
UNIFORM = causal() / torch.arange(1, N + 1)[:, None].double()


def bias(mechanism: Mechanism) -> torch.Tensor:
    """What is added to the logits, up to a constant a row: log p - s, zero at the query."""
    found = (mechanism.weights(X) / softmax(mechanism.logits(X))).log()
    return (found - found.diagonal(dim1=-2, dim2=-1)[..., None])[0].nan_to_num(0)


@pytest.mark.parametrize(
    "name",
    ["rope", "partial_rope", "position_interpolation", "alibi", "t5_bias", "clipped_bias", "kerple",
     "kerple_power", "bam", "bam_ssmax", "sandwich", "cosformer"],
)  # fmt: skip
def test_only_distances_count(name):
    mechanism = Mechanism(name)
    x = tokens(width=mechanism.block.width)
    assert_close(mechanism(x, positions=torch.arange(7, 7 + N)), mechanism(x), 1e-8)


def turned(x: torch.Tensor, places: torch.Tensor, theta: float = 1e4) -> torch.Tensor:
    """Rotate pairs (c, c + d / 2) as complex numbers."""
    pairs = torch.complex(*x.chunk(2, -1))
    angle = places[:, None] * theta ** -(torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)


def test_rope_turns_complex_numbers():
    mechanism = Mechanism("rope")
    plain = Mechanism(MHA, like=mechanism).streams(X)
    for name in "qk":
        assert_close(mechanism.streams(X)[name], turned(plain[name], PLACES))


def test_rope_in_one_place_is_none():
    mechanism = Mechanism("rope")
    q, k = (mechanism.streams(X, positions=torch.zeros(N))[name] for name in "qk")
    plain = Mechanism(MHA, like=mechanism).streams(X)
    assert_close(q, plain["q"])
    assert_close(k, plain["k"])


def test_partial_rope_leaves_the_rest_alone():
    mechanism = Mechanism("partial_rope")
    x = tokens(width=64)
    plain = Mechanism(MHA.replace("32", "64"), like=mechanism).streams(x)
    q = mechanism.streams(x)["q"]
    assert_close(q[..., 4:], plain["q"][..., 4:])
    assert_close(q[..., :4], turned(plain["q"][..., :4], PLACES))


def test_partial_rope_of_all_features_is_rope():
    partial = Mechanism("partial_rope", ("dims = 4", "dims = 16"))
    rope = Mechanism("partial_rope", ("rope(dims = 4)", "rope"), like=partial)
    assert_close(partial(tokens(width=64)), rope(tokens(width=64)))


def test_interpolated_places_four_times_as_far_are_the_usual_ones():
    interpolated = Mechanism("position_interpolation", ("causal", "all"))
    rope = Mechanism("rope", ("causal", "all"), like=interpolated)
    assert_close(interpolated(X, positions=4 * torch.arange(N)), rope(X))


def test_interpolation_by_one_is_rope():
    once = Mechanism("position_interpolation", ("scaling = 4", "scaling = 1"))
    assert_close(once(X), Mechanism("rope", like=once)(X))


def test_158_coca_is_a_product_of_three():
    mechanism = Mechanism("coca")
    streams = mechanism.streams(X)
    q, half = streams["plain"], streams["half"]
    t = turned(torch.cat([half, half], -1), PLACES)
    s = torch.einsum("bhid,bhjd,bhid->bhij", q, t, turned(q, PLACES)) / 8**0.5
    assert_close(mechanism.weights(X), softmax(s))


def test_158_coca_in_one_place_has_no_negative_logits():
    mechanism = Mechanism("coca")
    streams = mechanism.streams(X, positions=torch.zeros(N))
    s = streams["q"] @ streams["k"].mT
    assert (s >= 0).all()
    t = streams["half"]
    assert_close(s, streams["plain"] ** 2 @ torch.cat([t, t], -1).mT)


def test_alibi_without_slopes_is_mha():
    flat = Mechanism("alibi", ("position = alibi", "score = s + 0 * abs(i - j)"))
    assert_close(flat(X), Mechanism(MHA, like=flat)(X))


def test_alibi_is_torchs_attention_with_a_bias():
    mechanism = Mechanism("alibi")
    added = (-ALIBI * GAP).masked_fill(~causal(), -torch.inf)
    q, k, v = (mechanism.streams(X)[name] for name in "qkv")
    assert_close(mechanism.mixed(X), scaled_dot_product_attention(q, k, v, attn_mask=added))


def t5_bucket(gap: int) -> int:
    """The one-sided buckets of T5, as its paper's code counts them."""
    if gap < 16:
        return gap
    return min(16 + int(math.log(gap / 16) / math.log(128 / 16) * 16), 31)


def test_t5_buckets():
    mechanism = Mechanism("t5_bias").set(q_proj_weight=0)
    table = torch.linspace(-2, 2, 128, dtype=torch.float64).reshape(4, 32)
    mechanism.set(table=table)
    n = 150
    buckets = torch.tensor([[t5_bucket(max(i - j, 0)) for j in range(n)] for i in range(n)])
    p = mechanism.weights(tokens(n, batch=1))
    assert_close(p[0], softmax(table[:, buckets], causal(n)))


def test_t5_with_an_empty_table_is_unscaled_attention():
    mechanism = Mechanism("t5_bias").set(table=0)
    assert_close(mechanism(X), Mechanism(MHA.replace(";", "; scale = 1;", 1), like=mechanism)(X))


def test_173_an_empty_table_of_offsets_is_mha():
    mechanism = Mechanism("clipped_bias").set(table=0)
    assert_close(mechanism(X), Mechanism(MHA.replace("; mask = causal", ""), like=mechanism)(X))


def test_173_a_table_can_point_at_the_next_token():
    table = torch.zeros(4, 33)
    table[:, 16 + 1] = 900
    p = Mechanism("clipped_bias").set(table=table).weights(X)
    assert_close(p[:, :, :-1], torch.eye(N, dtype=torch.float64)[1:].expand(2, 4, -1, -1))


def test_kerple_is_a_logarithm_of_the_distance():
    mechanism = Mechanism("kerple").set(height=1.5, rate=0.7)
    assert_close(bias(mechanism), (-1.5 * (1 + 0.7 * GAP).log() * causal()).expand(4, -1, -1))


def test_kerple_of_no_height_is_mha():
    mechanism = Mechanism("kerple", ("max(height[h], 0.01)", "0")).set(rate=1)
    assert_close(mechanism(X), Mechanism(MHA, like=mechanism)(X))


def test_kerple_power_one_is_alibi():
    mechanism = Mechanism("kerple_power").set(slope=ALIBI[:, 0, 0], exponent=1)
    slopes = ALIBI.clip(min=0.01)
    assert_close(bias(mechanism), -slopes * GAP * causal())


def test_a_power_of_zero_does_not_change_with_its_exponent():
    slope = derivative(parse_expression("abs(s) ** t"), Name("t"))
    assert evaluate(slope, {"s": 0.0, "t": 1.5}) == 0
    assert math.isclose(evaluate(slope, {"s": -2.0, "t": 1.5}), 2**1.5 * math.log(2))


def test_kerple_power_two_is_a_gaussian():
    mechanism = Mechanism("kerple_power").set(slope=0.2, exponent=2)
    assert_close(bias(mechanism), (-0.2 * GAP**2 * causal()).expand(4, -1, -1))


def test_125_bam_begins_as_alibi():
    bam = Mechanism("bam").set(shape=1, level=ALIBI[:, 0, 0].log())
    assert_close(bam(X), Mechanism("alibi", like=bam)(X), 1e-9)


def test_125_bam_of_no_level_has_no_positions():
    bam = Mechanism("bam").set(level=-80)
    assert_close(bam(X), Mechanism(MHA, like=bam)(X))


def test_125_bam_of_shape_two_is_a_gaussian():
    bam = Mechanism("bam").set(shape=2, level=math.log(0.3))
    assert_close(bias(bam), (-0.3 * GAP**2 * causal()).expand(4, -1, -1), 1e-3)


def test_125_ssmax_scales_content_and_prior():
    mechanism = Mechanism("bam_ssmax").set(shape=1, level=0, sharp=0.6)
    s = mechanism.logits(X) - (GAP + 1e-5)
    assert_close(mechanism.weights(X), softmax(0.6 * torch.log(PLACES + 1)[:, None] * s))


def test_125_ssmax_without_sharpness_is_uniform():
    p = Mechanism("bam_ssmax").set(sharp=0).weights(X)
    assert_close(p, UNIFORM.expand_as(p))


def test_sandwich_is_a_product_of_sinusoids():
    rates = 10.0 ** -torch.arange(4, dtype=torch.float64)
    code = torch.cat([(PLACES[:, None] * rates).sin(), (PLACES[:, None] * rates).cos()], -1)
    ratio = torch.tensor([2.0, 4.0, 6.0, 8.0])[:, None, None]
    assert_close(bias(Mechanism("sandwich")), ratio * (code @ code.mT - 4) * causal())


def test_sandwich_of_no_ratio_is_mha():
    mechanism = Mechanism("sandwich", ("8 * (h + 1) / heads", "0"))
    assert_close(mechanism(X), Mechanism(MHA, like=mechanism)(X))


def test_cosformer_is_two_linear_attentions():
    """cos(a - b) = cos a cos b + sin a sin b, so that the map has a linear form."""
    mechanism = Mechanism("cosformer")
    q, k = (mechanism.streams(X)[name] for name in "qk")
    angle = (math.pi / 2 * PLACES / 64)[:, None]
    features = [torch.cat([each * angle.cos(), each * angle.sin()], -1) for each in (q, k)]
    a = (features[0] @ features[1].mT) * causal() * 8**-0.5
    assert_close(mechanism.weights(X), a / (a.sum(-1, keepdim=True) + 1e-6))


def test_cosformer_weights_are_not_negative():
    mechanism = Mechanism("cosformer")
    assert (mechanism.weights(X) >= 0).all()
    assert_close(mechanism.streams(X)["q"], relu(mechanism.streams(X)["q"]))


def test_a_high_cap_is_no_cap():
    capped = Mechanism("softcap", ("softcap(50)", "softcap(1e6)"))
    assert_close(capped(X), Mechanism(MHA, like=capped)(X))


def test_a_cap_bounds_the_ratio_of_weights():
    p = (
        Mechanism("softcap", ("softcap(50)", "softcap(0.5)"))
        .weights(100 * X)[:, :, -1]
        .sort(-1)
        .values
    )
    assert (p[..., -1] / p[..., 0]).max() <= math.exp(1) + 1e-9


def test_130_a_factor_of_one_is_mha_and_none_is_uniform():
    mechanism = Mechanism("head_temperature")
    assert_close(mechanism.set(sharp=1)(X), Mechanism(MHA, like=mechanism)(X))
    p = mechanism.set(sharp=0).weights(X)
    assert_close(p, UNIFORM.expand_as(p))


def test_130_the_factor_folds_into_the_queries():
    mechanism = Mechanism("head_temperature")
    factor = mechanism.parameter("sharp").repeat_interleave(8)[:, None]
    folded = Mechanism(MHA, like=mechanism)
    folded.set(q_proj_weight=factor * mechanism.parameter("q_proj.weight"))
    assert_close(mechanism(X), folded(X))


def test_130_no_positions_means_no_order():
    mechanism = Mechanism("head_temperature", ("causal", "all"))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert_close(mechanism(X[:, order]), mechanism(X)[:, order])


def test_scalable_softmax_grows_with_the_row():
    mechanism = Mechanism("scalable_softmax").set(sharp=0.4)
    s = 0.4 * torch.log(PLACES + 1)[:, None] * mechanism.logits(X)
    assert_close(mechanism.weights(X), softmax(s))


def test_scalable_softmax_does_not_fade():
    """A key that stands out by one keeps its weight as n copies of another key are added."""
    for n in (10, 1000):
        s = math.log(n) * 2 * torch.eye(1, n, dtype=torch.float64)[0]
        assert s.softmax(-1)[0] > 0.9
    mechanism = Mechanism("scalable_softmax").set(sharp=0)
    assert_close(mechanism.weights(X), UNIFORM.expand(2, 4, -1, -1))


def test_77_a_rate_of_zero_is_mha():
    mechanism = Mechanism("ssa_position").set(beta=7)
    assert_close(mechanism(X), Mechanism(MHA, like=mechanism)(X))


def test_77_the_temperature_folds_into_the_queries():
    mechanism = Mechanism("ssa_position").set(beta=-1)
    kappa = math.exp(-math.exp(-1))
    s = mechanism.logits(X) * (1 + kappa * torch.log(PLACES + 1))[:, None]
    assert_close(mechanism.weights(X), softmax(s))


def test_77_the_first_row_has_temperature_one():
    slow, fast = (Mechanism("ssa_position").set(beta=beta) for beta in (3, -3))
    assert_close(slow(X)[:, :1], fast(X)[:, :1])

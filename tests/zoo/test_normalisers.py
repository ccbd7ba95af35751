"""Family `normalisers`: what becomes of logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import elu, relu, scaled_dot_product_attention

from .mechanisms import MHA, Mechanism, assert_close, causal, softmax, tokens

X = tokens()
SEEN = torch.arange(1, 12)[:, None]
UNIFORM = causal() / SEEN.double()


def silent(name: str, *changes: tuple[str, str]) -> Mechanism:
    """A mechanism whose logits are all zero."""
    return Mechanism(name, *changes).set(q_proj_weight=0)


def rotated(mechanism: Mechanism) -> torch.Tensor:
    return mechanism.logits(X)


@pytest.mark.parametrize(
    "name", ["sparsemax", "entmax", "sigmoid_normalized", "elu_normalized", "taylor", "fastmax"]
)
def test_rows_sum_to_one(name):
    p = Mechanism(name).weights(X)
    assert_close(p.sum(-1), torch.ones(2, 4, 11, dtype=torch.float64), 1e-4)


@pytest.mark.parametrize(
    "name", ["sparsemax", "entmax", "sigmoid_normalized", "elu_normalized", "taylor"]
)
def test_equal_logits_are_uniform(name):
    p = silent(name).weights(X)
    assert_close(p, UNIFORM.expand_as(p), 1e-7)


@pytest.mark.parametrize(("name", "function"), [("sparsemax", "sparsemax"), ("entmax", "entmax15")])
def test_160_what_the_entmax_package_says(name, function):
    entmax = pytest.importorskip("entmax")
    mechanism = Mechanism(name)
    s = mechanism.logits(3 * X).masked_fill(~causal(), -1e9)
    assert_close(mechanism.weights(3 * X), getattr(entmax, function)(s, dim=-1), 1e-8)


def test_160_sparsemax_of_two_keys_is_a_hard_sigmoid():
    mechanism = Mechanism("sparsemax")
    x = tokens(2)
    s = mechanism.logits(x)[:, :, 1]
    assert_close(mechanism.weights(x)[:, :, 1, 0], ((s[..., 0] - s[..., 1] + 1) / 2).clip(0, 1))


def test_160_sparsemax_of_large_logits_takes_the_best_key():
    p = Mechanism("sparsemax").weights(1e3 * X)
    s = Mechanism("sparsemax").logits(1e3 * X).masked_fill(~causal(), -torch.inf)
    assert_close(p, torch.nn.functional.one_hot(s.argmax(-1), 11).double(), 1e-7)


def test_160_sparsemax_is_entmax_of_two():
    sparse = Mechanism("sparsemax")
    assert_close(sparse(X), Mechanism("entmax", ("entmax(1.5)", "entmax(2)"), like=sparse)(X), 1e-8)


def test_entmax_just_above_one_is_softmax():
    mechanism = Mechanism("entmax", ("entmax(1.5)", "entmax(1.001)"))
    assert_close(mechanism.weights(X), softmax(mechanism.logits(X)), 1e-3)


def test_200_zero_logits_have_the_bias_alone():
    p = silent("sigmoid_attention").set(q_norm_bias=0).weights(X)
    assert_close(p, (causal() / 65).expand_as(p).double())


def test_200_is_the_sigmoid_of_shifted_logits():
    mechanism = Mechanism("sigmoid_attention")
    s = rotated(mechanism) - torch.tensor(64.0, dtype=torch.float64).log()
    assert_close(mechanism.weights(X), torch.sigmoid(s) * causal())
    assert_close(torch.sigmoid(s), (1 + torch.tanh(s / 2)) / 2)


def test_200_a_bias_far_below_gives_nothing():
    assert Mechanism("sigmoid_attention", ("-log(64)", "-200"))(X).abs().max() < 1e-60


def test_226_sigmoids_shared_out():
    mechanism = Mechanism("sigmoid_normalized")
    a = torch.sigmoid(rotated(mechanism)) * causal()
    assert_close(mechanism.weights(X), a / (a.sum(-1, keepdim=True) + 1e-8))


def test_226_plain_sigmoids():
    mechanism = Mechanism("sigmoid_unnormalized")
    assert_close(mechanism.weights(X), torch.sigmoid(rotated(mechanism)) * causal())


def test_226_a_sigmoid_is_a_softmax_against_nothing():
    mechanism = Mechanism("sigmoid_unnormalized")
    s = rotated(mechanism)
    pair = torch.stack([s, torch.zeros_like(s)]).softmax(0)[0]
    assert_close(mechanism.weights(X), pair * causal())


def test_226_elu_shared_out():
    mechanism = Mechanism("elu_normalized")
    a = (elu(rotated(mechanism)) + 1) * causal()
    assert_close(mechanism.weights(X), a / (a.sum(-1, keepdim=True) + 1e-8))


def test_226_one_more_is_a_key_of_zero_with_no_value():
    mechanism = Mechanism("softmax_off_by_one")
    q, k, v = (mechanism.streams(X)[name] for name in "qkv")
    k, v = (torch.cat([torch.zeros_like(each[:, :, :1]), each], 2) for each in (k, v))
    seen = torch.cat([torch.ones(11, 1, dtype=torch.bool), causal()], 1)
    assert_close(mechanism.mixed(X), scaled_dot_product_attention(q, k, v, attn_mask=seen))


def test_226_one_more_leaves_rows_below_one():
    assert (Mechanism("softmax_off_by_one").weights(X).sum(-1) < 1).all()


def test_a_sink_of_zero_is_one_more():
    sink = Mechanism("learned_sink").set(z=0)
    assert_close(sink(X), Mechanism("softmax_off_by_one", like=sink)(X))


def test_a_sink_far_below_is_softmax():
    sink = Mechanism("learned_sink").set(z=-300)
    assert_close(sink(X), Mechanism("rope", like=sink)(X))


def test_235_negative_logits_give_nothing():
    mechanism = Mechanism("dormant_relu")
    p, s = mechanism.weights(X), mechanism.logits(X)
    assert not p[s <= 0].any()
    assert_close(p, relu(s) * UNIFORM)


def test_235_doubled_values_double():
    mechanism = Mechanism("dormant_relu")
    y = mechanism(X)
    assert_close(mechanism.set(v_proj_weight=2 * mechanism.parameter("v_proj.weight"))(X), 2 * y)


def test_235_equal_logits_are_a_multiple_of_the_mean():
    mechanism = Mechanism("dormant_relu", ("relu(s) / seen", "relu(0 * s + 3) / seen"))
    assert_close(mechanism.weights(X), 3 * UNIFORM.expand(2, 4, -1, -1))


def test_relu_attention_sees_all_and_is_homogeneous():
    mechanism = Mechanism("relu_attention")
    p = mechanism.weights(X)
    assert_close(p, relu(mechanism.logits(X)) / 11)
    assert_close(mechanism.weights(2 * X), 4 * p)


def test_squared_relu_is_homogeneous_of_degree_two():
    mechanism = Mechanism("squared_relu")
    p = mechanism.weights(X)
    mechanism.set(q_proj_weight=3 * mechanism.parameter("q_proj.weight"))
    assert_close(mechanism.weights(X), 9 * p)


def test_squared_relu_divides_by_the_length_of_the_row():
    mechanism = Mechanism("squared_relu")
    assert_close(mechanism.weights(X), relu(mechanism.logits(X) / SEEN) ** 2 * causal())


def test_96_the_norm_takes_up_the_size_of_values():
    mechanism = Mechanism("rela", ("eps = 1e-8", "eps = 0"))
    y = mechanism(X)
    assert_close(mechanism.set(v_proj_weight=5 * mechanism.parameter("v_proj.weight"))(X), y)


def test_96_the_norm_takes_up_the_scale():
    exact, bare = ("eps = 1e-8", "eps = 0"), ("normalize = ", "scale = 1; normalize = ")
    mechanism = Mechanism("rela", exact)
    other = Mechanism("rela", exact, bare, like=mechanism)
    assert_close(mechanism(X), other(X))


def test_96_a_query_may_attend_to_nothing():
    mechanism = Mechanism("rela")
    mechanism.set(k_proj_weight=-mechanism.parameter("q_proj.weight"))
    assert not mechanism(tokens(1)).any()


def test_173_laplace_is_the_distribution_of_a_gaussian():
    mechanism = Mechanism("laplace")
    normal = torch.distributions.Normal(0.707107, 0.282095)
    s = mechanism.logits(X) / SEEN
    assert_close(mechanism.weights(X), normal.cdf(s) * causal(), 1e-7)


def test_173_laplace_is_a_step_for_large_logits():
    mechanism = Mechanism("laplace")
    s = mechanism.logits(1e4 * X) / SEEN
    assert_close(mechanism.weights(1e4 * X), (s > 0.707107) * causal() * 1.0 + 0 * s)


def test_208_taylor_is_positive_and_near_softmax_for_small_logits():
    mechanism = Mechanism("taylor")
    assert (mechanism.weights(5 * X)[:, :, causal()] > 0).all()
    small = 0.05 * X
    assert_close(mechanism.weights(small), softmax(mechanism.logits(small)), 1e-5)


def test_208_taylor_cut_to_a_constant_is_the_mean():
    p = Mechanism("taylor", ("1 + s + s ** 2 / 2", "1 + 0 * s")).weights(X)
    assert_close(p, UNIFORM.expand_as(p))


def test_55_fastmax_factorises():
    mechanism = Mechanism("fastmax")
    q, k, v = (mechanism.streams(X)[name] for name in "qkv")

    def features(x: torch.Tensor) -> torch.Tensor:
        square = (x[..., :, None] * x[..., None, :]).flatten(-2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square / 2**0.5], -1)

    q, k = features(q), features(k)
    above = q @ (k.mT @ v)
    assert_close(mechanism.mixed(X), above / (q @ k.sum(2)[..., None]))


def test_55_fastmax_of_degree_none_is_the_mean():
    mechanism = Mechanism("fastmax", ("(1 + s + s ** 2 / 2)", "(1 + 0 * s)"))
    v = mechanism.streams(X)["v"]
    assert_close(mechanism.mixed(X), v.mean(2, keepdim=True).expand_as(v))


def test_239_div_length_is_softmax_without_its_sum():
    mechanism = Mechanism("softmax_div_length")
    s = rotated(mechanism).clip(max=5)
    e = s.exp() * causal()
    assert_close(mechanism.weights(X), e / SEEN)
    assert_close(mechanism.weights(X) * SEEN / e.sum(-1, keepdim=True), softmax(s))


def test_239_div_length_of_equal_logits_is_the_mean():
    p = silent("softmax_div_length").weights(X)
    assert_close(p, UNIFORM.expand_as(p))


def test_239_a_vector_norm_does_not_see_the_denominator():
    changes = (("eps = 1e-12", "eps = 0"), ("exp(min(s, 5))", "exp(min(s, 5)) / sum"))
    bare = Mechanism("softmax_l2", changes[0])
    assert_close(bare(X), Mechanism("softmax_l2", *changes, like=bare)(X))


def test_239_a_vector_norm_points_where_softmax_does():
    bare = Mechanism("softmax_l2")
    assert bare.logits(X / 3).max() < 5
    full, found = Mechanism("rope", like=bare).mixed(X / 3), bare.mixed(X / 3)
    assert_close(torch.cosine_similarity(found, full, -1), torch.ones(2, 4, 11).double(), 1e-9)


def test_mha_has_none_of_this():
    mechanism = Mechanism(MHA)
    assert_close(mechanism.weights(X), softmax(mechanism.logits(X)))

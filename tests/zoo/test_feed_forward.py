"""Families `feed-forward`, `norms` and `ends`: what looks at one token, and the ends of a model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, rms_norm, sigmoid, silu

from ..oracles.others import Widened
from .layers import Joined, Place, X, given
from .mechanisms import assert_close

pytest.importorskip("x_transformers", reason="needs x-transformers")
pytest.importorskip("transformers", reason="needs Hugging Face Transformers")

from transformers.activations import NewGELUActivation
from transformers.models.axk2.modeling_axk2 import AXK2GatedRMSNorm
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling2.modeling_inkling2 import Inkling2SoftcappedSwiGLU
from transformers.models.nemotron.modeling_nemotron import NemotronMLP
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNorm
from x_transformers import x_transformers as theirs

Fed = Callable[[Place, Tensor], Tensor]


def fed(joined: Joined, function: Fed) -> Callable[[Tensor], Tensor]:
    """Return the whole whose feed-forwards are a function of their tensors and what comes in."""

    def whole(x: Tensor) -> Tensor:
        for place in joined.places:
            x = x + place.after("attn", x)
            inner = Place(place.layer.get_submodule("ffn"))
            x = x + function(inner, place.normed("ffn_norm", x))
        return x

    return whole


def gated(function: Callable[[Tensor, Tensor], Tensor]) -> Fed:
    """Return a feed-forward that is a function of both sides between its maps."""

    def made(p: Place, x: Tensor) -> Tensor:
        gate, up = (linear(x, p[f"{name}_proj.weight"]) for name in ("gate", "up"))
        return linear(function(gate, up), p["down_proj.weight"])

    return made


def limited(gate: Tensor, up: Tensor) -> Tensor:
    """Return the gate of gpt-oss's experts."""
    both = torch.stack([gate, up], -1).flatten(-2)
    config = SimpleNamespace(swiglu_alpha=1.702, swiglu_limit=0.5)
    experts = SimpleNamespace(alpha=config.swiglu_alpha, limit=config.swiglu_limit)
    made: Tensor = GptOssExperts._apply_gate(experts, both)
    return made


def softcapped(gate: Tensor, up: Tensor) -> Tensor:
    config: Any = SimpleNamespace(mlp_gate_softcap=0.5, mlp_up_softcap=0.8)
    with Widened():
        made: Tensor = Inkling2SoftcappedSwiGLU(config)(gate, up)
    return made


def by_module(kind: Any, config: dict[str, Any], names: dict[str, str]) -> Fed:
    """Return a feed-forward that is a module of Transformers."""

    def made(p: Place, x: Tensor) -> Tensor:
        own = kind(SimpleNamespace(hidden_size=32, **config))
        y: Tensor = given(own, {to: p[name] for name, to in names.items()})(x)
        return y

    return made


SAME = {f"{name}_proj.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")}
CLAMPED = {"intermediate_size": 88, "mlp_bias": False, "hidden_act": "silu", "swiglu_limit": 0.5}
SQUARED = {"intermediate_size": 128, "mlp_bias": False, "hidden_act": "relu2"}


def biased(act: Callable[[Tensor], Tensor]) -> Fed:
    return lambda p, x: linear(
        act(linear(x, p["up_proj.weight"], p["up_proj.bias"])),
        p["down_proj.weight"],
        p["down_proj.bias"],
    )


def x_feed_forward(names: dict[str, str], **options: Any) -> Fed:
    def made(p: Place, x: Tensor) -> Tensor:
        own = theirs.FeedForward(32, **options)
        for each in own.modules():
            if isinstance(each, nn.LayerNorm):  # its norm without a factor
                each.eps = 1e-5
        y: Tensor = given(own, {to: p[name] for name, to in names.items()})(x)
        return y

    return made


ENDS = {f"{name}_proj.{kind}": f"ff.{at}.{kind}" for kind in ("weight", "bias")
        for name, at in (("up", "0.0"), ("down", 2))}  # fmt: skip
FEED_FORWARDS: dict[str, Fed] = {
    "clamped_swiglu": by_module(DeepseekV4MLP, CLAMPED, SAME),
    "limited_glu": gated(limited),
    "softcapped_glu": gated(softcapped),
    "bilinear_glu": gated(lambda a, b: a * b),
    "swiglu_layers": gated(lambda a, b: silu(a) * b),
    "geglu_layers": gated(lambda a, b: gelu(a) * b),
    "reglu_layers": gated(lambda a, b: relu(a) * b),
    "glu_layers": gated(lambda a, b: sigmoid(a) * b),
    "squared_relu_layers": by_module(
        NemotronMLP, SQUARED, {name: name for name in list(SAME)[1:]}
    ),
    "gelu_layers": x_feed_forward(ENDS),
    "tanh_gelu_layers": biased(NewGELUActivation()),
    "solu": x_feed_forward({**ENDS, "down_centred.g": "ff.0.1.norm.gamma"}, solu=True),
    "normed_hidden": x_feed_forward(
        {
            **{f"down_proj_0.{kind}": f"ff.0.0.{kind}" for kind in ("weight", "bias")},
            **{f"down_proj_1.{kind}": f"ff.3.{kind}" for kind in ("weight", "bias")},
            "down_centred.g": "ff.1.gamma",
        },
        post_act_ln=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_D301_D302_feed_forwards_are_those_of_others(name):
    joined = Joined(name)
    joined.agrees(fed(joined, FEED_FORWARDS[name]))


@pytest.mark.parametrize(
    ("name", "limits"),
    [("clamped_swiglu", ("0.5", "1e6")), ("softcapped_glu", ("0.5, 0.8", "1e6, 1e6"))],
)
def test_D301_without_limits_it_is_swiglu(name, limits):
    wide, plain = Joined(name, limits), Joined("swiglu_layers")
    plain.meaning.load_state_dict(wide.meaning.state_dict())
    assert_close(wide(X), plain(X))


def test_D301_a_gate_of_zero_lets_nothing_through():
    joined = Joined("bilinear_glu")
    for p in joined.places:
        p["ffn.gate_proj.weight"].data.zero_()
    assert_close(joined(X), fed(joined, lambda p, x: 0 * x)(X))


# ── norms ────────────────────────────────────────────────────────────────────────────────


def axk2(p: dict[str, Tensor], x: Tensor) -> Tensor:
    config = SimpleNamespace(hidden_size=32, rms_norm_eps=1e-6, gated_norm_rank=8)
    y: Tensor = given(AXK2GatedRMSNorm(config), {
        "norm.weight": p["y_norm.weight"],
        "mlp.fc1.weight": p["o_proj_0.weight"],
        "mlp.fc2.weight": p["o_proj_1.weight"],
    })(x)  # fmt: skip
    return y


def module(make: Callable[[], nn.Module], **names: str) -> Callable[..., Tensor]:
    """Return a norm that is a module, its parameters by ours: `g="weight"`."""

    def made(p: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = {}
        for name, to in names.items():
            shape = dict(make().named_parameters())[to].shape
            weights[to] = p[name].reshape(shape)
        y: Tensor = given(make(), weights)(x)
        return y

    return made


NORMS: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "one_plus_norm": module(lambda: GemmaRMSNorm(32), w="weight"),
    "plain_norm": module(lambda: OlmoLayerNorm(32)),
    "group_norm": module(lambda: Qwen4ExpTextRMSNorm(32, group_size=8), w="weight"),
    "layer_norm_unbiased": module(lambda: CohereLayerNorm(32), g="weight"),
    "scale_norm": module(lambda: theirs.ScaleNorm(32), g="g"),
    "dyt": module(lambda: theirs.DynamicTanh(32), a="pre_tanh_scale", g="gamma", b="beta"),
    "derf": module(lambda: theirs.Derf(32), a="alpha", shift="s", g="gamma", b="beta"),
    "gated_norm": axk2,
}


def normed(joined: Joined, place: Place, name: str, x: Tensor) -> Tensor:
    tensors = {
        each.removeprefix(f"{name}_norm."): value
        for each, value in place.tensors.items()
        if each.startswith(f"{name}_norm.")
    }
    with Widened():
        return NORMS[joined.what.name](tensors, x)


@pytest.mark.parametrize("name", NORMS)
def test_D304_norms_are_those_of_others(name):
    joined = Joined(name)

    def whole(x):
        for place in joined.places:
            for part in ("attn", "ffn"):
                x = x + place(part, normed(joined, place, part, x))
        return x

    joined.agrees(whole)


def test_D304_one_group_is_the_rms_norm_with_one_added():
    grouped, plain = Joined("group_norm", ("grouped(4)", "grouped(1)")), Joined("one_plus_norm")
    plain.meaning.load_state_dict(grouped.meaning.state_dict())
    assert_close(grouped(X), plain(X))


# ── ends ─────────────────────────────────────────────────────────────────────────────────

IDS = torch.tensor([[1, 15, 3, 3], [0, 2, 7, 1]])


def between(
    joined: Joined, embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return the whole with these ends."""
    weights = dict(joined.meaning.named_parameters())

    def whole(ids: Tensor) -> Tensor:
        x = embed(weights["embed_tokens.weight"][ids])
        for place in joined.places:
            for part in ("attn", "ffn"):
                x = x + place.after(part, x)
        return head(rms_norm(x, (32,), weights["norm.weight"], 1e-6))

    return whole


ENDINGS: dict[str, tuple[Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]] = {
    "scaled_embedding": (lambda x: x * 32**0.5, "embed_tokens", lambda y: y),
    "normed_embedding": (lambda x: rms_norm(x, (32,), eps=1e-6), "lm_head", lambda y: y),
    "capped_logits": (lambda x: x, "lm_head", lambda y: 30 * torch.tanh(y / 30)),
    "scaled_logits": (lambda x: 12 * x, "embed_tokens", lambda y: y / 16),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_D305_ends_are_what_is_written(name):
    joined = Joined(name, head=None)
    embed, weight, after = ENDINGS[name]
    weights = dict(joined.meaning.named_parameters())
    joined.agrees(
        between(joined, embed, lambda x: after(linear(x, weights[f"{weight}.weight"]))), IDS
    )


def mixture(joined: Joined, x: Tensor) -> Tensor:
    """Return what x-transformers' head gives: logarithms of a sum of softmaxes."""
    weights = dict(joined.meaning.named_parameters())
    shares, many, logits = (
        weights[f"head_mixture.{name}_proj{at}.weight"]
        for name, at in (("shares", ""), ("each", "_0"), ("each", "_1"))
    )
    each = linear(linear(x, many).unflatten(-1, (3, -1)), logits).log_softmax(-1)
    return torch.logsumexp(each + linear(x, shares).log_softmax(-1)[..., None], 2)


def test_D305_a_mixture_of_softmaxes_is_what_is_written():
    joined = Joined("mixture_of_softmaxes", head=None)
    joined.agrees(between(joined, lambda x: x, lambda x: mixture(joined, x)), IDS)


def test_D305_a_mixture_gives_probabilities():
    found = Joined("mixture_of_softmaxes", head=None)(IDS).exp().sum(-1)
    assert_close(found, torch.ones_like(found))

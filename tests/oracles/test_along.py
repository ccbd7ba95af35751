"""Mechanisms of the zoo along the tokens, against what others wrote, with our weights in it.

Oracles: the references of flash-linear-attention, attention layers of x-transformers and of Hugging
Face Transformers; a loop over the tokens where there is none. Compared are the output and the
gradients of the input and of every weight, in float64.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid, silu

import headloom as hl
from headloom.compiler import zoo

from .others import Widened, file_of

Layer = Callable[[Any, Tensor], Tensor]
LENGTHS = (1, 9, 34)


def module_of(name: str, *changes: tuple[str, str]) -> Any:
    """Compile a mechanism of the zoo, with parts of its text replaced, and weights of some size."""
    text = zoo.entry(name).text
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    module = hl.compile(hl.load(text, format="loom"), name, dtype=torch.float64, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in module.parameters():
            each += 0.3 * torch.randn(each.shape, generator=generator, dtype=torch.float64)
    return module


def assert_same(module: Any, layer: Layer, tokens: int, tolerance: float = 1e-9) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(
        2, tokens, width_of(module), generator=generator, dtype=torch.float64
    ).requires_grad_()
    ours = module(x)
    with Widened():
        theirs = layer(module, x)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    weights = dict(module.named_parameters())
    found = [
        torch.autograd.grad(y, [x, *weights.values()], upstream, materialize_grads=True)
        for y in (ours, theirs)
    ]
    for name, one, other in zip(["x", *weights], *found, strict=True):
        off = (one - other).abs().max().item() / max(1.0, other.abs().max().item())
        assert off <= tolerance, f"gradient of {name}: off by {off:.1e}"


def width_of(module: Any) -> int:
    """Return how many features the block gives: those of its last map."""
    last: nn.Linear = getattr(module, "o_proj", None) or module.o_proj_1
    return last.out_features


def split(x: Tensor, heads: int = 4) -> Tensor:
    """Return x [b, n, heads · d] as [b, n, heads, d]."""
    return x.unflatten(-1, (heads, -1))


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def out(module: Any, mixed: Tensor) -> Tensor:
    return module.o_proj(mixed.flatten(2))


# ── flash-linear-attention ───────────────────────────────────────────────────────────────


def gated_delta_2(m: Any, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/gdn2/naive.py").naive_recurrent_gdn2
    q, k, v = (
        split(silu(conv(proj(x))))
        for proj, conv in ((m.q_proj, m.q_conv), (m.k_proj, m.k_conv), (m.v_proj, m.v_conv))
    )
    gates = logsigmoid(m.fade_proj(x)), m.erase_proj(x).sigmoid(), m.write_proj(x).sigmoid()
    return out(m, naive(unit(q), unit(k), v, *map(split, gates))[0])


def momentum_delta(m: Any, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/momentum_delta_rule/naive.py")
    q, k, p = (unit(split(proj(x))) for proj in (m.q_proj, m.k_proj, m.p__proj))
    eta, beta = m.eta_proj(x).sigmoid(), m.beta_proj(x).sigmoid()
    alpha, mu = logsigmoid(m.alpha_proj(x)), logsigmoid(m.mu_proj(x))
    mixed, _ = naive.recurrent_momentum_delta_rule_ref(
        q, k, split(m.v_proj(x)), alpha, mu, p, beta, eta
    )
    return out(m, mixed)


EXACT = ("l2_norm", "l2_norm(eps = 0)")  # theirs divides by the length once more


def preconditioned_delta(m: Any, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/precond_gated_delta_rule/naive.py")
    q, k = (unit(split(proj(x)), 0) for proj in (m.q_proj, m.k_proj))
    fades = logsigmoid(m.fade_a_proj(x)), logsigmoid(m.fade_proj(x))
    betas = m.beta_a_proj(x).sigmoid(), m.beta_proj(x).sigmoid()
    call = naive.naive_recurrent_precond_gated_delta_rule
    return out(m, call(q, k, split(m.v_proj(x)), *fades, *betas)[0])


def preconditioned_kda(m: Any, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/precond_kda/naive.py").naive_recurrent_precond_kda
    q, k = (unit(split(proj(x))) for proj in (m.q_proj, m.k_proj))
    fades = split(logsigmoid(m.fade_proj(x))), logsigmoid(m.fade_a_proj(x))
    betas = m.beta_a_proj(x).sigmoid(), m.beta_proj(x).sigmoid()
    v = split(m.v_proj(x))
    return out(m, naive(q, k, v, *fades, *betas, log_atk_scale=m.centre)[0])


def forgetting(m: Any, x: Tensor, window: int | None = None) -> Tensor:
    naive = file_of("fla-core", "fla/ops/forgetting_attn/naive.py").naive_forgetting_attn
    gate = logsigmoid(m.kept_proj(x))
    keys = m.k_proj.out_features // 8
    k, v = (split(proj(x), keys) for proj in (m.k_proj, m.v_proj))
    return out(m, naive(split(m.q_proj(x)), k, v, gate, window_size=window))


def forgetting_window(m: Any, x: Tensor) -> Tensor:
    return forgetting(m, x, 6)


def wall_reference(*args: Tensor, **more: Any) -> Tensor:
    """Call their reference: a sum by PyTorch for their kernel, and 1 / log(2) to all digits."""
    constant, cumsum = (ModuleType(f"fla.ops.utils.{name}") for name in ("constant", "cumsum"))
    constant.RCP_LN2 = 1 / torch.tensor(2.0, dtype=torch.float64).log()
    cumsum.chunk_global_cumsum = lambda g, cu_seqlens, scale: g.cumsum(1) * scale
    with patch.dict(sys.modules, {each.__name__: each for each in (constant, cumsum)}):
        return file_of("fla-core", "fla/ops/wall_attn/naive.py").naive_wall_attn(*args, **more)


def wall(m: Any, x: Tensor, **more: Tensor) -> Tensor:
    q, k, v, gates = (split(proj(x)) for proj in (m.q_proj, m.k_proj, m.v_proj, m.faded_proj))
    return out(m, wall_reference(q, k, v, logsigmoid(gates), scale=8**-0.5, **more))


def wall_with_all(m: Any, x: Tensor) -> Tensor:
    return wall(m, x, sink_bias=m.z, g_scalar=logsigmoid(m.kept_proj(x)))


ALL = (
    ("block wall", "score forget {\n  let kept = x | linear(heads, bias = true) | log_sigmoid | "
     "running(sum)\n  s + kept[i, h] - kept[j, h]\n}\nblock wall"),
    ("mask ", "score = forget; normalize = sink; mask "),
)  # fmt: skip


def parallax(m: Any, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/parallax/naive.py").naive_parallax
    q, r, k, v = (split(proj(x)) for proj in (m.q_proj, m.r_proj, m.k_proj, m.v_proj))
    return out(m, naive(q, r, k, v))


# ── loops ────────────────────────────────────────────────────────────────────────────────


def gated_oja(m: Any, x: Tensor) -> Tensor:
    q, k, v, fade = (split(proj(x)) for proj in (m.q_proj, m.k_proj, m.v_proj, m.fade_proj))
    v, beta, found = unit(v), m.beta_proj(x).sigmoid(), []
    state = x.new_zeros(len(x), 4, 8, 8)  # keys, values
    for t in range(x.shape[1]):
        state = state * logsigmoid(fade[:, t]).exp()[..., None, :]
        missing = k[:, t] - torch.einsum("bhkv,bhv->bhk", state, v[:, t])
        missing = beta[:, t, :, None] * missing
        state = state + missing[..., :, None] * v[:, t, :, None, :]
        found.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * 8**-0.5, state))
    return out(m, torch.stack(found, 1))


def lightnet(m: Any, x: Tensor) -> Tensor:
    """Each channel of keys weighs the values by a softmax over the tokens so far."""
    q, k, v = (split(proj(x)) for proj in (m.q_proj, m.k_proj, m.v_proj))
    found = []
    for t in range(x.shape[1]):
        weights = k[:, : t + 1].softmax(1)
        state = torch.einsum("bthk,bthv->bhkv", weights, v[:, : t + 1])
        found.append(torch.einsum("bhk,bhkv->bhv", silu(q[:, t]) * 8**-0.5, state))
    return out(m, torch.stack(found, 1))


# ── x-transformers ───────────────────────────────────────────────────────────────────────


def x_transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, as it is imported
        return pytest.importorskip("x_transformers.x_transformers")


def theirs(
    m: Any, x: Tensor, options: dict[str, Any], weights: dict[str, Tensor], **more: Any
) -> Tensor:
    """Run their attention layer with our weights."""
    layer = x_transformers().Attention(32, dim_head=8, heads=4, **options).double()
    named = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"}
    named = {
        f"{a}.weight": getattr(m, f"{b}_proj").weight
        for a, b in named.items()
        if hasattr(m, f"{b}_proj")
    }
    named |= weights
    assert named.keys() == dict(layer.named_parameters()).keys()
    return functional_call(layer, named, x, more)


def forgetting_there(m: Any, x: Tensor) -> Tensor:
    gates = {f"data_dependent_alibi.to_forget_gates.0.{each}": getattr(m.kept_proj, each)
             for each in ("weight", "bias")}  # fmt: skip
    return theirs(m, x, {"causal": True, "data_dependent_alibi": True}, gates)


def forgetting_both_ways(m: Any, x: Tensor) -> Tensor:
    gates = {
        f"data_dependent_alibi.to_forget_gates.0.{each}": torch.cat(
            [getattr(proj, each) for proj in (m.back_proj, m.ahead_proj)]
        )
        for each in ("weight", "bias")
    }
    return theirs(m, x, {"causal": False, "data_dependent_alibi": True}, gates)


def polar(m: Any, x: Tensor) -> Tensor:
    angles = x_transformers().PolarEmbedding(8, 4).double()
    freqs, lag = functional_call(
        angles, {"learned_bias": m.turn[:, None], "inv_freq": m.pace}, torch.arange(x.shape[1])
    )
    weights = {"to_q.weight": m.many_proj.weight, "to_k.weight": m.much_proj.weight}
    return theirs(m, x, {"causal": True}, weights, polar_pos_emb=(freqs[:, None], lag))


# ── Hugging Face Transformers ────────────────────────────────────────────────────────────


def models(name: str) -> Any:
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def hidden(tokens: int, window: int | None = None) -> Tensor:
    """Return what is added to logits [n, n] that are not seen."""
    gap = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (gap >= 0) & (gap < (window or tokens))
    return torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(~seen, -torch.inf)


def turns(tokens: int, dims: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [1, n, dims/2] of the default angles."""
    pace = 10_000 ** -(torch.arange(0, dims, 2).double() / dims)
    angle = torch.arange(tokens)[:, None] * pace
    return angle.cos()[None], angle.sin()[None]


INKLING = SimpleNamespace(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, layer_types=["full"],
    rel_extent=9, d_rel=6, attention_dropout=0.0, sconv_kernel_size=4, qk_l2_clip_threshold=2.0,
    rel_l2_clip_threshold=2.0, rms_norm_eps=1e-6, log_scaling_alpha=0.1, log_scaling_n_floor=4,
    sliding_window_size=9, swa_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2,
    _attn_implementation="eager",
)  # fmt: skip


def relative_bank(m: Any, x: Tensor) -> Tensor:
    """Plain attention with the bias that theirs makes."""
    module = models("inkling2")
    clip = module.Inkling2ScaledL2Clip(4, 6, 2.0).double()
    bank, at = module.Inkling2RelativeLogits(6, 9).double(), torch.arange(x.shape[1])
    mixed = functional_call(clip, {"scale": m.gain}, split(m.mixed_proj(x)))
    bias = functional_call(bank, {"proj": m.profiles.mT}, (mixed, at, at))
    q, k, v = (split(proj(x)).transpose(1, 2) for proj in (m.q_proj, m.k_proj, m.v_proj))
    weights = (q @ k.mT * 8**-0.5 + bias + hidden(x.shape[1])).softmax(-1)
    return out(m, (weights @ v).transpose(1, 2))


def length_clip(m: Any, x: Tensor) -> Tensor:
    module = models("inkling2")
    scaled, plain = module.Inkling2ScaledL2Clip(4, 8, 2.0), module.Inkling2L2Clip(2.0)
    grown = 1 + 0.1 * ((torch.arange(x.shape[1]) + 1).double() / 4).clamp(min=1).log()
    q = functional_call(scaled, {"scale": m.gain}, split(m.asks_proj(x))) * grown[:, None, None]
    q, k, v = (each.transpose(1, 2) for each in (q, plain(split(m.k_proj(x))), split(m.v_proj(x))))
    weights = (q @ k.mT * 8**-0.5 + hidden(x.shape[1])).softmax(-1)
    return out(m, (weights @ v).transpose(1, 2))


def chosen_convolution(m: Any, x: Tensor) -> Tensor:
    conv = models("inkling2").Inkling2DynamicShortConvolution(16, 32, 2, 4, 0, 0).double()
    found = {}
    for kind, name in (("k", "keys"), ("v", "values")):
        taps = getattr(m, f"of_{kind}_proj").weight.unflatten(0, (2, 4)).flip(1).flatten(0, 1)
        weights = {"static_weight": getattr(m, f"{kind}_conv").weight.flip(1).mT}
        weights |= {"weight_proj.weight": taps}
        made = functional_call(conv, weights, (getattr(m, f"{name}_proj")(x), x))
        found[kind] = split(made, 2).transpose(1, 2).repeat_interleave(2, 1)
    q = split(m.q_proj(x)).transpose(1, 2)
    weights = (q @ found["k"].mT * 8**-0.5 + hidden(x.shape[1])).softmax(-1)
    return out(m, (weights @ found["v"]).transpose(1, 2))


def compressed_convolutional(m: Any, x: Tensor) -> Tensor:
    config = SimpleNamespace(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, cca_time0=2,
        cca_time1=2, attention_bias=False, attention_dropout=0.0, layer_types=["hybrid"],
        sliding_window=None, _attn_implementation="eager",
    )  # fmt: skip
    layer = models("zaya").ZayaAttention(config, 0).double()
    ours = {
        "q_proj.weight": m.asked_proj.weight,
        "k_proj.weight": m.known_proj.weight,
        "v_proj_current.weight": m.v_proj_0.weight,
        "v_proj_delayed.weight": m.v_proj_1.weight,
        "conv_qk_depthwise.weight": m.met_conv_0.weight[:, None],
        "conv_qk_depthwise.bias": torch.zeros(48, dtype=torch.float64),
        "conv_qk_grouped.weight": m.met_conv_1.weight,
        "conv_qk_grouped.bias": m.met_conv_1.bias,
    }
    ours = {f"qkv_proj.{name}": each for name, each in ours.items()}
    ours |= {"qk_norm.temp": m.warmth[:, 0], "o_proj.weight": m.o_proj.weight}
    assert ours.keys() == dict(layer.named_parameters()).keys()
    angles = tuple(torch.cat([each, each], -1) for each in turns(x.shape[1], 8))
    mask = {"causal": hidden(x.shape[1])}
    return functional_call(layer, ours, (x, mask), {"position_embeddings": angles})[0]


def counter_rotation(m: Any, x: Tensor) -> Tensor:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, head_dim=12, sliding_window=7, attention_dropout=0.0,
        q_lora_rank=20, rms_norm_eps=1e-6, o_groups=2, o_lora_rank=6,
        layer_types=["sliding_attention"], _attn_implementation="eager",
    )  # fmt: skip
    layer = models("deepseek_v4").DeepseekV4Attention(config, 0).double()
    ours = {
        "q_a_proj.weight": m.q_proj_0.weight,
        "q_a_norm.weight": m.q_norm.weight,
        "q_b_proj.weight": m.q_proj_1.weight,
        "kv_proj.weight": m.both_proj.weight,
        "kv_norm.weight": m.both_norm.weight,
        "o_a_proj.weight": m.o_proj_0.weight.flatten(0, 1),
        "o_b_proj.weight": m.o_proj_1.weight,
        "sinks": m.z,
    }
    assert ours.keys() == dict(layer.named_parameters()).keys()
    angles = {"main": turns(x.shape[1], 4)}
    given = (x, angles, torch.arange(x.shape[1]), hidden(x.shape[1], 7)[None, None])
    return functional_call(layer, ours, given)[0]


LAYERS: dict[str, tuple[Layer, tuple[tuple[str, str], ...]]] = {
    "gated_delta_2": (gated_delta_2, ()),
    "momentum_delta": (momentum_delta, ()),
    "preconditioned_delta": (preconditioned_delta, (EXACT,)),
    "preconditioned_kda": (preconditioned_kda, ()),
    "gated_oja": (gated_oja, ()),
    "lightnet": (lightnet, ()),
    "forgetting": (forgetting, ()),
    "forgetting there": (forgetting_there, ()),
    "forgetting_window": (forgetting_window, ()),
    "forgetting_both_ways": (forgetting_both_ways, ()),
    "wall": (wall, ()),
    "wall with all": (wall_with_all, ALL),
    "parallax": (parallax, ()),
    "polar": (polar, ()),
    "relative_bank": (relative_bank, ()),
    "length_clip": (length_clip, ()),
    "chosen_convolution": (chosen_convolution, ()),
    "compressed_convolutional": (compressed_convolutional, ()),
    "counter_rotation": (counter_rotation, ()),
}


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_their_layer(name: str, tokens: int) -> None:
    layer, changes = LAYERS[name]
    assert_same(module_of(name.split()[0], *changes), layer, tokens)

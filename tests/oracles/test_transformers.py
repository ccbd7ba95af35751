"""Blocks in Loom against the attention layers that Hugging Face Transformers ships.

Their layer gets random weights, ours the same ones by a small table, and the outputs, the
gradient of the input and the gradient of every parameter are compared, in float32 and float64.
Their masks come from their own helpers, so that the edge of a window is theirs too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headloom as hl
from headloom.compiler import zoo

from .others import Widened

pytest.importorskip("transformers", reason="needs Hugging Face Transformers")

from transformers import (
    BertConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    T5Config,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.bert.modeling_bert import BertAttention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.diffllama.modeling_diffllama import (
    DiffLlamaAttention,
    DiffLlamaRotaryEmbedding,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.models.t5.modeling_t5 import T5Attention

BATCH, WINDOW = 2, 7
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
Table = Mapping[str, "str | tuple[str, Callable[[Tensor], Tensor]]"]


@dataclass(frozen=True)
class Sizes:
    """A random tiny configuration. The width is the heads' times a number of its own."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    theta: float

    @classmethod
    def draw(cls, seed: int) -> Sizes:
        chance = random.Random(seed)
        kv_heads = chance.choice([1, 2, 3])
        heads = kv_heads * chance.choice([1, 2, 3])
        width = heads * chance.choice([4, 7, 10])
        theta = chance.choice([100.0, 10_000.0, 1e6])
        return cls(heads, kv_heads, chance.choice([4, 6, 10]), width, theta)

    @property
    def loom(self) -> str:
        return (
            f"width = {self.width}; heads = {self.heads}; kv_heads = {self.kv_heads};"
            f" head_dim = {self.head_dim}"
        )

    @property
    def rope(self) -> str:
        return f"position = rope(theta = {self.theta})"

    @property
    def config(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "attn_implementation": "eager",
        }


@dataclass(frozen=True)
class Pair:
    """The same layer twice: Loom text, and their module with how it is called."""

    text: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    table: Table  # our parameter: theirs, or theirs and what to take of it


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


WEIGHTS = same("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
BIASES = same("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")


def decoder(
    text: str,
    config: Any,
    attention: type[nn.Module],
    rotary: type[nn.Module],
    table: Table = WEIGHTS,
    mask: Callable[..., Tensor | None] = create_causal_mask,
    layer: int = 0,
) -> Pair:
    """Return a pair for the decoders, which all take angles and an additive mask."""
    module, angles = attention(config, layer), rotary(config)

    def run(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        visible = mask(config, x, attention_mask=None, past_key_values=None)
        assert visible is not None
        return module(x, position_embeddings=angles(x, positions), attention_mask=visible)[0]

    return Pair(f"block b {{ {text} }}", module, run, table)


def llama(sizes: Sizes) -> Pair:
    text = f"{sizes.loom}; {sizes.rope}; mask = causal"
    return decoder(text, LlamaConfig(**sizes.config), LlamaAttention, LlamaRotaryEmbedding)


def llama_biased(sizes: Sizes) -> Pair:
    text = f"""{sizes.loom}; {sizes.rope}; mask = causal
      q = x | linear(bias = true) | split
      k = x | linear(bias = true) | split
      v = x | linear(bias = true) | split
      out = o | merge | linear(bias = true)"""
    config = LlamaConfig(**sizes.config, attention_bias=True)
    return decoder(text, config, LlamaAttention, LlamaRotaryEmbedding, WEIGHTS | BIASES)


def mistral(sizes: Sizes) -> Pair:
    text = f"{sizes.loom}; {sizes.rope}; mask = causal and window({WINDOW})"
    config = MistralConfig(**sizes.config, sliding_window=WINDOW)
    return decoder(
        text,
        config,
        MistralAttention,
        MistralRotaryEmbedding,
        mask=create_sliding_window_causal_mask,
    )


def gemma2(sizes: Sizes, layer: int, mask: str, theirs: Callable[..., Tensor | None]) -> Pair:
    """Return layer 0, which is local, or layer 1, which is global. The caps bite."""
    text = f"{sizes.loom}; {sizes.rope}; scale = 13 ** -0.5; score = softcap(2); mask = {mask}"
    config = Gemma2Config(
        **sizes.config, sliding_window=WINDOW, query_pre_attn_scalar=13, attn_logit_softcapping=2.0
    )
    return decoder(text, config, Gemma2Attention, Gemma2RotaryEmbedding, mask=theirs, layer=layer)


def gemma2_local(sizes: Sizes) -> Pair:
    mask = f"causal and window({WINDOW})"
    return gemma2(sizes, 0, mask, create_sliding_window_causal_mask)


def gemma2_global(sizes: Sizes) -> Pair:
    return gemma2(sizes, 1, "causal", create_causal_mask)


def qwen3(sizes: Sizes) -> Pair:
    """Return queries and keys normed head by head, before they are turned."""
    text = f"""{sizes.loom}; {sizes.rope}; mask = causal
      q = x | linear | split | rms_norm(eps = 1e-5)
      k = x | linear | split | rms_norm(eps = 1e-5)"""
    table = WEIGHTS | same("q_norm.weight", "k_norm.weight")
    config = Qwen3Config(**sizes.config, rms_norm_eps=1e-5)
    return decoder(text, config, Qwen3Attention, Qwen3RotaryEmbedding, table)


def gpt_oss(sizes: Sizes, layer: int, mask: str, theirs: Callable[..., Tensor | None]) -> Pair:
    """Return biases everywhere and a learned sink; YaRN, on by default, is off in `Sizes`."""
    text = f"""{sizes.loom}; {sizes.rope}; mask = {mask}; normalize = sink
      q = x | linear(bias = true) | split
      k = x | linear(bias = true) | split
      v = x | linear(bias = true) | split
      out = o | merge | linear(bias = true)"""
    config = GptOssConfig(**sizes.config, sliding_window=WINDOW)
    return decoder(
        text,
        config,
        GptOssAttention,
        GptOssRotaryEmbedding,
        WEIGHTS | BIASES | {"z": "sinks"},
        theirs,
        layer,
    )


def gpt_oss_local(sizes: Sizes) -> Pair:
    mask = f"causal and window({WINDOW})"
    return gpt_oss(sizes, 0, mask, create_sliding_window_causal_mask)


def gpt_oss_global(sizes: Sizes) -> Pair:
    return gpt_oss(sizes, 1, "causal", create_causal_mask)


def deepseek(sizes: Sizes, interleaved: bool) -> Pair:
    """Return multi-head latent attention.

    Their `kv_a_proj_with_mqa` stacks the latent's rows on the rotary key's, and `kv_b_proj`
    holds for each head the rows of its key, then of its value; ours are matrices of their own,
    so that rows are picked out. Interleaved, they leave the turned features in halves and we in
    pairs, in queries and keys alike, which no inner product can see.
    """
    heads, nope, turned, value, rank, q_rank = sizes.heads, sizes.head_dim, 4, 5, 9, 11
    style = "interleaved" if interleaved else "half"
    text = f"""
      width = {sizes.width}; heads = {heads}; head_dim = {nope + turned}; value_dim = {value}
      let c  = x | linear({rank}) | rms_norm
      let kr = x | linear({turned}) | rope({sizes.theta}, style = {style}) | repeat(heads)
      q = x | linear({q_rank}) | rms_norm | linear | split
            | rope({sizes.theta}, dims = -{turned}, style = {style})
      k = c | linear(heads * {nope}) | split | concat(kr)
      v = c | linear | split
      mask = causal"""

    def keys(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, nope + value))[:, :nope].flatten(0, 1)

    def values(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, nope + value))[:, nope:].flatten(0, 1)

    table = {
        "q_proj_0.weight": "q_a_proj.weight",
        "q_norm.weight": "q_a_layernorm.weight",
        "q_proj_1.weight": "q_b_proj.weight",
        "c_proj.weight": ("kv_a_proj_with_mqa.weight", lambda weight: weight[:rank]),
        "kr_proj.weight": ("kv_a_proj_with_mqa.weight", lambda weight: weight[rank:]),
        "c_norm.weight": "kv_a_layernorm.weight",
        "k_proj.weight": ("kv_b_proj.weight", keys),
        "v_proj.weight": ("kv_b_proj.weight", values),
        "o_proj.weight": "o_proj.weight",
    }
    given = sizes.config | {"num_key_value_heads": heads}
    given.pop("head_dim")  # theirs is the turned part
    config = DeepseekV3Config(
        **given,
        q_lora_rank=q_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=turned,
        v_head_dim=value,
        rope_interleave=interleaved,
    )
    return decoder(text, config, DeepseekV3Attention, DeepseekV3RotaryEmbedding, table)


def deepseek_v3(sizes: Sizes) -> Pair:
    return deepseek(sizes, interleaved=True)


def deepseek_v3_halves(sizes: Sizes) -> Pair:
    return deepseek(sizes, interleaved=False)


def bert(sizes: Sizes) -> Pair:
    """Return both directions with biases; their residual and norm after it stay outside."""
    width = sizes.heads * sizes.head_dim
    text = f"""block b {{
      width = {width}; heads = {sizes.heads}
      q = x | linear(bias = true) | split
      k = x | linear(bias = true) | split
      v = x | linear(bias = true) | split
      out = o | merge | linear(bias = true)
    }}"""
    config = BertConfig(
        hidden_size=width, num_attention_heads=sizes.heads, attn_implementation="eager"
    )
    layer = BertAttention(config).eval()
    module = nn.ModuleDict({"self": layer.self, "dense": layer.output.dense})
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "dense"}
    table = {
        f"{ours}_proj.{kind}": f"{theirs}.{kind}"
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    return Pair(text, module, lambda x: module["dense"](module["self"](x)[0]), table)


def t5(sizes: Sizes) -> Pair:
    """Return unscaled scores with a learned bias for each bucket of distances.

    The longest distance is no power of two, so that no distance lies on a bucket's edge.
    """
    each, furthest = 8, 100  # buckets on a side, the first half of them one distance wide
    text = f"""block b {{
      width = {sizes.width}; heads = {sizes.heads}; head_dim = {sizes.head_dim}; scale = 1
      position = relative({2 * each}, {furthest})
    }}"""
    config = T5Config(
        d_model=sizes.width,
        num_heads=sizes.heads,
        d_kv=sizes.head_dim,
        relative_attention_num_buckets=2 * each,
        attn_implementation="eager",
        relative_attention_max_distance=furthest,
    )
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    table: dict[str, str | tuple[str, Callable[[Tensor], Tensor]]] = {
        f"{name}_proj.weight": f"{name}.weight" for name in "qkvo"
    }
    table["table"] = ("relative_attention_bias.weight", lambda weight: weight.mT)
    return Pair(text, module, lambda x: module(x)[0], table)


GATED = """mix gated {
  let beta = x | linear(heads) | sigmoid
  let time = x | linear(heads, bias = true) | softplus
  param rate[heads] = 0
  state S[head_dim, value_dim] = 0
  alpha <- exp(-exp(rate) * time)
  S <- alpha * (S - beta * outer(k, k @ S)) + beta * outer(k, v)
  o <- head_dim ** -0.5 * (q @ S)
}
"""


def qwen3_next(sizes: Sizes) -> Pair:
    """Return the gated delta rule with fewer heads of keys than of values.

    Their `in_proj_qkvz` holds for each key head the rows of its query, its key, its values and
    their gates, `in_proj_ba` those of betas, then of steps; one convolution runs over all.
    """
    keys, values, d, e = sizes.kv_heads, sizes.heads, sizes.head_dim, 5
    group = values // keys
    text = f"""{GATED}block b {{
      width = {sizes.width}; heads = {values}; kv_heads = {keys}; value_heads = {values}
      head_dim = {d}; value_dim = {e}; mix = gated; mask = causal
      let z = x | linear({values * e}) | silu | split
      q = x | linear({keys * d}) | conv(4) | silu | split({keys}) | l2_norm | repeat({group})
      k = x | linear | conv(4) | silu | split | l2_norm
      v = x | linear | conv(4) | silu | split
      out = o | rms_norm | gate(z) | merge | linear
    }}"""

    def rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight.unflatten(0, (keys, -1))[:, start:stop].flatten(0, 1)

    def channels(start: int, stop: int) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight[start:stop, 0]

    at, size = [0, d, 2 * d, 2 * d + group * e, 2 * (d + group * e)], keys * d
    table: Table = {
        **{
            f"{name}_proj.weight": ("in_proj_qkvz.weight", rows(*span))
            for name, span in zip("qkvz", pairwise(at), strict=True)
        },
        "q_conv.weight": ("conv1d.weight", channels(0, size)),
        "k_conv.weight": ("conv1d.weight", channels(size, 2 * size)),
        "v_conv.weight": ("conv1d.weight", channels(2 * size, 2 * size + values * e)),
        "beta_proj.weight": ("in_proj_ba.weight", rows(0, group)),
        "time_proj.weight": ("in_proj_ba.weight", rows(group, 2 * group)),
        "time_proj.bias": "dt_bias",
        "rate": "A_log",
        "o_norm.weight": "norm.weight",
        "o_proj.weight": "out_proj.weight",
    }
    config = Qwen3NextConfig(
        hidden_size=sizes.width,
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_key_head_dim=d,
        linear_value_head_dim=e,
        rms_norm_eps=1e-6,
    )
    module = Qwen3NextGatedDeltaNet(config, 0).eval()
    return Pair(text, module, module, table)


def mamba2(sizes: Sizes) -> Pair:
    """Return the state space model with one decay a head, as the zoo has it.

    Their `in_proj` holds the rows of the gate, the values, the keys, the queries and the steps,
    their convolution the channels of the middle three.
    """
    heads, state, e = sizes.heads, sizes.head_dim, 2 * sizes.width // sizes.heads
    text = (
        zoo.entry("mamba2").text
        + f"""block b : mamba2({state}) {{
      width = {sizes.width}; heads = {heads}; value_dim = {e}
    }}"""
    )

    def part(start: int, stop: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[start:stop, 0] if tensor.ndim == 3 else tensor[start:stop]

    wide = heads * e
    rows = [0, wide, 2 * wide, 2 * wide + state, 2 * (wide + state), 2 * (wide + state) + heads]
    channels = [each - wide for each in rows[1:5]]
    table: Table = {
        **{
            f"{name}_proj.weight": ("in_proj.weight", part(*span))
            for name, span in zip(("gate_", *"vkq", "time"), pairwise(rows), strict=True)
        },
        **{
            f"{name}_conv.{kind}": (f"conv1d.{kind}", part(*span))
            for name, span in zip("vkq", pairwise(channels), strict=True)
            for kind in ("weight", "bias")
        },
        "time_proj.bias": "dt_bias",
        "rate": "A_log",
        "skip": "D",
        "o_norm.weight": "norm.weight",
        "o_proj.weight": "out_proj.weight",
    }
    config = Mamba2Config(
        hidden_size=sizes.width,
        num_heads=heads,
        head_dim=e,
        expand=2,
        state_size=state,
        n_groups=1,
        conv_kernel=4,
        chunk_size=16,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
    )
    module = Mamba2Mixer(config, 0).eval()
    return Pair(text, module, module, table)


def diffllama(sizes: Sizes) -> Pair:
    """Return differential attention, as the zoo's but for the norm, where theirs learns nothing.

    Their first half of the heads is our `one`; each of our values is a head of either half.
    """
    pairs, dim = sizes.kv_heads, sizes.head_dim
    text = f"""{sizes.loom}; {sizes.rope}; value_dim = {2 * dim}; mask = causal
      v = x | linear | split
      param lambda_q1[head_dim] = normal(0.1)
      param lambda_k1[head_dim] = normal(0.1)
      param lambda_q2[head_dim] = normal(0.1)
      param lambda_k2[head_dim] = normal(0.1)
      branch one {{ q = x | linear | split; k = x | linear | split }}
      branch two {{ q = x | linear | split; k = x | linear | split }}
      let lambda_ = exp(dot(lambda_q1, lambda_k1)) - exp(dot(lambda_q2, lambda_k2)) + 0.2
      let rest = (one - lambda_ * two)
      out = rest | l2_norm(eps = {2 * dim} * 1e-5) | scale(0.8 * ({2 * dim}) ** 0.5)
        | merge | linear"""

    def half(at: int) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight.chunk(2)[at]

    def values(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (2, pairs, dim)).transpose(0, 1).flatten(0, 2)

    table = {
        f"{branch}_{name}_proj.weight": (f"{name}_proj.weight", half(at))
        for at, branch in enumerate(("one", "two"))
        for name in "qk"
    }
    given = sizes.config | {
        "num_attention_heads": 2 * sizes.heads,
        "num_key_value_heads": 2 * pairs,
    }
    config = DiffLlamaConfig(**given, rms_norm_eps=1e-5, attention_dropout=0.0)
    table |= {"v_proj.weight": ("v_proj.weight", values)}
    table |= same("o_proj.weight", *(f"lambda_{name}" for name in ("q1", "k1", "q2", "k2")))
    return decoder(text, config, DiffLlamaAttention, DiffLlamaRotaryEmbedding, table)


PAIRS = (
    llama, llama_biased, mistral, gemma2_local, gemma2_global, qwen3, gpt_oss_local,
    gpt_oss_global, deepseek_v3, deepseek_v3_halves, bert, t5, qwen3_next, mamba2,
    diffllama,
)  # fmt: skip


def randomise(module: nn.Module, seed: int) -> None:
    """Draw every parameter anew: matrices that keep the variance, vectors about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(1 + 0.5 * noise)


def translated(table: Table, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return their tensors (weights or gradients) under our names, none of theirs left out."""
    entries = {
        ours: (each, None) if isinstance(each, str) else each for ours, each in table.items()
    }
    assert {name for name, _ in entries.values()} == set(theirs)
    return {
        ours: theirs[name] if take is None else take(theirs[name])
        for ours, (name, take) in entries.items()
    }


def assert_near(
    ours: Tensor, theirs: Tensor, what: str, tolerance: float, scale: float = 1.0
) -> None:
    """Compare to the tolerance, relative to their largest number or `scale`, where above one."""
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max().item() / max(1.0, scale, theirs.abs().max().item())
    assert off <= tolerance, f"{what}: off by {off:.1e}"


def assert_gradients(module: nn.Module, expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare every gradient, that of a bias on the scale of its weight's.

    Both sum over the tokens, but a bias of keys moves all logits of a row alike: without
    positions its gradient is zero, and rounding of the summands is all there is of it.
    """
    ours = gradients(module)
    assert ours.keys() == expected.keys()
    for name, each in ours.items():
        beside = expected[name.replace(".bias", ".weight")]
        assert_near(
            each, expected[name], f"gradient of {name}", tolerance, scale=beside.abs().max().item()
        )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tokens", [17, 33])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_layer(pair: Callable[[Sizes], Pair], tokens: int, dtype: torch.dtype) -> None:
    seed = 100 * tokens + [each.__name__ for each in PAIRS].index(pair.__name__)
    with Widened() if dtype == torch.float64 else nullcontext():
        made = pair(Sizes.draw(seed))
        module = made.module.to(dtype)
        randomise(module, seed)
    block = hl.compile(hl.load(made.text, format="loom"), "b", dtype=dtype)
    block.load_state_dict(translated(made.table, dict(module.named_parameters())))

    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, tokens, block.o_proj.out_features)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    ours = block(x)
    ours.backward(upstream)
    of_x, x.grad = x.grad, None
    with Widened() if dtype == torch.float64 else nullcontext():
        theirs = made.run(x)
        theirs.backward(upstream)

    near = TOLERANCE[dtype]
    assert ours.dtype == theirs.dtype == dtype
    assert_near(ours, theirs, "output", near)
    assert_near(of_x, x.grad, "gradient of x", near)
    assert_gradients(block, translated(made.table, gradients(module)), near)


MODEL = """
block b {{ heads = 6; kv_heads = 2; position = rope(theta = 1e4); {more} }}
model tiny {{ vocab = 61; width = 48; layers = [b] * 2; ffn = swiglu(8 / 3) }}
"""
CONFIG = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 128,  # 8 · round(8/3 · 48 / 8)
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
NORMED = "q = x | linear | split | rms_norm; k = x | linear | split | rms_norm"
MODELS: dict[str, tuple[type, type, dict[str, Any], str]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, "mask = causal"),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW},
                f"mask = causal and window({WINDOW})"),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}, f"mask = causal; {NORMED}"),
}  # fmt: skip


def our_name(theirs: str) -> str:
    """Return our name of a parameter of their language models."""
    for old, new in {
        "model.": "",
        "self_attn": "attn",
        "mlp": "ffn",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        theirs = theirs.replace(old, new)
    return theirs


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    """Logits, gradients of the loss, and ten tokens decoded greedily with each one's cache."""
    config, made, more, settings = MODELS[name]
    tokens = torch.randint(61, (BATCH, 17), generator=torch.Generator().manual_seed(0))
    with Widened():
        theirs = made(config(**CONFIG, **more)).to(torch.float64).eval()
        randomise(theirs, seed=1)
        wanted = theirs(tokens).logits
        nn.functional.cross_entropy(wanted.flatten(0, 1), tokens.flatten()).backward()
        continued = theirs.generate(
            tokens[:1],
            attention_mask=torch.ones_like(tokens[:1]),
            do_sample=False,
            max_new_tokens=10,
            pad_token_id=0,
        )

    model = hl.compile(
        hl.load(MODEL.format(more=settings), format="loom"), "tiny", dtype=torch.float64
    )
    model.load_state_dict({our_name(key): each for key, each in theirs.state_dict().items()})
    logits = model(tokens)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert_near(logits, wanted, "logits", 1e-9)
    expected = {our_name(key): each for key, each in gradients(theirs).items()}
    assert_gradients(model, expected, 1e-9)

    cache = model.init_cache(batch=1, length=27)
    written = tokens[:1]
    with torch.no_grad():
        step = model(written, cache=cache)
        for _ in range(10):
            written = torch.cat([written, step[:, -1:].argmax(-1)], dim=1)
            step = model(written[:, -1:], cache=cache)
    assert written.tolist() == continued.tolist()
    assert len(set(written[0, 17:].tolist())) > 2  # not one token again and again

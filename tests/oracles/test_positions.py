"""Positions in Loom against the tables that Hugging Face Transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headloom.compiler.checking.check import check, find
from headloom.compiler.facts.parameters import constants, initial
from headloom.compiler.model import Block, applies
from headloom.grammar.parse import parse
from headloom.ops.rope_scaling import SCALINGS, Plain, scaling_of

pytest.importorskip("transformers", reason="needs Hugging Face Transformers")

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor


def slopes(heads: int) -> Tensor:
    block = find(check(parse(f"block a {{ heads = {heads}; head_dim = 2; score = alibi }}")), "a")
    assert isinstance(block, Block)
    (slope,) = constants(block)
    return initial(slope, torch.Generator(), torch.float64)


@pytest.mark.parametrize("heads", range(1, 65))
def test_alibi_has_the_slopes_of_bloom_and_mpt(heads: int) -> None:
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)  # slope · j
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0].double()  # slope · (j - 1)
    torch.testing.assert_close(slopes(heads), bloom[:, 0, 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes(heads), mpt, rtol=1e-6, atol=0)


def table(scaling: str, dims: int, tokens: int) -> tuple[Tensor, float]:
    """Return what our scaling, as it is written in a block, makes of `dims` turned features."""
    text = f"block a {{ heads = 1; head_dim = {dims}; q = x | linear | split | "
    block = find(check(parse(f"{text}rope(500, scaling = {scaling}) }}")), "a")
    assert isinstance(block, Block)
    (apply,) = (node for flow in block.flows for node in applies(flow) if node.op == "rope")
    row, values = scaling_of(dict(apply.options))
    plain = Plain(dims, 500, torch.full((1, 1, 1), tokens, dtype=torch.float64))
    return row.frequencies(plain, values).flatten(), row.gain(values)


SHORT, LONG = [1.0, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5], [1.0, 1.5, 2.5, 4, 8, 12, 20, 31.5]
LENGTH = 64
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear(4)", {"rope_type": "linear", "factor": 4.0}),
    "a number": ("4", {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ("dynamic(3, 64)", {"rope_type": "dynamic", "factor": 3.0}),
    "yarn": ("yarn(4, 64)", {"rope_type": "yarn", "factor": 4.0}),
    "yarn with all it takes": (
        "yarn(8, 64, beta_fast = 16, beta_slow = 2, truncate = false, attention_factor = 1.25)",
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False,
         "attention_factor": 1.25},
    ),
    "yarn of DeepSeek": (
        "yarn(40, 64, mscale = 1, mscale_all_dim = 0.707)",
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    ),
    "longrope": (
        f"longrope({SHORT}, {LONG}, 64, factor = 32)",
        {"rope_type": "longrope", "factor": 32.0, "short_factor": SHORT, "long_factor": LONG},
    ),
    "longrope with a gain": (
        f"longrope({SHORT}, {LONG}, 64, attention_factor = 1.1)",
        {"rope_type": "longrope", "factor": 1.0, "short_factor": SHORT, "long_factor": LONG,
         "attention_factor": 1.1},
    ),
    "llama3": (
        "llama3(8, 1, 4, 64)",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "proportional": (
        "proportional(0.3)", {"rope_type": "proportional", "partial_rotary_factor": 0.3},
    ),
    "proportional and slower": (
        "proportional(1, 2)",
        {"rope_type": "proportional", "partial_rotary_factor": 1.0, "factor": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [7, LENGTH, LENGTH + 1, 5 * LENGTH])
@pytest.mark.parametrize("name", TABLES)
def test_the_frequencies_of_rope(name: str, tokens: int) -> None:
    scaling, parameters = TABLES[name]
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=1,
        head_dim=16,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": 500.0, "original_max_position_embeddings": LENGTH}
        | parameters,
    )
    theirs, gain = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=tokens)
    mine, my_gain = table(scaling, 16, tokens)
    torch.testing.assert_close(mine, theirs.double(), rtol=1e-5, atol=1e-9)
    assert my_gain == pytest.approx(gain)


def test_every_scaling_has_a_table() -> None:
    assert {each["rope_type"] for _, each in TABLES.values()} == SCALINGS.keys()
    assert SCALINGS.keys() <= ROPE_INIT_FUNCTIONS.keys()

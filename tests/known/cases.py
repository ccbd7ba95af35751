"""Tiny configurations of every kind that is read, and their models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LOCAL, FULL = "sliding_attention", "full_attention"
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def turning(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


PARTLY = {"rope_parameters": turning(1e4, partial_rotary_factor=0.5)}
WINDOWS = {"sliding_window": 5, "layer_types": [LOCAL, FULL]}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 6, "sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 6, "use_sliding_window": True, "max_window_layers": 1, **WINDOWS},
}


def kind(case: str) -> str:
    """Return the kind of a case: what stands before a slash."""
    return case.partition("/")[0]


def configured(case: str) -> Any:
    """Return their configuration of a case."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind(case)](**{**SIZES, **CASES[case]})


def made(case: str, attention: str = "eager") -> nn.Module:
    """Return their model of a case, all of its weights random."""
    from transformers import AutoModelForCausalLM

    config = configured(case)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in [*model.named_parameters(), *model.named_buffers()]:
            drawn = torch.randn(each.shape, generator=generator)
            if name.endswith(BIASES):
                each.copy_(0.2 * drawn)
            elif isinstance(each, nn.Parameter):
                each.copy_(0.3 * drawn + (0.8 if each.ndim == 1 and "norm" in name else 0))
    return model


BIASES = ("correction_bias", "balancing_biases")

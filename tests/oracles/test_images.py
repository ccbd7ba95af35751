"""A model of images in Loom against the one that Hugging Face Transformers ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import headloom as hl

from .models import moved, rows
from .test_transformers import assert_near, gradients, randomise

transformers = pytest.importorskip("transformers", reason="needs Hugging Face Transformers")

FILE = Path(__file__).parents[2] / "examples" / "models" / "siglip.loom"
ROWS = rows("""
    embeddings.patch_embedding.{t} -> patch_embed.{t}
    embeddings.position_embedding.weight -> embed_positions.weight
    post_layernorm.{t} -> norm.{t}
    encoder.layers.{i}.layer_norm1.{t} -> layers.{i}.attn_norm.{t}
    encoder.layers.{i}.layer_norm2.{t} -> layers.{i}.ffn_norm.{t}
    encoder.layers.{i}.self_attn.out_proj.{t} -> layers.{i}.attn.o_proj.{t}
    encoder.layers.{i}.self_attn.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
    encoder.layers.{i}.mlp.fc1.{t} -> layers.{i}.ffn.up_proj.{t}
    encoder.layers.{i}.mlp.fc2.{t} -> layers.{i}.ffn.down_proj.{t}
""")


def test_siglip_gives_the_same_features_and_gradients() -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        image_size=12, patch_size=4, vision_use_head=False,
    )  # fmt: skip
    theirs = transformers.SiglipVisionModel(config).to(torch.float64).eval()
    randomise(theirs, seed=1)
    ours = hl.compile(hl.load(FILE), "siglip", dtype=torch.float64).eval()
    shapes = {key: tuple(each.shape) for key, each in ours.named_parameters()}
    with torch.no_grad():
        ours.load_state_dict(moved(ROWS, dict(theirs.named_parameters()), shapes))
    images = torch.randn(
        2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    y, z = ours(images), theirs(images).last_hidden_state
    assert_near(y, z, "features", 1e-9)
    for each in (y, z):
        (each**2).sum().backward()
    expected = moved(ROWS, gradients(theirs), shapes)
    for key, each in gradients(ours).items():
        assert_near(each, expected[key], f"gradient of {key}", 1e-9)

"""Positions in Loom against the tables that Hugging Face Transformers computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headloom.compiler.check import check, find
from headloom.compiler.model import Block
from headloom.compiler.parameters import constants, initial
from headloom.grammar.parse import parse

pytest.importorskip("transformers", reason="needs Hugging Face Transformers")

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

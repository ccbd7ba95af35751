"""Dtypes by name and as PyTorch has them, everywhere one is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import headloom as hl
from headloom.compiler.facts.dtypes import BYTES, named, of_torch, size

ARCH = hl.load(
    "block a { width = 8; heads = 2; mask = causal }\n"
    "model m { vocab = 8; width = 8; layers = [a] }",
    format="loom",
)


@pytest.mark.parametrize("name", BYTES)
def test_names_and_dtypes_are_the_same(name: str) -> None:
    own = getattr(torch, name)
    assert named(name) == named(own) == named(f"torch.{name}") == name
    assert of_torch(name) is of_torch(own) is own
    assert size(name) == size(own) == own.itemsize
    assert of_torch(None) is None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_modules_and_costs_take_both(dtype: Any) -> None:
    for make in (hl.compile, hl.reference):
        module = make(ARCH, "a", dtype=dtype)
        assert {each.dtype for each in module.parameters()} == {torch.bfloat16}
    for name in ("a", "m"):
        report = hl.explain(ARCH, name)
        for cost in (report.cache_bytes, report.activation_bytes):
            assert cost(tokens=8, dtype=dtype) == cost(tokens=8) // 2


USES: dict[str, Callable[[Any], Any]] = {
    "compile": lambda dtype: hl.compile(ARCH, "a", dtype=dtype),
    "reference": lambda dtype: hl.reference(ARCH, "a", dtype=dtype),
    "cache_bytes": lambda dtype: hl.explain(ARCH, "a").cache_bytes(tokens=8, dtype=dtype),
    "activation_bytes": lambda dtype: hl.explain(ARCH, "m").activation_bytes(8, dtype=dtype),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", ["bf16", torch.int64, 16, float])
def test_a_wrong_one_lists_the_choices(use: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match='"float64", "float32", "bfloat16", "float16"'):
        USES[use](dtype)

"""What a module refuses to compute with, in words of ours."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from headloom.compiler.api import compile, load

ARCH = load(
    """
    block a { heads = 2; mask = causal; score = softcap(50) }
    block cross { heads = 2; source = context }
    block bare { width = 16; heads = 2; q = x | split; k = q; v = q; out = o | merge }
    model tokens_ { vocab = 11; width = 16; layers = [a] }
    model features_ { width = 16; layers = [a] }
    """,
    format="loom",
)
TOKENS = torch.randint(11, (2, 3), generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    block = name in ("a", "cross")
    return compile(ARCH, name, width=16 if block else None, backend="torch", dtype=dtype).eval()


def changed(at: tuple[int, int], token: int) -> Tensor:
    tokens = TOKENS.clone()
    tokens[at] = token
    return tokens


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (TOKENS.float(), "`tokens` must be torch.int64 or torch.int32, they are torch.float32"),
        (TOKENS.byte(), "`tokens` must be torch.int64 or torch.int32, they are torch.uint8"),
        (TOKENS[0], "`tokens` must be [b, n], it is [3]"),
        (changed((1, 2), 11), "token [1, 2] is 11, the vocabulary has 0 to 10"),
        (changed((0, 1), -1), "token [0, 1] is -1, the vocabulary has 0 to 10"),
    ],
)
def test_what_is_no_token_is_named(tokens: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        made("tokens_")(tokens)


def test_tokens_of_32_bits_and_traced_ones_are_fine() -> None:
    module = made("tokens_")
    expected = module(TOKENS)
    torch.testing.assert_close(module(TOKENS.int()), expected)
    program = torch.export.export(module, (TOKENS,))
    torch.testing.assert_close(program.module()(TOKENS), expected)
    both = torch.func.vmap(module)(torch.stack([TOKENS, TOKENS]))
    torch.testing.assert_close(both[1], expected)


@pytest.mark.parametrize("name", ["a", "features_"])
@pytest.mark.parametrize(
    ("x", "dtype", "said"),
    [
        (X.long(), torch.float32, "`x` must be features in floating point, it is torch.int64"),
        (X.double(), torch.float32, "`x` is torch.float64, the module torch.float32: "),
        (X, torch.bfloat16, "`x` is torch.float32, the module torch.bfloat16: "),
        (X[..., :15], torch.float32, "`x` must be [b, tokens, 16], it is [2, 3, 15]"),
    ],
)
def test_features_of_another_kind_are_named(
    name: str, x: Tensor, dtype: torch.dtype, said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        made(name, dtype)(x)


def test_so_is_a_context() -> None:
    with pytest.raises(ValueError, match=r"`context` is torch\.float64, the module torch\.float32"):
        made("cross")(X, context=X.double())


def test_what_can_be_computed_in_another_dtype_is() -> None:
    module = made("a")
    with torch.autocast("cpu", torch.bfloat16):
        assert module(X).dtype == module(X.bfloat16()).dtype == torch.bfloat16
    mixed = made("a").bfloat16()
    mixed.o_proj.float()
    mixed.o_proj.register_forward_pre_hook(lambda _, given: given[0].float())
    assert mixed(X.bfloat16()).dtype == torch.float32
    assert made("bare")(X.double()).dtype == torch.float64

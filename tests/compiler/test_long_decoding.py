"""Thousands of tokens, one by one: a window and a recurrence hold the same memory throughout."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

import headloom as hl

WINDOW = 16
TEXT = f"""
block near {{ heads = 2; position = rope; mask = causal and window({WINDOW}) }}
block delta {{
  heads = 2
  q    = x | linear | conv(4) | silu | split | l2_norm
  k    = x | linear | conv(4) | silu | split | l2_norm
  v    = x | linear | conv(4) | silu | split
  mix  = gated_delta
  mask = causal
}}
model hybrid {{ vocab = 64; width = 32; layers = [delta, near] }}
model recurrent {{ vocab = 64; width = 32; layers = [delta] * 2 }}
"""


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    arch = hl.load(TEXT, format="loom")
    return hl.compile(arch, name, backend="torch", dtype=dtype, seed=0).eval()


def held(cache: list) -> int:
    return sum(each.nbytes for each in cache)


def live_tensors() -> int:
    """Return the bytes of all storages that a tensor in this process still holds."""
    gc.collect()
    tensors = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in tensors
        if each.layout == torch.strided and not is_functorch_wrapped_tensor(each)
    }
    return sum(storages.values())


def resident() -> int:
    """Return the bytes of this process in memory; 0 where the system does not say."""
    said = Path("/proc/self/statm")
    return 4096 * int(said.read_text().split()[1]) if said.is_file() else 0


def memory() -> tuple[int, int, int]:
    """Return the bytes of tensors, the blocks of Python objects, the bytes of the process."""
    return live_tensors(), sys.getallocatedblocks(), resident()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2000, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_memory_stays_where_it_is(tokens: int) -> None:
    name, early = "hybrid", 500
    module = made(name)
    cache = module.init_cache(1, tokens)
    promised = hl.explain(hl.load(TEXT, format="loom"), name).cache_bytes
    token, written = torch.zeros(1, 1, dtype=torch.long), set()
    before = memory()
    with torch.no_grad():
        for step in range(1, tokens + 1):
            token = (module(token, cache=cache)[:, -1:].argmax(-1) + step) % 64
            written.add(token.item())
            if step >= WINDOW and step % 100 == 0:
                assert held(cache) == promised(tokens=step) == promised(tokens=tokens)
            if step == early:
                before = memory()
    after = memory()
    assert cache.length == tokens
    assert len(written) > 32  # it went somewhere
    assert after[0] == before[0]
    assert after[1] - before[1] < (tokens - early) // 4  # not one object for each token
    assert after[2] - before[2] < 32 << 20


@pytest.mark.parametrize("name", ["hybrid", "recurrent"])
def test_steps_chunks_and_all_at_once_agree(name: str) -> None:
    module = made(name, torch.float64)
    tokens = torch.randint(64, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = module(tokens)
        for sizes in ([1] * 150, [64, 64, 22], [100] + [1] * 50, [1, 7, 65, 1, 76]):
            cache = module.init_cache(2, 150)
            parts = [module(part, cache=cache) for part in tokens.split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)

"""The example backend of SGLang, on pools of tokens as it keeps them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import headloom as hl

FILE = Path(__file__).parent.parent.parent / "examples" / "serving" / "sglang_backend.py"
TEXT = "block capped { score = 2 * tanh(s / 2); mask = causal and window(4) }"
NAMES = {
    "srt.layers.attention.attention_registry": {"ATTENTION_BACKENDS": {}},
    "srt.layers.attention.base_attn_backend": {"AttentionBackend": object},
    "srt.layers.radix_attention": {"RadixAttention": object},
    "srt.model_executor.forward_batch_info": {"ForwardBatch": object},
    "srt.model_executor.model_runner": {"ModelRunner": object},
}


class Pool:
    """Keys and values of all requests in one list of slots, as a layer of SGLang has them."""

    def __init__(self, slots: int) -> None:
        self.keys, self.values = torch.zeros(slots, 2, 8), torch.zeros(slots, 2, 8)

    def set_kv_buffer(self, _layer: object, at: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys[at], self.values[at] = k, v

    def get_key_buffer(self, _layer: int) -> Tensor:
        return self.keys

    def get_value_buffer(self, _layer: int) -> Tensor:
        return self.values


@pytest.fixture
def backend(monkeypatch, tmp_path):
    for name, content in NAMES.items():
        module = ModuleType(f"sglang.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"sglang.{name}", module)
    spec = importlib.util.spec_from_file_location("sglang_backend", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "mine.loom").write_text(TEXT)
    module.register("loom", str(tmp_path / "mine.loom"))
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0)).view(2, 20)
    tokens = SimpleNamespace(req_to_token=slots)
    runner = SimpleNamespace(req_to_token_pool=tokens, token_to_kv_pool=Pool(40))
    return module.ATTENTION_BACKENDS["loom"](runner)


def test_extension_and_decoding_are_those_of_whole_sequences(backend):
    draw = torch.Generator().manual_seed(1)
    lengths, prompts = (9, 6), (7, 4)
    q, k, v = ([torch.randn(n, heads, 8, generator=draw) for n in lengths] for heads in (4, 2, 2))
    attend = hl.attention(hl.load(TEXT, format="loom"))
    whole = [
        attend(*(x.transpose(0, 1)[None] for x in each), scale=0.3)[0].transpose(0, 1).flatten(1)
        for each in zip(q, k, v, strict=True)
    ]
    layer = SimpleNamespace(
        layer_id=0, tp_q_head_num=4, qk_head_dim=8, scaling=0.3, is_cross_attention=False
    )
    slots = backend.tokens.req_to_token

    def call(method, since, until, **more):
        at = torch.cat(
            [slots[row, a:e] for row, (a, e) in enumerate(zip(since, until, strict=True))]
        )
        batch = SimpleNamespace(
            seq_lens=torch.tensor(until), req_pool_indices=torch.arange(2), out_cache_loc=at, **more
        )
        new = (
            torch.cat([x[a:e] for x, a, e in zip(each, since, until, strict=True)])
            for each in (q, k, v)
        )
        queries, *others = new
        got = method(queries.flatten(1), *others, layer, batch)
        expected = torch.cat([y[a:e] for y, a, e in zip(whole, since, until, strict=True)])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    half = (3, 2)
    call(backend.forward_extend, (0, 0), half, extend_seq_lens=torch.tensor(half))
    rest = torch.tensor(prompts) - torch.tensor(half)
    call(backend.forward_extend, half, prompts, extend_seq_lens=rest)
    for step in range(2):
        since = tuple(each + step for each in prompts)
        call(backend.forward_decode, since, tuple(each + 1 for each in since))

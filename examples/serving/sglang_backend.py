"""A block of ours as an attention backend of SGLang: scores, masks and normalisers that it has not.

    import sglang
    from sglang_backend import register

    register("loom", "mine.loom", "local")
    engine = sglang.Engine(model_path="meta-llama/Llama-3.2-1B", attention_backend="loom",
                           disable_cuda_graph=True)

Queries, keys and values are the model's, the paged pool of keys is SGLang's; what queries make of
keys is the block's. Requests are gone through one after the other, as SGLang's own backend of plain
PyTorch does: this is for trying a mechanism on a served model, not for throughput.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from torch import Tensor

import headloom as hl


class LoomBackend(AttentionBackend):
    """Attends as a block says, request by request."""

    def __init__(self, runner: ModelRunner, attend: Any) -> None:
        super().__init__()
        if runner.req_to_token_pool is None:
            raise ValueError("the runner has made no pool of tokens yet")
        self.attend = attend
        self.tokens, self.pool = runner.req_to_token_pool, runner.token_to_kv_pool

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Nothing is prepared: no state is kept between calls."""

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        """Return what the new tokens of every request get [tokens, heads · value_dim]."""
        counts = forward_batch.extend_seq_lens
        if counts is None:
            raise ValueError("an extension without its lengths")
        return self._made(q, k, v, layer, forward_batch, counts.tolist(), save_kv_cache)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        """Return what one more token of every request gets."""
        counts = [1] * len(forward_batch.seq_lens)
        return self._made(q, k, v, layer, forward_batch, counts, save_kv_cache)

    def support_triton(self) -> bool:
        """Tell SGLang that its own kernels are not called from here."""
        return False

    def _made(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        counts: list[int],
        keep: bool,
    ) -> Tensor:
        if layer.is_cross_attention:
            raise ValueError("cross attention has its own backend")
        if keep and batch.out_cache_loc is not None:
            self.pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        done = [
            self.attend(*(_heads(x).to(q.dtype) for x in each), scale=layer.scaling)
            for each in self._requests(queries, layer, batch, counts)
        ]
        return torch.cat([each[0].transpose(0, 1).flatten(1) for each in done])

    def _requests(
        self, queries: Tensor, layer: RadixAttention, batch: ForwardBatch, counts: list[int]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the new queries of each request, and its keys and values so far: [tokens, h, d]."""
        keys = self.pool.get_key_buffer(layer.layer_id)
        values = self.pool.get_value_buffer(layer.layer_id)
        rows, lengths = batch.req_pool_indices.tolist(), batch.seq_lens.tolist()
        for new, row, length in zip(torch.split(queries, counts), rows, lengths, strict=True):
            slots = self.tokens.req_to_token[row, :length]
            yield new, keys[slots], values[slots]


def _heads(x: Tensor) -> Tensor:
    """Return [tokens, h, d] as one row of heads [1, h, tokens, d]."""
    return x.transpose(0, 1)[None]


def register(name: str, description: str, block: str | None = None) -> None:
    """Register a block's attention with SGLang, as `attention_backend=name`."""
    attend = hl.attention(description, block)

    def make(runner: ModelRunner) -> AttentionBackend:
        return LoomBackend(runner, attend)

    ATTENTION_BACKENDS[name] = make

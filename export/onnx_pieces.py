"""Functions of an emitted file that ONNX has as one operator, or does not have as they are.

Their text is put behind that of the file while it is traced. `plain_…` is what the file has.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..compiler.pieces.positions import rope as plain_rope
from ..compiler.pieces.positions import rope_interleaved as plain_rope_interleaved


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, last: bool = False, gain: float = 1.0
) -> Tensor:
    """Turn feature pairs (c, c + r/2) by `RotaryEmbedding`, where all heads turn alike."""
    if frequencies.ndim > 1 or x.ndim not in (3, 4):
        return plain_rope(x, positions, frequencies, last, gain)
    return rotary(x, positions, frequencies, last, gain, False)


def rope_interleaved(
    x: Tensor, positions: Tensor, frequencies: Tensor, last: bool = False, gain: float = 1.0
) -> Tensor:
    """Turn feature pairs (2c, 2c + 1) by `RotaryEmbedding`, where all heads turn alike."""
    if frequencies.ndim > 1 or x.ndim not in (3, 4):
        return plain_rope_interleaved(x, positions, frequencies, last, gain)
    return rotary(x, positions, frequencies, last, gain, True)


def rotary(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    last: bool,
    gain: float,
    interleaved: bool,
) -> Tensor:
    """Turn the first or last features of x [b, (h,) n, d] by angles [(b,) n, r/2]."""
    turned = 2 * frequencies.shape[-1]
    still = x.shape[-1] - turned
    angle = positions.to(torch.float64)[..., None] * frequencies
    angle = angle.expand(x.shape[0], -1, -1)
    cos, sin = (angle.cos() * gain).to(x.dtype), (angle.sin() * gain).to(x.dtype)
    heads = x if x.ndim == 4 else x[:, None]
    part = heads[..., still:] if last else heads
    done = torch.onnx.ops.rotary_embedding(
        part,
        cos,
        sin,
        interleaved=interleaved,
        rotary_embedding_dim=0 if last or not still else turned,
    )
    if last and still:
        done = torch.cat([heads[..., :still], done], dim=-1)
    return done if x.ndim == 4 else done[:, 0]


def level_between(i: Tensor, j: Tensor) -> Tensor:
    """Return how many bits i xor j has, by powers of two: ONNX takes no number apart."""
    powers = torch.tensor([2**bit for bit in range(62)], device=i.device)
    return ((i ^ j)[..., None] >= powers).sum(-1)


PIECES = (rope, rope_interleaved, level_between)


def with_operators(text: str) -> str:
    """Return the text of a file in which functions are operators of ONNX."""
    found = [each for each in PIECES if f"\ndef {each.__name__}(" in text]
    if not found:
        return text
    kept = [f"plain_{each.__name__} = {each.__name__}" for each in found]
    own = [rotary] if {rope, rope_interleaved} & set(found) else []
    return "\n\n\n".join([text, *kept, *map(inspect.getsource, (*own, *found))])

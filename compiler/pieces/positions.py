"""Positions of tokens: features turned by angles, and the frequencies of the angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, last: bool = False, gain: float = 1.0
) -> Tensor:
    """Turn the feature pairs (c, c + r/2) of x [b, (h,) n, d] by angles that grow with position.

    The first r features turn, or the last; frequencies [..., r/2] are angles a position.
    """
    turned = 2 * frequencies.shape[-1]
    still = x.shape[-1] - turned
    part = x[..., still:] if last else x[..., :turned]
    cos, sin = rope_angles(x, positions, frequencies, gain)
    a, b = part.chunk(2, dim=-1)
    done = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    if still == 0:
        return done
    return torch.cat([x[..., :still], done] if last else [done, x[..., turned:]], dim=-1)


def rope_interleaved(
    x: Tensor, positions: Tensor, frequencies: Tensor, last: bool = False, gain: float = 1.0
) -> Tensor:
    """Turn the feature pairs (2c, 2c + 1) of x [b, (h,) n, d] by angles that grow with position.

    The first r features turn, or the last; frequencies [..., r/2] are angles a position.
    """
    turned = 2 * frequencies.shape[-1]
    still = x.shape[-1] - turned
    part = x[..., still:] if last else x[..., :turned]
    cos, sin = rope_angles(x, positions, frequencies, gain)
    a, b = part[..., 0::2], part[..., 1::2]
    done = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    if still == 0:
        return done
    return torch.cat([x[..., :still], done] if last else [done, x[..., turned:]], dim=-1)


def rope_angles(
    x: Tensor, positions: Tensor, frequencies: Tensor, gain: float
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [(b, 1,) n, r/2], times a gain, for positions [n] or [b, n]."""
    angle = positions.to(torch.float64)[..., None] * frequencies
    if positions.ndim == 2 and x.ndim == 4:
        angle = angle[:, None]
    return (angle.cos() * gain).to(x.dtype), (angle.sin() * gain).to(x.dtype)


def rope_frequencies(
    positions: Tensor, turned: int, theta: float | Tensor, factor: float = 1.0
) -> Tensor:
    """Return theta ** (-2c / r) / factor for the r/2 pairs of r turned features."""
    power = torch.arange(0, turned, 2, dtype=torch.float64, device=positions.device) / turned
    return theta**-power / factor


def dynamic_frequencies(
    positions: Tensor, turned: int, theta: float, factor: float, length: int
) -> Tensor:
    """Return the frequencies of a base that grows once a sequence is longer than `length`."""
    stretch = (tokens_up_to(positions) / length).clamp(min=1.0)
    base = theta * (factor * (stretch - 1) + 1) ** (turned / (turned - 2))
    return rope_frequencies(positions, turned, base)


def yarn_frequencies(
    positions: Tensor,
    turned: int,
    theta: float,
    factor: float,
    length: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
) -> Tensor:
    """Divide by `factor` the frequencies that make few turns in `length` tokens, and blend.

    From `beta_fast` turns up a pair keeps its frequency, from `beta_slow` down it is divided; in
    between the share is linear in the number of the pair.
    """
    low, high = (
        turned * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (beta_fast, beta_slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    width = high - low if high != low else 0.001
    fast = rope_frequencies(positions, turned, theta)
    pairs = torch.arange(turned // 2, dtype=torch.float64, device=positions.device)
    share = ((pairs - low) / width).clamp(0, 1)
    return torch.lerp(fast, fast / factor, share)


def longrope_frequencies(
    positions: Tensor,
    turned: int,
    theta: float,
    short: tuple[float, ...],
    long: tuple[float, ...],
    length: int,
) -> Tensor:
    """Divide each frequency by a factor of its own, another in sequences beyond `length`."""
    plain = rope_frequencies(positions, turned, theta)
    beyond = tokens_up_to(positions) > length
    return plain / torch.where(beyond, plain.new_tensor(long), plain.new_tensor(short))


def llama3_frequencies(
    positions: Tensor,
    turned: int,
    theta: float,
    factor: float,
    low: float,
    high: float,
    length: int,
) -> Tensor:
    """Divide by `factor` what makes few turns in `length` tokens; blend from `low` to `high`."""
    fast = rope_frequencies(positions, turned, theta)
    turns = length * fast / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(fast / factor, fast, share)


def proportional_frequencies(
    positions: Tensor, turned: int, theta: float, share: float, factor: float = 1.0
) -> Tensor:
    """Return the frequencies of the first `share` of the pairs; the others stand still."""
    all_pairs = rope_frequencies(positions, turned, theta, factor)
    turning = torch.arange(turned // 2, device=positions.device) < int(share * turned // 2)
    return torch.where(turning, all_pairs, 0)


def tokens_up_to(positions: Tensor) -> Tensor:
    """Return how long each sequence is, (b,) 1, 1: its largest position, and one."""
    if not positions.shape[-1]:
        return positions.new_zeros(*positions.shape[:-1], 1, 1, dtype=torch.float64)
    return positions.amax(dim=-1, keepdim=True)[..., None].to(torch.float64) + 1


def sinusoidal(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return sines and cosines of positions [(b,) n] at falling frequencies: [(b,) n, width]."""
    power = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    angle = positions[..., None].to(torch.float64) * 10_000**-power
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width].to(dtype)


def places_of(positions: Tensor, x: Tensor) -> Tensor:
    """Return positions [(b,) n] as numbers of the tokens of x [b, (heads,) n, d]: [b, n, 1]."""
    whole = positions.expand(x.shape[0], x.shape[-2])
    return whole[..., None].to(torch.promote_types(x.dtype, torch.float32))

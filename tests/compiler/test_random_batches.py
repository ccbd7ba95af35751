"""Batches of blocks drawn at random: every sequence is what it is alone, to 1e-9.

A draw takes a mask, a position, a score, a normaliser, weights, stages and an output, or a
recurrence, each from a list; what the checker refuses is drawn again.
"""

from __future__ import annotations

from random import Random

import pytest

import headloom as hl
from headloom.compiler.model import Block
from headloom.compiler.verify.batches import as_if_alone, rows_of_a_cache
from headloom.compiler.verify.cases import Subject

MASKS = ("all", "causal", "causal and window(4)", "causal and (window(3) or sink(2))",
         "window(3)", "causal and document", "causal and strided(2)", "blocks(3)",
         "causal or blocks(3)", "power", "h < 1 or causal", "j < i")  # fmt: skip
POSITIONS = ("none", "rope", "alibi", "relative(8, 20)", "rope(theta = 100)")
SCORES = ("s", "softcap(4)", "s + 0.1 * log(1 + j)", "s + c[i, h] * 0.1", "temperature",
          "s - 0.1 * abs(i - j) ** 0.5", "s + 0.1 * sum_keys(s) / seen",
          "s * log(m + 1)")  # fmt: skip
NORMALIZERS = ("softmax", "softmax_plus_one", "sink", "sigmoid", "relu", "squared_relu",
               "entmax(1.5)", "sparsemax")  # fmt: skip
WEIGHTS = ("p", "p", "p * c[j, h]", "p - 0.1 * mean_keys(p)", "p * sum_queries(p)")
QUERIES = ("x | linear | split", "x | conv(3) | linear | split", "x | linear | conv(2) | split",
           "x | linear | split | rms_norm",
           "x | linear | conv(3, causal = false) | split")  # fmt: skip
OUTS = ("o | merge | linear", "(o - 0.3 * rows(o, p)) | merge | linear",
        "(o - (o | mean_tokens)) | merge | linear", "o | gate(g) | merge | linear",
        "(o - 0.1 * columns(o, p)) | merge | linear")  # fmt: skip
MIXERS = ("linear", "gated_delta", "fading", "summed", "twice", "ema", "sequential", "before")
MIXES = """
mix fading { let a = x | linear(heads) | sigmoid; state S[head_dim, value_dim] = 0
  S <- a * S + outer(k, v); o <- q @ S }
mix summed { state z[head_dim] = 0.5; z <- 0.9 * z + exp(k); o <- q * z }
mix twice { let a = x | linear(heads) | sigmoid; state S[head_dim, value_dim] = 0
  S <- a * S + outer(k, v) + outer(q, v); o <- q @ S }
mix ema { let a = x | linear(heads * head_dim) | sigmoid | split; state S[head_dim, value_dim] = 0
  S <- a * S + outer((1 - a) * k, v); o <- q @ S }
mix sequential { state S[head_dim, value_dim] = 0.1; S <- tanh(S + outer(k, v)); o <- q @ S }
mix before { state S[head_dim, value_dim] = 0; o <- q @ S + v; S <- 0.8 * S + outer(k, v) }
"""


def drawn(seed: int) -> str:
    """Return the text of a block."""
    draw = Random(seed)
    lines = [
        "width = 12; heads = 2; head_dim = 4",
        "let c = x | linear(heads) | sigmoid",
        "let g = x | linear(heads * value_dim) | sigmoid | split",
    ]
    lines += [f"{name} = {draw.choice(QUERIES)}" for name in "qkv"]
    if draw.random() < 0.35:
        mixer = draw.choice(MIXERS)
        causal = mixer not in ("linear",) or draw.random() < 0.6
        mask = "causal" if causal else "all"
        lines += [f"mix = {mixer}", f"mask = {mask}{draw.choice((' and document', ''))}"]
        lines.append(f"out = {draw.choice((OUTS[0], OUTS[2], OUTS[3]))}")
    else:
        lines += [
            f"kv_heads = {draw.choice((1, 2))}",
            f"mask = {draw.choice(MASKS)}",
            f"position = {draw.choice(POSITIONS)}",
            f"score = {draw.choice(SCORES)}",
            f"normalize = {draw.choice(NORMALIZERS)}",
            f"weights = {draw.choice(WEIGHTS)}",
            f"out = {draw.choice(OUTS)}",
        ]
        if draw.random() < 0.2:
            lines.append("source = context")
        if draw.random() < 0.2:
            lines.append("branch b { mask = causal; normalize = softmax; score = s; weights = p }")
            lines[-2] = "out = (o + b) | merge | linear"
    return f"{MIXES}\nblock drawn {{\n  " + "\n  ".join(lines) + "\n}"


def subject(seed: int) -> Subject:
    while True:
        try:
            what = hl.load(drawn(seed), format="loom").blocks["drawn"]
        except hl.LoomError:
            seed += 10_000
            continue
        assert isinstance(what, Block)
        return Subject.of(what)


@pytest.mark.parametrize("seed", range(10))
def test_some_blocks(seed: int) -> None:
    _, worst = as_if_alone(subject(seed))
    assert worst <= 1e-9


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(500))
def test_many_blocks(seed: int) -> None:
    found = subject(seed)
    _, worst = as_if_alone(found)
    assert worst <= 1e-9
    rows = rows_of_a_cache(found)
    assert isinstance(rows, str) or rows[1] <= 1e-9

"""Random blocks: format → parse → check → compile equals the reference, forward and backward."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headloom.compiler.checking.check import block as block_of
from headloom.compiler.checking.check import check
from headloom.grammar.format import format_loom
from headloom.grammar.parse import parse

from .battery import MIXERS, compiled, inputs, oracle
from .test_masks import random_mask

SCORES = ["s", "softcap(3)", "alibi", "temperature", "alibi | softcap(2)", "s - 0.1 * abs(i - j)",
          "s + t[clip(i - j, 0, 4), h]", "s * (1 + tanh(g[i, h]))", "s + log(1 + seen) * g[j, 0]",
          "where(i - j < 3, s, s / 2)"]  # fmt: skip
NORMALIZERS = ["softmax", "softmax_plus_one", "sink", "sigmoid", "sigmoid(b = -1)", "relu",
               "squared_relu", "entmax(1.5)", "sparsemax", "exp(s / 2) / (2 + sum)"]  # fmt: skip
WEIGHTS = ["p", "p", "0.5 * p + 0.1", "p * p"]
POSITIONS = ["none", "rope", "rope(100)", "rope(dims = 2)", "rope(style = interleaved)",
             "rope(50, dims = -2, scaling = 2)"]  # fmt: skip
NORMS = ["", " | rms_norm", " | l2_norm", " | layer_norm"]
OUTS = ["o | merge | linear", "o | merge | gate(e) | linear", "o | rms_norm | merge | linear",
        "(o * 2) | gate(g) | merge | linear"]  # fmt: skip
MIXES = ["linear", "gated_delta", "leaky(0.5)", "odd"]


def random_block(seed: int) -> str:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2])
    heads = kv_heads * draw.choice([1, 2])
    lines = [
        f"heads = {heads}; kv_heads = {kv_heads}",
        "head_dim = 4",
        f"value_dim = {draw.choice([3, 4])}",
        "let g = x | linear(heads) | " + draw.choice(["silu", "tanh"]),
        "let e = x | linear(heads * value_dim) | sigmoid",
        "param t[5, heads] = normal(0.3)",
        f"q = x | linear | split{draw.choice(NORMS)}",
        f"k = x | linear | split{draw.choice(NORMS)}",
        f"position = {draw.choice(POSITIONS)}",
        f"out = {draw.choice(OUTS)}",
    ]
    if draw.random() < 0.2:
        mask = draw.choice(["causal", "causal and document"])
        return "\n".join([*lines, f"mix = {draw.choice(MIXES)}", f"mask = {mask}"])
    mask = random_mask(draw, 2)
    mask = mask if draw.random() < 0.5 else f"(causal or i == j) and ({mask} or i == j)"
    lines += [
        f"score = {draw.choice(SCORES)}",
        f"normalize = {draw.choice(NORMALIZERS)}",
        f"weights = {draw.choice(WEIGHTS)}",
        f"mask = {mask} or i == j + 1",
    ]
    return "\n".join(lines)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 2**32).map(random_block))
def test_a_random_block_is_what_it_means(body):
    file = parse(f"{MIXERS}\nblock b {{\n{body}\n}}\n")
    text = format_loom(file)
    assert parse(text) == file
    what = block_of(check(parse(text)), "b", 8)
    module = compiled(what)
    meaning = oracle(what, module)
    x = inputs(what, n=9)["x"].requires_grad_()
    segments = torch.arange(9).repeat(2, 1) // 4
    results = []
    for each in (module, meaning):
        y = each(x, segments=segments)
        (slope,) = torch.autograd.grad((y * y.detach().cos()).sum(), x)
        results.append((y, slope))
    (y, dx), (z, dz) = results
    torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dx, dz, rtol=1e-8, atol=1e-8)

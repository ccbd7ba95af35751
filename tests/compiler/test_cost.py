"""Costs against counting by hand, and against what PyTorch counts."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.model import Model
from headloom.grammar.parse import parse

from .battery import EXAMPLES, SETTINGS, block, compiled, inputs, oracle

MATMULS = ["all", "grouped", "one_key_head", "latent", "two_linears", "gate", "cross"]


@pytest.mark.parametrize("name", MATMULS)
def test_products_of_matrices_are_counted_as_pytorch_counts_them(name):
    what = block(name)
    meaning = oracle(what, compiled(what))  # which is dense
    with FlopCounterMode(display=False) as counter:
        meaning(**inputs(what, n=16, m=16, batch=1))
    dense = 2 * what.heads * (what.head_dim + what.value_dim) * 16 * 16
    mixing = dense if name in ("all", "cross") else dense * 17 // 32  # half of the pairs, and 16
    counted = counter.get_total_flops() - dense + mixing
    elementwise = cost(what).flops(16) - counted
    assert 0 <= elementwise <= 0.15 * counted


def test_flops_by_hand():
    what = block(
        "heads = 2; head_dim = 4; mask = causal; score = softcap(5)".join(("block b {", "}"))
    )
    linears = 2 * 4 * 16 * 8  # q, k, v: 16 → 8; o: 8 → 16
    each = 2 * (4 + 4) + 3 + 1  # the two products; c * tanh(s / c); exp(s)
    assert cost(what).flops(10) == 10 * linears + 2 * 55 * each


def test_tensors_of_a_mixer_have_their_dimensions():
    text = """
        mix m {
          param w[heads, value_dim, 3] = 1
          param u[heads, 3] = 1
          state z[value_dim] = 0
          z <- z + v
          o <- w @ u + z
        }
        block b { width = 16; heads = 2; mix = m; mask = causal }
    """
    each = 8 + 2 * 8 * 3 + 8  # z + v; a matrix times a vector; one more sum
    linears = 2 * 2 * 16 * 16  # v and o
    assert cost(check(parse(text)).blocks["b"]).flops(10) == 10 * (linears + 2 * each)


def test_a_window_costs_its_pairs_alone():
    near, far = block("window"), block("causal")
    pairs = 4 * (1000 * 1001 // 2 - (3 * 1000 - 3))
    assert cost(far).flops(1000) - cost(near).flops(1000) == (2 * (4 + 4) + 1) * pairs


@pytest.mark.parametrize(
    "name", ["causal", "window", "sink", "linear", "delta", "cross", "temperature"]
)
def test_what_decoding_keeps(name):
    kept = {
        "causal": 100 * 32,
        "window": 3 * 32,
        "sink": 5 * 32,
        "linear": 4 * (16 + 4),
        "delta": 4 * 16,
        "cross": 100 * 32,
        "temperature": 100 * 32,
    }[name]
    assert cost(block(name)).cache_bytes(100) == 4 * kept
    halved = 1 if name in ("linear", "delta") else 2  # a state stays in float32
    assert cost(block(name)).cache_bytes(100, "bfloat16") == 4 * kept // halved


def test_a_bias_of_the_key_is_kept_with_it():
    more = cost(block("bias_of_key")).cache_bytes(100) - cost(block("causal")).cache_bytes(100)
    assert more == 4 * 100 * 4
    assert cost(block("document")).cache_bytes(100) == cost(block("causal")).cache_bytes(100) + 800


@pytest.mark.parametrize("name", SETTINGS)
def test_costs_are_whole_and_grow_with_the_tokens(name):
    made = cost(block(name))
    assert made.params >= 0
    for each in (made.flops, made.activation_bytes):
        assert isinstance(each(64), int)
        assert 0 < each(64) < each(128)
    assert made.cache_bytes(64) <= made.cache_bytes(128)
    assert made.activation_bytes(64, "bfloat16") * 2 == made.activation_bytes(64)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_parameters_of_the_examples(path):
    arch = check(parse(path.read_text()))
    for what in (*arch.blocks.values(), *arch.models.values()):
        module = compiled(what, torch.float32)
        assert cost(what).params == sum(prod(each.shape) for each in module.parameters())
        if isinstance(what, Model):
            layers = sum(cost(each).cache_bytes(32) for each in what.layers)
            assert cost(what).cache_bytes(32) == layers


def test_a_choice_counts_what_is_read_and_what_it_scores() -> None:
    text = (
        "block a { heads = 2; head_dim = 8; mask = causal; let kb = k | pool(mean, size = 16); "
        "select = top(2, dot(q[h, i], kb[h, j // 16]), size = 16, always = blocks(16)) }\n"
        "block b { heads = 2; head_dim = 8; mask = causal }"
    )
    blocks = check(parse(text)).blocks
    chosen, dense = cost(blocks["a"]), cost(blocks["b"])
    n = 4096
    seen, of_pair, of_score = 2 * n * (n + 1) // 2, 2 * (8 + 8) + 1, 2 * 8 + 3
    read = 2 * n * 2 * 16 + 2 * n // 16 * (16 * 17 // 2)
    pooling = n // 16 * 16 * 16
    made = of_pair * read + of_score * (seen // 16) + pooling
    assert chosen.flops(n) == dense.flops(n) - of_pair * seen + made
    few = chosen.flops(32) - dense.flops(32)  # all is read there, and scored
    assert few == of_score * (2 * 32 * 33 // 2 // 16) + 2 * 16 * 16

"""What the checker refuses, and where it points; and that nothing makes it fail otherwise."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headloom.compiler.checking.check import block, check, find
from headloom.compiler.checking.names import MODULE
from headloom.compiler.meaning.reference import reference
from headloom.compiler.pipeline import Target, generate, load
from headloom.grammar.diagnostics import Diagnostic, LoomError
from headloom.grammar.parse import parse
from headloom.grammar.show import show
from headloom.grammar.syntax import File, Index, walk

from ..grammar.strategies import files
from .battery import EXAMPLES, MIXERS, SETTINGS, source


def findings(text: str) -> list[Diagnostic]:
    try:
        check(parse(text))
    except LoomError as problem:
        return list(problem.diagnostics)
    return []


def only(text: str) -> Diagnostic:
    (found,) = findings(text)
    return found


def marked(found: Diagnostic) -> str:
    return found.span.source.text[found.span.start : found.span.end]


# ── spans ─────────────────────────────────────────────────────────────────────────────────

POINTS = [
    ("block a {\n  kv_head = 2\n}", "L202", (2, 3), "kv_head = 2",
     "did you mean `kv_heads` or `value_heads`?"),
    ("block a {\n  kv_heads = 3\n}", "L204", (2, 14), "3", "use 1, 2, 4 or 8"),
    ("block a { mask = casual }", "L201", (1, 18), "casual", "did you mean `causal`?"),
    ("block a { mask = causal and windw(3) }", "L201", (1, 29), "windw(3)",
     "did you mean `window`?"),
    ("block a { mask = i - j }", "L210", (1, 18), "i - j", ""),
    ("block a { score = s + causal }", "L210", (1, 23), "causal", ""),
    ("block a { out = o | merge | linear + x }", "L208", (1, 29), "linear + x",
     "write `(o | merge | linear) + x`"),
    ("block a { out = o | merge | linear(8) * 2 - x }", "L208", (1, 29), "linear(8) * 2 - x",
     "write `(o | merge | linear(8)) * 2 - x`"),
    ("block a { q = x | linear | splt }", "L208", (1, 28), "splt", "did you mean `split`?"),
    ("block a { q = y | linear | split }", "L201", (1, 15), "y", ""),
    ("block a { heads = 1e12 }", "L203", (1, 19), "1e12", ""),
    ("block a { mask = window(w = 4, v = 2) }", "L209", (1, 32), "v = 2", "it takes `w`"),
    ("block a { mask = window(4, 5) }", "L209", (1, 28), "5", "it takes `w`"),
    ("block a { dropout = 1.5 }", "L219", (1, 21), "1.5", ""),
    ("block a { out = o | merge | linear(3) }", "L207", (1, 17), "o | merge | linear(3)", ""),
    ("block a { let t = x | linear(8)\n score = s * t[j - i, h] }", "L214", (2, 16), "j - i",
     "`i` are the queries' tokens, `j` the keys', `j // 4 * 4` another key's"),
    ("model m { width = 8; layers = [a] * 2 }\nblock a { heads = 3 }", "L205", (2, 19), "3",
     "choose another number of heads, or set `head_dim`"),
    ("model m { width = 8; layers = [b] }\nblock ab { heads = 2 }", "L218", (1, 32), "b",
     "did you mean `ab`?"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "position", "words", "help"), POINTS)
def test_a_finding_points_at_the_words(text, code, position, words, help):
    found = only(text)
    assert found.code == code
    assert marked(found) == words
    assert found.span.source.position(found.span.start) == position
    assert found.help == help


def test_the_values_that_matter_are_shown():
    assert only("block a { kv_heads = 3 }").label == "heads = 8, kv_heads = 3, remainder 2"
    shown = only("block a { width = 100 }").label
    assert shown == "width = 100, heads = 8, remainder 4"


def test_all_findings_are_reported_together():
    found = findings("block a { mask = casual; score = t; dropout = 2 }\nblock b : c { }")
    assert sorted(each.code for each in found) == ["L201", "L201", "L218", "L219"]


# ── what is refused ───────────────────────────────────────────────────────────────────────

REFUSED = {
    "cyclic inheritance": ("L212", "block a : b { }\nblock b : c { }\nblock c : a { }"),
    "cyclic model": ("L212", "model a : b { }\nmodel b : a { }"),
    "cyclic mask": ("L212", "mask p = not q\nmask q = p\nblock a { mask = p }"),
    "cyclic stage": ("L212", "stage f = | g\nstage g = | f\nblock a { q = x | f | split }"),
    "cyclic normaliser": ("L212", "normalize f = g\nnormalize g = f\nblock a { normalize = f }"),
    "cyclic lets": ("L212", "block a { let c = d | linear; let d = c | linear; q = c | split }"),
    "cyclic numbers": ("L219", "let a = b\nlet b = a\nblock c { heads = a }"),
    "no layers": ("L203", "block a { }\nmodel m { width = 64; layers = [] }"),
    "many layers": ("L203", "block a { }\nmodel m { width = 64; layers = [a] * 10 ** 9 }"),
    "twice a thousand layers": ("L203", "block a { }\nmodel m { width = 64; layers = [a] * 2000 }"),
    "each of many": ("L203", "block a { }\nmodel m { width = 64; layers = each(10 ** 9, a) }"),
    "layers missing": ("L202", "model m { width = 64 }"),
    "a large tensor": ("L203", "block a { param t[2 ** 24, 2 ** 24] = 0; score = s + t[h, h] }"),
    "many heads": ("L204", "block a { heads = 2 ** 24 - 3; kv_heads = 2; head_dim = 1 }"),
    "a wide stream": ("L203", "block a { q = x | linear(2 ** 24) | repeat(2 ** 20) }"),
    "no number": ("L219", "block a { heads = 1 / 0 }"),
    "a block as a number": ("L219", "block a { heads = a }"),
    "a truth as a score": ("L210", "block a { score = i < j }"),
    "a number as a mask": ("L210", "block a { mask = causal and 3 }"),
    "matrices in a mask": ("L216", "block a { mask = i @ j }"),
    "a stream in a mask": ("L214", "block a { let t = x | linear(8); mask = t > 0 }"),
    "outside of a tensor": ("L214", "block a { param t[4] = 0; score = s + t[4] }"),
    "between two places": ("L214", "block a { param t[4] = 0; score = s + t[1 / 3] }"),
    "outside of a stream": ("L214", "block a { let t = x | linear(3); score = s + t[i, 3] }"),
    "features by place": ("L214", "block a { let t = x | linear(9); score = s + t[i, i - j] }"),
    "a stream of the context": (
        "L214", "block a { source = context; let t = x | linear(1); score = s + t[j] }",
    ),
    "no value": ("L220", "score f { let t = x | linear(8) }\nblock a { score = f }"),
    "tau without a condition": ("L220", "block a { normalize = relu(s - tau) }"),
    "nothing seen": ("L210", "block a { mask = causal and false }"),
    "truth in a mixer": ("L210", "mix m { o <- v + (k > 0) }\nblock a { mix = m; mask = causal }"),
    "number in a mixer": ("L210", "mix m { o <- not v }\nblock a { mix = m; mask = causal }"),
    "no output": ("L216", "mix m { state S = 0 }\nblock a { mix = m; mask = causal }"),
    "state twice": (
        "L211", "mix m { state S = 0; state S = 0; o <- v }\nblock a { mix = m; mask = causal }",
    ),
    "writes a stream": ("L216", "mix m { q <- k; o <- v }\nblock a { mix = m; mask = causal }"),
    "needs causal": ("L217", "block a { mix = gated_delta }"),
    "powers in a recurrence": ("L217", "block a { mix = gated_delta; mask = power }"),
    "nothing to concatenate": ("L201", "block a { q = x | concat(none) | split }"),
    "split twice over": ("L206", "block a { out = o | merge | linear | split | split }"),
    "normal of two": ("L209", "block a { param t = normal(1, 2); score = s * t }"),
    "tied without words": ("L222", "block a { }\nmodel m { width = 64; layers = [a]; tie = true }"),
    # vectors and similarities
    "a cyclic similarity": ("L212", "similarity f = f\nblock a { heads = 4; similarity = f }"),
    "a stage of two": ("L209", "stage f = 2 * x\nblock a { score = f(s, 1) }"),
    "a pipeline as a function": ("L210", "stage f = | silu\nblock a { score = f(s) }"),
    # functions of the map
    "a carry that adds": (
        "L235", "block a { heads = 4; mask = causal; let w = x | linear | split; carry = k + w }"),
    "a carry of a number": ("L235", "block a { mask = causal; carry = dot(k, k) }"),
    "a carry under a mask that looks ahead": (
        "L235", "block a { heads = 4; let b = x | linear(heads); carry = b * k }"),
    "a carry under a similarity": (
        "L235", "block a { heads = 4; mask = causal; let b = x | linear(heads); carry = b * k; "
        "similarity = cosine }"),
    "a carry beside keys as they were": (
        "L235", "block a { heads = 4; mask = causal; let b = x | linear(heads); carry = b * k; "
        "score = s + k[h, j, 0] }"),
    "a carry of query heads": (
        "L235", "block a { heads = 4; kv_heads = 2; mask = causal; param b[heads] = 1; "
        "carry = b * k }"),
    "values of a branch that sees itself": (
        "L234", "block a { heads = 4; mask = causal; let w = x | linear | split; v = w - u; "
        "branch u { } }"),
    "values that a pipeline changes": (
        "L234", "block a { heads = 4; mask = causal; let w = x | linear | split; "
        "v = w - (u | rms_norm); branch u { mask = j < i } }"),
    "values with a share for each feature": (
        "L234", "block a { heads = 4; mask = causal; let w = x | linear | split; v = w - w * u; "
        "branch u { mask = j < i } }"),
    "values that are nothing else": (
        "L234", "block a { heads = 4; mask = causal; let b = x | linear(heads); v = b * u; "
        "branch u { mask = j < i } }"),
    "values with a learned stage": (
        "L234", "block a { heads = 4; mask = causal; v = (x | linear | split) - u; "
        "branch u { mask = j < i } }"),
    "values of a branch with an output": (
        "L212", "block a { heads = 4; mask = causal; let w = x | linear | split; v = w - u; "
        "branch u { mask = j < i; out = o } }"),
    "keys that read their branch": (
        "L212", "block a { heads = 4; mask = causal; k = (x | linear | split) - u; "
        "branch u { mask = j < i } }"),
    "a system that is not square": ("L216", "mix f { state S[head_dim, value_dim] = 0; "
                                    "S <- S + outer(k, v); o <- solve(S, k) }\n"
                                    "block a { width = 32; heads = 2; value_dim = 3; mix = f; "
                                    "mask = causal }"),
    "a diagonal of a matrix": ("L216", "mix f { o <- v @ diag(outer(k, k)) }\n"
                               "block a { mix = f; mask = causal }"),
    "a diagonal of two": ("L209", "mix f { o <- v @ diag(k, k) }\n"
                          "block a { mix = f; mask = causal }"),
    "a system in a score": ("L201", "block a { score = s + solve(q[h, i], k[h, j]) }"),
    "a function of the map in a mixer": ("L201", "mix f { o <- sum_keys(v) }\nblock a { mix = f }"),
    # branches
    "a branch and an inherited let": (
        "L211", "block a { heads = 4; let b = x | linear; out = b }\nblock c : a { branch b { } }",
    ),
    # the layer below
    "the layer below in a lone branch": (
        "L224", "block a { heads = 4; branch b { k = previous.k }; out = b | merge | linear }\n"
        "model m { width = 64; layers = [a] }",
    ),
    "an unknown stream below": (
        "L201", "block a { heads = 4; }\nblock b { k = previous.kk }\nmodel m { width = 64; "
        "layers = [a, b] }",
    ),
    # models
    "a model twice over": ("L211", "block a { }\nmodel m { width = 8; width = 16; layers = [a] }"),
    "a setting of no model": (
        "L202", "block a { }\nmodel m { width = 8; layers = [a]; heads = 2 }",
    ),
    "no such model": ("L218", "model m : base { width = 8 }"),
    "a block as a number of layers": ("L218", "block a { }\nmodel m { width = 64; layers = 3 }"),
    # names and arguments
    "a block that is a number": ("L218", "model m { width = 64; layers = [3 * 4] }"),
    "a number as a base": ("L218", "block a : 3 { }"),
    "a definition within a thousand": (
        "L213", "mask m0 = causal\n"
        + "\n".join(f"mask m{n} = not m{n - 1}" for n in range(1, 1000))
        + "\nblock a { mask = m999 }",
    ),
    "an argument twice": ("L209", "block a { mask = window(4, w = 4) }"),
    "a let called i": ("L215", "let i = 3\nblock a { heads = i }"),
}  # fmt: skip
BLOCKS = {
    # vectors and similarities
    "shapes that differ": ("L216", "let t = x | linear(3); score = s + dot(t[i], q[h, i])"),
    "a sum of unlike vectors": ("L216", "param t[3] = 0; similarity = sum(q + k + t)"),
    "a vector as a score": ("L210", "let t = x | linear(8); score = s + t[i]"),
    "a vector as a mask": ("L210", "let t = x | linear(8); mask = t[i] > 0"),
    "a vector as a similarity": ("L210", "similarity = q * k"),
    "a matrix as a similarity": ("L210", "similarity = outer(q, k)"),
    "a pipeline as a similarity": ("L210", "similarity = q | linear"),
    "a similarity that is none": ("L201", "similarity = foo"),
    "a score as a similarity": ("L201", "similarity = alibi"),
    "whole q in a score": ("L214", "score = s + dot(q, k)"),
    "a large tensor as a value": ("L214", "param w[2, 2, 2] = 0; score = s + sum(w)"),
    "too many indices": ("L214", "param w[heads, 3] = 0; score = s + w[h, i, j]"),
    "too few indices": ("L214", "score = s + norm(q[i])"),
    "an index of a number": ("L214", "score = s + (i + j)[h]"),
    "a number as a truth": ("L210", "let g = x | linear(1); mask = g[j]"),
    "a row without a grid": ("L214", "score = s - row(i)"),
    "a function of two": ("L209", "score = tanh(s, 1)"),
    # functions of the map
    "a function of the map in a mask": ("L201", "mask = sum_keys(j) > 3"),
    "a function of the map in a normaliser": ("L201", "normalize = exp(s - max_keys(s)) / sum"),
    "a function of the map in a pipeline": ("L201", "out = sum_keys(o) | merge | linear"),
    "the map of two": ("L209", "score = sum_keys(s, j)"),
    "heads mixed by 4 × 3": ("L216", "param w[4, 3] = 1; score = mix_heads(s, w)"),
    "heads mixed by a number": ("L216", "score = mix_heads(s, 2)"),
    "convolved with a stream": ("L216", "let w = x | linear; score = convolve(s, w)"),
    "convolved with a vector": ("L216", "param w[4] = 1; score = convolve(s, w)"),
    "a coin of 2": ("L219", "score = s * coin(2)"),
    "a coin of a stream": ("L219", "let t = x | linear(1); score = s * coin(t[i])"),
    # branches
    "a branch with a width": ("L202", "branch b { width = 8 }; out = b | merge | linear"),
    "a branch in a branch": ("L202", "branch b { branch c { } }"),
    "a state in a branch": ("L202", "branch b { state S = 0 }"),
    "a branch called q": ("L215", "branch q { mask = causal }"),
    "a branch twice": ("L211", "branch b { }; branch b { }; out = b | merge | linear"),
    "a branch and a let": ("L211", "let b = x | linear; branch b { }"),
    "a name that a branch makes": (
        "L211", "param b_w = 0; branch b { param w = 0; score = s + w }; out = b | merge | linear",
    ),
    "branches in a ring": (
        "L212", "branch b { k = c }; branch c { k = b }; out = b | merge | linear",
    ),
    "three heads of a branch": ("L205", "branch b { heads = 3 }; out = b | merge | linear"),
    "value heads": ("L204", "value_heads = 3"),
    "value heads of a branch": ("L204", "branch b { value_heads = 3 }; out = b | merge | linear"),
    "key heads of a branch": ("L204", "branch b { kv_heads = 3 }; out = b | merge | linear"),
    "branches of other heads": (
        "L206", "head_dim = 8; branch b { heads = 2 }; out = (o + b) | merge | linear",
    ),
    "a recurrent branch under a window": (
        "L217", "mask = window(3); branch b { mix = linear }; out = b | merge | linear",
    ),
    "a position that is none": ("L208", "position = ropee"),
    # other tokens
    "no latents": ("L203", "source = latents(0)"),
    "latents without a number": ("L201", "source = latents"),
    "keys and values apart": ("L207", "v = latents(4) | linear | split"),
    "documents of latents": ("L214", "source = latents(4); mask = document"),
    "tokens of another list": (
        "L214", "source = latents(3); let g = x | linear(1); score = s + g[j]",
    ),
    "pooling as a stream": ("L201", "source = pool"),
    "a source of heads": ("L206", "source = q"),
    "a recurrence along latents": ("L216", "mask = causal; mix = linear; source = latents(3)"),
    # pipelines
    "no beginning": ("L208", "q = | linear | split"),
    "a list as a stream": ("L208", "q = [x] | linear | split"),
    "an index as a stage": ("L208", "q = x | linear[3] | split"),
    "a sum as a stage": ("L208", "q = x | (linear + 1) | split"),
    "numbers alone": ("L208", "let t = 1 + 2; out = o | merge | linear"),
    "a large tensor in a pipeline": ("L208", "param t[2, 3, 4] = 0; out = (o + t) | merge"),
    "queries of a tensor": ("L208", "param t[64] = 0; q = t | linear | split"),
    "keys of a tensor": ("L208", "param t[8] = 0; let c = 2 * t; source = c"),
    "an output of a tensor": ("L208", "width = 16; param t[16] = 0; out = t"),
    "tensors of other heads": ("L206", "param t[3, 16] = 0; out = (o + t) | merge | linear"),
    "a function that is none": ("L201", "out = foo(o) | merge | linear"),
    "a gate of two": ("L209", "out = o | gate(o, o) | merge | linear"),
    "a flag of 2": ("L222", "out = o | merge | linear(bias = 2)"),
    "a convolution of none": ("L203", "q = x | conv(0) | split"),
    "groups that do not divide": ("L206", "q = x | linear | conv(2, groups = 5) | split"),
    "taps of another width": (
        "L206", "let w = x | linear(3); q = x | linear | conv(4, taps = w) | split",
    ),
    "taps in groups": (
        "L206", "let w = x | linear(4); q = x | linear | conv(4, groups = 2, taps = w) | split",
    ),
    "a shift of none": ("L203", "q = x | shift(0) | linear | split"),
    "a running number of no kind": ("L222", "q = x | running(median) | linear | split"),
    "a running number of none": ("L209", "q = x | running | linear | split"),
    "groups of unlike parts": ("L206", "q = x | grouped_linear(3) | split"),
    "an index of two": ("L209", "q = x | index(2) | split"),
    # numbers of rows, and what training adds
    "rows of a stream": ("L228", "out = (o * rows(q, p)) | merge | linear"),
    "rows of a recurrence": ("L228", "mask = causal; mix = linear; out = (o * lse(o)) | merge"),
    "rows of a branch with an end": (
        "L228", "branch b { out = o | merge }; out = (o * rows(b, p)) | merge | linear",
    ),
    "rows of one": ("L209", "out = (o * rows(o)) | merge | linear"),
    "rows of logits": ("L201", "out = (o * rows(o, s)) | merge | linear"),
    "rows of truths": ("L210", "out = (o * rows(o, i == j)) | merge | linear"),
    "rows over other tokens": (
        "L214", "source = latents(4); let g = x | linear(1); "
        "out = (o * rows(o, p * g[j])) | merge | linear",
    ),
    "columns beside queries": (
        "L206", "source = context; out = (o + columns(o, p)) | merge | linear",
    ),
    "rows in a score": ("L201", "score = s - lse(o)"),
    "rows as a stage": ("L208", "out = o | lse | merge | linear"),
    "rows of what they make": ("L212", "q = (x | linear | split) * entropy(o)"),
    "joint of one": ("L209", "out = joint(o) | merge | linear"),
    "joint with a recurrence": (
        "L228", "mask = causal; branch b { mix = linear }; out = joint(o, b) | merge",
    ),
    "joint with another normaliser": (
        "L228", "branch b { normalize = relu }; out = joint(o, b) | merge | linear",
    ),
    "many numbers in the loss": ("L229", "regularize = entropy(o)"),
    "no call in the loss": ("L201", "regularize = entropy"),
    "a number in the loss": ("L208", "regularize = 0.1"),
    "the mean of two": ("L209", "regularize = mean(o, q)"),
    "a matrix of streams": ("L201", "let t = outer(q, k); out = (o * t) | merge | linear"),
    "a product of unlike streams": (
        "L216", "let t = x | linear(3); out = (o * dot(q, t)) | merge | linear",
    ),
    "a product with a number": ("L216", "param t = 1; out = (o * dot(q, t)) | merge | linear"),
    "a product by `@`": ("L216", "out = (o * (q @ k)) | merge | linear"),
    "a product of one": ("L209", "out = (o * dot(q)) | merge | linear"),
    "a sum of numbers": ("L208", "let t = sum(2); out = (o * t) | merge | linear"),
    "a sum as an output": ("L207", "out = sum(o | merge)"),
    "a grid of one": ("L219", "grid = 3"),
    # mixers
    "an unknown mixer": ("L201", "mix = linea"),
    # names and arguments
    "a first value of a stream": ("L219", "param t[4] = x; score = s * t[h]"),
}  # fmt: skip
MIXED = {
    "an unknown name in a mixer": ("L201", "o <- w * v"),
    "a value in a mixer": ("L216", "o <- v; v"),
    "a cube": ("L216", "state S[2, 2, 2] = 0; o <- v"),
    "a state of a tensor's name": ("L211", "param S = 0; state S = 0; o <- v"),
    "a state called x": ("L215", "state x = 0; o <- v"),
    "a matrix as an output": ("L216", "o <- outer(k, v)"),
    "an index in a mixer": ("L216", "o <- v[h]"),
    "a list in a mixer": ("L216", "o <- [v]"),
    "features for no head": ("L216", "let t = x | linear(3); o <- t * v"),
    "heads that do not divide": ("L216", "let t = x | linear(6) | split(3); o <- sum(t) * v"),
}  # fmt: skip
MODELS = {
    "a norm of no kind": ("L208", "norm = batch"),
    "positions of no kind": ("L222", "embed_position = rope"),
    "positions without a number": ("L209", "embed_position = learned"),
    "positions of two": ("L209", "embed_position = learned(8, 8)"),
    "words without a vocabulary": ("L222", "head = lm"),
    "classes without a number": ("L209", "head = classify"),
    "a network of no kind": ("L208", "ffn = relux(4)"),
    "a network of too much": ("L209", "ffn = gelu(4, true, 8)"),
    "a network of nothing": ("L203", "ffn = gelu(0)"),
    "dropout of all": ("L219", "dropout = 1"),
}  # fmt: skip
REFUSED |= {
    name: (code, f"block a {{ heads = 4; {text} }}") for name, (code, text) in BLOCKS.items()
}
REFUSED |= {
    name: (code, f"mix f {{ {text} }}\nblock a {{ heads = 4; mix = f; mask = causal }}")
    for name, (code, text) in MIXED.items()
}
REFUSED |= {
    name: (code, f"block a {{ }}\nmodel m {{ width = 64; layers = [a]; {text} }}")
    for name, (code, text) in MODELS.items()
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name):
    code, text = REFUSED[name]
    found = findings(text)
    assert code in {each.code for each in found}
    for each in found:
        assert each.message
        assert each.render()
        assert each.span.start < each.span.end


GROWING = {
    "masks": ["mask m0 = j <= i", "mask m{n} = m{p} and m{p}", "mask = m40"],
    "scores": ["score m0 = s", "score m{n} = m{p} + m{p}", "score = m40"],
    "arguments": ["mask m0(a) = a > 0", "mask m{n}(a) = m{p}(a + a)", "mask = m40(i)"],
    "stages": ["stage m0 = | silu", "stage m{n} = | m{p} | m{p}", "q = x | linear | m40 | split"],
    "functions": ["stage m0 = x + x", "stage m{n} = m{p}(x) + m{p}(x)", "score = m40(s)"],
    "lets": ["let m0 = 1 + 1", "let m{n} = m{p} + m{p}", "heads = m40"],
    "pipelines": ["score m0 = s + s", "score m{n} = s", "score = m0" + " | m0" * 50],
}


@pytest.mark.parametrize("name", GROWING)
def test_what_doubles_is_stopped(name):
    first, again, use = GROWING[name]
    rows = [first, *(again.format(n=n, p=n - 1) for n in range(1, 41))]
    found = findings("\n".join(rows) + f"\nblock a {{ {use} }}")
    assert {each.code for each in found} == {"L213"}


# ── names ─────────────────────────────────────────────────────────────────────────────────


def test_the_names_of_every_module_are_known():
    assert {name for name in dir(torch.nn.Module()) if not name.startswith("_")} == MODULE


@pytest.mark.parametrize("name", ["half", "forward", "lambda", "init_cache", "_buffers", "i", "q"])
def test_a_tensor_cannot_have_the_name(name):
    found = only(f"block a {{ param {name}[heads] = 0 }}")
    assert found.code == "L215"
    assert marked(found).startswith(f"param {name}")


@pytest.mark.parametrize("name", ["q", "k", "v", "x", "o", "i", "seen", "doc", "heads", "layer"])
def test_a_stream_cannot_have_the_name(name):
    assert "L215" in {each.code for each in findings(f"block a {{ let {name} = x | linear }}")}


def test_a_tensor_cannot_have_the_name_of_a_submodule():
    text = "block a { heads = 2; head_dim = 4; param q_proj[heads] = 0; score = s + q_proj[h] }"
    found = only(text)
    assert (found.code, marked(found)) == ("L215", "param q_proj[heads] = 0")


CLASSES = ["none", "tensor", "layer", "feed_forward", "value_error", "key_value_cache", "model",
           "f", "_", "a_b", "callable"]  # fmt: skip
NAMES = ["lambda", "class", "import", "range", "list", "torch", "Tensor", "rope", "given", "places",
         "x_", "x1", "t_i", "g_h", "q_1", "nn", "wide", "F", "expect", "state", "self", "len",
         "forward", "half", "positions", "cache", "None", "True", "layer_norm"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_of_streams_compile(name):
    text = f"""block a {{ heads = 2; head_dim = 4; mask = causal
               let {name} = x | linear(2) | sigmoid
               score = s * {name}[i, h] + {name}[j, h]
               out = o | gate({name}) | merge | linear }}"""
    module = load(generate(block(check(parse(text)), "a"), Target("torch")))()
    x = torch.randn(1, 5, 8)
    cache = module.init_cache(1, 5)
    torch.testing.assert_close(module(x, cache=cache), module(x))


@pytest.mark.parametrize(
    "name", [*sorted({*NAMES} - {"state"}), "n", "t", "S", "h", "i", "outputs", "step", "end", "b"]
)
def test_odd_names_of_states_compile(name):
    text = f"""mix m {{ state {name}[value_dim] = 0; {name} <- {name} / 2 + v; o <- {name} }}
               block a {{ heads = 2; head_dim = 4; mask = causal; mix = m }}"""
    module = load(generate(block(check(parse(text)), "a"), Target("torch")))()
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(module(x, cache=module.init_cache(1, 5)), module(x))


@pytest.mark.parametrize("name", [*NAMES, *CLASSES])
def test_odd_names_of_blocks_and_models_compile(name):
    for first, second in ((name, "m"), ("ab", name)):
        text = f"""block {first} {{ heads = 2; mask = causal }}
                   block aB {{ heads = 2 }}
                   model {second} {{ width = 8; layers = [{first}, aB] }}"""
        module = load(generate(check(parse(text)).models[second], Target("torch")))()
        assert module(torch.randn(1, 5, 8)).shape == (1, 5, 8)


# ── lets and layers ───────────────────────────────────────────────────────────────────────


def test_a_let_of_a_file_reads_those_above():
    arch = check(parse("let a = 2\nlet b = a * 2\nblock c { heads = b; head_dim = a + b }"))
    assert (arch.blocks["c"].heads, arch.blocks["c"].head_dim) == (4, 6)


@pytest.mark.parametrize(
    "text",
    [
        "mask near = causal and window(2 ** layer)\nblock a { heads = 2; mask = near }",
        "block a(w = layer + 1) { heads = 2; mask = causal and window(w) }",
    ],
)
def test_what_reads_the_layer_differs_by_layer(text):
    arch = check(parse(f"{text}\nmodel m {{ width = 8; layers = [a] * 3 }}"))
    assert len(set(arch.models["m"].layers)) == 3


def test_a_definition_may_be_an_argument_of_itself():
    text = """mask both(a, b) = a and b
              stage twice = 2 * x
              block c { mask = both(both(causal, sink(4)), window(9)); score = twice(twice(s)) }"""
    assert show(check(parse(text)).blocks["c"].mixings["o"].mix.score) == "2 * (2 * s)"


@pytest.mark.parametrize(
    ("text", "name"), [("", None), ("block a { }\nblock b { }", None), ("block a { }", "b")]
)
def test_it_must_be_clear_which_is_meant(text, name):
    with pytest.raises(LoomError, match="L218"):
        find(check(parse(text)), name)


def test_a_width_is_given_from_outside():
    arch = check(parse("block a { heads = 4 }"))
    assert block(arch, "a", 24).head_dim == 6
    with pytest.raises(LoomError, match="L205"):
        find(arch, "a", 30)


# ── nothing else is ever raised ───────────────────────────────────────────────────────────


def outcome(text: str) -> None:
    """Check a text that parses; anything but success and `LoomError` propagates."""
    try:
        file = parse(text)
    except LoomError:
        return
    try:
        check(file)
    except LoomError as problem:
        for each in problem.diagnostics:
            assert each.message
            assert 0 <= each.span.start <= each.span.end <= len(each.span.source.text)


def any_(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@any_(40)
@given(files())
def test_any_file_is_checked_or_refused(file):
    checked_or_refused(file)


@pytest.mark.sweep
@any_(300)
@given(files())
def test_many_files_are_checked_or_refused(file):
    checked_or_refused(file)


def checked_or_refused(file: File) -> None:
    try:
        check(file)
    except LoomError as problem:
        found = problem.diagnostics
    else:
        found = ()
    assert all(each.message for each in found)


_TOKEN = re.compile(r"\s+|[A-Za-z_]\w*|\d[\w.]*|\*\*|//|<-|<=|>=|==|!=|\.\.|.", re.DOTALL)
_TEXTS = [*(path.read_text() for path in EXAMPLES), *map(source, SETTINGS), MIXERS]
_EXTRA = "none -1 0 1.5 1e12 doc[i] previous latents lambda normal(1) conv a.b 3..4 (x) | none"
_WORDS = sorted(
    {each for text in _TEXTS for each in _TOKEN.findall(text) if each.strip()} | set(_EXTRA.split())
)


@any_(100)
@given(st.integers(0, 2**32))
def test_a_text_with_words_exchanged_is_checked_or_refused(seed):
    words_exchanged(seed)


@pytest.mark.sweep
@any_(1000)
@given(st.integers(0, 2**32))
def test_many_texts_with_words_exchanged_are_checked_or_refused(seed):
    words_exchanged(seed)


def words_exchanged(seed: int) -> None:
    draw = random.Random(seed)
    tokens = _TOKEN.findall(draw.choice(_TEXTS))
    places = [at for at, each in enumerate(tokens) if each.strip()]
    for _ in range(draw.randint(1, 4)):
        tokens[draw.choice(places)] = draw.choice(_WORDS)
    outcome("".join(tokens))


def test_it_needs_no_torch():
    program = "import sys, headloom.compiler.checking.check; sys.exit('torch' in sys.modules)"
    folder = Path(__file__).parent
    assert subprocess.run([sys.executable, "-c", program], cwd=folder, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("block a { const c[heads] = normal(1); score = s + c[h]; mask = causal }", "L219"),
        ("block a { mask = ispow2((i - j) / 2) }", "L210"),
        ("block a { mask = ispow2(i - 0.5) }", "L210"),
    ],
)
def test_what_modules_would_not_agree_on_is_refused(text: str, code: str) -> None:
    with pytest.raises(LoomError) as problem:
        check(parse(text))
    assert code in {each.code for each in problem.value.diagnostics}


def test_a_score_as_position_has_no_effect_beside_a_mixer() -> None:
    arch = check(parse("block a { mix = linear; mask = causal; position = alibi }"))
    assert [each.code for each in arch.warnings] == ["W003"]
    assert check(parse("block a { mix = linear; mask = causal; position = rope }")).warnings == ()


def test_keys_of_a_context_may_come_through_a_let() -> None:
    text = "block a { let c = context; k = c | linear | split; v = c | linear | split }"
    assert check(parse(text)).blocks["a"].mixings["o"].crosses


def test_a_model_that_needs_arguments_is_read_where_it_is_used() -> None:
    text = """
block b { mask = causal }
model m(d) { width = 64; layers = [b] * d }
model big : m(4) { ffn = none }
"""
    assert len(check(parse(text)).models["big"].layers) == 4


def test_a_mixer_reads_a_tensor_by_head_where_it_is_written_so() -> None:
    text = """
mix m { param g[value_dim] = 1 + h; param f[heads] = 1; state z[value_dim] = 0
        z <- z + v; o <- f * z * g }
block a { heads = 4; head_dim = 4; mix = m; mask = causal }
"""
    block = check(parse(text)).blocks["a"]
    reads = {
        node.base.id: len(node.items)
        for update in block.mixings["o"].mix.updates
        for node in walk(update.value)
        if isinstance(node, Index)
    }
    assert reads == {"g": 0, "f": 1}


def test_a_stream_keeps_its_shape_where_its_value_is_constant() -> None:
    text = """
stage nothing = x * 0
block a { width = 16; heads = 2; let g = x | linear(2) | nothing | exp
          out = o | gate(g) | merge | linear }
"""
    what = check(parse(text)).blocks["a"]
    module = load(generate(what, Target("torch")))()
    x = torch.randn(2, 3, 16)
    oracle = reference(what)
    oracle.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), oracle(x))


def test_a_part_of_a_normaliser_is_a_function_and_no_normaliser():
    text = "block a { heads = 2; param g[heads] = 1; normalize = exp(s) / (sum + sigmoid(g[h])) }"
    made = find(check(parse(text)), "a").mixings["o"].mix.normalize
    assert show(made.denominator) == "sum + sigmoid(g[h])"


def test_tensors_of_a_definition_are_numbered_where_it_is_called_in_several_ways():
    arch = check(
        parse(
            "score push(c) { param g[heads, c] = 0;  s + g[h, clip(j, 0, c - 1)] }\n"
            "block a { heads = 2; param g = 1; mask = causal\n"
            "  score = g * s | push(4) | push(8) | push(4) | push(16) }"
        )
    )
    names = [each.name for each in arch.blocks["a"].tensors]
    assert names == ["g", "push_g", "push_g_1", "push_g_2"]

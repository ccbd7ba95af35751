"""Lines of a selection, beside the reference: each case was wrong, or did not run."""

from __future__ import annotations

import pytest
import torch

from headloom.compiler.checking.check import check, find
from headloom.compiler.model import Block
from headloom.compiler.verify.cases import Subject
from headloom.compiler.verify.verify import CHECKS
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse

P = "exp(s - max_keys(s)) / sum_keys(exp(s - max_keys(s)))"
SELECTIONS = {
    "the key of a pair, of heads that share it": "kv_heads = 2;"
        " select = top(2, dot(q[h, i], k[h // 2, j]))",
    "the key of a pair, in a mask": "kv_heads = 2; mask = dot(q[h, i], k[h // 2, j]) > 0",
    "the key of a pair, under a score": "kv_heads = 2; score = softcap(5);"
        " select = top(2, dot(q[h, i], k[h // 2, j]))",
    "a key by itself, for all rows": "let r = x | linear(4);"
        " select = top(2, r[j, h], rows = 64)",
    "a map of what no logit is read in": "let r = x | linear(4);"
        " select = top(2, r[j, h] / (1 + sum_keys(where(j < 3, r[j, h] ** 2, 0))))",
    "the sum of weights within": "mask = causal; select = mass(0.7, s - max_keys(s)"
        " - log(sum_keys(exp(s - max_keys(s)))), size = 4, within = lse, always = window(2))",
    "the sum of weights within rows": "mask = causal;"
        " select = top(2, 60 * s, size = 3, rows = 5, within = lse)",
    "blocks of one": "mask = causal; let g = k | pool(mean, size = 1);"
        " select = top(2, dot(q[h, i], g[h, j // 1]))",
    "sums over the queries so far": "mask = causal;"
        f" select = top(2, running_queries({P}), always = window(2))",
    "the same sums of what is chosen": "mask = causal; score = s - running_queries(sigmoid(s));"
        " select = top(3, running_queries(sigmoid(s)), always = window(2))",
    "sums over the queries without a logit": "mask = causal; let r = x | linear(4);"
        " select = top(2, running_queries(sigmoid(r[i, h])) * r[j, h], always = window(2))",
    "the maximum of more keys than are chosen": "mask = causal; score = s - max_keys(s);"
        " select = top(2, where(s < max_keys(s), s - max_keys(s), -9))",
}  # fmt: skip


def subject(settings: str) -> Subject:
    block = find(check(parse(f"block a {{ width = 16; heads = 4; {settings} }}")), "a")
    assert isinstance(block, Block)
    return Subject.of(block)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("check", ["forward", "gradients", "in tiles"])
def test_it_is_what_it_means(name, check):
    found = CHECKS[check](subject(SELECTIONS[name]))
    assert isinstance(found, str) or found[1] < 1e-9


@pytest.mark.parametrize("name", [name for name in SELECTIONS if "so far" in name])
@pytest.mark.parametrize(
    "check", ["decoding", "causality", "rows of a cache", "rows that see nothing"]
)
def test_a_cache_keeps_the_sums_that_choose(name, check):
    assert CHECKS[check](subject(SELECTIONS[name]))[1] < 1e-9


@pytest.mark.parametrize("start", [0, -3])
def test_a_group_for_each_token_is_not_made_of_a_cache(start):
    """It was brought to a cache as all groups so far."""
    each = (
        f"mask = causal; k = x | linear | split | pool(mean, size = 4, stride = 1, start = {start})"
    )
    assert CHECKS["forward"](subject(each))[1] < 1e-9
    assert "reads later" in CHECKS["decoding"](subject(each))


def test_a_group_of_one_is_its_token():
    one = subject("mask = causal; k = x | linear | split | pool(mean, size = 1, stride = 1)")
    assert CHECKS["decoding"](one)[1] < 1e-9
    assert CHECKS["rows of a cache"](one)[1] < 1e-9


GROUPS = {
    "sums": "score = s - log(1 + sum_group(exp(s), j // 4))",
    "maxima": "mask = causal and window(6); weights = p / (1 + max_group(p, j // 3))",
    "of what is chosen": "mask = causal; score = s + max_group(s, j // 4) - sum_group(s, j // 2);"
    " select = top(3, s + max_group(s, j // 4), always = window(2))",
    "of one": "mask = causal; score = s - sum_group(s, j // 1) + 0.1 * s",
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(
    "check",
    ["forward", "gradients", "decoding", "as if alone", "rows of a cache", "in tiles",
     "rows that see nothing"],
)  # fmt: skip
def test_functions_over_groups_of_keys(name, check):
    found = CHECKS[check](subject(GROUPS[name]))
    assert isinstance(found, str) or found[1] < 1e-9


def test_what_a_row_sums_may_be_infinite_where_it_is_hidden():
    """It was nothing times infinity."""
    hidden = "mask = causal; out = (o * rows(o, p / sum_group(1, j // 2))) | merge | linear"
    assert CHECKS["forward"](subject(hidden))[1] < 1e-9


@pytest.mark.parametrize("kind", ["const", "param"])
@pytest.mark.parametrize("check", ["forward", "gradients", "training", "decoding"])
def test_what_rows_sum_may_read_tensors(kind, check):
    """Nothing else read them, and the attention had no such input."""
    text = f"mask = causal; {kind} even[heads, heads] = 1 / heads; {kind} c[heads] = 1 + h"
    text += "; regularize = mean(rows(o, mix_heads(p, even) ** 2))"
    text += "; out = (o * rows(o, p * c[h])) | merge | linear"
    assert CHECKS[check](subject(text))[1] < 1e-9


@pytest.mark.parametrize(
    ("e", "looks_ahead"),
    [
        ("dot(q[h, i], g[h, j // 4]) / (1 + sum_keys(dot(q[h, i], g[h, j // 4]) ** 2))", True),
        ("dot(q[h, i], g[h, j // 4]) / (1 + sum_keys(where(j // 4 * 4 + 3 <= i,"
         " dot(q[h, i], g[h, j // 4]) ** 2, 0)))", False),
    ],
)  # fmt: skip
def test_functions_of_the_map_read_groups_that_are_no_candidates(e, looks_ahead):
    """They see the query's own group, which `always` keeps out of the choice alone."""
    text = "mask = causal; let g = k | pool(mean, size = 4)"
    text += f"; select = top(2, {e}, size = 4, within = max, always = blocks(4))"
    if looks_ahead:
        with pytest.raises(LoomError, match="L242"):
            subject(text)
    else:
        assert CHECKS["causality"](subject(text))[1] < 1e-9
        assert CHECKS["decoding"](subject(text))[1] < 1e-9


@pytest.mark.parametrize("tokens", [0, 1])
def test_groups_of_no_tokens(tokens):
    pooled = "let g = k | pool(mean, size = 4, stride = 2, start = -1)"
    chosen = "select = top(2, dot(q[h, i], g[h, j // 4]), size = 4, always = blocks(4))"
    each = subject(f"mask = causal; {pooled}; {chosen}")
    x = torch.zeros(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    y = each.module(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert not x.grad.isnan().any()


FAR = "let t = context | linear(16) | split; "
CONTEXTS = {
    "its mean beside": FAR + "k = t + (t | mean_tokens); v = t",
    "pooled": FAR + "k = t | pool(mean, size = 4); v = t | pool(max, size = 4)",
    "groups of it": FAR + "k = t; v = t; let g = t | pool(mean, size = 4);"
    " select = top(1, dot(q[h, i], g[h, j // 4]), size = 4)",
    "groups that choose": FAR + "k = t; v = t; let g = t | pool(mean, size = 4);"
    " branch far { k = g; v = g; score = 0; select = top(1, s) };"
    " select = above(0, far.p[h, i, j // 4])",
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("check", ["as if alone", "decoding", "rows of a cache", "in tiles"])
def test_a_context_is_all_of_one(name, check):
    """Its rows were taken apart as those of x; what a cache brought had no run of groups."""
    far = subject(f"context_width = 12; source = context; {CONTEXTS[name]}")
    assert CHECKS[check](far)[1] < 1e-9


APART = {
    "its own keys": "above(0, off.p[h, i, j])",
    "diagonals": "above(0, off.p[h, i, i - j])",
    "of another head": "above(0, off.p[1 - h, i, (i - j) // 2])",
}


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("check", ["forward", "as if alone", "in tiles", "decoding"])
def test_a_map_beside_is_read_at_any_key(name, check):
    """In a packed row, numbers of keys were counted from the row's first token."""
    off = "branch off { score = 0; select = top(2, dot(q[h, i], k[h, j])) }"
    each = subject(f"mask = causal; {off}; select = {APART[name]}")
    assert CHECKS[check](each)[1] < 1e-9


def test_chosen_distances_are_diagonals():
    """Every query reads the keys 0 and 3 before it."""
    off = "branch off { mask = all; score = 0; select = top(2, where(j == 0 or j == 3, 1, 0)) }"
    chosen = subject(f"mask = causal; {off}; select = above(0, off.p[h, i, i - j])")
    plain = subject("mask = causal and (i == j or i - j == 3)")
    plain.module.load_state_dict(chosen.module.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(chosen.module(x), plain.module(x))


CHAINED = {
    "rows of rows": "let a = rows(o, p * j); let b = rows(o, p * a[h, j])",
    "columns of rows": "let a = rows(o, p * p); let b = columns(o, p * a[h, i])",
    "three, and beside them one": "let c = rows(o, p * j); let d = rows(o, p * c[h, j]);"
        " let a = rows(o, max_keys(p)); let b = rows(o, p * d[h, j]) * a",
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINED)
@pytest.mark.parametrize("check", ["forward", "gradients", "as if alone", "in tiles", "decoding"])
def test_what_is_asked_of_a_map_may_be_asked_of_it_again(name, check):
    """The attention that gave both stood before and after itself, and no order was found."""
    each = subject(f"mask = causal; {CHAINED[name]}; out = (o * a + b) | merge | linear")
    found = CHECKS[check](each)
    assert isinstance(found, str) if (check, name[:3]) == ("decoding", "col") else found[1] < 1e-9

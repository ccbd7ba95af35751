"""`select`: against loops over groups written by hand, its edges, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import headloom as hl
from headloom.compiler.algebra.groups import told_at_ends
from headloom.compiler.checking.check import check
from headloom.compiler.pieces import groups
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse, parse_expression

MOBA = """
block a {
  heads = 4; kv_heads = 2; head_dim = 4; width = 12; mask = causal
  let kb = k | pool(mean, size = 8)
  select = top(2, dot(q[h, i], kb[h // 2, j // 8]), size = 8, always = blocks(8)OPTIONS)
}
"""


def both(text: str, seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """Return the compiled module and the meaning of block `a`, with equal weights."""
    arch = hl.load(text, format="loom")
    module = hl.compile(arch, "a", backend="torch", dtype=torch.float64, seed=seed)
    oracle = hl.reference(arch, "a", dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    return module, oracle


def drawn(n: int, width: int = 12, b: int = 2) -> Tensor:
    return torch.randn(b, n, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@contextmanager
def gathering(module: nn.Module) -> Iterator[ModuleType]:
    """Let groups be gathered for any number of tokens."""
    file = sys.modules[type(module).__module__]
    file.GATHER_FROM = 0  # type: ignore[attr-defined]
    try:
        yield file
    finally:
        file.GATHER_FROM = None  # type: ignore[attr-defined]


def by_hand(module: nn.Module, x: Tensor, count: int, size: int) -> Tensor:
    """Mixture of block attention: blocks by the product of the query and their mean key."""
    b, n, _ = x.shape
    q = module.q_proj(x).view(b, n, 4, 4)
    k, v = (proj(x).view(b, n, 2, 4) for proj in (module.k_proj, module.v_proj))
    o = torch.zeros(b, n, 4, 4, dtype=x.dtype)
    for row in range(b):
        for h in range(4):
            for i in range(n):
                scores = []
                for block in range(i // size):  # those before its own are complete
                    mean = k[row, block * size : (block + 1) * size, h // 2].mean(0)
                    scores.append((-(q[row, i, h] @ mean).item(), block))
                some = {block for _, block in sorted(scores)[:count]} | {i // size}
                seen = [j for j in range(i + 1) if j // size in some]
                p = (k[row, seen, h // 2] @ q[row, i, h] / 2).softmax(-1)
                o[row, i, h] = p @ v[row, seen, h // 2]
    done: Tensor = module.o_proj(o.flatten(2))
    return done


@pytest.mark.parametrize("options", ["", ", size = 4, always = blocks(4)", ", within = mean"])
def test_a_score_may_be_a_constant(options: str) -> None:
    module, oracle = both(
        f"block a {{ heads = 4; width = 12; mask = causal; select = top(2, 0{options}) }}"
    )
    torch.testing.assert_close(module(drawn(11)), oracle(drawn(11)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gathered", [False, True])
def test_the_best_blocks_and_its_own(gathered: bool) -> None:
    module, oracle = both(MOBA.replace("OPTIONS", ""))
    x = drawn(45).requires_grad_()
    assert hl.explain(hl.load(MOBA.replace("OPTIONS", ""), format="loom"), "a").lowerings[0].path
    if gathered:
        with gathering(module):
            y = module(x)
    else:
        y = module(x)
    expected = by_hand(module, x, 2, 8)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(oracle(x), expected, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    wanted = [x, *module.parameters()]
    mine, theirs = (torch.autograd.grad(each, wanted, dy) for each in (y, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_steps_look_up_what_was_chosen_and_keep_what_was_pooled() -> None:
    module, oracle = both(MOBA.replace("OPTIONS", ""))
    x = drawn(45)
    cache = module.init_cache(2, 45)
    with gathering(module) as file, torch.no_grad():
        read = []
        own = file.over_steps

        def counted(*given: object, **how: object) -> Tensor:
            read.append(given[3].shape[2])
            done: Tensor = own(*given, **how)
            return done

        file.over_steps = counted  # type: ignore[attr-defined]
        parts = [module(x[:, :33], cache=cache)]
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(33, 45)]
        file.over_steps = own  # type: ignore[attr-defined]
    assert read == list(range(34, 46))  # of so many keys
    torch.testing.assert_close(torch.cat(parts, 1), oracle(x), rtol=1e-11, atol=1e-11)
    assert sorted(cache.parts) == ["kb_groups", "keys", "tails"]


def test_gathered_rows_of_large_logits_have_their_maxima() -> None:
    module, oracle = both(MOBA.replace("OPTIONS", ""))
    x = 40 * drawn(41)
    with gathering(module) as file:
        found = []
        own = file.row_maxima
        file.row_maxima = lambda *given: found.append(own(*given)) or found[-1]  # type: ignore[attr-defined]
        y = module(x)
        file.row_maxima = own  # type: ignore[attr-defined]
    assert found[0] is not None
    torch.testing.assert_close(y, oracle(x), rtol=1e-10, atol=1e-10)


WHOLE = "top(99, dot(q[h, i], kb[h, j // 8]), size = 8"


@pytest.mark.parametrize(
    "select",
    [
        f"{WHOLE}, always = blocks(8))",
        "top(99, s)",
        "above(-1e9, s)",
        "mass(1, s)",
        "random(99, size = 3)",
        "top(1, s, always = causal)",
        "top(1, i - j, size = 4, within = max, always = j >= 0, per = layer)",
    ],
)
@pytest.mark.parametrize("gathered", [False, True])
def test_a_selection_of_everything_is_the_dense_block(select: str, gathered: bool) -> None:
    text = (
        "block a { heads = 2; head_dim = 4; width = 12; mask = causal;"
        " let kb = k | pool(mean, size = 8); select = %s }"
    )
    module, oracle = both(text % select)
    dense, plain = both(text % "none")
    x = drawn(27)
    if gathered:
        with gathering(module):
            y = module(x)
    else:
        y = module(x)
    torch.testing.assert_close(y, dense(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(oracle(x), plain(x))


def test_of_equal_scores_the_first_groups_are_chosen() -> None:
    e = torch.tensor([[[[0.0, 2, 1, 1, 1, -torch.inf, torch.nan]]]])
    free = torch.ones_like(e, dtype=torch.bool)
    assert groups.top_groups(e, free, 3)[0, 0, 0].tolist() == [
        False, True, True, True, False, False, False,
    ]  # fmt: skip
    room = torch.tensor(2).expand(1, 1, 1, 1)
    assert groups.top_groups(e, free, room)[0, 0, 0].nonzero()[:, 0].tolist() == [1, 2]
    assert not groups.top_groups(e, free, 0 * room).any()
    assert groups.top_groups(e, free & (e == 1), 5).sum() == 3
    share = groups.groups_of_mass(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4).bool(), 0.5)
    assert share[0, 0, 0].tolist() == [True, True, False, False]


def test_a_row_that_chooses_nothing_is_zero() -> None:
    module, oracle = both(
        "block a { heads = 2; head_dim = 4; width = 12; mask = causal; select = above(1e9, s) }"
    )
    x = drawn(5).requires_grad_()
    assert not module(x).any()
    assert not oracle(x).any()
    (grad,) = torch.autograd.grad(module(x).sum(), x)
    assert not grad.any()


NAMES = (
    "pairs", "free", "always", "group", "first", "count", "e", "chosen", "forced",
    "begun", "sees", "keeps", "offers", "groups", "run_8", "starts_8", "repeated_0", "again",
    "root", "uses", "several", "offered", "below", "made", "mixed",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_streams_may_be_called_as_the_text_calls_its_own(name: str) -> None:
    """A choice brings names of its own, and so does the module that is the meaning."""
    text = f"""block a {{
      heads = 2; head_dim = 4; width = 12; mask = causal
      let kb = {name}_ | linear(8) | split(2) | pool(mean, size = 8)
      let {name}_ = x | linear(2)
      param {name}[heads] = 0.5 + h
      score  = s + {name}[h] * {name}_[j, h]
      select = top(1, dot(q[h, i], kb[h, j // 8]) + {name}[h] * (j // 8),
        size = 8, always = blocks(8))
    }}"""
    x = drawn(27)
    for each in (text, text.replace(f"{name}_", f"{name}__").replace(f"{name}[", f"w_{name}[")):
        module, oracle = both(each.replace(f"{name}__", name))
        torch.testing.assert_close(module(x), oracle(x), rtol=1e-11, atol=1e-11)


REFUSED = {
    "select = best(3)": "L241",
    "select = top(3)": "L209",
    "select = top(0, s)": "L203",
    "select = mass(2, s)": "L219",
    "select = top(3, s, size = 4)": "L241",
    "select = top(3, i - j, size = 4)": "L241",
    "select = top(3, j // 3, size = 4)": "L241",
    "select = top(3, s, per = token)": "L222",
    "let kb = k | pool(mean, size = 4); "
    "select = top(3, dot(q[h, i], kb[h, j // 4]), size = 4)": "L242",
    "let kb = k | pool(mean, size = 4); "
    "select = top(3, dot(q[h, i], kb[h, j // 4 + 1]), size = 4, always = blocks(4))": "L242",
    "let kb = k | pool(mean, size = 4, start = 2)": "L206",
    "let kb = k | windows(4)": "L206",
}


def test_a_stage_with_tensors_pools_nothing() -> None:
    text = """
        stage small { param b[features] = 0; (x | pool(mean, size = 4)) + b }
        block a { heads = 2; width = 8; k = x | small | linear | split; v = k }
    """
    with pytest.raises(LoomError) as caught:
        check(parse(text))
    assert [each.code for each in caught.value.diagnostics] == ["L206"]


@pytest.mark.parametrize("settings", REFUSED)
def test_it_is_refused(settings: str) -> None:
    text = f"block a {{ heads = 2; width = 8; mask = causal; {settings}; let used = x }}"
    with pytest.raises(LoomError) as caught:
        check(parse(text))
    assert [each.code for each in caught.value.diagnostics] == [REFUSED[settings]]


@pytest.mark.parametrize(
    "select",
    [
        "top(3, dot(q[h, i], kb[h, j // 4]), size = 4, among = j // 4 < i // 4)",
        "top(3, dot(q[h, i], kb[h, max(j // 4 - 1, 0)]), size = 4, always = blocks(4))",
        "top(3, dot(q[h, i], kb[h, j // 4]), size = 4, among = 4 * (j // 4) + 3 <= i)",
        "top(3, j // 4 * 2 + i, size = 4)",
    ],
)
def test_what_has_passed_may_be_read(select: str) -> None:
    text = (
        "block a { heads = 2; width = 8; mask = causal; "
        f"let kb = k | pool(mean, size = 4); select = {select} }}"
    )
    assert check(parse(text)).blocks["a"]


def test_what_the_ends_of_a_group_tell() -> None:
    told = {
        "j <= i": True,
        "i - j < 100": True,
        "i // 64 == j // 64": True,
        "j < 4": True,
        "i - j < 100 and j <= i": True,
        "i - j < 20 and j <= i": False,  # a window within a group
        "(i - j) % 3 == 0": False,
        "j > 4 and j < 9": False,
    }
    for text, tells in told.items():
        assert told_at_ends(parse_expression(text), 64, both=True) == tells, text


CHAIN = """
block chooses {
  heads = 2; head_dim = 4; mask = causal
  let a = x | linear(8) | split(2);  let c = x | linear(4);  let w = x | linear(2)
  select = top(3, sum_streams(w[i] * relu(dot(a[i], c[j]))), per = layer)
}
block uses  { heads = 2; head_dim = 4; mask = causal; select = previous.select }
block first { heads = 2; head_dim = 4; mask = causal; select = at(0).select }
model m { vocab = 20; width = 8; layers = [chooses, uses, LAST, uses] }
"""


def test_a_choice_is_passed_on_over_any_distance() -> None:
    """A layer that uses the choice of another has it for those above, as that one made it."""
    tokens = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    given = []
    for last in ("uses", "first"):
        arch = hl.load(CHAIN.replace("LAST", last), format="loom")
        module = hl.compile(arch, "m", backend="torch", dtype=torch.float64, seed=2)
        oracle = hl.reference(arch, "m", dtype=torch.float64)
        oracle.load_state_dict(module.state_dict())
        with torch.no_grad():
            given.append(module(tokens))
            torch.testing.assert_close(given[-1], oracle(tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(given[0], given[1], rtol=0, atol=0)


@pytest.mark.parametrize("length", [7, 32, 136, 137, 512])
def test_the_largest_of_many_are_those_of_topk(length):
    draw = torch.Generator().manual_seed(length)
    x = torch.randint(-9, 9, (3, 5, length), generator=draw).float()
    x[0, 0], x[1, 1, ::2] = -torch.inf, torch.inf
    best, place = groups.largest_of(x, min(17, length))
    assert torch.equal(best, x.topk(min(17, length), -1).values)
    assert torch.equal(x.gather(-1, place), best)
    assert all(len(set(row.tolist())) == len(row) for row in place.flatten(0, 1))

"""Each pass on a small graph, all passes on every example, and the verifier on broken graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from headloom.compiler.checking.check import check
from headloom.compiler.graph.build import build
from headloom.compiler.graph.graph import Graph, Node, verify
from headloom.compiler.graph.operations import Attend, Stage
from headloom.compiler.graph.passes import PASSES
from headloom.compiler.graph.passes.drop_dead import drop_dead
from headloom.compiler.graph.passes.drop_identities import drop_identities
from headloom.compiler.graph.passes.fold_scale import fold_scale
from headloom.compiler.graph.passes.fuse_attend import fuse_attend
from headloom.compiler.graph.passes.share import share
from headloom.compiler.lowerings.choose import choose
from headloom.compiler.pipeline import lower
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse
from headloom.grammar.show import show

from .battery import EXAMPLES, SETTINGS, block


def graph(settings: str) -> Graph:
    return build(block(f"block b {{ heads = 4; {settings} }}"))


def ops(what: Graph) -> list[str]:
    return [each for node in what.nodes if (each := node.op.name) not in ("input", "tensor")]


def test_the_graph_is_the_meaning_step_by_step():
    made = graph("mask = causal; dropout = 0.1")
    assert verify(made) == []
    assert ops(made)[-9:-2] == [
        "similarity",
        "score",
        "mask",
        "normalize",
        "weights",
        "drop",
        "combine",
    ]
    assert ops(made)[-2:] == ["merge", "linear"]
    assert made.node("s").inputs == ("q", "k")
    assert made.node(made.output).dims == ("b", "n", 16)


def test_identities_are_dropped():
    before = graph("mask = causal; let g = q")
    after = drop_identities(before)
    gone = {"score", "weights", "drop", "pointwise"}
    assert gone - {"pointwise"} <= set(ops(before))
    assert not gone & set(ops(after))
    assert after.node("p").inputs[0] == "s"
    assert verify(after) == []


def test_what_does_something_stays():
    before = graph("score = 2 * s; weights = p + 1; dropout = 0.1; q = x | linear | split | relu")
    assert drop_identities(before) == before


def test_equal_work_is_shared():
    before = graph("let c = x | linear | rms_norm; k = c | split; v = c | split")
    after = share(before)
    assert ops(before).count("split") == 3
    assert ops(after).count("split") == 2
    assert after.node("o").inputs[1] == "k"
    assert verify(after) == []


@pytest.mark.parametrize("k", ["c | dropout(0.5) | split", "c | linear | split"])
def test_draws_and_own_weights_are_not_shared(k):
    before = graph(f"let c = x | linear; k = {k}; v = {k}")
    assert ops(share(before)) == ops(before)


def test_attention_becomes_one_node():
    before = graph("mask = causal; position = alibi; normalize = sink; dropout = 0.1")
    after = drop_dead(fuse_attend(before))
    assert ops(after) == [each for each in ops(after) if each not in ops(before)[-9:-3]]
    node = next(after.of(Attend))
    assert (node.q, node.k, node.v) == ("q", "k", "v")
    assert set(node.others) == {"slope", "z"}
    assert node.op.mix.dropout == 0.1
    assert node.dims == before.node("o").dims
    assert verify(after) == []


@pytest.mark.parametrize(
    ("score", "folded", "factor"),
    [
        ("softcap(50)", "50 * tanh(s)", 1 / 50),
        ("tanh(2 * s) + sigmoid(s * 2)", "tanh(s) + sigmoid(s)", 2.0),
        ("tanh(s / 4) + s", "tanh(s / 4) + s", 1.0),  # not of all of it
        ("s / 4", "s / 4", 1.0),  # which is a logit by itself
    ],
)
def test_a_factor_of_s_is_part_of_the_scale(score, folded, factor):
    before = fuse_attend(graph(f"score = {score}"))
    after = fold_scale(before)
    (old,), (new,) = before.of(Attend), after.of(Attend)
    assert show(new.op.mix.score) == folded
    assert new.op.mix.scale == pytest.approx(old.op.mix.scale * factor)
    assert verify(after) == []


def test_expressions_follow_what_is_renamed():
    what = graph(
        "let t = x | linear(heads); score = s + t[j, h]; mask = t[i, 0] > t[j, 0]; "
        "weights = p + t[j, h]; normalize = relu(s + t[j, h])"
    )
    (node,) = fuse_attend(what).of(Attend)
    before, after = (node.op, node.op.renamed({"t": "u"}))
    assert [show(each) for each in after.exprs] == [
        show(each).replace("t[", "u[") for each in before.exprs
    ]
    assert after != before


def test_what_nobody_reads_is_dropped():
    before = graph("mask = causal")
    extra = Node("g", Stage("pointwise"), ("q",), before.node("q").dims)
    more = replace(before, nodes=(*before.nodes, extra))
    assert drop_dead(more) == before


@pytest.mark.parametrize("name", SETTINGS)
def test_every_pass_leaves_a_sound_graph(name):
    made = build(block(name))
    assert verify(made) == []
    for each in PASSES:
        made = each(made)
        assert verify(made) == [], each.__name__
        assert each(made) == made or each is not PASSES[-1]
    chosen = choose(made, Target("torch"))
    assert chosen.graph == made
    assert chosen.lowerings.keys() == chosen.block.mixings.keys()
    assert all(each.reason for each in chosen.lowerings.values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_sound_graph(path):
    arch = check(parse(path.read_text()))
    for what in arch.blocks.values():
        for target in (Target("torch"), Target("triton")):
            assert verify(lower(what, target).graph) == []


# ── the verifier ──────────────────────────────────────────────────────────────────────────

Break = Callable[[Graph], Graph]


def _node(at: str, **changes: object) -> Break:
    def change(before: Graph) -> Graph:
        nodes = (replace(each, **changes) if each.name == at else each for each in before.nodes)
        return replace(before, nodes=tuple(nodes))  # type: ignore[arg-type]

    return change


BROKEN: dict[str, tuple[Break, str]] = {
    "order": (lambda g: replace(g, nodes=g.nodes[::-1]), "before it is made"),
    "twice": (lambda g: replace(g, nodes=(*g.nodes, g.nodes[-1])), "made twice"),
    "operation": (_node("s", op=Stage("similitude")), "there is no operation `similitude`"),
    "inputs": (_node("s", inputs=("q",)), "`similarity` needs 2 inputs"),
    "dims": (_node("q", dims=("b", 2, "n", 8)), "`split` gives ('b', 4, 'n', 4)"),
    "module": (_node("q.1", module=""), "owns tensors and has no module"),
    "output": (lambda g: replace(g, output="z"), "the output `z` is not made"),
    "width": (lambda g: replace(g, output="o"), "the output is ('b', 4, 'n', 4)"),
    "unknown": (_node("s", inputs=("q", "kk")), "reads `kk` before it is made"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_caught(name):
    change, words = BROKEN[name]
    sound = graph("mask = causal")
    assert verify(sound) == []
    assert any(words in each for each in verify(change(sound)))


@pytest.mark.parametrize(("index", "path"), [
    ("h % 3", "triton"), ("clip(j, 0, 2)", "triton"), ("j", "triton"), ("i - j", "triton"),
    ("h", "triton"),
])  # fmt: skip
def test_a_kernel_reads_no_tensor_outside_of_it(index, path):
    what = block(f"block b {{ heads = 4; const t[3] = h; score = s + t[{index}] }}")
    assert lower(what, Target("triton")).lowerings["o"].path == path

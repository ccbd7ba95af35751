"""Holes of a grammatical kind: what is drawn is a plain, valid description, whatever it is."""

from __future__ import annotations

from collections import Counter

import pytest
from click.testing import CliRunner

from headloom.cli import main
from headloom.compiler.checking.check import check
from headloom.compiler.checking.library import standard
from headloom.compiler.facts.decoding import obstacle
from headloom.compiler.model import Mixing, Pairwise
from headloom.grammar import syntax
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.format import format_loom, format_yaml
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse
from headloom.search.choosers import First, Random
from headloom.search.kinds import _at
from headloom.search.overview import overview
from headloom.search.productions import DEFINED, INCLUDED, TEXTS
from headloom.search.space import alternatives, draw, grammar_of, has_holes, holes, size

SPACES = {
    "mask": "block a { heads = 2; head_dim = 8; mask = causal and any(mask, depth = 3) }",
    "pairs": """block a { heads = 2; head_dim = 8
        let t = x | linear(heads) | sigmoid; let u = x | linear(1)
        let open = (x | linear(1) | tanh) > 0
        param table[heads, 9] = normal(0.1); param one = 1
        mask = causal and any(mask); score = any(score, depth = 3)
        normalize = any(normalize, depth = 3); weights = any(weights)
        similarity = any(similarity); position = any(position) }""",
    "stages": """block a { heads = 2; head_dim = 8; mask = causal
        q = x | linear | split | any(stage); k = x | any(stage, depth = 3) | linear | split
        v = x | linear | any(stage) | split; out = o | any(norm) | merge | linear | any(stage) }""",
    "select": "block a { heads = 2; head_dim = 8; mask = causal and any(mask); "
    "select = any(select, depth = 3) }",
    "mix": "block a { heads = 2; head_dim = 8; mask = causal; mix = any(mix, depth = 3) }",
    "mix_of_all": "block a { heads = 2; head_dim = 8; mix = any(mix, depth = 3) }",
    "mix_of_a_window": "block a { heads = 2; head_dim = 8; mask = window(3); mix = any(mix) }",
    "model": """model m { vocab = 32; width = 16; layers = each(2, any(layer, depth = 4))
        ffn = any(ffn); norm = any(norm); embed = x | any(stage) }""",
    "both_ways": """model m { width = 16; head = classify(3); 
        layers = each(2, any(block, depth = 3)) }""",
    "definitions": """
        mask late(w) = causal and i - j >= w
        mask near(w = pow2(4..8)) = abs(i - j) < w
        mask rest = any(mask)
        score push(c) { param g[heads, c] = 0;  s + g[h, clip(j, 0, c - 1)] }
        score pull { let t = x | linear(heads);  s + any(bias) * t[j, h] }
        weights most = p * any(factor)
        normalize soft = any(rising) / (2 + sum)
        stage dyt { param g[features] = 1;  g * tanh(x) }
        stage smooth = | conv(3) | silu
        stage half = | linear(8)
        stage folded(act) = x | act
        mix keep { state S[head_dim, value_dim] = 0; S <- 0.9 * S + outer(k, v); o <- q @ S }
        ffn small(act) { out = x | linear(8) | act | linear }
        layer two(one, ffn) { out = x + (x | norm | one) + (x | ffn) }
        block ahead { heads = 2; head_dim = 8 }
        block drawn { heads = 2; head_dim = 8; mask = causal and any(mask, depth = 3)
          score = any(score); weights = any(weights); normalize = any(normalize)
          q = x | linear | split | any(stage) }
        block mixed : drawn { mask = causal; mix = any(mix) }
        model m { vocab = 32; width = 16; layers = each(2, any(layer, depth = 4)) + [drawn, mixed] }
        """,
}
FILES = {name: parse(text) for name, text in SPACES.items()}
FORWARD = ("mask", "pairs", "stages", "mix", "model")  # spaces in which no token sees a later one


def valid(name: str, seed: int) -> syntax.File:
    """One draw, after it has been printed, parsed and checked."""
    file = draw(FILES[name], Random(seed))
    assert not has_holes(file)
    text = format_loom(file)
    assert parse(text) == file
    arch = check(parse(text))
    assert not {each.code for each in arch.warnings} - {"W002", "W003"}, text
    if name in FORWARD:
        blocks = [*arch.blocks.values(), *(each for m in arch.models.values() for each in m.layers)]
        assert all(obstacle(each) is None for each in blocks if each.kind == "block"), text
    return file


@pytest.mark.parametrize("name", SPACES)
def test_every_draw_is_a_plain_valid_text(name):
    assert (
        len({valid(name, seed) for seed in range(12 if "model" in SPACES[name] else 40)}) > 1
        or name == "mix_of_a_window"
    )


@pytest.mark.sweep
@pytest.mark.parametrize("name", SPACES)
def test_thousands_of_draws_are_plain_valid_texts(name):
    for seed in range(1500):
        valid(name, 10_000 + seed)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SPACES)
def test_draws_are_what_they_mean(name):
    import headloom as hl

    for seed in range(2):
        arch = check(valid(name, seed))
        for each in arch.models or list(arch.blocks)[:1]:
            certificate = hl.verify(arch, each)
            assert certificate.ok, f"{format_loom(arch.file)}\n{certificate}"


# ── what there is to draw ────────────────────────────────────────────────────────────────


def names(text: str, kind: str, item: str = "a") -> set[str]:
    file = parse(text)
    grammar = grammar_of(file)
    place = grammar.place(next(each for each in file.items if each.name == item))
    return {each.name for each in grammar.productions(kind, place)}


def test_every_definition_of_the_library_is_a_production():
    found = {
        kind: names("block a { heads = 2; mask = causal }", kind) for kind in (*DEFINED, "score")
    }
    for each in standard():
        of = [kind for kind, defined in DEFINED.items() if defined == each.kind]
        assert any(each.name in found[kind] for kind in of), each.name


def test_a_definition_of_the_file_is_a_production_where_it_fits():
    text = SPACES["definitions"]
    assert "near" in names(text, "mask", "drawn")
    assert "late" in names(text, "keys", "drawn")  # with w > 0 a token does not see itself
    assert "late" not in names(text, "mask", "drawn")
    assert {"dyt", "smooth"} <= names(text, "stage", "drawn")
    assert "half" not in names(text, "stage", "drawn")
    assert "keep" in names(text, "mix", "mixed")
    assert "ahead" not in names(text, "block", "m")
    assert "mixed" in names(text, "block", "m")


def test_none_is_drawn_that_leads_back_to_where_it_stands():
    assert "rest" in names(SPACES["definitions"], "mask", "m")
    assert "rest" not in names(SPACES["definitions"], "mask", "rest")
    assert "pull" not in names(SPACES["definitions"], "score", "pull")


def test_what_can_be_read_is_a_production():
    text = SPACES["pairs"]
    assert {"t", "u", "table", "one"} <= names(text, "bias")
    assert "open" in names(text, "keys")
    crossing = (
        "block a { heads = 2; source = context; let t = x | linear(heads); score = any(bias) }"
    )
    drawn = {format_loom(draw(parse(crossing), Random(seed))) for seed in range(200)}
    assert any("t[i, h]" in each for each in drawn)
    assert not any("t[j, h]" in each for each in drawn)


def test_a_base_is_read_too():
    text = "block b { heads = 2; let t = x | linear(heads) }\nblock a : b { score = any(bias) }"
    assert "t" in names(text, "bias")


def test_mixers_fit_the_mask():
    small = "block a {{ heads = 2; mask = {mask}; mix = any(mix) }}"
    assert names(small.format(mask="window(4)"), "mix") == {"attend"}
    assert names(small.format(mask="any(mask)"), "mix") == {"attend"}
    assert "gated_delta" in names(small.format(mask="causal and document"), "mix")
    assert "gated_delta" not in names(small.format(mask="all"), "mix")
    assert "linear" in names(small.format(mask="all"), "mix")


def test_a_models_own_stages_look_at_one_token():
    assert "conv" not in names(SPACES["model"], "stage", "m")
    assert "conv" in names(SPACES["stages"], "stage", "a")


def test_a_token_sees_itself_in_every_drawn_mask():
    file = parse("block a { heads = 2; head_dim = 8; mask = any(mask, depth = 4) }")
    from headloom.grammar.expr import evaluate

    for seed in range(200):
        (flow,) = (
            each.flow
            for each in check(draw(file, Random(seed))).blocks["a"].streams
            if isinstance(each.flow, Mixing)
        )
        assert isinstance(flow.mix, Pairwise)
        assert all(evaluate(_at(flow.mix.mask, at, 0), {}) for at in (0, 1, 5, 63, 64, 65))


# ── how often, how deep ──────────────────────────────────────────────────────────────────


def masks(hole: str, draws: int) -> Counter[str]:
    file = parse(f"block a {{ heads = 2; mask = {hole} }}")
    found: Counter[str] = Counter()
    for seed in range(draws):
        item = draw(file, Random(seed)).items[0]
        value = next(each.value for each in item.body if each.name == "mask")
        found[getattr(value, "function", getattr(value, "id", getattr(value, "op", "")))] += 1
    return found


def test_weights_say_how_often():
    some = "all(0), prefix(0), strided(0), blocks(0), document(0), power(0)"
    found = masks(f"any(mask, depth = 0, weights = [window(8), {some}])", 450)
    assert set(found) == {"causal", "window"}
    assert 7 < found["window"] / found["causal"] < 9.5


def test_weights_go_on_within_the_kind():
    file = parse("block a { heads = 2; mask = any(mask, depth = 4, weights = [window(0)]) }")
    text = "".join(format_loom(draw(file, Random(seed))) for seed in range(60))
    assert " and " in text
    assert "window" not in text


def test_depth_bounds_a_draw():
    def deep(expr: syntax.Expr) -> int:
        within = max(map(deep, syntax.children(expr)), default=0)
        return within + (isinstance(expr, syntax.Binary) and expr.op == "and")

    heavy = "weights = [both(50)]"
    for depth in range(4):
        file = parse(f"block a {{ heads = 2; mask = any(mask, depth = {depth}, {heavy}) }}")
        found = set()
        for seed in range(20):
            item = draw(file, Random(seed)).items[0]
            found.add(max(deep(each.value) for each in item.body if each.name == "mask"))
        assert max(found) == depth


def test_every_kind_ends_by_itself():
    """Below one, the mean offspring of a production dies out."""
    for kind in TEXTS:
        if kind == "both_ways":
            continue
        file = parse(f"block a {{ heads = 2; mask = causal; let t = x | any({kind}, depth = 5) }}")
        (growth,) = overview(file).growth
        assert growth.radius < 0.9, growth
        assert growth.expected < 20, growth


def test_the_expected_size_is_what_draws_have():
    file = parse("block a { heads = 2; mask = any(mask, depth = 3) }")
    (growth,) = overview(file).growth
    taken: list[bool] = []

    class Counted(Random):
        def category(self, name, choices, weights):
            taken.append(choices[0] in ("all", "sink"))
            return super().category(name, choices, weights)

    for seed in range(600):
        draw(file, Counted(seed))
    assert sum(taken) / 600 == pytest.approx(growth.expected, rel=0.1)


@pytest.mark.parametrize(("depth", "count"), [(0, 1), (1, 2), (2, 5), (3, 26)])
def test_size_counts_what_a_kind_may_become(depth, count):
    none = ("all", "window", "prefix", "strided", "blocks", "document", "power", "either", "itself")
    weights = ", ".join(f"{each}(0)" for each in none)  # left are `causal` and `both`
    hole = f"any(mask, depth = {depth}, weights = [{weights}])"
    file = parse(f"block a {{ heads = 2; mask = {hole} }}")
    assert size(file) == count
    if count < 10:
        assert len({draw(file, Random(seed)) for seed in range(200)}) == count


# ── names, YAML, the draws' own files ────────────────────────────────────────────────────


def test_the_same_seed_draws_the_same():
    for file in FILES.values():
        assert draw(file, Random(5)) == draw(parse(format_loom(file)), Random(5))


def test_a_name_has_the_same_choices_in_every_draw():
    for file in FILES.values():
        known: dict[str, tuple] = {}

        class Noting(Random):
            def category(self, name, choices, weights):
                assert known.setdefault(name, choices) == choices  # noqa: B023
                return super().category(name, choices, weights)

        for seed in range(30):
            draw(file, Noting(seed))


def test_yaml_means_the_same():
    for file in FILES.values():
        assert draw(parse_yaml(format_yaml(file)), Random(3)) == draw(file, Random(3))


def test_blocks_that_are_drawn_stand_in_the_file():
    file = parse("model m { vocab = 8; width = 16; layers = each(3, any(block)) }")
    drawn = draw(file, First())
    blocks = [each for each in drawn.items if isinstance(each, syntax.Block)]
    assert [each.name for each in blocks] == ["m_layers_0"]  # equal ones are one
    assert len(check(drawn).models["m"].layers) == 3


def test_a_drawn_name_is_free():
    file = parse("block m_layers_0 { heads = 2 }\nmodel m { width = 16; layers = [any(block)] }")
    drawn = draw(file, Random(1))
    assert len({each.name for each in drawn.items}) == len(drawn.items)


def test_alternatives_hold_every_production_once():
    file = FILES["mask"]
    text = "".join(map(format_loom, alternatives(file)))
    for each in ("window", "strided", "sink", "i == j or"):
        assert each in text
    assert len(list(alternatives(file))) < 20


def test_a_kind_is_drawn_once_for_a_let():
    file = parse(
        "let m = any(mask)\nblock a { heads = 2; mask = m }\nblock b { heads = 4; mask = m }"
    )
    assert holes(file)[0].name == "m"
    values = {each.body[1].value for each in draw(file, Random(2)).items}
    assert len(values) == 1


def test_every_text_is_used():
    assert set(INCLUDED) <= set(TEXTS)
    assert set(DEFINED) <= set(TEXTS)


@pytest.mark.parametrize(
    ("hole", "code"),
    [
        ("any(masks)", "L508"),
        ("any()", "L506"),
        ("any(mask, deep = 2)", "L506"),
        ("any(mask, depth = 20)", "L506"),
        ("any(mask, weights = [1])", "L503"),
        ("any(mask, weights = [window(0 - 1)])", "L503"),
        ("any(mask, weights = [windoww(1)])", "L513"),
    ],
)
def test_what_a_hole_of_a_kind_cannot_say(hole, code):
    with pytest.raises(LoomError) as caught:
        draw(parse(f"block a {{ heads = 2; mask = {hole} }}"), First())
    assert [each.code for each in caught.value.diagnostics] == [code]


def test_show_says_what_there_is_to_draw(tmp_path):
    path = tmp_path / "space.loom"
    path.write_text("block a { heads = 2; mask = causal and any(mask) }")
    done = CliRunner().invoke(main, ["show", str(path), "--space"])
    assert done.exit_code == 0, done.output
    assert "spectral radius 0." in done.output
    assert "window" in done.output
    done = CliRunner().invoke(main, ["show", str(path), "--space", "--json"])
    assert '"radius"' in done.output


def test_a_study_draws_holes_of_a_kind(tmp_path):
    from headloom.search.study import search

    text = """
block a { heads = 2; mask = causal and any(mask) ; normalize = any(normalize) }
model m { vocab = 16; width = 8; ffn = none; embed_position = learned(8)
  layers = [a, any(block)] }
search { model = m; task = mqar(vocab = 16, pairs = 2, length = 8); maximize = accuracy
  train = adamw(steps = 1, batch = 2, examples = 4); trials = 2 }
"""
    path = tmp_path / "space.loom"
    path.write_text(text)
    study = search(path, out=tmp_path / "run")
    assert len(study.trials) == 2
    assert any("a.mask" in each.params for each in study.trials)

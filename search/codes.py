"""The errors of a search: one entry a code, each with a text that triggers it.

`form` says how: L501 to L531 by reading the text (`loom`, as a space and as a plan); L545 by
running its search; `folder` ones by the state of the study's folder, which no text can show.
"""

from __future__ import annotations

from ..grammar.codes import Code

_MODEL = "model m { vocab = 64; width = 16; layers = [b] }\nblock b { heads = 2; mask = causal }\n"


def _search(*settings: str) -> str:
    """A file whose search block has these settings, besides a model, a task and a goal."""
    usual = {"model": "m", "task": "mqar", "maximize": "accuracy"}
    given = {each.partition("=")[0].strip() for each in settings}
    rest = [f"{name} = {value}" for name, value in usual.items() if name not in given]
    return _MODEL + "search { " + "; ".join([*rest, *settings]) + " }\n"


CODES: dict[str, Code] = {
    code.code: code
    for code in (
        Code(
            "L501",
            "a range is empty",
            "The first number of a range is its lower end; both ends belong to it.",
            "block a { heads = integer(8..2) }",
        ),
        Code(
            "L502",
            "`choose` has nothing to choose from",
            "Give it one alternative at least.",
            "block a { heads = choose() }",
        ),
        Code(
            "L503",
            "`weights` do not fit the alternatives",
            "There is one number, zero or more, for each alternative, and one at least is "
            "more than zero. They say how often each is drawn at random.",
            "block a { heads = choose(2, 4, weights = [1]) }",
        ),
        Code(
            "L504",
            "no power of two lies in the range",
            "`pow2(lo..hi)` draws 1, 2, 4, 8 …; widen the range.",
            "block a { heads = pow2(5..7) }",
        ),
        Code(
            "L505",
            "`loguniform` begins at zero or below",
            "It draws the logarithm evenly, which has no lower end there. Begin above zero, "
            "or write `uniform`.",
            "block a { dropout = loguniform(0..0.5) }",
        ),
        Code(
            "L506",
            "a hole has other arguments",
            "`choose(a, b, …, weights = [..])`, `maybe(e)`, and `integer`, `pow2`, "
            "`uniform` and `loguniform` with one range `lo..hi`, whole numbers for the "
            "first two.",
            "block a { heads = integer(2, 8) }",
        ),
        Code(
            "L507",
            "`maybe` where nothing cannot stand",
            "A setting, a list's item, a stage, a named argument and one side of `and`, "
            "`or`, `+` or `*` may be left out. Elsewhere write `choose(e, …)`.",
            "block a { mask = not maybe(causal) }",
        ),
        Code(
            "L508",
            "`any` of something that is no kind",
            "A kind is what a text can be: `mask`, `score`, `normalize`, `weights`, `similarity`, "
            "`mix`, `stage`, `block`, `layer` and others that these are made of.",
            "block a { mask = any(masks, depth = 2) }",
        ),
        Code(
            "L509",
            "`each` repeats something else than a whole number of times",
            "`each(n, e)` draws e n times; n is a whole number from 0 to 4096, or a hole "
            "that draws one.",
            "model m { width = 8; layers = each(1.5, a) }\nblock a { heads = 2 }",
        ),
        Code(
            "L510",
            "a `let` reads itself",
            "A tied name needs a value that does not depend on itself.",
            "let a = b\nlet b = a\nblock c { heads = a }",
        ),
        Code(
            "L511",
            "an alternative stands twice",
            "Two alternatives with the same text are one. To draw it more often, use `weights`.",
            "block a { heads = choose(2, 2) }",
        ),
        Code(
            "L512",
            "the end of a range has no number",
            "Ends are numbers, or names of `let`s and parameters that are drawn or set.",
            "block a { heads = integer(1..n) }",
        ),
        Code(
            "L513",
            "`any(kind)` has no such production",
            "`weights = [window(4), sink(0)]` says how often productions are drawn, next to 1 for "
            "others; their names are those of definitions, and those that `headloom show FILE "
            "--space` lists.",
            "block a { mask = any(mask, weights = [windows(4)]) }",
        ),
        Code(
            "L514",
            "nothing is left of `any(kind)`",
            "At depth 0 a production has no holes of a kind within it; one at least needs a "
            "weight above zero.",
            "block a { mix = any(mix, depth = 0, weights = [attend(0)]); mask = window(2) }",
        ),
        Code(
            "L520",
            "not exactly one search block",
            "A search reads one `search { … }` block of the file.",
            _MODEL,
        ),
        Code(
            "L521",
            "`search` has no such setting",
            "It has model, task, maximize, minimize, require, train, trials, sampler, seed "
            "and out, each once.",
            _search("trails = 5"),
        ),
        Code(
            "L522",
            "something is missing in the search block",
            "A model, a task, and one goal at least.",
            _MODEL + "search { model = m; maximize = accuracy }",
        ),
        Code(
            "L523",
            "there is no such model",
            "`model` names a model of the same file.",
            _search("model = n"),
        ),
        Code(
            "L524",
            "there is no such task",
            "Tasks are generators of seeded examples; `mqar` is associative recall.",
            _search("task = mqr"),
        ),
        Code(
            "L525",
            "the settings of a task do not fit together",
            "`mqar` needs an even `length` of 4 · pairs or more, and a `vocab` that gives "
            "each pair a key and a value of its own.",
            _search("task = mqar(pairs = 10, length = 16)"),
        ),
        Code(
            "L526",
            "there is no such objective",
            "`accuracy` is measured; `params`, `flops`, `cache_bytes` and "
            "`activation_bytes` follow from the architecture.",
            _search("minimize = latencies"),
        ),
        Code(
            "L527",
            "an objective has other arguments",
            "`params` and `accuracy` take none; the others take `tokens = …`. An objective "
            "stands once.",
            _search("minimize = flops"),
        ),
        Code(
            "L528",
            "`require` cannot be decided before training",
            "It compares what follows from the architecture alone, and is true or false.",
            _search("require = accuracy > 0.5"),
        ),
        Code(
            "L529",
            "the settings of `train` are wrong",
            "`adamw(lr, steps, batch, weight_decay, warmup, schedule, clip, seed, examples, "
            "timeout)`, all optional; `schedule` is `cosine` or `constant`.",
            _search("train = adamw(steps = 0)"),
        ),
        Code(
            "L530",
            "a setting of the search block has a wrong value",
            "`trials` is 1 or more, `seed` 0 or more, `sampler` is `random` or `tpe`, and "
            "`out` a folder in double quotes.",
            _search("sampler = annealing"),
        ),
        Code(
            "L531",
            "a hole where the search must be fixed",
            "Holes stand in models, blocks, definitions and `train`; the rest of the search "
            "block is the same for all trials.",
            _search("trials = integer(1..9)"),
        ),
        Code(
            "L540",
            "the folder of the study cannot be written",
            "It may not exist, be read-only or full. What is done is kept: make room and "
            "run the same command again.",
            "/proc/no/such/folder",
            form="folder",
        ),
        Code(
            "L541",
            "the folder holds the study of another spec",
            "A study goes on only with what it began with; `trials` and `out` alone may "
            "change. Undo the change or use another `out`.",
            "",
            form="folder",
        ),
        Code(
            "L542",
            "another process is searching in the folder",
            "One process at a time writes to a study. Wait, or use another `out`.",
            "",
            form="folder",
        ),
        Code(
            "L543",
            "there is no study in the folder",
            "`report` reads what `search` has written.",
            "",
            form="folder",
        ),
        Code(
            "L544",
            "the folder holds a study already",
            "Without `resume` a search begins anew, in a folder without a study.",
            "",
            form="folder",
        ),
        Code(
            "L545",
            "no draw keeps what is required",
            "200 draws in a row were refused before training. The message shows the "
            "commonest reason; loosen `require` or narrow the holes.",
            _search("require = params < 1"),
            form="search",
        ),
    )
}

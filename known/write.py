"""A kind and a configuration → Loom text, each line with the fields it came from beside it."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from contextlib import suppress

from ..grammar.diagnostics import LoomError
from ..grammar.format import format_loom
from ..grammar.parse import parse
from .config import Config
from .definitions import DEFINITIONS
from .fill import arguments, fill
from .kind import Kind, Settings
from .layers import LISTS, written

PLAIN = {  # what a block says by itself
    "q": "x | linear | split",
    "k": "x | linear | split",
    "v": "x | linear | split",
    "out": "o | merge | linear",
    "position": "none",
    "embed": "x",
    "head": "x | norm | linear(vocab)",
    "norm": "rms_norm",
    "layer": "pre",
    "tie": "false",
}
ALIKE = 4  # how many settings may differ where a block is written as a change of another
NAMES = {"full_attention": "global", "sliding_attention": "local", "linear_attention": "linear_"}
ALONE = "attention"  # what the only kind of attention is called
Lines = dict[str, tuple[str, tuple[str, ...]]]  # a setting: its text, the fields it came from


def write(kind: Kind, config: Config) -> str:
    """Return the description of a configured model. Raises `LoomError` for what cannot be said."""
    config.taken()
    mixers, mixers_from = _listed(kind.mixers, config)
    parts, parts_from = _listed(kind.parts, config) if kind.parts else (["none"] * len(mixers), ())
    blocks = _blocks(kind, config, list(dict.fromkeys(mixers)))
    ffns = {name: _line(kind.ffns[name], config) for name in dict.fromkeys(parts)}
    _pass_over(kind, config, {*mixers, *parts})
    usual = Counter(parts).most_common(1)[0][0]
    model = _filled(kind.model, config)
    wrap = model.get("layer", ("pre", ()))[0]
    called = []
    for mixer, part in zip(mixers, parts, strict=True):
        around = kind.around.get(mixer, kind.around.get(part, wrap))
        plain = part == usual and mixer not in blocks.feeds and around == wrap
        place = blocks.places[mixer]
        called.append(place if plain or not around else f"{around}({place}, {ffns[part][0]})")
    beside = tuple(dict.fromkeys(mixers_from + parts_from))
    model = {
        **{name: model[name] for name in ("vocab", "width") if name in model},
        "layers": (written(called), beside),
        **({"layer": model["layer"]} if "layer" in model else {}),
        "ffn": ffns[usual],
        **{name: each for name, each in model.items() if name not in ("vocab", "width", "layer")},
    }
    body = [*blocks.texts, f"model {model_name(config)} {{", *_shown(model), "}"]
    text = "\n".join(body)
    defs = _definitions(text, kind, config)
    head = _comment(_about(kind, config))
    return format_loom(parse("\n".join([head, *defs, text, ""])))


def _pass_over(kind: Kind, config: Config, used: set[str]) -> None:
    """Note the fields of what no layer has: they say nothing here."""
    for name, said in [*kind.blocks.items(), *kind.ffns.items()]:
        for text in [said] if isinstance(said, str) else said.values():
            if name not in used:
                with suppress(LoomError):
                    fill(text, config)
    config.taken()


def model_name(config: Config) -> str:
    """Return what the model is called in the text."""
    return re.sub(r"\W", "_", config.kind)


def _about(kind: Kind, config: Config) -> str:
    """Return `NAME (WHO; in Transformers): WHAT` of `NAME; WHO: WHAT`."""
    name, _, rest = kind.about.partition("; ")
    who, colon, what = rest.partition(": ")
    return f"{name} ({who}; `{config.kind}` in Transformers){colon}{what}"


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, 97))


def _listed(text: str, config: Config) -> tuple[list[str], tuple[str, ...]]:
    name, _, given = text.partition("(")
    found = LISTS[name](config, **arguments(given.removesuffix(")")))
    return found, config.taken()


def _line(text: str, config: Config) -> tuple[str, tuple[str, ...]]:
    config.taken()
    return fill(text, config), config.taken()


def _filled(settings: Settings, config: Config) -> Lines:
    """Fill every setting; those that say nothing, or what is so anyway, are left out."""
    found = {name: _line(text, config) for name, text in settings.items()}
    return {
        name: (text, said)
        for name, (text, said) in found.items()
        if text and PLAIN.get(name) != text
    }


def _shown(lines: Lines) -> list[str]:
    """Write settings, each with the fields it came from."""
    done = []
    for name, (text, said) in lines.items():
        mark = " " if text.startswith("{") else " = "
        fields = [each for each in said if each not in ("hidden_size", "num_attention_heads")]
        beside = f"  # {', '.join(fields or said)}" if said else ""
        line = f"  {name}{mark}{text}"
        above = [f"  {beside.strip()}"] if beside and len(line + beside) > 92 else []
        done += [*above, line if above else line + beside]
    return done


class _Blocks:
    """The blocks of a text: what they say, and how each kind of layer calls its own."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.places: dict[str, str] = {}
        self.feeds: set[str] = set()  # those that are feed-forwards


def _blocks(kind: Kind, config: Config, types: list[str]) -> _Blocks:
    done = _Blocks()
    filled: dict[str, Lines] = {}
    for name in types:
        if name not in kind.blocks:
            known = ", ".join(kind.blocks)
            raise config.error("L602", f'layers of the kind "{name}" are not supported', help=known)
        said = kind.blocks[name]
        if isinstance(said, str):
            done.places[name], _ = _line(said, config)
            done.feeds.add(name)
        else:
            filled[name] = _filled(said, config)
    attentions = [name for name in filled if name.endswith("attention")]
    before: tuple[str, Lines] | None = None
    for name, lines in filled.items():
        called = ALONE if attentions == [name] else NAMES.get(name, name)
        done.places[name] = called
        base, own = _changed(before, lines)
        done.texts += [f"block {called}{base} {{", *_shown(own), "}", ""]
        before = before or (called, lines)
    return done


def _changed(before: tuple[str, Lines] | None, lines: Lines) -> tuple[str, Lines]:
    """Return a base and what differs from it, where that is little."""
    if before is None:
        return "", lines
    base, other = before
    own = {name: it for name, it in lines.items() if other.get(name, ("",))[0] != it[0]}
    gone = {name: (PLAIN.get(name, ""), ()) for name in other if name not in lines}
    if len(own) + len(gone) > ALIKE or not all(text for text, _ in gone.values()):
        return "", lines
    return f" : {base}", {**own, **gone}


def _definitions(text: str, kind: Kind, config: Config) -> list[str]:
    """Return the definitions that a text needs, those they need before them."""
    known = {**DEFINITIONS, **kind.defs}
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        words = set(re.findall(r"\w+", re.sub(r"#.*", "", waiting.pop())))
        for name in known:
            if name in words and name not in found:
                said, fields = _line(known[name].strip("\n"), config)
                note = _comment(", ".join(fields)) + "\n" if fields else ""
                found[name] = f"{note}{said}\n"
                waiting.append(said)
    return [found[name] for name in known if name in found]

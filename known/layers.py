"""Which mixer and which feed-forward stand in each layer, and how a list of them is written.

>>> written(["local", "local", "global"] * 4)
'([local] * 2 + [global]) * 4'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from .config import Config


def all_of(config: Config, it: str) -> list[str]:
    """The same in every layer."""
    return [it] * config.get("num_hidden_layers")


def listed(config: Config, of: str = "layer_types", usual: str = "") -> list[str]:
    """As a list of the configuration names them; without one, what is usual."""
    said = config.get(of)
    if said is None and usual:
        return all_of(config, usual)
    found = list(said)
    depth = config.get("num_hidden_layers") if config.knows("num_hidden_layers") else len(found)
    if len(found) != depth:
        raise config.unsupported(of, f"one for each of {depth} layers")
    return [str(each) for each in found]


def as_many(config: Config, of: str, it: str) -> list[str]:
    """The same for every one of a list."""
    return [it] * len(config.get(of))


def chosen(config: Config, of: str, yes: str, no: str) -> list[str]:
    """One of two, as a list of ones and zeros says."""
    return [yes if each else no for each in config.get(of)]


def first(config: Config, of: str, before: str, after: str) -> list[str]:
    """One below a layer, the other from it on."""
    count = config.get(of) or 0
    return [before if at < count else after for at in range(config.get("num_hidden_layers"))]


def between(config: Config, of: str, to: str, step: str) -> list[str]:
    """Sparse from one layer to another, both of them too, in every so many; else dense."""
    low, high, every = (config.get(each) for each in (of, to, step))
    depth = range(config.get("num_hidden_layers"))
    high = high if high >= 0 else len(depth) - 1
    found = [low <= at <= high and (at + 1) % every == 0 for at in depth]
    return ["sparse" if each else "dense" for each in found]


def periodic(config: Config, of: str, offset: str, yes: str, no: str) -> list[str]:
    """One in every so many layers, from an offset on, else the other."""
    every, start = config.get(of), config.get(offset)
    return [yes if at % every == start else no for at in range(config.get("num_hidden_layers"))]


def among(config: Config, of: str, yes: str, no: str) -> list[str]:
    """One in the layers that a list names, else the other."""
    found = config.get(of) or []
    return [yes if at in found else no for at in range(config.get("num_hidden_layers"))]


def cycled(config: Config, of: str) -> list[str]:
    """A list that begins again where it ends."""
    found = list(config.get(of))
    return [found[at % len(found)] for at in range(config.get("num_hidden_layers"))]


def halves(config: Config, of: str, then: str, last: str) -> list[str]:
    """Two for each layer of theirs, of two lists in turn, and one after all."""
    pairs = zip(listed(config, of), listed(config, then), strict=True)
    return [*(each for pair in pairs for each in pair), last]


def has(config: Config, of: str) -> list[str]:
    """Sparse where a number is above zero, else dense."""
    return all_of(config, "sparse" if config.get(of) else "dense")


def stepped(config: Config, experts: str = "num_experts") -> list[str]:
    """Sparse in every `decoder_sparse_step`th layer but those `mlp_only_layers` names."""
    step, without = config.get("decoder_sparse_step"), config.get("mlp_only_layers") or []
    count = config.get(experts)
    depth = range(config.get("num_hidden_layers"))
    found = [at not in without and count > 0 and (at + 1) % step == 0 for at in depth]
    return ["sparse" if each else "dense" for each in found]


LISTS: dict[str, Callable[..., list[str]]] = {
    "all": all_of,
    "listed": listed,
    "as_many": as_many,
    "chosen": chosen,
    "first": first,
    "between": between,
    "among": among,
    "cycled": cycled,
    "halves": halves,
    "has": has,
    "periodic": periodic,
    "stepped": stepped,
}


def written(names: Sequence[str]) -> str:
    """Return a list of layers as Loom writes it: what repeats is multiplied."""
    depth = len(names)
    for period in range(1, depth):
        if depth % period == 0 and list(names) == list(names[:period]) * (depth // period):
            inner = _runs(names[:period])
            inner = f"({inner})" if " + " in inner else inner
            return f"{inner} * {depth // period}"
    return _runs(names)


def _runs(names: Sequence[str]) -> str:
    """Return runs of the same, those of one name joined in one list."""
    parts: list[str] = []
    single: list[str] = []
    for name, group in groupby(names):
        count = len(list(group))
        if count == 1:
            single.append(name)
            continue
        if single:
            parts.append(f"[{', '.join(single)}]")
            single = []
        parts.append(f"[{name}] * {count}")
    if single:
        parts.append(f"[{', '.join(single)}]")
    return " + ".join(parts)

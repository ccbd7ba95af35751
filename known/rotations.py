"""Rotary positions of a configuration: rope parameters as Loom's `rope`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .config import Config
from .words import value

_LENGTH = "original_max_position_embeddings"


def head_size(config: Config) -> int:
    """Return how many features a head has."""
    if config.has("head_dim"):
        return int(config.get("head_dim"))
    return int(config.get("hidden_size")) // int(config.get("num_attention_heads"))


def rope(
    config: Config,
    of: str = "",
    style: str = "half",
    dims: str = "",
    size: str = "",
    field: str = "rope_parameters",
    behind: str = "",
    inverse: str = "",
    more: str = "",
) -> str:
    """Return a rotation: its base, how many features, how they pair, what is scaled.

    `of` is a kind of layer with rope parameters of its own, `dims` a field that says how many
    features turn, `size` one that says how many there are; `behind` turns the last ones, `more` is
    a parameter that is read elsewhere.
    """
    said = config.get(field)
    if of and of in said:
        said = said[of]
    elif any(isinstance(each, Mapping) for each in said.values()):
        raise config.unsupported(field, "the same for all layers of this kind")
    name = said.get("rope_type", "default")
    if name not in KEYS:
        where = field if field in config.fields else "rope_parameters"
        raise config.unsupported(where, f"a rope_type of {', '.join(KEYS)}")
    parts = [f"theta = {value(said['rope_theta'])}"]
    whole = config.get(size) if size else head_size(config)
    share = said.get("partial_rotary_factor") or 1
    turned = config.get(dims) if dims else int(whole * share)
    if name == "proportional":
        turned = whole
    if behind:
        parts.append(f"dims = -{turned}")
    elif turned != whole:
        parts.append(f"dims = {turned}")
    if style != "half":
        parts.append(f"style = {style}")
    _all_known(config, field, {key: it for key, it in said.items() if key != more}, name)
    if name != "default":
        parts.append(f"scaling = {SCALINGS[name](_completed(config, said))}")
    config.note(_LENGTH)
    if inverse:
        parts.append("inverse = true")
    return f"rope({', '.join(parts)})"


def _all_known(config: Config, field: str, said: Mapping[str, Any], name: str) -> None:
    """Refuse a key of rope parameters that its type does not know."""
    usual = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings"}
    known = usual | KEYS.get(name, set())
    for key, each in said.items():
        if key not in known and each is not None:
            help = f"a {name} rotation knows {', '.join(sorted(known - usual)) or 'no such field'}"
            raise config.error("L602", f"`{field}.{key}` = {each} is not supported", key, help)


def _completed(config: Config, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope parameters with the `length` of first training and the `longest` there is."""
    longest = config.get("max_position_embeddings")
    length = said.get(_LENGTH)
    if not length and config.has(_LENGTH):
        length = config.get(_LENGTH)
    length = length or longest
    return {"factor": longest / length, **_given(said), "length": length}


def _given(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in said.items() if each is not None}


def _yarn(said: Mapping[str, Any]) -> str:
    parts = [value(said["factor"]), str(said["length"])]
    for key, usual in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if said.get(key, usual) != usual:
            parts.append(f"{key} = {value(said[key])}")
    if "attention_factor" in said:
        parts.append(f"attention_factor = {value(said['attention_factor'])}")
    if said.get("mscale") and said.get("mscale_all_dim"):
        parts += [f"{key} = {value(said[key])}" for key in ("mscale", "mscale_all_dim")]
    return f"yarn({', '.join(parts)})"


def _longrope(said: Mapping[str, Any]) -> str:
    parts = [value(said["short_factor"]), value(said["long_factor"]), str(said["length"])]
    if "attention_factor" in said:
        parts.append(f"attention_factor = {value(said['attention_factor'])}")
    elif said["factor"] != 1:
        parts.append(f"factor = {value(float(said['factor']))}")
    return f"longrope({', '.join(parts)})"


def _llama3(said: Mapping[str, Any]) -> str:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "length")
    return f"llama3({', '.join(value(said[key]) for key in keys)})"


def _proportional(said: Mapping[str, Any]) -> str:
    share = value(said.get("partial_rotary_factor") or 1)
    factor = said["factor"] if said["factor"] != 1 else None
    return f"proportional({share}{f', {value(factor)}' if factor else ''})"


SCALINGS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "linear": lambda said: f"linear({value(said['factor'])})",
    "dynamic": lambda said: f"dynamic({value(said['factor'])}, {said['length']})",
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
KEYS: dict[str, set[str]] = {  # what each type of rotation reads besides what all do
    "default": {_LENGTH},
    "linear": {"factor"},
    "dynamic": {"factor", _LENGTH},
    "yarn": {"factor", _LENGTH, "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
             "mscale_all_dim"},
    "longrope": {"factor", _LENGTH, "short_factor", "long_factor", "attention_factor"},
    "llama3": {"factor", _LENGTH, "low_freq_factor", "high_freq_factor"},
    "proportional": {"factor", _LENGTH},
}  # fmt: skip

"""What a kind of model is to us: a row of texts with holes, which `table.py` holds for each.

A kind that differs from another by a norm or a bias is that row `but` for one text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Settings = Mapping[str, str]  # a setting and its text; an empty one is left out


@dataclass(frozen=True)
class Kind:
    """A row: where it is from, its texts, and which tensors of theirs are which of ours."""

    about: str
    blocks: Mapping[str, Settings | str]  # by kind of layer; a text is a feed-forward in its place
    ffns: Mapping[str, str]
    model: Settings
    weights: str
    mixers: str = "all(it = attention)"  # which block each layer has, one of `layers.LISTS`
    around: Mapping[str, str] = field(default_factory=dict)  # other layers, by block or ffn
    parts: str = "all(it = dense)"  # which feed-forward; nothing where layers say it themselves
    names: Mapping[str, str] = field(default_factory=dict)  # what a field is called here
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what no field says, being always so
    needs: Mapping[str, Any] = field(default_factory=dict)  # fields that must say just this
    defs: Mapping[str, str] = field(default_factory=dict)  # definitions besides the shared ones

    def but(self, about: str, **changes: Any) -> Kind:
        """Return this row with other texts: mappings are joined, an empty text takes one away.

        `block` changes the settings of every block.
        """
        block = changes.pop("block", {})
        done: dict[str, Any] = {"about": about}
        for name, each in changes.items():
            before = getattr(self, name)
            joined = isinstance(each, Mapping) and name != "blocks"
            done[name] = {**before, **each} if joined else each
        if "weights" in done:
            done["weights"] = done["weights"] + "\n" + self.weights
        blocks = done.get("blocks", self.blocks)
        if block:
            blocks = {
                key: each if isinstance(each, str) else {**each, **block}
                for key, each in blocks.items()
            }
        return replace(self, **{**done, "blocks": blocks})

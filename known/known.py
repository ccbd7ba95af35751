"""A model of Hugging Face as a description, and its weights as ours: `hl.from_hf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compiler.api import compile as compile_
from ..compiler.facts.dtypes import DType
from ..compiler.facts.parameters import model_weights
from ..compiler.loading import Loaded, load
from . import store
from .config import Config, read
from .kind import Kind
from .table import chosen
from .weights import Weights, groups_of, resolved, rules
from .write import model_name, write

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, repr=False)
class Known:
    """A known architecture: its text, its checked form, and which of their tensors is which."""

    kind: str
    name: str  # of the model in the text
    text: str
    arch: Loaded
    _kind: Kind = field(repr=False)
    _config: Config = field(repr=False)
    _what: Any = field(repr=False)

    def __repr__(self) -> str:
        return f"<{self.kind}: {len(self.text.splitlines())} lines>"

    def __str__(self) -> str:
        return self.text

    @cached_property
    def _store(self) -> store.Store:
        return store.of(self._what, self._config)

    @cached_property
    def weights(self) -> Weights:
        """Which tensor of theirs is which of ours. Raises `LoomError` (L606) where any is left."""
        text = self._kind.weights
        sizes = {name: int(self._config.get(name)) for name in groups_of(text)
                 if self._config.has(name)}  # fmt: skip
        found = model_weights(self.arch.models[self.name])
        shapes = {each.name: each.shape for each in found}
        return resolved(rules(text, sizes), self._store.shapes, shapes)

    def compile(
        self,
        *,
        backend: str = "auto",
        device: Any = None,
        dtype: DType | None = None,
        seed: int | None = None,
        optimize: str = "default",
    ) -> nn.Module:
        """Compile the model; with their weights, where a folder or a module has some."""
        import torch

        given = {"backend": backend, "device": device, "dtype": dtype, "seed": seed}
        module = compile_(self.arch, self.name, optimize=optimize, **given)
        if self._store.tensors is not None:
            with torch.no_grad():
                module.load_state_dict(self.weights.ours(self._store.tensors()))
        return module

    def save(self, path: str | Path) -> None:
        """Write their weights as ours, as safetensors. Raises `LoomError` where there are none."""
        from safetensors.torch import save_file

        if self._store.tensors is None:
            raise self._config.error("L606", "there are no weights beside this configuration")
        found = self.weights.ours(self._store.tensors())
        save_file({name: each.contiguous() for name, each in found.items()}, str(path))


def from_hf(what: Any) -> Known:
    """Describe a model of Hugging Face: a folder, a configuration, a dict of one, or a module.

    Raises `LoomError` for a kind, a field or a value that is not supported: L601 to L606.
    """
    given = what.config if hasattr(what, "state_dict") else what
    config = read(given)
    kind = chosen(config)
    config = config.of(kind.names, kind.fixed)
    text = write(kind, config)
    _all_read(config)
    arch = load(text, "loom")
    return Known(config.kind, model_name(config), text, arch, kind, config, what)


def _all_read(config: Config) -> None:
    """Refuse fields that nobody asked for and that may mean something."""
    left: Mapping[str, Any] = dict.fromkeys(config.unread())
    if left:
        names = ", ".join(f"`{each}`" for each in left)
        help = "what it says is not in the text; leave it out if it says nothing"
        raise config.error("L603", f"nothing reads {names}", next(iter(left)), help)

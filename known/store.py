"""Where tensors of theirs come from: a folder of safetensors, a module, or shapes alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config
from .weights import Shape

if TYPE_CHECKING:
    from torch import Tensor

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Store:
    """Shapes by name, and how to get the tensors; None where there are none."""

    shapes: Mapping[str, Shape]
    tensors: Callable[[], Mapping[str, Tensor]] | None


def of(what: Any, config: Config) -> Store:
    """Return the store of a folder, a module, or of the module that a configuration describes."""
    if isinstance(what, str | Path) and Path(what).is_dir():
        files = _files(Path(what))
        if files:
            return Store(_shapes(files), lambda: _load(files))
    if hasattr(what, "state_dict"):
        return Store(_of_module(what), what.state_dict)
    return Store(_of_module(_empty(what, config)), None)


def _files(folder: Path) -> list[Path]:
    """Return the safetensors of a folder, those of an index or the one."""
    index = folder / INDEX
    if index.is_file():
        said = json.loads(index.read_text(encoding="utf-8"))
        return sorted({folder / name for name in said["weight_map"].values()})
    return [folder / ONE] if (folder / ONE).is_file() else []


def _shapes(files: list[Path]) -> dict[str, Shape]:
    from safetensors import safe_open

    found: dict[str, Shape] = {}
    for path in files:
        with safe_open(str(path), "pt") as store:
            for name in store.keys():  # noqa: SIM118 - a store is no mapping
                found[name] = tuple(store.get_slice(name).get_shape())
    return found


def _load(files: list[Path]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in files:
        found.update(load_file(str(path)))
    return found


def _of_module(module: Any) -> dict[str, Shape]:
    return {name: tuple(each.shape) for name, each in module.state_dict().items()}


def _empty(what: Any, config: Config) -> Any:
    """Return their module without numbers. Raises `LoomError` where transformers is not there."""
    import torch

    try:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError:
        raise config.needs_transformers("names of tensors without a folder of weights") from None
    said = dict(config.fields) if not hasattr(what, "to_dict") else what.to_dict()
    kind = said.pop("model_type")
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        return make(CONFIG_MAPPING[kind](**said))

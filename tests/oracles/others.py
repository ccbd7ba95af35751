"""Other people's code as an oracle: single files of a distribution, and all digits of a float64."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@cache
def file_of(package: str, path: str) -> ModuleType:
    """Load one file of an installed distribution, and nothing of what is around it.

    `fla-core` asks for a GPU as soon as it is imported; its references are plain PyTorch.
    """
    try:
        found = distribution(package).locate_file(path)
    except PackageNotFoundError:
        pytest.skip(f"needs {package}", allow_module_level=True)
    name = f"{package}/{path}".removesuffix(".py").replace("/", "_").replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, str(found))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def file_beside(package: str, folder: str, name: str) -> ModuleType:
    """Load a file of a distribution that reads its neighbours, and nothing of what is above it."""
    try:
        found = distribution(package).locate_file(folder)
    except PackageNotFoundError:
        pytest.skip(f"needs {package}", allow_module_level=True)
    alias = f"{package}/{folder}".replace("/", "_").replace("-", "_")
    sys.modules[alias] = ModuleType(alias)
    sys.modules[alias].__path__ = [str(found)]
    return importlib.import_module(f"{alias}.{name}")


@contextmanager
def in_double() -> Iterator[None]:
    """Let their code keep all digits, also of tensors that it makes itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widened():
            yield
    finally:
        torch.set_default_dtype(before)


class Widened(TorchFunctionMode):
    """Turn float32 in their code into float64.

    Their angles, softmax, norms and states are cast to float32 whatever the input is; within
    this mode the same code keeps all the digits of a float64 input.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        given = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **given)

"""The dtypes that modules and costs know, by name or as PyTorch has them.

>>> named("torch.bfloat16"), size("bfloat16")
('bfloat16', 2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, Union

if TYPE_CHECKING:
    import torch

DType: TypeAlias = Union[str, "torch.dtype"]

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def named(dtype: DType) -> str:
    """Return the name of a dtype. Raises `ValueError`, which lists the choices."""
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        choices = ", ".join(f'"{each}"' for each in BYTES)
        raise ValueError(f"a dtype is one of {choices} (or torch's own), not {dtype!r}")
    return name


def size(dtype: DType) -> int:
    """Return how many bytes a number of this dtype takes. Raises `ValueError`."""
    return BYTES[named(dtype)]


def of_torch(dtype: DType | None) -> torch.dtype | None:
    """Return PyTorch's dtype; None, its own default, stays. Raises `ValueError`."""
    if dtype is None:
        return None
    import torch

    found: torch.dtype = getattr(torch, named(dtype))
    return found

"""Saving a program so that the same one gives the same bytes.

A `.pt2` file is a zip archive. What PyTorch writes into it names the file in every path and, in
the graph, where the source was on the machine that made it; both are taken out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from .place import writing


def save(program: ExportedProgram, path: Path) -> None:
    """Write a program. Raises `OSError` where the disk is full."""
    size = sum(each.nbytes for each in program.state_dict.values())
    size += sum(x.nbytes for x in program.constants.values() if isinstance(x, torch.Tensor))
    with writing(path, size):
        torch.export.save(program, str(path))

"""Saving a program so that the same one gives the same bytes.

A `.pt2` file is a zip archive whose members have no date, and whose folder is called as the file.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .place import writing

_SAYS = logging.getLogger("torch._export.serde.serialize")  # of lists that are empty, in a loop


def save(program: ExportedProgram, path: Path) -> None:
    """Write a program. Raises `OSError` where the disk is full."""
    size = sum(each.nbytes for each in program.state_dict.values())
    size += sum(x.nbytes for x in program.constants.values() if isinstance(x, torch.Tensor))
    before = _SAYS.level
    with writing(path, size):
        _SAYS.setLevel(logging.ERROR)
        try:
            torch.export.save(program, str(path))
        finally:
            _SAYS.setLevel(before)

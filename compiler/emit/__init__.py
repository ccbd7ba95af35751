"""Graph → Python text: the module as a person would have written it.

One file holds the functions it needs (copied from `pieces`), the Triton skeletons and hooks
where it uses them, one class for each different block, and the model around them. It needs
torch (and triton where it has kernels) and nothing of ours.
"""

from __future__ import annotations

from .module import Code, emit

__all__ = ["Code", "emit"]

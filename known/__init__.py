"""Known models: a configuration of Hugging Face becomes a description and a map of weights."""

from __future__ import annotations

from .known import Known, from_hf

__all__ = ["Known", "from_hf"]

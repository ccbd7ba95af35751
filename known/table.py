"""Every kind of model that can be read: `model_type` and its row."""

from __future__ import annotations

from .kind import Kind
from .kinds.gemma import GEMMAS
from .kinds.llama import LLAMA_LIKE

KINDS: dict[str, Kind] = {**LLAMA_LIKE, **GEMMAS}

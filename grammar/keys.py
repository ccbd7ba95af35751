"""The keys of the YAML form that are no settings: `from_yaml` reads them, `format` writes them."""

from __future__ import annotations

KINDS = {
    "masks": "mask", "similarities": "similarity", "scores": "score",
    "normalizers": "normalize", "weights": "weights",
    "mixers": "mix", "stages": "stage",
}  # fmt: skip
HEADED = {"ffns": "ffn", "layers": "layer", "blocks": "block"}  # what is said as a block is
GROUPS = ("let", *KINDS, *HEADED, "models", "search")
DECLARATIONS = ("let", "param", "const", "state")


def meant(owner: str) -> tuple[str, ...]:
    """Return the keys that are no settings in a body of this kind."""
    own = {
        **dict.fromkeys((*HEADED.values(), "model"), ("base",)),
        "definition": ("value", "where"),
    }.get(owner, ())
    return (*DECLARATIONS, "branches", *own)

"""The keys of the YAML form that are no settings: `from_yaml` reads them, `format` writes them."""

from __future__ import annotations

KINDS = {
    "masks": "mask", "similarities": "similarity", "scores": "score",
    "normalizers": "normalize", "weights": "weights",
    "mixers": "mix", "stages": "stage",
}  # fmt: skip
GROUPS = ("let", *KINDS, "blocks", "models", "search")
DECLARATIONS = ("let", "param", "const", "state")


def meant(owner: str) -> tuple[str, ...]:
    """Return the keys that are no settings in a body of this kind."""
    own = {
        "block": ("base",),
        "model": ("base",),
        "definition": ("value", "where"),
    }.get(owner, ())
    return (*DECLARATIONS, "branches", *own)

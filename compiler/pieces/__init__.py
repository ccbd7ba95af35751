"""The functions an emitted module may need, as ordinary code.

The emitter copies the ones it uses, word for word, into the file it writes. Nothing here
may use anything but math, torch and other pieces.
"""

FILES = (
    "constants",
    "moving",
    "patches",
    "positions",
    "stages",
    "along",
    "experts",
    "maps",
    "tiles",
    "turns",
    "gathered",
    "fused",
    "flex",
    "chunks",
    "levels",
    "steps",
    "batches",
    "parts",
    "groups",
    "forgetting",
    "caches",
    "taken",
)  # in the order of an emitted file

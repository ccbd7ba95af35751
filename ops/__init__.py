"""What every operation means. One definition in one place; this is the list of them.

>>> OPS["split"].shape([Shape("n", 512)], {"heads": 8})
Shape(tokens='n', dim=64, heads=8)
"""

from __future__ import annotations

from .dropout import Dropout
from .heads import Concat, Merge, Repeat, Split
from .linear import Linear
from .norms import L2Norm, LayerNorm, RmsNorm
from .op import Mismatch, Op, Option, Run, Weight
from .pointwise import Pointwise
from .rope import Rope
from .shape import Shape

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Linear(),
        Split(),
        Merge(),
        Repeat(),
        Concat(),
        RmsNorm(),
        LayerNorm(),
        L2Norm(),
        Rope(),
        Dropout(),
        Pointwise(),
    )
}

__all__ = ["OPS", "Mismatch", "Op", "Option", "Run", "Shape", "Weight"]

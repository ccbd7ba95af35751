"""What every operation means. One definition in one place; this is the list of them.

>>> OPS["split"].shape([Shape("n", 512)], {"heads": 8})
Shape(tokens='n', dim=64, heads=8)
"""

from __future__ import annotations

from .bucket import Bucket
from .conv import Conv
from .draws import Bernoulli, DropHeads, DropSequence, Noise
from .dropout import Dropout
from .embed import Embed
from .features import Argmax, Reduce, Slice, Softmax, Top
from .heads import Concat, Merge, Repeat, Split
from .index import Index
from .joint import Joint
from .lanes import Combine, MeanHeads, Pick, Sinkhorn, SumHeads
from .latents import Latents
from .linear import GroupedLinear, HeadLinear, Linear, Tied
from .norms import L1Norm, L2Norm, LayerNorm, RmsNorm
from .op import Chosen, Mismatch, Op, Option, Run, Weight
from .pointwise import Pointwise
from .pool import Pool, Windows
from .rope import Rope
from .routing import Largest, LargestTokens, OneHot
from .running import Running
from .shape import Shape
from .shift import Shift
from .tokens import Average, AverageEach, MeanTokens

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Linear(),
        HeadLinear(),
        GroupedLinear(),
        Tied(),
        Split(),
        Merge(),
        Repeat(),
        Concat(),
        Combine(),
        Sinkhorn(),
        Pick(),
        SumHeads(),
        MeanHeads(),
        RmsNorm(),
        LayerNorm(),
        L2Norm(),
        L1Norm(),
        Softmax(),
        Top(),
        Argmax(),
        Largest(),
        LargestTokens(),
        OneHot(),
        Slice(),
        Reduce(),
        Conv(),
        Shift(),
        Pool(),
        Windows(),
        Running(),
        Index(),
        Latents(),
        Embed(),
        Bucket(),
        Rope(),
        Dropout(),
        Bernoulli(),
        DropHeads(),
        DropSequence(),
        Noise(),
        MeanTokens(),
        Average(),
        AverageEach(),
        Joint(),
        Pointwise(),
    )
}
# Operations that are no stages of a pipeline.
UNNAMED = ("pointwise", "reduce", "average", "average_each", "joint", "tied")

__all__ = ["OPS", "UNNAMED", "Chosen", "Mismatch", "Op", "Option", "Run", "Shape", "Weight"]

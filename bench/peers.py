"""Who is measured beside us: one table, each with how its module is made of a case.

    PEERS["flex"].make(case)        the same block over compiled FlexAttention, or ValueError

`sdpa`, `flex`, `eager` and `compile` are the same block with another lowering of its attention;
`plain`, `cudnn` and those after them are layers written by hand over what others made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..compiler import api
from ..compiler.loading import load
from ..grammar.diagnostics import did_you_mean
from .case import Case, torch_dtype
from .cells import OURS

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT = ("sdpa", "flex")


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to compute a case. `make` raises where it cannot, and says why.

    `maps` is how many dense maps [b, heads, n, n] it holds at once, forward; a backward pass
    holds as many again. `by_length` says that it is compiled anew for every length.
    """

    about: str
    make: Callable[[Case], nn.Module]
    maps: int = 0
    by_length: bool = False


def _compiled(case: Case, **settings: Any) -> nn.Module:
    arch = load(case.text, "loom")
    return api.compile(arch, case.name, width=case.width, device=case.device, dtype=case.dtype,
                       seed=0, **settings)  # fmt: skip


def _lowered(lowering: str) -> Callable[[Case], nn.Module]:
    return lambda case: _compiled(case, backend="torch", lowering=lowering)


def _torch_compiled(case: Case) -> nn.Module:
    import torch

    module: nn.Module = torch.compile(_lowered("dense")(case), dynamic=False)  # type: ignore[assignment]
    return module


def _reference(case: Case) -> nn.Module:
    arch = load(case.text, "loom")
    return api.reference(arch, case.name, width=case.width, device=case.device, dtype=case.dtype)


def _by_hand(make: Callable[[Case], nn.Module]) -> Callable[[Case], nn.Module]:
    return lambda case: make(case).to(case.device, torch_dtype(case))


def _plain(case: Case) -> nn.Module:
    from .layers import Attention

    return Attention(case.what)


def _cudnn(case: Case) -> nn.Module:
    from torch.nn.attention import SDPBackend

    from .layers import Attention

    if not case.device.startswith("cuda"):
        raise ValueError("it runs on NVIDIA GPUs")
    return Attention(case.what, SDPBackend.CUDNN_ATTENTION)


def _entmax(case: Case) -> nn.Module:
    from .layers import Entmax

    return Entmax(case.what)


def _fla(case: Case) -> nn.Module:
    from .layers import RULES, Recurrent, Rule, mixing_of

    if not case.device.startswith("cuda"):
        raise ValueError("its kernels run on GPUs")
    mix = mixing_of(case.what, frozenset({"alpha", "beta"})).mix
    rule = RULES.get(getattr(mix, "name", ""), Rule())
    module, _, name = rule.function.partition(":")
    function = getattr(import_module(f"fla.ops.{module}"), name) if name else None

    def call(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, beta: Tensor | None) -> Tensor:
        given = [each for each in (alpha, beta) if each is not None]
        o: Tensor = function(q, k, v, *given, scale=q.shape[-1] ** -0.5)[0]  # type: ignore[misc]
        return o

    return Recurrent(case.what, call)


def _qwen3_next(case: Case) -> nn.Module:
    from .layers import Recurrent

    name = "transformers.models.qwen3_next.modeling_qwen3_next"
    found = import_module(name).torch_chunk_gated_delta_rule
    rule = getattr(found, "__wrapped__", found)  # without what would replace it by a kernel

    def call(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, beta: Tensor | None) -> Tensor:
        if alpha is None or beta is None:
            raise ValueError("it computes the gated delta rule")
        o: Tensor = rule(q, k, v, alpha, beta, initial_state=None, output_final_state=False)[0]
        return o

    return Recurrent(case.what, call)


OURSELVES = Peer("what headloom compiles", lambda case: _compiled(case, optimize=case.optimize))
PEERS: dict[str, Peer] = {
    "sdpa": Peer("the same block, a dense mask given to scaled_dot_product_attention",
                 _lowered("sdpa"), maps=1),
    "flex": Peer("the same block over compiled FlexAttention", _lowered("flex"), by_length=True),
    "eager": Peer("the same block as dense PyTorch text", _lowered("dense"), maps=3),
    "compile": Peer("the dense text under torch.compile", _torch_compiled, maps=2, by_length=True),
    "reference": Peer("the dense meaning", _reference, maps=4),
    "plain": Peer("by hand: scaled_dot_product_attention, causal or full", _by_hand(_plain)),
    "cudnn": Peer("by hand: the same through cuDNN's kernels", _by_hand(_cudnn)),
    "entmax": Peer("by hand: the package entmax", _by_hand(_entmax), maps=4),
    "fla": Peer("by hand: flash-linear-attention's kernels", _by_hand(_fla)),
    "qwen3_next": Peer("by hand: the PyTorch path of Transformers' Qwen3-Next",
                       _by_hand(_qwen3_next)),
}  # fmt: skip


def named(name: str) -> Peer:
    """Return a peer, or ourselves. Raises `ValueError`, which names those there are."""
    if name == OURS:
        return OURSELVES
    if name not in PEERS:
        hint = did_you_mean(name, PEERS)
        raise ValueError(f"there is no peer `{name}`; there are {', '.join(PEERS)}"
                         + (f"; {hint}" if hint else ""))  # fmt: skip
    return PEERS[name]


def known(names: Iterable[str]) -> tuple[str, ...]:
    """Return peers by name, each once. Raises `ValueError` for one that there is not."""
    found = tuple(dict.fromkeys(names))
    for name in found:
        named(name)
    return found


def too_large(peer: Peer, case: Case, heads: int, free: int) -> str:
    """Return why a peer with dense maps is not run, "" where they fit into the free memory."""
    if case.run == "decode":
        return ""
    import torch

    size = torch.finfo(torch_dtype(case)).bits // 8
    maps = peer.maps * (2 if case.run == "backward" else 1)
    needed = maps * case.batch * heads * case.tokens**2 * size
    if needed <= 0.8 * free:
        return ""
    return f"its dense maps would take {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB"

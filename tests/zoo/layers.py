"""Models of the zoo against a whole made of others' modules, or written by hand.

joined = Joined("gru_residual")
joined.agrees(lambda x: ...)        # output and every gradient

The whole reads the parts of the model's meaning, and its weights: others' modules are `given` them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from .mechanisms import Mechanism, text_of, tokens

Kind = TypeVar("Kind", bound=nn.Module)
X = tokens(7)


def given(module: Kind, weights: dict[str, Tensor]) -> Kind:
    """Put tensors in the place of a module's parameters, so that gradients reach them."""
    left = dict(module.named_parameters())
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        assert left.pop(name).shape == value.shape, name
        del owner._parameters[last]
        setattr(owner, last, value)
    assert not left, f"{list(left)} have no value"
    return module.double()


class Place:
    """One layer of a model's meaning: its parts, its norms and its tensors."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.tensors = layer, dict(layer.named_parameters())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __call__(self, part: str, x: Tensor) -> Tensor:
        """Return what a part gives."""
        y: Tensor = self.layer.get_submodule(part)(x)
        return y

    def normed(self, norm: str, x: Tensor) -> Tensor:
        """Return what an rms norm gives."""
        return rms_norm(x, (x.shape[-1],), self[f"{norm}.weight"], 1e-6)

    def after(self, part: str, x: Tensor) -> Tensor:
        """Return what a part gives after its norm."""
        return self(part, self.normed(f"{part}_norm", x))


class Joined(Mechanism):
    """A model with its layers as places, and without its last norm."""

    def __init__(
        self, name: str, *changes: tuple[str, str], head: str | None = "x | scale(1)"
    ) -> None:
        text = text_of(name, *changes)
        if head is not None:
            text = re.sub(r"^( +)layers +=", rf"\1head = {head}\n\g<0>", text, flags=re.MULTILINE)
        super().__init__(text)
        self.places = [Place(each) for each in self.meaning.layers]  # type: ignore[union-attr]

    def agrees(
        self, whole: Callable[..., Tensor], x: Tensor = X, atol: float = 1e-9, **others: Any
    ) -> None:
        """Compare output and gradients of what is compiled with those of the whole."""
        self.module.load_state_dict(self.meaning.state_dict())
        found = [
            differentiated(lambda x: self.module(x, **others), self.module, x),
            differentiated(lambda x: whole(x, **others), self.meaning, x),
        ]
        for name, expected in found[1].items():
            torch.testing.assert_close(
                found[0][name], expected, rtol=atol, atol=atol, msg=partial("{}: {}".format, name)
            )


def differentiated(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor
) -> dict[str, Tensor]:
    """Return the output, and the gradients of x and of every parameter, by name."""
    leaves = dict(module.named_parameters())
    if x.is_floating_point():
        leaves["x"] = x = x.detach().requires_grad_()
    y = function(x)
    weigh = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    names = [name for name, each in leaves.items() if each.requires_grad]
    grads = torch.autograd.grad(
        (y * weigh).sum(), [leaves[name] for name in names], allow_unused=True
    )
    made = {
        name: torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in zip(names, grads, strict=True)
    }
    return {"y": y.detach(), **made}

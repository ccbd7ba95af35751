"""What a block and a model mean, straight from the checked architecture.

This is the oracle of every compiled form: dense, plain PyTorch in any dtype, with no cache
and no shortcut, sharing nothing with the compiler but `model`, `parameters` and what each
operation itself says it means (`Op.eager`). Reading order: the design's 2.4 is
`reference_attend`, 2.6 is `reference_scan`, 2.7 is `ReferenceModel` here, and what a batch
of sequences means is `reference_batch`.

    >>> oracle = reference(block, dtype=torch.float64)
    >>> oracle(x).shape == x.shape
    True
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ops import OPS, Run
from ..facts.parameters import (
    constants,
    defaults,
    initial,
    model_weights,
    norm_op,
    norm_weights,
    owned,
    weights,
)
from ..model import MAPS, PREVIOUS, Block, Flow, Mixing, Model, Pairwise, Read, Statistic
from .attend import Given, Places, attend
from .batch import run_alone
from .scan import scan


def reference(
    what: Block | Model,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> ReferenceBlock | ReferenceModel:
    """Return the module that is the meaning of a block or a model.

    Its state dict has the keys of `parameters.weights` or `model_weights`; the values are
    drawn from the seed, the same in every dtype. The default dtype is torch's.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(what, Block):
        module: ReferenceBlock | ReferenceModel = ReferenceBlock(what)
        tensors = weights(what)
    else:
        module = ReferenceModel(what)
        tensors = model_weights(what)
    for weight in tensors:
        _own(module, weight.name, nn.Parameter(initial(weight, generator, dtype)))
    for part in module.modules():
        if isinstance(part, ReferenceBlock):
            for weight in constants(part.architecture):
                part.register_buffer(
                    weight.name, initial(weight, generator, dtype), persistent=False
                )
    return module.to(device=device)


class ReferenceBlock(nn.Module):
    """One attention layer: streams, then mixing, then `out`."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.architecture = block
        self.terms: list[tuple[int, Tensor]] = []  # tokens, and what they add to the loss

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output [b, n, width], of every sequence as if it were alone.

        x is [b, n, width]; context [b, m, context_width] for a block that reads one. Of both,
        the masks [b, n] and [b, m] say what is a token (1) and what padding (0). `segments`
        [b, n] number the sequences of each row, or with b = 1 `cu_seqlens` [count + 1] say
        where they begin and end; positions [n] or [b, n] where every token stands (default:
        counted from 0 in each sequence). A context's count from 0.
        """
        self.terms.clear()
        return run_alone(
            lambda *given: self.layer(given[0], {}, *given[1:])[0],
            x,
            cuts=not self.architecture.marks,
            context=context,
            attention_mask=attention_mask,
            context_mask=context_mask,
            segments=segments,
            cu_seqlens=cu_seqlens,
            positions=positions,
        )

    def layer(
        self,
        x: Tensor,
        below: Mapping[str, Tensor],
        context: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and everything that a layer above may read by name.

        `below` is the same of the layer below: its streams, and `s` and `p`, the logits and
        weights of `o` [b, heads, n, m], zero where nothing is seen.
        """
        block = self.architecture
        _expect("x", x, block.width)
        if block.context_width is not None:
            if context is None:
                raise ValueError(f"block `{block.name}` reads a context, and none was given")
            _expect("context", context, block.context_width)
        places = Places({"n": _positions(positions, x)})
        streams = {"x": x, **{f"{PREVIOUS}{name}": each for name, each in below.items()}}
        if context is not None:
            places["m"] = _positions(None, context)
            streams["context"] = context
        tensors = {each.name: self._tensor(each.name) for each in block.tensors}
        pairs = {name: each for name, each in below.items() if name in MAPS}
        given = Given(streams, tensors, places, segments, self.training, {}, pairs)
        maps: dict[str, Tensor] = {}
        for stream in block.streams:
            if isinstance(stream.flow, Mixing) and isinstance(stream.flow.mix, Pairwise):
                mixed = given.mixed[stream.name] = attend(stream.flow, given)
                streams[stream.name] = mixed.o
                maps = {"s": mixed.s, "p": mixed.p} if stream.name == "o" else maps
            else:
                streams[stream.name] = self._flow(stream.flow, given)
        made = {each.name: streams[each.name] for each in block.streams}
        if block.regularize is not None and self.training:
            self.terms.append((x[..., 0].numel(), self._flow(block.regularize, given)))
        return self._flow(block.out, given), {**made, **maps}

    def auxiliary_loss(self) -> Tensor:
        """Return what the last forward pass in training adds to the loss: its mean by tokens."""
        total = max(1, sum(tokens for tokens, _ in self.terms))
        terms = [term * (tokens / total) for tokens, term in self.terms]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def _flow(self, flow: Flow, given: Given, made: dict[int, Tensor] | None = None) -> Tensor:
        """Return what a flow gives; what several read in it is made once."""
        made = {} if made is None else made
        if id(flow) not in made:
            made[id(flow)] = self._made(flow, given, made)
        return made[id(flow)]

    def _made(self, flow: Flow, given: Given, made: dict[int, Tensor]) -> Tensor:
        if isinstance(flow, Read):
            if flow.name in given.tensors:
                return _as_stream(given.tensors[flow.name])
            return given.streams[flow.name]
        if isinstance(flow, Statistic):
            return given.mixed[flow.inputs[0].name].statistic(flow)
        if isinstance(flow, Mixing):
            return scan(flow, given)  # an attention is a stream of its own
        inputs = [self._flow(each, given, made) for each in flow.inputs]
        tensors = {
            each.name.removeprefix(f"{flow.module}."): self._tensor(each.name)
            for each in owned(flow)
        }
        shapes = tuple(each.shape for each in flow.inputs)
        run = Run(given.positions, self.training, flow.shape.tokens, shapes)
        op, dtype = OPS[flow.op], given.streams["x"].dtype
        if not op.wide and op.name != "pointwise":
            inputs = [each.to(dtype) for each in inputs]
        result = op.eager(inputs, dict(flow.options), tensors, run)
        return result if op.wide else result.to(dtype)

    def _tensor(self, name: str) -> Tensor:
        return _tensor(self, name)


class ReferenceModel(nn.Module):
    """A stack of pre-norm layers: x + attn(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.architecture = model
        if model.encoder is not None:
            self.encoder = ReferenceModel(model.encoder)
        if model.vocab is not None:
            self.embed_tokens = nn.Module()
        if model.embed_position == "learned":
            self.embed_positions = nn.Module()
        self.layers = nn.Module()
        for at, block in enumerate(model.layers):
            self.layers.add_module(str(at), nn.Module())
            self.layers.get_submodule(str(at)).add_module("attn", ReferenceBlock(block))

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return logits [b, n, vocab], classes [b, classes], or features [b, n, width].

        x is [b, n] tokens, or [b, n, width] features for a model without a vocabulary; the
        rest is as for a block. The context passes through the encoder first, where there is
        one: [b, m] tokens, or [b, m, its width].
        """
        for each in self._blocks():
            each.terms.clear()
        return run_alone(
            self._alone,
            x,
            cuts=not self.architecture.marks,
            context=context,
            attention_mask=attention_mask,
            context_mask=context_mask,
            segments=segments,
            cu_seqlens=cu_seqlens,
            positions=positions,
        )

    def _alone(
        self,
        x: Tensor,
        context: Tensor | None,
        segments: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        model = self.architecture
        if model.encoder is not None:
            if context is None:
                raise ValueError(f"model `{model.name}` reads a context, and none was given")
            context = self.encoder(context)
        if model.vocab is None:
            _expect("x", x, model.width)
        else:
            x = functional.embedding(x, _tensor(self, "embed_tokens.weight"))
        x = self._dropped(self._with_positions(x, _positions(positions, x)))
        below: dict[str, Tensor] = {}
        for at in range(len(model.layers)):
            layer = f"layers.{at}"
            attention = self.get_submodule(f"{layer}.attn")
            assert isinstance(attention, ReferenceBlock)
            y, below = attention.layer(
                self._norm(f"{layer}.attn_norm", x), below, context, segments, positions
            )
            x = x + self._dropped(y)
            if model.ffn is not None:
                y = self._feed_forward(f"{layer}.ffn", self._norm(f"{layer}.ffn_norm", x))
                x = x + self._dropped(y)
        x = self._norm("norm", x)
        match model.head:
            case "lm":
                return (
                    x @ _tensor(self, "embed_tokens.weight" if model.tie else "lm_head.weight").mT
                )
            case "classify":
                mean = x.sum(1) / max(1, x.shape[1])
                return mean @ _tensor(self, "head.weight").mT + _tensor(self, "head.bias")
            case _:
                return x

    def auxiliary_loss(self) -> Tensor:
        """Return what the last forward pass in training adds to the loss, of all layers."""
        return torch.stack([each.auxiliary_loss() for each in self._blocks()]).sum()

    def _blocks(self) -> list[ReferenceBlock]:
        return [each for each in self.modules() if isinstance(each, ReferenceBlock)]

    def _with_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        model = self.architecture
        match model.embed_position:
            case "learned":
                table = _tensor(self, "embed_positions.weight")
                if positions.numel() and int(positions.max()) >= len(table):
                    raise ValueError(
                        f"position {int(positions.max())} is past the "
                        f"{len(table)} learned positions"
                    )
                return x + table[positions]
            case "sinusoidal":
                return x + sinusoidal(positions, model.width).to(x)
            case _:
                return x

    def _norm(self, name: str, x: Tensor) -> Tensor:
        op = norm_op(self.architecture)
        if op is None:
            return x
        tensors = {
            each.name: _tensor(self, f"{name}.{each.name}")
            for each in norm_weights(self.architecture)
        }
        return op.eager([x], defaults(op), tensors, Run({}, self.training))

    def _feed_forward(self, name: str, x: Tensor) -> Tensor:
        ffn = self.architecture.ffn
        assert ffn is not None
        up = x @ _tensor(self, f"{name}.up_proj.weight").mT
        if ffn.kind == "swiglu":
            up = functional.silu(x @ _tensor(self, f"{name}.gate_proj.weight").mT) * up
        else:
            up = functional.gelu(up)
        return up @ _tensor(self, f"{name}.down_proj.weight").mT

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.architecture.dropout, self.training)


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Return the position code of Vaswani et al. 2017 in float64, [b, n] → [b, n, width].

    Feature 2c is sin(position / 10000**(2c / width)), feature 2c + 1 its cosine.
    """
    even = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None].double() / 10000 ** (even / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]


def _positions(given: Tensor | None, x: Tensor) -> Tensor:
    """Return every token's position, [b, n]."""
    batch, tokens = x.shape[:2]
    if given is None:
        given = torch.arange(tokens, device=x.device)
    return given.expand(batch, tokens)


def _as_stream(tensor: Tensor) -> Tensor:
    """Return a tensor as a stream of one token: [d] → [1, 1, d], [heads, d] → [1, heads, 1, d]."""
    return tensor[None, :, None] if tensor.ndim == 2 else tensor.reshape(1, 1, -1)


def _expect(name: str, x: Tensor, width: int) -> None:
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"`{name}` should be [b, tokens, {width}], it is {list(x.shape)}")


def _own(root: nn.Module, name: str, tensor: nn.Parameter) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, tensor)


def _tensor(root: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its dotted name."""
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(root.get_submodule(path), last)
    return found

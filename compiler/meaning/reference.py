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

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...grammar.source import Span
from ...ops import OPS, Run
from ...ops.shape import pooling
from ..facts.parameters import constants, initial, model_weights, owned, weights
from ..model import (
    Apply,
    Block,
    Flow,
    Mixing,
    Model,
    Pairwise,
    Part,
    Read,
    Statistic,
    applies,
    elsewhere,
    is_map_elsewhere,
)
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
        _own(module, weight.name, initial(weight, generator, dtype), weight.learned)
    ends = module._ends if isinstance(module, ReferenceModel) else []
    for part in (*module.modules(), *ends):
        if isinstance(part, ReferenceBlock):
            for weight in constants(part.architecture):
                part._root[0].register_buffer(
                    weight.name, initial(weight, generator, dtype), persistent=False
                )
    return module.to(device=device)


class ReferenceBlock(nn.Module):
    """A block, or what it is a part of: streams, mixed or handed through parts, then `out`."""

    def __init__(
        self,
        block: Block,
        root: nn.Module | None = None,
        once: dict[Span, ReferenceBlock] | None = None,
    ) -> None:
        """Make it; its tensors are those of `root`, or its own. `once` are parts with one home."""
        super().__init__()
        self.architecture = block
        self._root = [self if root is None else root]  # in a list: it is no submodule
        self._added: list[tuple[int, Given, dict[int, Tensor]]] = []  # by use, what is averaged
        self._expert = 0  # which one is run, of experts
        self._uses = 0  # how often it has run for these tokens
        self._again: dict[str, ReferenceBlock] = {}  # parts whose home is elsewhere
        self._several = len(block.uses) > 1
        self._stands_alone()
        once = {} if once is None else once
        for part in block.parts:
            if part.once in once:
                self._again[part.module] = once[part.once]
                continue
            made = ReferenceBlock(part.what, None, once)
            self._root[0].add_module(part.module, made)
            if part.once is not None:
                once[part.once] = made

    def _stands_alone(self) -> None:
        """Know of no layer below, of nothing that a model offers, and of no part that has run."""
        self._below: Sequence[Mapping[str, Tensor]] = ()
        self._offered: Mapping[str, Tensor] | None = None
        self._of_parts: dict[str, Tensor] = {}

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
        every = [each for each in self.modules() if isinstance(each, ReferenceBlock)]
        for each in every:
            each._added.clear()
        of, stride = pooling(self.architecture.out.shape.tokens)
        y = run_alone(
            self._alone,
            x,
            cuts=not self.architecture.marks,
            stride=stride if of == "n" else 1,
            listed=of != "n",
            context=context,
            attention_mask=attention_mask,
            context_mask=context_mask,
            segments=segments,
            cu_seqlens=cu_seqlens,
            positions=positions,
        )
        for each in every:
            each._move()
        return y

    def _alone(
        self,
        x: Tensor,
        context: Tensor | None,
        segments: Tensor | None,
        positions: Tensor | None,
        condition: Tensor | None,  # noqa: ARG002  a model's alone
    ) -> Tensor:
        for each in (each for each in self.modules() if isinstance(each, ReferenceBlock)):
            each._uses = 0
        return self.layer(x, (), context, segments, positions)[0]

    def layer(
        self,
        x: Tensor,
        below: Sequence[Mapping[str, Tensor]],
        context: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        offered: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and everything that layers above may read by name.

        `below` is the same of all layers that ran before: their streams, and `s` and `p`, the
        logits and weights of `o` [b, heads, n, m], zero where nothing is seen. `offered` is what a
        model gives to those of its layers that read it.
        """
        block = self.architecture
        if block.kind != "stage":  # which may do the same to every head
            _expect("x", x, block)
        if block.context_width is not None:
            if context is None:
                raise ValueError(f"block `{block.name}` reads a context, and none was given")
            if context.ndim != 3 or context.shape[-1] != block.context_width:
                raise ValueError(
                    f"`context` should be [b, tokens, {block.context_width}], "
                    f"it is {list(context.shape)}"
                )
        places = Places({"n": _positions(positions, x)})
        others = {name: _found(name, below) for name in block.below}
        streams = {"x": x, **others}
        own = {each.name for each in block.streams} | {each.name for each in block.tensors}
        streams |= {name: each for name, each in (offered or {}).items() if name not in own}
        if context is not None:
            places["m"] = _positions(None, context)
            streams["context"] = context
        tensors = {each.name: self._tensor(each.name) for each in block.tensors}
        pairs = {name: each for name, each in others.items() if is_map_elsewhere(name)}
        given = Given(streams, tensors, places, segments, self.training, {}, pairs)
        self._stands_alone()
        self._below, self._offered = below, offered
        maps: dict[str, Tensor] = {}
        for stream in block.streams:
            if isinstance(stream.flow, Mixing) and isinstance(stream.flow.mix, Pairwise):
                mixed = given.mixed[stream.name] = attend(stream.flow, given)
                streams[stream.name] = mixed.o
                maps = {"s": mixed.s, "p": mixed.p} if stream.name == "o" else maps
            else:
                streams[stream.name] = self._flow(stream.flow, given)
        made = {each.name: streams[each.name] for each in block.streams}
        if block.aside and self.training:
            parts = {
                id(each): self._flow(each.inputs[0], given)
                for each in self._averages()
                if not any(map(_is_average, applies(each.inputs[0])))
            }
            self._added.append((self._uses, given, parts))
        self._uses += 1
        out = self._flow(block.out, given)
        within = self._of_parts
        self._stands_alone()  # nothing outlives a call
        if block.kind == "block":
            return out, {**made, **maps}
        return out, {**made, **within, "x": x, "out": out}

    def auxiliary_loss(self) -> Tensor:
        """Return what the last forward pass in training adds to the loss.

        Means in it are over the tokens of all sequences of the batch. A block that runs several
        times adds that of each.
        """
        flow = self.architecture.regularize
        if flow is None or not self._added:
            return torch.zeros(())
        uses = sorted({use for use, _, _ in self._added})
        return torch.stack([self._of_batch([flow], use)[0].sum() for use in uses]).sum()

    def _of_batch(self, flows: Sequence[Flow], use: int) -> list[Tensor]:
        """Return what flows give for all sequences of the batch, in one use of a block."""
        added = [(given, parts) for at, given, parts in self._added if at == use]
        made: dict[int, Tensor] = {}
        for each in self._averages():
            of = each.inputs[0]
            every = [
                parts[id(each)] if id(each) in parts else self._flow(of, given, dict(made))
                for given, parts in added
            ]
            run = Run({}, True, shapes=(of.shape,))
            rows = torch.cat(list(map(_in_one_row, every)), -2)
            made[id(each)] = OPS[each.op].eager([rows], {}, {}, run)
        return [self._flow(each, added[0][0], made) for each in flows]

    def _averages(self) -> list[Apply]:
        """Return the means over the batch that training takes, inner ones first."""
        found = (each for flow in self.architecture.aside for each in applies(flow))
        return [each for each in found if _is_average(each)]

    @torch.no_grad()
    def _move(self) -> None:
        """Set what a forward pass in training moves, all of it as it was before."""
        moves = self.architecture.moves
        if not (moves and self._added):
            return
        made = self._of_batch([each.flow for each in moves], 0)
        for each, value in zip(moves, made, strict=True):
            old = self._tensor(each.name)
            setattr(self._root[0], each.name, value.to(old.dtype).reshape(old.shape))

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
        if isinstance(flow, Part):
            home = self._again.get(flow.module)
            part = self._root[0].get_submodule(flow.module) if home is None else home
            assert isinstance(part, ReferenceBlock)
            if flow.what.experts is not None:
                x, weights = (self._flow(each, given, made) for each in flow.inputs)
                return part._mixed(x, weights)
            x, context = self._flow(flow.inputs[0], given, made), given.streams.get("context")
            if flow.taken is not None:
                chosen = self._flow(flow.inputs[1], given, made)[..., 0] != 0
                return part._of_taken(x, chosen, given, self._offered)
            places = given.positions.get(flow.inputs[0].shape.tokens)
            y, own = part.layer(x, self._below, context, given.segments, places, self._offered)
            if part.architecture.uses:  # what has no blocks has nothing that is named in it
                before = f"{flow.module}." if self._several else ""
                self._of_parts |= {f"{before}{name}": each for name, each in own.items()}
            return y
        inputs = [self._flow(each, given, made) for each in flow.inputs]
        tensors = {
            each.name.removeprefix(f"{flow.module}."): self._tensor(each.name)
            for each in owned(flow)
        }
        shapes = tuple(each.shape for each in flow.inputs)
        run = Run(given.positions, self.training, flow.shape.tokens, shapes)
        op, dtype = OPS[flow.op], given.streams["x"].dtype
        if not op.wide and op.name != "pointwise":
            inputs = [each.to(dtype) if each.is_floating_point() else each for each in inputs]
        result = op.eager(inputs, dict(flow.options), tensors, run)
        return result.to(dtype) if result.is_floating_point() and not op.wide else result

    def _of_taken(
        self, x: Tensor, chosen: Tensor, given: Given, offered: Mapping[str, Tensor] | None
    ) -> Tensor:
        """Return what it gives for the chosen tokens [b, n] of x alone, 0 at the others."""
        every = list(self._inner())
        before = [each._uses for each in every]
        y = x.new_zeros(*x.shape[:2], self.architecture.out.shape.dim)
        context, places = given.streams.get("context"), given.positions["n"]
        for row in range(len(x)):
            for each, uses in zip(every, before, strict=True):
                each._uses = uses
            at, one = chosen[row].nonzero()[:, 0], slice(row, row + 1)
            own = {
                name: each[one][..., at, :] if each.shape[-2] == x.shape[1] else each[one]
                for name, each in (offered or {}).items()
            }
            made, _ = self.layer(
                x[one, at],
                (),
                None if context is None else context[one],
                None if given.segments is None else given.segments[one, at],
                places[one, at],
                own,
            )
            y = y.index_put((torch.tensor(row, device=x.device), at), made[0])
        return y

    def _inner(self) -> Iterator[ReferenceBlock]:
        """Yield it and all that is in it, wherever that is at home."""
        yield self
        for part in self.architecture.parts:
            home = self._again.get(part.module)
            inner = self._root[0].get_submodule(part.module) if home is None else home
            assert isinstance(inner, ReferenceBlock)
            yield from inner._inner()

    def _mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return what all experts give, each times its weight [b, n, experts] where that is not 0.

        Every one is run on every token.
        """
        total = x.new_zeros(())
        for at in range(weights.shape[-1]):
            self._expert, weight = at, weights[..., at : at + 1]
            total = total + torch.where(weight != 0, weight * self.layer(x, ())[0], 0)
        return total

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor; of experts, that of the one which is run."""
        tensor = _tensor(self._root[0], name)
        return tensor if self.architecture.experts is None else tensor[self._expert]


class ReferenceModel(nn.Module):
    """A stack of layers between what is done to the embedding and the head."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.architecture = model
        if model.encoder is not None:
            self.encoder = ReferenceModel(model.encoder)
        if model.vocab is not None:
            self.embed_tokens = nn.Module()
        if model.embed_position == "learned":
            self.embed_positions = nn.Module()
        once: dict[Span, ReferenceBlock] = {}
        *first, last = model.ends
        ends = [ReferenceBlock(each, self, once) for each in first]
        self.layers = nn.ModuleList(ReferenceBlock(each, None, once) for each in model.layers)
        self._ends = [*ends, ReferenceBlock(last, self, once)]

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
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return logits [b, n, vocab], classes [b, classes], or features [b, n, width].

        x is [b, n] tokens, or [b, n, width] features for a model without a vocabulary, or images
        [b, channels, height, width] where it has patches, or those cut already; the rest is as for
        a block. The context passes through the encoder first, where there is one: what that takes.
        `condition` [b, condition_width] is the one token that meets all, for layers that read it.
        """
        for each in self._blocks():
            each._added.clear()
        model = self.architecture
        x = patches_of(model, x)
        if model.encoder is not None and context is not None:
            context = patches_of(model.encoder, context)
        y = run_alone(
            self._alone,
            x,
            cuts=not self.architecture.marks,
            context=context,
            attention_mask=attention_mask,
            context_mask=context_mask,
            segments=segments,
            cu_seqlens=cu_seqlens,
            positions=positions,
            condition=condition,
        )
        for each in self._blocks():
            each._move()
        return y

    def _alone(
        self,
        x: Tensor,
        context: Tensor | None,
        segments: Tensor | None,
        positions: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        model = self.architecture
        for each in self._blocks():
            each._uses = 0
        if model.encoder is not None:
            if context is None:
                raise ValueError(f"model `{model.name}` reads a context, and none was given")
            context = self.encoder._alone(context, None, None, None, None)
        tokens = None
        *first, embed, head = (each.train(self.training) for each in self._ends)
        if model.vocab is None:
            _expect("x", x, model.ends[0])
        else:
            tokens = x[..., None]
            x = functional.embedding(x, _tensor(self, "embed_tokens.weight"))
        for each in first:  # the map of patches
            x = each.layer(x, (), None, segments, positions)[0]
        x = self._with_positions(x, _positions(positions, x))
        x = self._dropped(embed.layer(x, (), None, segments, positions)[0])
        below: list[Mapping[str, Tensor]] = []
        front = model.memory or 0
        if front:
            x = torch.cat([_tensor(self, "memory").expand(len(x), -1, -1), x], 1)
            positions, segments = _after(front, positions, len(x)), _repeated(front, segments)
        if model.lanes is not None:
            x = x[:, None].expand(-1, model.lanes, -1, -1)
        offered: dict[str, Tensor] = {} if tokens is None else {"tokens": tokens}
        if condition is not None:
            offered["condition"] = condition[:, None]
        earlier = [x]
        for at, turn in zip(model.steps, model.turns, strict=True):
            layer = self.layers[at]
            assert isinstance(layer, ReferenceBlock)
            offered["earlier"] = torch.stack(earlier, 1)
            offered["turn"] = x.new_full((len(x), 1, 1), turn)
            x, made = layer.layer(x, below, context, segments, positions, offered)
            earlier.append(x)
            below.append(made)
        if front:
            segments = None if segments is None else segments[:, front:]
            positions = None if positions is None else positions[:, front:] - front
        y = head.layer(x[..., front:, :], (), None, segments, positions)[0]
        return y[:, 0] if model.classifies else y

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

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.architecture.dropout, self.training)


def patches_of(model: Model, x: Tensor) -> Tensor:
    """Return the patches [b, n, dim] of images [b, channels, height, width], row by row.

    The numbers of a patch stand by channel, then by row. What is no image is left as it is.
    """
    if model.patches is None or x.ndim != 4:
        return x
    (height, width), dim, image = model.patches.size, model.patches.dim, model.patches.image
    fits = x.shape[2] % height == 0 and x.shape[3] % width == 0
    if x.shape[1] != model.patches.channels or not fits or image not in (None, (*x.shape[2:],)):
        raise ValueError(f"these are no images that `{model.name}` takes: {list(x.shape)}")
    rows, cols = x.shape[2] // height, x.shape[3] // width
    found = [
        x[:, :, r * height : (r + 1) * height, c * width : (c + 1) * width].reshape(len(x), dim)
        for r in range(rows)
        for c in range(cols)
    ]
    return torch.stack(found, 1)


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Return the position code of Vaswani et al. 2017 in float64, [b, n] → [b, n, width].

    Feature 2c is sin(position / 10000**(2c / width)), feature 2c + 1 its cosine.
    """
    even = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None].double() / 10000 ** (even / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]


def _positions(given: Tensor | None, x: Tensor) -> Tensor:
    """Return every token's position, [b, n]."""
    batch, tokens = len(x), x.shape[-1 if x.ndim == 2 else -2]
    if given is None:
        given = torch.arange(tokens, device=x.device)
    return given.expand(batch, tokens)


def _is_average(flow: Apply) -> bool:
    """Say whether it is a mean over the batch."""
    return flow.op in ("average", "average_each")


def _in_one_row(x: Tensor) -> Tensor:
    """Return a stream [b, (heads,) n, d] with all its tokens after one another, b = 1."""
    return x.movedim(-2, 1).flatten(0, 1)[None].movedim(1, -2)


def _found(name: str, below: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return a stream of another layer."""
    place = elsewhere(name)
    assert place is not None
    return below[place[0]][place[1]]


def _after(count: int, positions: Tensor | None, batch: int) -> Tensor | None:
    """Return the positions of `count` tokens from 0 on, and of those after them."""
    if positions is None:
        return None
    first = torch.arange(count, device=positions.device).expand(batch, -1)
    return torch.cat([first, positions.expand(batch, -1) + count], 1)


def _repeated(count: int, segments: Tensor | None) -> Tensor | None:
    """Return segments with `count` of the first one before them."""
    if segments is None:
        return None
    return torch.cat([segments[:, :1].expand(-1, count), segments], 1)


def _as_stream(tensor: Tensor) -> Tensor:
    """Return a tensor as a stream of one token: [d] → [1, 1, d], [heads, d] → [1, heads, 1, d]."""
    return tensor[None, :, None] if tensor.ndim == 2 else tensor.reshape(1, 1, -1)


def _expect(name: str, x: Tensor, block: Block) -> None:
    """Raise `ValueError` where what comes in is not of the shape that a block takes."""
    sizes = [each for each in (block.x.heads, block.x.dim) if each is not None]
    if x.ndim != 2 + len(sizes) or [*x.shape[1:-2], x.shape[-1]] != sizes:
        dims = ", ".join(("b", *map(str, sizes[:-1]), "tokens", str(sizes[-1])))
        raise ValueError(f"`{name}` should be [{dims}], it is {list(x.shape)}")


def _own(root: nn.Module, name: str, tensor: Tensor, learned: bool) -> None:
    """Register a parameter or a buffer under a dotted name, making the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if learned:
        root.register_parameter(last, nn.Parameter(tensor))
    else:
        root.register_buffer(last, tensor)


def _tensor(root: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its dotted name."""
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(root.get_submodule(path), last)
    return found

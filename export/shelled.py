"""The texts of a model for Transformers: ours, renamed, around the one that is emitted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..compiler.emit import Code
from ..compiler.emit.caches import own_rows
from ..compiler.emit.model import decodes
from ..compiler.graph.graph import made_by
from ..compiler.graph.operations import Stage
from ..compiler.graph.passes import simplest
from ..compiler.model import Apply, Flow, Model, flow_mapped
from ..compiler.pipeline import generate
from ..compiler.plan.plan import Target
from ..compiler.text.text import class_name, ident
from .request import Request

PROJECTION = "lm_head"
SHELL = Path(__file__).parent / "shell"


@dataclass(frozen=True)
class Shelled:
    """What is written of a model beside its weights."""

    name: str  # that of the model, as a part of others
    takes: str  # what Transformers calls its first argument
    files: dict[str, str]
    autos: tuple[str, ...]  # the classes of Transformers that open it
    decodes: bool


def standing_apart(request: Request) -> list[str]:
    """Return why a model is none that Transformers can open."""
    what = request.what
    if not isinstance(what, Model):
        return [f"`{what.name}` is a block: Transformers opens models"]
    found = []
    if request.subject.crosses:
        found.append("it reads a `context`: only a model that reads its own tokens is exported")
    if what.condition is not None:
        found.append("it reads a `condition`, which Transformers does not give")
    if found:
        return found
    module = request.module
    once = {name for name, _ in module.named_parameters()}
    twice = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    shared = next((name for name in twice if name not in once), None)
    if shared is not None:
        found.append(f"`{shared}` is the tensor of another name too")
    speaks = what.vocab is not None and what.head.out.shape.dim == what.vocab
    if speaks and not what.classifies and not projects(untied(what)):
        found.append(f"its head is more than functions of one `linear({what.vocab})`")
    return found


def shelled(request: Request) -> Shelled:
    """Return the texts of a model that nothing stands in the way of."""
    what = request.what
    assert isinstance(what, Model)
    apart = untied(what)
    made = _Shell(request, what, generate(apart, Target("torch")), projects(apart))
    return Shelled(
        made.name,
        made.takes,
        made.files,
        tuple(made.autos),
        made.speaks and decodes(what),
    )


@dataclass(frozen=True)
class _Shell:
    """A model with its text, in which the map to the vocabulary is a module of its own."""

    request: Request
    what: Model
    code: Code
    speaks: bool  # whether its head is functions of one such map

    @property
    def name(self) -> str:
        return ident(self.what.name).lower()

    @property
    def cls(self) -> str:
        return class_name(self.what.name)

    @property
    def takes(self) -> str:
        """What Transformers calls its first argument."""
        if self.what.vocab is not None:
            return "input_ids"
        return "inputs_embeds" if self.what.patches is None else "pixel_values"

    @property
    def autos(self) -> dict[str, str]:
        """Which class opens it as which, by module and name."""
        ends = ["Model"]
        if self.what.classifies:
            kind = "Sequence" if self.what.patches is None else "Image"
            ends = [f"For{kind}Classification"]
        elif self.what.vocab is not None:
            ends += ["ForCausalLM"] if self.speaks else []
            ends += ["ForSequenceClassification"]
        found = {"AutoConfig": f"configuration_{self.name}.{self.cls}Config"}
        for end in ends:
            auto = "AutoModel" if end == "Model" else f"AutoModel{end}"
            found[auto] = f"modeling_{self.name}.{self.cls}{end}"
        return found

    @property
    def files(self) -> dict[str, str]:
        """What is written, by name."""
        classes = "modeling"
        if self.what.classifies:
            classes = "classifying"
        elif self.what.vocab is None:
            classes = "encoding"
        return {
            "config.json": _json(self.configuration),
            "generation_config.json": _json({"use_cache": decodes(self.what)}),
            f"architecture_{self.name}.py": checkpointed(self.code, layers(self.request)),
            f"caching_{self.name}.py": self.renamed("caching"),
            f"configuration_{self.name}.py": self.renamed("configuration"),
            f"modeling_{self.name}.py": self.renamed(classes),
            f"pretrained_{self.name}.py": self.renamed("pretrained"),
        }

    @property
    def configuration(self) -> dict[str, object]:
        what = self.what
        own = [each.rpartition(".")[2] for each in self.autos.values() if "modeling" in each]
        first = f"{self.cls}ForCausalLM"
        made: dict[str, object] = {
            "architectures": [first if first in own else own[0]],
            "auto_map": self.autos,
            "dtype": self.request.dtype_name,
            "hidden_size": what.width,
            "model_type": f"headloom_{self.name}",
            "num_hidden_layers": len(what.steps),
            "tie_word_embeddings": ties(what),
            "use_cache": decodes(what),
            "vocab_size": what.vocab,
        }
        if what.positions:
            made["max_position_embeddings"] = what.positions
        if what.classifies:
            labels = [f"LABEL_{at}" for at in range(what.head.out.shape.dim)]
            made["id2label"] = {str(at): each for at, each in enumerate(labels)}
            made["label2id"] = {each: at for at, each in enumerate(labels)}
        return made

    @property
    def constants(self) -> dict[str, object]:
        """What holds of the architecture, by the names that the shell reads."""
        what = self.what
        why = self.request.subject.obstacle
        if not self.speaks:
            why = "it gives no logits of a vocabulary"
        return {
            "PROJECTION": PROJECTION if self.speaks else None,
            "OBSTACLE": why,
            "UNHEARD": _unheard(what),
            "READS_TOKENS": "tokens" in what.reads,
            "LAYOUT": {"cuts": not what.marks, "rows": _rows(what)},
            "CLASSES": what.head.out.shape.dim,
        }

    def renamed(self, file: str) -> str:
        """Return a text of the shell with the names of the model, and what holds of it."""
        text = (SHELL / f"{file}.py").read_text(encoding="utf-8")
        for key, value in self.constants.items():
            text = _valued(text, key, value)
        text = text.replace(
            "from .architecture import Architecture, ",
            f"from .architecture import {self.code.name} as Architecture\n"
            "from .architecture import ",
        )
        text = re.sub(r"^from \.(\w+) import", rf"from .\1_{self.name} import", text, flags=re.M)
        text = text.replace('"headloom_loom"', f'"headloom_{self.name}"')
        text = text.replace("loom_input", self.takes)
        kind = "Sequence" if self.what.patches is None else "Image"
        text = text.replace("LoomForClassification", f"LoomFor{kind}Classification")
        return re.sub(r"\bLoom(?=[A-Z])", self.cls, text)


def untied(model: Model) -> Model:
    """Return a model whose map to the vocabulary is a module of its own, for others to tie."""

    def change(node: Flow) -> Flow:
        if isinstance(node, Apply) and node.op == "tied":
            return replace(node, op="linear", module=PROJECTION)
        return node

    return replace(model, head=replace(model.head, out=flow_mapped(model.head.out, change)))


def ties(model: Model) -> bool:
    """Say whether a model's map to the vocabulary is that of its embedding."""
    return untied(model) != model


def projects(model: Model) -> bool:
    """Say whether the head of an untied model is functions of one map to the vocabulary."""
    graph = simplest(model.head)
    maps = [node for node in graph.of(Stage) if node.module == PROJECTION]
    if len(maps) != 1 or maps[0].op.name != "linear" or maps[0].dims[-1] != model.vocab:
        return False
    before = {maps[0].name}
    reads = [graph.output]
    while reads:
        node = graph.node(reads.pop())
        if node.name in before:
            continue
        op = node.op.definition if made_by(node, Stage) else None
        if op is None or op.by_sequence or op.positional:
            return False
        reads += node.inputs
    return True


def layers(request: Request) -> list[str]:
    """Return the classes of a model's layers, in order."""
    made = request.module.layers
    return list(dict.fromkeys(type(each).__name__ for each in made))  # type: ignore[union-attr]


def checkpointed(code: Code, classes: Sequence[str]) -> str:
    """Return an emitted text in which some classes can be computed again for their gradients."""
    text = code.text.replace("It needs PyTorch alone;", "It needs PyTorch and Transformers;", 1)
    text = text.replace(
        "from torch import Tensor, nn\n",
        "from torch import Tensor, nn\n"
        "from transformers.modeling_layers import GradientCheckpointingLayer\n",
        1,
    )
    again = {"nn.Module": "GradientCheckpointingLayer"}
    again |= {"Constants": "GradientCheckpointingLayer, Constants"}
    for name in classes:
        for base, bases in again.items():
            text = text.replace(f"\nclass {name}({base}):\n", f"\nclass {name}({bases}):\n", 1)
    return text


def _valued(text: str, key: str, value: object) -> str:
    """Return a text with the value of a constant, if it is in it, before what is said of it."""
    written = f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')
    line = next((each for each in text.splitlines() if each.startswith(f"{key}: ")), None)
    if line is None:
        return text
    typed, _, rest = line.partition(" = ")
    return text.replace(line, f"{typed} = {written}  #{rest.rpartition('#')[2]}")


def _rows(what: Model) -> bool:
    return what.memory is not None or any(map(own_rows, what.layers))


def _unheard(what: Model) -> str | None:
    if what.lanes is not None:
        return f"its stream is of {what.lanes} lanes"
    return "learned tokens stand before each sequence" if what.memory is not None else None


def _json(given: dict[str, object]) -> str:
    return json.dumps(given, indent=2) + "\n"

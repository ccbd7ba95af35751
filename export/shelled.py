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
    files: dict[str, str]
    autos: tuple[str, ...]  # the classes of Transformers that open it
    decodes: bool


def standing_apart(request: Request) -> list[str]:
    """Return why a model is none that Transformers can open."""
    what = request.what
    if not isinstance(what, Model):
        return [f"`{what.name}` is a block: Transformers opens models"]
    found = []
    if what.vocab is None:
        takes = "features" if what.patches is None else "images"
        found.append(f"it takes {takes}: only a model with a `vocab` is exported")
    if what.classifies:
        found.append("its head gives one answer for a sequence: export it with the head `lm`")
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
    if what.head.out.shape.dim == what.vocab and not projects(untied(what)):
        found.append(f"its head is more than functions of one `linear({what.vocab})`")
    return found


def shelled(request: Request) -> Shelled:
    """Return the texts of a model that nothing stands in the way of."""
    what = request.what
    assert isinstance(what, Model)
    apart = untied(what)
    name, cls = ident(what.name).lower(), class_name(what.name)
    speaks = projects(apart)
    autos = {"AutoConfig": f"configuration_{name}.{cls}Config"}
    autos |= {"AutoModel": f"modeling_{name}.{cls}Model"}
    if speaks:
        autos |= {"AutoModelForCausalLM": f"modeling_{name}.{cls}ForCausalLM"}
    autos |= {
        "AutoModelForSequenceClassification": f"modeling_{name}.{cls}ForSequenceClassification"
    }
    code = generate(apart, Target("torch"))
    files = {
        "config.json": _json(_configuration(request, what, cls, name, autos)),
        "generation_config.json": _json(_generation(what)),
        f"configuration_{name}.py": _renamed("configuration.py", cls, name, code),
        f"modeling_{name}.py": _modeling(request, what, cls, name, code, speaks),
        f"architecture_{name}.py": checkpointed(code, layers(request)),
    }
    return Shelled(name, files, tuple(autos), speaks and decodes(what))


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
    for name in classes:
        text = text.replace(
            f"\nclass {name}(nn.Module):\n", f"\nclass {name}(GradientCheckpointingLayer):\n", 1
        )
    return text


def _configuration(
    request: Request, what: Model, cls: str, name: str, autos: dict[str, str]
) -> dict[str, object]:
    own = [each.rpartition(".")[2] for each in autos.values() if "modeling" in each]
    most = {"max_position_embeddings": what.positions} if what.positions else {}
    first = f"{cls}ForCausalLM"
    return {
        "architectures": [first if first in own else own[0]],
        "auto_map": autos,
        "dtype": request.dtype_name,
        "hidden_size": what.width,
        **most,
        "model_type": f"headloom_{name}",
        "num_hidden_layers": len(what.steps),
        "tie_word_embeddings": ties(what),
        "use_cache": decodes(what),
        "vocab_size": what.vocab,
    }


def _generation(what: Model) -> dict[str, object]:
    return {"use_cache": decodes(what)}


def _modeling(request: Request, what: Model, cls: str, name: str, code: Code, speaks: bool) -> str:
    why = request.subject.obstacle
    if not speaks:
        why = "it gives features, and not logits of a vocabulary"
    values: dict[str, object] = {
        "PROJECTION": PROJECTION if speaks else None,
        "OBSTACLE": why,
        "UNHEARD": _unheard(what),
        "READS_TOKENS": "tokens" in what.reads,
        "LAYOUT": {"cuts": not what.marks, "rows": _rows(what)},
    }
    text = _renamed("modeling.py", cls, name, code)
    for key, value in values.items():
        text = _valued(text, key, value)
    return text


def _valued(text: str, key: str, value: object) -> str:
    """Return a text with the value of a constant, before the comment that says what it is."""
    written = f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')
    line = next(each for each in text.splitlines() if each.startswith(f"{key}: "))
    typed, _, rest = line.partition(" = ")
    return text.replace(line, f"{typed} = {written}  #{rest.rpartition('#')[2]}")


def _rows(what: Model) -> bool:
    return what.memory is not None or any(map(own_rows, what.layers))


def _unheard(what: Model) -> str | None:
    if what.lanes is not None:
        return f"its stream is of {what.lanes} lanes"
    return "learned tokens stand before each sequence" if what.memory is not None else None


def _renamed(file: str, cls: str, name: str, code: Code) -> str:
    """Return a text of the shell with the names of a model."""
    text = (SHELL / file).read_text(encoding="utf-8")
    text = text.replace(
        "from .architecture import Architecture, ",
        f"from .architecture_{name} import {code.name} as Architecture\n"
        f"from .architecture_{name} import ",
    )
    text = text.replace("from .configuration import", f"from .configuration_{name} import")
    text = text.replace('"headloom_loom"', f'"headloom_{name}"')
    return re.sub(r"\bLoom(?=[A-Z])", cls, text)


def _json(given: dict[str, object]) -> str:
    return json.dumps(given, indent=2) + "\n"

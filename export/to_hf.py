"""A folder that Transformers opens: `from_pretrained(folder, trust_remote_code=True)`.

made/config.json              sizes, and where the classes are
made/configuration_tiny.py    the configuration
made/architecture_tiny.py     the text that `headloom build` writes
made/modeling_tiny.py         the classes that Transformers calls
made/pretrained_tiny.py       what they share
made/caching_tiny.py          their cache
made/generation_config.json   how `generate` goes on by default
made/model.safetensors        the weights, under `model.`
made/README.md                what it is, how to open it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..compiler.verify.verify import Finding
from .opened import opened
from .place import write_text, writing
from .readme import fenced, readme
from .request import Request
from .shelled import Shelled, shelled, standing_apart

OPTIONS: frozenset[str] = frozenset()
WEIGHTS = "model.safetensors"


def obstacles(request: Request) -> Sequence[str]:
    """Say what Transformers has no class for, or what the shell cannot call."""
    return standing_apart(request)


def write(request: Request, folder: Path) -> None:
    """Write the texts, the configuration and the weights."""
    from safetensors.torch import save_file

    made = shelled(request)
    for name, text in made.files.items():
        write_text(folder / name, text)
    state = {f"model.{name}": each for name, each in request.module.state_dict().items()}
    with writing(folder / WEIGHTS, sum(each.nbytes for each in state.values())) as path:
        save_file(state, str(path), metadata={"format": "pt"})
    write_text(folder / "README.md", _readme(request, made))


def check(request: Request, folder: Path) -> Iterator[Finding]:
    """Open the folder with Transformers alone: call it, decode with it, save and load it."""
    yield from opened(request, folder, shelled(request))


def _readme(request: Request, made: Shelled) -> str:
    auto = "AutoModelForCausalLM" if "AutoModelForCausalLM" in made.autos else made.autos[1]
    lines = [
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder", trust_remote_code=True)',
    ]
    names = ", ".join(f"`{each}`" for each in made.autos)
    says = (
        f"It opens as {names} of Transformers 5.23 or later, which runs the code of this "
        f"folder: read `architecture_{made.name}.py`, the architecture, and "
        f"`modeling_{made.name}.py`, what stands around it. Headloom is not needed."
    )
    front = "---\nlibrary_name: transformers\n"
    if made.decodes:
        front += "pipeline_tag: text-generation\n"
    return f"{front}---\n\n{readme(request, says, fenced('python', lines))}"

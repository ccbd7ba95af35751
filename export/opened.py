"""What a folder for Transformers is held to, in a process where Headloom is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.model import Model
from ..compiler.verify.apart import apart
from ..compiler.verify.cases import Case
from ..compiler.verify.verify import Finding
from .checking import Call, Compared, expecting, forward, found
from .request import Request
from .shelled import Shelled

STEPS = 8  # how many tokens are generated

# What runs apart: it opens the folder as each class says, and makes every call.
_RUN = """\
import os, tempfile, warnings
import torch

def run(folder, autos, main, takes, gives, calls, padded, prompt, steps):
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as kept:
        os.environ.update(HF_MODULES_CACHE=kept + "/modules", HF_HUB_OFFLINE="1")
        import transformers
        transformers.logging.set_verbosity_error()

        def load(auto, folder=folder):
            made = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
            return made if auto == "AutoConfig" else made.eval()

        def call(model, x, mask=None):
            return getattr(model(**{takes: x, "attention_mask": mask}), gives)

        def live(y, mask):
            return y[mask.bool()] if y.ndim == 3 else y

        with torch.no_grad():
            opened = {auto: load(auto) for auto in autos}
            for auto in autos[1:]:
                opened[auto](**{takes: calls[0]})
            model = opened[main]
            made = {"calls": [call(model, x) for x in calls]}
            made["padded"] = [live(call(model, x, mask), mask) for x, mask in padded]
            if prompt is not None:
                x, mask = prompt
                made["tokens"] = model.generate(
                    x, attention_mask=mask, do_sample=False, max_new_tokens=steps,
                    eos_token_id=None, pad_token_id=0)
            model.save_pretrained(kept + "/saved")
            again = load(main, kept + "/saved")
            made["again"] = [call(again, x) for x in calls]
            return made
"""


def opened(request: Request, folder: Path, made: Shelled) -> Iterator[Finding]:
    """Yield what each comparison with the module found; first, whether the folder opens."""
    name, whole, padded = request.what.name, forward(request, whole=True), _padded(request)
    prompt = _prompt(request) if made.decodes else None
    main = "AutoModelForCausalLM" if "AutoModelForCausalLM" in made.autos else made.autos[1]
    try:
        ran = apart(
            _RUN,
            folder=str(folder),
            autos=list(made.autos),
            main=main,
            takes=made.takes,
            gives="last_hidden_state" if main == "AutoModel" else "logits",
            calls=[x for each in whole for x, _ in each.calls],
            padded=[(x, given["attention_mask"]) for x, given in padded.calls],
            prompt=prompt,
            steps=STEPS,
        )
    except RuntimeError as problem:
        yield Finding(name, "opens", False, note=str(problem))
        return
    yield Finding(name, "opens", True, len(made.autos), note=f"as {', '.join(made.autos)}")
    yield found(request, "forward", whole, lambda: [(y,) for y in ran["calls"]])
    yield found(request, "padding", [padded], lambda: [ran["padded"]], "on the left and the right")
    yield _generated(request, prompt, ran)
    yield found(request, "saved again", whole, lambda: [(y,) for y in ran["again"]])


def _padded(request: Request) -> Compared:
    """Return rows of different lengths, with padding on the left, and on the right."""
    case = request.subject.fitting(Case(3, 11, 1, dtype=request.dtype, seed=5, whole=True))
    x, _ = request.subject.inputs(case)
    step = torch.arange(case.tokens)
    short = torch.tensor([[0], [case.tokens // 2], [max(0, case.tokens - 2)]])
    masks = [(step >= short).long(), (step < case.tokens - short).long()]
    calls = tuple((x, {"attention_mask": mask}) for mask in masks)
    return expecting(request, case, calls, _live)


def _live(module: nn.Module, calls: tuple[Call, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        made = [(module(x, **given), given["attention_mask"].bool()) for x, given in calls]
    return tuple(y[mask] if y.ndim == 3 else y for y, mask in made)


def _prompt(request: Request) -> tuple[Tensor, Tensor]:
    """Return tokens of rows that begin with padding, and their mask."""
    what = request.what
    assert isinstance(what, Model)
    tokens = min(7, max(1, (what.positions or 99) - STEPS))
    case = replace(Case(2, tokens, 1, seed=6, whole=True), dtype=request.dtype)
    x, _ = request.subject.inputs(case)
    mask = (torch.arange(tokens) >= torch.tensor([[0], [tokens // 2]])).long()
    return x, mask


def _generated(
    request: Request, prompt: tuple[Tensor, Tensor] | None, ran: dict[str, Any]
) -> Finding:
    """Compare what `generate` gives with the most likely token of each step of the module."""
    name = request.what.name
    if prompt is None:
        why = request.subject.obstacle or "it gives no logits of a vocabulary"
        return Finding(name, "generate", None, note=why)
    got = ran["tokens"]
    expected = greedy(request.module, *prompt)
    if not torch.equal(got, expected):
        note = f"{got.tolist()} were generated, {expected.tolist()} are the most likely"
        return Finding(name, "generate", False, note=note)
    return Finding(name, "generate", True, got.shape[0], 0.0, f"{STEPS} tokens of a padded batch")


def greedy(module: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Return tokens [b, n] and the most likely ones after them, step by step with a cache."""
    cache = module.init_cache(len(x))
    with torch.no_grad():
        logits = module(x, cache=cache, attention_mask=mask)
        for step in range(STEPS):
            x = torch.cat([x, logits[:, -1:].argmax(-1)], 1)
            if step + 1 < STEPS:
                logits = module(x[:, -1:], cache=cache)
    return x

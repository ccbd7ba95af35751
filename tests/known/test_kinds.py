"""Known models, read from tiny configurations of theirs, against the models of transformers."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headloom.grammar.format import format_loom
from headloom.grammar.parse import parse
from headloom.known import Known, from_hf
from headloom.known.table import KINDS

from .cases import ALONE, CASES, kind, made

pytest.importorskip("transformers", reason="needs Hugging Face Transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

NEAR = 1e-4
NEW = 20
TOKENS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
FEW = ("llama", "gpt2", "gemma3_text", "falcon/rw", "deepseek_v3", "mamba2/groups")
every = pytest.mark.parametrize(
    "case", [each if each in FEW else pytest.param(each, marks=pytest.mark.sweep) for each in CASES]
)


@cache
def pair(case: str) -> tuple[nn.Module, Known, nn.Module]:
    """Return their model, what is known of it, and ours with its weights."""
    theirs = made(case)
    known = from_hf(theirs)
    return theirs, known, known.compile(backend="torch").eval()


def logits(model: nn.Module, tokens: Tensor, **given: Any) -> Tensor:
    known = inspect.signature(model.forward).parameters
    given = {name: each for name, each in given.items() if name in known}
    found: Tensor = model(tokens, use_cache=False, **given).logits
    return found


def assert_near(got: Tensor, wanted: Tensor, what: str) -> None:
    scale = max(1.0, wanted.abs().max().item())
    worst = (got - wanted).abs().max().item() / scale
    assert worst < NEAR, f"{what}: {worst:.1e}"


def test_every_kind_has_a_case() -> None:
    assert {kind(case) for case in CASES} == set(KINDS)


@every
def test_logits_alone_and_padded_on_the_left(case: str) -> None:
    theirs, _, ours = pair(case)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        assert_near(ours(TOKENS), logits(theirs, TOKENS), "logits")
        if case in ALONE:
            wanted = logits(theirs, TOKENS)
            wanted[0, 4:] = logits(theirs, TOKENS[:1, 4:])[0]
        else:
            wanted = logits(theirs, TOKENS, attention_mask=mask, position_ids=positions)
        got = ours(TOKENS, attention_mask=mask)
        assert_near(got[mask.bool()], wanted[mask.bool()], "padded")


@every
def test_greedy_tokens(case: str) -> None:
    """Ours writes with a cache; theirs, shown what was written, would have written it."""
    theirs, _, ours = pair(case)
    prompt = TOKENS[:1]
    cache_ = ours.init_cache(batch=1, length=prompt.shape[1] + NEW)
    with torch.no_grad():
        written = [ours(prompt, cache=cache_)[:, -1:].argmax(-1)]
        while len(written) < NEW:
            written.append(ours(written[-1], cache=cache_).argmax(-1))
        whole = torch.cat([prompt, *written], 1)
        wanted = logits(theirs, whole[:, :-1]).argmax(-1)[:, prompt.shape[1] - 1 :]
    assert torch.equal(torch.cat(written, 1), wanted)


@every
def test_gradients_of_the_shifted_loss(case: str) -> None:
    theirs, known, ours = pair(case)
    found = []
    for model, given in ((ours, ours(TOKENS)), (theirs, logits(theirs, TOKENS))):
        model.zero_grad()
        cross_entropy(given[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        named = model.named_parameters()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named})
    wanted = known.weights.ours(found[1])
    untrained = known.weights.ours(dict(theirs.named_buffers()))
    assert set(found[0]) == set(wanted) | set(untrained)
    for name, each in found[0].items():
        assert_near(each, wanted.get(name, torch.zeros_like(each)), f"gradient of {name}")


@every
def test_weights_go_there_and_back(case: str) -> None:
    theirs, known, ours = pair(case)
    state = theirs.state_dict()
    back = known.weights.theirs(ours.state_dict())
    assert set(back) | set(known.weights.unused) == set(state)
    again = known.weights.ours(back)
    for name, each in ours.state_dict().items():
        assert torch.equal(again[name], each), name
    for name, each in back.items():
        skipped = next(row.rule.after for row in known.weights.rows if row.theirs == name)
        assert torch.equal(each[skipped:], state[name][skipped:].float()), name


@every
def test_the_text_is_formatted_and_says_where_it_is_from(case: str) -> None:
    _, known, _ = pair(case)
    assert format_loom(parse(known.text)) == known.text
    assert f"`{kind(case)}` in Transformers" in known.text.replace("\n#", "")
    assert max(map(len, known.text.splitlines())) <= 120

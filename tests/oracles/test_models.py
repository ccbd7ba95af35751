"""Whole language models in Loom against those that Hugging Face Transformers ships.

Each file of `examples/models` is built at its tiny size, theirs gets random weights, ours the same
ones by the names in `models.py`. In float64, with the full attention map on their side.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headloom as hl

from .choosing_models import CHOOSING_MODELS
from .models import MODELS as OTHERS
from .models import SIZES, moved
from .others import Widened
from .test_transformers import assert_near, gradients, randomise

transformers = pytest.importorskip("transformers", reason="needs Hugging Face Transformers")

MODELS = OTHERS | CHOOSING_MODELS
FOLDER = Path(__file__).parents[2] / "examples" / "models"
BIASES = ("correction_bias", "balancing_biases")
NEAR = 1e-9
NEW = 4
TOKENS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(0))


@cache
def theirs(name: str) -> nn.Module:
    made = MODELS[name]
    with Widened():
        config = transformers.AutoConfig.for_model(made.kind, **{**SIZES, **made.config})
        auto = getattr(transformers, made.auto)
        model = auto.from_config(config, attn_implementation=made.attention)
        model = model.to(torch.float64).eval()
        randomise(model, seed=1)
        generator = torch.Generator().manual_seed(2)
        for key, each in model.named_parameters():
            if made.zero is not None and key.endswith(made.zero):
                nn.init.zeros_(each)
        for key, each in model.named_buffers():
            if key.endswith(BIASES):
                each.copy_(0.2 * torch.randn(each.shape, generator=generator, dtype=torch.float64))
            if key.endswith("tid2eid"):
                drawn = torch.rand(len(each), config.n_routed_experts, generator=generator)
                each.copy_(drawn.topk(each.shape[1]).indices)
    return model


def choosing(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that only choose experts, which theirs does not train."""
    found = dict(model.named_buffers())
    biases = {name: each for name, each in found.items() if name.endswith(BIASES)}
    tables = {name: each for name, each in found.items() if name.endswith("tid2eid")}
    return biases | {name: nn.functional.one_hot(each).sum(1) for name, each in tables.items()}


@cache
def ours(name: str) -> nn.Module:
    arch = hl.load(FOLDER / f"{name}.loom")
    model = hl.compile(arch, name, dtype=torch.float64).eval()
    weights = {**dict(theirs(name).named_parameters()), **choosing(theirs(name))}
    with torch.no_grad():
        model.load_state_dict(renamed(name, model, weights))
    return model


def renamed(name: str, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    shapes = {key: tuple(each.shape) for key, each in model.named_parameters()}
    return moved(MODELS[name].rows, tensors, shapes)


def logits_of(name: str, tokens: Tensor, **given: Any) -> Tensor:
    with Widened():
        return theirs(name)(tokens, use_cache=False, **given).logits


def test_every_model_of_the_folder_is_compared_and_short() -> None:
    texts = {path.stem: path.read_text() for path in FOLDER.glob("*.loom")}
    assert texts.keys() == MODELS.keys() | {"siglip"}  # images: `test_images.py`
    said = {name: [each for each in text.splitlines() if each] for name, text in texts.items()}
    assert max(map(len, said.values())) <= 80


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    with torch.no_grad():
        assert_near(ours(name)(TOKENS), logits_of(name, TOKENS), "logits", NEAR)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_loss(name: str) -> None:
    """Compare those of all parameters. A bias of keys has none; rounding is all there is of it."""
    found = []
    for model, call in ((ours(name), ours(name)), (theirs(name), lambda x: logits_of(name, x))):
        model.zero_grad()
        nn.functional.cross_entropy(call(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        found.append(all_gradients(model))
    got, expected = found[0], renamed(name, ours(name), found[1])
    assert expected.keys() <= got.keys()
    for key, each in got.items():  # what only chooses has none
        assert_near(each, expected.get(key, 0 * each), f"gradient of {key}", NEAR)


def all_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters, zero where there is none."""
    none = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    return none | gradients(model)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_tokens_written_with_a_cache_are_theirs(name: str) -> None:
    model = ours(name)
    cache = model.init_cache(batch=2, length=32)
    with torch.no_grad():
        steps, written = [model(TOKENS, cache=cache)[:, -1:]], TOKENS
        for _ in range(NEW):
            written = torch.cat([written, steps[-1].argmax(-1)], 1)
            steps.append(model(written[:, -1:], cache=cache))
        wanted = logits_of(name, written)[:, -NEW - 1 :]
    assert_near(torch.cat(steps, 1), wanted, "logits of steps", NEAR)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_left(name: str) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    given = {"attention_mask": mask}
    if MODELS[name].positions:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got = ours(name)(TOKENS, attention_mask=mask)
        if MODELS[name].alone:
            wanted = logits_of(name, TOKENS)
            wanted[0, 4:] = logits_of(name, TOKENS[:1, 4:])[0]
        else:
            wanted = logits_of(name, TOKENS, **given)
    assert_near(got[mask.bool()], wanted[mask.bool()], "logits", NEAR)

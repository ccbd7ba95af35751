from __future__ import annotations

import numpy as np
import pytest
import torch

from headloom.search.tasks import IGNORED
from headloom.search.tasks.mqar import mqar

CASES = [mqar(), mqar(vocab=64, pairs=8, length=64, noise=True), mqar(vocab=34, pairs=4, length=16)]


@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_its_identities(task, split):
    settings = dict(task.settings)
    pairs, vocab = settings["pairs"], settings["vocab"]
    tokens, targets = task.batch(3, 64, split)
    assert tokens.shape == targets.shape == (64, task.length)
    assert tokens.dtype == targets.dtype == torch.int64
    assert ((tokens >= 0) & (tokens < vocab)).all()
    for row, answer in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocab // 2 for key in keys)
        assert all(value >= vocab // 2 for value in values)
        asked = [at for at, target in enumerate(answer) if target != IGNORED]
        assert len(asked) == pairs
        assert all(at >= 2 * pairs and at % 2 == 0 for at in asked)
        book = dict(zip(keys, values, strict=True))
        assert [book[row[at]] for at in asked] == [answer[at] for at in asked]
        if not settings["noise"]:
            assert all(row[at] == 0 for at in range(2 * pairs, len(row)) if at not in asked)


def test_looking_the_keys_up_has_accuracy_one():
    task = mqar(vocab=64, pairs=4, length=32)
    _, targets = task.batch(0, 32, "test")
    logits = torch.zeros(32, 32, 64)
    logits.scatter_(2, targets.clamp(min=0).unsqueeze(-1), 1.0)
    assert task.metrics(logits, targets) == {"accuracy": 1.0}
    assert task.metrics(-logits, targets) == {"accuracy": 0.0}
    logits[:16] *= -1
    assert task.metrics(logits, targets) == {"accuracy": 0.5}


@pytest.mark.parametrize("noise", [False, True])
def test_every_draw_comes_from_the_seed(noise):
    def batch(seed, step, split):
        np.random.seed(step)
        torch.manual_seed(step)
        return mqar(noise=noise, seed=seed).batch(step, 16, split)[0]

    assert torch.equal(batch(0, 0, "train"), batch(0, 0, "train"))
    different = [
        batch(0, 0, "train"),
        batch(1, 0, "train"),
        batch(0, 1, "train"),
        batch(0, 0, "test"),
    ]
    for index, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[index + 1 :])


def test_short_gaps_come_first():
    """The gap's chance falls as a · gap^(a - 1): for a = 0.01 nearly as 1 / gap."""
    task = mqar(vocab=256, pairs=1, length=34)
    _, targets = task.batch(0, 20_000, "train")
    gaps = (targets != IGNORED).float().argmax(1) // 2 - 1
    found = torch.bincount(gaps, minlength=16).double() / 20_000
    expected = torch.arange(1, 17, dtype=torch.float64) ** -0.99
    assert torch.allclose(found, expected / expected.sum(), atol=0.012)


def test_what_cannot_be_trained_says_why():
    task = mqar(vocab=64, length=32)
    assert task.misfit(64, 32, "[n, 64]") == task.misfit(100, 0, "[n, 100]") == ""
    assert "vocab" in task.misfit(32, 0, "[n, 32]")
    assert "16 positions" in task.misfit(64, 16, "[n, 64]")
    assert "the head of this one gives [1, 4]" in task.misfit(64, 0, "[1, 4]")


@pytest.mark.parametrize(
    "settings",
    [
        {"pairs": 0},
        {"length": 31},
        {"pairs": 9, "length": 32},
        {"vocab": 9, "pairs": 4},
        {"power": 0},
    ],
)
def test_settings_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        mqar(**settings)

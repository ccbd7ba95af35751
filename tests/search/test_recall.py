"""Trained from scratch: a recurrence beside a window recalls what linear attention cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

import headloom as hl
from headloom.search.tasks.mqar import mqar
from headloom.search.trainer import train
from headloom.search.training import Training

TEXT = (Path(__file__).parents[2] / "benchmarks" / "mqar.loom").read_text(encoding="utf-8")


def accuracy(name: str, pairs: int, vocab: int, training: Training) -> float:
    """Train at sequences of eight tokens a pair; return how many answers are right."""
    length = 8 * pairs
    text = f"{TEXT}model trained : {name}({vocab}, {length}) {{ }}\n"
    module = hl.compile(hl.load(text, format="loom"), "trained", backend="torch", seed=0)
    return train(module, mqar(vocab, pairs, length), training)["accuracy"]


def quick(name: str) -> float:
    training = Training(lr=1e-2, steps=400, batch=32, warmup=20, examples=256)
    return accuracy(name, 4, 32, training)


def thorough(name: str) -> float:
    training = Training(lr=3e-3, steps=800, batch=32, warmup=40, examples=512)
    return accuracy(name, 8, 64, training)


@pytest.mark.slow
def test_a_recurrence_and_a_window_recall_pairs():
    assert quick("hybrid") >= 0.8


@pytest.mark.slow
def test_linear_attention_does_not():
    assert 2 / 32 < quick("linear_") < 0.5  # one of the four values, whichever the key


@pytest.mark.sweep
def test_a_recurrence_and_a_window_recall_every_pair():
    assert thorough("hybrid") >= 0.99


@pytest.mark.sweep
def test_linear_attention_recalls_no_more_of_many_pairs():
    assert 2 / 64 < thorough("linear_") < 0.5

"""Trained from scratch: a recurrence beside a window recalls what linear attention cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

import headloom as hl
from headloom.search.tasks.mqar import mqar
from headloom.search.trainer import train
from headloom.search.training import Training

TEXT = (Path(__file__).parents[2] / "benchmarks" / "mqar.loom").read_text(encoding="utf-8")
VOCAB, LENGTH, PAIRS = 64, 64, 8


def accuracy(name: str) -> float:
    text = f"{TEXT}model trained : {name}({VOCAB}, {LENGTH}) {{ }}\n"
    module = hl.compile(hl.load(text, format="loom"), "trained", backend="torch", seed=0)
    training = Training(lr=3e-3, steps=800, batch=32, warmup=40, examples=512)
    return train(module, mqar(VOCAB, PAIRS, LENGTH), training)["accuracy"]


@pytest.mark.slow
def test_a_recurrence_and_a_window_recall_every_pair():
    assert accuracy("hybrid") >= 0.99


@pytest.mark.slow
def test_linear_attention_does_not():
    assert 2 / VOCAB < accuracy("linear_") < 0.5

"""A space small enough to train in tests: a second for a handful of trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from headloom.grammar.parse import parse
from headloom.search.plan import read_plan

SPACE = """
block global {{ heads = choose(1, 2); mask = causal }}
block local(w) : global {{ mask = causal and window(w) }}
model probe {{
  vocab = 16; width = 8; ffn = none; embed_position = learned(8)
  layers = each(2, choose(global, local(pow2(1..4))))
}}
search {{
  model = probe
  task = mqar(vocab = 16, pairs = 2, length = 8)
  maximize = accuracy
  minimize = cache_bytes(tokens = 64)
  {settings}
}}
"""
TRAIN = "train = adamw(lr = loguniform(1e-3..1e-2), steps = 3, batch = 4, examples = 16)"


def space(settings: str = "", train: str = TRAIN) -> str:
    return SPACE.format(settings=f"{train}; sampler = random; trials = 4\n{settings}")


@pytest.fixture
def text():
    return space


@pytest.fixture
def plan(tmp_path: Path):
    def make(settings: str = "", train: str = TRAIN, **given):
        given.setdefault("out", tmp_path / "out")
        return read_plan(parse(space(settings, train)), **given)

    return make

"""Running ONNX models where neither Headloom nor PyTorch can be imported.

Each call goes as numbers through files to a fresh interpreter that has NumPy and onnxruntime.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

Feeds = dict[str, Tensor]

_SCRIPT = """\
import json, sys

for name in ("torch", "headloom"):
    sys.modules[name] = None  # neither can be imported

import numpy
import onnxruntime

onnxruntime.set_default_logger_severity(3)
made, folder = sys.argv[1:]

def loaded(name):
    session = onnxruntime.InferenceSession(f"{made}/{name}", providers=["CPUExecutionProvider"])
    takes = [each.name for each in session.get_inputs()]
    return lambda feeds: session.run(None, {name: feeds[name] for name in takes})

given = numpy.load(f"{folder}/given.npz")
with open(f"{folder}/plan.json", encoding="utf-8") as file:
    sequences = json.load(file)
models, answers = {}, {}
for at, (names, calls) in enumerate(sequences):
    cache = []
    for name in names:
        if name not in models:
            models[name] = loaded(name)
    for step, feeds in enumerate(calls):
        feeds = {name: given[key] for name, key in feeds.items()}
        feeds |= {f"cache_{number}": x for number, x in enumerate(cache)}
        y, *cache = models[names[min(step, len(names) - 1)]](feeds)
        answers[f"{at}_{step}"] = y
numpy.savez(f"{folder}/answers.npz", **answers)
"""

Calls = tuple[tuple[str, ...], list[Feeds]]


def run(made: Path, sequences: Sequence[Calls]) -> list[list[Tensor]]:
    """Return the first output of every call of every sequence.

    A sequence is the models of its first call, its second and all later ones, and what is given to
    each call; a cache is handed on. Raises `RuntimeError` where onnxruntime refuses.
    """
    with tempfile.TemporaryDirectory(prefix="headloom-") as name:
        folder, plan = Path(name), []
        given: dict[str, Tensor] = {}
        for models, calls in sequences:
            keys = []
            for feeds in calls:
                named = {each: f"x{len(given) + at}" for at, each in enumerate(feeds)}
                given |= {named[each]: x for each, x in feeds.items()}
                keys.append(named)
            plan.append((models, keys))
        arrays: Any = {key: x.numpy() for key, x in given.items()}
        numpy.savez(folder / "given.npz", **arrays)
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        (folder / "script.py").write_text(_SCRIPT, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-P", folder / "script.py", str(made.resolve()), name],
            capture_output=True, text=True, encoding="utf-8", cwd=folder,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"onnxruntime failed: {done.stderr.strip()[-2000:]}")
        with numpy.load(folder / "answers.npz") as answers:
            return [
                [torch.from_numpy(answers[f"{at}_{step}"]) for step in range(len(calls))]
                for at, (_, calls) in enumerate(sequences)
            ]

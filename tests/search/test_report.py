from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from headloom.compiler.checking.check import check
from headloom.grammar.parse import parse, read
from headloom.search import candidate, report
from headloom.search.plan import read_plan
from headloom.search.space import size
from headloom.search.study import run, search

EXAMPLE = Path(__file__).parents[2] / "examples" / "search_mqar.loom"


@pytest.fixture
def searched(plan):
    made = plan(trials=6)
    return made, run(made, progress=False)


def test_every_point_of_the_front_is_a_plain_spec_that_builds(searched):
    plan, study = searched
    paths = sorted((plan.out / "pareto").iterdir())
    assert len(paths) == len(report.front(study)) >= 1
    for path, trial in zip(paths, report.front(study), strict=True):
        text = path.read_text()
        assert f"# accuracy = {trial.values[0]:.4g}" in text or "# accuracy = 1" in text
        model = check(parse(read(path))).models["probe"]
        assert candidate.costs(model).cache_bytes(tokens=64) == trial.values[1]


def test_the_best_are_standalone_and_load_their_weights(searched):
    plan, _ = searched
    paths = sorted((plan.out / "best").glob("*.py"))
    assert paths
    weights = paths[0].with_suffix(".safetensors")
    assert load_file(weights)
    code = (
        "import runpy, sys, torch, safetensors.torch as s\n"
        f"names = runpy.run_path({str(paths[0])!r})\n"
        "made = [v for v in names.values() if isinstance(v, type) and v.__module__ == '<run_path>'"
        " and issubclass(v, torch.nn.Module)][-1]()\n"
        f"s.load_model(made, {str(weights)!r})\n"
        "print(made(torch.zeros(2, 8, dtype=torch.long)).shape, 'headloom' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([2, 8, 16]) False"


def test_weights_are_kept_for_the_front_alone(searched):
    plan, study = searched
    kept = {path.name for path in (plan.out / "weights").iterdir()}
    assert kept == {f"trial_{each.number}.safetensors" for each in report.front(study)}


def test_the_outcome_for_people_and_programs(searched):
    plan, study = searched
    console = Console(width=160, record=True, file=io.StringIO())
    report.show(plan, study, console)
    text = console.export_text()
    assert "probe: 6 complete" in text
    assert "accuracy ↑" in text
    data = json.loads(json.dumps(report.summary(plan, study)))
    assert data["complete"] == 6
    assert data["failed"] == data["infeasible"] == 0
    assert data["front"][0]["values"].keys() == {"accuracy", "cache_bytes(tokens = 64)"}
    assert (plan.out / data["front"][0]["spec"]).is_file()


@pytest.mark.slow
def test_the_example_finds_attention_that_recalls(tmp_path):
    plan = read_plan(parse(read(EXAMPLE)), out=tmp_path)
    assert plan.trials == 8
    assert size(plan.file) == 34
    study = search(EXAMPLE, out=tmp_path, trials=1, progress=False)  # two global layers
    assert report.front(study)[0].values[0] > 0.9

"""`headloom bench` itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from headloom.bench import command, run
from headloom.bench.case import Case
from headloom.bench.suite import Entry, Suite
from headloom.cli import main


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ceiling", lambda *_: 1e9)
    monkeypatch.setattr(run, "calls_for", lambda _: 1)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("small.loom").write_text("block small { width = 16; heads = 2; mask = causal }")
    return "small.loom"


def bench(*args: str) -> Result:
    return CliRunner().invoke(main, ["bench", *args])


def test_table(small: str) -> None:
    done = bench(
        small,
        "--against",
        "plain,cudnn",
        "--tokens",
        "8,16",
        "--no-memory",
        "--repeats",
        "2",
        "--threads",
        "1",
    )
    assert done.exit_code == 0, done.output
    assert "small (sdpa): 8 tokens, forward" in done.stdout
    assert "small (sdpa): 16 tokens, forward" in done.stdout
    assert "cudnn: it runs on NVIDIA GPUs" in done.stdout


def test_json(small: str) -> None:
    done = bench(
        f"{small}:small",
        "--against",
        "plain",
        "--tokens",
        "8",
        "--no-memory",
        "--backward",
        "--repeats",
        "2",
        "--json",
    )
    answer = json.loads(done.stdout)
    (row,) = answer["rows"]
    assert [each["peer"] for each in row["cells"]] == ["headloom", "plain"]
    assert row["case"]["run"] == "backward"
    assert row["flops"] > 0
    assert row["cells"][0]["ratio"] == 1.0
    assert not row["cells"][1]["wrong"]
    assert answer["machine"]["threads"] >= 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--against", "flx"), "there are sdpa, flex, eager"),
        (("--tokens", "8,x"), "lengths with commas"),
        (("--backward", "--decode"), "no backward pass"),
        (("--suite", "cpu"), "give a FILE or a --suite"),
        (("--budget", "9"), "--budget is an option of a --suite"),
    ],
)
def test_wrong_usage(small: str, args: tuple[str, ...], message: str) -> None:
    done = bench(small, *args)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")


def test_nothing_to_measure() -> None:
    assert bench().exit_code == 2
    done = bench("--suite", "cpu", "--tokens", "64")
    assert done.exit_code == 2
    assert "--tokens is an option of a FILE; a suite says its own" in done.stderr


def test_a_description_that_is_wrong(small: str) -> None:
    Path(small).write_text("block a { heads = 3; kv_heads = 2 }")
    done = bench(small)
    assert done.exit_code == 1
    assert "L204" in done.stderr


def test_suite(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Path(small).read_text(), tokens=8)
    suite = Suite(
        "cpu",
        "small",
        None,
        (
            Entry("first", case, ("plain",), target=1e-9),
            Entry("second", replace(case, run="backward"), ("plain",)),
        ),
        {},
    )
    monkeypatch.setattr(command, "read_suite", lambda _: suite)
    done = bench("--suite", "cpu", "--budget", "0", "--out", "found")
    assert done.exit_code == 0, done.output
    assert "first; 8 tokens, forward: not measured yet" in done.stdout
    done = bench("--suite", "cpu", "--out", "found")
    assert "first; 8 tokens, forward: " in done.stderr
    (path,) = Path("found").glob("*.json")
    data = json.loads(path.read_text())
    assert [each["met"] for each in data["rows"]] == [True, None]
    assert "first" in path.with_suffix(".html").read_text()
    answer = json.loads(bench("--suite", "cpu", "--out", "found", "--json").stdout)
    assert answer[0]["rows"] == [{**each} for each in data["rows"]]


def test_the_gpu_suite_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = bench("--suite", "gpu")
    assert done.exit_code == 2
    assert "needs a CUDA device" in done.stderr

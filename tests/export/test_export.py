"""What holds for every target: obstacles first, whole or not at all, the same bytes, certified."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import headloom as hl
from headloom.cli import main
from headloom.export import place, to_py
from headloom.export.targets import TARGETS

TEXT = """
block near { width = 16; heads = 2; mask = causal and window(4) }
block fades { width = 16; heads = 2; mix = gated_delta; mask = causal }
block both { width = 16; heads = 2 }
block reads(m) { width = 16; heads = 2; source = context }
model tiny { vocab = 32; width = 16; layers = [near, fades]; ffn = swiglu(2) }
"""


@pytest.fixture
def arch() -> hl.compiler.loading.Loaded:  # type: ignore[name-defined]
    return hl.load(TEXT, "loom")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_was_checked_is_a_certificate(arch, tmp_path):
    made = hl.export(arch, "tiny", to="py", out=tmp_path / "made")
    assert made.ok
    assert {each.check: each.worst for each in made.checks} == {"forward": 0, "decoding": 0}
    assert made.checks[0].note == "of 1, 5, 19, 33, 67 tokens"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_cannot_decode_says_why(arch, tmp_path):
    made = hl.export(arch, "both", to="py", out=tmp_path / "made")
    assert [each.ok for each in made.checks] == [True, None]
    assert made.checks[1].note == "its mask lets a query see later keys"


def test_two_exports_are_the_same_bytes(arch, tmp_path):
    for name in ("one", "two"):
        hl.export(arch, "tiny", to="py", out=tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    text = b"".join(path.read_bytes() for path in (tmp_path / "one").iterdir())
    assert str(tmp_path).encode() not in text
    assert {path.stat().st_mode & 0o044 for path in (tmp_path / "one").iterdir()} == {0o044}


def test_a_module_goes_with_its_weights_and_is_left_alone(arch, tmp_path):
    module = hl.compile(arch, "near", seed=3).train()
    hl.export(module, to="py", out=tmp_path / "made", dtype="float64")
    assert module.training
    assert module.q_proj.weight.dtype == torch.float32
    from safetensors.torch import load_file

    held = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(held["q_proj.weight"], module.q_proj.weight.double())


def test_only_modules_of_ours_and_by_their_name(arch, tmp_path):
    with pytest.raises(ValueError, match=r"this Linear is not of `hl\.compile`"):
        hl.export(torch.nn.Linear(2, 2), to="py", out=tmp_path / "made")
    with pytest.raises(ValueError, match="the module is `near`, not `tiny`"):
        hl.export(hl.compile(arch, "near"), "tiny", to="py", out=tmp_path / "made")
    with pytest.raises(ValueError, match="a module has its weights"):
        hl.export(hl.compile(arch, "near"), to="py", out=tmp_path / "made", weights="w.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_of_a_file_say_the_dtype(arch, tmp_path, suffix):
    from safetensors.torch import save_file

    state = hl.compile(arch, "near", seed=5, dtype="bfloat16").state_dict()
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    made = hl.export(arch, "near", to="py", out=tmp_path / "made", weights=path)
    assert made.ok
    held = to_py_weights(tmp_path / "made")
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], each) for name, each in state.items())
    assert f"weights.{suffix}" in (tmp_path / "made" / "README.md").read_text()


def to_py_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / to_py.WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("q_proj.weight"), "there is no `q_proj.weight`"),
        (lambda state: state.update(more=torch.ones(1)), "`more` is not known"),
        (
            lambda state: state.update({"q_proj.weight": torch.ones(2, 16)}),
            r"`q_proj.weight` is \[2, 16\], not \[16, 16\]",
        ),
    ],
)
def test_weights_that_do_not_fit(arch, tmp_path, change, message):
    state = dict(hl.compile(arch, "near").state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"the weights do not fit: {message}"):
        hl.export(arch, "near", to="py", out=tmp_path / "made", weights=tmp_path / "weights.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_holds_no_weights(arch, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(b"none of either")
    with pytest.raises(ValueError, match=rf"`weights\.{suffix}` (is no|holds no)"):
        hl.export(arch, "near", to="py", out=tmp_path / "made", weights=path)


def test_what_computes_something_else_is_not_put_in_place(arch, tmp_path, monkeypatch):
    write = to_py.write_text

    def other(path: Path, text: str) -> None:
        write(path, text.replace("out = self.o_proj(", "out = 2 * self.o_proj("))

    monkeypatch.setattr(to_py, "write_text", other)
    with pytest.raises(hl.NotVerifiedError, match="forward does not hold"):
        hl.export(arch, "near", to="py", out=tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_an_obstacle_comes_before_anything_is_written(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(to_py, "obstacles", lambda request: ("`o` has no text",))
    with pytest.raises(hl.NotExportedError, match="`near` cannot be exported to py: `o` has no"):
        hl.export(arch, "near", to="py", out=tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_stays_as_it_is(arch, tmp_path):
    (tmp_path / "empty").mkdir()
    assert hl.export(arch, "near", to="py", out=tmp_path / "empty").ok
    before = digests(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="there is something already at"):
        hl.export(arch, "fades", to="py", out=tmp_path / "empty")
    assert digests(tmp_path / "empty") == before


def test_a_full_disk_names_the_file_and_the_room(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"bytes are needed, 1,000 are free") as caught:
        hl.export(arch, "near", to="py", out=tmp_path / "made")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "model.py")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_meanwhile(tmp_path, monkeypatch):
    free = iter([10_000, 500, 500])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    with (
        pytest.raises(OSError, match="9,000 bytes are needed, 500 are free"),
        place.writing(tmp_path / "some", 9000),
    ):
        raise RuntimeError("a writer in another language")


def test_a_place_beside_where_one_stands(arch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hl.export(arch, "near", to="py", out="made").ok
    assert (tmp_path / "made" / "model.py").is_file()


def test_no_such_target(arch, tmp_path):
    with pytest.raises(ValueError, match=rf"`to` is one of {', '.join(TARGETS)}, not 'gguf'"):
        hl.export(arch, "near", to="gguf", out=tmp_path / "made")


def test_the_command(tmp_path):
    spec = tmp_path / "spec.loom"
    spec.write_text(TEXT)
    given = ["export", f"{spec}:near", "--to", "py", "--out", str(tmp_path / "made"), "--json"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    assert [each["check"] for each in json.loads(done.stdout)["findings"]] == [
        "forward",
        "decoding",
    ]
    again = CliRunner().invoke(main, given[:-1])
    assert again.exit_code == 1
    assert "there is something already at" in again.output


def test_the_command_offers_every_target():
    (to,) = (each for each in main.commands["export"].params if each.name == "to")
    assert list(to.type.choices) == list(TARGETS)

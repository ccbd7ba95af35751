"""Reading of configurations and folders: what is refused, and what a folder holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import headloom as hl
from headloom.cli import main
from headloom.known import codes, config, from_hf
from headloom.known.layers import written

from .cases import SIZES, configured, made

pytest.importorskip("transformers", reason="needs Hugging Face Transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

TOKENS = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"model_type": "llama", **SIZES}


def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)


def raised(what: Any) -> hl.LoomError:
    with pytest.raises(hl.LoomError) as caught:
        from_hf(what).weights  # noqa: B018 - it is made when asked for
    return caught.value


@pytest.mark.parametrize("code", codes.CODES.values(), ids=list(codes.CODES))
def test_the_example_raises_its_code(
    code: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    what: Any = json.loads(code.example)
    if code.form == "bare":
        without_transformers(monkeypatch)
    if code.form == "weights":  # a folder whose weights are another model's
        made("llama").save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(configured("llama/biased").to_json_string())
        what = tmp_path
    found = raised(what)
    assert {each.code for each in found.diagnostics} == {code.code}
    assert code.title
    assert code.explanation.endswith(".")


def test_errors_point_at_the_field() -> None:
    (found,) = raised({**SMALL, "hidden_act": "mish"}).diagnostics
    assert found.message == '`hidden_act` = "mish" is not supported'
    assert "silu" in found.help
    assert found.span.source.text[found.span.start : found.span.end] == '"hidden_act"'


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "scaling = linear(2)"),
        ({"rope_type": "dynamic", "factor": 2.0}, "scaling = dynamic(2, 64)"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "scaling = llama3(8, 1, 4, 16)",
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "scaling = yarn(4, 16)",
        ),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 8,
                "factor": 8.0,
            },
            "scaling = longrope([1, 1.5, 2, 2.5], [2, 3, 4, 5], 8, factor = 8)",
        ),
    ],
)
def test_rotations_that_are_scaled(rope: dict[str, Any], said: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **rope})
    ).eval()
    known = from_hf(theirs)
    assert said in known.text
    with torch.no_grad():
        got, wanted = known.compile(backend="torch")(TOKENS), theirs(TOKENS).logits
    assert torch.allclose(got, wanted, atol=1e-5)


def test_an_unknown_rotation_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "spiral": 2}
    (found,) = raised({**SMALL, "rope_parameters": rope}).diagnostics
    assert (found.code, found.message) == ("L602", "`rope_parameters.spiral` = 2 is not supported")


def test_without_transformers_what_is_said_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = configured("llama").to_dict()
    text = from_hf(whole).text
    without_transformers(monkeypatch)
    assert from_hf(whole).text == text
    del whole["rope_parameters"]
    (found,) = raised(whole).diagnostics
    assert found.code == "L604"
    assert "pip install 'headloom[hf]'" in found.help


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_a_folder_with_weights(case: str, tmp_path: Path) -> None:
    theirs = made(case)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    known = from_hf(tmp_path)
    with torch.no_grad():
        got = known.compile(backend="torch")(TOKENS)
        assert torch.allclose(got, theirs(TOKENS).logits, atol=1e-5)


def test_a_configuration_alone_has_names_and_no_weights() -> None:
    known = from_hf(configured("qwen2"))
    assert known.weights.unused == {"lm_head.weight": "the head is the embedding"}
    one = known.compile(backend="torch", seed=0)
    again = known.compile(backend="torch", seed=0)
    assert torch.equal(one.embed_tokens.weight, again.embed_tokens.weight)
    assert repr(known).startswith("<qwen2: ")
    assert str(known) == known.text


def test_the_command_writes_a_text_and_its_weights(tmp_path: Path) -> None:
    theirs = made("gpt2")
    theirs.save_pretrained(tmp_path / "theirs")
    text, weights = tmp_path / "gpt2.loom", tmp_path / "gpt2.safetensors"
    asked = ["import", str(tmp_path / "theirs"), "-o", str(text), "--weights", str(weights)]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    ours = hl.compile(text, "gpt2", backend="torch").eval()
    ours.load_state_dict(load_file(weights))
    with torch.no_grad():
        assert torch.allclose(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    done = CliRunner().invoke(main, ["import", str(tmp_path)])
    assert done.exit_code == 1
    assert "L601" in done.stderr


def test_misfits_are_said_all_at_once() -> None:
    biased = configured("llama/biased")
    plain = {**biased.to_dict(), "attention_bias": False, "mlp_bias": False}
    wrong = replace(from_hf(plain), arch=from_hf(biased).arch)
    with pytest.raises(hl.LoomError) as caught:
        wrong.weights  # noqa: B018
    assert len(caught.value.diagnostics) == 2 * 7  # a bias for each of seven maps, twice
    assert "has no tensor of theirs" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("a", "[a]"),
        ("aa", "[a] * 2"),
        ("aab", "[a] * 2 + [b]"),
        ("aabaab", "([a] * 2 + [b]) * 2"),
        ("abab", "[a, b] * 2"),
        ("abcc", "[a, b] + [c] * 2"),
    ],
)
def test_lists_of_layers(names: str, text: str) -> None:
    assert written(list(names)) == text

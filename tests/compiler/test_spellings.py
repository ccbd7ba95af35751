"""What settings are called elsewhere: each answer in the tables is one that can be written."""

from __future__ import annotations

import pytest

from headloom.compiler.checking import inheritance, models
from headloom.compiler.checking.check import check
from headloom.compiler.checking.spellings import BLOCK, MODEL
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse

VALUES = {"mask": "causal", "position": "rope", "dropout": "0", "scale": "0.5", "mix": "attend",
          "encoder": "none"}  # fmt: skip


def helps(text: str, read=parse) -> list[str]:
    with pytest.raises(LoomError) as caught:
        check(read(text))
    assert {each.code for each in caught.value.diagnostics} == {"L202"}
    return [each.help for each in caught.value.diagnostics]


def test_no_spelling_is_a_setting():
    assert not BLOCK.keys() & inheritance.SETTINGS.keys()
    assert not MODEL.keys() & models.SETTINGS.keys()


@pytest.mark.parametrize(("name", "value"), sorted(set(BLOCK.values())))
def test_what_is_said_of_blocks_can_be_written(name, value):
    written = value.format(VALUES.get(name, "2") if value == "{}" else "2")
    others = {"heads": "2", "width": "8", "mask": "causal"}
    body = "; ".join(f"{key} = {each}" for key, each in {**others, name: written}.items())
    assert check(parse(f"block a {{ {body} }}")).blocks


@pytest.mark.parametrize(("name", "value"), sorted(set(MODEL.values())))
def test_what_is_said_of_models_can_be_written(name, value):
    written = value.replace("NAME", "a").format(VALUES.get(name, "8") if value == "{}" else "8")
    others = {"vocab": "8", "width": "8", "layers": "[a]"}
    body = "; ".join(f"{key} = {each}" for key, each in {**others, name: written}.items())
    assert check(parse(f"block a {{ heads = 2 }}\nmodel m {{ {body} }}")).models


@pytest.mark.parametrize(
    ("setting", "help"),
    [
        ("rope = true", "write `position = rope`"),
        ("rope = false", "leave it out; with `position = rope` it would be there"),
        ("rope_theta = 1e6", "write `position = rope(theta = 1e6)`"),
        ("num_attention_heads = 8", "write `heads = 8`"),
        ("num_key_value_heads = 2", "write `kv_heads = 2`"),
        ("hidden_size = 64", "write `width = 64`"),
        ("dim_head = 64", "write `head_dim = 64`"),
        ("causal = true", "write `mask = causal`"),
        ("sliding_window = 4096", "write `mask = causal and window(4096)`"),
        ("attn_dropout = 0.1", "write `dropout = 0.1`"),
        ("logit_softcapping = 50.0", "write `score = softcap(50.0)`"),
        ("qk_norm = true", "write `q = x | linear | split | rms_norm`"),
        ("n_layer = 2", "in a model, write `layers = [NAME] * 2`"),
        ("vocab_size = 9", "in a model, write `vocab = 9`"),
        ("layers = 2", "`layers` is a setting of a model"),
        ("head = 2", "did you mean `heads` or `kv_heads`? `head` is a setting of a model"),
    ],
)
def test_blocks_are_told(setting, help):
    assert helps(f"block a {{ {setting} }}") == [help]
    assert helps(f"block a {{ branch b {{ {setting} }} }}") == [help]


@pytest.mark.parametrize(
    ("setting", "help"),
    [
        ("num_heads: 8", "write `heads: 8`"),
        ('"d_model": 64', "write `width: 64`"),
        ("rope: true", "write `position: rope`"),
        ("rope_theta: 1e6", "write `position: rope(theta = 1e6)`"),
    ],
)
def test_yaml_is_answered_in_yaml(setting, help):
    assert helps(f"blocks:\n  a:\n    {setting}\n", parse_yaml) == [help]


@pytest.mark.parametrize(
    ("setting", "help"),
    [
        ("num_hidden_layers = 2", "write `layers = [NAME] * 2`"),
        ("d_model = 64", "write `width = 64`"),
        ("intermediate_size = 128", "write `ffn = swiglu(128 / width)`"),
        ("hidden_act = gelu", "write `ffn = swiglu(8/3)`"),
        ("tie_word_embeddings = true", "write `tie = true`"),
        ("n_head = 2", "in a block, write `heads = 2`"),
        ("mask = causal", "`mask` is a setting of a block"),
    ],
)
def test_models_are_told(setting, help):
    model = f"model m {{ vocab = 8; width = 8; layers = [a]; {setting} }}"
    assert helps(f"block a {{ heads = 2 }}\n{model}") == [help]

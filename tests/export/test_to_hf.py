"""The folder of `hf` is opened and used as any model of Transformers is."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headloom as hl
from headloom.export import to_hf
from headloom.export.opened import greedy
from headloom.export.request import Options, of_module

transformers = pytest.importorskip("transformers")
from transformers import dynamic_module_utils  # noqa: E402  it is not a need of ours

ROOT = Path(__file__).parent.parent.parent
MODELS = sorted(path.stem for path in (ROOT / "examples" / "models").glob("*.loom"))
SAMPLE = ("bloom", "gemma2", "qwen3_next")  # constants; a window, tied; states beside keys

TEXT = """
block near { heads = 2; position = rope; mask = causal and window(4) }
block fades { heads = 2; mix = gated_delta; mask = causal }
block both { heads = 2 }
block tells { heads = 2; mask = causal; regularize = 0.1 * mean(entropy(o)) }
block reads { heads = 2; source = context; context_width = 16 }
layer adds(attn, ffn) { out = x + (tokens | embed(16)) + (x | norm | attn) + (x | norm | ffn) }
model tiny { vocab = 32; width = 16; layers = [near, fades]; ffn = swiglu(2); tie = true }
model small { vocab = 32; width = 16; layers = [near] }
model encodes { vocab = 32; width = 16; layers = [both] }
model telling { vocab = 32; width = 16; layers = [tells] * 2 }
model rereads { vocab = 32; width = 16; layers = [near]; layer = adds }
model front { vocab = 32; width = 16; layers = [near, fades]; memory = 3 }
model features { vocab = 32; width = 16; layers = [near]; head = none }
model raw { width = 16; layers = [near]; head = none }
model classes { vocab = 32; width = 16; layers = [both]; head = classify(3) }
model sees { patches = patches(4, image = [8, 8]); width = 16; layers = [both] * 2; head = none }
model sorts { patches = patches(4); width = 16; layers = [both]; head = classify(3) }
layer steered(attn, ffn) { out = x + (x | attn) * (condition | linear(16)) + (x | ffn) }
model told { vocab = 32; width = 16; layers = [near]; layer = steered; condition_width = 8 }
model crosses { vocab = 32; width = 16; layers = [near, reads] }
model twice { vocab = 32; width = 16; layers = [near]
  head = (x | linear(vocab)) * (x | silu | linear(vocab)) }
"""
NEW: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}

PEFT_ASKS = (
    "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6. Use "
    "`is_activation_checkpointing` instead.:FutureWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for exports, and for what Transformers keeps of their code."""
    place = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(place / "modules"))
        patch.syspath_prepend(place / "modules")  # or it stays there
        _forget_code()
        yield place
        _forget_code()


def _forget_code() -> None:
    """Forget the code of folders, which is imported from one place at a time."""
    for name in [each for each in sys.modules if each.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def arch() -> Any:
    return hl.load(TEXT, "loom")


def written(arch: Any, name: str, folder: Path) -> tuple[torch.nn.Module, Path]:
    """Return a module and the folder that it is written into, unchecked."""
    module = hl.compile(arch, name, seed=1, backend="torch").eval()
    out = folder / name
    if not out.exists():
        out.mkdir()
        to_hf.write(of_module(module, None, Options()), out)
    return module, out


def load(auto: str, path: Path, **kwargs: Any) -> Any:
    found = getattr(transformers, auto)
    return found.from_pretrained(path, trust_remote_code=True, **kwargs)


def speaking(arch: Any, name: str, folder: Path, **kwargs: Any) -> Any:
    return load("AutoModelForCausalLM", written(arch, name, folder)[1], **kwargs).eval()


@pytest.fixture(scope="module")
def tiny(arch: Any, folder: Path) -> Any:
    return speaking(arch, "tiny", folder)


@pytest.fixture(scope="module")
def module(arch: Any, folder: Path) -> torch.nn.Module:
    return written(arch, "tiny", folder)[0]


def batch(seed: int = 0, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [rows, 9] and a mask: the first row begins with padding."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, 9, dtype=torch.int64)
    mask[0, :4] = 0
    return torch.randint(32, (rows, 9), generator=draw), mask


# what is written


@pytest.mark.slow
def test_every_check_holds_where_headloom_is_not(arch, tmp_path):
    made = hl.export(arch, "tiny", to="hf", out=tmp_path / "made")
    assert [each.check for each in made.checks] == [
        "opens", "forward", "padding", "generate", "saved again",
    ]  # fmt: skip
    assert all(each.ok for each in made.checks)
    assert max(each.worst for each in made.checks) < 1e-6


def test_what_is_in_the_folder(arch, folder, tmp_path):
    module, out = written(arch, "tiny", folder)
    to_hf.write(of_module(module, None, Options()), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "README.md", "architecture_tiny.py", "caching_tiny.py", "config.json",
        "configuration_tiny.py", "generation_config.json", "model.safetensors",
        "modeling_tiny.py", "pretrained_tiny.py",
    }  # fmt: skip
    assert all((tmp_path / name).read_bytes() == (out / name).read_bytes() for name in names)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("headloom_tiny", True)
    held = load_file(out / "model.safetensors")
    assert held.keys() == {f"model.{name}" for name in module.state_dict()}
    texts = "".join((out / name).read_text() for name in names if name.endswith(".py"))
    assert "import headloom" not in texts
    assert "Loom" not in texts.replace("Headloom", "")


@pytest.mark.parametrize("name", ["tiny", "sees", "raw", "classes"])
def test_the_readme_says_how(arch, folder, name):
    module, out = written(arch, name, folder)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    space: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(out)), space)
    held = space["model"].model.state_dict()
    assert all(torch.equal(held[name], each) for name, each in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_published_models(name, tmp_path):
    path = ROOT / "examples" / "models" / f"{name}.loom"
    assert hl.export(path, to="hf", out=tmp_path / "made").ok


@pytest.mark.hours
@pytest.mark.parametrize("name", [each for each in MODELS if each not in SAMPLE])
def test_all_published_models(name, tmp_path):
    path = ROOT / "examples" / "models" / f"{name}.loom"
    assert hl.export(path, to="hf", out=tmp_path / "made").ok


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("near", "`near` is a block: Transformers opens models"),
        ("told", "it reads a `condition`, which Transformers does not give"),
        ("crosses", "it reads a `context`: only a model that reads its own tokens is exported"),
        ("twice", r"its head is more than functions of one `linear\(32\)`"),
    ],
)
def test_obstacles(arch, tmp_path, name, why):
    with pytest.raises(hl.NotExportedError, match=f"`{name}` cannot be exported to hf: {why}"):
        hl.export(arch, name, to="hf", out=tmp_path / "made", width=16)
    assert list(tmp_path.iterdir()) == []


# calls


def test_padding_on_any_side(module, tiny):
    x, mask = batch()
    for each in (mask, mask.flip(1)):
        live = each.bool()
        expected = module(x, attention_mask=each)[live]
        assert torch.allclose(tiny(x, attention_mask=each).logits[live], expected, atol=1e-6)


def test_positions_are_taken_as_they_are_given(module, tiny):
    x, mask = batch()
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(
        tiny(x, attention_mask=mask, position_ids=counted).logits,
        tiny(x, attention_mask=mask).logits,
    )
    far = 2 * torch.arange(9)
    got = tiny(x, position_ids=far[None], use_cache=False).logits
    assert torch.allclose(got, module(x, positions=far), atol=1e-6)


def test_positions_that_begin_anew_are_several_sequences(module, tiny):
    x, _ = batch()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    segments = torch.tensor([0] * 5 + [1] * 4)
    expected = module(x, segments=segments)
    assert torch.allclose(tiny(x, position_ids=positions).logits, expected, atol=1e-6)
    with pytest.raises(ValueError, match="a cache holds one sequence"):
        tiny(x, position_ids=positions, use_cache=True)


def test_embeddings_in_place_of_tokens(arch, folder, tiny):
    x, mask = batch()
    given = tiny.get_input_embeddings()(x)
    got = tiny(inputs_embeds=given, attention_mask=mask).logits
    assert torch.allclose(got, tiny(x, attention_mask=mask).logits, atol=1e-6)
    rereads = speaking(arch, "rereads", folder)
    with pytest.raises(ValueError, match="layers of this model read the tokens"):
        rereads(inputs_embeds=given)
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        tiny(x, inputs_embeds=given)


def test_some_logits_and_all_states(arch, folder, tiny):
    x, mask = batch()
    made = tiny(x, attention_mask=mask, output_hidden_states=True)
    for keep, at in ((2, slice(7, 9)), (torch.tensor([1, 5]), [1, 5])):
        some = tiny(x, attention_mask=mask, logits_to_keep=keep).logits
        assert torch.allclose(some, made.logits[:, at], atol=1e-6)
    base = load("AutoModel", written(arch, "tiny", folder)[1]).eval()
    assert "model.lm_head.weight" not in base.state_dict()
    features = base(x, attention_mask=mask).last_hidden_state
    assert torch.equal(features, made.hidden_states[-1])
    assert torch.allclose(tiny.get_output_embeddings()(features), made.logits, atol=1e-6)
    assert [each.shape for each in made.hidden_states] == [(2, 9, 16)] * 3
    assert torch.equal(tiny(x, return_dict=False)[0], tiny(x).logits)


def test_the_loss_is_of_the_next_token(module, tiny):
    x, _ = batch()
    labels = x.clone()
    labels[:, :3] = -100
    expected = torch.nn.functional.cross_entropy(
        module(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert torch.allclose(tiny(x, labels=labels).loss, expected, atol=1e-6)


def test_the_loss_in_training_has_what_blocks_add(arch, folder):
    x, _ = batch()
    telling = speaking(arch, "telling", folder)
    plain = telling(x, labels=x).loss
    both = telling.train()(x, labels=x).loss
    twin = hl.compile(arch, "telling", backend="torch")
    twin.load_state_dict(written(arch, "telling", folder)[0].state_dict())
    twin(x)
    assert torch.allclose(both - plain, twin.auxiliary_loss(), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"output_attentions": True}, "this model keeps no attention maps"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, r"`attention_mask` must be \[b, 9\]"),
        ({"past_key_values": transformers.DynamicCache()}, "not a DynamicCache"),
    ],
)
def test_what_cannot_be_given(tiny, given, why):
    with pytest.raises(ValueError, match=why):
        tiny(batch()[0], **given)


def test_states_that_cannot_be_shown(arch, folder):
    front = speaking(arch, "front", folder)
    with pytest.raises(ValueError, match="learned tokens stand before each sequence"):
        front(batch()[0], output_hidden_states=True)


# going on


@pytest.fixture(scope="module", params=["tiny", "front"])
def goes_on(request: pytest.FixtureRequest, arch: Any, folder: Path) -> Any:
    return speaking(arch, request.param, folder)


def test_the_most_likely_tokens(module, tiny):
    x, mask = batch()
    expected = greedy(module, x, mask)
    assert torch.equal(tiny.generate(x, attention_mask=mask, **NEW), expected)


@pytest.mark.parametrize(
    "how",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
)
def test_every_way_gives_the_same_tokens(goes_on, how):
    x, mask = batch()
    expected = goes_on.generate(x, attention_mask=mask, **NEW)
    assert torch.equal(goes_on.generate(x, attention_mask=mask, **NEW, **how), expected)


def test_beams(goes_on):
    x, mask = batch()
    given = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, **NEW}
    expected = goes_on.generate(x, use_cache=False, **given)
    assert torch.equal(goes_on.generate(x, **given), expected)


def test_sampling(tiny):
    x, mask = batch()
    given = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 2, **NEW}
    made = []
    for cached in (True, False):
        torch.manual_seed(0)
        made.append(tiny.generate(x, use_cache=cached, **given))
    assert made[0].shape == (4, 17)
    assert torch.equal(*made)


def test_helped_by_another_model(arch, folder, goes_on):
    x, _ = batch(rows=1)
    expected = goes_on.generate(x, **NEW)
    for helper in (speaking(arch, "small", folder), goes_on):
        assert torch.equal(goes_on.generate(x, assistant_model=helper, **NEW), expected)


def test_helped_by_its_own_prompt(goes_on):
    x = batch(rows=1)[0].repeat(1, 3)
    expected = goes_on.generate(x, **NEW)
    assert torch.equal(goes_on.generate(x, prompt_lookup_num_tokens=3, **NEW), expected)


def test_from_embeddings(tiny):
    x, _ = batch()
    given = tiny.get_input_embeddings()(x)
    got = tiny.generate(inputs_embeds=given, **NEW)
    assert torch.equal(got, tiny.generate(x, **NEW)[:, 9:])


def test_going_on_with_a_cache(tiny):
    x, _ = batch()
    first = tiny.generate(x, return_dict_in_generate=True, output_hidden_states=True, **NEW)
    longer = torch.cat([first.sequences, x[:, :2]], 1)
    got = tiny.generate(longer, past_key_values=first.past_key_values, **NEW)
    assert torch.equal(got, tiny.generate(longer, **NEW))


def test_how_much_a_cache_holds(arch, folder):
    telling = speaking(arch, "telling", folder)  # everything is kept
    cache = telling.make_cache(2, 12)
    assert (cache.get_max_length(), cache.get_seq_length(), len(cache)) == (12, 0, 2)
    assert telling.make_cache(2).get_max_length() == -1


def test_the_cache(tiny):
    x, mask = batch()
    cache = tiny.make_cache(2, 12)
    expected = tiny(x, attention_mask=mask).logits
    with torch.no_grad():
        tiny(x[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        cache.activate_past_recording()
        tiny(x[:, 5:8], attention_mask=mask[:, :8], past_key_values=cache)
        cache.crop(-2)
        cache.crop(0)
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        cache.batch_select_indices(torch.tensor([1, 2]))
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.get_seq_length() == 6
        assert cache.held.lengths.tolist() == [6, 2]
        got = tiny(x.flip(0)[:, 6:], attention_mask=mask.flip(0), past_key_values=cache).logits
    assert torch.allclose(got, expected.flip(0)[:, 6:], atol=1e-5)
    with pytest.raises(ValueError, match="the number of tokens to take back"):
        cache.crop(3)
    with pytest.raises(NotImplementedError, match="is written by its model"):
        cache.update(x, x, 0)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_other_caches_are_refused(tiny):
    x, _ = batch()
    with pytest.raises(ValueError, match="'dynamic' or 'static' for this model, not 'quantized'"):
        tiny.generate(x, cache_implementation="quantized", **NEW)


def test_what_cannot_decode_is_called_all_the_same(arch, folder):
    module, _ = written(arch, "encodes", folder)
    x, mask = batch()
    encodes = speaking(arch, "encodes", folder)
    live = mask.bool()
    got = encodes(x, attention_mask=mask).logits[live]
    assert torch.allclose(got, module(x, attention_mask=mask)[live], atol=1e-6)
    why = "this model cannot decode: its mask lets a query see later keys"
    for call in (lambda: encodes.generate(x, **NEW), lambda: encodes(x, use_cache=True)):
        with pytest.raises(ValueError, match=why):
            call()


def test_features_alone(arch, folder):
    module, out = written(arch, "features", folder)
    assert "AutoModelForCausalLM" not in json.loads((out / "config.json").read_text())["auto_map"]
    x, _ = batch()
    got = load("AutoModel", out).eval()(x).last_hidden_state
    assert torch.allclose(got, module(x), atol=1e-6)


# other models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sees", "sorts", "raw", "classes", "encodes"])
def test_every_kind_is_checked(arch, tmp_path, name):
    made = hl.export(arch, name, to="hf", out=tmp_path / "made")
    assert [each.ok for each in made.checks] == [True, True, True, None, True]


def test_images(arch, folder):
    module, out = written(arch, "sees", folder)
    images = torch.randn(2, 3, 8, 8)
    model = load("AutoModel", out).eval()
    made = model(pixel_values=images, output_hidden_states=True)
    assert torch.allclose(made.last_hidden_state, module(images), atol=1e-6)
    assert len(made.hidden_states) == 3
    with pytest.raises(ValueError, match="some of it is padding"):
        model(images, attention_mask=torch.tensor([1, 1, 1, 0]), output_hidden_states=True)
    with pytest.raises(ValueError, match="give `pixel_values`"):
        model()
    model.train().activation_checkpointing_enable()
    model(images).last_hidden_state.square().mean().backward()
    assert all(each.grad is not None for each in model.parameters())


def test_classes_of_images(arch, folder):
    module, out = written(arch, "sorts", folder)
    images, labels = torch.randn(2, 3, 8, 12), torch.tensor([0, 2])
    made = load("AutoModelForImageClassification", out).eval()(images, labels=labels)
    assert torch.allclose(made.logits, module(images), atol=1e-6)
    expected = torch.nn.functional.cross_entropy(module(images), labels)
    assert torch.allclose(made.loss, expected, atol=1e-6)


def test_classes_of_sequences(arch, folder):
    module, out = written(arch, "classes", folder)
    x, mask = batch()
    model = load("AutoModelForSequenceClassification", out).eval()
    got = model(x, attention_mask=mask).logits
    assert torch.allclose(got, module(x, attention_mask=mask), atol=1e-6)
    with pytest.raises(ValueError, match="this model tells 3 classes apart, not 5"):
        load("AutoModelForSequenceClassification", out, num_labels=5)


def test_features_of_features(arch, folder):
    module, out = written(arch, "raw", folder)
    x = torch.randn(2, 9, 16)
    model = load("AutoModel", out).eval()
    assert torch.allclose(model(x).last_hidden_state, module(x), atol=1e-6)
    with pytest.raises(NotImplementedError, match="this model takes `inputs_embeds`"):
        model.get_input_embeddings()
    again = folder / "raw_again"
    model.save_pretrained(again)
    assert torch.equal(load("AutoModel", again).eval()(x)[0], model(x)[0])


def test_a_model_of_theirs_goes_back(folder):
    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Gemma2ForCausalLM(config).eval()
    theirs.save_pretrained(folder / "theirs")
    module = hl.from_hf(folder / "theirs").compile().eval()
    out = folder / "back"
    out.mkdir()
    to_hf.write(of_module(module, None, Options()), out)
    ours = load("AutoModelForCausalLM", out).eval()
    x, mask = batch()
    live = mask.bool()
    expected = theirs(x, attention_mask=mask).logits[live]
    assert torch.allclose(ours(x, attention_mask=mask).logits[live], expected, atol=1e-5)
    expected = theirs.generate(x, attention_mask=mask, do_sample=False, **NEW)
    assert torch.equal(ours.generate(x, attention_mask=mask, **NEW), expected)


# weights


def test_saved_in_shards_and_opened_again(tiny, folder):
    x, _ = batch()
    tiny.save_pretrained(folder / "again", max_shard_size="2KB")
    assert len(list((folder / "again").glob("*.safetensors"))) > 2
    again = load("AutoModelForCausalLM", folder / "again").eval()
    assert torch.equal(again(x).logits, tiny(x).logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_vocabulary_of_another_size(arch, folder):
    x, _ = batch()
    for name in ("tiny", "small"):
        model = speaking(arch, name, folder)
        before = model(x).logits
        model.resize_token_embeddings(40, mean_resizing=False)
        assert torch.allclose(model(x).logits[..., :32], before, atol=1e-6)
        assert model(torch.tensor([[39]])).logits.shape == (1, 1, 40)
        model.save_pretrained(folder / f"larger_{name}")
        again = load("AutoModelForCausalLM", folder / f"larger_{name}").eval()
        assert torch.equal(again(x).logits, model(x).logits)


def test_what_no_file_has_is_drawn_as_the_architecture_draws_it(arch, folder):
    _, out = written(arch, "tiny", folder)
    shutil.copytree(out, folder / "part")
    held = load_file(out / "model.safetensors")
    held = {name: each for name, each in held.items() if "layers.1" not in name}
    save_file(held, folder / "part" / "model.safetensors", metadata={"format": "pt"})
    model, told = load("AutoModelForCausalLM", folder / "part", output_loading_info=True)
    assert all("layers.1" in name for name in told["missing_keys"])
    assert model.model.layers[1].attn_norm.weight.eq(1).all()
    drawn = model.model.layers[1].attn.q_proj.weight
    assert 0 < drawn.std() < 1
    assert drawn.abs().max() <= 0.25  # 1 / √16, as nn.Linear draws


def test_a_model_of_a_configuration_is_drawn_anew(arch, folder):
    config = load("AutoConfig", written(arch, "tiny", folder)[1])
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.model.layers[0].attn.q_proj.weight.abs().max() <= 0.25
    assert model.model.embed_tokens.weight.std() < 0.05


def test_a_low_precision_on_a_device(arch, folder):
    x, _ = batch()
    model = speaking(arch, "tiny", folder, dtype=torch.bfloat16, device_map="cpu")
    assert model(x).logits.dtype == torch.bfloat16
    assert model.generate(x, **NEW).shape == (2, 17)


# training


def test_labels_of_a_sequence(arch, folder):
    x, mask = batch()
    _, out = written(arch, "tiny", folder)
    model = load("AutoModelForSequenceClassification", out, num_labels=3)
    model(x, attention_mask=mask, labels=torch.tensor([0, 2])).loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    model.eval()
    alone = model(x[:1, 4:]).logits
    assert torch.allclose(model(x, attention_mask=mask).logits[:1], alone, atol=1e-6)
    ended = torch.cat([x[:1, 4:], torch.zeros(1, 3).long()], 1)
    model.config.pad_token_id = 0
    assert torch.allclose(model(ended).logits, model(x[:1, 4:]).logits, atol=1e-6)
    model.save_pretrained(folder / "labels")
    again = load("AutoModelForSequenceClassification", folder / "labels").eval()
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("name", ["tiny", "telling"])
def test_layers_computed_again(arch, folder, name):
    x, _ = batch()
    model = speaking(arch, name, folder).train()
    model(x, labels=x).loss.backward()
    expected = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    calls = []
    model.model.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model(x, labels=x, use_cache=True).loss.backward()
    assert len(calls) == 2
    for each, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(each.grad, grad, atol=1e-6)


@pytest.mark.slow
def test_the_trainer(arch, folder, tmp_path):
    pytest.importorskip("accelerate")
    model = speaking(arch, "tiny", folder)
    x = torch.arange(24).view(2, 12)
    data = [{"input_ids": row, "labels": row} for row in x]
    before = model(x, labels=x).loss
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=10, per_device_train_batch_size=2, learning_rate=3e-2,
        report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=5,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data
    )
    trainer.train()
    assert model.eval()(x, labels=x).loss < 0.8 * before


@pytest.mark.slow
@pytest.mark.filterwarnings(PEFT_ASKS)
def test_adapters(arch, folder, tmp_path):
    peft = pytest.importorskip("peft")
    x, mask = batch()
    low = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    adapted = peft.get_peft_model(speaking(arch, "tiny", folder), low)
    learning = torch.optim.SGD(adapted.parameters(), lr=1.0)
    for _ in range(2):
        adapted(input_ids=x, labels=x).loss.backward()
        learning.step()
    adapted.eval()
    assert adapted.generate(input_ids=x, attention_mask=mask, **NEW).shape == (2, 17)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(speaking(arch, "tiny", folder), tmp_path).eval()
    expected = adapted(input_ids=x).logits
    assert torch.equal(again(input_ids=x).logits, expected)
    assert torch.allclose(again.merge_and_unload()(x).logits, expected, atol=1e-5)
    assert not torch.allclose(speaking(arch, "tiny", folder)(x).logits, expected, atol=1e-3)

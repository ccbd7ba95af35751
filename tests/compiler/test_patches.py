"""Models of images: patches row by row, the grid of an image, errors with values."""

from __future__ import annotations

import pytest
import torch

import headloom as hl
from headloom.compiler.checking.check import check
from headloom.compiler.verify.cases import CASES, Subject
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.format import format_yaml
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse

TEXT = """
block around { heads = 2; mask = abs(row(i) - row(j)) <= 1 and abs(col(i) - col(j)) <= 1 }
block far { heads = 2; score = s - abs(row(i) - row(j)) - 2 * abs(col(i) - col(j)) }
model vit {
  width = 8; patches = patches((4, 2), channels = 2, image = (8, 6))
  layers = [around, far]; ffn = gelu(2); norm = layer; embed_position = learned(6)
  head = classify(5)
}
model any_size { width = 8; patches = patches(2); layers = [plain] ; head = none }
block plain { heads = 2; mask = causal }
block cross { heads = 2; source = context }
model captions { vocab = 16; width = 8; layers = [plain, cross]; encoder = any_size }
"""
ARCH = check(parse(TEXT))


def images(*shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def both(name: str):
    module = hl.compile(ARCH, name, dtype=torch.float64, seed=1).eval()
    oracle = hl.reference(ARCH, name, dtype=torch.float64).eval()
    oracle.load_state_dict(module.state_dict())
    return module, oracle


def test_patches_stand_row_by_row_and_are_one_linear_map():
    module, _ = both("any_size")
    assert module.patch_embed.weight.shape == (8, 12)
    seen = []
    module.patch_embed.register_forward_hook(lambda _m, _x, y: seen.append(y))
    x = images(2, 3, 4, 6)
    module(x)
    kernel = module.patch_embed.weight.view(8, 3, 2, 2)
    expected = torch.nn.functional.conv2d(x, kernel, module.patch_embed.bias, stride=2)
    torch.testing.assert_close(seen[0], expected.flatten(2).mT)


@pytest.mark.parametrize(("name", "shape"), [("vit", (3, 2, 8, 6)), ("any_size", (2, 3, 4, 10))])
def test_a_model_of_images_is_what_it_means(name, shape):
    module, oracle = both(name)
    found = []
    for each in (module, oracle):
        x = images(*shape).requires_grad_()
        y = each(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append((y, x.grad, {key: p.grad for key, p in each.named_parameters()}))
    (y, gx, grads), (y_, gx_, grads_) = found
    torch.testing.assert_close(y, y_)
    torch.testing.assert_close(gx, gx_)
    assert grads.keys() == grads_.keys()
    for key, each in grads.items():
        torch.testing.assert_close(each, grads_[key], msg=key)


def test_patches_that_are_cut_already_and_padded():
    module, oracle = both("any_size")
    x = images(2, 3, 4, 6)
    cut = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 6, 12)
    torch.testing.assert_close(module(cut), module(x))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    cut[0, 4:] = float("nan")
    torch.testing.assert_close(module(cut, attention_mask=mask), oracle(cut, attention_mask=mask))
    assert module(cut, attention_mask=mask).isfinite().all()


def test_an_encoder_of_images():
    module, oracle = both("captions")
    tokens, x = torch.arange(5).expand(2, 5), images(2, 3, 4, 6)
    torch.testing.assert_close(module(tokens, context=x), oracle(tokens, context=x))


def test_the_grid_of_the_image_is_the_blocks():
    around, _ = ARCH.models["vit"].layers
    assert ARCH.models["vit"].patches.grid == (2, 3)
    own = TEXT.replace("block around { heads = 2;", "block around { heads = 2; grid = (2, 3);")
    assert check(parse(own)).models["vit"].layers[0] == around
    other = TEXT.replace("block around { heads = 2;", "block around { heads = 2; grid = (3, 2);")
    assert check(parse(other)).models["vit"].layers[0] != around


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("any_size", (1, 3, 5, 6), "height of `images` must be a multiple of 2, .* 5, remainder 1"),
        ("any_size", (1, 3, 4, 7), "width of `images` must be a multiple of 2"),
        ("any_size", (1, 1, 4, 6), r"must be \[b, 3, height, width\], it is \[1, 1, 4, 6\]"),
        ("vit", (1, 2, 8, 8), "must be 8 × 6, it is 8 × 8"),
        ("vit", (1, 4, 12), r"must be \[b, tokens, 16\]"),
    ],
)
def test_images_that_do_not_fit(name, shape, message):
    module, oracle = both(name)
    with pytest.raises(ValueError, match=message):
        module(images(*shape))
    with pytest.raises(ValueError):  # noqa: PT011  the meaning says less
        oracle(images(*shape))


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("patches = 4", "L238"),
        ("patches = patches(4, image = (8, 10))", "L238"),
        ("patches = patches(4, image = (8, 8)); embed_position = learned(3)", "L238"),
        ("patches = patches(4); vocab = 8", "L238"),
        ("patches = patches([1, 2, 3])", "L238"),
        ("patches = patches(4, chanels = 1)", "L209"),
        ("patches = patches(0)", "L203"),
    ],
)
def test_patches_that_cannot_be(setting, code):
    text = f"block a {{ heads = 2 }}\nmodel m {{ width = 8; layers = [a]; {setting} }}"
    with pytest.raises(LoomError) as caught:
        check(parse(text))
    assert [each.code for each in caught.value.diagnostics] == [code]


def test_yaml_means_the_same():
    assert check(parse_yaml(format_yaml(parse(TEXT)))).models == ARCH.models


def test_what_is_shown():
    from io import StringIO

    from rich.console import Console

    from headloom.compiler.reports.figure import figure
    from headloom.compiler.reports.show import show

    text = StringIO()
    show(ARCH.models["vit"], 6, Console(file=text, width=120))
    assert "patches of 2 × 4 × 2 in 2 rows of 3" in text.getvalue()
    assert figure(ARCH.models["vit"]).splitlines()[1].strip().startswith('images(["images"])')
    assert hl.explain(ARCH, "vit").params == sum(
        each.numel() for each in hl.compile(ARCH, "vit").parameters()
    )


def test_a_classifier_is_given_no_segments_to_prove_it():
    text = "block a { heads = 2; mask = document }\nmodel m { width = 8; layers = [a]; HEAD }"
    for head, given in (("head = classify(3)", False), ("head = none", True)):
        subject = Subject.of(check(parse(text.replace("HEAD", head))).models["m"])
        assert ("segments" in subject.inputs(CASES[2])[1]) == given


@pytest.mark.sweep
def test_a_model_of_images_verifies():
    assert hl.verify(ARCH, "vit").ok

"""Constants without a value are refused where they stand; log(0) weighs nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.meaning.reference import reference

BLOCK = "block a { width = 8; heads = 1; BODY }"
REFUSED = {
    "score = s * log(layer)": ("s * log(layer)", "`s * log(0)`"),
    "score = s + exp(1000)": ("exp(1000)", "too large"),
    "score = s + sqrt(-1)": ("sqrt(-1)", "`sqrt` has no value there"),
    "score = log(-1) + s": ("log(-1)", "`log` has no value there"),
    "score = s + (-8) ** 0.5": ("(-8) ** 0.5", "no such root"),
    "score = s + 2 ** 5000": ("2 ** 5000", "too large"),
    "score = s + 0 ** -1": ("0 ** -1", "division by zero"),
    "score = s / (heads - 1)": ("s / (heads - 1)", "`s / 0`: division by zero"),
    "score = where(i > 2, s, log(0)) | temperature": ("temperature", "* t[i, h]`"),
    "score = s * where(i > 2, 1, log(0))": ("s * where(i > 2, 1, log(0))", "log(0))`"),
    "position = relative(1, 128)": ("relative(1, 128)", "/ 0`: division by zero"),
    "mask = causal and strided(0)": ("strided(0)", "`(i - j) % 0`: division by zero"),
    "mask = blocks(0)": ("blocks(0)", "`i // 0`"),
    "mask = (i - j) % (heads - 1) == 0": ("(i - j) % (heads - 1)", "`(i - j) % 0`"),
    "mask = causal and (i - j) % h == 0": ("(i - j) % h", "`(i - j) % 0` in head 0"),
    "weights = p ** (1 / 0)": ("(1 / 0)", "division by zero"),
    "weights = p + log(0)": ("p + log(0)", "`p + log(0)`"),
    "normalize = entmax(1 / 0)": ("1 / 0", "division by zero"),
    "normalize = exp(s) / (sqrt(-1) + sum)": ("sqrt(-1)", "`sqrt` has no value there"),
    "score = where(i > 2, s, log(0)); normalize = sparsemax": (
        "sparsemax", "the score may be minus infinity",
    ),
    "similarity = dot(q, k) / (heads - 1)": ("dot(q, k) / (heads - 1)", "/ 0`"),
    "scale = log(0)": ("log(0)", "minus infinity"),
    "const c[3] = 1 / (h - 1); score = s + c[0]": ("1 / (h - 1)", "division by zero"),
    "param c[heads] = log(h); score = s + c[h]": ("log(h)", "minus infinity"),
    "q = x | linear | clip(0, 1 / 0) | split": ("1 / 0", "division by zero"),
    "q = (x * (1 / (heads - 1))) | linear | split": ("(1 / (heads - 1))", "division by zero"),
    "q = (x + log(0)) | linear | split": ("(x + log(0))", "log(0)`"),
    "out = rows(o, p / (heads - 1)) | merge | linear": ("p / (heads - 1)", "`p / 0`"),
}  # fmt: skip


@pytest.mark.parametrize("body", REFUSED)
def test_it_is_refused_where_it_stands(body: str) -> None:
    where, label = REFUSED[body]
    text = BLOCK.replace("BODY", body)
    with pytest.raises(hl.LoomError) as problem:
        hl.load(text, format="loom")
    first = problem.value.diagnostics[0]
    assert first.code == "L219"
    assert text[first.span.start : first.span.end] == where
    assert label in first.label
    assert "domain" not in first.label  # Python's words differ from version to version


def test_statements_of_a_mixer_are_refused_too() -> None:
    text = "mix m { state S = 0; S <- S / (heads - 1); o <- v * S }\n"
    with pytest.raises(hl.LoomError, match=r"`S / 0`: division by zero"):
        hl.load(f"{text}block a {{ heads = 1; mix = m; mask = causal }}", format="loom")


def test_what_is_not_chosen_may_be_undefined() -> None:
    text = BLOCK.replace(
        "BODY", "score = where(heads > 1, s / (heads - 1), s); normalize = entmax(1)"
    )
    mix = hl.load(text, format="loom").blocks["a"].mixings["o"].mix
    plain = hl.load(BLOCK.replace("BODY", ""), format="loom").blocks["a"].mixings["o"].mix
    assert mix.score == plain.score
    assert (mix.normalize.numerator, mix.normalize.denominator) == (
        plain.normalize.numerator,
        plain.normalize.denominator,
    )


def drawn() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 8, dtype=torch.float64, generator=generator)


def results(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    x = x.clone().requires_grad_()
    y = module(x)
    named = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(y.sin().sum(), list(named.values()))
    return {"y": y, **dict(zip(named, found, strict=True))}


WEIGHTLESS = {
    "rows that see nothing": "score = where(i > 2, s, log(0))",
    "under a mask": "mask = causal; score = where(i > 2, s, log(0))",
    "a sink": "mask = causal; score = where(j < i, s, log(0)); normalize = sink",
    "a held sum": "mask = j < i; score = where(j % 2 == 0, s, log(0)); "
    "normalize = exp(s) / max(sum, 1)",
    "sigmoid": "mask = causal; score = where((i - j) % 2 == 0, s, log(0)); normalize = sigmoid",
    "a ratio": "mask = causal; score = where(i > 2, s, log(0)); normalize = squared_relu",
    "everything": "score = s + log(0)",
    "capped afterwards": "mask = causal; score = where(i > 2, s, log(0)) | softcap(3)",
    "statistics": "mask = causal; score = 2 * where(i > 2, s, log(0)); "
    "out = (o * entropy(o) + exp(lse(o)) + rows(o, p * j)) | merge | linear",
    "weights": "mask = causal; score = where(i > 2, s, log(0)); weights = p + 1 / seen",
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_minus_infinity_weighs_nothing(name: str) -> None:
    arch = hl.load(BLOCK.replace("BODY", WEIGHTLESS[name]), format="loom")
    module = hl.compile(arch, dtype=torch.float64, seed=0, backend="torch")
    meaning = reference(arch.blocks["a"], dtype=torch.float64)
    meaning.load_state_dict(module.state_dict())
    got, expected = results(module, drawn()), results(meaning, drawn())
    assert got.keys() == expected.keys()
    for key in got:
        assert got[key].isfinite().all()
        torch.testing.assert_close(got[key], expected[key], rtol=1e-9, atol=1e-9)


def test_a_score_of_minus_infinity_is_a_mask() -> None:
    x = drawn()
    outputs = []
    for body in ("mask = i > 2 and j <= i", "mask = j <= i; score = where(i > 2, s, log(0))"):
        module = hl.compile(
            hl.load(BLOCK.replace("BODY", body), format="loom"),
            seed=0,
            dtype=torch.float64,
            backend="torch",
        )
        outputs.append(module(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert (outputs[1][:, :3] == 0).all()

"""The models of `onnx`: numbers in onnxruntime, decoding, ONNX's own operators, the same bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch

import headloom as hl
from headloom.export import onnx_graph, to_onnx
from headloom.export.onnx_operators import OPSET
from headloom.export.program import NoProgramError, trace
from headloom.export.request import Options, Request, of_module

from .test_export import digests

TEXT = """
block full { width = 16; heads = 2; position = rope; mask = causal }
block shared { width = 16; heads = 4; kv_heads = 2; mask = causal and window(5) }
block capped { width = 16; heads = 2; score = softcap(2); mask = causal }
block grouped { width = 16; heads = 4; kv_heads = 2; score = softcap(2); mask = causal }
block biased { width = 16; heads = 2; position = alibi; mask = causal }
block partly { width = 16; heads = 2; position = rope(dims = 4, style = interleaved) }
block far { width = 16; context_width = 8; heads = 2; source = context }
block deltas { width = 16; heads = 2; mix = gated_delta; mask = causal }
mix turns { state S[head_dim, value_dim] = 0; S <- tanh(S) + outer(k, v); o <- q @ S }
block steps { width = 16; heads = 2; mix = turns; mask = causal }
model tiny { vocab = 32; width = 16; layers = [capped, shared]; ffn = swiglu(2) }
"""


def stirred(made: torch.nn.Module) -> torch.nn.Module:
    """Move weights away from zeros and ones, where mistakes would not show."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in made.parameters():
            each.add_(torch.randn(each.shape, generator=draw), alpha=0.05)
    return made.eval()


@cache
def module(name: str) -> torch.nn.Module:
    return stirred(hl.compile(hl.load(TEXT, "loom"), name, seed=0, dtype="float32"))


def whole(request: Request) -> Request:
    """Leave its steps out, which take twice as long to translate as the whole sequence."""
    return _Whole(**{name: getattr(request, name) for name in request.__dataclass_fields__})


class _Whole(Request):
    @property
    def decodes(self) -> bool:
        return False


def checked(request: Request, folder: Path) -> list[tuple[str, bool | None]]:
    assert not to_onnx.obstacles(request)
    to_onnx.write(request, folder)
    found = list(to_onnx.check(request, folder))
    assert all(each.ok is not False for each in found), [each.note for each in found]
    return [(each.check, each.ok) for each in found]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# what ONNX has an operator for
OWN = {
    "full": {"Attention", "RotaryEmbedding"},
    "shared": {"Attention"},
    "capped": {"Attention"},
    "grouped": {"Attention"},
    "biased": {"Attention"},
    "partly": {"Attention", "RotaryEmbedding"},
    "far": {"Attention"},
    "deltas": {"Scan"},
    "steps": {"Scan"},
}


HEAD = {"capped": 8, "grouped": 4}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each == "deltas")) for each in OWN]
)
def test_whole_sequences(tmp_path, name):
    request = whole(of_module(module(name), None, Options()))
    assert checked(request, tmp_path)[0] == ("forward", True)
    found = operators(tmp_path / "model.onnx")
    assert set(found) >= OWN[name]
    if "Attention" in OWN[name]:
        assert "Softmax" not in found
    if name in ("capped", "grouped"):
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        (node,) = [each for each in nodes if each.op_type == "Attention"]
        given = {each.name: each.f for each in node.attribute if each.name in ("softcap", "scale")}
        assert given == pytest.approx({"softcap": 2.0, "scale": HEAD[name] ** -0.5})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["far", *(pytest.param(each, marks=pytest.mark.hours) for each in ("tiny", "deltas"))]
)
def test_token_by_token(tmp_path, name):
    made = hl.export(module(name), to="onnx", out=tmp_path / "made")
    assert [(each.check, each.ok) for each in made.checks] == [
        ("forward", True),
        ("decoding", True),
    ]
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == ["README.md", "decode.onnx", "first.onnx", "model.onnx"]


@pytest.mark.slow
def test_the_readme_says_how(tmp_path):
    hl.export(module("full"), to="onnx", out=tmp_path / "made")
    text = (tmp_path / "made" / "README.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.S)
    code = (
        "import sys; sys.modules['headloom'] = sys.modules['torch'] = None\n"
        "import numpy; x = numpy.ones((2, 5, 16), numpy.float32)\n"
        f"{first}assert y.shape == (2, 5, 16)\n"
        f"{second.replace('y, *cache = decode', 'x = x[:, :1]; y, *cache = decode')}"
        "assert y.shape == (2, 1, 16)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "made")


def test_two_exports_are_the_same_bytes_and_name_no_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        to_onnx._models.cache_clear()
        to_onnx.write(whole(of_module(module("biased"), None, Options())), tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    text = (tmp_path / "one" / "model.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in text
    assert b"headloom_module" not in text


def test_sizes_have_names_and_no_trace_of_the_exporter(tmp_path):
    to_onnx.write(whole(of_module(module("far"), None, Options())), tmp_path)
    made = onnx.load(tmp_path / "model.onnx")
    sizes = {
        each.name: [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in made.graph.input
    }
    assert sizes == {"x": ["batch", "length", 16], "context": ["batch", "size_2", 8]}
    assert (made.producer_name, made.producer_version) == ("headloom", "")
    assert [(each.domain, each.version) for each in made.opset_import] == [("", OPSET)]
    assert not any(node.metadata_props or node.doc_string for node in made.graph.node)
    assert not made.functions


def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "MOST", 1000)
    assert checked(whole(of_module(module("shared"), None, Options())), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "model.onnx",
        "model.onnx.data",
    ]


def test_another_precision_is_an_obstacle(tmp_path):
    own = hl.compile(hl.load(TEXT, "loom"), "full", dtype="float64")
    with pytest.raises(hl.NotExportedError, match="in float32, the module is in float64"):
        hl.export(own, to="onnx", out=tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


class Part(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(x)


class Parts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Part()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def test_an_operator_that_onnx_does_not_have_is_named_and_its_part():
    made = trace(Parts(), {"x": torch.zeros(3, 37)}, {"x": ("b", "n")}, {"b": None, "n": None})
    why = re.escape("ONNX has no operator for `prims.bessel_i0e` in `layers.0`")
    with pytest.raises(NoProgramError, match=why):
        onnx_graph.converted(made)


def test_a_missing_package_is_an_obstacle(monkeypatch, tmp_path):
    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None)
    with pytest.raises(hl.NotExportedError, match=re.escape("pip install 'headloom[onnx]'")):
        hl.export(module("full"), to="onnx", out=tmp_path / "made")


# ── operators that are written here ──────────────────────────────────────────────────────


def computed(fn, *given: torch.Tensor) -> list[numpy.ndarray]:
    """Run a function of tensors [b, …] in onnxruntime."""
    names = [f"x{at}" for at in range(len(given))]

    class Called(torch.nn.Module):
        def forward(self, x0, x1=None):
            return fn(x0) if x1 is None else fn(x0, x1)

    feeds = dict(zip(names, given, strict=True))
    axes = {name: ("b", *[None] * (x.ndim - 1)) for name, x in feeds.items()}
    model = onnx_graph.converted(trace(Called(), feeds, axes, {"b": None}))
    session = onnxruntime.InferenceSession(onnx_graph.serialized(model))
    return session.run(None, {name: x.numpy() for name, x in feeds.items()})


@pytest.mark.parametrize("name", ["cummax", "cummin"])
@pytest.mark.parametrize("dim", [1, -1])
def test_extremes_so_far(name, dim):
    x = torch.randint(5, (3, 7, 4), generator=torch.Generator().manual_seed(0)).float()
    for got, expected in zip(
        computed(lambda x: tuple(getattr(x, name)(dim)), x), getattr(x, name)(dim), strict=True
    ):
        numpy.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("dim", [1, -1])
def test_what_is_equal_keeps_its_order(descending, dim):
    x = torch.randint(4, (3, 9, 8), generator=torch.Generator().manual_seed(0))
    options = {"dim": dim, "descending": descending, "stable": True}
    for got, expected in zip(
        computed(lambda x: tuple(x.sort(**options)), x), x.sort(**options), strict=True
    ):
        numpy.testing.assert_array_equal(got, expected)


@pytest.mark.sweep
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_places_in_a_sorted_row(right, rows):
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(9, (3, 6) if rows else (6,), generator=draw).sort(-1).values
    x = torch.randint(9, (3, 5), generator=draw)
    place = torch.searchsorted
    if rows:
        (got,) = computed(lambda x, row: place(row, x, right=right), x, row)
    else:
        (got,) = computed(lambda x: place(row, x, right=right), x)
    numpy.testing.assert_array_equal(got, place(row, x, right=right))


def test_bits_that_are_read_as_floats():
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 3.4028235e38, 1e-45, -1e-40, 1.17549435e-38, 0.1])
    draw = torch.randn(60, generator=torch.Generator().manual_seed(0)).exp() ** 9
    bits = torch.cat([x, draw, torch.tensor([torch.inf, -torch.inf])]).view(torch.int32)
    (got,) = computed(lambda x: x.view(torch.float32), bits)
    numpy.testing.assert_array_equal(got, bits.view(torch.float32))


def test_a_power_of_whole_numbers():
    x, exponent = torch.arange(6).reshape(3, 2), torch.full((3, 2), 1.5)
    (got,) = computed(lambda x, e: x**e, x, exponent)
    numpy.testing.assert_allclose(got, x**exponent, rtol=1e-6)


def test_bounds_of_two_kinds():
    x = torch.randn(3, 4)
    (got,) = computed(lambda x: x.clamp(0.5, 2), x)
    numpy.testing.assert_array_equal(got, x.clamp(0.5, 2))


def test_whole_numbers_are_round():
    x = torch.arange(6).reshape(3, 2)
    (got,) = computed(lambda x: x.floor(), x)
    numpy.testing.assert_array_equal(got, x)


@pytest.mark.sweep
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_triangular_systems(upper, left, unit):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(3, 2, 6, 6, generator=draw) * 0.3 + 2 * torch.eye(6)
    a = a.triu() if upper else a.tril()
    b = torch.randn(3, 2, *((6, 4) if left else (4, 6)), generator=draw)
    options = {"upper": upper, "left": left, "unitriangular": unit}
    solve = torch.linalg.solve_triangular
    (got,) = computed(lambda a, b: solve(a, b, **options), a, b)
    numpy.testing.assert_allclose(got, solve(a, b, **options), atol=1e-5)


def test_a_small_number_that_is_added_stays():
    """The exporter's own simplifications take 1e-15 for 0, and divide by it."""
    x = torch.zeros(3, 5)
    (got,) = computed(lambda x: x / (x + 1e-15), x)
    numpy.testing.assert_array_equal(got, x)

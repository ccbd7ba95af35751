"""The zoo, the examples and the models in `py`, `pt2` and `onnx`: equal, or refused and why.

A few of each run always; all of them take hours, by `-m hours`. Models for Transformers are in
`test_to_hf.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import headloom as hl
from headloom.compiler import zoo
from headloom.export.targets import TARGETS

ROOT = Path(__file__).parent.parent.parent
MODELS = sorted((ROOT / "examples" / "models").glob("*.loom"))
EXAMPLES = sorted(set((ROOT / "examples").glob("*.loom")) - {ROOT / "examples/search_mqar.loom"})
SAMPLE: dict[tuple[str, str], Any] = {
    ("py", "sparsemax"): (),
    ("py", "retnet"): (),
    ("pt2", "alibi"): pytest.mark.slow,
}
REFUSED = {  # target and name → what the refusal says
    (to, name): f"`keep` of `{name}` takes tokens in turn"
    for to in ("pt2", "onnx")
    for name in ("caote", "h2o", "tova")
} | {
    ("onnx", "mesa_net"): "PyTorch's exporter to ONNX says",
    ("onnx", "sigma_reparam"): "ONNX has no operator for `aten._linalg_svd` in `q_proj`",
}


def found() -> list[Any]:
    """Every target with every description, as parameters."""
    named = [(each, None) for each in zoo.names()]
    named += [(each.stem, each) for each in (*EXAMPLES, *MODELS)]
    return [
        pytest.param(
            to, name, path, id=f"{to}-{name}",
            marks=SAMPLE.get((to, name), pytest.mark.hours),
        )
        for to in TARGETS if to != "hf"
        for name, path in named
    ]  # fmt: skip


def parts(name: str, path: Path | None) -> list[tuple[Any, str]]:
    """What a description defines: of the zoo what is called as it, of others all."""
    if path is None:
        return [(zoo.entry(name).arch, name)]
    arch = hl.load(path)
    return [(arch, each) for each in (arch.models or arch.blocks)]


@pytest.mark.parametrize(("to", "name", "path"), found())
def test_equal_or_refused(to, name, path, tmp_path):
    for arch, each in parts(name, path):
        module = stirred(hl.compile(arch, each, seed=0, backend="torch", dtype="float32")).eval()
        if (to, name) in REFUSED:
            with pytest.raises(hl.NotExportedError, match=REFUSED[to, name]):
                hl.export(module, to=to, out=tmp_path / each)
            continue
        made = hl.export(module, to=to, out=tmp_path / each)
        assert all(check.worst <= 1e-5 for check in made.checks)


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """Move weights away from zeros and ones, where mistakes would not show."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in module.parameters():
            each.add_(torch.randn(each.shape, generator=draw), alpha=0.05)
    return module

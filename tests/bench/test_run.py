"""One case with its peers: who is timed, who says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from headloom.bench import checking, fresh, run
from headloom.bench.case import Case, flops
from headloom.bench.cells import Cell
from headloom.bench.peers import PEERS, Peer, too_large
from headloom.bench.run import measure

TEXT = "block a {{ width = 16; heads = 2; {} }}"
CAUSAL = Case(TEXT.format("mask = causal"), tokens=24)
NEAR = Case(TEXT.format("mask = causal and window(5)"), tokens=24)


@pytest.fixture(autouse=True)
def _ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ceiling", lambda *_: 1e9)
    monkeypatch.setattr(run, "calls_for", lambda _: 1)


def measured(case: Case, *peers: str, **more: str) -> dict[str, Cell]:
    found = measure(case, peers, repeats=2, weigh=False, **more)  # type: ignore[arg-type]
    return {each.peer: each for each in found.cells}


def peer(monkeypatch: pytest.MonkeyPatch, make: Callable[[Case], nn.Module], **more: bool) -> None:
    monkeypatch.setitem(PEERS, "odd", Peer("", make, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_everyone_agrees_with_the_meaning(kind: str) -> None:
    found = measured(replace(CAUSAL, run=kind), "plain", "reference")
    assert list(found) == ["headloom", "plain", "reference"]
    for each in found.values():
        assert each.error is not None, each
        assert each.error < 1e-5, each
        assert (len(each.times), each.obstacle) == (2, "")


def test_decoding() -> None:
    found = measured(replace(CAUSAL, run="decode"), "plain", "reference")
    assert found["plain"].seconds
    assert found["headloom"].seconds
    assert found["reference"].reason == "it keeps no cache"


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(NEAR, text=CAUSAL.text)
    peer(monkeypatch, lambda _: PEERS["plain"].make(other))
    found = measured(NEAR, "odd")
    assert found["odd"].wrong
    assert found["odd"].times == ()
    assert found["headloom"].seconds


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.children()
            self.inner = [inner]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner[0](x)
            return y + 1e-1 * (x - x.detach())

    peer(monkeypatch, lambda case: Held(PEERS["plain"].make(case)))
    assert not measured(CAUSAL, "odd")["odd"].wrong
    assert measured(replace(CAUSAL, run="backward"), "odd")["odd"].wrong


def test_who_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Case) -> nn.Module:
        raise RuntimeError("no backward on CPUs\nmore")

    peer(monkeypatch, fails)
    found = measured(NEAR, "plain", "odd", "cudnn")
    assert (
        found["plain"].reason == "it is causal or sees everything, not `j <= i and abs(i - j) < 5`"
    )
    assert found["odd"].reason == "RuntimeError: no backward on CPUs"
    assert found["cudnn"].reason == "it runs on NVIDIA GPUs"


def test_who_fails_later_says_why_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tires(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.children()
            self.inner, self.left = [inner], 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("out of memory")
            y: torch.Tensor = self.inner[0](x)
            return y

    peer(monkeypatch, lambda case: Tires(PEERS["plain"].make(case)))
    found = measured(CAUSAL, "odd")
    assert found["odd"].reason == "RuntimeError: out of memory"
    assert found["headloom"].seconds


def test_another_block_in_its_place() -> None:
    found = measured(NEAR, "plain", instead=CAUSAL.text)["plain"]
    assert found.computes == CAUSAL.text
    assert found.seconds
    assert found.error is not None
    assert found.error < 1e-5


def test_two_that_differ_at_full_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.children()
            self.inner = [inner]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner[0](x)
            return y * (2 if x.shape[1] > 16 else 1)

    for module in (checking, run):
        monkeypatch.setattr(module, "SHORT", 16)
    peer(monkeypatch, lambda case: Late(PEERS["plain"].make(case)))
    found = measured(CAUSAL, "odd")
    assert found["odd"].wrong
    assert found["headloom"].wrong
    assert found["headloom"].obstacle.endswith("against odd at full length: one of both is off")
    peer(monkeypatch, PEERS["plain"].make)
    found = measured(CAUSAL, "odd")
    assert found["odd"].compared == "against the meaning at 16 tokens"
    peer(monkeypatch, PEERS["plain"].make, by_length=True)
    assert measured(CAUSAL, "odd")["odd"].compared == "against headloom at full length"


def test_dense_maps_that_do_not_fit() -> None:
    long = replace(CAUSAL, tokens=16384)
    assert too_large(PEERS["eager"], long, 8, 8 << 30) == (
        "its dense maps would take 26 GB of 9 GB"
    )
    assert too_large(PEERS["plain"], long, 8, 8 << 30) == ""


def test_operations_of_documents_are_counted_exactly() -> None:
    apart = Case(TEXT.format("mask = causal and document"), tokens=64, documents=4)
    assert flops(apart) == 4 * flops(replace(CAUSAL, tokens=16))
    assert flops(replace(apart, run="backward", batch=2)) == 6 * flops(apart)
    marked = Case(
        TEXT.format("mask = causal and document or doc[i] != 0 and doc[j] == 0"),
        tokens=64,
        documents=4,
    )
    pairs = (flops(marked) - flops(apart)) / (16 * 48)
    assert pairs == 2 * (2 * (8 + 8) + 1)  # two heads: two products of eight, an exponential


@pytest.mark.slow
def test_what_a_fresh_process_says() -> None:
    case = Case("block a { width = 64; heads = 2; mask = causal; score = softcap(9) }", tokens=512)
    held = fresh.peak(case, "headloom", 1, lambda: None)
    assert held is None or held > 512 * 512  # at least a part of its map

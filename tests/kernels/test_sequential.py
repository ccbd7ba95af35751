"""Sequential kernels against their meaning: the statements, token by token, and autograd."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor as T

from headloom.compiler import zoo
from headloom.compiler.checking.check import block, check
from headloom.compiler.graph import operations
from headloom.compiler.meaning.scan import value
from headloom.compiler.model import Block
from headloom.compiler.pipeline import lower
from headloom.compiler.plan.plan import Target
from headloom.compiler.plan.recurrences import of_node
from headloom.compiler.plan.sequential_form import scan_of
from headloom.grammar.parse import parse
from headloom.kernels.aot import compile_ahead
from headloom.kernels.render import IMPORTS, skeleton_text
from headloom.kernels.sequential import Scan, Stream, obstacle
from headloom.kernels.sequential_render import render_scan
from headloom.kernels.spec import Tensor

SPACE = "headloom_test_sequential"

# Statements over states of these shapes, streams q k g [d], v [e], a b [], and tensors.
MIXERS = {
    "products": "S <- S - a * outer(k, k @ S); S <- S - b * outer(q, q @ S) + outer(k, v); "
    "o <- q @ S",
    "by_norm": "S <- a * S / max(1, norm(S)) + outer(k, v); o <- q @ S + norm(b) * norm(v) * v",
    "norm_of_nothing": "S <- S + 0 * outer(k, v); o <- norm(S) * v + norm(k) * v",
    "tensors": "S <- sigmoid(w) * S + outer(c * k, v); "
    "o <- q @ S + sum(w) * shared @ v + place * v",
    "both_sides": "S <- tanh(S + outer(k, v)); z <- S @ v; y <- q @ S; "
    "o <- y * mean(z) + dot(z, k) * v",
    "in_turn": "z <- a * z + k; y <- silu(y + dot(z, z) * v) + mean(S); S <- S / 2 + outer(z, y); "
    "o <- y + n * v; n <- clip(n + b, -2, 2)",
    "swapped": "last <- y; y <- z2; z2 <- last + v; o <- y * a - z2 + where(y > v, v, 0)",
    "same_vector": "S <- a * S + outer(k, k @ S) + outer(k, v); S <- S + 0.1; "
    "o <- gelu(q @ S) ** 2 + exp(b) ** a",
    "columns": "S <- outer(g, v) * S + outer(k, v); "
    "o <- elu(q @ S) * softplus(v) + sign(g @ S) * log_sigmoid(v)",
    "step": "n <- step(n + a) + detach(b) * n; o <- n * v + sqrt(abs(n) + 1) * v",
    "padded_lanes": "S <- a * S + outer(1 / abs(k), v); z <- z / 2 + log(abs(k)); "
    "S <- S / norm(S); o <- q @ S + mean(z) * v",
    "counts": "n <- n + 1; y <- y + where(floor(n) % 3 == 0, v, 2 * (v % 0.7)); "
    "o <- y * (floor(detach(3 * n)) // 2) + norm(n - 5 % 3) * v",
    "output_first": "o <- v; z <- z + k; o <- o + sum(z) * v",
}  # fmt: skip
SHAPES = {"S": "head_dim, value_dim", "z": "head_dim", "y": "value_dim", "z2": "value_dim", "n": ""}


def made(
    statements: str, *, d: int = 5, e: int = 3, kv_heads: int = 1, mask: str = "causal"
) -> Scan:
    """The scan of a mixer, through the compiler; it must be one that runs token by token."""
    written = [each.split(" <-")[0].strip() for each in statements.split(";")]
    states = "; ".join(
        f"state {each}[{SHAPES[each]}] = {0.25 if each in 'nS' else 0}".replace("[]", "")
        for each in dict.fromkeys(written)
        if each in SHAPES
    )
    text = (
        "mix m { let a = x | linear(heads) | sigmoid; let b = x | linear(heads); "
        "let g = x | linear(heads * head_dim) | sigmoid | split; "
        "param w[heads, head_dim, value_dim] = normal(1); param c[heads, head_dim] = normal(1); "
        "param shared[value_dim, value_dim] = normal(1); const place[heads] = 1 + h; "
        f"{states}; {statements} }}\n"
        f"block b {{ heads = 2; kv_heads = {kv_heads}; head_dim = {d}; value_dim = {e}; mix = m; "
        f"mask = {mask} }}"
    )
    (scan,) = scans(block(check(parse(text)), "b", 8))
    return scan


def scans(what: Block) -> list[Scan]:
    graph = lower(what, Target("torch")).graph
    return [scan_of(graph, node) for node in graph.of(operations.Scan)]


def printed(scan: Scan, name: str = "recur") -> str:
    space = f"{SPACE}_{hashlib.sha256(repr((scan, name)).encode()).hexdigest()[:12]}"
    return "\n\n".join([IMPORTS, skeleton_text("sequential"), render_scan(scan, name, space)])


def given(scan: Scan, n: int, *, batch: int = 2, heads: int | None = None) -> list[T]:
    """Streams, tensors and first states: float32, with gradients, the same every time."""
    random = torch.Generator().manual_seed(n)
    count = scan.heads if heads is None else heads
    sizes = [
        (batch, count, n) if each.size is None else (batch, count, n, each.size)
        for each in scan.streams
    ]
    sizes += [each.shape for each in scan.tensors]  # type: ignore[misc]
    sizes += [(batch, scan.heads, *each.shape) for each in scan.states]
    return [0.7 * torch.randn(size, generator=random) for size in sizes]


def meaning(scan: Scan, args: list[T], fresh: T | None) -> list[T]:
    """Run the statements as the reference reads them, token by token."""
    names = [*scan.streams, *scan.tensors, *scan.states]
    values: dict[str, T] = {each.name: arg for each, arg in zip(names, args, strict=True)}
    states = {each.name: values[each.name] for each in scan.states}
    fixed = {each.name: values[each.name] for each in scan.tensors}
    batch, n = args[0].shape[0], args[0].shape[2]
    outputs = []
    for t in range(n):
        if fresh is not None:
            states = {
                each.name: torch.where(
                    fresh[:, t].reshape(-1, *[1] * (1 + len(each.shape))),
                    each.initial,
                    states[each.name],
                )
                for each in scan.states
            }
        streams = {}
        for each in scan.streams:
            now = values[each.name][:, :, t]
            streams[each.name] = now.repeat_interleave(scan.heads // now.shape[1], dim=1)
        scope: dict[str, Any] = {**fixed, **streams, **states}
        for name, expr in scan.statements:
            scope[name] = value(expr, scope)
        states = {each.name: scope[each.name] for each in scan.states}
        outputs.append(scope["o"].expand(batch, scan.heads, scan.value_dim))
    return [torch.stack(outputs, 2), *states.values()]


def compare(
    module: Any,
    scan: Scan,
    args: list[T],
    fresh: T | None = None,
    *,
    name: str = "recur",
    tolerance: float = 2e-5,
) -> None:
    """Compare results and all gradients with those of the statements in float64."""
    mine = [each.detach().requires_grad_() for each in args]
    theirs = [each.detach().double().requires_grad_() for each in args]
    found = getattr(module, name)(*mine, None if fresh is None else fresh.to(torch.int8))
    expected = meaning(scan, theirs, fresh)
    random = torch.Generator().manual_seed(7)
    weights = [torch.randn(each.shape, generator=random) for each in expected]
    sum((a.float() * w).sum() for a, w in zip(found, weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip(expected, weights, strict=True)).backward()
    assert found[0].dtype == args[0].dtype
    names = [each.name for each in (*scan.streams, *scan.tensors, *scan.states)]
    fixed = {each.name for each in scan.tensors if not each.differentiable}
    for label, a, b in [
        *zip(("o", *(f"last {each.name}" for each in scan.states)), found, expected, strict=True),
        *(
            (f"d {label}", a.grad, b.grad)
            for label, a, b in zip(names, mine, theirs, strict=True)
            if label not in fixed
        ),
    ]:
        wanted = torch.zeros_like(a, dtype=torch.float64) if b is None else b
        error = (a.double() - wanted).abs().max() / (1 + wanted.abs().max())
        assert error <= tolerance, (label, float(error))
    for label, each in zip(names, mine, strict=True):
        assert (each.grad is None) == (label in fixed), label


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in padded lanes
@pytest.mark.parametrize("name", MIXERS)
def test_statements_and_their_gradients(execute: Any, name: str) -> None:
    scan = made(MIXERS[name])
    assert obstacle(scan) is None
    module = execute(printed(scan), f"<{SPACE}_{name}>")
    module.EVERY = 3  # tokens a chunk
    compare(module, scan, given(scan, 5))


ZOO = ("mamba", "mega", "aft_simple", "key_only", "decaying_weights", "delta_product", "slstm",
       "infini_attention", "natsl", "sru", "titans", "ttt_linear")  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(execute: Any, name: str) -> None:
    graph = lower(zoo.entry(name).what(), Target("torch")).graph
    (scan,) = (
        scan_of(graph, node)
        for node in graph.of(operations.Scan)
        if isinstance(of_node(graph, node), str)
    )
    module = execute(printed(scan), f"<{SPACE}_zoo_{name}>")
    module.EVERY = 4  # tokens a chunk
    for n in (1, 10):
        args = given(scan, n, batch=1)
        for each, arg in zip(
            scan.states, args[len(scan.streams) + len(scan.tensors) :], strict=True
        ):
            arg.abs_() if name == "key_only" else arg.fill_(max(each.initial, -3))
        compare(module, scan, args)


def test_the_norm_of_nothing_has_no_slope(execute: Any) -> None:
    scan = made(MIXERS["by_norm"])
    module = execute(printed(scan), f"<{SPACE}_nothing>")
    names = [*scan.streams, *scan.tensors, *scan.states]
    args = [
        torch.zeros_like(arg) if each.name in ("k", "S") else arg
        for each, arg in zip(names, given(scan, 3), strict=True)
    ]
    compare(module, scan, args)


def test_what_is_never_read_has_no_gradient(execute: Any) -> None:
    scan = made("z <- k; o <- v")
    scan = replace(
        scan,
        streams=(*scan.streams, Stream("unread", 4), Stream("number", None)),
        tensors=(Tensor("fixed", (2, 3)),),
    )
    module = execute(printed(scan), f"<{SPACE}_unread>")
    compare(module, scan, given(scan, 3))


def test_documents_sizes_and_grouped_heads(execute: Any) -> None:
    scan = made(MIXERS["in_turn"], mask="causal and document", d=4)
    module = execute(printed(scan), f"<{SPACE}_documents>")
    for n in (1, 3, 66):
        fresh = torch.zeros(2, n, dtype=torch.bool)
        fresh[0, 0] = fresh[1, n // 2 :: 2] = True
        compare(module, scan, given(scan, n, heads=1), fresh)
    compare(module, scan, given(scan, 3), None)


def test_any_strides(execute: Any) -> None:
    scan = made(MIXERS["products"])
    module = execute(printed(scan), f"<{SPACE}_strides>")
    args = given(scan, 5)
    dense = module.recur(*args)
    for at, each in enumerate(scan.streams):
        if each.size is None:
            args[at] = args[at].transpose(0, 2).contiguous().transpose(0, 2)
        else:
            args[at] = args[at].transpose(1, 2).contiguous().transpose(1, 2)
    for mine, theirs in zip(module.recur(*args), dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    expanded = [
        each[:, :1].expand(each.shape) if at < len(scan.streams) else each
        for at, each in enumerate(args)
    ]
    compare(module, scan, expanded)
    gaps = [torch.stack([each, each], -1)[..., 0] for each in args]
    for mine, theirs in zip(module.recur(*gaps), dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(execute: Any, dtype: torch.dtype) -> None:
    scan = made(MIXERS["tensors"])
    module = execute(printed(scan), f"<{SPACE}_half>")
    args = given(scan, 4)
    first = len(args) - len(scan.states)
    args = [each.to(dtype) if at < first else each for at, each in enumerate(args)]
    compare(module, scan, args, tolerance=2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_pieces_are_the_whole(execute: Any) -> None:
    """The last states of one call begin the next, and gradients flow through them."""
    scan = made(MIXERS["by_norm"])
    module = execute(printed(scan), f"<{SPACE}_pieces>")
    args = [each.requires_grad_() for each in given(scan, 6)]
    first = len(args) - len(scan.states)
    streams, rest, states = args[: len(scan.streams)], args[len(scan.streams) : first], args[first:]
    whole = module.recur(*args)
    begun = module.recur(*(each[:, :, :2] for each in streams), *rest, *states)
    ended = module.recur(*(each[:, :, 2:] for each in streams), *rest, *begun[1:])
    torch.testing.assert_close(torch.cat([begun[0], ended[0]], 2), whole[0])
    torch.testing.assert_close(ended[1:], whole[1:])
    wanted = [
        each
        for each, source in zip(args, [*scan.streams, *scan.tensors, *scan.states], strict=True)
        if not isinstance(source, Tensor)
    ]
    grads = torch.autograd.grad(whole[0].square().sum(), wanted)
    pieces = begun[0].square().sum() + ended[0].square().sum()
    for a, b in zip(torch.autograd.grad(pieces, wanted), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_opcheck(execute: Any) -> None:
    scan = made(MIXERS["tensors"], mask="causal and document")
    module = execute(printed(scan), f"<{SPACE}_opcheck>")
    args = [each.requires_grad_() for each in given(scan, 3)]
    fresh = torch.tensor([[False, True, False], [True, False, False]])
    torch.library.opcheck(module._recur.op, (*args, fresh.to(torch.int8)))
    torch.library.opcheck(module._recur.op, (*given(scan, 3), None))


def test_compiles_whole(execute: Any) -> None:
    scan = made(MIXERS["in_turn"])
    module = execute(printed(scan), f"<{SPACE}_compiled>")
    args = [each.requires_grad_() for each in given(scan, 3)]

    def loss(*args: T) -> T:
        o, *states = module.recur(*args)
        return o.square().sum() + sum(each.sum() for each in states)

    loss(*args).backward()
    grads = [each.grad for each in args]
    for each in args:
        each.grad = None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*args).backward()
    for each, grad in zip(args, grads, strict=True):
        torch.testing.assert_close(each.grad, grad)


@pytest.mark.parametrize(("n", "batch"), [(0, 2), (3, 0)])
def test_no_tokens_leave_the_states_and_no_rows_have_none(execute: Any, n: int, batch: int) -> None:
    scan = made(MIXERS["in_turn"])
    module = execute(printed(scan), f"<{SPACE}_nothing>")
    args = [each.requires_grad_() for each in given(scan, n, batch=batch)]
    o, *states = module.recur(*args)
    assert o.shape == (batch, scan.heads, n, scan.value_dim)
    firsts = args[-len(states) :]
    for each, first in zip(states, firsts, strict=True):
        torch.testing.assert_close(each, first, rtol=0, atol=0)
    found = torch.autograd.grad(o.sum() + sum((each**2).sum() for each in states), args)
    for each, grad in zip(args, found, strict=True):
        own = any(each is first for first in firsts)
        torch.testing.assert_close(grad, 2 * each if own else torch.zeros_like(each))


def test_two_at_once(execute: Any) -> None:
    one, two = made(MIXERS["products"]), made(MIXERS["swapped"])
    parts = [printed(one, "one"), render_scan(two, "two", f"{SPACE}_two")]
    module = execute("\n\n".join(parts), f"<{SPACE}_both>")
    compare(module, one, given(one, 3), name="one")
    compare(module, two, given(two, 3), name="two")


REFUSED = {
    "S <- outer(k, k) @ S + outer(k, v); o <- q @ S": r"`outer\(k, k\) @ S` multiplies a matrix",
    "n <- n // b; o <- n * v": "`//` needs a positive number on its right",
    "n <- n % -3; o <- n * v": "`%` needs a positive number on its right",
    "n <- n + (0 - 2) ** a; o <- n * v": "the base of a varying power",
}


@pytest.mark.parametrize("statements", REFUSED)
def test_what_no_kernel_carries(statements: str) -> None:
    scan = made(statements)
    reason = obstacle(scan)
    assert reason is not None
    assert re.search(REFUSED[statements], reason), reason
    with pytest.raises(ValueError, match="no kernel can carry this"):
        render_scan(scan, "refused", SPACE)


def test_limits_are_named() -> None:
    wide = made(MIXERS["products"], d=256, e=256)
    reason = obstacle(wide)
    assert reason is not None
    assert "131072 numbers would be carried" in reason
    assert "bidirectional" in (obstacle(replace(wide, causal=False)) or "")
    assert "keeps no state" in (obstacle(replace(wide, states=())) or "")
    (leveled,) = scans(zoo.entry("log_linear_mamba2").what())
    assert obstacle(leveled) == "`S` is kept in levels"
    assert "reads no stream" in (obstacle(replace(wide, streams=())) or "")


def test_wrong_arguments_are_named(execute: Any) -> None:
    scan = made(MIXERS["swapped"])
    module = execute(printed(scan), f"<{SPACE}_wrong>")
    args = given(scan, 3)
    at = next(at for at, each in enumerate(scan.streams) if each.size is not None)
    with pytest.raises(TypeError, match="float64"):
        module.recur(*(each.double() for each in args))
    with pytest.raises(ValueError, match=f"{scan.streams[at].name} is"):
        module.recur(*(each[..., :-1] if i == at else each for i, each in enumerate(args)))
    with pytest.raises(ValueError, match="the first y"):
        module.recur(*args[: -len(scan.states)], *(each[:1] for each in args[-len(scan.states) :]))


@pytest.mark.slow
def test_nothing_spills_at_the_sizes_of_a_head() -> None:
    """A state space of 64 features with 16 numbers each, and a matrix of 64 by 64."""
    space = "H <- exp(-exp(rate) * time) * H + outer(time * v, k); o <- H @ q"
    (small,) = scans(
        block(check(parse(
            "block b { heads = 2; head_dim = 16; value_dim = 64; mix = m; mask = causal }\n"
            "mix m { param rate[heads, value_dim, head_dim] = 0; state H[value_dim, head_dim] = 0; "
            f"let time = x | linear(heads * value_dim) | softplus | split; {space} }}"
        )), "b", 32)
    )  # fmt: skip
    for scan in (small, made(MIXERS["products"], d=64, e=64)):
        found = compile_ahead(scan, ("sm_80", "sm_90"))
        assert [each.kernel for each in found] == ["_attend_forward", "_attend_backward"] * 2
        assert [each for each in found if not each.ok] == []

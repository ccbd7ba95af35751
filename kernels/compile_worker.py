"""Compiles the kernels of one emitted file and measures them: the process behind `aot`.

Reads a job as JSON from standard input and prints a JSON list of resources as its last line.
It runs as a plain script, so that what it needs is what an emitted file needs: torch, triton.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i8": torch.int8,
    "i1": torch.bool,
}
POINTERS = {dtype: f"*{name}" for name, dtype in DTYPES.items()}
ALIGNED = [["tt.divisibility", 16]]


def recurrence_calls(chunked: Any, job: dict[str, Any]) -> list[Any]:
    """Return what the passes of a recurrence launch, with tensors that hold no memory."""
    given = tuple(
        torch.empty(shape, dtype=DTYPES[dtype], device="meta") for shape, dtype in job["inputs"]
    )
    results = chunked.forward_fake(*given)
    found: list[Any] = chunked.forward_calls(given, results)
    if job["backward"]:
        found += chunked.backward_calls(results, given, chunked.gradients(given))
    return found


def attention_calls(attend: Any, job: dict[str, Any]) -> list[Any]:
    """Return what the passes of an attention launch, with tensors that hold no memory."""
    dtype = DTYPES[job["dtype"]]
    q, k, v = (torch.empty(job[name], dtype=dtype, device="meta") for name in "qkv")
    sizes = {"b": q.shape[0], "n": q.shape[2], "m": k.shape[2]}
    tensors = tuple(
        torch.empty(
            [sizes.get(size, size) for size in shape],
            dtype=DTYPES[job.get("kinds", {}).get(name, "fp32")],
            device="meta",
        )
        for name, shape in attend.tensors.items()
    )
    results = attend.forward_fake(q, k, v)
    found: list[Any] = attend.forward_calls((q, k, v), results, tensors)
    if job["backward"]:
        o, stats, *wanted = results
        grads = attend.gradients((q, k, v), tensors)
        found += attend.backward_calls((o, *wanted), (q, k, v), (o, stats), tensors, grads)
    return found


def scan_calls(scan: Any, job: dict[str, Any]) -> list[Any]:
    """Return what the passes of a scan launch, with tensors that hold no memory."""
    (batch, n), dtype = job["tokens"], job["dtype"]
    heads = (batch, scan.heads)
    sizes = [(*heads, n) if each is None else (*heads, n, each) for each in scan.streams.values()]
    shapes = [
        *((size, dtype) for size in sizes),
        *((each, "fp32") for each in scan.tensors.values()),
    ]
    shapes += [((*heads, *each), "fp32") for each in scan.states.values()]
    shapes.append(((batch, n), "i8"))
    given = [torch.empty(size, dtype=DTYPES[kind], device="meta") for size, kind in shapes]
    everything = tuple(given)
    results, count = scan.forward_fake(*everything), 1 + len(scan.states)
    found: list[Any] = scan.forward_calls(everything, results)
    if job["backward"]:
        grads = scan.gradients(everything, results[0])
        found += scan.backward_calls(results[:count], everything, results[count:], grads)
    return found


def signature(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the types, constants and alignments of a launch, as the just-in-time path would."""
    known = {param.name for param in kernel.params} | {"num_warps", "num_stages"}
    if unknown := set(arguments) - known:  # the interpreter drops these, a GPU launch does not
        raise TypeError(f"{kernel.__name__} takes no {', '.join(sorted(unknown))}")
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    aligned: dict[Any, Any] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(each, (*path, at)) for at, each in enumerate(value))
        if isinstance(value, torch.Tensor):
            aligned[path] = ALIGNED
            return POINTERS[value.dtype]
        if isinstance(value, int):
            if value % 16 == 0 and len(path) > 1:
                aligned[path] = ALIGNED
            return "i32"
        constants[path] = value
        return "constexpr"

    for at, param in enumerate(kernel.params):
        value = arguments[param.name]
        if param.is_constexpr:
            types[param.name], constants[(at,)] = "constexpr", value
        else:
            types[param.name] = kind(value, (at,))
    return types, constants, aligned


def measure(kernel: Any, arguments: dict[str, Any], target: str) -> dict[str, Any]:
    """Compile one launch for one target and read what it uses."""
    source = ASTSource(kernel, *signature(kernel, arguments))
    options = {name: arguments[name] for name in ("num_warps", "num_stages")}
    amd = target.startswith("gfx")
    chip = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    compiled = triton.compile(source, target=chip, options=options)
    registers, spills = _amd(compiled.asm["amdgcn"]) if amd else _cuda(compiled.asm["cubin"])
    return {
        "kernel": kernel.__name__,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
    }


def _cuda(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory or stack, from the cuobjdump inside triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], max(usage["STACK"], usage["LOCAL"])


def _amd(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory, from the assembler's own metadata."""
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.M)}
    return found["vgpr_count"], found["private_segment_fixed_size"]


def main() -> None:
    """Run the job on standard input."""
    job = json.load(sys.stdin)
    spec = importlib.util.spec_from_file_location("emitted", job["path"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    of_state = scan_calls if "tokens" in job else recurrence_calls
    calls = of_state if {"inputs", "tokens"} & job.keys() else attention_calls
    launches = calls(getattr(module, job["name"]), job)
    rows = [
        measure(kernel, arguments, target)
        for target in job["targets"]
        for kernel, _, arguments in launches
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

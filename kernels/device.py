"""What the host side of every kernel needs: widths of tiles, tensors to read, launches.

This text is copied into every emitted file that has kernels, once, before their families.
"""

import torch
import triton

Call = tuple[object, int, dict[str, object]]  # kernel, number of programs, arguments
Tensors = tuple[torch.Tensor, ...]


def padded(width: int) -> int:
    """The width of a tile that holds `width` columns: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _readable(x: torch.Tensor) -> torch.Tensor:
    """The tensor with adjacent elements in its last axis; kernels take any other stride."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        x = x.float()  # only the interpreter runs there, and it multiplies bfloat16 as bits
    return x if x.stride(-1) == 1 else x.contiguous()


def _no_second(_ctx: torch.autograd.function.FunctionCtx, *_: torch.Tensor) -> None:
    """What the gradient of a backward operator is."""
    raise RuntimeError(
        "this kernel has no second derivative; take the module built for PyTorch alone "
        '(backend="torch")'
    )


def _launch(calls: list[Call], like: torch.Tensor) -> None:
    """Run the kernels on the device that holds the tensors; a grid of no programs runs none."""
    if like.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "these kernels need a GPU: move the module there, take the one built for PyTorch "
            "alone, or set TRITON_INTERPRET=1 before triton is imported to run them slowly"
        )
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        for kernel, programs, arguments in calls:
            if programs:
                kernel[(programs,)](**arguments)  # type: ignore[index]

"""Images as tokens."""

from __future__ import annotations

from torch import Tensor


def cut_patches(
    name: str,
    x: Tensor,
    channels: int,
    size: tuple[int, int],
    image: tuple[int, int] | None = None,
) -> Tensor:
    """Return the patches [b, n, channels · height · width] of images [b, channels, H, W].

    They stand row by row, the numbers of each by channel, then by row. What is [b, n, d] is cut
    already. Raises `ValueError` for images of another size.
    """
    if x.ndim == 3:
        return x
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"`{name}` must be [b, {channels}, height, width], it is {list(x.shape)}")
    sides = {"height": (x.shape[2], size[0]), "width": (x.shape[3], size[1])}
    for side, (given, one) in sides.items():
        if given % one:
            raise ValueError(f"the {side} of `{name}` must be a multiple of {one}, the {side} of a "
                             f"patch; it is {given}, remainder {given % one}")  # fmt: skip
    if image is not None and tuple(x.shape[2:]) != image:
        raise ValueError(f"`{name}` must be {image[0]} × {image[1]}, it is "
                         f"{x.shape[2]} × {x.shape[3]}")  # fmt: skip
    x = x.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))  # [b, c, rows, h, cols, w]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

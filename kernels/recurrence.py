"""What a chunked kernel computes, as data, and its text: the recurrences beside `render`.

    text = IMPORTS + skeleton_text("chunked") + render(Recurrence("number"), "decayed", "ops")

is a file that needs torch and triton only and defines `decayed(q, k, v, decay, state)`.
"""

from __future__ import annotations

from dataclasses import dataclass

LARGEST = 256  # rows or columns of a state: no tile holds more


@dataclass(frozen=True, slots=True)
class Recurrence:
    """S_i = decay_i S_{i-1} + outer(k_i, u_i), read as q_i @ S_i, or q_i @ S_{i-1} with `before`.

    `decay` is None for 1, "number" for one number a token, "rows" for one each row of S. Where
    it is `corrected`, u_i = v_i + w_i @ S_{i-1}; else u is v.
    """

    decay: str | None = None
    corrected: bool = False
    before: bool = False


def render(spec: Recurrence, name: str, namespace: str) -> str:
    """Return the text of one recurrence: its operators, and `def {name}(q, k, v, …, state)`.

    The function takes w and decay where the spec has them and returns o and the last state. The
    operators are `{namespace}::{name}` and `{namespace}::{name}_backward`.
    """
    form = [f'decay="{spec.decay}"'] * (spec.decay is not None)
    form += [f"{each}=True" for each in ("corrected", "before") if getattr(spec, each)]
    body = "".join(f"    {each},\n" for each in (f'"{namespace}::{name}"', *form))
    shapes = {"q": "(b, heads, n, d)", "k": "(b, heads, n, d)", "v": "(b, heads, n, e)"}
    if spec.corrected:
        shapes["w"] = "(b, heads, n, d)"
    if spec.decay is not None:
        shapes["decay"] = f"(b, heads, n, {'1' if spec.decay == 'number' else 'd'}), float32"
    shapes["state"] = "(b, heads, d, e), float32: S before the first token"
    room = max(len(each) for each in shapes) + 2
    typed = "".join(f"    {each}: torch.Tensor,\n" for each in shapes)
    lines = "".join(f"    {each:{room}}{shape}\n" for each, shape in shapes.items())
    return (
        f"_{name} = Chunked(\n{body})\n\n\n"
        f"def {name}(\n{typed}) -> tuple[torch.Tensor, torch.Tensor]:\n"
        f'    """Recur: {_meaning(spec)}.\n\n'
        f"    Returns o (b, heads, n, e) and the last S.\n\n"
        f'{lines}    """\n'
        f"    o, last = _{name}.op({', '.join(shapes)})\n    return o, last\n"
    )


def _meaning(spec: Recurrence) -> str:
    decay = {None: "", "number": "decay[i] · ", "rows": "decay[i] ∘ "}[spec.decay]
    value = "(v[i] + w[i] @ S[i-1])" if spec.corrected else "v[i]"
    read = "S[i-1]" if spec.before else "S[i]"
    return f"S[i] = {decay}S[i-1] + k[i]ᵀ {value}, o[i] = q[i] @ {read}"

"""Fused kernels: Triton skeletons, the hooks printed into them, and their checks.

There are three families: pairwise attention, recurrences in chunks, and recurrences that run
token by token. A skeleton (`pairwise`, `chunked`) is ordinary Triton code; in pairwise attention
its variable parts are hooks, device functions printed from expressions of the language (`hooks`).
The third family has no skeleton: the statements of a mixer become a `tape`, its gradients come
from `adjoint`, and whole kernels are printed. `render`, `recurrence` and `sequential_render` put
one operator, with the skeletons and the host code of `launch` and its siblings, into a text that
needs torch and triton only; `aot` compiles that text for real hardware without a GPU. Nothing
here imports torch or triton until a kernel runs, but for the skeletons themselves.
"""

"""Fused attention kernels: Triton skeletons, the hooks printed into them, and their checks.

A skeleton (`pairwise`) is ordinary Triton code whose variable parts are device functions; a
hook is such a function, printed from an expression of the language (`hooks`). `render` puts
both, with the host code of `launch`, into one text that needs torch and triton only; `aot`
compiles that text for real hardware without a GPU. Recurrences that run token by token have
no skeleton: their statements become a `tape`, its gradients come from `adjoint`, and
`sequential_render` prints both kernels from the description in `sequential`. Nothing here
imports torch or triton until a kernel runs, but for the skeletons themselves.
"""

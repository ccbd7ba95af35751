"""Fused kernels: Triton skeletons, the hooks printed into them, and their checks.

There are two families, pairwise attention and recurrences in chunks (`chunked`). A skeleton (`pairwise`) is ordinary Triton code whose variable parts are device functions; a
hook is such a function, printed from an expression of the language (`hooks`). `render` puts
both, with the host code of `launch`, into one text that needs torch and triton only; `aot`
compiles that text for real hardware without a GPU. Nothing here imports torch or triton
until a kernel runs, but for the skeletons themselves.
"""

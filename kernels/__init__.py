"""Fused kernels: Triton skeletons, the hooks printed into them, and their checks.

There are two families, pairwise attention and recurrences in chunks. A skeleton (`pairwise`,
`chunked`) is ordinary Triton code; in pairwise attention its variable parts are hooks, device
functions printed from expressions of the language (`hooks`). `render` and `recurrence` put one
operator, with the skeletons and the host code of `launch` or `launch_chunked`, into a text that
needs torch and triton only; `aot` compiles that text for real hardware without a GPU. Nothing
here imports torch or triton until a kernel runs, but for the skeletons themselves.
"""

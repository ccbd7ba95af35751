"""What every test needs: kernels run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported

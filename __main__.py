"""`python -m headloom`, and the command `headloom`."""

import gc
import sys


def run() -> None:
    """Run a command in a process of its own.

    What is imported stays until the end, and at the end everything goes: searching either for
    garbage takes as long as checking a description.
    """
    gc.disable()
    from headloom.cli import main

    gc.freeze()
    gc.enable()
    try:
        main()
    finally:
        if "torch" not in sys.modules:  # Triton's bindings complain of what is left
            gc.freeze()


if __name__ == "__main__":
    run()

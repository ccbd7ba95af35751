"""`python -m headloom`, and the command `headloom`."""

import gc


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
        gc.freeze()


if __name__ == "__main__":
    run()

"""What someone sees while things are measured: a spinner on a terminal, plain lines elsewhere.

Everything goes to stderr; stdout is for results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Says = Callable[[str], None]


@contextmanager
def shown(quiet: bool = False) -> Iterator[tuple[Says, Says]]:
    """Give two functions: `doing` what runs now, seen on a terminal alone, and `done` a line."""
    console = Console(stderr=True, quiet=quiet, highlight=False)

    def done(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    if not console.is_terminal or quiet:
        yield (lambda _: None), done
        return
    with console.status("") as status:
        yield (lambda text: status.update(text)), done

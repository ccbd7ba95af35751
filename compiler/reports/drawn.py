"""What draws itself on a console is text anywhere, and a picture in a notebook.

>>> certificate                 # in a shell: the table as text
>>> certificate._repr_html_()   # in a notebook: the same, escaped, in its colours
"""

from __future__ import annotations

from io import StringIO

from rich.console import Console

_WIDTH = 110
_HTML = '<pre style="line-height: 1.25; font-family: monospace">{code}</pre>'


class Drawn:
    """Something with a `show`."""

    def show(self, console: Console | None = None) -> None:
        """Draw it, by default on standard output."""
        raise NotImplementedError

    def __str__(self) -> str:
        text: str = self._recorded().export_text()
        return text.rstrip()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self._recorded().export_html(inline_styles=True, code_format=_HTML)

    def _recorded(self) -> Console:
        console = Console(
            record=True, file=StringIO(), width=_WIDTH, highlight=False, force_jupyter=False
        )
        self.show(console)
        return console

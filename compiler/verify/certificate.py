"""The certificate of `headloom verify`: every check, what it found, and on what machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ...kernels.aot import SHARED_LIMIT
from ..api import What, architecture, target
from ..checking.check import find
from ..emit import Code
from ..model import Block, Model
from ..pipeline import generate
from ..reports.drawn import Drawn
from .kernels import can_run_kernels, repeated
from .verify import Finding, checks_of, subjects
from .verify import verify as run_checks


class NotVerifiedError(Exception):
    """A check does not hold; `certificate` says which."""

    def __init__(self, certificate: Certificate) -> None:
        super().__init__(str(certificate))
        self.certificate = certificate


@dataclass(frozen=True, repr=False)
class Certificate(Drawn):
    """What all checks of one architecture found."""

    name: str
    digest: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(each.ok is not False for each in self.findings)

    @property
    def checks(self) -> tuple[Finding, ...]:
        """What each check found."""
        return self.findings

    def demanded(self) -> Certificate:
        """Return the certificate. Raises `NotVerifiedError` where a check does not hold."""
        if not self.ok:
            raise NotVerifiedError(self)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as plain data."""
        return {
            "ok": self.ok,
            "name": self.name,
            "code": self.digest,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "findings": [asdict(each) for each in self.findings],
        }

    def show(self, console: Console | None = None) -> None:
        """Print it as a table; what failed comes last and in full."""
        console = console or Console(highlight=False)
        table = Table(
            title=f"{self.name} (code {self.digest}, torch {torch.__version__})",
            title_justify="left",
        )
        for name in ("", "check", "cases", "worst error", "note"):
            table.add_column(name, justify="right" if name in ("cases", "worst error") else "left")
        for each in self.findings:
            mark = {True: "[green]holds[/]", False: "[red]FAILS[/]", None: "[dim]n/a[/]"}[each.ok]
            numbers = (str(each.cases), f"{each.worst:.1e}") if each.ok else ("", "")
            label = each.check if each.subject == self.name else f"{each.subject}: {each.check}"
            note = "see below" if each.ok is False else each.note
            table.add_row(mark, Text(label), *numbers, Text(note))
        console.print(table)
        for each in self.findings:
            if each.ok is False:
                console.print(
                    f"{each.subject}: {each.check} does not hold: {each.note}",
                    style="red",
                    markup=False,
                    soft_wrap=True,
                )
        held = sum(each.ok is True for each in self.findings)
        console.print(f"{held} of {held + sum(e.ok is False for e in self.findings)} checks hold")


def make(
    whats: Sequence[Block | Model],
    targets: tuple[str, ...] = (),
    module: str | None = None,
    optimize: str = "default",
) -> Certificate:
    """Run every check, with a progress bar on a terminal. Raises `ValueError` on bad arguments.

    Several models are the alternatives of a space: their different blocks are all verified,
    and the first of the models. `module` is a built file to verify instead.
    """
    if unknown := set(targets) - set(SHARED_LIMIT):
        known = ", ".join(SHARED_LIMIT)
        raise ValueError(f"no such target: {', '.join(sorted(unknown))}; there are {known}")
    can_run_kernels()
    main = whats[-1]
    generated = generate(main, target("torch", optimize=optimize))
    code = None
    if module is not None:
        code = Code(Path(module).read_text(encoding="utf-8"), generated.name)
    parts = (main,) if code is not None else subjects(*whats)
    console = Console(stderr=True)
    findings = []
    threads = torch.get_num_threads()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        total = sum(len(checks_of(part, code)) for part in parts)
        task = bar.add_task(f"verifying {main.name}", total=total)
        torch.set_num_threads(1)  # the cases are small: waking a core takes longer than they do
        try:
            for each in _findings(parts, code, targets, optimize):
                findings.append(each)
                bar.update(task, advance=1, description=f"{each.subject}: {each.check}")
        finally:
            torch.set_num_threads(threads)
    return Certificate(main.name, (code or generated).digest, tuple(findings))


def _findings(
    parts: Sequence[Block | Model], code: Code | None, targets: tuple[str, ...], optimize: str
) -> Iterator[Finding]:
    """Yield what all checks find; what two parts have in common is checked once."""
    whole = [part.name for part in parts if isinstance(part, Model)]
    again = {} if code is not None else repeated(p for p in parts if isinstance(p, Block))
    for part in parts:
        covered = {}
        if whole and isinstance(part, Block):
            covered["exported file"] = f"the file of `{whole[0]}` has it"
        if isinstance(part, Block) and part in again:
            note = f"as in `{again[part]}` above, but for fractions"
            covered |= {"kernels in the interpreter": note, "kernels ahead of time": note}
        yield from run_checks(part, code, targets, covered, optimize)


def verify(
    arch: What,
    name: str | None = None,
    *,
    width: int | None = None,
    context_width: int | None = None,
    targets: Sequence[str] = (),
    module: str | Path | None = None,
    optimize: str = "default",
    strict: bool = False,
) -> Certificate:
    """Prove the compiled block or model against its meaning, and return what was found.

    `targets` are GPUs ("sm_90") that the kernels are compiled for too; `module` is a built file
    to verify instead of a new one, which `optimize` is for. With `strict`, raises
    `NotVerifiedError` where a check fails.
    """
    what = find(architecture(arch), name, width, context_width)
    found = make([what], tuple(targets), None if module is None else str(module), optimize)
    return found.demanded() if strict else found

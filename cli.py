"""The command line. Every command is a few lines over the same functions users can call.

Exit status: 0 done; 1 the description is wrong (diagnostics on stderr); 2 wrong usage;
3 verification failed. What a command answers goes to stdout, everything else to stderr.
torch is imported only by the commands that need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import click

from . import __version__
from .compiler.model import Architecture, Block, Model
from .grammar.diagnostics import Diagnostic, LoomError
from .grammar.syntax import File

WRONG_SPEC, NOT_VERIFIED = 1, 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="headloom")
def main() -> None:
    """Declare attention architectures; check, build, verify and search them.

    \b
    headloom new mine && headloom verify mine.loom
    headloom build mine.loom -o mine.py
    """


def command(**settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A command that turns `LoomError` into diagnostics and exit status 1."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with _diagnosed(bool(kwargs.get("json"))):
                function(*args, **kwargs)

        return main.command(**settings)(run)

    return decorate


@contextmanager
def _diagnosed(json: bool) -> Iterator[None]:
    try:
        yield
    except LoomError as problem:
        if json:
            _print_json({"ok": False, "diagnostics": [d.to_json() for d in problem.diagnostics]})
        for each in problem.diagnostics:
            _complain(each)
        count = sum(each.severity == "error" for each in problem.diagnostics)
        click.secho(f"{count} error{'s' if count != 1 else ''}", fg="red", err=True)
        sys.exit(WRONG_SPEC)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as problem:
        name = f" `{problem.filename}`" if problem.filename else ""
        raise click.ClickException(f"{(problem.strerror or str(problem)).lower()}{name}") from None


def _complain(diagnostic: Diagnostic) -> None:
    head, _, rest = diagnostic.render().partition("\n")
    click.secho(head, fg="red" if diagnostic.severity == "error" else "yellow", bold=True, err=True)
    click.echo(rest + "\n", err=True)


def _print_json(value: object) -> None:
    from json import dumps

    click.echo(dumps(value, indent=2, ensure_ascii=False))


json_option = click.option("--json", is_flag=True, help="Print the answer as JSON.")
width_option = click.option("--width", type=click.IntRange(1), help="Input width of a block.")
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "triton"]),
    default="auto",
    show_default=True,
    help="PyTorch operations alone, or Triton kernels where they can carry a block.",
)

optimize_option = click.option(
    "--optimize",
    type=click.Choice(["default", "max"]),
    default="default",
    show_default=True,
    help="With max, torch.compile compiles tiles of attention at the first call.",
)


def _split(what: str) -> tuple[str, str | None]:
    """Split FILE[:NAME]."""
    if Path(what).exists() or ":" not in what:
        return what, None
    path, _, name = what.rpartition(":")
    return path, name or None


def _parsed(path: str) -> File:
    from .compiler.parse import parse_path

    return parse_path(path)


def _checked(path: str) -> list[Architecture]:
    """Check a file; of a space, plain files in which every alternative occurs."""
    from .compiler.checking.check import check, is_space

    file = _parsed(path)
    if not is_space(file):
        return [check(file)]
    from .search.space import alternatives, has_holes, search_of

    found = [check(plain) for plain in (alternatives(file) if has_holes(file) else [file])]
    if search_of(file) is not None:
        from .search.plan import read_plan

        read_plan(file)
    return found


def _found(what: str, width: int | None) -> Block | Model:
    from .compiler.checking.check import check, find

    path, name = _split(what)
    return find(check(_parsed(path)), name, width)


# ── writing and checking descriptions ────────────────────────────────────────────────────

_STARTER = """\
# {name}: grouped-query attention in a sliding window. Change anything, then run
#   headloom check {name}.loom && headloom verify {name}.loom
block {name} {{
  width    = 256
  heads    = 8
  kv_heads = 2
  position = rope(theta = 10_000)
  mask     = causal and window(64)
}}
"""


@command()
@click.argument("name")
def new(name: str) -> None:
    """Write NAME.loom, a small description to start from.

    Example: headloom new mine
    """
    stem = name.removesuffix(".loom")
    path = Path(f"{stem}.loom")
    if not path.name.removesuffix(".loom").isidentifier():
        raise click.UsageError(f"`{stem}` is not a name: use letters, digits and _")
    if path.exists():
        raise click.UsageError(f"`{path}` exists already")
    path.write_text(_STARTER.format(name=path.stem), encoding="utf-8")
    click.echo(f"wrote {path}; next: headloom verify {path}")


@command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@json_option
def check(files: tuple[str, ...], json: bool) -> None:
    """Check descriptions: names, kinds, sizes, definitions, holes.

    Example: headloom check examples/*.loom
    """
    answers: list[dict[str, Any]] = []
    wrong: list[Diagnostic] = []
    for path in files:
        try:
            found = _checked(path)
        except LoomError as problem:
            wrong.extend(problem.diagnostics)
            continue
        arch, count = found[0], len(found)
        for warning in arch.warnings:
            _complain(warning)
        named = [*arch.blocks, *arch.models]
        answers.append(
            {
                "file": path,
                "defines": named,
                "alternatives": count,
                "warnings": [each.to_json() for each in arch.warnings],
            }
        )
        if not json:
            space = f"; a space, {count} alternatives checked" if count > 1 else ""
            click.echo(f"{path}: ok ({', '.join(named) or 'definitions only'}{space})")
    if wrong:
        raise LoomError(wrong)
    if json:
        _print_json({"ok": True, "files": answers})


@command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@click.option("--to", type=click.Choice(["loom", "yaml"]), help="Print in the other form.")
@click.option("--check", "only_check", is_flag=True, help="Change nothing; exit 1 if it would.")
def fmt(files: tuple[str, ...], to: str | None, only_check: bool) -> None:
    """Format descriptions in place, or print them as Loom or YAML.

    Example: headloom fmt gemma.loom --to yaml > gemma.yaml
    """
    from .grammar.format import format_loom, format_yaml

    changed = []
    for path in files:
        file = _parsed(path)
        is_yaml = path.endswith((".yaml", ".yml"))
        if to is not None:
            click.echo(format_yaml(file) if to == "yaml" else format_loom(file), nl=False)
            continue
        text = format_yaml(file) if is_yaml else format_loom(file)
        if text != Path(path).read_text(encoding="utf-8"):
            changed.append(path)
            if not only_check:
                Path(path).write_text(text, encoding="utf-8")
    for path in changed:
        click.echo(f"{path}: {'would be ' if only_check else ''}formatted")
    if only_check and changed:
        sys.exit(1)


@command(name="import")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True))
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Where to write the text.")
@click.option(
    "--weights", type=click.Path(dir_okay=False), help="Where to write its weights, as ours."
)
def import_(folder: str, out: str | None, weights: str | None) -> None:
    """Describe a model of Hugging Face: a folder with a config.json, and safetensors for weights.

    Example: headloom import Qwen3-0.6B -o qwen.loom --weights qwen.safetensors
    """
    from .known.known import from_hf

    known = from_hf(folder)
    if weights is not None:
        known.save(weights)
        click.echo(f"wrote {weights} ({len(known.weights.shapes)} tensors)", err=True)
    if out is None:
        click.echo(known.text, nl=False)
    else:
        Path(out).write_text(known.text, encoding="utf-8")
        click.echo(f"wrote {out} ({len(known.text.splitlines())} lines)", err=True)


# ── looking at an architecture ───────────────────────────────────────────────────────────


@command()
@click.argument("what", metavar="FILE[:NAME]")
@width_option
@click.option("--tokens", default=4096, show_default=True, help="Length for the costs.")
@click.option("--figure", is_flag=True, help="Print boxes and arrows, as Mermaid draws them.")
@click.option("--space", is_flag=True, help="Of a file with holes: what there is to draw.")
@json_option
def show(what: str, width: int | None, tokens: int, figure: bool, space: bool, json: bool) -> None:
    """Show a block or model: its parts, its graph, its mask as a picture, its cost.

    \b
    Examples: headloom show examples/gemma_like.loom:local
              headloom show examples/gemma_like.loom:tiny_gemma --figure
              headloom show examples/search_mqar.loom --space
    """
    if space:
        from .search.overview import overview

        seen = overview(_parsed(what))
        if json:
            _print_json(asdict(seen))
        else:
            click.echo(seen.show())
        return
    from .compiler.reports import show as view

    found = _found(what, width)
    if figure:
        from .compiler.reports.figure import figure as drawn

        click.echo(drawn(found))
    elif json:
        _print_json(view.as_json(found, tokens))
    else:
        view.show(found, tokens)


@command()
@click.argument("what", metavar="FILE[:NAME] | CODE")
@width_option
@backend_option
@optimize_option
@json_option
def explain(what: str, width: int | None, backend: str, optimize: str, json: bool) -> None:
    """Say how everything is computed and why, or what an error code means.

    \b
    Examples: headloom explain examples/gqa.loom --backend triton
              headloom explain L204
    """
    if not Path(what).exists() and what[:1] in "LW" and what[1:].isdigit():
        _explain_code(what)
        return
    from .compiler.api import explained, target

    report = explained(_found(what, width), target(backend, optimize=optimize))
    if json:
        _print_json(
            [
                {
                    "block": each.node,
                    "path": each.path,
                    "reason": each.reason,
                    "obstacles": dict(each.obstacles),
                }
                for each in report.lowerings
            ]
        )
        return
    report.show_paths()


def _explain_code(code: str) -> None:
    from .compiler.checking.codes import CODES as COMPILER
    from .known.codes import CODES as KNOWN
    from .search.codes import CODES as SEARCH

    codes = COMPILER | SEARCH | KNOWN
    if code not in codes:
        raise click.UsageError(f"there is no code {code}; there are {', '.join(sorted(codes))}")
    entry = codes[code]
    click.secho(f"{code}: {entry.title}", bold=True)
    click.echo(f"\n{entry.explanation}")
    if entry.example:
        example = "\n".join(f"    {line}" for line in entry.example.strip().splitlines()[:20])
        click.echo(f"\nFor example:\n\n{example}")


# ── building and verifying ───────────────────────────────────────────────────────────────


@command()
@click.argument("what", metavar="FILE[:NAME]")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Where to write the file.")
@width_option
@backend_option
@optimize_option
@click.option(
    "--emit",
    "stage",
    type=click.Choice(["syntax", "graph", "code", "kernels"]),
    default="code",
    show_default=True,
    help="Stop after a stage, print it.",
)
def build(
    what: str, out: str | None, width: int | None, backend: str, optimize: str, stage: str
) -> None:
    """Compile a block or model to a standalone Python file.

    Example: headloom build examples/gqa.loom -o gqa.py
    """
    from .compiler.reports.stages import stage_text

    path, name = _split(what)
    text = stage_text(_parsed(path), name, width, backend, stage, optimize)
    if out is None:
        click.echo(text, nl=False)
    else:
        Path(out).write_text(text, encoding="utf-8")
        click.echo(f"wrote {out} ({len(text.splitlines())} lines)", err=True)


@command()
@click.argument("what", metavar="FILE[:NAME]")
@width_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="ARCH",
    help="Compile the kernels for a GPU too: sm_80, sm_90, sm_100, gfx942.",
)
@click.option(
    "--module",
    type=click.Path(exists=True, dir_okay=False),
    help="Verify this built file instead of a new one.",
)
@optimize_option
@json_option
def verify(
    what: str,
    width: int | None,
    targets: tuple[str, ...],
    module: str | None,
    optimize: str,
    json: bool,
) -> None:
    """Verify a compiled block or model against its meaning; exit 3 if something does not hold.

    Of a space, every alternative of its blocks is verified.

    Example: headloom verify examples/gqa.loom --target sm_90
    """
    from .compiler.checking.check import find
    from .compiler.verify import certificate

    path, name = _split(what)
    found = [find(arch, name, width) for arch in _checked(path)]
    try:
        result = certificate.make(found, targets, module, optimize)
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    if json:
        _print_json(result.to_json())
    else:
        result.show()
    if not result.ok:
        sys.exit(NOT_VERIFIED)


@command()
@click.argument("what", metavar="FILE[:NAME]")
@click.option(
    "--to", required=True, type=click.Choice(["py", "pt2", "onnx", "hf"]), help="What to write."
)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder that is made.")
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False),
    help="A safetensors file, or a state dict of torch.save; else weights are drawn.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    help="What it is in [default: as the weights are].",
)
@click.option("--portable", is_flag=True, help="pt2: PyTorch's core operators where there are.")
@click.option("--aot", is_flag=True, help="pt2: compiled for this processor too (takes minutes).")
@width_option
@json_option
def export(what: str, to: str, out: str, json: bool, **given: Any) -> None:
    """Write a block or model as a folder that works where Headloom is not installed.

    The folder is loaded and run by another process before it takes its place; what was compared
    is printed, exit 3 if something does not hold. `py` is text and weights, `pt2` programs of
    torch.export, `onnx` models of ONNX (it needs headloom[onnx]).

    \b
    Example: headloom export examples/gemma_like.loom:tiny_gemma --to py --out gemma
    """
    from .compiler.verify.certificate import NotVerifiedError
    from .export.export import export as exported
    from .export.request import NotExportedError

    path, name = _split(what)
    try:
        certificate = exported(path, name, to=to, out=out, **given)
    except NotVerifiedError as problem:
        certificate = problem.certificate
    except NotExportedError as problem:
        if json:
            _print_json({"ok": False, "obstacles": problem.obstacles})
        raise click.ClickException(str(problem)) from None
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    if json:
        _print_json(certificate.to_json())
    else:
        certificate.show()
    if not certificate.ok:
        sys.exit(NOT_VERIFIED)
    if not json:
        click.echo(f"wrote {out}", err=True)


# ── searching ────────────────────────────────────────────────────────────────────────────


@command()
@click.argument("file")
@click.option("--trials", type=click.IntRange(1), help="How many; by default what the file says.")
@click.option("--sampler", type=click.Choice(["random", "tpe"]), help="How to draw.")
@click.option("--seed", type=click.IntRange(0), help="Fixes draws, data and weights.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder of the study.")
@click.option("--no-resume", is_flag=True, help="Refuse to go on with a study that exists.")
@json_option
def search(
    file: str,
    trials: int | None,
    sampler: str | None,
    seed: int | None,
    out: str | None,
    no_resume: bool,
    json: bool,
) -> None:
    """Search the space of a file with holes; goes on where an earlier run stopped.

    Example: headloom search examples/search_mqar.loom --trials 8 --out runs/mqar
    """
    from .search import report, study
    from .search.plan import read_plan

    plan = read_plan(_parsed(file), trials=trials, sampler=sampler, seed=seed, out=out)
    found = study.run(plan, resume=not no_resume, progress=False if json else None)
    if json:
        _print_json(report.summary(plan, found))
    else:
        report.show(plan, found)


def _was_given(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


# ── measuring ────────────────────────────────────────────────────────────────────────────


@command()
@click.argument("what", metavar="[FILE[:NAME]]", required=False)
@width_option
@click.option("--against", help="Peers, with commas between them [default: sdpa,flex].")
@click.option("--tokens", default="1024", show_default=True, help="Lengths, with commas.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What is computed in.",
)
@click.option("--backward", is_flag=True, help="Measure forward and backward.")
@click.option("--decode", is_flag=True, help="Measure a token decoded after so many.")
@click.option("--documents", type=click.IntRange(0), default=0, help="Pack so many into a row.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows.")
@optimize_option
@click.option("--device", help="Where to run [default: a GPU where there is one].")
@click.option("--threads", type=click.IntRange(1), help="Of the CPU [default: PyTorch's].")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Samples.")
@click.option("--memory/--no-memory", default=True, help="Measure peak memory too.")
@click.option("--suite", type=click.Choice(["cpu", "gpu", "all"]), help="A standing table.")
@click.option("--budget", type=click.FloatRange(0), help="Seconds after which no row is begun.")
@click.option("--fresh", is_flag=True, help="Begin the table anew.")
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="benchmarks/results",
    show_default=True,
    help="Folder of the tables.",
)
@json_option
def bench(what: str | None, suite: str | None, json: bool, **given: Any) -> None:
    """Measure a block or model beside peers: times, memory, errors; or a standing table.

    Everyone gets the same weights and inputs, and runs in turn. Who cannot compute the block, or
    computes it wrongly, shows why instead of a speed. A table goes on where it stopped.

    \b
    Examples: headloom bench examples/gqa.loom --against plain,flex --tokens 1024,4096
              headloom bench --suite cpu
    """
    from .bench import command as measuring

    if (what is None) == (suite is None):
        raise click.UsageError("give a FILE or a --suite")
    apart = measuring.OF_A_FILE if suite is not None else measuring.OF_A_SUITE
    if wrong := [name for name in apart if _was_given(name)]:
        kind = "a FILE; a suite says its own" if suite is not None else "a --suite"
        raise click.UsageError(f"--{wrong[0]} is an option of {kind}")
    try:
        if suite is not None:
            answer: object = measuring.suites(suite, quiet=json, **given)
        else:
            path, name = _split(str(what))
            answer = measuring.file(path, name, quiet=json, **given)
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    if json:
        _print_json(answer)


@command()
@json_option
def doctor(json: bool) -> None:
    """Say what is installed, which devices there are, and what works here.

    Example: headloom doctor
    """
    from .compiler.reports import doctor as examine

    findings = examine.examine()
    if json:
        _print_json([each.to_json() for each in findings])
    else:
        examine.show(findings)
    if any(each.ok is False for each in findings):
        sys.exit(1)


@command()
@click.argument("name", required=False)
@click.option("--tokens", default=4096, show_default=True, help="Length for the costs.")
@json_option
def zoo(name: str | None, tokens: int, json: bool) -> None:
    """List the known mechanisms that come with Headloom, or show one: its text, its picture.

    Example: headloom zoo sparsemax
    """
    from .compiler import zoo as mechanisms
    from .compiler.reports import show as view

    if name is None:
        if json:
            _print_json([mechanisms.row(each, tokens) for each in mechanisms.entries()])
        else:
            mechanisms.show_all(tokens)
        return
    try:
        found = mechanisms.entry(name)
    except LookupError as problem:
        raise click.UsageError(str(problem)) from None
    if json:
        _print_json({**mechanisms.row(found, tokens), "text": found.text})
        return
    click.echo(found.text)
    view.show(found.what(), tokens)

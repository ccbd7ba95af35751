"""The `search` block of a file, read and checked: what a study is going to do.

    plan = read_plan(parse(read("space.loom")), trials=20)
    plan.task.length, plan.objectives[0].label, plan.out

Everything that can be wrong with it is said at once. Reading a plan loads neither torch nor
Optuna, so `headloom check` can do it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..grammar import syntax
from ..grammar.diagnostics import Diagnostic, LoomError, did_you_mean, error
from ..grammar.expr import number
from ..grammar.format import format_loom
from ..grammar.source import Span
from ..grammar.syntax import Expr, Name, Setting, String
from .calls import convert
from .candidate import elaborate
from .choosers import Chooser, First, Random
from .holes import contains_hole, problems
from .objectives import Objective, read_objectives, read_requirement
from .space import draw, search_of
from .tasks import Task, read_task
from .training import Training, read_training

Direction = Literal["maximize", "minimize"]
SAMPLERS = ("random", "tpe")
SETTINGS = ("model", "task", "maximize", "minimize", "require", "train", "trials", "sampler",
            "seed", "out")  # fmt: skip
_HAVE = f"it has {', '.join(SETTINGS)}"
_TRIES = 32  # draws in which the compiler must accept one, before anything is searched


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search and how. `spec` is the text two runs must share to be one study.

    `seed` fixes the draws, and the data and weights where the text gives those no seed.
    """

    file: syntax.File
    spec: str
    model: str
    task: Task
    objectives: tuple[Objective, ...]
    require: Expr | None
    trials: int
    sampler: str
    seed: int
    out: Path

    @property
    def directions(self) -> list[Direction]:
        return ["maximize" if each.maximize else "minimize" for each in self.objectives]

    @property
    def place(self) -> Span:
        """Where the text says what is required: `require`, or else the word `search`."""
        return self.require.span if self.require is not None else _head(_only_search(self.file))

    def candidate(self, chooser: Chooser) -> tuple[syntax.File, Training]:
        """Draw one plain file, without its search block, and how it is to be trained."""
        drawn = draw(self.file, chooser, keep_search=True)
        search = search_of(drawn)
        assert search is not None
        settings = {each.name: each.value for each in search.body if isinstance(each, Setting)}
        items = tuple(each for each in drawn.items if each is not search)
        training = Training(seed=self.seed)
        if "train" in settings:
            training = read_training(settings["train"], self.seed)
        return replace(drawn, items=items, closing=()), training


def read_plan(
    file: syntax.File,
    *,
    trials: int | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
) -> Plan:
    """Return the plan of a file's search block; what is given here goes before the text.

    Raises `LoomError` with everything that is wrong with the holes (L501 to L512), the search
    block (L520 to L531) or, where no draw is an architecture, with the first one.
    """
    if found := problems(file):
        raise LoomError(found)
    search = _only_search(file)
    reader = _Reader(file, search)
    plan = reader.plan(trials, sampler, seed, Path(out) if out is not None else None)
    _try(plan)
    return plan


def _only_search(file: syntax.File) -> syntax.Search:
    blocks = [each for each in file.items if isinstance(each, syntax.Search)]
    if not blocks:
        raise error(
            "L520",
            "this file has no `search` block",
            file.span,
            "",
            "add `search { model = …; task = …; maximize = accuracy }`",
        )
    if len(blocks) > 1:
        raise error("L520", "this file has more than one `search` block", blocks[1].span)
    return blocks[0]


def _try(plan: Plan) -> None:
    """See that the compiler accepts some draw; raise what it says of the first if it does not."""
    first: LoomError | None = None
    choosers: list[Chooser] = [First(), *(Random(index) for index in range(_TRIES - 1))]
    for chooser in choosers:
        try:
            elaborate(plan.candidate(chooser)[0], plan.model)
        except LoomError as problem:
            first = first or problem
        else:
            return
    if first is not None:
        raise first


class _Reader:
    """Reads one search block and collects what is wrong with it."""

    def __init__(self, file: syntax.File, search: syntax.Search) -> None:
        self._file = file
        self._search = search
        self._found: list[Diagnostic] = []
        self._settings: dict[str, Expr] = {}
        for statement in search.body:
            with self._guard():
                self._setting(statement)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except LoomError as problem:
            self._found.extend(problem.diagnostics)

    def _setting(self, statement: syntax.Statement) -> None:
        name = getattr(statement, "name", "")
        if not isinstance(statement, Setting) or name not in SETTINGS:
            raise error(
                "L521",
                f"`search` has no setting `{name or 'like this'}`",
                statement.span,
                "",
                did_you_mean(name, SETTINGS, _HAVE),
            )
        if statement.where is not None:
            raise error(
                "L521",
                f"`{name}` has no condition",
                statement.where.span,
                "",
                "leave the `where` out",
            )
        if name in self._settings:
            raise error("L521", f"`{name}` is set twice", statement.span)
        if name != "train" and contains_hole(statement.value):
            raise error(
                "L531",
                f"`{name}` is the same for the whole search",
                statement.value.span,
                "this is a hole",
                "holes stand in models, blocks and `train`",
            )
        self._settings[name] = statement.value

    def plan(
        self, trials: int | None, sampler: str | None, seed: int | None, out: Path | None
    ) -> Plan:
        for name in ("model", "task"):
            if name not in self._settings:
                self._missing(name)
        model, task, require = "", None, None
        objectives: tuple[Objective, ...] = ()
        with self._guard():
            model = self._model()
        with self._guard():
            if "task" in self._settings:
                task = read_task(self._settings["task"])
        with self._guard():
            objectives = self._objectives()
        with self._guard():
            require = self._settings.get("require")
            require = read_requirement(require) if require is not None else None
        with self._guard():
            trials = self._number("trials", trials, 20, 1)
        with self._guard():
            seed = self._number("seed", seed, 0, 0)
        with self._guard():
            sampler = self._sampler(sampler)
        with self._guard():
            out = out or self._out()
        if not self._found:
            with self._guard():
                self._training()
        if self._found:
            raise LoomError(self._found)
        assert task is not None
        assert sampler is not None
        assert out is not None
        assert trials is not None
        assert seed is not None
        task = read_task(self._settings["task"], seed)
        spec = _spec(self._file, self._search, sampler, seed)
        return Plan(self._file, spec, model, task, objectives, require, trials, sampler, seed, out)

    def _missing(self, name: str) -> None:
        self._found.append(Diagnostic("L522", f"a search needs `{name}`", _head(self._search)))

    def _model(self) -> str:
        value = self._settings.get("model")
        models = [each.name for each in self._file.items if isinstance(each, syntax.Model)]
        if value is None:
            return ""
        if not isinstance(value, Name) or value.id not in models:
            name = value.id if isinstance(value, Name) else "like this"
            have = ", ".join(f"`{each}`" for each in models) or "none"
            raise error(
                "L523",
                f"there is no model `{name}`",
                value.span,
                "",
                did_you_mean(name, models, f"this file has {have}"),
            )
        return value.id

    def _objectives(self) -> tuple[Objective, ...]:
        found: list[Objective] = []
        for name in ("maximize", "minimize"):
            if name in self._settings:
                found.extend(read_objectives(self._settings[name], name == "maximize"))
        labels = [each.label for each in found]
        if not found:
            raise error(
                "L522",
                "a search needs something to `maximize` or `minimize`",
                _head(self._search),
                "",
                "write `maximize = accuracy`",
            )
        if len(set(labels)) < len(labels):
            twice = next(each for each in labels if labels.count(each) > 1)
            raise error("L527", f"`{twice}` is an objective twice", _head(self._search))
        return tuple(found)

    def _number(self, name: str, given: int | None, default: int, low: int) -> int:
        span = _head(self._search)
        if given is None and name in self._settings:
            span = self._settings[name].span
            given = convert(self._settings[name], int, name, "L530")
        value = default if given is None else given
        if value < low:
            raise error("L530", f"`{name}` must be {low} or more", span, f"{name} = {value}")
        return value

    def _sampler(self, given: str | None) -> str:
        value = self._settings.get("sampler")
        span = value.span if value is not None else _head(self._search)
        if given is None:
            given = "tpe" if value is None else str(convert(value, str, "sampler", "L530"))
        if given not in SAMPLERS:
            have = ", ".join(f"`{each}`" for each in SAMPLERS)
            raise error(
                "L530",
                f"there is no sampler `{given}`",
                span,
                "",
                did_you_mean(given, SAMPLERS, f"there are {have}"),
            )
        return given

    def _out(self) -> Path:
        value = self._settings.get("out")
        if value is None:
            return Path("runs") / (Path(self._file.span.source.name).stem.strip("<>") or "search")
        if not isinstance(value, String) or not value.value:
            raise error(
                "L530",
                "`out` is a folder, in double quotes",
                value.span,
                "",
                'write `out = "runs/probe"`',
            )
        return Path(value.value)

    def _training(self) -> None:
        drawn = draw(self._file, First(), keep_search=True)
        search = search_of(drawn)
        for statement in search.body if search is not None else ():
            if isinstance(statement, Setting) and statement.name == "train":
                read_training(statement.value)


def _head(search: syntax.Search) -> Span:
    """Return the span of the word `search` alone, for what the whole block lacks."""
    span = search.span
    return Span(span.source, span.start, min(span.end, span.start + len("search")))


def _spec(file: syntax.File, search: syntax.Search, sampler: str, seed: int) -> str:
    """Return the text of what is searched; how long and where to is not part of it."""
    kept = tuple(
        each
        for each in search.body
        if not (isinstance(each, Setting) and each.name in ("trials", "out", "sampler", "seed"))
    )
    fixed = (Setting("sampler", Name(sampler)), Setting("seed", number(seed)))
    body = replace(search, body=(*kept, *fixed))
    return format_loom(
        replace(file, items=tuple(body if each is search else each for each in file.items))
    )

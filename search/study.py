"""Running a search: ask for a draw, refuse it or train it, tell what came out.

    plan  = read_plan(parse(read("space.loom")), trials=60)
    study = run(plan)                     # goes on where an earlier run stopped
    study = search("space.loom", trials=60)

A trial ends in one of four ways, and the study goes on after each:

    COMPLETE   trained, or its values copied from a trial that means the same (`copied_from`)
    FAIL       training failed: `reason` says how
    PRUNED     refused before training: `reason` says what it breaks; not one of `trials`
    WAITING    the process was stopped; the next run takes it up again
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from ..compiler.model import Architecture, Model
from ..compiler.parse import parse_path
from ..grammar import syntax
from ..grammar.diagnostics import LoomError, error
from ..grammar.format import format_loom
from ..grammar.parse import parse
from . import candidate, report, store
from .objectives import Costs, Violation, violation
from .plan import Plan, read_plan
from .progress import Display, display
from .sampling import Sampler, TrialChooser
from .trainer import TrainingFailed, train
from .training import Training

MAX_REFUSED = 200  # draws in a row that keep nothing of `require`, before we give up


def search(
    what: str | Path | syntax.File | Architecture,
    *,
    trials: int | None = None,
    out: str | Path | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> optuna.Study:
    """Search the space of a file and return the Optuna study.

    `progress` None shows bars on a terminal and lines elsewhere, False nothing. Raises
    `LoomError` (L501 to L545) for what is wrong with the spec or the folder.
    """
    plan = read_plan(_file(what), trials=trials, sampler=sampler, seed=seed, out=out)
    return run(plan, resume=resume, progress=progress)


def _file(what: str | Path | syntax.File | Architecture) -> syntax.File:
    if isinstance(what, Architecture):
        return what.file
    if isinstance(what, syntax.File):
        return what
    return parse_path(what)


def run(plan: Plan, *, resume: bool = True, progress: bool | None = None) -> optuna.Study:
    """Carry a plan out until its study has as many trials as it asks for, and report.

    Ctrl-C ends it early with what is done. Raises `LoomError` (L540 to L545).
    """
    with _quiet(), store.opened(plan, resume=resume) as study:
        runner = _Runner(plan, study)
        with store.writing(plan.out), display(plan.trials, progress) as shown:
            try:
                stopped = runner.all(shown)
            except KeyboardInterrupt:
                shown.says(
                    f"stopped after {done(study)} of {plan.trials} trials; "
                    "the same command goes on from here"
                )
                stopped = None
            report.write(plan, study)
        if stopped is not None:
            raise stopped
    return study


def load(out: str | Path) -> tuple[Plan, optuna.Study]:
    """Return the plan and the study of a folder, to report on them. Raises `LoomError` (L543)."""
    study = store.existing(Path(out))
    return read_plan(parse(study.user_attrs["spec"]), out=out), study


def done(study: optuna.Study) -> int:
    """Return how many trials count: those that were trained, copied or failed."""
    states = (TrialState.COMPLETE, TrialState.FAIL)
    return len(study.get_trials(deepcopy=False, states=states))


@contextmanager
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class _Refused(Exception):
    """A draw that will not be trained; `violation` says why."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.reason)
        self.violation = violation


class _Runner:
    """One process at work on one study."""

    def __init__(self, plan: Plan, study: optuna.Study) -> None:
        self._plan = plan
        self._study = study
        self._sampler = Sampler(plan.sampler, plan.seed)
        study.sampler = self._sampler
        self._refused: Counter[str] = Counter()

    def all(self, shown: Display) -> LoomError | None:
        """Run what is missing; return why it had to stop before."""
        while (count := done(self._study)) < self._plan.trials:
            trial = self._study.ask()
            try:
                self._trial(trial, count, shown)
            except KeyboardInterrupt:
                store.requeue(self._study, trial.storage, trial.number)
                raise
            if self._refused.total() >= MAX_REFUSED:
                reason, times = self._refused.most_common(1)[0]
                return error(
                    "L545",
                    f"{MAX_REFUSED} draws in a row were refused",
                    self._plan.place,
                    f"{times} times: {reason}",
                    "loosen `require`, or narrow the holes",
                )
        return None

    def _trial(self, trial: Trial, count: int, shown: Display) -> None:
        began = time.monotonic()
        try:
            file, training, model, costs = self._draw(trial)
        except _Refused as problem:
            self._refuse(trial, problem.violation)
            return
        self._refused.clear()
        key = candidate.fingerprint(model, self._plan.task.settings, self._plan.task.seed, training)
        trial.set_user_attr("spec", format_loom(file))
        trial.set_user_attr("fingerprint", key)
        shown.begins(count, training.steps)
        twin = self._twin(key)
        if twin is not None:
            trial.set_user_attr("copied_from", twin.number)
            self._study.tell(trial, twin.values)
        else:
            self._train(trial, model, costs, training, shown)
        told = self._study.trials[trial.number]
        line = report.line(self._plan, told, time.monotonic() - began)
        shown.ended(count + 1, line, report.best(self._plan, self._study))

    def _draw(self, trial: Trial) -> tuple[syntax.File, Training, Model, Costs]:
        """Draw and judge, without a weight. Raises `_Refused`."""
        try:
            file, training = self._plan.candidate(TrialChooser(trial, self._sampler))
            model = candidate.elaborate(file, self._plan.model)
        except LoomError as problem:
            first = problem.diagnostics[0]
            reason = f"{first.code}: {first.message}"
            raise _Refused(
                Violation(f"{reason} ({first.label})" if first.label else reason, 1.0)
            ) from None
        if reason := self._plan.task.misfit(
            model.vocab, model.positions, str(model.head.out.shape)
        ):
            raise _Refused(Violation(reason, 1.0))
        costs = candidate.costs(model)
        if self._plan.require is not None and (broken := violation(self._plan.require, costs)):
            raise _Refused(broken)
        return file, training, model, costs

    def _refuse(self, trial: Trial, problem: Violation) -> None:
        self._refused[problem.reason] += 1
        trial.set_user_attr("reason", problem.reason)
        if "require" not in self._study.trials[trial.number].constraints:
            trial.set_constraint("require", problem.by)
        self._study.tell(trial, state=TrialState.PRUNED)

    def _twin(self, key: str) -> FrozenTrial | None:
        """Return a trial that was trained and means the same."""
        for other in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if other.user_attrs["fingerprint"] == key and "copied_from" not in other.user_attrs:
                return other
        return None

    def _train(
        self, trial: Trial, model: Model, costs: Costs, training: Training, shown: Display
    ) -> None:
        began = time.monotonic()
        trial.set_user_attr("pid", os.getpid())
        try:
            network = candidate.build(model, training.seed)
            metrics = {}
            if any(each.measured for each in self._plan.objectives):
                metrics = train(network, self._plan.task, training, shown.stepped)
            values = [each.of(costs, metrics) for each in self._plan.objectives]
        except TrainingFailed as problem:
            self._fail(trial, str(problem))
            return
        except Exception as problem:  # a trial must not end the study; the reason is kept
            self._fail(trial, f"{type(problem).__name__}: {problem}")
            return
        trial.set_user_attr("metrics", metrics)
        trial.set_user_attr("seconds", round(time.monotonic() - began, 3))
        report.save_weights(self._plan.out, trial.number, network)
        self._study.tell(trial, values)
        report.keep_front(self._plan.out, self._study)

    def _fail(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr("reason", reason[:2000])
        self._study.tell(trial, state=TrialState.FAIL)

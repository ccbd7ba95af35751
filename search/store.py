"""The folder of a study: who may write to it, and what survives a killed process.

    runs/probe/study.log       Optuna's journal, appended to
    runs/probe/study.lock      held by the process that searches
    runs/probe/weights/        of the trials on the current front
    runs/probe/pareto/  best/  written at the end

The lock belongs to the operating system and ends with its process, so whoever holds it knows
that a trial still marked as running was interrupted. Such a trial goes back to waiting: it
runs again under its own number with the choices it had.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..grammar.diagnostics import LoomError, error
from ..grammar.source import Source, Span
from .plan import Plan

NAME = "search"


@contextmanager
def opened(plan: Plan, *, resume: bool) -> Iterator[optuna.Study]:
    """Open or begin the study of a plan, alone.

    Raises `LoomError`: L540 the folder cannot be written, L541 it holds the study of another
    spec, L542 another process is searching in it, L544 it holds a study and `resume` is false.
    """
    with writing(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
        lock = os.open(plan.out / "study.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _claim(lock, plan.out)
        with writing(plan.out):
            existed = _mend(journal(plan.out))
            if existed and not resume:
                raise _about(
                    plan.out,
                    "L544",
                    "there is a study already",
                    "resume it, or name another folder with `out`",
                )
            storage = JournalStorage(JournalFileBackend(str(journal(plan.out))))
            study = optuna.create_study(
                storage=storage, study_name=NAME, directions=plan.directions, load_if_exists=True
            )
            _same_spec(plan, study)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                requeue(study, storage, trial.number)
        yield study
    finally:
        os.close(lock)


def journal(out: Path) -> Path:
    return out / "study.log"


def existing(out: Path) -> optuna.Study:
    """Return the study in a folder, to read it. Raises `LoomError` (L543) if there is none."""
    if not journal(out).is_file() or not journal(out).stat().st_size:
        raise _about(out, "L543", "there is no study here", "run `headloom search` first")
    storage = JournalStorage(JournalFileBackend(str(journal(out))))
    return optuna.load_study(study_name=NAME, storage=storage)


def requeue(study: optuna.Study, storage: optuna.storages.BaseStorage, number: int) -> None:
    """Put an interrupted trial back, so that the next `ask` runs it under the same number."""
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    storage.set_trial_state_values(trial_id, TrialState.WAITING)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what the operating system says about the folder into a diagnostic."""
    try:
        yield
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise _about(
            out,
            "L540",
            f"cannot write to `{problem.filename or out}`",
            "make room or name another folder with `out`; what is done is kept",
            reason,
        ) from None


def _about(out: Path, code: str, message: str, help: str, label: str = "") -> LoomError:
    return error(code, message, Span(Source(str(out), ""), 0, 0), label or f"in {out}", help)


def _claim(lock: int, out: Path) -> None:
    try:
        _exclusive(lock)
    except OSError:
        raise _about(
            out,
            "L542",
            "another process is searching in this folder",
            "wait for it, or name another folder with `out`",
        ) from None


if sys.platform == "win32":
    import msvcrt

    def _exclusive(lock: int) -> None:
        msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _exclusive(lock: int) -> None:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _mend(path: Path) -> bool:
    """Remove what a killed process left half done; say whether there is a study.

    That is the journal's own lock, which nobody will release, and a last line without an end,
    which Optuna would glue the next record to.
    """
    for left in path.parent.glob(f"{path.name}.lock*"):
        left.unlink()
    if not path.is_file():
        return False
    with path.open("r+b") as file:
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            file.truncate(end)
    return end > 0


def _same_spec(plan: Plan, study: optuna.Study) -> None:
    kept = study.user_attrs.get("spec")
    if kept is None:
        study.set_user_attr("spec", plan.spec)
        return
    if kept != plan.spec:
        lines = difflib.ndiff(kept.splitlines(), plan.spec.splitlines())
        changed = [line for line in lines if line[:1] in "+-"]
        label = "; ".join(" ".join(line.split()) for line in changed[:4])
        raise _about(
            plan.out,
            "L541",
            "the study in this folder searches something else",
            "undo the change, or name another folder with `out`",
            label,
        )

"""What a search leaves behind: the Pareto front as plain specs, the best ones built.

    runs/probe/pareto/01_trial_7.loom          a plain spec, its values in the first lines
    runs/probe/best/01_trial_7.py              the module as a standalone file
    runs/probe/best/01_trial_7.safetensors     its trained weights

The front is ordered by the first objective, the best first.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..grammar.parse import parse
from . import candidate
from .plan import Plan

if TYPE_CHECKING:
    from torch import nn

BEST = 3  # how many of the front are built and exported


def front(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials no other trial beats, best first objective first, no copies."""
    trials = [each for each in study.best_trials if "copied_from" not in each.user_attrs]
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    return sorted(trials, key=lambda each: (sign * each.values[0], each.number))


# ── weights ──────────────────────────────────────────────────────────────────────────────


def weights_of(out: Path, number: int) -> Path:
    return out / "weights" / f"trial_{number}.safetensors"


def save_weights(out: Path, number: int, network: nn.Module) -> None:
    """Write a trial's weights; a process killed meanwhile leaves no half file under the name."""
    from safetensors.torch import save_model

    path = weights_of(out, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    save_model(network, str(half))
    half.replace(path)


def keep_front(out: Path, study: optuna.Study) -> None:
    """Delete the weights of trials that are no longer on the front."""
    kept = {weights_of(out, each.number) for each in front(study)}
    for path in (out / "weights").glob("*"):
        if path not in kept:
            path.unlink(missing_ok=True)


# ── the folder ───────────────────────────────────────────────────────────────────────────


def write(plan: Plan, study: optuna.Study) -> None:
    """Write `pareto/` and `best/` anew from the study."""
    pareto, best = plan.out / "pareto", plan.out / "best"
    for folder in (pareto, best):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for rank, trial in enumerate(front(study), 1):
        name = f"{rank:02d}_trial_{trial.number}"
        text = _header(plan, trial) + trial.user_attrs["spec"]
        (pareto / f"{name}.loom").write_text(text, encoding="utf-8")
        if rank <= BEST:
            _export(plan, trial, best / name)


def _header(plan: Plan, trial: FrozenTrial) -> str:
    lines = [f"# Trial {trial.number} of the search for `{plan.model}`."]
    lines += [f"# {each.label} = {_shown(value)}" for each, value in _values(plan, trial)]
    return "\n".join(lines) + "\n\n"


def _export(plan: Plan, trial: FrozenTrial, stem: Path) -> None:
    model = candidate.elaborate(parse(trial.user_attrs["spec"]), plan.model)
    stem.with_suffix(".py").write_text(candidate.emit(model), encoding="utf-8")
    weights = weights_of(plan.out, trial.number)
    if weights.is_file():
        shutil.copyfile(weights, stem.with_suffix(".safetensors"))


# ── for people and programs ──────────────────────────────────────────────────────────────


def show(plan: Plan, study: optuna.Study, console: Console | None = None) -> None:
    """Print the front as a table on stdout, and where its files are."""
    console = console or Console()
    table = Table(title=f"{plan.model}: {_counts(study)}", title_justify="left")
    table.add_column("trial", justify="right")
    for each in plan.objectives:
        table.add_column(f"{each.label} {'↑' if each.maximize else '↓'}", justify="right")
    table.add_column("drawn")
    for trial in front(study):
        values = [_shown(value) for _, value in _values(plan, trial)]
        table.add_row(str(trial.number), *values, escape(_drawn(trial)))
    console.print(table)
    console.print(
        f"specs in {plan.out / 'pareto'}, modules in {plan.out / 'best'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def summary(plan: Plan, study: optuna.Study) -> dict[str, Any]:
    """Return the outcome as plain data, for `--json`."""
    states = [each.state for each in study.get_trials(deepcopy=False)]
    return {
        "model": plan.model,
        "out": str(plan.out),
        "trials": plan.trials,
        "objectives": [
            {"name": each.label, "direction": "maximize" if each.maximize else "minimize"}
            for each in plan.objectives
        ],
        "complete": states.count(TrialState.COMPLETE),
        "failed": states.count(TrialState.FAIL),
        "infeasible": states.count(TrialState.PRUNED),
        "front": [
            {
                "trial": trial.number,
                "values": {each.label: value for each, value in _values(plan, trial)},
                "params": _params(trial),
                "spec": f"pareto/{rank:02d}_trial_{trial.number}.loom",
            }
            for rank, trial in enumerate(front(study), 1)
        ],
        "failures": [
            {"trial": each.number, "reason": each.user_attrs.get("reason", "")}
            for each in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        ],
    }


def line(plan: Plan, trial: FrozenTrial, seconds: float) -> str:
    """Say in one line how a trial ended."""
    if trial.state == TrialState.FAIL:
        told = f"failed: {trial.user_attrs['reason'].splitlines()[0]}"
    else:
        told = ", ".join(f"{each.label} = {_shown(value)}" for each, value in _values(plan, trial))
        if (twin := trial.user_attrs.get("copied_from")) is not None:
            told += f" (the same as trial {twin})"
    return f"trial {trial.number}: {told}, {seconds:.1f} s"


def best(plan: Plan, study: optuna.Study) -> str:
    """Say what the best of the first objective is so far."""
    found = front(study)
    return f"best {plan.objectives[0].label} {_shown(found[0].values[0])}" if found else ""


def _values(plan: Plan, trial: FrozenTrial) -> list[tuple[Any, float]]:
    return list(zip(plan.objectives, trial.values, strict=True))


def _drawn(trial: FrozenTrial) -> str:
    """Say what was drawn; a choice with draws of its own is said by them."""
    params = _params(trial)
    kept = (
        (name, value)
        for name, value in params.items()
        if not any(other.startswith((f"{name}.", f"{name}[")) for other in params)
    )
    return ", ".join(f"{name} = {value}" for name, value in kept)


def _params(trial: FrozenTrial) -> dict[str, Any]:
    return dict(trial.params)


def _shown(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4g}"


def _counts(study: optuna.Study) -> str:
    states = [each.state for each in study.get_trials(deepcopy=False)]
    parts = (
        (states.count(TrialState.COMPLETE), "complete"),
        (states.count(TrialState.FAIL), "failed"),
        (states.count(TrialState.PRUNED), "refused before training"),
    )
    return ", ".join(f"{count} {what}" for count, what in parts if count or what == "complete")

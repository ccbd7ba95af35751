"""Optuna as the chooser: what draws a trial's holes.

Each trial draws from numbers of its own (the study's seed and the trial's number), so what a
trial becomes does not depend on how often the process was stopped before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from .choosers import Choice, Random

STARTUP = 10  # trials drawn at random before TPE has something to learn from


class TrialChooser:
    """Asks a trial. Categories are recorded by their text; weights go to the sampler."""

    def __init__(self, trial: Trial, sampler: Sampler) -> None:
        self._trial = trial
        self._sampler = sampler

    def category(self, name: str, choices: tuple[Choice, ...], weights: tuple[float, ...]) -> int:
        self._sampler.weights[name] = weights
        return choices.index(self._trial.suggest_categorical(name, choices))

    def integer(self, name: str, low: int, high: int) -> int:
        return self._trial.suggest_int(name, low, high)

    def real(self, name: str, low: float, high: float, log: bool) -> float:
        return self._trial.suggest_float(name, low, high, log=log)


class Sampler(BaseSampler):
    """`random`, or `tpe` after a random start; seeded anew for each trial.

    Optuna's own samplers draw from one stream, which a resumed study would draw again from
    the beginning; and they know no weights.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._seed = seed
        self._inner: BaseSampler = RandomSampler(seed)
        self._weighted = True
        self.weights: dict[str, tuple[float, ...]] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose how this trial is drawn, from the trials below its number alone."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self._weighted = self._kind == "random" or len(done) < STARTUP
        seed = _mixed(self._seed, trial.number)
        if self._weighted:
            self._inner = RandomSampler(seed)
        else:
            self._inner = TPESampler(seed=seed, n_startup_trials=1)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if not self._weighted:
            return self._inner.sample_independent(study, trial, param_name, param_distribution)
        if isinstance(param_distribution, CategoricalDistribution):
            chooser = Random(f"{self._seed}:{trial.number}")
            choices = param_distribution.choices
            weights = self.weights.get(param_name, ())
            return choices[chooser.category(param_name, tuple(map(str, choices)), weights)]
        own = RandomSampler(_mixed(self._seed, trial.number, param_name))
        return own.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


def _mixed(*parts: object) -> int:
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")

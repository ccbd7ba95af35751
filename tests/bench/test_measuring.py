"""Times are taken in turn; no test looks at a real clock."""

from __future__ import annotations

from collections.abc import Callable

from headloom.bench.measuring import Timed, calls_for, ceiling, interleaved


class Clock:
    """A clock that the runs themselves move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> Callable[[], None]:
        def go() -> None:
            self.order.append(name)
            self.now += seconds

        return go


def test_everyone_once_in_every_repetition() -> None:
    clock = Clock()
    timed = {"a": Timed(clock.run("a", 1.0)), "b": Timed(clock.run("b", 3.0))}
    assert interleaved(timed, 6, clock) == {"a": (1.0,) * 6, "b": (3.0,) * 6}
    rounds = {"".join(clock.order[at : at + 2]) for at in range(0, 12, 2)}
    assert rounds == {"ab", "ba"}


def test_a_sample_of_several_runs_is_of_one_and_one_more_goes_before() -> None:
    clock = Clock()
    assert interleaved({"a": Timed(clock.run("a", 0.5), calls=4)}, 2, clock) == {"a": (0.5, 0.5)}
    assert len(clock.order) == 10


def test_waiting_is_part_of_a_sample() -> None:
    clock = Clock()
    timed = Timed(clock.run("a", 1.0), wait=clock.run("wait", 0.25))
    assert interleaved({"a": timed}, 1, clock) == {"a": (1.25,)}


def test_short_runs_are_repeated() -> None:
    assert calls_for(1.0) == 1
    assert calls_for(0.04) == 5
    assert calls_for(0.0) == 200


def test_ceiling() -> None:
    assert ceiling("float32", "cpu", 16) > 0

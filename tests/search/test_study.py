from __future__ import annotations

import pytest
from optuna.trial import TrialState

from headloom.grammar.diagnostics import LoomError
from headloom.search import candidate, report, study, trainer
from headloom.search.study import done, load, run


def states(found) -> list[str]:
    return [each.state.name for each in found.trials]


def draws(found) -> list[dict]:
    return [each.params for each in found.trials]


def never(*_, **__):
    raise AssertionError("this must not train")


def test_a_study_has_the_trials_it_was_asked_for_and_then_only_reports(plan, monkeypatch):
    found = run(plan(), progress=False)
    assert states(found) == ["COMPLETE"] * 4
    monkeypatch.setattr(study, "train", never)
    before = draws(found)
    assert draws(run(plan(), progress=False)) == before
    monkeypatch.undo()
    more = run(plan(trials=6), progress=False)
    assert draws(more)[:4] == before
    assert done(more) == 6


def test_the_same_seed_makes_the_same_study_however_often_it_is_stopped(plan, tmp_path):
    whole = run(plan(trials=5, seed=3), progress=False)
    for trials in range(1, 6):
        parts = run(plan(trials=trials, seed=3, out=tmp_path / "parts"), progress=False)
    assert draws(parts) == draws(whole)
    assert [each.values for each in parts.trials] == [each.values for each in whole.trials]
    other = run(plan(trials=5, seed=4, out=tmp_path / "other"), progress=False)
    assert draws(other) != draws(whole)


def test_tpe_takes_both_objectives_and_refused_draws(plan):
    settings = "require = cache_bytes(tokens = 64) <= 6K"
    found = run(plan(settings, sampler="tpe", trials=14), progress=False)
    assert done(found) == 14
    assert len(found.directions) == 2


def test_refused_draws_never_train_and_do_not_count(plan, monkeypatch):
    trained = []

    def recorded(module, *rest):
        trained.append(module)
        return trainer.train(module, *rest)

    monkeypatch.setattr(study, "train", recorded)
    found = run(plan("require = cache_bytes(tokens = 64) < 4K", trials=3), progress=False)
    refused = [each for each in found.trials if each.state == TrialState.PRUNED]
    assert refused
    assert done(found) == 3
    assert len(trained) <= 3
    for each in refused:
        assert "cache_bytes(tokens = 64) < 4K does not hold" in each.user_attrs["reason"]
        assert each.constraints["require"] > 0
    assert all(each.values[1] < 4096 for each in found.trials if each.values)


def test_a_requirement_nothing_keeps_ends_the_search(plan, monkeypatch):
    monkeypatch.setattr(study, "MAX_REFUSED", 12)
    monkeypatch.setattr(study, "train", never)
    with pytest.raises(LoomError, match="12 draws in a row were refused") as caught:
        run(plan("require = params < 1"), progress=False)
    assert caught.value.diagnostics[0].code == "L545"


def test_a_draw_the_compiler_refuses_is_refused_with_its_reason(text, tmp_path):
    spec = text().replace("heads = choose(1, 2)", "heads = choose(1, 2, 3)")
    path = tmp_path / "space.loom"
    path.write_text(spec.replace("mask = causal }", "mask = causal; kv_heads = 2 }"))
    found = study.search(path, trials=3, out=tmp_path / "out", progress=False)
    refused = [each for each in found.trials if each.state == TrialState.PRUNED]
    assert any("must divide" in each.user_attrs["reason"] for each in refused)
    assert done(found) == 3


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (RuntimeError("no room"), "RuntimeError: no room"),
        (
            trainer.TrainingFailed("diverged: the loss is nan"),
            "diverged: the loss is nan",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(plan, monkeypatch, problem, reason):
    calls = []

    def fails_once(*rest):
        calls.append(rest)
        if len(calls) == 1:
            raise problem
        return trainer.train(*rest)

    monkeypatch.setattr(study, "train", fails_once)
    made = plan()
    found = run(made, progress=False)
    assert states(found) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert found.trials[0].user_attrs["reason"].startswith(reason)
    assert report.summary(made, found)["failures"][0]["reason"].startswith(reason)


def test_divergence_is_noticed(plan):
    wild = "train = adamw(lr = 1e30, steps = 4, batch = 4, clip = 1e30, schedule = constant)"
    assert states(run(plan(train=wild, trials=1), progress=False)) == ["FAIL"]


def test_a_slow_trial_runs_out_of_time(plan):
    slow = "train = adamw(steps = 100_000, batch = 4, timeout = 0.05)"
    found = run(plan(train=slow, trials=1), progress=False)
    assert found.trials[0].user_attrs["reason"].startswith("out of time: 0.05 s")


def test_what_means_the_same_is_trained_once(plan, monkeypatch):
    trained = []

    def recorded(module, task, training, on_step=None):
        trained.append(module)
        return trainer.train(module, task, training, on_step)

    monkeypatch.setattr(study, "train", recorded)
    fixed = "train = adamw(lr = 1e-2, steps = 2, batch = 4, examples = 16)"
    made = plan(train=fixed, trials=30)
    found = run(made, progress=False)
    keys = {each.user_attrs["fingerprint"] for each in found.trials}
    assert done(found) == 30
    assert len(trained) == len(keys) < 30
    for each in found.trials:
        if (twin := each.user_attrs.get("copied_from")) is not None:
            assert each.values == found.trials[twin].values
            assert each.number not in {point.number for point in report.front(found)}


def test_a_fingerprint_is_of_the_meaning():
    from headloom.grammar.parse import parse

    def key(body, name="a", settings=()):
        text = f"block {name} {{ heads = 2; {body} }}\nmodel m {{ width = 8; layers = [{name}] }}"
        return candidate.fingerprint(candidate.elaborate(parse(text), "m"), *settings)

    same = key("mask = causal and window(16)")
    assert key("mask = causal and window(2 * 8)", "b") == same
    assert key("kv_heads = 2; mask = j <= i and abs(i - j) < 16") == same
    assert key("mask = causal and window(8)") != same
    assert key("mask = causal and window(16)", settings=(1,)) != same


def test_ctrl_c_ends_with_what_is_done_and_goes_on_later(plan, monkeypatch, capsys):
    calls = []

    def interrupted(*rest):
        calls.append(rest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trainer.train(*rest)

    monkeypatch.setattr(study, "train", interrupted)
    found = run(plan())
    assert states(found) == ["COMPLETE", "COMPLETE", "WAITING"]
    assert "stopped after 2 of 4 trials" in capsys.readouterr().err
    stopped = found.trials[2].params
    found = run(plan(), progress=False)
    assert states(found) == ["COMPLETE"] * 4
    assert found.trials[2].params == stopped


def test_a_line_for_each_trial_where_there_is_no_terminal(plan, capsys):
    run(plan())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"trial {number}" for number in range(4)]
    assert "accuracy = " in lines[0]


def test_bars_on_a_terminal(plan, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    run(plan())
    shown = capsys.readouterr().err
    assert "trials" in shown
    assert "trial 3: accuracy = " in shown


def test_a_folder_can_be_read_again(plan):
    made = plan()
    found = run(made, progress=False)
    again, kept = load(made.out)
    assert report.summary(again, kept)["front"] == report.summary(made, found)["front"]
    with pytest.raises(LoomError, match="there is no study here"):
        load(made.out / "elsewhere")

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headloom.grammar.diagnostics import LoomError
from headloom.search.store import journal, opened
from headloom.search.study import done, run, search

STEPS = "train = adamw(lr = loguniform(1e-3..1e-2), steps = 40, batch = 4, examples = 16)"


def code(of) -> str:
    return of.value.diagnostics[0].code


def test_a_changed_spec_is_refused_and_says_what_changed(plan):
    run(plan(trials=1), progress=False)
    with pytest.raises(LoomError) as caught:
        run(plan("require = params < 1M", trials=1), progress=False)
    assert code(caught) == "L541"
    assert "require" in str(caught.value)


def test_a_study_is_not_begun_twice(plan):
    run(plan(trials=1), progress=False)
    with pytest.raises(LoomError) as caught:
        run(plan(trials=1), resume=False, progress=False)
    assert code(caught) == "L544"


def test_one_process_at_a_time(plan):
    with opened(plan(), resume=True), pytest.raises(LoomError) as caught:
        run(plan(), progress=False)
    assert code(caught) == "L542"


def test_a_folder_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoomError) as caught:
        run(plan(out=tmp_path / "file" / "out"), progress=False)
    assert code(caught) == "L540"
    assert "cannot write" in str(caught.value)


def test_a_full_disk_is_said_plainly(plan, monkeypatch):
    import errno

    from headloom.search import report

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    made = plan(trials=2)
    with monkeypatch.context() as patched:
        patched.setattr(report, "save_weights", full)
        with pytest.raises(LoomError, match="no space left on device") as caught:
            run(made, progress=False)
    assert code(caught) == "L540"
    assert done(run(made, progress=False)) == 2


def test_half_a_line_and_a_lock_of_the_dead_are_mended(plan):
    made = plan(trials=2)
    run(made, progress=False)
    with journal(made.out).open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    os.symlink("gone", f"{journal(made.out)}.lock")
    began = time.monotonic()
    found = run(plan(trials=3), progress=False)
    assert time.monotonic() - began < 20
    assert done(found) == len(found.trials) == 3


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_like_one_that_was_not(text, tmp_path):
    spec, out = tmp_path / "space.loom", tmp_path / "killed"
    spec.write_text(text(train=STEPS))
    command = (
        f"from headloom.search.study import search; "
        f"search({str(spec)!r}, trials=6, out={str(out)!r}, progress=False)"
    )
    for finished in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", command], start_new_session=True)
        _wait_until_trial_runs(journal(out), after=finished, process=process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = search(spec, trials=6, out=out, progress=False)
    assert [each.state.name for each in found.trials] == ["COMPLETE"] * 6
    trained = [
        each.user_attrs["fingerprint"]
        for each in found.trials
        if "copied_from" not in each.user_attrs
    ]
    assert len(set(trained)) == len(trained)
    whole = search(spec, trials=6, out=tmp_path / "whole", progress=False)
    assert [each.params for each in whole.trials] == [each.params for each in found.trials]
    assert [each.values for each in whole.trials] == [each.values for each in found.trials]


def _wait_until_trial_runs(path, after, process):
    """Wait until some trials are complete and another has begun to train."""
    for _ in range(6000):
        time.sleep(0.01)
        assert process.poll() is None, "the search ended before it could be killed"
        if not path.is_file():
            continue
        records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        ended = sum(each["op_code"] == 6 and each["state"] == 1 for each in records)
        begun = any("pid" in each.get("user_attr", {}) for each in records[-1:])
        if ended >= after and begun:
            return
    raise AssertionError("no trial began")

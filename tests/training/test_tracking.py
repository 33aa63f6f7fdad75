"""What a run records survives a kill, and is complete whatever its views do."""

import json
import time

from moe_ext.config import AlertConfig, TrackingConfig
from moe_ext.training.tracking import JsonLines, Progress, Tracker, flatten

QUIET = TrackingConfig(wandb=False, progress=False)


def _lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def test_a_torn_line_is_ended_before_the_next(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b')
    lines = JsonLines(path)
    lines.write({"a": 3})
    lines.close()
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first) == {"a": 1}
    assert torn == '{"a": 2, "b'
    assert json.loads(last) == {"a": 3}


def test_what_json_lacks_becomes_null(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"a": float("nan"), "b": [float("inf"), 1], "c": {1: 2.5}})
    assert _lines(tmp_path / "m.jsonl") == [{"a": None, "b": [None, 1], "c": {"1": 2.5}}]


def test_nested_numbers_get_slashed_names():
    values = {"loss": {"nll": 1.5}, "load": {3: 1.0}, "list": [4, 5], "text": "x", "flag": True}
    assert flatten(values) == {"loss/nll": 1.5, "load/3": 1.0, "list/0": 4, "list/1": 5}


def test_other_ranks_record_nothing(tmp_path):
    tracker = Tracker(tmp_path / "run", {}, TrackingConfig(wandb=True), rank=1)
    tracker.enter("a")
    tracker.step({"stage": "a", "step": 1}, 1)
    with tracker.progress("a", 3) as show:
        show(1, "note")
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_progress_is_lines_with_the_time_left(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("moe_ext.training.tracking.time.monotonic", lambda: clock[0])
    progress = Progress("tune", 10, done=2)
    for done in (3, 4):  # the second comes too soon for a line of its own
        clock[0] += 2.0
        progress.update(done, "loss 1")
    clock[0] += 10.0
    progress.update(6, "loss 0.5")
    progress.update(10, "loss 0.1")
    assert capsys.readouterr().out.splitlines() == [
        "[tune] 3/10, 0:14 left  loss 1",
        "[tune] 6/10, 0:14 left  loss 0.5",
        "[tune] 10/10  loss 0.1",
    ]


def _record(step, nll=2.0, stage="tune", **more):
    usual = {"grad_norm": 1.0, "data_wait_s": 0.0, "step_s": 1.0}
    return {"stage": stage, "step": step, "loss": {"nll": nll}} | usual | more


def test_history_has_each_step_once_and_the_later_line_counts(tmp_path):
    tracker = Tracker(tmp_path, {}, QUIET)
    tracker.step(_record(1, stage="align"), 11)
    for step, nll in ((1, 3.0), (2, 9.0), (3, 9.0), (2, 2.0), (3, 1.0)):  # killed and resumed
        tracker.step(_record(step, nll), 10 + step)
    found = [(step, values["loss/nll"]) for step, values in tracker.history("tune")]
    assert found == [(11, 3.0), (12, 2.0), (13, 1.0)]
    assert "step" not in next(iter(tracker.history("align")))[1]


def test_an_alert_is_a_line_and_an_event(tmp_path, capsys):
    settings = TrackingConfig(wandb=False, progress=False, alerts=AlertConfig(window=2))
    tracker = Tracker(tmp_path, {}, settings)
    tracker.enter("tune")
    for step, nll in ((1, 2.0), (2, 2.0), (3, 3.5)):
        tracker.step(_record(step, nll), step)
    (event,) = [r for r in _lines(tmp_path / "metrics.jsonl") if r["event"] == "alert"]
    assert event["rule"] == "loss_spike"
    assert event["text"] in capsys.readouterr().out


def test_silence_inside_a_stage_is_an_alert_and_a_step_ends_it(tmp_path):
    settings = TrackingConfig(wandb=False, progress=False, alerts=AlertConfig(stalled_s=0.4))
    tracker = Tracker(tmp_path, {}, settings)
    tracker.enter("tune")
    with tracker.watching():
        for _ in range(6):  # 0.6 s of steps, none of them logged: no alert
            tracker.alive()
            time.sleep(0.1)
        quiet = _lines(tmp_path / "metrics.jsonl")
        time.sleep(1.2)
    time.sleep(0.6)  # nobody listens any more
    assert quiet == []
    alerts = [r for r in _lines(tmp_path / "metrics.jsonl") if r["event"] == "alert"]
    assert [a["rule"] for a in alerts] == ["stalled"]
    assert "tracking.alerts.stalled_s=0.4" in alerts[0]["text"]

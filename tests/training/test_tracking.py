"""What a run records survives a kill, and no view of it can stop a run."""

import json
import sys
import types

import pytest

from moe_ext.training.tracking import JsonLines, Progress, Tracker, Wandb, flatten


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
    tracker = Tracker(tmp_path / "run", {}, rank=1, wandb=True)
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


class _FakeRun:
    def __init__(self, error=None):
        self.error, self.logged, self.finished = error, [], False

    def log(self, values, step):
        if self.error:
            raise self.error
        self.logged.append((step, values))

    def finish(self):
        if self.error:
            raise self.error
        self.finished = True


def _fake_wandb(monkeypatch, outcomes):
    """A wandb whose `init` meets each of `outcomes` in turn: a run, or an exception."""
    module = types.ModuleType("wandb")
    module.calls = []

    def init(**options):
        module.calls.append(options)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    module.init = init
    module.Settings = lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def _open(tmp_path, said):
    return Wandb(tmp_path, {"a": 1}, project="p", name="n", say=said.append)


def test_without_a_network_wandb_goes_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run, said = _FakeRun(), []
    module = _fake_wandb(monkeypatch, [RuntimeError("timed out\nmore"), run])
    wandb = _open(tmp_path, said)
    wandb.log({"x": 1}, 3)
    wandb.finish()
    assert [call["mode"] for call in module.calls] == ["online", "offline"]
    assert run.logged == [(3, {"x": 1})]
    assert run.finished
    assert said[0] == "W&B online failed: RuntimeError: timed out"
    settings = module.calls[0]["settings"]
    assert settings["init_timeout"] <= 15
    assert settings["finish_timeout"] <= 30  # its default waits for ever


def test_without_a_key_wandb_is_offline_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    module = _fake_wandb(monkeypatch, [_FakeRun()])
    _open(tmp_path, [])
    assert [call["mode"] for call in module.calls] == ["offline"]


def test_the_run_keeps_its_id_over_restarts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    module = _fake_wandb(monkeypatch, [_FakeRun(), _FakeRun()])
    first, second = _open(tmp_path, []), _open(tmp_path, [])
    assert first.id == second.id
    assert module.calls[0]["id"] == module.calls[1]["id"]


@pytest.mark.parametrize("error", [ConnectionResetError("its service died"), OSError(28, "full")])
def test_a_failing_wandb_turns_itself_off(tmp_path, monkeypatch, error):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _fake_wandb(monkeypatch, [_FakeRun(error)])
    said = []
    wandb = _open(tmp_path, said)
    for step in range(3):
        wandb.log({"x": 1}, step)
    wandb.finish()
    assert len([text for text in said if "off from here on" in text]) == 1


def test_wandb_that_never_starts_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _fake_wandb(monkeypatch, [RuntimeError("no")])
    wandb = _open(tmp_path, [])
    wandb.log({"x": 1}, 1)
    wandb.finish()


def test_the_record_is_complete_when_every_view_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _fake_wandb(monkeypatch, [_FakeRun(ConnectionResetError("died"))])
    tracker = Tracker(tmp_path, {}, wandb=True, bars=False)
    for step in (1, 2):
        tracker.step({"stage": "tune", "step": step, "loss": {"nll": 2.0}}, step)
    tracker.stage({"stage": "tune", "minutes": 1})
    tracker.close()
    assert [r["event"] for r in _lines(tmp_path / "metrics.jsonl")] == ["step", "step", "stage"]


@pytest.mark.slow
def test_the_real_wandb_records_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    wandb = _open(tmp_path, said)
    wandb.log({"loss": 1.0}, 1)
    wandb.finish()
    assert not [text for text in said if "fail" in text or "off from" in text]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))

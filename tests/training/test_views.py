"""W&B and TensorBoard are views: made whole from the JSONL, without secrets, and unable to stop a run."""

import sys
import threading
import time
import types
from pathlib import Path

import pytest

from moe_ext.training.redact import without_secrets
from moe_ext.training.views import ID_FILE, TensorBoard, Wandb


@pytest.fixture(autouse=True)
def _own_data_dir(monkeypatch):
    """A view that is opened sets it for its process; tests after these get their own."""
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.delenv("WANDB_DATA_DIR")


class FakeRun:
    """What wandb.init returns; `step` is what the server has already."""

    def __init__(self, error=None, step=0):
        self.error, self.step, self.resumed = error, step, step > 0
        self.logged, self.alerts, self.code, self.preempting = [], [], None, False

    def log(self, values, step):
        if self.error:
            raise self.error
        self.logged.append((step, values))

    def alert(self, title, text, level):
        self.alerts.append(title)

    def mark_preempting(self):
        self.preempting = True

    def finish(self, exit_code=0):
        if self.error:
            raise self.error
        self.code = exit_code


def _fake(monkeypatch, outcomes, key=""):
    """A wandb whose `init` meets each of `outcomes` in turn: a run, or an exception."""
    module = types.ModuleType("wandb")
    module.calls = []

    def init(**options):
        module.calls.append(options)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        folder = Path(options["dir"]) / "wandb" / f"offline-run-{len(module.calls)}-{options['id']}"
        if options["mode"] == "offline":
            folder.mkdir(parents=True)
        return outcome

    module.init, module.Settings = init, lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setenv("WANDB_API_KEY", key)
    return module


def _open(folder, said, **options):
    view = Wandb(folder, {"a": 1}, project="p", say=said.append, **options)
    view.enter("tune")
    return view


def test_without_a_network_it_goes_offline_and_later_stages_do_not_wait_again(
    tmp_path, monkeypatch
):
    run, later, said = FakeRun(), FakeRun(), []
    module = _fake(monkeypatch, [RuntimeError("timed out\nmore"), run, later], key="k" * 40)
    view = _open(tmp_path, said)
    view.log({"x": 1}, 3)
    view.enter("last")
    view.log({"x": 2}, 4)
    view.finish()
    assert [call["mode"] for call in module.calls] == ["online", "offline", "offline"]
    assert run.logged == [(3, {"x": 1})]
    assert (run.code, later.code) == (0, 0)
    assert said[0] == "W&B online failed: RuntimeError: timed out"
    settings = module.calls[0]["settings"]
    assert settings["init_timeout"] <= 15
    assert settings["finish_timeout"] <= 30  # its default waits for ever


def test_a_stall_and_a_step_at_once_open_it_once(tmp_path, monkeypatch):
    """The watchdog tells of the first step, which ends while W&B is still being opened for that."""
    run, said = FakeRun(), []
    module = _fake(monkeypatch, [run, FakeRun()])
    init, opening = module.init, threading.Event()

    def slow_init(**options):
        opening.set()
        time.sleep(0.3)
        return init(**options)

    module.init = slow_init
    view = _open(tmp_path, said)
    watchdog = threading.Thread(target=view.alert, args=("stalled", "no step for 300 s"))
    watchdog.start()
    assert opening.wait(30)
    view.log({"x": 1}, 1)
    watchdog.join(30)
    view.finish()
    assert len(module.calls) == 1
    assert (run.alerts, run.logged, run.code) == (["stalled"], [(1, {"x": 1})], 0)
    assert len(said) == 1  # that it records offline


@pytest.mark.parametrize(("mode", "calls"), [("", ["offline"]), ("disabled", [])])
def test_without_a_key_it_is_offline_at_once_and_disabled_is_nothing(
    tmp_path, monkeypatch, mode, calls
):
    module = _fake(monkeypatch, [FakeRun()], key="k" * 40 if mode else "")
    monkeypatch.setenv("WANDB_MODE", mode)
    view = _open(tmp_path, [])
    view.log({"x": 1}, 1)
    view.finish()
    assert [call["mode"] for call in module.calls] == calls


def test_a_stage_is_a_run_of_one_group(tmp_path, monkeypatch):
    module = _fake(monkeypatch, [FakeRun(), FakeRun(), FakeRun()])
    folder = tmp_path / "demo-1234"
    folder.mkdir()
    view = _open(folder, [])
    view.log({"x": 1}, 1)
    view.enter("evaluate")
    view.log({"x": 1}, 2)
    tune, evaluate = module.calls
    assert (tune["job_type"], evaluate["job_type"]) == ("tune", "evaluate")
    assert tune["id"] != evaluate["id"]
    assert tune["group"] == evaluate["group"] == f"demo-1234-{view.id}"
    assert tune["name"] == "demo-1234/tune"
    assert tune["resume"] == "allow"
    of_sweep = _open(folder, [], group="sweep-9")
    of_sweep.log({"x": 1}, 1)
    assert module.calls[-1]["group"] == "sweep-9"


def test_the_id_is_the_folder_s_then_the_checkpoint_s(tmp_path, monkeypatch):
    _fake(monkeypatch, [])
    fresh = Wandb(tmp_path, {}, project="p")
    fresh.enter("tune", "")
    again = Wandb(tmp_path, {}, project="p")
    again.enter("tune", "other")
    assert fresh.id == again.id == (tmp_path / ID_FILE).read_text()
    (tmp_path / ID_FILE).unlink()  # a checkpoint was carried to another folder
    moved = Wandb(tmp_path, {}, project="p")
    moved.enter("tune", "from-checkpoint")
    assert moved.id == "from-checkpoint"


HISTORY = [(1, {"x": 1.0}), (2, {"x": 2.0}), (3, {"x": 3.0})]


def test_offline_a_start_is_made_whole_and_replaces_the_one_before(tmp_path, monkeypatch):
    killed, run = FakeRun(), FakeRun()
    module = _fake(monkeypatch, [killed, run])
    _open(tmp_path, []).log({"x": 1.0}, 1)
    view = _open(tmp_path, [], history=lambda stage: HISTORY if stage == "tune" else [])
    view.log({"x": 3.0}, 3)  # resumed from step 2: step 3 is in the JSONL already
    view.log({"x": 4.0}, 4)
    assert run.logged == [*HISTORY, (4, {"x": 4.0})]
    (left,) = (tmp_path / "wandb").iterdir()
    assert left.name.startswith("offline-run-2-")
    assert module.calls[0]["id"] == module.calls[1]["id"]


def test_online_only_what_the_server_lacks_is_sent(tmp_path, monkeypatch):
    run = FakeRun(step=3)  # it has steps up to 2
    _fake(monkeypatch, [run], key="k" * 40)
    view = _open(tmp_path, [], history=lambda stage: HISTORY)
    view.log({"x": 2.0}, 2)
    view.log({"x": 4.0}, 4)
    assert [step for step, _ in run.logged] == [3, 4]


@pytest.mark.parametrize("error", [ConnectionResetError("its service died"), OSError(28, "full")])
def test_a_failing_wandb_turns_itself_off(tmp_path, monkeypatch, error):
    _fake(monkeypatch, [FakeRun(error)])
    said = []
    view = _open(tmp_path, said)
    for step in range(3):
        view.log({"x": 1}, step)
    view.enter("next")
    view.log({"x": 1}, 9)
    view.finish()
    assert len([text for text in said if "off from here on" in text]) == 1


def test_wandb_that_never_starts_stops_nothing(tmp_path, monkeypatch):
    module = _fake(monkeypatch, [RuntimeError("no")])
    view = _open(tmp_path, [])
    view.log({"x": 1}, 1)
    view.log({"x": 1}, 2)
    view.finish()
    assert len(module.calls) == 1


@pytest.mark.parametrize(("code", "resumable"), [(0, False), (1, False), (75, True)])
def test_a_run_ends_as_the_process_does(tmp_path, monkeypatch, code, resumable):
    run = FakeRun()
    _fake(monkeypatch, [run])
    view = _open(tmp_path, [])
    view.log({"x": 1}, 1)
    view.finish(code, resumable)
    assert (run.code, run.preempting) == (code, resumable)


def test_secrets_leave_the_configuration_and_nothing_else_does():
    config = {
        "launcher": {"environment": {"WANDB_API_KEY": "abc", "NCCL_DEBUG": "INFO"}},
        "data": {
            "streams": {
                "a": {"manifest": "https://user:pass@host/x.json"},
                "b": {"manifest": "s3://bucket/x?X-Amz-Signature=abc&part=2"},
            }
        },
        "base": {"specialise": {"tokens": 8192}, "hf_token": "hf_x", "password": ""},
        "evaluation": {"text_tokens": 5, "key": "k", "splits": ["key", "heldout"]},
    }
    cleaned = without_secrets(config)
    text = str(cleaned)
    for secret in ("abc", "user:pass", "hf_x", "'k'"):
        assert secret not in text
    assert cleaned["data"]["streams"]["a"]["manifest"] == "https://***@host/x.json"
    assert cleaned["data"]["streams"]["b"]["manifest"].endswith("&part=2")
    assert cleaned["launcher"]["environment"]["NCCL_DEBUG"] == "INFO"
    assert cleaned["base"]["specialise"]["tokens"] == 8192
    assert cleaned["evaluation"]["splits"] == ["key", "heldout"]


def test_wandb_is_given_the_cleaned_configuration(tmp_path, monkeypatch):
    module = _fake(monkeypatch, [FakeRun()])
    view = Wandb(tmp_path, {"token": "abc", "seed": 3}, project="p")
    view.enter("tune")
    view.log({"x": 1}, 1)
    assert module.calls[0]["config"] == {"token": "***", "seed": 3}


def _events(folder):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is not installed",
    )
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_tensorboard_reads_each_step_once_after_a_kill(tmp_path):
    _events(tmp_path)
    first = TensorBoard(tmp_path)
    first.enter("tune")
    for step, values in HISTORY[:2]:
        first.log(values, step)
    first._opened.flush()
    first.log({"x": 9.0}, 3)  # killed before this reached the disk, or after: the same
    later = TensorBoard(tmp_path, history=lambda stage: HISTORY)
    later.enter("tune")
    later.log({"x": 3.0}, 3)
    later.log({"x": 4.0}, 4)
    later.finish()
    found = [(e.step, e.value) for e in _events(tmp_path / "tensorboard" / "tune").Scalars("x")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_broken_tensorboard_turns_itself_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = []
    view = TensorBoard(tmp_path, say=said.append)
    view.enter("tune")
    view.log({"x": 1.0}, 1)
    view.log({"x": 1.0}, 2)
    view.finish()
    assert len(said) == 1
    assert "TensorBoard is off" in said[0]

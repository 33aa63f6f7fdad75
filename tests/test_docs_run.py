"""The commands of README.md and docs/ that need one machine and no server, word for word: `experiment=demo`
is a tiny run on two ranks here (`tests/infra/documents.py`), everything else is as the pages say."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

from moe_ext import cli
from moe_ext.training.ownership import read_status
from tests.infra.documents import Checkout, lines_of, tiny_demo
from tests.infra.machine import wait_until
from tests.infra.wandb_server import WandbServer
from tests.planning.test_sizes import MIXTRAL_8X7B


def finished(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is not None and status.state == "finished"


@pytest.fixture(scope="module")
def checkout(finished_demo: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy, which the commands may change, of the one with the finished `runs/demo`."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    shutil.copytree(finished_demo.folder, folder)
    return Checkout(folder)


EXPECTED = {
    "jobs": "finished",
    "watch": "finished",
    "dashboard": '"panelBankConfig"',
    "evaluate": "report.html",
    "report": "report.html",
    "export": "",  # only its folder
}
"""What a command says, among other things, of a run that is finished."""


def test_what_can_be_asked_of_a_finished_run(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of("test_what_can_be_asked_of_a_finished_run")
    assert {shlex.split(line)[1] for line in lines} == set(EXPECTED)
    monkeypatch.chdir(checkout.folder)
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "evaluate":  # starts a group of ranks, as this process must not
            text = checkout.sh(line)
        else:
            assert cli.main(words) == 0, line
            text = capsys.readouterr().out
        assert EXPECTED[words[0]] in text, line
    evaluation = json.loads((checkout.folder / "runs/demo/evaluation.json").read_text())
    assert "probe" in evaluation
    assert (checkout.folder / "published" / "modeling_moe_ext.py").is_file()


def test_an_offline_run_is_sent_later(checkout: Checkout) -> None:
    with WandbServer() as server:
        for line in lines_of("test_an_offline_run_is_sent_later"):
            checkout.sh(
                line, WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40, WANDB_MODE="online"
            )
    run_id = (checkout.folder / "runs/demo/wandb_id").read_text()
    assert set(server.streams) == {
        f"{run_id}-{name}" for name in ("align", "probe", "tune", "evaluate")
    }
    steps = [row["_step"] for row in server.history(f"{run_id}-tune")]
    assert steps == list(range(steps[0], steps[0] + 13))
    assert all(artifact["committed"] for artifact in server.artifacts)
    (extension,) = (a for a in server.artifacts if a["artifactTypeName"] == "extension")
    sent, ours = server.files_of(extension), checkout.folder / "runs" / "demo" / "extension"
    assert sent == {path.name: path.read_bytes() for path in ours.iterdir()}
    (table,) = (a for a in server.artifacts if a["artifactTypeName"] == "run_table")
    pictures = [name for name in server.files_of(table) if name.endswith(".png")]
    evaluation = json.loads((checkout.folder / "runs/demo/evaluation.json").read_text())
    assert len(pictures) == len(evaluation["gallery"]) > 0


def test_a_cluster_is_planned_from_the_configuration_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    from transformers import AutoConfig

    config = AutoConfig.for_model("mixtral", **MIXTRAL_8X7B)
    config.save_pretrained(tmp_path / "models" / "mixtral")
    for line in lines_of("test_a_cluster_is_planned_from_the_configuration_alone"):
        assert cli.main(shlex.split(line)[1:]) == 0
        text = capsys.readouterr().out
        assert re.search(r"^ \* ep \d", text, re.M), text  # one fits, and is marked


@pytest.mark.slow
def test_other_ways_to_train(tmp_path: Path) -> None:
    """Each in a folder without a run; a sweep leaves one finished run a point."""
    checkout = tiny_demo(tmp_path)
    lines = lines_of("test_other_ways_to_train")
    assert len(lines) >= 5
    for line in lines:
        text = checkout.sh(line, timeout_s=600)
        runs = [path.parent for path in (checkout.folder / "runs").glob("*/status.json")]
        assert len(runs) == (3 if "seed=0,1,2" in line else 1), text
        assert all(finished(run) for run in runs), text
        assert len(list((checkout.folder / "runs").glob("*/tensorboard/tune/*"))) == (
            2 if "tracking=tensorboard" in line else 0  # the events and how far they are written
        )
        shutil.rmtree(checkout.folder / "runs")


@pytest.mark.slow
def test_tensorboard_serves_the_runs(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 6006)) == 0:
            pytest.skip("another program has TensorBoard's port, 6006")
    checkout = tiny_demo(tmp_path)
    checkout.sh(
        next(line for line in lines_of("test_other_ways_to_train") if "tensorboard" in line)
    )
    (line,) = lines_of("test_tensorboard_serves_the_runs")
    server = subprocess.Popen(
        ["bash", "-c", f"exec {line}"],
        cwd=checkout.folder,
        env=checkout.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def tags() -> dict[str, dict]:
        try:
            with urllib.request.urlopen("http://127.0.0.1:6006/data/plugin/scalars/tags") as answer:
                return json.load(answer)
        except OSError:
            return {}

    try:
        wait_until(lambda: len(tags()) == 4, 60, "TensorBoard to find the stages")
        for stage, found in tags().items():
            assert "loss/nll" in found or stage.endswith("evaluate"), stage
    finally:
        server.terminate()
        server.wait(timeout=30)

"""Launching without a cluster: identities and sweeps, refusals, dry runs, and the local launcher."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from moe_ext import launch
from moe_ext.compose import CONF_DIR, ConfigError, load
from moe_ext.config_launcher import LauncherConfig
from moe_ext.jobs import deepspeed_launcher, slurm, status
from moe_ext.jobs.plan import describe, memory_of
from moe_ext.jobs.processes import of_run
from moe_ext.jobs.runs import plan_runs, run_id
from moe_ext.jobs.status import collect, error_line
from moe_ext.plan import plan_of
from moe_ext.training.ownership import claim
from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.infra.machine import wait_until

ROOT = Path(__file__).resolve().parents[2]


def identity(*overrides: str) -> str:
    return run_id(load(CONF_DIR, ["experiment=demo", *overrides]))


def test_a_run_is_known_by_what_decides_its_result() -> None:
    same = identity()
    assert same.startswith("demo-")
    assert identity("launcher=slurm", "launcher.time_limit=8:00:00", "tracking=local") == same
    assert identity("cache_dir=elsewhere") == same
    assert len({same, identity("seed=1"), identity("optim.clip_norm=0.5")}) == 3


def test_a_sweep_is_every_combination_each_with_its_own_folder(tmp_path: Path) -> None:
    overrides = ["experiment=demo", "seed=0,1", "optim.clip_norm=choice(0.5,1.0,2.0)"]
    runs = plan_runs(CONF_DIR, overrides, tmp_path)
    assert [(r.config.seed, r.config.optim.clip_norm) for r in runs] == [
        (seed, norm) for seed in (0, 1) for norm in (0.5, 1.0, 2.0)
    ]
    assert len({run.run_dir for run in runs}) == 6
    assert all(run.run_dir.parent == tmp_path / "runs" for run in runs)
    listed = ["experiment=demo", 'launcher.sweep=["seed=0,1","optim.clip_norm=0.5,1.0,2.0"]']
    assert [run.run_id for run in plan_runs(CONF_DIR, listed, tmp_path)] == [r.run_id for r in runs]
    with pytest.raises(ConfigError, match="run_dir=.* would be shared by 2 runs"):
        plan_runs(CONF_DIR, ["experiment=demo", "seed=0,1", "run_dir=mine"], tmp_path)


def test_a_sweep_may_be_asked_for_as_hydra_does_or_stand_in_an_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    text = "# @package _global_\ndefaults: [demo]\nlauncher:\n  sweep: ['seed=0,1']\n"
    (conf / "experiment" / "seeds.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    shown = []
    for words in (["-m", "experiment=demo", "seed=0,1"], ["experiment=demo", "seed=0,1"],
                  ["experiment=demo", "-m", "seed=0,1"], ["experiment=seeds"]):  # fmt: skip
        assert launch.main(["--config-dir", str(conf), "--dry-run", *words]) == 0
        shown.append(re.findall(r"run +(\S+) ->", capsys.readouterr().out))
    assert all(len(set(runs)) == 2 for runs in shown)
    assert shown == [shown[0]] * 4


def test_the_resolved_file_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    (run,) = plan_runs(CONF_DIR, ["experiment=demo", "optim.clip_norm=0.25"], tmp_path)
    run.write()
    again = load(Path("nowhere"), [], run.resolved)
    assert again == run.config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=demp"], "did you mean demo"),
        (
            ["experiment=demo", "parallel.ep_size=2"],
            "parallel.ep_size=2 does not divide the 1 rank",
        ),
        (["experiment=demo", "launcher=hostfile"], "launcher.hostfile is empty"),
        (["experiment=demo", "launcher.nodes=2"], "launcher.nodes=2 with launcher=local"),
        (
            ["experiment=demo", "launcher=slurm", "launcher.time_limit=soon"],
            "launcher.time_limit='soon'",
        ),
        (["experiment=demo", "+launcher.environment.WANDB_API_KEY=hush"], "looks like a secret"),
        (
            ["experiment=demo", "+launcher.environment.AWS_ACCESS_KEY_ID=hush"],
            "looks like a secret",
        ),
        (
            ["experiment=demo", "+launcher.environment.PROXY=http://me:hush@host"],
            "launcher.environment.PROXY looks like a secret",
        ),
        (
            ["experiment=demo", "launcher.setup=['export WANDB_API_KEY=hush']"],
            "launcher.setup[0] looks like a secret",
        ),
        (
            ["experiment=demo", "base=folder", "base.path=nowhere"],
            "base.path=nowhere holds no config",
        ),
        (
            ["experiment=demo", "launcher=hostfile", "launcher.hostfile=none.txt"],
            "none.txt: No such file",
        ),
        (["experiment=demo", "seed=[0"], "seed=[0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert launch.main(overrides) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hush" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 slots=2\nn2 slots=4\n", "different slots"),
        ("n1 slots=2\nn1 slots=2\n", "names n1 twice"),
        ("n1 2\n", "line 1: 'n1 2' is not"),
        ("# nobody\n\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    assert (
        launch.main(["experiment=demo", "launcher=hostfile", f"launcher.hostfile={hostfile}"]) == 2
    )
    assert message in capsys.readouterr().err


def test_a_dry_run_shows_the_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=demo", "launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4"]
    words += [
        "parallel.ep_size=8",
        "seed=0,1,2",
        "launcher.array_limit=2",
        "launcher.partition=a100",
    ]
    assert launch.main(["--dry-run", *words, "launcher.directives=[--exclusive]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for option in (
        *(
            "--nodes=2",
            "--ntasks-per-node=4",
            "--gpus-per-node=4",
            "--array=0-2%2",
            "--partition=a100",
        ),
        *("--exclusive", "--signal=USR2@120", "--requeue"),
    ):
        assert f"#SBATCH {option}" in lines
    assert "ranks    8 on 2 node(s): 8 expert parallel x 1 data parallel" in lines
    assert not [line for line in lines if "@" in line and "USR2@120" not in line]
    assert list(tmp_path.iterdir()) == []


DRY = ["experiment=demo", "parallel.ep_size=8", "+launcher.environment.A=b", "seed=0,1"]


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["launcher.ranks_per_node=8"], "deepspeed --num_accelerators 8 --master_port "),
        (
            ["launcher=hostfile", "launcher.hostfile=hosts.txt"],
            "deepspeed --hostfile {0}/hosts.txt --force_multi --master_port 29500 ",
        ),
        (
            [
                *("launcher=hostfile", "launcher.hostfile=hosts.txt", "launcher.ssh=false"),
                *("launcher.node_rank=1", "launcher.master_addr=node1"),
            ],
            "--no_ssh --node_rank 1 --master_addr node1 --master_port 29500 ",
        ),
        (["launcher=slurm", "launcher.gpus_per_node=8"], "#SBATCH --gpus-per-node=8"),
    ],
    ids=["local", "hostfile", "without ssh", "slurm"],
)
def test_a_dry_run_of_a_sweep_has_everything_that_would_run(
    overrides: list[str],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.txt").write_text("node1 slots=4\nnode2 slots=4\n")
    url = "https://me:hush@host/a.json?sig_token=hush"
    words = [*DRY, *overrides, "data=shards", f"data.streams.train.manifest='{url}'"]
    assert launch.main(["--dry-run", *words]) == 0
    text = capsys.readouterr().out
    runs = plan_runs(CONF_DIR, words, tmp_path)
    assert len(runs) == 2
    for run in runs:  # each with its id, its folder, and the file that its ranks read
        assert f"run      {run.run_id} -> {run.run_dir}" in text
        assert run.run_id == f"demo-{run.run_id.partition('-')[2]}"
        assert str(run.resolved) in text
    assert text.count("tune: 220 steps of 64 sequences") == 2
    memory = memory_of(runs[0].config, 8).total / 2**30
    assert text.count(f"memory   {memory:.2f} GiB of tensors a rank at most") == 2
    assert text.count("data     train: https://***@host/a.json") == 2
    assert shown.format(tmp_path) in text
    assert "A=b" in text
    assert "MOE_EXT_GROUP=demo-sweep-" in text
    assert "hush" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["hosts.txt"]
    if "hostfile" in str(overrides):
        assert "hosts    node1 slots=4 node2 slots=4" in text


def test_the_plan_counts_shards_a_rank(tmp_path: Path) -> None:
    manifest = tmp_path / "shard.json"
    manifest.write_text(json.dumps({"shards": [{}] * 10}))
    words = ["experiment=demo", "data=shards", f"data.streams.train.manifest={manifest}"]
    (run,) = plan_runs(CONF_DIR, words, tmp_path)
    assert "data     train: 10 shards, 2.5 a rank" in describe(run, 4, 1).splitlines()


def test_the_script_is_valid_bash(tmp_path: Path) -> None:
    overrides = ["experiment=demo", "launcher=slurm", "+launcher.environment.A='it\\'s $HOME'"]
    (run,) = plan_runs(CONF_DIR, overrides, tmp_path)
    script = slurm.write_job([run], run.launch_dir, 1)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_values_survive_the_remote_shell() -> None:
    values = {"A": 'a "quote" and $HOME', "B": "back\\slash `x`", "C": "plain", "D": "{a,b} *"}
    for line in deepspeed_launcher.environment_text(values).splitlines():
        name, value = line.split("=", 1)
        quoted = value if value == "plain" else f'"{value}"'  # as deepspeed's add_export does
        done = subprocess.run(
            ["bash", "-c", f'export {name}={quoted}; printf %s "${name}"'],
            capture_output=True,
            text=True,
        )
        assert done.stdout == values[name]


def test_a_launcher_that_exits_0_proves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = claim(tmp_path)
    assert deepspeed_launcher.verdict(tmp_path, 0, since_s=0) == 1  # no word at all
    owner.write_status("running", "tune", 3)
    assert deepspeed_launcher.verdict(tmp_path, 0, since_s=0) == 1
    owner.write_status("failed", "tune", 3, "ValueError: a reason")
    assert deepspeed_launcher.verdict(tmp_path, 0, since_s=0) == 1
    assert "ValueError: a reason" in capsys.readouterr().err
    owner.write_status("stopped", "tune", 3)
    assert deepspeed_launcher.verdict(tmp_path, 143, since_s=0) == STOPPED_EXIT_CODE
    owner.write_status("finished")
    assert deepspeed_launcher.verdict(tmp_path, 0, since_s=0) == 0
    assert deepspeed_launcher.verdict(tmp_path, 3, since_s=0) == 3
    later_s = (tmp_path / "status.json").stat().st_mtime + 1
    assert deepspeed_launcher.verdict(tmp_path, 0, since_s=later_s) == 1  # an earlier start's word


def test_jobs_shows_where_runs_stand(tmp_path: Path) -> None:
    run_dir = tmp_path / "one"
    owner = claim(run_dir)
    records = [
        {"stage": "align", "step": 1, "loss": {"total": 2.5}},
        {"stage": "align", "step": 2, "loss": {"nll": 2.25}},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    owner.write_status("failed", "align", 2, "Traceback\nValueError: why")
    (row,) = collect(tmp_path)
    assert list(vars(row).values()) == [
        "one",
        "",
        "",
        "failed",
        "align",
        "2",
        "2.2500",
        "ValueError: why",
    ]
    log = tmp_path / "log"
    log.write_text(
        "step\n[rank1]: RuntimeError: Connection closed by peer\nsrun: error: node2: task 1: Exited\n"
    )
    assert "RuntimeError" in error_line(log)


@pytest.mark.parametrize(
    ("state", "word", "bad"),
    [
        ("running", "RUNNING", False), ("", "PENDING", False), ("", "", False),
        ("finished", "COMPLETED", False), ("cancelled", "CANCELLED", False),
        ("failed", "", True), ("gone", "", True), ("", "OUT_OF_MEMORY", True),
        ("", "FAILED, 2 later CANCELLED", True),
    ],
)  # fmt: skip
def test_a_failed_run_is_known_by_its_own_word_or_slurms(state: str, word: str, bad: bool) -> None:
    assert status.has_failed(state, word) is bad


def test_the_plan_has_the_planners_memory_of_the_configured_placement() -> None:
    """Halving the experts a rank halves their bytes; the rest of a rank's base is what it was."""
    one = memory_of(load(CONF_DIR, ["experiment=demo"]), 2)
    two = memory_of(load(CONF_DIR, ["experiment=demo", "parallel.ep_size=2"]), 2)
    assert (two.frozen, two.rest) == (one.frozen // 2, one.rest)
    words = ["experiment=demo", "parallel.ep_size=2", "parallel.frozen_placement=replicate"]
    assert memory_of(load(CONF_DIR, words), 2) == one
    sharded = [*words, "extension.placement=shard"]
    # a sharded expert's state lies on its own rank alone
    assert memory_of(load(CONF_DIR, sharded), 2).optimizer > one.optimizer
    base = load(CONF_DIR, ["experiment=demo"])
    plan = plan_of(base, exact=True)  # for the default cluster, which has two ranks
    assert one in [c.memory for c in plan.candidates if c.placed.ep_size == 1]


@pytest.mark.slow  # over a hostfile tests/hosts/test_hostfile.py shows the same
def test_the_local_launcher_stops_on_request_and_goes_on(tmp_path: Path) -> None:
    words = [
        *(sys.executable, "-m", "moe_ext.launch", "experiment=demo", "launcher.ranks_per_node=2"),
        *("parallel.ep_size=2", "chain=[align]", "stages.align.steps=40"),
        *("launcher.module=tests.infra.toy_run", "+launcher.environment.TOY_STEP_S='0.1'"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: bool(list(tmp_path.glob("runs/*/metrics.jsonl"))), 400, "the first step")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED_EXIT_CODE, output
    assert "start it again to go on" in output
    assert not [
        p for p in psutil.Process().children(recursive=True) if "toy_run" in " ".join(p.cmdline())
    ]
    assert subprocess.run(words, cwd=tmp_path, env=environment, timeout=120).returncode == 0
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(
        range(1, 41)
    )


def test_a_run_under_way_is_not_started_again_and_without_its_launcher_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        *("experiment=demo", "launcher.ranks_per_node=2", "parallel.ep_size=2", "chain=[align]"),
        *("stages.align.steps=5000", "launcher.module=tests.infra.toy_run"),
    ]
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_ext.launch", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=log.open("w"),
    )
    wait_until(lambda: bool(list(tmp_path.glob("runs/*/metrics.jsonl"))), 400, "the first step")
    (run_dir,) = tmp_path.glob("runs/*")
    assert launch.main(words) == 2  # two starts would take the folder from each other
    assert f"process {process.pid} here has it under way" in capsys.readouterr().err
    assert len(of_run(run_dir / "launch" / "resolved.yaml")) >= 4  # two of deepspeed's, two ranks
    (node,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "deepspeed.launcher.launch" in child.cmdline()
    )
    node.kill()
    assert process.wait(60) == 1  # deepspeed itself exits 0, and its ranks go on, unwatched
    assert "the launcher ended with code 0 and the run is not finished" in log.read_text()
    assert len(of_run(run_dir / "launch" / "resolved.yaml")) == 2
    assert status.main([str(run_dir), "--cancel"]) == 0
    assert not of_run(run_dir / "launch" / "resolved.yaml")
    assert [row.state for row in collect(tmp_path)] == ["cancelled"]
    assert status.main([str(run_dir), "--stop"]) == 1  # there is nothing left to stop


def test_a_running_run_is_asked_by_a_file_and_a_dead_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "one"
    owner = claim(run_dir)
    assert status.main([str(tmp_path), "--check"]) == 0
    assert status.main([str(tmp_path), "--stop"]) == 0
    assert "one: asked to publish" in capsys.readouterr().out
    (run_dir / "stop").unlink()
    process = subprocess.Popen(["true"])
    process.wait()
    file = run_dir / "owner.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pid": process.pid}))
    assert [row.state for row in collect(tmp_path)] == ["gone"]
    assert status.main([str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().out == "one: gone\n"
    assert status.main([str(tmp_path), "--stop"]) == 1
    assert not (run_dir / "stop").exists()
    owner.write_status("finished")
    assert status.main([str(tmp_path), "--check"]) == 0
    assert status.main([str(tmp_path / "none"), "--check"]) == 0
    assert status.main([str(tmp_path), "--cancel"]) == 1


def test_defaults_are_accepted() -> None:
    from moe_ext.config_launcher import check_launcher

    check_launcher(LauncherConfig())

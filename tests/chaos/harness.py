"""Runs that are killed and started again until they end, and what must then be true of them.

The ranks are forked from this process, which has imported everything once: a start costs a fraction
of a second. They run the real entry (`moe_ext.train.main`) on a configuration that is composed once.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_ext.compose import CONF_DIR, load
from moe_ext.config import TrainConfig
from tests.chaos.points import ANYWHERE, POINTS, Counter, Kill, append, install
from tests.training.tiny import make_inputs, overrides

WORLD = 2
CHECKPOINT_EVERY = 2
SETTINGS = (
    *("parallel.ep_size=2", "extension.placement=shard", "extension.num_new_experts=3"),
    *("stages.align.steps=4", "stages.probe.steps=2", "stages.probe.checkpoint_every=1"),
    *("stages.tune.steps=7", "extension.loss_free_rate=0.01", "stages.probe.statistics_samples=8"),
    *("parallel.timeout_s=60", "tracking.progress=false", "data.features=cache"),
    # some of the steps are skipped as spikes, by what is known of the steps before
    *("stages.tune.spike_sigmas=0.5", "stages.tune.spike_window=4"),
)
EVERY_START = ("start", "resume")
"""Points that a resumed start passes anew."""
NOTICE_S = 100.0
"""A rank whose peer was killed has left by then, by itself."""
APART_S = 5.0
"""A rank whose peer was killed before they met waits for it as long as torch does: it is ended then,
as every launcher ends it."""


@dataclass
class Start:
    """One start of a run: what was planned, and what came of it."""

    kill: Kill | None
    alone: bool
    """Only one rank is killed; the other finds out by itself. Otherwise both go at once."""
    codes: list[int] = field(default_factory=list)
    """Exit codes by rank; -9 is SIGKILL."""
    seconds: float = 0.0
    step: Any = None
    """[stage, finished steps] at the kill."""

    passed: dict[str, int] = field(default_factory=dict)
    """Passings of the points at the kill."""

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.codes


class Lost(AssertionError):
    """Something that a kill must not change has changed."""


class Chaos:
    """One set of inputs, the run that nothing disturbs, and any number of disturbed ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.configs: dict[tuple[str, ...], TrainConfig] = {}
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        make_inputs(folder)
        first = self._run("straight", None)
        if first.codes != [0] * WORLD:
            raise Lost(f"the undisturbed run ended with {first.codes}\n{self.logs('straight')}")
        self.seconds = first.seconds
        self.passings = [
            json.loads((self.side("straight") / f"passed-{rank}.json").read_text())
            for rank in range(WORLD)
        ]
        for name in self.passings[0].pop("modules"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        # A rank collects garbage between stages: what is imported here need not be gone through.
        gc.collect()
        gc.freeze()
        self.reference = self.evidence("straight")

    # ---- starting and killing --------------------------------------------------------------

    def plan(
        self, rng: random.Random, done: list[dict[str, int]], point: str | None = None
    ) -> tuple[Kill, bool]:
        """A point that is still to come, a rank and a passing, at random; early passings more often.

        Args:
            done: rank -> passings of the starts before; a resumed start has fewer left.
        """
        left = [
            {p: n - done[r].get(p, 0) if p not in EVERY_START else 2 for p, n in all_.items()}
            for r, all_ in enumerate(self.passings)
        ]
        coming = [p for p in POINTS if any(of_rank.get(p, 0) > 0 for of_rank in left)]
        if point is None or (point != ANYWHERE and point not in coming):
            point = rng.choice([*coming, ANYWHERE])
        ranks = [r for r in range(WORLD) if point == ANYWHERE or left[r].get(point, 0) > 0]
        rank = rng.choice(ranks)
        most = 1 if point == ANYWHERE else left[rank][point]
        number = min(most, 1 + int(most * rng.random() ** 2))
        delay_s = rng.uniform(0.2, 0.7 * self.seconds)
        return Kill(point, rank, number, delay_s), rng.random() < 0.5

    def start(
        self,
        name: str,
        kill: Kill | None = None,
        *more: str,
        alone: bool = True,
        world: int = WORLD,
        code: int = 0,
    ) -> Start:
        """Start the run, with further overrides; return when all ranks have ended.

        Args:
            code: what every rank shall end with when none is killed.

        Raises:
            Lost: a rank outlived its peer by more than NOTICE_S, or ended with another code.
        """
        marks = self.side(name) / "killed.jsonl"
        marks.unlink(missing_ok=True)
        start = self._run(name, kill, *more, alone=alone, world=world)
        if marks.exists():
            mark = json.loads(marks.read_text())
            start.step, start.passed = mark["step"], mark["passed"]
        if not start.killed and start.codes != [code] * world:
            raise Lost(f"{name} ended with {start.codes} unkilled\n{self.logs(name)}")
        return start

    def _run(
        self, name: str, kill: Kill | None, *more: str, alone: bool = True, world: int = WORLD
    ) -> Start:
        side = self.side(name)
        side.mkdir(parents=True, exist_ok=True)
        if more not in self.configs:
            self.configs[more] = load(CONF_DIR, overrides(self.folder, "RUN", *SETTINGS, *more))
        config = replace(
            self.configs[more],
            name=name,
            run_dir=str(self.folder / name),
            cache_dir=str(self.folder / "caches" / name),  # each run writes its own features
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start, began = Start(kill, alone), time.monotonic()
        pids = [_fork(rank, world, port, config, side, kill) for rank in range(world)]
        codes: dict[int, int] = {}
        try:
            first_end = None
            while len(codes) < world:
                for rank, pid in enumerate(pids):
                    if rank not in codes:
                        done, status = os.waitpid(pid, os.WNOHANG)
                        if done:
                            codes[rank] = os.waitstatus_to_exitcode(status)
                            first_end = first_end or time.monotonic()
                            if codes[rank] == -signal.SIGKILL and not alone:
                                for other in set(range(world)) - set(codes):
                                    os.kill(pids[other], signal.SIGKILL)
                waited_s = 0.0 if first_end is None else time.monotonic() - first_end
                if waited_s > NOTICE_S:
                    raise Lost(f"{name}: a rank hangs after its peer's end\n{self.logs(name)}")
                if waited_s > APART_S and not self._had_met(name):
                    for other in set(range(world)) - set(codes):
                        os.kill(pids[other], signal.SIGKILL)
                time.sleep(0.005)
        finally:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        start.codes = [codes[rank] for rank in range(world)]
        start.seconds = time.monotonic() - began
        return start

    def _had_met(self, name: str) -> bool:
        """Whether the killed rank had joined the process group."""
        marks = self.side(name) / "killed.jsonl"
        return not marks.exists() or json.loads(marks.read_text())["passed"].get("start", 0) >= 2

    def logs(self, name: str) -> str:
        """The end of what each rank printed."""
        paths = sorted(self.side(name).glob("rank-?.log"))
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in paths)

    def side(self, name: str) -> Path:
        """Where our own files about a run lie: not in its folder, whose disk may be full."""
        return self.folder / "side" / name

    def evidence(self, name: str) -> dict[str, Any]:
        return evidence(self.folder / name, self.side(name))

    def forget(self, name: str) -> None:
        """Remove all files of a run."""
        for folder in (self.folder / name, self.folder / "caches" / name, self.side(name)):
            shutil.rmtree(folder, ignore_errors=True)

    # ---- chains of kills -------------------------------------------------------------------

    def chain(
        self, name: str, rng: random.Random, points: list[str] | None = None, most: int = 20
    ) -> Iterator[Start]:
        """Starts of one run until it ends, each with a kill; the last of `most` has none.

        Args:
            points: where to kill, start by start; afterwards at random.

        Raises:
            Lost: when it has ended, if anything differs from the undisturbed run.
        """
        done: list[dict[str, int]] = [{} for _ in range(WORLD)]
        for number in range(most):
            kill, alone = None, True
            if number < most - 1:
                wanted = points[number] if points and number < len(points) else None
                kill, alone = self.plan(rng, done, wanted)
            start = self.start(name, kill, alone=alone)
            if kill is not None:  # what the killed rank passed, the other passed about as well
                for passings, all_ in zip(done, self.passings, strict=True):
                    for point, count in start.passed.items():
                        share = count / max(self.passings[kill.rank].get(point, 1), 1)
                        passings[point] = passings.get(point, 0) + round(share * all_.get(point, 0))
            yield start
            if not start.killed:
                compare(self.evidence(name), self.reference)
                return

    def record(self, log: Path, seed: int, name: str, start: Start, outcome: str) -> None:
        append(
            log,
            {
                "seed": seed,
                "point": start.kill.point if start.kill else None,
                "rank": start.kill.rank if start.kill else None,
                "number": start.kill.number if start.kill else None,
                "alone": start.alone,
                "step": start.step,
                "codes": start.codes,
                "seconds": round(start.seconds, 2),
                "outcome": outcome,
            },
        )


def _fork(
    rank: int, world: int, port: int, config: TrainConfig, side: Path, kill: Kill | None
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(side / f"rank-{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # pytest's own write elsewhere
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        code = _rank(rank, config, side, kill)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(rank: int, config: TrainConfig, side: Path, kill: Kill | None) -> int:
    from moe_ext import train

    passing: Counter = install(side, rank, kill)
    train.load = lambda *_: config  # type: ignore[assignment]  # read once, by the parent
    code = train.main([])
    counts: dict[str, Any] = dict(passing.passed)
    if side.name == "straight" and rank == 0:
        counts["modules"] = sorted(sys.modules)
    (side / f"passed-{rank}.json").write_text(json.dumps(counts))
    return code


# ---- what must be equal ------------------------------------------------------------------------


def evidence(run_dir: Path, side: Path) -> dict[str, Any]:
    """All that a run leaves which a kill must not change, and the starts' steps as they ran."""
    events = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    # of a start: its clock, and what it has counted so far
    timing = {"time_s", "step_s", "tokens_per_s", "data_wait_s", "truncated_samples"}
    data = {
        rank: [json.loads(x) for x in (side / f"data-{rank}.jsonl").read_text().splitlines()]
        for rank in range(WORLD)
    }
    results = {
        str(manifest.relative_to(run_dir)): {
            name: file["sha256"] for name, file in json.loads(manifest.read_text())["files"].items()
        }
        for manifest in sorted((run_dir / "stages").rglob("manifest.json"))
    }
    extension = json.loads((run_dir / "extension" / "manifest.json").read_text())
    return {
        "status": json.loads((run_dir / "status.json").read_text())["state"],
        "steps": [{k: v for k, v in step.items() if k not in timing} for step in steps],
        "resumed": [(e["stage"], e["step"]) for e in events if e["event"] == "resume"],
        "data": data,
        "results": results,
        "extension": extension["files"],
        "probe": json.loads((run_dir / "probe.json").read_text()),
        "evaluation": json.loads((run_dir / "evaluation.json").read_text()),
        "unfinished": [str(p) for p in (run_dir / "stages").rglob("*.partial")],
    }


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Nothing lost, nothing twice, nothing else computed.

    Every step, also one that ran twice, has the reference's losses, norms and samples; what the run
    ends with is the reference's, bit for bit; no more is done again than since the checkpoint before
    the last.

    Raises:
        Lost: naming what differs.
    """
    reference = {(s["stage"], s["step"]): s for s in wanted["steps"]}
    seen: dict[str, int] = {}
    for step in found["steps"]:
        key = (step["stage"], step["step"])
        if step != reference.get(key):
            raise Lost(f"step {key}: {step} instead of {reference.get(key)}")
        last = seen.get(step["stage"], 0)
        if not last - 2 * CHECKPOINT_EVERY <= step["step"] - 1 <= last:
            raise Lost(f"step {key} ran after step {last}: steps were lost or done again from afar")
        seen[step["stage"]] = step["step"]
    if {(s["stage"], s["step"]) for s in found["steps"]} != set(reference):
        raise Lost(f"steps are missing: {seen}")
    for rank, lines in wanted["data"].items():
        samples = {json.dumps(line) for line in lines}
        others = {json.dumps(line) for line in found["data"][rank]}
        if samples != others:
            raise Lost(f"rank {rank} read other samples: {sorted(samples ^ others)[:4]}")
    if found["results"].keys() != wanted["results"].keys():
        raise Lost(
            f"other folders are published: {sorted(found['results'].keys() ^ wanted['results'].keys())}"
        )
    for part in ("status", "results", "extension", "probe", "evaluation", "unfinished"):
        if found[part] != wanted[part]:
            raise Lost(f"{part}: {str(found[part])[:500]} instead of {str(wanted[part])[:500]}")

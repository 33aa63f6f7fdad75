"""make chaos KILLS=1000: kill ranks of tiny runs at random places until that many were killed.

Every run is resumed until it ends and is then compared with the undisturbed one. A JSON line a start
goes to the log, the sums to the summary; the exit code is 1 when anything was lost.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_ext.benchmarks.report import environment
from tests.chaos.harness import WORLD, Chaos, Lost


@dataclass
class Sums:
    """What was done so far, and what came of it."""

    kills: int = 0
    alone: int = 0
    """Kills of one rank, whose peer found out by itself; in the others both went at once."""
    starts: int = 0
    runs_equal: int = 0
    """Runs that ended, bit for bit, as the undisturbed one."""
    runs_lost: int = 0
    steps_compared: int = 0
    """Steps with their losses and norms, those that ran again included."""
    samples_compared: int = 0
    """Samples of all micro-batches of both ranks, as they were read."""
    samples_lost: int = 0
    """Samples of the undisturbed run that a disturbed one did not read in their places."""
    minutes: float = 0.0
    places: collections.Counter[str] = field(default_factory=collections.Counter)

    def one_run(self, chaos: Chaos, seed: int, log: Path, wanted: int) -> None:
        """Kill a run until it ends, and compare it."""
        name, last = f"run-{seed}", None
        try:
            for start in chaos.chain(name, random.Random(seed), most=30):
                if last is not None:
                    chaos.record(log, seed, name, last, "resumed")
                last = start
                self.starts += 1
                if start.killed and start.kill is not None:
                    self.kills += 1
                    self.alone += start.alone
                    self.places[start.kill.point] += 1
                    what = f"{start.kill.point}, rank {start.kill.rank}, at {start.step}"
                    print(f"{self.kills}/{wanted} kills, {start.seconds:.1f} s: {what}", flush=True)
            assert last is not None
            chaos.record(log, seed, name, last, "equal")
            self.runs_equal += 1
        except Lost as error:
            self.runs_lost += 1
            if last is not None:
                chaos.record(log, seed, name, last, f"LOST {str(error)[:2000]}")
            print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
        self._count(chaos, name)
        chaos.forget(name)

    def _count(self, chaos: Chaos, name: str) -> None:
        try:
            found = chaos.evidence(name)
        except (OSError, ValueError, KeyError):  # a run that was lost may lack anything
            self.samples_lost += sum(len(l[3]) for x in chaos.reference["data"].values() for l in x)
            return
        self.steps_compared += len(found["steps"])
        for rank, lines in found["data"].items():
            self.samples_compared += sum(len(line[3]) for line in lines)
            read = {json.dumps(line) for line in lines}
            missing = [x for x in chaos.reference["data"][rank] if json.dumps(x) not in read]
            self.samples_lost += sum(len(line[3]) for line in missing)

    def summary(self, seed: int) -> dict[str, Any]:
        values = asdict(self) | {"minutes": round(self.minutes, 1), "first_seed": seed}
        values["places"] = dict(self.places.most_common())
        values["seconds_a_kill"] = round(60 * self.minutes / max(self.kills, 1), 2)
        return values | {"ranks": WORLD, "environment": environment()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each has its own")
    parser.add_argument("--minutes", type=float, default=0.0, help="end earlier after so long")
    parser.add_argument("--log", type=Path, default=Path("chaos.jsonl"))
    parser.add_argument("--summary", type=Path, default=Path("chaos.json"))
    options = parser.parse_args()
    began, sums, seed = time.monotonic(), Sums(), options.seed
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder))
        while sums.kills < options.kills:
            sums.one_run(chaos, seed, options.log, options.kills)
            seed += 1
            sums.minutes = (time.monotonic() - began) / 60
            options.summary.write_text(json.dumps(sums.summary(options.seed), indent=1) + "\n")
            if options.minutes and sums.minutes > options.minutes:
                break
    print(
        f"{sums.kills} kills in {sums.runs_equal} runs that ended equal, {sums.runs_lost} that did not; "
        f"{sums.samples_lost} samples lost; {sums.minutes:.1f} minutes"
    )
    for point, count in sums.places.most_common():
        print(f"  {count:5d}  {point}")
    return 1 if sums.runs_lost or sums.samples_lost else 0


if __name__ == "__main__":
    sys.exit(main())

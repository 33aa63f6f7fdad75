"""make chaos KILLS=1000: kill ranks of tiny runs at random places until that many were killed.

Every run is resumed until it ends and is then compared with the undisturbed one. A JSON line a start
goes to the log; the exit code is 1 when anything was lost.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.harness import Chaos, Lost


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each has its own")
    parser.add_argument("--minutes", type=float, default=0.0, help="end earlier after so long")
    parser.add_argument("--log", type=Path, default=Path("chaos.jsonl"))
    options = parser.parse_args()
    began, kills, runs, lost = time.monotonic(), 0, 0, 0
    points: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder))
        seed = options.seed
        while kills < options.kills and not (
            options.minutes and time.monotonic() - began > 60 * options.minutes
        ):
            name, last = f"run-{seed}", None
            try:
                for start in chaos.chain(name, random.Random(seed), most=30):
                    if last is not None:
                        chaos.record(options.log, seed, name, last, "resumed")
                    last = start
                    if start.killed and start.kill is not None:
                        kills += 1
                        points[start.kill.point] += 1
                        each_s = (time.monotonic() - began) / kills
                        what = f"{start.kill.point}, rank {start.kill.rank}, at {start.step}"
                        print(
                            f"{kills}/{options.kills} kills, {each_s:.1f} s each: {what}",
                            flush=True,
                        )
                assert last is not None
                chaos.record(options.log, seed, name, last, "equal")
                runs += 1
            except Lost as error:
                lost += 1
                if last is not None:
                    chaos.record(options.log, seed, name, last, f"LOST {str(error)[:2000]}")
                print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
            shutil.rmtree(chaos.side(name), ignore_errors=True)
            seed += 1
    minutes = (time.monotonic() - began) / 60
    print(
        f"{kills} kills in {runs} runs that ended equal, {lost} that did not, {minutes:.1f} minutes"
    )
    for point, count in points.most_common():
        print(f"  {count:5d}  {point}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

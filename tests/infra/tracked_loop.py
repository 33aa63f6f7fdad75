"""A training loop without training: the real tracker and the real W&B client around nothing.

    python -m tests.infra.tracked_loop RUN_DIR [--from N] [--to N] [--kill-at N] [--stop-at N]
        [--kill-service-at N] [--timeout S] [--pause S] [--dead-expert N] [--note KEY=VALUE]

It ends with 0 and the line `done`, whatever W&B does.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from moe_ext.config import AlertConfig, TrackingConfig
from moe_ext.training.tracking import Tracker

CONFIG = {"seed": 3, "data": {"token": "do-not-show"}}


def record(step: int) -> dict:
    """A pure function of the step, as a resumed run's records are."""
    return {
        "stage": "tune",
        "step": step,
        "loss": {"nll": 1 / step},
        "grad_norm": 1.0,
        "data_wait_s": 0.0,
        "step_s": 0.1,
        "text": {"load": {3: 1.0 + step}},
        "new_expert_share": {3: [0.1, 0.0]},
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--from", dest="first", type=int, default=1)
    parser.add_argument("--to", type=int, default=20)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--stop-at", type=int, default=0)
    parser.add_argument("--kill-service-at", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=15)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--dead-expert", type=int, default=0, help="records until its alert")
    parser.add_argument("--note", help="does nothing; W&B sees it on the command line")
    options = parser.parse_args()
    alerts = AlertConfig(dead_expert=options.dead_expert)
    settings = TrackingConfig(progress=False, wandb_timeout_s=options.timeout, alerts=alerts)
    tracker = Tracker(options.run_dir, CONFIG, settings, group=os.environ.get("MOE_EXT_GROUP", ""))
    tracker.enter("tune")
    for step in range(options.first, options.to + 1):
        tracker.step(record(step), 100 + step)
        time.sleep(options.pause)
        if step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == options.stop_at:
            tracker.close(75, resumable=True)
            return 75
        if step == options.kill_service_at:
            for child in psutil.Process().children(recursive=True):
                if "wandb" in child.name():
                    child.kill()
    tracker.close()
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

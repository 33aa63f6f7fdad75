"""A stand-in for moe_ext.train in the tests of launchers: the same contract, no model.

It reads the resolved configuration, joins a gloo group, steps through the chain with one reduction a
step, publishes its position, stops on request and resumes. TOY_STEP_S is the length of a step,
TOY_START_S of the start before the ranks listen, TOY_FAIL_SEED a seed whose run fails, TOY_FAIL_STAGE a
stage. Each start leaves `rank-N.start-M.json`.
"""

import argparse
import json
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_ext.analysis.run_folder import write_json
from moe_ext.compose import load
from moe_ext.training.ownership import Claim, claim
from moe_ext.training.signals import STOP_FILE, STOPPED_EXIT_CODE, StopFlag


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    config = load(Path(), [], parser.parse_args().config_file)
    run_dir, rank = Path(config.run_dir), int(os.environ["RANK"])
    if start_s := os.environ.get("TOY_START_S"):
        (run_dir / f"starting-{rank}").touch()
        time.sleep(float(start_s))
    with StopFlag(run_dir / STOP_FILE if rank == 0 else None) as stop:
        return _start(config, run_dir, rank, stop)


def _start(config, run_dir: Path, rank: int, stop: StopFlag) -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    owner = claim(run_dir) if rank == 0 else None
    start = len(list(run_dir.glob(f"rank-{rank}.start-*.json")))
    seen = {
        key: os.environ.get(key, "") for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    }
    seen |= {"host": socket.gethostname(), "group": os.environ.get("MOE_EXT_GROUP", "")}
    seen |= {"toy": os.environ.get("TOY_VARIABLE", "")}
    (run_dir / f"rank-{rank}.start-{start}.json").write_text(json.dumps(seen))
    try:
        if os.environ.get("TOY_FAIL_SEED") == str(config.seed):
            raise ValueError(f"seed={config.seed} was asked to fail")
        return _steps(config, run_dir, owner, stop)
    except BaseException:
        if owner is not None:
            owner.write_status("failed", error=traceback.format_exc())
        raise


def _steps(config, run_dir: Path, owner: Claim | None, stop: StopFlag) -> int:
    published = run_dir / "published.json"
    done = json.loads(published.read_text()) if published.exists() else {}
    for stage in config.chain:
        if os.environ.get("TOY_FAIL_STAGE") == stage:
            raise ValueError(f"{stage} was asked to fail")
        for step in range(done.get(stage, 0) + 1, config.stages[stage].steps + 1):
            total = torch.ones(())
            dist.all_reduce(total)
            assert int(total) == dist.get_world_size()
            time.sleep(float(os.environ.get("TOY_STEP_S", "0.05")))
            if owner is not None:
                owner.check()
                with open(run_dir / "metrics.jsonl", "a") as file:
                    record = {"stage": stage, "step": step, "loss": {"total": 1.0 / step}}
                    file.write(json.dumps(record) + "\n")
                owner.write_status("running", stage, step)
            if stop.agreed():
                return _leave(owner, published, done | {stage: step}, stage, step, stop)
        done[stage] = config.stages[stage].steps
    dist.barrier()
    if owner is not None:
        with owner.held():
            write_json(published, done)
        owner.write_status("finished", config.chain[-1])
    dist.destroy_process_group()
    return 0


def _leave(
    owner: Claim | None, published: Path, done: dict, stage: str, step: int, stop: StopFlag
) -> int:
    if owner is not None:
        with owner.held():
            write_json(published, done)
        owner.write_status("stopped", stage, step, requeue=not stop.for_good)
        stop.answered()
    dist.barrier()
    return STOPPED_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())

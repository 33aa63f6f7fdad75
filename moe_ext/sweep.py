"""Hydra's own multirun over the same configuration, for its launchers (hydra-submitit-launcher).

    python -m moe_ext.sweep --multirun hydra/launcher=submitit_slurm hydra.launcher.max_num_timeout=10 \
        hydra.launcher.nodes=2 parallel.ep_size=2 experiment=demo seed=0,1,2

`moe-ext launch` needs none of this; it is for those who sweep everything else that way. Every point is
a job of submitit's, each of whose tasks is a rank, and its folder is that of `moe-ext launch`. A request
to stop (submitit's SIGUSR2, sent before a time limit and at a preemption) is heard at the end of a step
as always; what was published then, submitit requeues the job.
"""

import os
import signal
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from moe_ext.compose import CONF_DIR, from_hydra, register_schema

LEAVE_S = 60.0
"""A rank that is not the first waits so long for the scheduler to end it."""


def rank_environment(environment: dict[str, str]) -> None:
    """Give torch.distributed an address where Slurm, but no launcher of ours, started this rank."""
    if "SLURM_STEP_NUM_TASKS" in environment and "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = environment[
            "SLURM_LAUNCH_NODE_IPADDR"
        ]  # srun's: the first node
        environment["MASTER_PORT"] = str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)


def train(composed: DictConfig) -> None:
    """One rank of one point of the sweep.

    Raises:
        RuntimeError: the run failed; its folder's status.json has the reason.
    """
    from moe_ext.config_check import check_world
    from moe_ext.jobs.runs import planned
    from moe_ext.preflight import check_files
    from moe_ext.train import run
    from moe_ext.training.ownership import read_status
    from moe_ext.training.signals import STOPPED_EXIT_CODE
    from moe_ext.training.topology import ranks_from_environment, stop

    point = planned(from_hydra(composed), (), Path(hydra.utils.get_original_cwd()))
    rank_environment(os.environ)  # type: ignore[arg-type]
    ranks = ranks_from_environment()
    check_world(point.config, ranks.world_size, ranks.local_world_size)
    check_files(point.config)
    code = run(point.config, ranks)
    if code not in (0, STOPPED_EXIT_CODE):
        raise RuntimeError(f"{point.run_dir} failed with code {code}; see its status.json")
    stop()
    if code == STOPPED_EXIT_CODE:
        status = read_status(point.run_dir)
        if status is not None and not status.requeue:
            raise RuntimeError(f"{point.run_dir} was asked to stop; start the sweep again to go on")
        # Published. The signal again, to the handler that was there before ours: it requeues the job.
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(LEAVE_S)
        raise RuntimeError(f"{point.run_dir} was stopped, and nobody requeued it")


def main() -> None:
    register_schema()
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="train")(train)()


if __name__ == "__main__":
    main()

"""A rank that submitit started finds its peers (the sweep itself: tests/slurm/test_submitit.py)."""

from moe_ext.sweep import rank_environment
from moe_ext.training.topology import ranks_from_environment


def test_a_task_of_slurm_gets_an_address_and_nobody_else_does() -> None:
    task = {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    }
    rank_environment(task)
    assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("10.0.0.7", "23456")
    ranks = ranks_from_environment(task)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (3, 4, 1, 2)
    alone: dict[str, str] = {}
    rank_environment(alone)
    assert alone == {}
    launched = {**task, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    rank_environment(launched)
    assert launched["MASTER_ADDR"] == "10.0.0.1"

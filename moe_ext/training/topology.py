"""Ranks and groups: world = expert parallel x expert data parallel.

Consecutive ranks form an expert-parallel group: they share the frozen experts. Ranks at the same
place of different groups hold the same experts. The groups are those of DeepSpeed-MoE
(`deepspeed.utils.groups`), so that its engine reduces the gradients of sharded experts over them.
"""

import datetime
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True)
class Topology:
    """This process among all ranks, after `start`."""

    ranks: Ranks
    device: torch.device
    ep_size: int
    ep_rank: int
    ep_group: dist.ProcessGroup | None
    """None when ep_size is 1: the same mathematics on one rank."""
    timeout_s: float

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def ep_group_name(self) -> str:
        """DeepSpeed's name of the groups."""
        return f"ep_size_{self.ep_size}"

    def replicas(self, sharded: bool) -> list[int]:
        """Ranks that hold the same as this one: all, or of sharded experts those at its place."""
        if sharded:
            return list(range(self.ep_rank, self.world_size, self.ep_size))
        return list(range(self.world_size))


def ranks_from_environment(environment: dict[str, str] | None = None) -> Ranks:
    """Rank and world size as deepspeed, torchrun or srun set them; one rank when nobody did."""
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", "0"))
        local = env.get(
            "LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world_size)
        )  # torchrun, deepspeed
        return Ranks(int(env["RANK"]), world_size, local_rank, int(local))
    if (
        "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env
    ):  # a task of srun, not the batch shell
        world_size = int(env["SLURM_STEP_NUM_TASKS"])
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)).split("(")[0].split(",")[0]
        return Ranks(
            int(env["SLURM_PROCID"]), world_size, int(env.get("SLURM_LOCALID", "0")), int(per_node)
        )
    return Ranks(0, 1, 0, 1)


def start(ranks: Ranks, ep_size: int, timeout_s: float, threads_per_rank: int = 0) -> Topology:
    """Join the process group and create the expert-parallel groups.

    An existing process group is used as it is. Without a GPU the backend is gloo and DeepSpeed's
    shared-memory op is switched off: it would be compiled at the first start (minutes), and a
    compilation that is killed leaves a lock on which every later run hangs.

    Raises:
        ValueError: ep_size does not divide the world.
    """
    if ranks.world_size % ep_size:
        raise ValueError(f"parallel.ep_size={ep_size} does not divide the {ranks.world_size} ranks")
    use_gpu = torch.cuda.is_available()
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # the engine insists on it
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils import logger  # reads DS_ACCELERATOR when imported

    logger.setLevel("WARNING")
    # torch's renaming of collectives that DeepSpeed calls: a line a step and rank otherwise
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not use_gpu:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads_per_rank or max(1, cores // ranks.local_world_size))
    device = torch.device("cuda", ranks.local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)

    import deepspeed
    from deepspeed.utils import groups

    timeout = datetime.timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if use_gpu else "gloo"
        if ranks.world_size == 1:  # no port, no address: any number of single runs side by side
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(
                backend, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
            )
    deepspeed.init_distributed(verbose=False)  # finds the group and wraps it
    ep_group = None
    if ep_size > 1:
        name = f"ep_size_{ep_size}"
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(ep_size)
        ep_group = groups._get_expert_parallel_group(name)
    limit_waiting(timeout_s)
    return Topology(ranks, device, ep_size, ranks.rank % ep_size, ep_group, timeout_s)


def limit_waiting(timeout_s: float) -> None:
    """Give every process group the same time-out.

    `new_group` does not inherit the world's: DeepSpeed's groups would wait 30 minutes for a dead peer.
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on all ranks. A collective."""
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def stop() -> None:
    """Leave the process group in order, after everybody has arrived."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

"""Run a function on several gloo ranks of this machine: `run_ranks(function, 2, argument, ...)`.

Ranks are new processes, forked off a server that has imported what they need and done nothing else. The
function and its arguments must be picklable: define the function at module level.
"""

import datetime
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


class RankError(AssertionError):
    """A rank failed or was too slow; the message holds the first failing rank's traceback."""


def run_ranks(
    function: Callable[..., Any] | str,
    world_size: int,
    *args: Any,
    timeout_s: float = 180.0,
    patience_s: float = 0.2,
) -> list[Any]:
    """What `function(*args)` returned on each rank, by rank (return CPU tensors and plain objects).

    Inside, `torch.distributed` is a gloo group of `world_size` ranks; RANK, LOCAL_RANK and WORLD_SIZE are
    set and torch uses one thread. `function` may be "module:name". An exception on any rank ends them
    all, after `patience_s` in which the others may write down what they saw, and is raised here; ranks
    that outlive `timeout_s` are killed, and the message shows where each of them stood.

    Raises:
        RankError: with the traceback of the rank that failed first.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when imported, by the server
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    here = Here(os.getcwd(), dict(os.environ), list(sys.path))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [
            # Not daemons: a rank may start data workers of its own.
            context.Process(
                target=_rank, args=(here, function, rank, world_size, args, folder, timeout_s)
            )
            for rank in range(world_size)
        ]
        end = time.monotonic() + timeout_s
        try:
            for process in ranks:
                process.start()
            running = list(ranks)
            while running and time.monotonic() < end:
                wait([p.sentinel for p in running], timeout=max(0.0, end - time.monotonic()))
                running = [p for p in running if p.exitcode is None]
                if any(p.exitcode for p in ranks):
                    patience = min(end, time.monotonic() + patience_s)
                    while running and time.monotonic() < patience:
                        wait([p.sentinel for p in running], timeout=patience - time.monotonic())
                        running = [p for p in running if p.exitcode is None]
                    break
            timed_out = bool(running) and not any(p.exitcode for p in ranks)
            stacks = _stacks(running, folder) if timed_out else ""
        finally:
            for process in ranks:
                if process.pid is not None and process.exitcode is None:
                    process.kill()
            for process in ranks:
                if process.pid is not None:
                    process.join()
        if timed_out:
            raise RankError(
                f"{len(running)} of {world_size} ranks still ran after {timeout_s} s\n{stacks}"
            )
        errors = [pickle.loads(path.read_bytes()) for path in Path(folder).glob("error-*")]
        if errors:  # the earliest is the cause, later ones mostly "connection closed by peer"
            _, rank, text = min(errors)
            raise RankError(f"rank {rank} of {world_size} failed:\n{text}")
        codes = {rank: p.exitcode for rank, p in enumerate(ranks) if p.exitcode}
        if codes:
            raise RankError(
                f"ranks ended with exit codes {codes} and no traceback (killed by a signal?)"
            )
        return [
            pickle.loads((Path(folder) / f"result-{r}").read_bytes()) for r in range(world_size)
        ]


@dataclass
class Here:
    """What a new process would have inherited from this one."""

    folder: str
    environment: dict[str, str]
    path: list[str]

    def enter(self) -> None:
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.path[:] = self.path


def _rank(
    here: Here,
    function: Callable[..., Any] | str,
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    folder: str,
    timeout_s: float,
) -> None:
    here.enter()
    stack_file = open(f"{folder}/stack-{rank}", "w")  # noqa: SIM115 (faulthandler keeps it)
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(f"{folder}/store", world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(
                seconds=timeout_s + 60.0
            ),  # the parent is first, and shows stacks
        )
        if isinstance(function, str):
            module, _, name = function.partition(":")
            function = getattr(importlib.import_module(module), name)
        result = function(*args)
        torch.distributed.barrier()  # nobody leaves while a peer still needs it
        Path(f"{folder}/result-{rank}").write_bytes(pickle.dumps(result))
        torch.distributed.destroy_process_group()
    except BaseException:  # noqa: BLE001 (every error goes to the parent)
        error = (time.time(), rank, traceback.format_exc())
        Path(f"{folder}/error-{rank}").write_bytes(pickle.dumps(error))
        os._exit(1)  # at once: an orderly exit may wait for a collective that never comes


def _stacks(running: list[Any], folder: str) -> str:
    """Where the ranks that hang stand now, by faulthandler."""
    for process in running:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    texts = [f"{path.name}:\n{path.read_text()}" for path in sorted(Path(folder).glob("stack-*"))]
    return "\n".join(texts)

"""A signal to a rank's whole process tree leaves its data workers working."""

import os
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest
from torch.utils.data import DataLoader, IterableDataset

from moe_ext.data.batches import leave_signals_to_the_rank


class Pids(IterableDataset):
    """The worker's process id, for ever."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield os.getpid()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_worker_outlives_a_stop_signal(number: signal.Signals) -> None:
    loader = DataLoader(
        Pids(), batch_size=None, num_workers=1, worker_init_fn=leave_signals_to_the_rank
    )
    items = iter(loader)
    worker = next(items)
    assert worker != os.getpid()
    # As a launcher does: the signal comes from a process that is not the worker's rank.
    subprocess.run(["kill", f"-{int(number)}", str(worker)], check=True)
    assert [next(items) for _ in range(10)] == [worker] * 10


def test_a_worker_obeys_its_rank() -> None:
    loader = DataLoader(
        Pids(), batch_size=None, num_workers=1, worker_init_fn=leave_signals_to_the_rank
    )
    items = iter(loader)
    worker = psutil.Process(next(items))
    worker.terminate()
    assert worker.wait(timeout=10) in (0, None)

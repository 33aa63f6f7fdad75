"""Settings of every test: no network, few threads, GPU tests only where there is a GPU."""

import fcntl
import os

# Before anything imports torch or Hugging Face libraries; the ranks that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from tests.infra.documents import Checkout, lines_of, tiny_demo

LONGEST = ("test_audit.py", "test_chain.py", "test_launch.py", "test_wandb.py", "test_docs_run.py")
"""Files of a minute each, which begin early, so that several workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # tests/chaos forks this process, which must hold no process group of another test
    items.sort(key=lambda item: ("chaos" not in item.path.parts, item.path.name not in LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with a finished `runs/demo`, started as the pages say and watched by every view: two ranks,
    a few steps, W&B offline in the group of a sweep, TensorBoard. Workers share it: only read it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "demo"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "finished").exists():
            return Checkout(folder / "checkout")
        checkout = tiny_demo(
            folder,
            "tracking.wandb_project=project",
            "tracking.tensorboard=true",
            "tracking.alerts.window=2",  # so strict that nearly every rule finds something
            "tracking.alerts.loss_spike=1.0001",
            "tracking.alerts.gradient_spike=1.0001",
            "tracking.alerts.slow_loader=0.000001",
            "tracking.alerts.stalled_s=0.05",
            "stages.tune.router_kl_coefficient=0.01",
        )
        (line,) = lines_of("finished_demo")
        checkout.sh(line, MOE_EXT_GROUP="sweep-7", HOME=str(checkout.folder))
        (folder / "finished").touch()
    return checkout

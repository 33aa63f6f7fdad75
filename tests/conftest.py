"""Settings of every test: no network, few threads, GPU tests only where there is a GPU."""

import os

# Before anything imports torch or Hugging Face libraries; the ranks that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # tests/chaos forks this process, which must hold no process group of another test
    items.sort(key=lambda item: "chaos" not in item.path.parts)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))

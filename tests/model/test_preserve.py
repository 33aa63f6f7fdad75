"""`scope=preserve`, every family: a text-only sequence keeps the base's bits through training.

Each placement against its own base: one rank, and two and four ranks that share the frozen experts.
"""

import hashlib

import pytest
import torch
from torch.nn import functional as F

from moe_ext.config import ExpertType, ExtensionConfig, Placement, Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.extend import LayerPlan, add_extension, extended_layers, load_base
from tests.model.tiny import TINY, save_tiny
from tests.ranks import run_ranks

_IMAGE = 1


def _forward(lm, seed: int, with_image: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (3, 12), generator=generator)
    modality = torch.zeros_like(ids)
    if with_image:
        modality[:2, 4:7] = _IMAGE
    lm.context_holder.context = RoutingContext(modality, torch.ones_like(ids))
    return lm(ids).logits


def _sha256(logits: torch.Tensor) -> str:
    return hashlib.sha256(logits.detach().float().contiguous().numpy().tobytes()).hexdigest()


def _hashes(folder: str, scope: Scope, settings: dict, dtype: torch.dtype) -> dict[str, str]:
    """Hashes of this rank's text-only and image logits before the extension, after it, and trained."""
    rank = world = 0
    ranks = {}
    if torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        ranks = {"ep_rank": rank, "ep_size": world, "ep_group": torch.distributed.group.WORLD}
    lm = load_base(folder, dtype=dtype, **ranks)
    found = {}

    def note(when: str) -> None:
        with torch.no_grad():
            found[f"text {when}"] = _sha256(_forward(lm, rank, False))
            found[f"image {when}"] = _sha256(_forward(lm, rank, True))

    note("before")
    plans = [LayerPlan(layer, 2, [1, 2], [1.0, 0.5]) for layer in extended_layers(lm)]
    add_extension(lm, folder, "vision", plans, ExtensionConfig(scope=scope, **settings))
    note("extended")
    parameters = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(3):
        logits = _forward(lm, 10 * step + rank, True).float()
        F.cross_entropy(logits.flatten(0, 1), torch.arange(36) + 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    note("trained")
    return found


def _check(found: dict[str, str]) -> None:
    assert found["text extended"] == found["text before"]
    assert found["text trained"] == found["text before"]
    assert found["image trained"] != found["image extended"] != found["image before"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for model_type in sorted(TINY):
        made[model_type] = tmp_path_factory.mktemp(model_type)
        save_tiny(made[model_type], model_type)
    return {model_type: str(folder) for model_type, folder in made.items()}


_SETTINGS = [
    {"placement": Placement.replicate},
    {"placement": Placement.replicate, "expert_type": ExpertType.lora},
]


@pytest.mark.parametrize("model_type", sorted(TINY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_rank(folders, model_type, dtype):
    for settings in _SETTINGS:
        _check(_hashes(folders[model_type], Scope.preserve, settings, dtype))


def test_the_hash_does_change_when_every_token_may_choose_new_experts(folders):
    found = _hashes(folders["mixtral"], Scope.joint, _SETTINGS[0], torch.float32)
    assert len({found[f"text {when}"] for when in ("before", "extended", "trained")}) == 3


def _hashes_of_ranks(folders: dict[str, str]) -> dict[str, dict[str, str]]:
    return {
        f"{model_type} {settings}": _hashes(folder, Scope.preserve, settings, torch.float32)
        for model_type, folder in folders.items()
        for settings in [*_SETTINGS, {"placement": Placement.shard}]
    }


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_the_frozen_experts(folders, world_size):
    for found in run_ranks(_hashes_of_ranks, world_size, folders):
        assert len(found) == 3 * len(TINY)
        for hashes in found.values():
            _check(hashes)

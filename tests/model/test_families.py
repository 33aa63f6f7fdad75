"""Every family with no new experts against transformers' own model, on tiny random checkpoints."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_ext.model.families import family_of, sparse_layers
from moe_ext.model.load import load_base
from moe_ext.model.moe import extended_layers
from tests.model.tiny import TINY, save_tiny

_BATCH, _LENGTH = 3, 11


@pytest.fixture(scope="module", params=sorted(TINY))
def saved(request, tmp_path_factory):
    """(folder, the Hugging Face model in fp32) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_tiny(folder, request.param)


def _tokens(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (_BATCH, _LENGTH), generator=generator)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def test_fp32_logits_and_hidden_states_equal_transformers(saved):
    folder, theirs = saved
    ours = load_base(folder, dtype=torch.float32)
    a = ours(_tokens(), output_hidden_states=True)
    b = theirs(_tokens(), output_hidden_states=True)
    assert _relative(a.logits, b.logits) < 1e-5
    assert len(a.hidden_states) == len(b.hidden_states)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert _relative(x, y) < 1e-5


@torch.no_grad()
def test_bf16_logits_differ_from_transformers_by_less_than_rounding_does(saved):
    folder, exact = saved
    ours = load_base(folder, dtype=torch.bfloat16)(_tokens()).logits.float()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(_tokens())
    theirs = theirs.logits.float()
    rounding = (theirs - exact(_tokens()).logits).abs().mean()
    assert rounding > 0
    assert (ours - theirs).abs().mean() <= rounding


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_transformers(saved, side):
    folder, theirs = saved
    ours = load_base(folder, dtype=torch.float32)
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.int64)
    if side == "left":
        mask[1, :4] = 0
    else:
        mask[1, -4:] = 0
    ids = _tokens() * mask
    a = ours(ids, attention_mask=mask).logits[mask.bool()]
    b = theirs(ids, attention_mask=mask).logits[mask.bool()]
    assert _relative(a, b) < 1e-5


@torch.no_grad()
def test_generation_with_cache_equals_transformers(saved):
    folder, theirs = saved
    ours = load_base(folder, dtype=torch.float32)
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.int64)
    mask[0, :3] = 0
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "attention_mask": mask,
        "eos_token_id": None,
    }
    a = ours.generate(_tokens() * mask, **settings)
    b = theirs.generate(_tokens() * mask, **settings)
    assert torch.equal(a.sequences, b.sequences)
    assert len(a.logits) == 6
    for x, y in zip(a.logits, b.logits, strict=True):
        assert _relative(x, y) < 1e-5


def test_frozen_numbers_are_what_the_checkpoint_holds(saved):
    folder, theirs = saved
    ours = load_base(folder, dtype=torch.float32)
    blocks = extended_layers(ours)
    assert list(blocks) == sparse_layers(ours.config) != []
    family = family_of(ours.config)
    for index, block in blocks.items():
        experts = getattr(theirs.model.layers[index], family.block).experts
        gate_up, down = experts.gate_up_proj, experts.down_proj
        if ours.config.model_type == "gpt_oss":
            gate_up = torch.cat([gate_up.mT[:, 0::2], gate_up.mT[:, 1::2]], 1)
            down = down.mT
        assert torch.equal(block.frozen.gate_up, gate_up)
        assert torch.equal(block.frozen.down, down)
    held = {name for name, _ in ours.named_parameters()}
    assert not any("frozen" in name for name in held)
    assert not any(p.requires_grad for p in ours.parameters())


def test_every_tensor_of_the_checkpoint_is_used(saved, monkeypatch):
    """Nothing is left unread, so no bias or scale of the architecture is forgotten."""
    from moe_ext.model import load

    read = set()

    class Watched(load.Checkpoint):
        def tensor(self, key):
            read.add(key)
            return super().tensor(key)

        def row(self, key, index):
            read.add(key)
            return super().row(key, index)

    monkeypatch.setattr(load, "Checkpoint", Watched)
    load_base(saved[0], dtype=torch.float32)
    assert read == set(load.Checkpoint(saved[0]))


def test_the_layout_of_transformers_5_loads_too(saved, tmp_path):
    _, theirs = saved
    theirs.save_pretrained(tmp_path, save_original_format=False)
    ours = load_base(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert _relative(ours(_tokens()).logits, theirs(_tokens()).logits) < 1e-5

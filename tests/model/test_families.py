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


def _within_rounding(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """In bf16 ours differs from transformers' by less than that differs from fp32."""
    rounding = (theirs.float() - exact).abs().mean()
    assert rounding > 0
    assert (ours.float() - theirs.float()).abs().mean() <= rounding


def _mask(side: str) -> torch.Tensor:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.int64)
    mask[1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    return mask


@pytest.fixture(scope="module")
def in_bf16(saved):
    """(ours in bf16, transformers' in bf16, transformers' in fp32) of one family."""
    folder, exact = saved
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return load_base(folder, dtype=torch.bfloat16), theirs, exact


def test_routers_are_in_transformers_precision(in_bf16):
    ours, theirs, _ = in_bf16
    stored = theirs.state_dict()
    keys = ours.base_info.family.router.weight
    for index, layer in extended_layers(ours).items():
        (weight,) = [
            stored[key] for key in (f"model.layers.{index}.{k}" for k in keys) if key in stored
        ]
        assert layer.router.frozen_weight.dtype is weight.dtype


@torch.no_grad()
def test_bf16_logits_and_hidden_states_are_within_rounding(in_bf16):
    ours, theirs, exact = (model(_tokens(), output_hidden_states=True) for model in in_bf16)
    _within_rounding(ours.logits, theirs.logits, exact.logits)
    # the first ones are the embeddings, which nothing rounds
    layers = zip(ours.hidden_states, theirs.hidden_states, exact.hidden_states, strict=True)
    first, *rest = layers
    assert torch.equal(first[0], first[1])
    for hidden in rest:
        _within_rounding(*hidden)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_bf16_padded_batches_are_within_rounding(in_bf16, side):
    mask = _mask(side)
    _within_rounding(
        *(m(_tokens() * mask, attention_mask=mask).logits[mask.bool()] for m in in_bf16)
    )


@torch.no_grad()
def test_bf16_decoding_with_cache_is_within_rounding(in_bf16):
    """Each token goes in alone, the same into all: a near tie would send free runs apart."""
    mask, tokens = _mask("left"), _tokens(seed=1)
    position = (mask.cumsum(1) - 1).clamp(min=0)

    def decoded(model) -> torch.Tensor:
        inputs = {"attention_mask": mask, "position_ids": position, "use_cache": True}
        out = model(_tokens() * mask, **inputs)
        logits = [out.logits[:, -1]]
        for step in range(6):
            inputs["attention_mask"] = torch.cat(
                [inputs["attention_mask"], torch.ones(_BATCH, 1, dtype=torch.int64)], 1
            )
            inputs["position_ids"] = position[:, -1:] + 1 + step
            cache = out.past_key_values
            out = model(tokens[:, step : step + 1], past_key_values=cache, **inputs)
            logits.append(out.logits[:, -1])
        return torch.stack(logits)

    _within_rounding(*(decoded(model) for model in in_bf16))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_transformers(saved, side):
    folder, theirs = saved
    ours, mask = load_base(folder, dtype=torch.float32), _mask(side)
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

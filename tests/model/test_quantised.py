"""Quantised checkpoints against transformers' own way of reading them, or an honest loop."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_ext.model.load import extended_layers, load_base
from moe_ext.model.quantised import BLOCKS_AT_ONCE, unpack_fp8, unpack_mxfp4
from tests.model.tiny import save_tiny


def _random_mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (..., G, 16) and scales (..., G) of a random (..., 32 G) matrix."""
    *lead, width = shape
    blocks = torch.randint(0, 256, (*lead, width // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(120, 127, (*lead, width // 32), dtype=torch.uint8)


def test_mxfp4_unpacks_as_transformers_does():
    torch.manual_seed(0)
    blocks, scales = _random_mxfp4(3, 10, 96)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    ours = torch.stack([unpack_mxfp4(blocks[e], scales[e]) for e in range(3)])
    assert torch.equal(ours.float(), theirs.mT)


def test_every_scale_is_exact():
    """Down to the smallest power of two, and across the pieces that are unpacked at once."""
    scales = torch.arange(255, dtype=torch.uint8).repeat(40)
    blocks = torch.randint(0, 256, (len(scales), 16), dtype=torch.uint8)
    assert len(scales) > 2 * BLOCKS_AT_ONCE
    ours = unpack_mxfp4(blocks, scales).double()
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    value = torch.cat([value, -value])
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(1).long()
    expected = value[codes] * 2.0 ** (scales.double() - 127).unsqueeze(1)
    fits = expected.abs() < 2.0**127
    assert torch.equal(ours.view(-1, 32)[fits], expected[fits])


def test_fp8_blocks_are_multiplied_by_their_factors():
    torch.manual_seed(0)
    weight = torch.randn(10, 7).to(torch.float8_e4m3fn)
    factors = torch.rand(3, 2)
    out = unpack_fp8(weight, factors, (4, 5))
    for row in range(10):
        for column in range(7):
            assert out[row, column] == weight[row, column].float() * factors[row // 4, column // 5]
    assert torch.equal(unpack_fp8(weight, factors, (4, 5), torch.bfloat16), out.bfloat16())


def _tensors_of(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


def _save(folder, tensors, quantisation) -> None:
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))


def _logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.arange(3, 60).view(3, 19)).logits


def test_a_gpt_oss_checkpoint_as_published_loads(tmp_path):
    """Blocks and scales in the place of the experts, the rest as saved: equal to the unpacked one."""
    torch.manual_seed(0)
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    for folder in (quantised, plain):
        save_tiny(folder, "gpt_oss", intermediate_size=32)
    packed, unpacked = _tensors_of(quantised), _tensors_of(plain)
    for layer in range(3):
        for name, shape in (("gate_up_proj", (6, 64, 32)), ("down_proj", (6, 32, 32))):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = _random_mxfp4(*shape)
            del packed[key]
            packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            unpacked[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    _save(quantised, packed, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    _save(plain, {key: value.contiguous() for key, value in unpacked.items()}, None)
    expected = _logits(load_base(plain, dtype=torch.float32))
    assert torch.equal(_logits(load_base(quantised, dtype=torch.float32)), expected)
    half = load_base(quantised, dtype=torch.float32, ep_rank=1, ep_size=2)
    assert extended_layers(half)[0].frozen.gate_up.shape == (3, 64, 32)


def test_an_fp8_checkpoint_loads_as_its_unpacked_numbers(tmp_path):
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    for folder in (quantised, plain):
        save_tiny(folder, "deepseek_v3")
    packed, unpacked = _tensors_of(quantised), _tensors_of(plain)
    for key, value in list(packed.items()):
        if not key.endswith("proj.weight"):
            continue
        rows, columns = value.shape
        factors = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.5
        packed[key] = value.to(torch.float8_e4m3fn)
        packed[f"{key}_scale_inv"] = factors
        spread = torch.kron(factors, torch.ones(16, 16))[:rows, :columns]
        unpacked[key] = packed[key].float() * spread
    _save(quantised, packed, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    _save(plain, unpacked, None)
    expected = _logits(load_base(plain, dtype=torch.float32))
    assert torch.equal(_logits(load_base(quantised, dtype=torch.float32)), expected)


def test_other_forms_are_refused(tmp_path):
    save_tiny(tmp_path, "mixtral")
    _save(tmp_path, _tensors_of(tmp_path), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="gptq.*converted to bf16"):
        load_base(tmp_path, dtype=torch.float32)

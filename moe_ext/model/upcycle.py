"""A dense model -> a mixture-of-experts base, saved as a Hugging Face folder of the Qwen2-MoE kind.

Qwen2-MoE fits because it can leave layers dense (`mlp_only_layers`), renormalise the chosen weights
(`norm_topk_prob`: copies then equal the dense layer, since the weights sum to one), and has
otherwise the attention of Llama, Qwen2 and Mistral: biases that the dense model lacks become zeros.
It insists on a shared expert, which is made one neuron wide and silent (its down projection is
zero).

Without specialisation the experts are copies: the same function as the dense model, and a routing
that means nothing. `moe_ext.model.specialise` makes them differ.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, Qwen2MoeConfig

from moe_ext.config import SpecialiseConfig
from moe_ext.model.checkpoint_files import publish_folder, save_tensors
from moe_ext.model.files import Checkpoint
from moe_ext.model.specialise import FitReport, SpecialisedLayer, specialise

DENSE_TYPES = ("llama", "qwen2", "mistral")
SHARED_WIDTH = 1
"""Width of the shared expert that the architecture insists on; a width of zero breaks readers."""

FORMAT_VERSION = 1
"""Part of the cached folder's name: raise it when the same settings write something else."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def num_decoder_layers(path: Path) -> int:
    """Decoder layers of the model in a Hugging Face folder."""
    return AutoConfig.from_pretrained(path).num_hidden_layers


def sparse_layers(num_layers: int, every: int, offset: int) -> list[int]:
    """Layers that become sparse: `offset`, `offset + every`, ...

    Raises:
        ValueError: the two numbers name no layer.
    """
    layers = list(range(offset, num_layers, every)) if every > 0 and offset >= 0 else []
    if not layers:
        raise ValueError(
            f"base.sparse_every={every} from base.sparse_offset={offset} names none of the "
            f"{num_layers} layers; choose sparse_every >= 1 and 0 <= sparse_offset < {num_layers}"
        )
    return layers


def default_width(dense_width: int) -> int:
    """Neurons of a specialised expert: two thirds of the dense layer's, in a multiple of 64."""
    return min(dense_width, max(1, round(dense_width * 2 / 3 / 64)) * 64)


def moe_config(
    dense: PretrainedConfig, num_experts: int, top_k: int, layers: list[int], expert_width: int
) -> Qwen2MoeConfig:
    """Configuration of the upcycled model.

    Raises:
        ValueError: a dense model that Qwen2-MoE cannot express, or impossible numbers.
    """
    if dense.model_type not in DENSE_TYPES:
        raise ValueError(
            f"base.dense holds a {dense.model_type!r} model; dense models of the types "
            f"{', '.join(DENSE_TYPES)} can be upcycled"
        )
    if getattr(dense, "mlp_bias", False) or getattr(dense, "attention_bias", False):
        raise ValueError(
            "base.dense has mlp_bias or attention_bias, which adds biases that Qwen2-MoE has no "
            "place "
            "for (feed-forward, attention output); choose a model without"
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"base.top_k={top_k} must lie between 1 and base.num_experts={num_experts}"
        )
    if expert_width > dense.intermediate_size:
        raise ValueError(
            f"base.specialise.expert_width={expert_width} exceeds the dense layer's "
            f"{dense.intermediate_size} neurons; choose at most that, or 0 for that"
        )
    num_layers = dense.num_hidden_layers
    window = getattr(dense, "sliding_window", None)
    if dense.model_type == "mistral":
        kinds = ["sliding_attention" if window else "full_attention"] * num_layers
    else:
        kinds = getattr(dense, "layer_types", None) or ["full_attention"] * num_layers
    config = Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in _SAME_SETTINGS if hasattr(dense, name)},
        use_sliding_window="sliding_attention" in kinds,
        sliding_window=window or 0,
        layer_types=list(kinds),
        mlp_only_layers=[layer for layer in range(num_layers) if layer not in layers],
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        moe_intermediate_size=expert_width,
        shared_expert_intermediate_size=SHARED_WIDTH,
        qkv_bias=True,
        architectures=["Qwen2MoeForCausalLM"],
    )
    config.head_dim = (
        getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    )
    return config


def upcycled_config(
    dense: PretrainedConfig,
    num_experts: int,
    top_k: int,
    layers: list[int],
    settings: SpecialiseConfig | None,
) -> Qwen2MoeConfig:
    """The configuration that `upcycle` gives its model, from the dense model's alone."""
    width = dense.intermediate_size
    if settings:
        width = settings.expert_width or default_width(width)
    return moe_config(dense, num_experts, top_k, layers, width)


_SAME_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)


def copies(
    files: Checkpoint, config: Qwen2MoeConfig, layer: int, seed: int = 0
) -> SpecialisedLayer:
    """The dense feed-forward of one layer as equal experts behind a random router.

    Width I' = `config.moe_intermediate_size` must be the dense width.
    """
    prefix = f"model.layers.{layer}.mlp"
    gate, up, down = (
        files.tensor(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down")
    )
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    rows = torch.randn(config.num_experts, config.hidden_size, generator=generator)
    repeat = (config.num_experts, 1, 1)
    return SpecialisedLayer(
        router_ED=(rows * config.hidden_size**-0.5).to(gate.dtype),
        gate_EID=gate.repeat(*repeat),
        up_EID=up.repeat(*repeat),
        down_EDI=down.repeat(*repeat),
    )


def checkpoint_tensors(
    files: Checkpoint, config: Qwen2MoeConfig, sparse: dict[int, SpecialisedLayer]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the upcycled checkpoint by its key, in the dtype of the dense one.

    Args:
        sparse: layer -> its experts; a layer of the configuration that is missing here gets copies.
    """
    hidden = config.hidden_size
    for key in files:
        if not _of_sparse_mlp(key, config):
            yield key, files.tensor(key)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in ("q", "k", "v"):
            if f"{prefix}.self_attn.{name}_proj.bias" not in files:
                weight = files.tensor(f"{prefix}.self_attn.{name}_proj.weight")
                yield f"{prefix}.self_attn.{name}_proj.bias", weight.new_zeros(len(weight))
        if layer in config.mlp_only_layers:
            continue
        experts = sparse.get(layer) or copies(files, config, layer)
        dtype = files.tensor(f"{prefix}.mlp.gate_proj.weight").dtype
        yield f"{prefix}.mlp.gate.weight", experts.router_ED.to(dtype)
        for e in range(config.num_experts):
            expert = f"{prefix}.mlp.experts.{e}"
            yield f"{expert}.gate_proj.weight", experts.gate_EID[e].to(dtype)
            yield f"{expert}.up_proj.weight", experts.up_EID[e].to(dtype)
            yield f"{expert}.down_proj.weight", experts.down_EDI[e].to(dtype)
        shared, wide = f"{prefix}.mlp.shared_expert", (SHARED_WIDTH, hidden)
        yield f"{shared}.gate_proj.weight", torch.zeros(wide, dtype=dtype)
        yield f"{shared}.up_proj.weight", torch.zeros(wide, dtype=dtype)
        yield f"{shared}.down_proj.weight", torch.zeros(wide[::-1], dtype=dtype)
        yield f"{shared}_gate.weight", torch.zeros((1, hidden), dtype=dtype)


def _of_sparse_mlp(key: str, config: Qwen2MoeConfig) -> bool:
    parts = key.split(".")
    return parts[:2] == ["model", "layers"] and (
        parts[3] == "mlp" and int(parts[2]) not in config.mlp_only_layers
    )


def upcycle(
    dense_path: Path,
    out_path: Path,
    num_experts: int = 4,
    top_k: int = 2,
    layers: list[int] | None = None,
    settings: SpecialiseConfig | None = None,
    calibration_texts: list[str] | None = None,
    progress: Callable[[FitReport], None] | None = None,
) -> Path:
    """`out_path`, a Qwen2-MoE folder with the dense model's tokenizer; written whole or not at all.

    Args:
        layers: layers that become sparse; every third, from the second on, when None.
        settings: how the experts are made to differ; None leaves them copies of the dense layer.
        calibration_texts: texts that the specialisation reads; needed with `settings`.

    Raises:
        ValueError: a dense model or numbers that do not fit, or too little text.
    """
    dense_path = Path(dense_path)
    layers = sparse_layers(num_decoder_layers(dense_path), 3, 1) if layers is None else layers
    dense = AutoConfig.from_pretrained(dense_path)
    config = upcycled_config(dense, num_experts, top_k, layers, settings)

    def write(folder: Path) -> None:
        files = Checkpoint(dense_path)
        sparse = {}
        if settings:
            texts = calibration_texts or []
            sparse = specialise(dense_path, config, layers, settings, texts, progress)
        config.save_pretrained(folder)
        save_tensors(folder, checkpoint_tensors(files, config, sparse))
        for name in TOKENIZER_FILES:
            if (dense_path / name).is_file():
                shutil.copyfile(dense_path / name, folder / name)
        record = {
            "upcycled_from": dense_path.name,
            "sparse_layers": layers,
            "specialise": asdict(settings) if settings else None,
        }
        (folder / "upcycle.json").write_text(json.dumps(record, indent=1) + "\n")

    return publish_folder(out_path, write)


def cached_upcycle(
    dense_path: Path,
    cache_dir: Path,
    num_experts: int,
    top_k: int,
    layers: list[int],
    settings: SpecialiseConfig | None,
    calibration_texts: list[str],
    progress: Callable[[FitReport], None] | None = None,
) -> Path:
    """The folder in `cache_dir` for these settings, this dense model and these texts, built if
    missing.

    The key holds the dense weights' sizes and times, not their bytes: hashing gigabytes at every
    start would cost more than it saves.
    """
    dense_path = Path(dense_path)
    weights = sorted(dense_path.glob("*.safetensors"))
    key = [
        FORMAT_VERSION,
        (dense_path / "config.json").read_text(),
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights],
        [num_experts, top_k, layers, asdict(settings) if settings else None],
        hashlib.sha256("\0".join(calibration_texts).encode()).hexdigest() if settings else "",
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    out_path = Path(cache_dir) / f"base-{digest}"
    return upcycle(
        dense_path, out_path, num_experts, top_k, layers, settings, calibration_texts, progress
    )

"""A whole run in miniature: a random MoE base with a tokenizer, a random CLIP tower, real shards."""

import json
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from moe_ext.data import write_shards
from tests.data.inputs import make_tokenizer, pair
from tests.model.tiny import save_tiny


def make_inputs(folder: Path) -> None:
    """folder/base, folder/tower and folder/shards."""
    tokenizer = make_tokenizer()
    save_tiny(folder / "base", "qwen2_moe", vocab_size=len(tokenizer) + 5)
    tokenizer.save_pretrained(folder / "base")
    make_tower(folder / "tower")
    splits = ["train"] * 8 + ["probe", "heldout"]
    write_shards(
        ((splits[i % 10], pair(37 * i)) for i in range(160)), folder / "shards", name="pairs"
    )


def make_tower(folder: Path) -> None:
    """A random CLIP tower: 16 pixels, patches of 8, three layers."""
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(vision).save_pretrained(folder)
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))


def overrides(folder: Path, run: str, *more: str) -> list[str]:
    """Hydra overrides of a run on these inputs: four stages of a few steps, fp32."""
    streams = f"data.streams.train.manifest={folder}/shards/pairs.json"
    return [
        f"name={run}",
        f"run_dir={folder}/{run}",
        f"cache_dir={folder}/cache",
        "base=folder",
        f"base.path={folder}/base",
        "encoder@encoder.image=clip",
        f"encoder.image.path={folder}/tower",
        "encoder.image.image_size=16",
        "encoder.image.tokens_per_item=4",
        "connector.hidden_dim=24",
        "connector.closed_form_samples=24",
        "data=shards",
        streams,
        "data.streams.probe.split=probe",
        "data.num_workers=0",
        "data.max_length=64",
        "data.shuffle_window=16",
        "tracking=local",
        "parallel.precision=fp32",
        "parallel.threads_per_rank=1",
        "parallel.timeout_s=60",
        "stages.align.steps=4",
        "stages.align.sequences_per_rank=2",
        "stages.align.checkpoint_every=2",
        "stages.probe.steps=3",
        "stages.probe.sequences_per_rank=2",
        "stages.probe.statistics_samples=16",
        "stages.tune.steps=13",
        "stages.tune.sequences_per_rank=2",
        "stages.tune.accumulation=2",
        "stages.tune.checkpoint_every=2",
        "stages.tune.balance_coefficient=0.01",
        "evaluation.candidates=4",
        "evaluation.captions=2",
        "evaluation.text_tokens=256",
        *more,
    ]

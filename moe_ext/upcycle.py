"""`moe-ext upcycle`: a dense language model -> a specialised mixture-of-experts base in a
folder."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from moe_ext.config import BaseConfig, SpecialiseConfig
from moe_ext.data.texts import python_docs
from moe_ext.model.gguf import BUILTIN, builtin_config, builtin_dense
from moe_ext.model.specialise import FitReport
from moe_ext.model.upcycle import (
    cached_upcycle,
    num_decoder_layers,
    sparse_layers,
    upcycle,
    upcycled_config,
)

BUILTIN_PREFIX = "builtin:"


def calibration_texts() -> list[str]:
    """English technical prose, docstrings and code out of Python's own library; held-out parts
    excluded.

    Mostly prose (about 330, 165 and 80 thousand characters): the fit draws its tokens evenly from
    them.
    """
    texts = python_docs("train", "topics")
    for kind, characters in (("docstrings", 165_000), ("code", 80_000)):
        for text in python_docs("train", kind):
            if characters <= 0:
                break
            texts.append(text[:characters])
            characters -= len(text)
    return texts


def dense_folder(dense: str, cache_dir: Path) -> Path:
    """Folder of the dense model that `base.dense` names.

    Raises:
        ValueError: no such folder, or no such built-in model.
    """
    if dense.startswith(BUILTIN_PREFIX):
        return builtin_dense(dense.removeprefix(BUILTIN_PREFIX), cache_dir)
    if not (Path(dense) / "config.json").is_file():
        raise ValueError(
            f"base.dense={dense!r} holds no config.json; give the folder of a Hugging Face model, "
            "or "
            f"one of {[BUILTIN_PREFIX + name for name in BUILTIN]}"
        )
    return Path(dense)


def prepare_base(
    base: BaseConfig, cache_dir: Path, progress: Callable[[FitReport], None] | None = None
) -> Path:
    """Folder of the base that the configuration describes; upcycled into `cache_dir` when missing.

    For one process; others wait for it and call this again, which then only looks the folder up.
    """
    if base.path:
        return Path(base.path)
    dense = dense_folder(base.dense, Path(cache_dir))
    num_layers = num_decoder_layers(dense)
    return cached_upcycle(
        dense,
        Path(cache_dir),
        base.num_experts,
        base.top_k,
        sparse_layers(num_layers, base.sparse_every, base.sparse_offset),
        base.specialise,
        calibration_texts(),
        progress,
    )


def planned_config(base: BaseConfig, cache_dir: Path) -> Any:
    """The Hugging Face configuration that the base will have once it is upcycled; nothing is written."""
    if base.dense.startswith(BUILTIN_PREFIX):
        dense: PretrainedConfig = builtin_config(base.dense.removeprefix(BUILTIN_PREFIX))
    else:
        dense = AutoConfig.from_pretrained(dense_folder(base.dense, cache_dir))
    layers = sparse_layers(dense.num_hidden_layers, base.sparse_every, base.sparse_offset)
    return upcycled_config(dense, base.num_experts, base.top_k, layers, base.specialise)


def describe(report: FitReport) -> str:
    load = " ".join(f"{share:.2f}" for share in report.load_E)
    return (
        f"layer {report.layer:>3}: output error {report.pruned_error:.3f} pruned, "
        f"{report.error:.3f} refitted; load {load}"
    )


def main(arguments: Sequence[str]) -> int:
    """Exit code of the command."""
    base, fit = BaseConfig(), SpecialiseConfig()
    parser = argparse.ArgumentParser(
        prog="moe-ext upcycle",
        description="Make a mixture-of-experts base (Qwen2-MoE) out of a dense Llama, Qwen2 or Mistral "
        "model: every so many layers get experts that are narrower than the dense layer, fitted in "
        "closed form to the tokens that their router sends them.",
    )
    add = parser.add_argument
    add("dense", help="folder of a dense Hugging Face model, or builtin:smollm2")
    add("out", type=Path, help="folder to make; an existing one is left as it is")
    add("--num-experts", type=int, default=base.num_experts, help="default %(default)s")
    add("--top-k", type=int, default=base.top_k, help="default %(default)s")
    add("--sparse-every", type=int, default=base.sparse_every, help="default %(default)s")
    add("--sparse-offset", type=int, default=base.sparse_offset, help="default %(default)s")
    add("--copies", action="store_true", help="equal experts: the dense model's function")
    add("--tokens", type=int, default=fit.tokens, help="tokens the fit reads; default %(default)s")
    add(
        "--expert-width",
        type=int,
        default=fit.expert_width,
        help="neurons of an expert; 0: two thirds of the dense layer's",
    )
    add("--seed", type=int, default=fit.seed, help="default %(default)s")
    add(
        "--text",
        type=Path,
        action="append",
        help="text file to fit to; may be repeated; default: parts of Python's documentation and library",
    )
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        dense = dense_folder(given.dense, given.out.parent)
        num_layers = num_decoder_layers(dense)
        layers = sparse_layers(num_layers, given.sparse_every, given.sparse_offset)
        settings = SpecialiseConfig(
            tokens=given.tokens, expert_width=given.expert_width, seed=given.seed
        )
        texts = [path.read_text() for path in given.text] if given.text else calibration_texts()
        upcycle(
            dense,
            given.out,
            given.num_experts,
            given.top_k,
            layers,
            None if given.copies else settings,
            texts,
            lambda report: print(describe(report), flush=True),
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"moe-ext upcycle: {error}\n")
    print(f"{given.out}: {len(layers)} sparse layers, {time.perf_counter() - start:.0f} s")
    return 0

"""`moe-ext shards make|index|check|look`: webdataset shards from other formats, and what is in them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .convert import KINDS, ConversionError, convert, split_of
from .fetch import Fetcher
from .look import check, contact_sheet
from .manifest import Manifest, ManifestError
from .packing import measure_lengths
from .s3 import S3Access
from .samples import SampleBuilder, load_tokenizer
from .shards import ShardError, index_shards, write_shards
from .sources import prepare_openmoji


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 `check` found problems, 2 the input cannot be used."""
    options = parser().parse_args(list(arguments))
    try:
        return options.run(options)
    except (ConversionError, ManifestError, ShardError, FileNotFoundError, ValueError) as error:
        print(f"moe-ext shards {options.command}: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="moe-ext shards", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    make = commands.add_parser(
        "make",
        help="write shards and their manifest from another format",
        description="Writes OUT/shard-000000.tar, ... and OUT/shard.json. The format is guessed from the "
        "source: LLaVA JSON (.json, .jsonl), CSV or TSV, a folder of parquet or arrow files, an imagefolder (with "
        "metadata.csv or .jsonl), img2dataset's files (NAME.jpg beside NAME.txt). `openmoji` instead of "
        "a source draws the built-in set.",
    )
    make.add_argument("source", help="file or folder, or the word openmoji")
    make.add_argument("out", help="folder of the new shards")
    make.add_argument("--format", default="", choices=["", *KINDS], help="do not guess")
    make.add_argument("--images", default="", help="folder that image paths start from")
    make.add_argument("--heldout-share", type=float, default=0.0, help="by a hash of the key")
    make.add_argument("--image-column", default="")
    make.add_argument("--caption-column", default="")
    make.add_argument("--samples-per-shard", type=int, default=1000)
    make.add_argument("--licence", default="", help="kept in the manifest")
    make.add_argument("--attribution", default="", help="kept in the manifest")
    make.set_defaults(run=_make)

    index = commands.add_parser(
        "index",
        help="write the manifest of existing webdataset tars",
        description="Reads every tar once: sizes, hashes, places of samples. With --tokenizer also the "
        "token lengths that packing plans from: of the samples as a run with the same settings builds "
        "them, which --config takes from that run.",
    )
    index.add_argument("tars", nargs="*", help="files or urls, or none with an existing manifest")
    index.add_argument("--manifest", required=True, help="path to write, NAME.json")
    index.add_argument("--heldout-share", type=float, default=0.0, help="by a hash of the key")
    index.add_argument("--tokenizer", default="", help="folder of a Hugging Face tokenizer")
    index.add_argument(
        "--config",
        default="",
        help="the run's settings: what `moe-ext train ... --show` prints, or config.json of its folder",
    )
    index.add_argument("--tokens-per-item", type=int, help="tokens an image becomes (9)")
    index.add_argument("--prompt", help="data.prompt of the run (A picture of)")
    index.add_argument("--max-length", type=int, help="data.max_length of the run (128)")
    index.add_argument(
        "--no-chat-template",
        dest="chat_template",
        action="store_false",
        default=None,
        help="base.chat_template=false in the run",
    )
    index.set_defaults(run=_index)

    verify = commands.add_parser(
        "check", help="read every shard, sample and image; name what is wrong (exit code 1)"
    )
    verify.add_argument("manifest", help="path or url (http, https, s3)")
    verify.add_argument("--no-decode", action="store_true", help="do not decode images")
    verify.set_defaults(run=_check)

    look = commands.add_parser("look", help="a page of pictures with their captions, as HTML")
    look.add_argument("manifest", help="path or url (http, https, s3)")
    look.add_argument("--out", default="shards.html")
    look.add_argument("--split", default="all")
    look.add_argument("--count", type=int, default=96)
    look.add_argument("--seed", type=int, default=0)
    for command in (index, verify, look):
        command.add_argument(
            "--cache",
            default="runs/cache",
            help="cache_dir of the run: remote shards are kept there",
        )
        command.add_argument(
            "--cache-bytes", type=int, default=0, help="size those are kept under; 0: no limit"
        )
    look.set_defaults(run=_look)
    return top


def _make(options: argparse.Namespace) -> int:
    if options.source == "openmoji":
        path = prepare_openmoji(options.out)
    else:
        given = {"licence": options.licence, "attribution": options.attribution}
        pairs = convert(
            options.source,
            options.format,
            images=options.images,
            heldout_share=options.heldout_share,
            image_column=options.image_column,
            caption_column=options.caption_column,
        )
        path = write_shards(
            pairs,
            options.out,
            samples_per_shard=options.samples_per_shard,
            info={"source": str(options.source), **{k: v for k, v in given.items() if v}},
        )
    _tell(path, Manifest.load(path))
    return 0


def _fetcher(options: argparse.Namespace) -> Fetcher:
    return Fetcher(
        Path(options.cache) / "shards",
        limit_bytes=options.cache_bytes,
        s3=S3Access.from_environment(os.environ),
        verify_local=False,  # `check` reads every byte itself, `look` a few
    )


def _load(options: argparse.Namespace, local: Fetcher) -> Manifest:
    return Manifest.load(options.manifest, local.read, lengths_dir=Path(options.cache) / "lengths")


def _index(options: argparse.Namespace) -> int:
    local = _fetcher(options)
    if options.tars:
        share = options.heldout_share
        index_shards(
            options.tars, options.manifest, split_of=lambda key: split_of(key, share), local=local
        )
    manifest = _load(options, local)
    if options.tokenizer or options.config:
        build = _builder(options)
        print(f"token lengths: {measure_lengths(manifest, build, local=local)}")
    _tell(options.manifest, manifest)
    return 0


def _builder(options: argparse.Namespace) -> SampleBuilder:
    """What makes samples as long as the run's: its settings, under those given one by one."""
    settings: dict[str, Any] = {}
    tokenizer = options.tokenizer
    if options.config:
        try:
            run = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))
            first = next(iter(run["encoder"].values()))
            settings = {
                "tokens_per_item": first["tokens_per_item"],
                "prompt": run["data"]["prompt"],
                "max_length": run["data"]["max_length"],
                "chat_template": run["base"]["chat_template"],
            }
            tokenizer = tokenizer or run["base"]["path"]
        except (yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
            raise ValueError(
                f"--config {options.config} holds no settings of a run ({type(error).__name__}: {error}); "
                "write them with `moe-ext train ... --show`"
            ) from None
    if not tokenizer:
        raise ValueError("base.path is empty in --config; name the base's folder with --tokenizer")
    defaults = {"tokens_per_item": 9}
    given = {
        name: getattr(options, name)
        for name in ("tokens_per_item", "prompt", "max_length", "chat_template")
        if getattr(options, name) is not None
    }
    return SampleBuilder(load_tokenizer(tokenizer), **{**defaults, **settings, **given})


def _check(options: argparse.Namespace) -> int:
    local = _fetcher(options)
    found = check(_load(options, local), decode=not options.no_decode, local=local)
    for problem in found.problems:
        print(problem)
    splits = ", ".join(f"{name} {count:,}" for name, count in sorted(found.splits.items()))
    print(
        f"{found.num_shards:,} shards, {found.num_samples:,} samples ({splits}), "
        f"{found.num_images:,} images decoded: {len(found.problems)} problems"
    )
    return 1 if found.problems else 0


def _look(options: argparse.Namespace) -> int:
    local = _fetcher(options)
    page = contact_sheet(
        _load(options, local),
        split=options.split,
        count=options.count,
        seed=options.seed,
        local=local,
    )
    Path(options.out).write_text(page, encoding="utf-8")
    print(f"{options.out} ({len(page) / 1e6:.1f} MB)")
    return 0


def _tell(path: str | Path, manifest: Manifest) -> None:
    size = sum(shard.size_bytes for shard in manifest.shards)
    print(
        f"{path}: {manifest.num_samples:,} samples in {len(manifest.shards)} shards, {size / 1e6:.1f} MB"
    )

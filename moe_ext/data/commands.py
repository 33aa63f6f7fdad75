"""`moe-ext shards make|index|check|look`: webdataset shards from other formats, and what is in them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .convert import KINDS, ConversionError, convert, split_of
from .look import check, contact_sheet
from .manifest import Manifest, ManifestError
from .packing import measure_lengths
from .samples import SampleBuilder
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
        "source: LLaVA JSON (.json, .jsonl), CSV or TSV, a folder of parquet files, an imagefolder (with "
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
        "token lengths that packing plans from.",
    )
    index.add_argument("tars", nargs="*", help="tar files, or none with an existing manifest")
    index.add_argument("--manifest", required=True, help="path to write, NAME.json")
    index.add_argument("--heldout-share", type=float, default=0.0, help="by a hash of the key")
    index.add_argument("--tokenizer", default="", help="folder of a Hugging Face tokenizer")
    index.add_argument("--tokens-per-item", type=int, default=9, help="tokens an image becomes")
    index.add_argument("--prompt", default="A picture of", help="data.prompt of the run")
    index.add_argument("--max-length", type=int, default=128, help="data.max_length of the run")
    index.set_defaults(run=_index)

    verify = commands.add_parser(
        "check", help="read every shard, sample and image; name what is wrong (exit code 1)"
    )
    verify.add_argument("manifest")
    verify.add_argument("--no-decode", action="store_true", help="do not decode images")
    verify.set_defaults(run=_check)

    look = commands.add_parser("look", help="a page of pictures with their captions, as HTML")
    look.add_argument("manifest")
    look.add_argument("--out", default="shards.html")
    look.add_argument("--split", default="all")
    look.add_argument("--count", type=int, default=96)
    look.add_argument("--seed", type=int, default=0)
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
    _tell(path)
    return 0


def _index(options: argparse.Namespace) -> int:
    path = Path(options.manifest)
    if options.tars:
        share = options.heldout_share
        index_shards(options.tars, path, split_of=lambda key: split_of(key, share))
    if options.tokenizer:
        from transformers import AutoTokenizer

        build = SampleBuilder(
            AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True),
            tokens_per_item=options.tokens_per_item,
            prompt=options.prompt,
            max_length=options.max_length,
        )
        print(f"token lengths: {measure_lengths(path, build)}")
    _tell(path)
    return 0


def _check(options: argparse.Namespace) -> int:
    found = check(Manifest.load(options.manifest), decode=not options.no_decode)
    for problem in found.problems:
        print(problem)
    splits = ", ".join(f"{name} {count:,}" for name, count in sorted(found.splits.items()))
    print(
        f"{found.num_shards:,} shards, {found.num_samples:,} samples ({splits}), "
        f"{found.num_images:,} images decoded: {len(found.problems)} problems"
    )
    return 1 if found.problems else 0


def _look(options: argparse.Namespace) -> int:
    page = contact_sheet(
        Manifest.load(options.manifest), split=options.split, count=options.count, seed=options.seed
    )
    Path(options.out).write_text(page, encoding="utf-8")
    print(f"{options.out} ({len(page) / 1e6:.1f} MB)")
    return 0


def _tell(path: Path) -> None:
    manifest = Manifest.load(path)
    size = sum(shard.size_bytes for shard in manifest.shards)
    print(
        f"{path}: {manifest.num_samples:,} samples in {len(manifest.shards)} shards, {size / 1e6:.1f} MB"
    )

"""Other people's formats -> (split, raw sample) pairs that `write_shards` takes.

LLaVA JSON with an image folder, img2dataset's files, Hugging Face `imagefolder`, parquet and
`save_to_disk` folders, and CSV. Images are copied byte for byte, never decoded again.
"""

import csv
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .images import IMAGE_SUFFIXES
from .shards import RawSample

log = logging.getLogger(__name__)


class ConversionError(ValueError):
    """The input is not of the format it was said to be, or names an image that is not there."""


def convert(
    source: str | Path,
    kind: str = "",
    *,
    images: str | Path = "",
    heldout_share: float = 0.0,
    image_column: str = "",
    caption_column: str = "",
) -> Iterator[tuple[str, RawSample]]:
    """(split, sample) pairs of a source; `kind` is guessed when it is empty.

    Args:
        kind: one of `KINDS`.
        images: folder that image paths start from; by default the source's own.
        heldout_share: share of samples, by a hash of their keys, that become split `heldout`.
        image_column, caption_column: columns of a CSV or parquet file; the usual names are found.

    Raises:
        ConversionError: at the first sample that cannot be converted, by name; or there is none at all.
    """
    source = Path(source)
    kind = kind or guess(source)
    if kind not in KINDS:
        raise ConversionError(f"--format {kind!r} is not known; choose one of {sorted(KINDS)}")
    folder = Path(images) if images else (source if source.is_dir() else source.parent)
    seen: dict[str, int] = {}
    for name, sample in KINDS[kind](source, folder, image_column, caption_column):
        key = unique_key(name, seen)
        yield split_of(key, heldout_share), {"__key__": key, **sample}
    if not seen:
        raise ConversionError(
            f"{source} holds no sample of format {kind}; name another with --format"
        )


def guess(source: Path) -> str:
    """The format that a path looks like."""
    if source.is_dir():
        if any(source.rglob("*.parquet")) or any(source.rglob("*.arrow")):
            return "parquet"
        return "imagefolder" if any(source.glob("metadata.*")) else "img2dataset"
    return {".json": "llava", ".jsonl": "llava", ".csv": "csv", ".tsv": "csv"}.get(
        source.suffix, ""
    )


def split_of(key: str, heldout_share: float) -> str:
    """`heldout` for that share of keys, by hash: adding samples moves none from one to the other."""
    drawn = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "heldout" if drawn < heldout_share else "train"


def unique_key(name: str, seen: dict[str, int]) -> str:
    """A key that tar readers keep whole: no dots, no way up, never twice."""
    key = "/".join(
        re.sub(r"[^\w-]+", "_", part) for part in name.split("/") if part not in ("", ".", "..")
    )
    key = key or "sample"
    count = seen[key] = seen.get(key, -1) + 1
    return f"{key}_{count}" if count else key


def _llava(source: Path, folder: Path, *_: str) -> Iterator[tuple[str, RawSample]]:
    """LLaVA's list of {"id", "image" (one path or several), "conversations"}; .jsonl: one a line."""
    text = source.read_text(encoding="utf-8")
    try:
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if source.suffix == ".jsonl"
            else json.loads(text)
        )
    except ValueError as error:
        raise ConversionError(f"{source} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ConversionError(f"{source} holds a {type(rows).__name__}, not a list of samples")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not any(
            k in row for k in ("conversations", "caption", "text")
        ):
            raise ConversionError(f"{source}, sample {number}: no conversations, caption or text")
        paths = row.get("images") or row.get("image") or []
        paths = [paths] if isinstance(paths, str) else paths
        name = str(row.get("id", f"{source.stem}-{number:08d}"))
        members = {}
        for i, path in enumerate(paths):
            suffix, data = _image(folder, path, f"{source}, sample {name}")
            members[suffix if len(paths) == 1 else f"{i}.{suffix}"] = data
        yield name, {**members, "json": _json(row)}


def _img2dataset(source: Path, folder: Path, *_: str) -> Iterator[tuple[str, RawSample]]:
    """img2dataset's `files` output: NAME.jpg beside NAME.txt and NAME.json. (Its tars: `shards index`.)"""
    left_out = 0
    for image in _images_below(source):
        sample: RawSample = {image.suffix[1:].lower(): image.read_bytes()}
        for suffix in ("txt", "json"):
            beside = image.with_suffix(f".{suffix}")
            if beside.exists():
                sample[suffix] = beside.read_bytes()
        if len(sample) > 1:
            yield str(image.relative_to(source).with_suffix("")), sample
        else:
            left_out += 1
            if left_out == 1:
                log.warning("%s has neither .txt nor .json beside it and is left out", image)
    if left_out > 1:
        log.warning("%d images without a caption were left out", left_out)


def _imagefolder(
    source: Path, folder: Path, image_column: str, caption_column: str
) -> Iterator[tuple[str, RawSample]]:
    """Hugging Face `imagefolder`: metadata.csv or metadata.jsonl with `file_name` and a caption column."""
    metadata = next(iter(sorted(source.glob("metadata.*"))), None)
    if metadata is None:
        raise ConversionError(f"{source} has no metadata.csv or metadata.jsonl")
    if metadata.suffix == ".jsonl":
        lines = metadata.read_text(encoding="utf-8").splitlines()
        rows: Iterable[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    else:
        with open(metadata, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    yield from _table(rows, folder, image_column, caption_column, str(metadata))


def _csv(
    source: Path, folder: Path, image_column: str, caption_column: str
) -> Iterator[tuple[str, RawSample]]:
    """A CSV (or .tsv) with a header row."""
    with open(source, newline="", encoding="utf-8") as f:
        rows = csv.DictReader(f, delimiter="\t" if source.suffix == ".tsv" else ",")
        yield from _table(rows, folder, image_column, caption_column, str(source))


def _parquet(
    source: Path, folder: Path, image_column: str, caption_column: str
) -> Iterator[tuple[str, RawSample]]:
    """Parquet or arrow files (`save_to_disk`) of a Hugging Face data set.

    Image columns hold {"bytes", "path"}, or paths.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise ConversionError("parquet and arrow files need `pip install pyarrow`") from None
    found = (p for p in source.rglob("*") if p.suffix in (".parquet", ".arrow"))
    for file in sorted(found) if source.is_dir() else [source]:
        if file.suffix == ".arrow":
            with arrow.memory_map(str(file)) as mapped:
                for batch in arrow.ipc.open_stream(mapped):
                    yield from _table(
                        batch.to_pylist(), folder, image_column, caption_column, str(file)
                    )
            continue
        for batch in parquet.ParquetFile(file).iter_batches(256):
            yield from _table(batch.to_pylist(), folder, image_column, caption_column, str(file))


KINDS: dict[str, Callable[..., Iterator[tuple[str, RawSample]]]] = {
    "llava": _llava,
    "img2dataset": _img2dataset,
    "imagefolder": _imagefolder,
    "csv": _csv,
    "parquet": _parquet,
}


def _table(
    rows: Iterable[dict[str, Any]], folder: Path, image_column: str, caption_column: str, place: str
) -> Iterator[tuple[str, RawSample]]:
    for number, row in enumerate(rows):
        image_name = image_column or _known(
            row, ("image", "file_name", "image_path", "path", "filepath")
        )
        text_name = caption_column or _known(row, ("caption", "text", "title", "conversations"))
        if text_name not in row or (image_name and image_name not in row):
            raise ConversionError(
                f"{place}, row {number}: columns {list(row)} hold no {image_name or 'image'} and "
                f"{text_name or 'caption'}; name them with --image-column and --caption-column"
            )
        rest = {
            k: v for k, v in row.items() if k != image_name and isinstance(v, str | int | float)
        }
        if text_name == "conversations":
            rest["conversations"] = row[text_name]
        elif image_name:
            rest["caption"] = row[text_name]
        else:
            rest["text"] = row[text_name]
        value = row.get(image_name) if image_name else None
        name = f"{Path(place).stem}-{number:08d}"
        sample: RawSample = {"json": _json(rest)}
        if isinstance(value, dict) and value.get("bytes"):
            suffix = Path(value.get("path") or "x.jpg").suffix[1:].lower() or "jpg"
            sample[suffix] = value["bytes"]
        elif value:
            path = value["path"] if isinstance(value, dict) else value
            suffix, sample_bytes = _image(folder, path, f"{place}, row {number}")
            sample[suffix] = sample_bytes
            name = str(Path(path).with_suffix(""))
        yield name, sample


def _known(row: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), "")


def _image(folder: Path, path: str, place: str) -> tuple[str, bytes]:
    """(suffix, bytes) of an image below a folder; a path may not lead out of it."""
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ConversionError(f"{place}: image path {path!r} leads out of {folder}")
    suffix = file.suffix[1:].lower()
    if suffix not in IMAGE_SUFFIXES:
        raise ConversionError(f"{place}: {path!r} ends in none of {IMAGE_SUFFIXES}")
    try:
        return suffix, file.read_bytes()
    except OSError as error:
        raise ConversionError(f"{place}: {error}; is --images right?") from None


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix[1:].lower() in IMAGE_SUFFIXES)


def _json(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()

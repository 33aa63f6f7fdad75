"""Held-out image-caption pairs, and the few ways in which evaluation turns them into batches."""

import base64
import io
from dataclasses import dataclass, replace

from PIL import Image

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.data.batches import collate
from moe_ext.data.manifest import Manifest
from moe_ext.data.samples import (
    Sample,
    SampleBuilder,
    caption_of,
    decode_image,
    image_members,
    read_json,
)
from moe_ext.data.shards import RawSample
from moe_ext.data.streams import ShardStream


@dataclass
class Item:
    """One pair."""

    key: str
    caption: str
    raw: RawSample


def load_items(manifest: Manifest, split: str, count: int, seed: int = 0) -> list[Item]:
    """The first `count` pairs of a split in an order that `seed` fixes; fewer when it holds fewer.

    Raises:
        ManifestError: no such split, or an empty one.
    """
    stream = ShardStream(manifest, split=split, seed=seed, name=split)
    items = []
    for position in range(min(count, len(stream))):
        raw = stream.raw(position)
        key = str(raw.get("__key__", position))
        items.append(Item(key, caption_of(raw, read_json(raw, key), key), raw))
    return items


def prompt_length(sample: Sample) -> int:
    """Positions before the caption: the last of them predicts the caption's first token."""
    return int((sample.labels != IGNORED_LABEL).nonzero()[0]) + 1


def captioned(build: SampleBuilder, caption: str, media: list) -> Sample:
    """The sample of a caption under an image whose encoder input is at hand."""
    return build.assemble(build.captioned(caption), media, "")


def prompt_batch(build: SampleBuilder, items: list[Item]) -> Batch:
    """Image and prompt of every item, one a row, ready to be continued."""
    rows = []
    for item in items:
        whole = captioned(build, "a", [(build.modality_id, build.image(item.raw))])
        length = prompt_length(whole)
        rows.append([cut(whole, length)])
    return collate(rows, pad_id=build.pad_id)


def pair_batch(build: SampleBuilder, items: list[Item]) -> Batch:
    """Every item's image with its own caption, one a row."""
    return collate([[build(item.raw)] for item in items], pad_id=build.pad_id)


def cut(sample: Sample, length: int) -> Sample:
    """The first positions of a sample, without targets."""
    return replace(
        sample,
        input_ids=sample.input_ids[:length],
        labels=sample.labels[:length].fill_(IGNORED_LABEL),
        modality_ids=sample.modality_ids[:length],
    )


def thumbnail(item: Item, side: int = 144) -> str:
    """The item's image as base64 PNG of at most `side` pixels."""
    image = decode_image(item.raw[image_members(item.raw)[0]], item.key)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.quantize(64).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()

"""`moe-ext bench stream`: samples a second of one process, beside raw tar reading and other loaders.

Every reader gives the same samples of the same shards, from the page cache, members as bytes (and in
the second half images as decoded RGB arrays). Readers take turns of 100 samples, so that a busy machine
slows all of them alike; the ratio is the median over rounds of ours / theirs within a round. The first
round, in which ours checks hashes and the others set themselves up, is not counted.

Peers are measured where they are installed, and named where they are not. They need no torch of their own:
    pip install --no-deps mosaicml-streaming==0.13.0 boto3 botocore s3transfer jmespath Brotli \\
        python-snappy cramjam "xxhash<4" zstd catalogue          (and torchvision, which it imports)
    pip install --no-deps litdata==0.2.76 lightning-utilities boto3 botocore s3transfer jmespath \\
        tifffile obstore
"""

import argparse
import importlib.metadata
import io
import itertools
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from moe_ext.data import Manifest, ShardStream, write_shards
from moe_ext.data.images import decode_image
from moe_ext.data.local import LocalFiles

Reader = Callable[[], Iterator[object]]

PEERS = {"mosaicml_streaming": "0.13.0", "litdata": "0.2.76"}
"""Peer -> the version that results are quoted with; another one is measured too, and named."""


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as folder:
        path = options.manifest or str(
            synthetic(Path(folder) / "shards", options.samples, options.pixels)
        )
        result = measure(Path(path), Path(folder), options.rounds)
    print(table(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="moe-ext bench stream", description=__doc__)
    top.add_argument("--manifest", default="", help="shards to read; default: synthetic photos")
    top.add_argument("--samples", type=int, default=2000, help="synthetic samples")
    top.add_argument("--pixels", type=int, default=256, help="side of a synthetic photo")
    top.add_argument("--rounds", type=int, default=7)
    top.add_argument("--json", default="", help="write the result here")
    return top


def synthetic(folder: Path, num_samples: int, pixels: int) -> Path:
    """Manifest of noisy JPEGs (like photos in size and decoding time) with captions."""
    draw = np.random.default_rng(0)
    images = []
    for _ in range(16):  # a few pictures, many times: the bytes matter, not the content
        low = draw.integers(0, 255, (pixels // 8, pixels // 8, 3), np.uint8)
        noisy = np.array(Image.fromarray(low).resize((pixels, pixels)), np.int16)
        noisy = np.clip(noisy + draw.integers(-12, 12, noisy.shape), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=90)
        images.append(out.getvalue())
    return write_shards(
        (
            (
                "train",
                {
                    "__key__": f"{i:06d}",
                    "jpg": images[i % 16],
                    "json": json.dumps({"caption": f"picture {i}"}).encode(),
                },
            )
            for i in range(num_samples)
        ),
        folder,
        samples_per_shard=500,
    )


def readers(manifest: Manifest, folder: Path) -> dict[str, dict[str, Reader]]:
    """Kind ("raw", "decoded") -> name -> one pass over all samples."""
    urls = [manifest.url(i) for i in range(len(manifest.shards))]
    local = LocalFiles()  # one for all passes: hashes are checked in the first

    def raw_tar() -> Iterator[object]:
        for url in urls:
            with tarfile.open(url, "r|") as tar:
                key, sample = "", []
                for member in tar:
                    if sample and not member.name.startswith(key):
                        yield sample
                        sample = []
                    key = member.name.partition(".")[0] + "."
                    sample.append(tar.extractfile(member).read())  # type: ignore[union-attr]
                yield sample

    def plain_webdataset() -> Iterator[object]:
        yield from webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)

    def webdataset_decoded() -> Iterator[object]:
        yield from webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")

    def ours(shuffle: bool) -> Iterator[dict]:
        stream = ShardStream(manifest, split="all", shuffle=shuffle, window=1000, local=local)
        return stream.epoch()

    def decoded() -> Iterator[object]:
        for raw in ours(True):
            yield _decoded({"jpg": raw.get("jpg") or raw["png"], "json": raw["json"]})

    found: dict[str, dict[str, Reader]] = {
        "raw": {
            "ours": lambda: ours(True),
            "ours_unshuffled": lambda: ours(False),
            "raw_tar": raw_tar,
            "webdataset": plain_webdataset,
        },
        "decoded": {"ours": decoded, "webdataset": webdataset_decoded},
    }
    for name, peer in (("mosaicml_streaming", _mosaic), ("litdata", _litdata)):
        try:
            found["raw"][name] = read = peer(manifest, folder)
        except ImportError as error:
            print(f"{name}=={PEERS[name]} is left out: {error}", file=sys.stderr)
        else:
            found["decoded"][name] = lambda read=read: map(_decoded, read())  # type: ignore[misc]
    return found


def measure(path: Path, folder: Path, rounds: int) -> dict:
    """Samples a second by kind and reader (median over rounds) and ratios ours / theirs."""
    manifest = Manifest.load(path)
    n = manifest.num_samples
    result: dict = {
        "samples": n,
        "bytes": sum(s.size_bytes for s in manifest.shards),
        "shards": len(manifest.shards),
        "rounds": rounds,
        "versions": versions(),
        "samples_per_s": {},
        "ratios": {},
    }
    for kind, chosen in readers(manifest, folder).items():
        speeds: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in range(rounds + 1):
            for name, seconds in one_round(chosen, n).items():
                if turn:  # the first round fills the page cache
                    speeds[name].append(n / seconds)
        result["samples_per_s"][kind] = {k: statistics.median(v) for k, v in speeds.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(speeds["ours"], other, strict=True))
            for name, other in speeds.items()
            if name != "ours"
        }
        if kind == "raw":
            result["ratios"].update(ratios)
        else:
            result["ratios"].update({f"{name}_decoded": r for name, r in ratios.items()})
    return result


def one_round(chosen: dict[str, Reader], num_samples: int, together: int = 100) -> dict[str, float]:
    """Seconds that each reader took for one pass over all samples, in turns of `together` samples.

    Raises:
        RuntimeError: a reader gave another number of samples.
    """
    seconds, given = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0)
    running: dict[str, Iterator[object]] = {}
    for name, read in chosen.items():
        began = time.perf_counter()
        running[name] = read()
        seconds[name] = time.perf_counter() - began
    while running:
        for name, samples in list(running.items()):
            began = time.perf_counter()
            got = sum(1 for _ in itertools.islice(samples, together))
            seconds[name] += time.perf_counter() - began
            given[name] += got
            if got < together:
                del running[name]
    wrong = {name: count for name, count in given.items() if count != num_samples}
    if wrong:
        raise RuntimeError(f"readers gave {wrong} samples, not {num_samples}")
    return seconds


def table(result: dict) -> str:
    lines = [
        f"{result['samples']:,} samples, {result['bytes'] / 1e6:.0f} MB in {result['shards']} shards, "
        f"median of {result['rounds']} rounds, one process",
        f"{'':<24}{'samples/s':>12}{'ours / it':>12}",
    ]
    for kind, speeds in result["samples_per_s"].items():
        lines.append(f"{kind}:")
        for name, speed in speeds.items():
            ratio = result["ratios"].get(name if kind == "raw" else f"{name}_decoded")
            shown = f"{ratio:12.2f}" if ratio is not None else ""
            lines.append(f"  {name:<22}{speed:12,.0f}{shown}")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Version of each peer that is installed."""
    found = {}
    for name in ("webdataset", *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found[name] != PEERS.get(name, found[name]):
            print(f"{name} {found[name]} is not the quoted {PEERS[name]}", file=sys.stderr)
    return found


def _decoded(raw: dict[str, bytes]) -> tuple[np.ndarray, object]:
    return np.asarray(decode_image(raw["jpg"], "")), json.loads(raw["json"])


def _pairs(manifest: Manifest) -> Iterator[dict[str, bytes]]:
    for raw in ShardStream(manifest, split="all", shuffle=False).epoch():
        yield {"jpg": raw.get("jpg") or raw["png"], "json": raw["json"]}


def _mosaic(manifest: Manifest, folder: Path) -> Reader:
    from streaming import MDSWriter, StreamingDataset

    out = str(folder / "mds")
    with MDSWriter(out=out, columns={"jpg": "bytes", "json": "bytes"}) as writer:
        for pair in _pairs(manifest):
            writer.write(pair)
    dataset = StreamingDataset(local=out, shuffle=True, batch_size=1)
    return lambda: iter(dataset)


def _litdata(manifest: Manifest, folder: Path) -> Reader:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    out = str(folder / "lit")
    writer = BinaryWriter(out, chunk_bytes="64MB")
    for i, pair in enumerate(_pairs(manifest)):
        writer[i] = pair
    writer.done()
    writer.merge(1)
    dataset = StreamingDataset(out, shuffle=True)
    # it gives views into a mapped file; like everybody's, its samples shall be bytes
    return lambda: ({name: bytes(data) for name, data in row.items()} for row in dataset)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Streams of real data: shards -> raw samples -> samples -> Batches. Usable without the rest.

from moe_ext.data import Loader, SampleBuilder, ShardStream

stream = ShardStream("shards/train.json", split="train", seed=0)
build = SampleBuilder(tokenizer, preprocess, tokens_per_item=9)
loader = Loader(stream, build, sequences_per_rank=8, num_workers=2)
for batch in loader: ...
"""

from .batches import BatchStream, Loader, Skip, TooManyBadSamples, collate, merge_states
from .configured import open_loader, open_streams, prepare_builtin, prepare_lengths
from .fetch import Fetcher
from .local import LocalFiles
from .manifest import Manifest, ManifestError, Shard
from .packing import PackedRows, measure_lengths
from .rows import Cursor, SingleRows
from .s3 import S3Access
from .samples import Sample, SampleBuilder
from .shards import BadSample, ShardError, index_shards, local_path, write_shards
from .sources import prepare_openmoji
from .streams import MixedStream, ShardStream
from .texts import python_docs

__all__ = [
    "BadSample",
    "BatchStream",
    "Cursor",
    "Fetcher",
    "Loader",
    "LocalFiles",
    "Manifest",
    "ManifestError",
    "MixedStream",
    "PackedRows",
    "S3Access",
    "Sample",
    "SampleBuilder",
    "Shard",
    "ShardError",
    "ShardStream",
    "SingleRows",
    "Skip",
    "TooManyBadSamples",
    "collate",
    "index_shards",
    "local_path",
    "measure_lengths",
    "merge_states",
    "open_loader",
    "open_streams",
    "prepare_builtin",
    "prepare_lengths",
    "prepare_openmoji",
    "python_docs",
    "write_shards",
]

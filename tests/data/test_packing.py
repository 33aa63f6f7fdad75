"""Packing: a plan that every rank makes alike, loses nothing, and is near the best possible."""

import itertools
import json
import random

import pytest

from moe_ext.batch import IGNORED_LABEL
from moe_ext.config import DataConfig, StreamConfig
from moe_ext.data import (
    Loader,
    ManifestError,
    SampleBuilder,
    ShardStream,
    merge_states,
    open_loader,
    prepare_lengths,
    write_shards,
)
from moe_ext.data.packing import PackedRows, best_fit, measure_lengths
from moe_ext.data.rows import Cursor
from tests.data.inputs import pair, to_pixels


@pytest.fixture
def build(tokenizer):
    return SampleBuilder(tokenizer, to_pixels, 4, 1, prompt="A", max_length=64)


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """90 samples of very different lengths, two of three with an image."""
    draw = random.Random(0)

    def samples():
        for i in range(90):
            words = "ab " * draw.randint(1, 18)
            raw = pair(i, caption=words)
            if i % 3 == 0:
                raw = {"__key__": f"t{i}", "json": json.dumps({"text": words}).encode()}
            yield "train", raw

    return write_shards(samples(), tmp_path_factory.mktemp("varied"), samples_per_shard=20)


def packed(stream, build, **more):
    return PackedRows(stream, build, **{"length": 64, "window": 30, **more})


def test_best_fit():
    draw = random.Random(1)
    for _ in range(50):
        lengths = [draw.randint(1, 64) for _ in range(draw.randint(1, 80))]
        bins = best_fit(lengths, 64)
        assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in members) <= 64 for members in bins)
        assert (
            len(bins) <= 11 / 9 * -(-sum(lengths) // 64) + 4
        )  # Johnson's bound, to the lower limit


def test_every_position_is_in_exactly_one_row(varied, build):
    measure_lengths(varied, build)
    stream = ShardStream(varied, window=16)
    rows = packed(stream, build)
    end = Cursor()
    while end.position < 90:
        end = rows.advance(end, 1)
    taken, at = [], Cursor()
    while at < end:
        taken += rows.take(at, 0, 1)
        at = rows.advance(at, 1)
    assert sorted(p for row in taken for p in row) == list(range(90))
    assert rows.take(Cursor(), 0, len(taken)) == taken
    assert rows.take(Cursor(), 5, 7) == taken[5:12]
    for row in taken:
        assert sum(len(build(stream.raw(p))) for p in row) <= 64


def loaded(varied, build, world_size, num_workers, steps, state=None):
    columns, loaders = [], []
    for rank in range(world_size):
        stream = ShardStream(varied, window=16)
        loader = Loader(
            stream,
            build,
            sequences_per_rank=2,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            rows=packed(stream, build),
            length=64,
        )
        if state:
            loader.load_state_dict(state)
        columns.append(list(itertools.islice(iter(loader), steps)))
        loaders.append(loader)
    keys = [k for step in zip(*columns, strict=True) for batch in step for k in batch.sample_keys]
    return keys, merge_states([loader.state_dict() for loader in loaders]), columns, loaders


def test_packed_stream_resumes_on_another_topology(varied, build):
    measure_lengths(varied, build)
    whole, *_ = loaded(varied, build, 1, 0, 30)
    first, state, *_ = loaded(varied, build, 3, 2, 5)
    second, *_ = loaded(varied, build, 1, 1, 15, state)
    assert first + second == whole


def test_packed_batches_hold_what_single_ones_hold(varied, build):
    measure_lengths(varied, build)
    _, _, (batches,), (loader,) = loaded(varied, build, 1, 0, 12)
    stream = ShardStream(varied, window=16)
    by_key = {build(stream.raw(p)).key: build(stream.raw(p)) for p in range(90)}
    for batch in batches:
        keys, media = iter(batch.sample_keys), 0
        assert batch.input_ids.shape == (2, 64)
        for b in range(2):
            for segment in range(1, int(batch.segment_ids[b].max()) + 1):
                at = batch.segment_ids[b] == segment
                sample = by_key[next(keys)]
                assert batch.input_ids[b][at].tolist() == sample.input_ids.tolist()
                assert batch.labels[b][at].tolist() == sample.labels.tolist()
                assert batch.position_ids[b][at].tolist() == list(range(len(sample)))
                for _, pixels in sample.media:
                    assert batch.media[1][media].equal(pixels)
                    media += 1
            assert (batch.labels[b][batch.segment_ids[b] == 0] == IGNORED_LABEL).all()
    assert loader.num_tokens / loader.num_positions > 0.85


def test_lengths_must_be_of_this_builder(varied, build, tokenizer):
    measure_lengths(varied, build)
    other = SampleBuilder(tokenizer, to_pixels, 4, 1, prompt="Another prompt", max_length=64)
    with pytest.raises(ManifestError, match="--tokenizer"):
        packed(ShardStream(varied), other)
    with pytest.raises(ValueError, match="sequence_length=32"):
        packed(ShardStream(varied), build, length=32)


def test_a_sample_longer_than_planned_is_left_out_and_named(varied, build):
    measure_lengths(varied, build)
    stream = ShardStream(varied, window=16)
    rows = packed(stream, build)
    rows.length_of["data"] = rows.length_of["data"].clip(max=20)
    loader = Loader(stream, build, sequences_per_rank=30, rows=rows, length=64)
    next(iter(loader))
    assert loader.skips and all("measure lengths anew" in skip.reason for skip in loader.skips)


def test_a_packed_loader_from_the_configuration(varied, build):
    data = DataConfig(
        streams={"a": StreamConfig(manifest=str(varied)), "b": StreamConfig(manifest=str(varied))},
        pack=True,
        sequence_length=64,
        num_workers=0,
        homogeneous_span=4,
    )
    prepare_lengths(data, "a+b", build)
    loader = open_loader(data, "a+b", build, sequences_per_rank=3, rank=0, world_size=1, seed=0)
    batch = next(iter(loader))
    assert batch.input_ids.shape == (3, 64) and len(batch.sample_keys) > 3

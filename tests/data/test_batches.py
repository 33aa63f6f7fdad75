"""Batches against plain loops; the loader stops and goes on with any number of ranks and workers."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch

from moe_ext.batch import IGNORED_LABEL
from moe_ext.data import (
    Loader,
    Manifest,
    SampleBuilder,
    ShardStream,
    TooManyBadSamples,
    collate,
    merge_states,
)
from moe_ext.data.manifest import file_sha256
from tests.data.inputs import make_pairs, pair, to_pixels


@pytest.fixture
def build(tokenizer):
    return SampleBuilder(tokenizer, to_pixels, 4, 1, prompt="A", max_length=64)


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def test_padded_batch(build):
    samples = [build(pair(i)) for i in (3, 12345)]
    text = build({"__key__": "t", "txt": b"hi"})
    batch = collate([[samples[0]], [samples[1]], [text]], pad_id=0)
    assert batch.input_ids.shape[0] == 3 and batch.input_ids.shape[1] % 8 == 0
    for b, sample in enumerate([*samples, text]):
        n = len(sample)
        assert torch.equal(batch.input_ids[b, :n], sample.input_ids)
        assert torch.equal(batch.labels[b, :n], sample.labels)
        assert batch.segment_ids[b].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert batch.position_ids[b, :n].tolist() == list(range(n))
        assert (batch.labels[b, n:] == IGNORED_LABEL).all()
    assert torch.equal(batch.media[1], torch.stack([s.media[0][1] for s in samples]))
    assert batch.sample_keys == ["s00003", "s12345", "t"]
    assert batch.num_targets == sum(
        int((s.labels != IGNORED_LABEL).sum()) for s in [*samples, text]
    )
    assert batch.num_tokens == sum(map(len, [*samples, text]))
    with pytest.raises(ValueError, match="sequence_length=5"):
        collate([samples], pad_id=0, length=5)


def test_packed_row(build):
    samples = [build(pair(i)) for i in range(3)]
    batch = collate([samples], pad_id=0, length=128)
    n = [len(s) for s in samples]
    assert batch.segment_ids[0].tolist() == [1] * n[0] + [2] * n[1] + [3] * n[2] + [0] * (
        128 - sum(n)
    )
    assert batch.position_ids[0, n[0] : n[0] + n[1]].tolist() == list(range(n[1]))
    assert batch.labels[0, n[0] - 1] == IGNORED_LABEL, "a sample does not predict the next one"
    assert len(batch.media[1]) == 3


def keys_of(pairs, build, world_size, num_workers, steps, sequences=2, state=None, **more):
    """Keys in global order of `steps` steps of all ranks, and the state after them."""
    loaders = [
        Loader(
            ShardStream(pairs, seed=5, window=16),
            build,
            sequences_per_rank=sequences,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            **more,
        )
        for rank in range(world_size)
    ]
    for loader in loaders:
        if state:
            loader.load_state_dict(state)
    columns = [take(loader, steps) for loader in loaders]
    keys = [k for step in zip(*columns, strict=True) for batch in step for k in batch.sample_keys]
    return keys, merge_states([loader.state_dict() for loader in loaders])


def test_ranks_and_workers_divide_one_global_order(pairs, build):
    stream = ShardStream(pairs, seed=5, window=16)
    expected = [stream.raw(p)["__key__"] for p in range(120)]
    for world_size, num_workers, steps in ((1, 0, 60), (2, 0, 30), (3, 2, 20), (4, 1, 15)):
        keys, state = keys_of(pairs, build, world_size, num_workers, steps)
        assert keys == expected and state["position"] == 120


def test_resume_on_another_topology(pairs, build):
    stream = ShardStream(pairs, seed=5, window=16)
    expected = [stream.raw(p)["__key__"] for p in range(6 * 2 * 3 + 4 * 2 * 2)]
    first, state = keys_of(pairs, build, 3, 2, 6)
    second, _ = keys_of(pairs, build, 2, 0, 4, state=state)
    assert first + second == expected
    assert set(state) == {"position", "row", "stream", "skips"} and len(str(state)) < 400


def test_the_state_counts_what_was_handed_over_not_what_workers_hold(pairs, build):
    loader = Loader(ShardStream(pairs, seed=5), build, sequences_per_rank=2, num_workers=2)
    batches = iter(loader)
    for step in range(1, 5):
        next(batches)
        assert loader.state_dict()["position"] == 2 * step
    assert loader.wait_s > 0


def test_a_position_of_another_stream_is_refused(pairs, build):
    loader = Loader(ShardStream(pairs, seed=5), build, sequences_per_rank=2)
    state = loader.state_dict()
    other = Loader(ShardStream(pairs, seed=6), build, sequences_per_rank=2)
    with pytest.raises(ValueError, match="its positions mean other samples"):
        other.load_state_dict(state)
    other.load_state_dict(state, same_stream=False)


def test_the_loader_leaves_the_global_generator_alone(pairs, build):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    take(Loader(ShardStream(pairs), build, sequences_per_rank=2, num_workers=1), 2)
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture
def damaged(pairs, tmp_path):
    """The pairs, with sample 8's image and all of shard 3 (21..27) broken; 25 is held out."""
    shutil.copytree(pairs.parent, tmp_path / "copy")
    manifest = Manifest.load(tmp_path / "copy" / pairs.name)
    with open(manifest.url(1), "r+b") as f:
        f.seek(int(manifest.offset_N[8]))
        block = f.read(int(manifest.nbytes_N[8]))
        f.seek(int(manifest.offset_N[8]))
        f.write(block.replace(b"IHDR", b"XXXX"))
    manifest.shards[1] = replace(manifest.shards[1], sha256=file_sha256(manifest.url(1)))
    manifest.save(tmp_path / "copy" / pairs.name)
    with open(manifest.url(3), "ab") as f:
        f.write(b"more")
    return tmp_path / "copy" / pairs.name


def test_bad_samples_keep_their_place_on_every_topology(pairs, damaged, build):
    whole, _ = keys_of(pairs, build, 1, 0, 48, sequences=1)
    for world_size, num_workers in ((1, 0), (2, 1), (4, 0)):
        keys, state = keys_of(
            damaged, build, world_size, num_workers, 48 // world_size, sequences=1
        )
        bad = [position for position, *_ in state["skips"]]
        assert all(a == b for i, (a, b) in enumerate(zip(whole, keys, strict=True)) if i not in bad)
        assert {whole[i] for i in bad} == {
            "s00008",
            *(f"s{i:05d}" for i in range(21, 28) if i != 25),
        }
        assert any("shard-000003.tar" in key for _, key, _ in state["skips"])
    loader = Loader(ShardStream(damaged, seed=5, window=16), build, sequences_per_rank=1)
    batch = take(loader, bad[0] + 1)[-1]
    assert batch.num_targets == 0 and batch.num_tokens == 1 and not batch.media


def test_too_many_bad_samples_stop_the_run(damaged, build):
    loader = Loader(ShardStream(damaged, seed=5), build, sequences_per_rank=4, bad_sample_budget=6)
    with pytest.raises(TooManyBadSamples, match=r"data\.bad_sample_budget=6"):
        take(loader, 12)


def test_fewer_samples_than_ranks(tmp_path, build):
    """One sample, four ranks: everybody gets it, again and again; nobody's stream ends."""
    keys, _ = keys_of(make_pairs(tmp_path, 1), build, 4, 0, 3)
    assert keys == ["s00000"] * 24


def test_plain_dataloader(pairs, build):
    stream = ShardStream(pairs, seed=5, window=16)
    batches = Loader(stream, build, sequences_per_rank=2).batches
    plain = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2)
    loads = list(itertools.islice(plain, 5))
    assert [k for load in loads for k in load.batch.sample_keys] == [
        stream.raw(p)["__key__"] for p in range(10)
    ]


def test_spawned_workers_get_everything_by_pickle(pairs, build):
    stream = ShardStream(pairs, seed=5, window=16)
    stream.raw(0)  # an open file must not travel
    loader = Loader(stream, build, sequences_per_rank=2, num_workers=1, start_method="spawn")
    assert take(loader, 1)[0].sample_keys == [stream.raw(p)["__key__"] for p in range(2)]

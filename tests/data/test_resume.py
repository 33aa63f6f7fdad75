"""Stop anywhere, go on with any ranks and workers: the same global samples, none lost, none twice."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ext.data import (
    Loader,
    Manifest,
    MixedStream,
    PackedRows,
    SampleBuilder,
    Shard,
    ShardStream,
    batches,
    measure_lengths,
    merge_states,
)
from moe_ext.data.rows import Cursor
from tests.data.inputs import make_pairs, to_pixels

WORLDS, WORKERS = (1, 2, 3, 4), (0, 1, 2, 4)
LEGS = st.lists(
    st.tuples(
        st.sampled_from(WORLDS), st.sampled_from(WORKERS), st.integers(1, 3), st.integers(1, 5)
    ),
    min_size=2,
    max_size=4,
)
"""Topologies one after another: (ranks, workers a rank, sequences a rank, steps)."""


class Setting:
    """One kind of stream over the pairs, with everything a loader needs."""

    def __init__(self, kind, pairs, tokenizer):
        self.build = SampleBuilder(tokenizer, to_pixels, 4, 1, prompt="A", max_length=40)
        measure_lengths(pairs, self.build)
        train = ShardStream(pairs, seed=1, window=16, name="train")
        self.stream = train
        if "mixed" in kind:
            heldout = ShardStream(pairs, split="heldout", seed=2, window=5, name="heldout")
            span = 6 if "homogeneous" in kind else 1
            self.stream = MixedStream([train, heldout], [3.0, 1.0], seed=4, span=span)
        self.rows = self.length = None
        if "packed" in kind:
            self.length = 100
            self.rows = PackedRows(self.stream, self.build, length=100, window=12)

    def loader(self, sequences, rank, world_size, num_workers):
        return Loader(
            self.stream,
            self.build,
            sequences_per_rank=sequences,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            rows=self.rows,
            length=self.length,
        )

    def expected(self, end: Cursor) -> list[str]:
        """Keys of all rows before a cursor, one row after the other on one rank."""
        loader = self.loader(1, 0, 1, 0)
        keys = []
        for batch in loader:
            keys += batch.sample_keys
            if loader.cursor >= end:
                return keys


KINDS = ("single", "packed", "mixed", "mixed packed", "mixed homogeneous")


@pytest.fixture(scope="module")
def set_ups(pairs, tokenizer):
    return {kind: Setting(kind, pairs, tokenizer) for kind in KINDS}


def run_leg(setting, leg, state, take):
    """Keys in global order of one topology's steps, and the state after them."""
    world_size, num_workers, sequences, steps = leg
    loaders = [
        setting.loader(sequences, rank, world_size, num_workers) for rank in range(world_size)
    ]
    columns = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
        columns.append(take(loader, steps))
    keys = [k for step in zip(*columns, strict=True) for batch in step for k in batch.sample_keys]
    return keys, merge_states([loader.state_dict() for loader in loaders])


def check(setting, legs, take):
    keys, state = [], None
    for leg in legs:
        more, state = run_leg(setting, leg, state, take)
        keys += more
    assert keys == setting.expected(Cursor(state["position"], state["row"]))


def take_as_workers_would(loader, steps):
    """What DataLoader gives, without its processes: worker i makes batches i, i + W, ..., in turn."""
    stream, workers = loader.batches, max(loader.num_workers, 1)
    stream.cursor = loader.cursor
    iterators = []
    with pytest.MonkeyPatch.context() as patch:
        for i in range(workers):
            info = SimpleNamespace(id=i, num_workers=workers)
            patch.setattr(batches, "get_worker_info", lambda info=info: info)
            iterator = iter(stream)
            iterators.append(itertools.chain([next(iterator)], iterator))
    loads = [next(iterators[step % workers]) for step in range(steps)]
    loader.cursor = loads[-1].cursor
    return [load.batch for load in loads]


@pytest.mark.parametrize("kind", KINDS)
def test_any_topology_to_any_other(set_ups, kind):
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(legs=LEGS)
    def holds(legs):
        check(set_ups[kind], legs, take_as_workers_would)

    holds()


@pytest.mark.parametrize("kind", ["single", "mixed packed"])
def test_any_topology_to_any_other_with_real_workers(set_ups, kind):
    @settings(
        max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(legs=st.lists(LEGS.flatmap(lambda legs: st.sampled_from(legs)), min_size=2, max_size=2))
    def holds(legs):
        check(set_ups[kind], legs, lambda loader, steps: list(itertools.islice(loader, steps)))

    holds()


def test_every_sample_of_an_epoch_once_over_several_topologies(set_ups, pairs):
    """Not only equal to one rank's order: that order itself holds every sample exactly once."""
    setting, keys, state = set_ups["single"], [], None
    for leg in ((3, 0, 2, 3), (1, 2, 5, 2), (4, 0, 1, 5)):  # 18 + 10 + 20 = one epoch of 48
        more, state = run_leg(
            setting, leg, state, lambda loader, n: list(itertools.islice(loader, n))
        )
        keys += more
    manifest = Manifest.load(pairs)
    assert len(keys) == len(set(keys)) == 48 == len(manifest.select("train"))


def big_manifest(num_shards, samples_per_shard):
    n = num_shards * samples_per_shard
    nbytes = np.full(n, 10240, np.int64)
    offset = np.tile(np.arange(samples_per_shard) * 10240, num_shards)
    shards = [
        Shard(f"s{i:06d}.tar", 10240 * samples_per_shard, "0" * 64, samples_per_shard)
        for i in range(num_shards)
    ]
    return Manifest(shards, offset, nbytes, np.zeros(n, np.uint8), ["train"], base="/nowhere")


def test_seek_and_start_up_are_quick(tmp_path):
    """10,000 shards and 1,000,000 samples: open in seconds, any position at once."""
    path = big_manifest(10_000, 100).save(tmp_path / "big.json")
    began = time.perf_counter()
    stream = ShardStream(path, seed=0, window=4096)
    stream.place(0)
    start_up = time.perf_counter() - began
    assert start_up < 10
    for position in (999_999, 123_456_789, 10**12):
        began = time.perf_counter()
        place = stream.place(position)
        assert time.perf_counter() - began < 1 and 0 <= place.sample < 1_000_000
    print(f"start-up {start_up:.2f} s")


def test_one_bad_shard_of_twenty(tmp_path, tokenizer):
    """5 % bad shards: an epoch goes through on every topology, and exactly that shard's samples are skipped."""
    path = make_pairs(tmp_path, 100, samples_per_shard=5)
    manifest = Manifest.load(path)
    with open(manifest.url(13), "r+b") as f:
        f.truncate(manifest.shards[13].size_bytes // 2)
    build = SampleBuilder(tokenizer, to_pixels, 4, 1, prompt="A", max_length=40)
    logs = []
    for world_size, num_workers in ((1, 0), (2, 2)):
        seen, states = [], []
        for rank in range(world_size):
            loader = Loader(
                ShardStream(path, seed=2, window=16),
                build,
                sequences_per_rank=5,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
            )
            for batch in itertools.islice(loader, 20 // world_size):
                bad = (batch.labels != -100).sum(1) == 0
                seen += [k for k, b in zip(batch.sample_keys, bad.tolist(), strict=True) if not b]
            states.append(loader.state_dict())
        assert sorted(seen) == [f"s{i:05d}" for i in range(100) if not 65 <= i < 70]
        logs.append(merge_states(states)["skips"])
    assert logs[0] == logs[1] and len(logs[0]) == 5
    assert all("shard-000013.tar" in key for _, key, _ in logs[0])

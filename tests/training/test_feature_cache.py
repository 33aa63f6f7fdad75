"""Cached features: same samples, same order, same losses, and an encoder that runs once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_ext.compose import CONF_DIR, load
from moe_ext.config import DataConfig, EncoderConfig, Features, StreamConfig, TrainConfig
from moe_ext.data import Manifest, SampleBuilder, ShardError, open_loader, write_shards
from moe_ext.model.connectors import Connector
from moe_ext.model.encoders import Encoder, SquareImage
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.train import run
from moe_ext.training import stages
from moe_ext.training.feature_cache import with_cached_features
from moe_ext.training.topology import Ranks
from tests.data.inputs import make_tokenizer, pair, png
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks
from tests.training.tiny import make_inputs, overrides


class Counting(nn.Conv2d):
    """A frozen network of one layer that counts the images it has seen."""

    images = 0

    def forward(self, pixels):
        self.images += len(pixels)
        return super().forward(pixels)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    network = Counting(3, 10, 4, 4)
    return Encoder(
        network, lambda net, x: net(x), 10, 4, SquareImage(16, (127.0,) * 3, (60.0,) * 3)
    )


@pytest.fixture
def source(tmp_path):
    """40 samples in 6 shards: pairs, two images in one conversation, text, one broken image."""
    turns = [{"from": "human", "value": "<image> <image>?"}, {"from": "gpt", "value": "Two."}]

    def samples():
        for i in range(40):
            raw = pair(i)
            if i % 5 == 1:
                content = json.dumps({"conversations": turns}).encode()
                raw = {"__key__": f"c{i}", "0.png": png(i), "1.png": png(i + 1), "json": content}
            if i % 5 == 2:
                raw = {"__key__": f"t{i}", "txt": b"only text"}
            if i == 13:
                raw["png"] = b"broken"
            yield ("heldout" if i % 10 == 0 else "train"), raw

    return write_shards(samples(), tmp_path / "source", samples_per_shard=7)


def everything_here(topology, jobs):
    return {name: str(work()) for name, (_, work) in jobs.items()}


def cached(source, tmp_path, encoder, build, kind=Features.cache):
    data = DataConfig(
        streams={"train": StreamConfig(manifest=str(source))}, num_workers=0, features=kind
    )
    config = TrainConfig(
        name="x", data=data, cache_dir=str(tmp_path / "cache"), encoder={"image": EncoderConfig()}
    )
    topology = SimpleNamespace(rank=0, world_size=2)
    new = with_cached_features(config, ["train"], {1: encoder}, build, topology, everything_here)
    return data, new


def batches(data, build, count=12):
    place = str(Path(data.streams["train"].manifest).parent)
    loader = open_loader(
        data, "train", build, sequences_per_rank=4, rank=0, world_size=1, seed=3, cache_dir=place
    )
    return [batch for _, batch in zip(range(count), loader, strict=False)], loader


@pytest.mark.parametrize("kind", [Features.cache, Features.cache_fp16])
def test_the_same_losses_without_the_encoder(source, tmp_path, encoder, kind):
    tokenizer = make_tokenizer()
    build = SampleBuilder(tokenizer, encoder.preprocess, 4, prompt="A", max_length=200)
    live, cache = cached(source, tmp_path, encoder, build, kind)
    theirs, ours = Manifest.load(source), Manifest.load(cache.streams["train"].manifest)
    assert [s.num_samples for s in ours.shards] == [s.num_samples for s in theirs.shards]
    assert ours.split_names == theirs.split_names and (ours.split_N == theirs.split_N).all()

    save_tiny(tmp_path / "lm", "qwen2_moe", vocab_size=300)
    lm = load_base(tmp_path / "lm", dtype=torch.float32)
    connectors = nn.ModuleDict({"image": Connector(10, 8, lm.config.hidden_size)})
    model = MultimodalMoE(lm, {1: encoder}, connectors)
    (with_encoder, a), (without, b) = batches(live, build), batches(cache, build)
    assert [s.position for s in a.skips] == [s.position for s in b.skips] != []
    assert {s.reason for s in a.skips} == {s.reason for s in b.skips}, "the cache knows why"
    seen = encoder.network.images
    for one, two in zip(with_encoder, without, strict=True):
        bad = {s.key for s in a.skips}
        assert [k for k in one.sample_keys if k not in bad] == [
            k for k in two.sample_keys if "bad-" not in k
        ]
        assert torch.equal(one.input_ids, two.input_ids)
        losses = [model(batch).nll_Z for batch in (one, two)]
        tolerance = 1e-5 if kind is Features.cache else 2e-2
        torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)
    runs = encoder.network.images - seen
    assert runs == sum(len(batch.media.get(1, ())) for batch in with_encoder), "live runs only"


def test_made_once_and_named_by_what_made_it(source, tmp_path, encoder):
    build = SampleBuilder(make_tokenizer(), encoder.preprocess, 4, prompt="A", max_length=200)
    _, first = cached(source, tmp_path, encoder, build)
    seen = encoder.network.images
    assert seen == 31 + 8  # 23 pairs that decode, 8 conversations of two images
    _, again = cached(source, tmp_path, encoder, build)
    assert again.streams == first.streams and encoder.network.images == seen
    with torch.no_grad():
        encoder.network.weight += 1
    _, other = cached(source, tmp_path, encoder, build)
    assert other.streams != first.streams and encoder.network.images == 2 * seen


def test_a_shard_that_cannot_be_read_is_not_cached(source, tmp_path, encoder):
    build = SampleBuilder(make_tokenizer(), encoder.preprocess, 4, prompt="A", max_length=200)
    manifest = Manifest.load(source)
    whole = open(manifest.url(2), "rb").read()
    open(manifest.url(2), "ab").write(b"more")
    with pytest.raises(ShardError, match=r"shard-000002\.tar#0 cannot be cached.*features=live"):
        cached(source, tmp_path, encoder, build)
    open(manifest.url(2), "wb").write(whole)
    _, cache = cached(source, tmp_path, encoder, build)
    assert Manifest.load(cache.streams["train"].manifest).num_samples == 40


def test_several_encoders_are_refused(source, tmp_path, encoder):
    build = SampleBuilder(make_tokenizer(), encoder.preprocess, 4, prompt="A", max_length=200)
    data = DataConfig(
        streams={"train": StreamConfig(manifest=str(source))}, features=Features.cache
    )
    config = TrainConfig(name="x", data=data, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.features=cache"):
        with_cached_features(
            config, ["train"], {1: encoder, 2: encoder}, build, None, everything_here
        )


def _count_images(counts):
    """Count the images that encoders see by phase: prepare, train (the loops), between, after."""
    forward, train = Encoder.forward, stages.train
    counts.update(prepare=0, train=0, between=0, after=0)
    phase = ["prepare"]

    def counted(self, pixels):
        counts[phase[0]] += len(pixels)
        return forward(self, pixels)

    def marked(name, *arguments, **more):
        phase[0] = "train"
        try:
            return train(name, *arguments, **more)
        finally:
            phase[0] = "after" if name == "tune" else "between"

    Encoder.forward, stages.train = counted, marked
    return lambda: (setattr(Encoder, "forward", forward), setattr(stages, "train", train))


def _jobs(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    manifest = f"data.streams.train.manifest={folder}/few/few.json"
    images = {}
    for name, *more in (
        ("live", "data.features=live"),
        ("cached", "data.features=cache"),
        ("again", "data.features=cache", "chain=[align]"),
    ):
        config = load(CONF_DIR, overrides(folder, name, manifest, "parallel.ep_size=2", *more))
        undo = _count_images(images.setdefault(name, {}))
        assert run(config, Ranks(rank, world, rank, world)) == 0
        undo()
    return images


@pytest.mark.slow
def test_a_job_of_two_ranks_runs_the_encoder_once(tmp_path):
    """The whole chain on DeepSpeed; tune goes through its 32 samples three times and more."""
    make_inputs(tmp_path)
    splits = ["train"] * 8 + ["probe", "heldout"]
    write_shards(
        ((splits[i % 10], pair(37 * i)) for i in range(40)),
        tmp_path / "few",
        name="few",
        samples_per_shard=7,
    )
    ranks = run_ranks(_jobs, 2, tmp_path, timeout_s=500)
    images = {
        name: {phase: sum(r[name][phase] for r in ranks) for phase in ranks[0][name]}
        for name in ranks[0]
    }
    in_training = 4 * 2 * 2 + 3 * 2 * 2 + 13 * 2 * 2 * 2
    assert images["live"]["train"] == in_training == 132
    assert images["live"]["prepare"] > 0, "the connector's start has seen some"
    # every image once, whichever rank did it; the later run finds all of them
    assert images["cached"]["prepare"] == 40 and images["again"]["prepare"] == 0
    assert images["cached"]["train"] == images["again"]["train"] == 0
    assert images["cached"]["between"] == 4, "held-out pictures, evaluated before tune's first step"

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [r for r in map(json.loads, lines) if r["event"] == "step"]
        return [r["loss"]["nll"] for r in steps], [r["grad_norm"] for r in steps]

    assert len(losses("live")[0]) == 4 + 3 + 13
    for name, steps in (("cached", 20), ("again", 4)):
        for ours, live in zip(losses(name), losses("live"), strict=True):
            torch.testing.assert_close(ours, live[:steps], rtol=1e-5, atol=1e-6)

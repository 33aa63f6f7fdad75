"""The built-in sets: real drawings in real shards, and held-out parts that training never shows."""

import io
import json
import re
from collections import Counter, defaultdict

import pytest
from PIL import Image

from moe_ext.config import DataConfig
from moe_ext.data import (
    Manifest,
    SampleBuilder,
    ShardStream,
    open_loader,
    open_streams,
    prepare_builtin,
    python_docs,
)
from moe_ext.data.sources import SPLITS, openmoji_drawings, prepare_openmoji, split_openmoji
from tests.data.inputs import make_tokenizer, to_pixels

TONE = re.compile(r"( (medium-light|medium-dark|light|medium|dark) skin tone)+")


@pytest.fixture(scope="module")
def drawings():
    return openmoji_drawings()


def test_every_named_drawing_once(drawings):
    assert len(drawings) == 3953
    assert len({d.caption for d in drawings}) == len({d.code for d in drawings}) == 3953
    by_caption = {d.caption: d for d in drawings}
    assert by_caption["green apple"].code == "1F34F" and "_" not in "".join(by_caption)


def test_siblings_share_a_concept(drawings):
    concept = {d.caption: d.concept for d in drawings}
    same = [
        ("woman police officer", "man police officer medium skin tone", "police officer"),
        ("man surfing medium skin tone", "person surfing", "woman surfing light skin tone"),
        ("Santa Claus", "Mrs. Claus dark skin tone", "Mx Claus"),
        ("woman dancing", "man dancing light skin tone"),
        ("person walking facing right", "man walking"),
        ("thumbs up", "thumbs up dark skin tone"),
        ("handshake", "handshake light skin tone dark skin tone"),
        ("woman beard", "man medium-light skin tone beard"),
    ]
    for names in same:
        assert len({concept[name] for name in names}) == 1, names
    apart = [
        "green apple",
        "red apple",
        "thumbs up",
        "thumbs down",
        "France",
        "Finland",
        "cat",
        "pilot",
    ]
    apart += [
        "artist",
        "farmer",
        "person surfing",
        "female sign",
        "light skin tone",
        "folded hands",
    ]
    assert len({concept[name] for name in apart}) == len(apart)
    for caption in concept:  # no tone of a drawing is another concept than the drawing
        bare = TONE.sub("", caption)
        if bare != caption and bare in concept:
            assert concept[bare] == concept[caption], caption


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_concepts_are_in_no_training_picture(drawings, seed):
    by_split = defaultdict(list)
    for split, drawing in split_openmoji(drawings, seed=seed):
        by_split[split].append(drawing)
    assert set(by_split) <= set(SPLITS) and sum(map(len, by_split.values())) == 3953
    seen = {d.concept for s in ("train", "probe", "heldout") for d in by_split[s]}
    hidden = [d.concept for d in by_split["heldout_concept"]]
    assert len(hidden) == len(set(hidden)) == 80, "one drawing a concept"
    assert not seen & set(hidden) and {d.concept for d in by_split["heldout_sibling"]} <= set(
        hidden
    )
    assert len(by_split["heldout"]) == 128 == len(by_split["probe"])


def test_limit_keeps_the_held_out_splits(drawings):
    limited = Counter(split for split, _ in split_openmoji(drawings, limit=100))
    whole = {split: {d.code for s, d in split_openmoji(drawings) if s == split} for split in SPLITS}
    assert (
        limited["train"] == 100 and limited["heldout"] == 128 and limited["heldout_concept"] == 80
    )
    for split, drawing in split_openmoji(drawings, limit=100):
        assert drawing.code in whole[split], "a smoke run trains on nothing the full run holds out"


def test_drawn_shards(tmp_path, monkeypatch):
    import moe_ext.data.sources as sources

    few = split_openmoji(openmoji_drawings(), limit=3, concepts=3, pairs=2)
    monkeypatch.setattr(sources, "split_openmoji", lambda *a, **k: few)
    path = prepare_openmoji(tmp_path / "set", limit=3, size=64)
    manifest = Manifest.load(path)
    assert manifest.info["licence"] == "CC-BY-SA-4.0" and "OpenMoji" in manifest.info["attribution"]
    for raw in ShardStream(manifest, split="all", shuffle=False).epoch():
        content = json.loads(raw["json"])
        assert content["id"] == raw["__key__"] and content["licence"] and content["caption"]
        image = Image.open(io.BytesIO(raw["png"]))
        assert image.size == (64, 64) and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert len(set(image.convert("RGB").getdata())) > 2, "something is drawn"
    before = path.stat().st_mtime_ns
    assert prepare_openmoji(tmp_path / "set", limit=3, size=64).stat().st_mtime_ns == before
    prepare_openmoji(tmp_path / "set", limit=3, size=32)
    assert Manifest.load(path).info["settings"]["size"] == 32


def test_streams_of_the_configuration(tmp_path, monkeypatch, caplog):
    import moe_ext.data.sources as sources

    few = split_openmoji(openmoji_drawings(), limit=8, concepts=3, pairs=2)
    monkeypatch.setattr(sources, "split_openmoji", lambda *a, **k: few)
    data = DataConfig(builtin="openmoji", limit=8)
    prepare_builtin(data, tmp_path)
    assert len(open_streams(data, "train", seed=0, cache_dir=tmp_path)) == 8
    assert len(open_streams(data, "heldout_concept", seed=0, cache_dir=tmp_path)) == 3
    mixed = open_streams(data, "train+heldout", seed=0, cache_dir=tmp_path)
    assert {mixed.place(p).stream for p in range(20)} == {"train", "heldout"}
    # one source a micro-batch of all ranks, and a warning where that cannot be
    data.homogeneous_span, data.num_workers = 12, 0
    build = SampleBuilder(make_tokenizer(), to_pixels, 4, max_length=128)
    sources = set()
    for rank in range(2):
        loader = open_loader(
            data, "train+heldout", build, sequences_per_rank=3, rank=rank, world_size=2, seed=0,
            cache_dir=tmp_path,
        )  # fmt: skip
        stream = loader.batches.stream
        for step, batch in zip(range(40), loader, strict=False):
            places = [stream.place(6 * step + 3 * rank + i) for i in range(3)]
            raws = [stream.raw(6 * step + 3 * rank + i) for i in range(3)]
            assert batch.sample_keys == [raw["__key__"] for raw in raws]
            assert len({place.stream for place in places}) == 1
            sources.add((step, places[0].stream))
    assert len(sources) == 40 and len({source for _, source in sources}) == 2
    assert "homogeneous_span" not in caplog.text
    open_loader(
        data, "train+heldout", build, sequences_per_rank=5, rank=0, world_size=1, seed=0,
        cache_dir=tmp_path,
    )  # fmt: skip
    assert "data.homogeneous_span=12 is no multiple of the 5 samples" in caplog.text
    with pytest.raises(ValueError, match=r"data\.streams"):
        open_streams(DataConfig(), "train", seed=0)
    with pytest.raises(ValueError, match="not known"):
        prepare_builtin(DataConfig(builtin="imagenet"), tmp_path)


@pytest.mark.parametrize("kind", ["topics", "docstrings", "code"])
def test_text_parts_are_disjoint(kind):
    train, heldout = python_docs("train", kind), python_docs("heldout", kind)
    assert sum(map(len, heldout)) > 40_000 and sum(map(len, train)) > 250_000

    def long_paragraphs(texts):
        return {" ".join(p.split()) for t in texts for p in t.split("\n\n") if len(p.split()) > 9}

    assert not long_paragraphs(train) & long_paragraphs(heldout)
    assert python_docs("train", kind) == train and python_docs("train", kind, limit=2) == train[:2]


def test_text_of_no_such_kind():
    with pytest.raises(ValueError, match="kind='poems'"):
        python_docs("train", "poems")
    with pytest.raises(ValueError, match="split='test'"):
        python_docs("test")

"""Retrieval, captions and text against the plainest ways of computing them; two ranks against one."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moe_ext.analysis import evaluate, heldout, lookup, retrieval, text
from moe_ext.analysis.passes import hidden_states
from moe_ext.analysis.reduce import Ranks
from moe_ext.analysis.run_folder import record_evaluation
from moe_ext.batch import IGNORED_LABEL
from moe_ext.config import Scope
from moe_ext.data.batches import collate
from moe_ext.model.rows import NewRows
from tests.analysis.small import (
    extend,
    make_build,
    make_items,
    make_manifest,
    make_model,
    save_base,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    make_manifest(path)
    return path


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return make_items(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def model(base):
    model = make_model(base)
    extend(model, base)
    return model


def text_ids(rows: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(4))


def plain_nll(model, build, items) -> Tensor:
    """Every image with every caption, each in a sequence and a pass of its own."""
    nll = torch.zeros(len(items), len(items), dtype=torch.float64)
    for i, image in enumerate(items):
        for c, item in enumerate(items):
            batch = collate([[build.build(image.raw, item.caption)]], pad_id=build.pad_id)
            with torch.no_grad():
                nll[i, c] = model(batch).nll_sum
    return nll


@pytest.mark.parametrize("scope", [Scope.preserve, Scope.modality, Scope.joint])
@pytest.mark.parametrize("captions_per_pass", [60, 4])
def test_tree_scores_captions_as_sequences_of_their_own(base, items, scope, captions_per_pass):
    model, build = make_model(base), make_build()
    extend(model, base, scope)
    found = retrieval.nll_matrix(
        model, build, items, images_per_pass=2, captions_per_pass=captions_per_pass
    )
    torch.testing.assert_close(found, plain_nll(model, build, items), rtol=1e-5, atol=1e-4)
    counted = [(build.build(items[0].raw, i.caption).labels != IGNORED_LABEL).sum() for i in items]
    assert torch.equal(retrieval.target_counts(build, items), torch.stack(counted))


def test_a_recurrent_model_scores_plain_sequences(model, items, monkeypatch):
    build = make_build()
    tree = retrieval.nll_matrix(model, build, items)
    monkeypatch.setattr(retrieval, "takes_masks", lambda config: False)
    monkeypatch.setattr(retrieval, "caption_tree", None)
    plain = retrieval.nll_matrix(model, build, items, captions_per_pass=4)
    torch.testing.assert_close(plain, tree, rtol=1e-5, atol=1e-4)


def test_tree_shares_prefixes(items):
    build = make_build()
    tree = retrieval.caption_tree(build, ["ab", "abc", "x"])
    shared = 4 + len("A picture of")
    letters = build.tokenizer.decode(tree.input_ids[shared:])
    assert letters == " abcx"  # one token a letter: " ab", "c" behind it, "x" behind the space
    assert tree.position_ids[shared:].tolist() == [shared + d for d in (0, 1, 2, 3, 1)]
    assert len(tree.edges) == 3 + 1 + 4 + 1 + 2 + 1 - 0
    x, c = len(letters) - 1 + shared, len(letters) - 2 + shared
    assert tree.mask[x].nonzero().squeeze(1).tolist() == [*range(shared + 1), x]
    assert tree.mask[c].nonzero().squeeze(1).tolist() == list(range(c + 1))


def test_recall_of_known_matrices():
    assert retrieval.recall(retrieval.ranks_of_right(torch.eye(10)))["at_1"] == 1.0
    constant = retrieval.recall(retrieval.ranks_of_right(torch.zeros(10, 10)))
    assert constant["at_1"] == constant["at_5"] == 0.0  # ties are against the model
    score = torch.eye(4)
    score[0, 1:] = torch.tensor([2.0, 0.5, 0.5])
    rank = retrieval.ranks_of_right(score)
    assert rank.tolist() == [2, 1, 1, 1]
    result = retrieval.recall(rank)
    assert result["at_1"] == 0.75
    assert result["at_1_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_fair_scores_do_not_see_a_caption_s_length():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(20, 20, generator=generator, dtype=torch.float64) + 9 * torch.eye(20)
    length = 40.0 * torch.rand(1, 20, generator=generator, dtype=torch.float64)
    tokens = torch.ones(20, dtype=torch.int64)
    result = retrieval.retrieval_result(length - signal, tokens)
    assert result["image_to_caption"]["at_1"] == 1.0
    assert result["raw"]["at_1"] < 0.5  # plain nats prefer short captions
    off = ~torch.eye(20, dtype=torch.bool)
    assert result["nll_right"] == pytest.approx(float((length - signal).diagonal().mean()))
    assert result["nll_wrong"] == pytest.approx(float((length - signal)[off].mean()))


def test_written_captions_are_those_of_a_loop_without_cache(model, items):
    build, limit = make_build(), 7
    found = evaluate.write_captions(model, build, items, max_new_tokens=limit, together=4)
    for item, caption in zip(items, found, strict=True):
        sample = build(item.raw)
        length = heldout.prompt_length(sample)
        written: list[int] = []
        for _ in range(limit):
            ids = torch.cat([sample.input_ids[:length], torch.tensor(written, dtype=torch.int64)])
            row = heldout.cut(build(item.raw), length)
            row.input_ids, row.labels = ids, torch.full_like(ids, IGNORED_LABEL)
            row.modality_ids = F.pad(row.modality_ids, (0, len(written)))
            row.labels[-1] = 0
            batch = collate([[row]], pad_id=build.pad_id, multiple=1)
            with torch.no_grad():
                token = min(range(272), key=lambda t: float(nll_of(model, batch, t)))
            if token == build.eos_id:
                break
            written.append(token)
        assert caption == " ".join(build.tokenizer.decode(written).split())
        assert written


def nll_of(model, batch, token: int) -> Tensor:
    if not hasattr(batch, "logits"):
        batch.logits = model.logits(hidden_states(model, batch)[0, -1]).float()
    return F.cross_entropy(batch.logits, torch.tensor(token))


def test_text_loss_is_transformers(base, model):
    ids = text_ids()
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(input_ids=ids, labels=ids).loss
    for ours in (make_model(base), model):  # preserve: the extension is not seen by text
        found = text.text_loss(ours, ids, rows_per_pass=2)
        assert found["nll"] == pytest.approx(float(expected), abs=1e-5)
        assert found["tokens"] == 5 * 11


def test_hash_is_of_every_logit(base, model):
    ids = text_ids()
    plain = make_model(base)
    before = text.text_loss(plain, ids)
    plain.holder.context = None
    rows = []
    for pair in ids.split(2):  # in the passes' own shapes: another shape rounds otherwise
        hidden = plain.lm.model(input_ids=pair, use_cache=False).last_hidden_state
        rows += plain.lm.lm_head(hidden.reshape(-1, 32)).view(len(pair), 12, -1)
    digests = [hashlib.sha256(row.detach().numpy().tobytes()).digest() for row in rows]
    assert before["logits_sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert text.text_loss(model, ids) == before
    with text.open_to_text(model):
        opened = text.text_loss(model, ids)
    assert opened["logits_sha256"] != before["logits_sha256"]
    assert text.text_loss(model, ids) == before  # closed again
    scopes = {m.scope for m in model.modules() if isinstance(m, NewRows)}
    assert scopes == {Scope.preserve}
    with torch.no_grad():
        next(plain.lm.parameters()).view(-1)[17] += 1e-3
    assert text.text_loss(plain, ids)["logits_sha256"] != before["logits_sha256"]


def test_text_rows():
    rows = text.text_rows(["ab", "cde", "f" * 50], lambda t: [ord(c) for c in t], 20, length=8)
    assert "".join(map(chr, rows.flatten().tolist())) == "ab\n\ncde\n\nfffffff"
    with pytest.raises(ValueError, match="evaluation.text_tokens"):
        text.text_rows(["ab"], lambda t: [ord(c) for c in t], 64, length=8)


def test_rows_are_divided_evenly():
    for count, size, together in ((9, 2, 2), (1, 2, 4), (7, 3, 1), (4, 1, 3)):
        parts = [Ranks(rank, size).rows(count, together) for rank in range(size)]
        assert len({tuple(len(rows) for rows, _ in part) for part in parts}) == 1
        own = sorted(row for part in parts for rows, n in part for row in rows[:n])
        assert own == list(range(count))


def test_lookup_finds_what_the_neighbour_is_called():
    captions = ["red heart", "green apple", "old owl", "blue heart"]
    features = torch.eye(4) + 0.01 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    same = lookup.lookup_result(features, captions, features, captions)
    assert same["at_1"] == 1.0
    assert same["train_images"] == 4
    wrong = lookup.lookup_result(features, captions, features.roll(1, 0), captions)
    assert wrong["at_1"] == 0.0
    similarity = lookup.caption_similarity(["red heart"], captions)[0]
    assert similarity.argsort(descending=True)[:2].tolist() == [0, 3]


def test_features_of_the_start_are_read_once_a_pair(tmp_path):
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    captions = torch.tensor([[7, 8], [9, -1], [7, 8], [7, 8]])
    save_file({"features": features, "captions": captions}, tmp_path / "features.safetensors")
    found, names = lookup.load_lookup(tmp_path / "features.safetensors", lambda ids: f" {ids}")
    assert names == ["[7, 8]", "[9]", "[7, 8]"]
    assert torch.equal(found, features[[0, 1, 3]])


def run_everything(base, folder, rank=0, size=1, **load):
    """Evaluation of a trained model, and the text of the bare base before it."""
    import torch.distributed as dist

    group = dist.group.WORLD if size > 1 else None
    model = make_model(base, ep_rank=rank, ep_size=size, ep_group=group)
    ranks, ids = Ranks(rank, size), text_ids()
    before = text.text_loss(model, ids, ranks)
    extend(model, base)
    build = make_build()
    manifest = heldout.Manifest.load(folder / "shard.json")
    train = heldout.load_items(manifest, "train", 9)
    features = lookup.pooled_features(model, build, train, ranks, together=4)
    steps: list[tuple] = []
    parts = evaluate.evaluate(
        model, build, manifest, ids, candidates=7, captions=2, ranks=ranks,
        splits=("heldout", "heldout_concept", "no such split"),
        lookup=(features, [i.caption for i in train]), progress=lambda *step: steps.append(step),
    )  # fmt: skip
    return before, parts, steps


def rank_everything(base, folder):
    import torch.distributed as dist

    return run_everything(base, folder, dist.get_rank(), dist.get_world_size())


@pytest.fixture(scope="module")
def alone(base, folder):
    return run_everything(base, folder)


def test_two_ranks_say_what_one_says(base, folder, alone, tmp_path):
    (before, parts, _), (other_before, other, _) = run_ranks(rank_everything, 2, base, folder)
    assert (before, parts) == (other_before, other)
    assert before["logits_sha256"] == parts["text_after"]["logits_sha256"]
    _, single, _ = alone
    for which in ("text_after", "text_joint"):
        assert parts[which]["nll"] == pytest.approx(single[which]["nll"], abs=1e-5)
    for split in evaluate.HELDOUT_SPLITS:
        ours, theirs = parts[split], single[split]
        torch.testing.assert_close(
            torch.tensor(ours["score_IC"]), torch.tensor(theirs["score_IC"]), atol=0.011, rtol=0
        )
        assert ours["nll_wrong"] == pytest.approx(theirs["nll_wrong"], rel=1e-5)
        for key in ("image_to_caption", "caption_to_image", "written", "nearest_neighbour"):
            assert ours[key] == theirs[key]
    assert parts["experts"] == single["experts"]
    assert [shot["key"] for shot in parts["gallery"]] == [shot["key"] for shot in single["gallery"]]
    record_evaluation(tmp_path, **parts)  # JSON can hold it


def test_parts_of_the_evaluation(alone):
    _, parts, steps = alone
    assert "no such split" not in parts
    assert parts["heldout"]["candidates"] == 7
    assert parts["heldout"]["captions_written"] == 7
    assert len(parts["gallery"]) == 4
    use = parts["experts"]["trained"]
    assert use["new_share"]["text alone"] == 0.0
    assert 0 < use["new_share"]["image tokens"] < 1
    tokens = sum(use["layers"][0]["count"]["image tokens"])
    assert tokens == 7 * 4 * 2  # each picture once, its four tokens, two experts each
    names = {name for name, _, _ in steps}
    assert "heldout, retrieval" in names
    assert "heldout_concept, captions" in names
    last = {name: (done, total) for name, done, total in steps}
    assert all(done == total for done, total in last.values())

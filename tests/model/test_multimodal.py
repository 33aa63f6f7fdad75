"""The multimodal model on a tiny Qwen2-MoE: text is the base's bit by bit, packing, decoding."""

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_ext.analysis.passes import hidden_states
from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import CalibrationKind, Placement, Scope
from moe_ext.model.connectors import Connector
from moe_ext.model.experts import NewBank
from moe_ext.model.load import load_base
from moe_ext.model.losses import balance_loss, selection_counts
from moe_ext.model.moe import extended_layers
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.model.placement import owners
from moe_ext.model.rows import Calibration, NewRows
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks

IMAGE_TOKENS, FEATURES = 3, 5


class Pixels(nn.Module):
    """Stands in for an encoder: features are the pixels, (M, 3, FEATURES) as they come."""

    tokens_per_item, feature_dim = IMAGE_TOKENS, FEATURES

    def forward(self, media: torch.Tensor) -> torch.Tensor:
        return media


def build(path, extended: bool, rank: int = 0, world: int = 1, group=None) -> MultimodalMoE:
    lm = load_base(path, dtype=torch.float32, ep_rank=rank, ep_size=world, ep_group=group)
    if extended:
        add_vision(lm, rank, world)
    model = MultimodalMoE(
        lm, {1: Pixels()}, nn.ModuleDict({"image": Connector(FEATURES, 8, lm.config.hidden_size)})
    )
    model.set_liveness()
    return model


def add_vision(
    lm, rank: int, world: int, placement: Placement = Placement.replicate, num_new: int = 2
) -> None:
    """New random experts in every sparse layer, equal on all ranks."""
    for index, layer in extended_layers(lm).items():
        generator = torch.Generator().manual_seed(index)
        held = owners(num_new, world, placement)[rank]
        bank = NewBank(layer.frozen.shape, held, num_new, placement, dtype=torch.float32)
        for name, size in bank.tensor_shapes().items():
            values = torch.randn(num_new, *size[1:], generator=generator)
            getattr(bank, name).data.copy_(0.3 * values[held])
        dim, total = layer.frozen.shape.hidden_dim, layer.num_frozen + num_new
        rows = NewRows(
            torch.randn(num_new, dim, generator=generator),
            torch.zeros(num_new),
            Scope.preserve,
            (1,),
            Calibration(CalibrationKind.mlp_add, total, dtype=torch.float32, seed=index),
        )
        layer.add_bank("vision", bank, rows)


def batch_of(samples: list[tuple[list[int], int]], rows: int | None = None) -> Batch:
    """A batch of (text tokens, images in front); all in one packed row when `rows` is 1."""
    lines: list[list[tuple[int, int, int, int, int]]] = []
    media = 0
    for tokens, images in samples:
        line = [(0, IGNORED_LABEL, 1, p, 0) for p in range(images * IMAGE_TOKENS)]
        media += images
        for i, token in enumerate(tokens):
            target = tokens[i + 1] if i + 1 < len(tokens) else IGNORED_LABEL
            line.append((token, target, 0, len(line), 0))
        lines.append(line)
    if rows == 1:
        lines = [[(*t[:4], 1 + n) for n, line in enumerate(lines) for t in line]]
    else:
        lines = [[(*t[:4], 1) for t in line] for line in lines]
    length = max(map(len, lines))
    padded = torch.tensor(
        [line + [(0, IGNORED_LABEL, 0, 0, 0)] * (length - len(line)) for line in lines]
    )
    ids, labels, modality, position, segment = padded.unbind(-1)
    pixels = torch.randn(
        media, IMAGE_TOKENS, FEATURES, generator=torch.Generator().manual_seed(media)
    )
    return Batch(ids, labels, modality, segment, position, {1: pixels})


TEXT = [([5, 9, 17, 3, 80], 0), ([7, 7, 2], 0), ([90, 31, 14, 15, 92, 65, 35], 0)]
MIXED = [([5, 9, 17, 3, 80], 1), ([7, 7, 2], 0), ([90, 31, 14, 15, 92, 65, 35], 1)]


def logits_hash(model: MultimodalMoE, batch: Batch) -> str:
    """SHA-256 of all logits of the real tokens."""
    with torch.no_grad():
        logits = model.logits(hidden_states(model, batch)[batch.segment_ids != 0])
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


def train(model: MultimodalMoE, steps: int = 3) -> None:
    """A few plain steps on images, new experts and connector; replicas stay equal by summing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        model(batch_of(MIXED)).nll_sum.backward()
        if dist.is_initialized():
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()


def text_hashes(path) -> tuple[str, str, str, float]:
    """Hash of the base, of the extended model, and of the same after training; loss change."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    group = dist.group.WORLD if world > 1 else None
    text = batch_of(TEXT)
    base = logits_hash(build(path, False, rank, world, group), text)
    model = build(path, True, rank, world, group)
    before, loss_before = logits_hash(model, text), float(model(batch_of(MIXED)).nll_sum.detach())
    train(model)
    return (
        base,
        before,
        logits_hash(model, text),
        loss_before - float(model(batch_of(MIXED)).nll_sum.detach()),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2_moe")
    save_tiny(path, "qwen2_moe")
    return path


def test_text_is_the_base_bit_by_bit_after_training(tiny):
    base, before, after, gain = text_hashes(tiny)
    assert base == before == after
    assert gain > 0.1, "training changed nothing: the hashes show nothing"
    for base, before, after, gain in run_ranks(text_hashes, 2, tiny):
        assert base == before == after
        assert gain > 0.1


def test_packed_is_unpacked(tiny):
    model = build(tiny, True)
    apart, packed = batch_of(MIXED), batch_of(MIXED, rows=1)
    grads = []
    for batch in (apart, packed):
        model.zero_grad()
        output = model(batch)
        output.nll_sum.backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        grads.append((output.nll_Z.detach(), wanted))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-5)
    for name, grad in grads[0][1].items():
        scale = float(grad.abs().max()) + 1e-6
        assert float((grad - grads[1][1][name]).abs().max()) < 1e-5 * max(scale, 1.0), name


def test_decoding_with_a_cache_is_decoding_without(tiny):
    """Rows of unequal length, with and without an image; the rule looks back through the cache."""
    model = build(tiny, True)
    samples = [([5, 9], 1), ([7, 11, 2, 40], 0), ([90], 1)]
    written = model.generate(batch_of(samples), max_new_tokens=6, stop_ids=set())
    base = build(tiny, False).generate(batch_of([samples[1]]), 6, set())
    assert written[1] == base[0], "a text-only row is the base's"
    pixels = batch_of(samples).media[1]
    for row, (tokens, images) in enumerate(samples):
        for step in range(6):
            whole = batch_of([(tokens + written[row][:step], images)])
            if images:
                whole.media[1] = pixels[[0 if row == 0 else 1]]
            with torch.no_grad():
                last = hidden_states(model, whole)[0, -1]
            assert int(model.logits(last).argmax()) == written[row][step], (row, step)


def test_a_stop_id_ends_a_row(tiny):
    model = build(tiny, True)
    free = model.generate(batch_of([([5, 9], 1)]), 6, set())[0]
    stop = free[3]
    expected = free[: free.index(stop)]
    assert model.generate(batch_of([([5, 9], 1)]), 6, {stop})[0] == expected


def test_placeholders_must_match_the_images(tiny):
    batch = batch_of(MIXED)
    batch.media[1] = batch.media[1][:1]
    with pytest.raises(ValueError, match=r"6 placeholders of modality image but 1 items"):
        build(tiny, True)(batch)


@torch.no_grad()
def test_a_pass_leaves_nothing_to_the_next_one(tiny):
    """The language model called by itself, after passes of ours, is what it is when fresh."""
    fresh, model = build(tiny, True).lm, build(tiny, True)
    batch = batch_of(MIXED)
    same_shape = torch.randint(3, 90, batch.input_ids.shape)
    model(batch)
    model.generate(batch, 2, set())
    hidden_states(model, batch)
    for ids in (same_shape, same_shape[:2, :4]):
        assert torch.equal(model.lm(ids).logits, fresh(ids).logits)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.lm.generate(same_shape, **settings),
                       fresh.generate(same_shape, **settings))  # fmt: skip


def test_a_context_of_another_pass_is_refused(tiny):
    model = build(tiny, True)
    context = model(batch_of(TEXT)).context
    with (
        model.holder.during(context),
        pytest.raises(
            ValueError, match="layer 0 got 4 tokens, but the routing context is of 3 x 7"
        ),
    ):
        model.lm(torch.ones(1, 4, dtype=torch.int64))
    assert model.holder.context is None


def test_two_passes_may_wait_for_their_backward(tiny):
    """Each is computed again with its own routing, whichever passes came since."""
    plain = build(tiny, True)
    model = MultimodalMoE(plain.lm, plain.encoders, plain.connectors, activation_checkpointing=True)
    batches = [batch_of(MIXED), batch_of(MIXED[::-1])]

    def gradients(losses) -> list[torch.Tensor]:
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients(model(batch).nll_sum for batch in batches)
    together = gradients([model(batch).nll_sum for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(expected, together, strict=True))


def test_a_batch_without_a_sequence_is_refused_and_one_of_padding_is_not(tiny):
    model, batch = build(tiny, True), batch_of(TEXT[:1])
    rows = {name: value[:0] for name, value in vars(batch).items() if torch.is_tensor(value)}
    empty = Batch(**rows)
    for use in (
        model,
        lambda batch: model.generate(batch, 2, set()),
        lambda b: hidden_states(model, b),
    ):
        with pytest.raises(ValueError, match="a batch of 0 x 5 positions: .* a row of padding"):
            use(empty)
    padding = Batch(**{name: torch.zeros_like(value) for name, value in vars(batch).items()
                       if torch.is_tensor(value)})  # fmt: skip
    padding.labels += IGNORED_LABEL
    output = model(padding)
    output.nll_sum.backward()
    assert output.nll_Z.numel() == 0
    assert len(model.generate(padding, 2, set())) == 1


def saved_below(model: MultimodalMoE) -> tuple[int, int]:
    """Tensors that a pass saves for backward below the last decoder layer's block, and from there on."""
    saved, below = [], []
    *_, last = extended_layers(model.lm).values()
    handle = last.register_forward_pre_hook(lambda *_: below.append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(0) or t, lambda t: t):
        model(batch_of(MIXED)).nll_sum.backward()
    handle.remove()
    return below[0], len(saved) - below[0]


def only_the_last_layer_trains(path, rank: int = 0, world: int = 1, group=None) -> MultimodalMoE:
    model = build(path, False, rank, world, group)
    add_vision(model.lm, rank, world, Placement.shard)
    *_, last = extended_layers(model.lm).values()
    model.requires_grad_(False)
    last.requires_grad_(True)
    model.set_liveness()
    return model


def generated_and_saved(path) -> dict[str, object]:
    """On one of two ranks: what rows become where rank 0's end at once, and what is saved."""
    rank, group = dist.get_rank(), dist.group.WORLD
    one, shared = build(path, True), build(path, True, rank, 2, group)
    samples = [([5, 9], 1), ([7, 11, 2, 40], 0), ([90], 1)] if rank == 0 else [([30, 31, 32], 0)]
    batch = batch_of(samples)
    free = one.generate(batch, 6, set())
    stops = {row[0] for row in free} if rank == 0 else set()
    return {
        "free": free,
        "alone": one.generate(batch, 6, stops),
        "together": shared.generate(batch, 6, stops),
        "saved": saved_below(only_the_last_layer_trains(path, rank, 2, group)),
    }


def test_two_ranks_generate_what_one_does_and_save_nothing_below(tiny):
    """A rank whose rows have ended goes on with zero tokens until the others' have."""
    first, second = run_ranks(generated_and_saved, 2, tiny)
    for found in (first, second):
        assert found["together"] == found["alone"]
        assert found["saved"][0] == 0 < found["saved"][1]
    assert first["together"] == [[], [], []]
    assert second["together"] == second["free"]
    assert len(second["free"][0]) == 6


def test_nothing_is_saved_below_the_first_live_layer(tiny):
    below, above = saved_below(only_the_last_layer_trains(tiny))
    assert below == 0 < above
    assert saved_below(build(tiny, True))[0] > 0


def expert_gradients(path) -> dict[tuple[Placement, str], torch.Tensor]:
    """Of a stage that trains nothing but one new expert a layer; over all ranks' batches."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    found = {}
    for placement in Placement:
        model = build(path, False, rank, world, dist.group.WORLD if world > 1 else None)
        add_vision(model.lm, rank, world, placement, num_new=1)
        model.requires_grad_(False)
        for layer in extended_layers(model.lm).values():
            layer.new.requires_grad_(True)
        model.set_liveness()
        for samples in (MIXED, MIXED[1:])[rank : 2 if world == 1 else rank + 1]:
            model(batch_of(samples)).nll_sum.backward()
        trained = [(n, p) for n, p in model.named_parameters() if p.numel()]
        grads = {n: p.grad for n, p in trained if p.grad is not None}
        found |= {(placement, name): grad for name, grad in grads.items()}
    return found


def test_experts_train_alone(tiny):
    """Nothing else is live, and rank 1 holds no new expert where they are sharded."""
    alone = expert_gradients(tiny)
    first, second = run_ranks(expert_gradients, 2, tiny)
    assert {placement for placement, _ in second} == {Placement.replicate}
    for key, expected in alone.items():
        assert float(expected.abs().max()) > 0, key
        whole = first[key] + second.get(key, 0)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)


def checkpointed_gradients(path, activation_checkpointing: bool) -> dict[str, torch.Tensor]:
    """Gradients of the likelihood and the balance loss, on one rank or on several."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    group = dist.group.WORLD if world > 1 else None
    plain = build(path, True, rank, world, group)
    model = MultimodalMoE(plain.lm, plain.encoders, plain.connectors, activation_checkpointing)
    batch = batch_of(MIXED if rank == 0 else MIXED[1:])
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        output = model(batch, with_losses=True)
    records = output.context.records.values()
    balance = sum(balance_loss(r.prob_sum_X, selection_counts(r)) for r in records)
    (output.nll_sum + 0.1 * balance).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return found | {"saved": torch.tensor(float(sum(saved)))}


def test_activation_checkpointing_changes_memory_and_nothing_else(tiny):
    """Routing is kept, collectives are repeated on all ranks alike; gradients are the same bits."""

    def compare(kept: dict[str, torch.Tensor], recomputed: dict[str, torch.Tensor]) -> None:
        assert recomputed.pop("saved") < 0.7 * kept.pop("saved")
        for name, grad in kept.items():
            assert torch.equal(grad, recomputed[name]), name

    compare(checkpointed_gradients(tiny, False), checkpointed_gradients(tiny, True))
    pairs = zip(
        run_ranks(checkpointed_gradients, 2, tiny, False),
        run_ranks(checkpointed_gradients, 2, tiny, True),
        strict=True,
    )
    for kept, recomputed in pairs:
        compare(kept, recomputed)


def interleaved() -> Batch:
    """A sample that begins with text, one of text alone and one that begins with an image."""
    parts = [batch_of([sample]) for sample in (([5, 9, 17, 3], 0), ([80, 7], 1), ([2, 31, 4], 0))]
    parts.append(batch_of([([6, 8, 35], 1)]))
    fields = {name: torch.cat([getattr(part, name) for part in parts], 1)
              for name in ("input_ids", "labels", "modality_ids")}  # fmt: skip
    lengths = [4 + 5, 3, 6]  # the first two parts are one sample
    segment = torch.cat([torch.full((1, n), 1 + i) for i, n in enumerate(lengths)], 1)
    position = torch.cat([torch.arange(n).unsqueeze(0) for n in lengths], 1)
    media = torch.cat([part.media[1] for part in parts])
    return Batch(segment_ids=segment, position_ids=position, media={1: media}, **fields)


def live_gradients(path, checkpointing: bool) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """With every token's gradient, and with those that can reach something: tokens left out, and
    the gradients of this rank."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    found = []
    for everywhere in (True, False):
        plain = build(path, True, rank, world, dist.group.WORLD if world > 1 else None)
        model = MultimodalMoE(plain.lm, plain.encoders, plain.connectors, checkpointing)
        model.set_liveness()
        assert model.live_from == (1,)
        if everywhere:
            model.live_from = None
        output = model(interleaved() if rank == 0 else batch_of(TEXT), with_losses=True)
        record_losses = [r.z_sum + r.kl_sum for r in output.context.records.values()]
        (output.nll_sum + sum(record_losses)).backward()
        live_T = output.context.live_T
        left_out = 0 if live_T is None else int((output.context.valid_T & ~live_T).sum())
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((left_out, grads))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_before_everything_trainable_need_no_gradient(tiny, checkpointing):
    """What trains gets the same gradient, on one rank and on two, the second without an image."""
    alone = [live_gradients(tiny, checkpointing)]
    for number, rank in enumerate(alone + run_ranks(live_gradients, 2, tiny, checkpointing)):
        (none, every), (left_out, live) = rank
        assert none == 0 and left_out == (4 + 3 if number < 2 else 5 + 3 + 7)
        assert every.keys() == live.keys()
        for name, expected in every.items():
            scale = float(expected.abs().max())
            assert float((live[name] - expected).abs().max()) <= 1e-5 * scale, (number, name)


def test_what_can_reach_every_token_leaves_none_out(tiny):
    model = build(tiny, True)
    first, *_ = extended_layers(model.lm).values()
    first.router.add_delta()
    model.set_liveness()
    assert model.live_from is None
    first.router.drop_delta()
    first.router.rows["vision"].scope = Scope.joint
    model.set_liveness()
    assert model.live_from is None
    for layer in extended_layers(model.lm).values():
        layer.new.requires_grad_(False)
        layer.router.requires_grad_(False)
    model.set_liveness()
    assert model.live_from == (1,), "the connector still trains"
    model.lm.get_input_embeddings().requires_grad_(True)
    model.set_liveness()
    assert model.live_from is None

"""Two extensions, each trained for itself with DeepSpeed on two ranks, stand side by side on one base.

"vision" and "sound" are runs of their own, each with its only modality as number 1, different layers,
numbers of experts and placements. Loaded together without a joint step each does what it did alone,
either can be removed, and one can be trained while the other stays as it is.
"""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext.analysis.passes import hidden_states
from moe_ext.batch import Batch
from moe_ext.config import CalibrationKind, ExtensionConfig, Placement, RowInit, Scope, Trainable
from moe_ext.export import load_extension, read_manifest, save_extension
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import (
    LayerPlan,
    add_extension,
    extended_layers,
    extension_state,
    remove_extension,
)
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training import topology as topologies
from moe_ext.training.audit import Audit
from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.parts import FrozenWatch, choose
from moe_ext.training.topology import Ranks, Topology
from tests.model.test_multimodal import FEATURES, MIXED, TEXT, Pixels, batch_of
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks

FAMILIES = ("qwen2_moe", "deepseek_v3")
TRAIN = [Trainable.connector, Trainable.new_experts, Trainable.new_rows]
RUNS = {
    "vision": ExtensionConfig(
        name="vision", scope=Scope.preserve, placement=Placement.shard, loss_free_rate=0.01,
    ),
    "sound": ExtensionConfig(
        name="sound", scope=Scope.modality, row_init=RowInit.clone_shared,
        calibration=CalibrationKind.vector_add,
    ),
}  # fmt: skip


def plans(model: MultimodalMoE, name: str) -> list[LayerPlan]:
    first, *_, last = extended_layers(model.lm)
    if name == "vision":
        return [LayerPlan(last, 3, [1, 2, 3])]
    return [LayerPlan(first, 1, [4]), LayerPlan(last, 1, [2])]


def new_model(base: Path, topology: Topology, *modalities: str) -> MultimodalMoE:
    """The base with connectors of `modalities`, whose ids count from 1."""
    lm = load_base(base, dtype=torch.float32, ep_rank=topology.ep_rank, ep_size=topology.ep_size,
                   ep_group=topology.ep_group)  # fmt: skip
    connectors = nn.ModuleDict(
        {name: Connector(FEATURES, 8, lm.config.hidden_size, seed=3) for name in modalities}
    )
    encoders = {number: Pixels() for number, _ in enumerate(modalities, start=1)}
    return MultimodalMoE(lm, encoders, connectors)


def mixed(modality: int) -> Batch:
    """Text, and placeholders of one modality."""
    batch = batch_of(MIXED if dist.get_rank() == 0 else MIXED[1:])
    media = {modality: batch.media[1]}
    return Batch(batch.input_ids, batch.labels, batch.modality_ids * modality, batch.segment_ids,
                 batch.position_ids, media)  # fmt: skip


@torch.no_grad()
def logits(model: MultimodalMoE, batch: Batch) -> Tensor:
    return model.logits(hidden_states(model, batch)[batch.segment_ids != 0])


def text_hash(model: MultimodalMoE) -> str:
    return hashlib.sha256(logits(model, batch_of(TEXT)).numpy().tobytes()).hexdigest()


def train(model: MultimodalMoE, name: str, topology: Topology, modality: int) -> None:
    """Three audited steps of a stage that trains this extension."""
    train = [*TRAIN, *([Trainable.calibration] if name == "sound" else [])]
    chosen = choose(model, train, name)
    model.set_liveness()
    watch = FrozenWatch(model, chosen, name)
    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in chosen
    ]
    engine = Engine(model.forward, trainable, EngineSettings(1, 1.0, 1, 3, bf16=False), topology)
    audit = Audit("tune", train, name, model, chosen, engine, watch)
    batch = mixed(modality)
    counts = torch.tensor(float(batch.num_targets))
    dist.all_reduce(counts)
    for _ in range(3):
        output = engine(batch, None, True)
        loss = output.nll_sum / counts
        audit.forward(batch, output, loss, loss)
        engine.backward(loss)
        audit.backward()
        audit.step(*engine.step(3e-2))
        for index, record in output.context.records.items():
            count_X = record.counts_by_kind(record.counted_T.long() - 1, 1)[0]
            dist.all_reduce(count_X)
            router = extended_layers(model.lm)[index].router
            router.balance_corrections(count_X, RUNS[name].loss_free_rate, name)
    audit.end()
    engine.destroy()


def saved(model: MultimodalMoE, folder: Path, *names: str) -> None:
    """The extensions' folder, written by rank 0 from what both ranks hold."""
    states: list = [None, None]
    dist.all_gather_object(states, {k: v.clone() for k, v in extension_state(model.lm).items()})
    if dist.get_rank() == 0:
        state = states[0] | states[1]
        save_extension(model.lm, folder, names=names, connectors=model.connectors, state=state)
    dist.barrier()


def run_alone(base: Path, folder: Path, name: str, modality: str, topology: Topology) -> dict:
    model = new_model(base, topology, modality)
    add_extension(model.lm, str(base), name, plans(model, name), RUNS[name], seed=5)
    before = logits(model, mixed(1))
    train(model, name, topology, 1)
    saved(model, folder / name, name)
    learnt = logits(model, mixed(1))
    assert (learnt - before).abs().max() > 0.1, "training changed nothing"
    return {"media": learnt, "text": text_hash(model)}


def both(base: Path, folder: Path, topology: Topology) -> MultimodalMoE:
    """Loaded as a user does: sound is modality 1 of its run and 2 of this model."""
    model = new_model(base, topology, "image", "noise")
    load_extension(model.lm, folder / "vision", connectors=model.connectors,
                   placement=Placement.shard)  # fmt: skip
    load_extension(model.lm, folder / "sound", connectors=model.connectors)
    return model.eval()


def _close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def on_a_rank(root: Path) -> None:
    rank = dist.get_rank()
    topology = topologies.start(Ranks(rank, 2, rank, 2), 2, 60.0, 1)
    for family in FAMILIES:
        check(root / family, root / f"{family}-extensions", topology)


def check(base: Path, folder: Path, topology: Topology) -> None:
    folder.mkdir(exist_ok=True)
    untouched = text_hash(new_model(base, topology))
    alone = {
        name: run_alone(base, folder, name, modality, topology)
        for name, modality in (("vision", "image"), ("sound", "noise"))
    }

    model = both(base, folder, topology)
    assert text_hash(model) == alone["vision"]["text"] == alone["sound"]["text"] == untouched
    for modality, name in ((1, "vision"), (2, "sound")):
        _close(logits(model, mixed(modality)), alone[name]["media"])

    # one trains on, the other stays as it is, bit by bit
    before = {key: value.clone() for key, value in extension_state(model.lm).items()}
    image = {key: value.clone() for key, value in model.connectors["image"].state_dict().items()}
    train(model, "sound", topology, 2)
    after = extension_state(model.lm)
    moved = {key.split(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"sound"}
    assert all(torch.equal(image[k], v) for k, v in model.connectors["image"].state_dict().items())
    _close(logits(model, mixed(1)), alone["vision"]["media"])

    # what was trained beside another one is saved as if it were alone
    saved(model, folder / "sound again", "sound")
    again = new_model(base, topology, "noise")
    load_extension(again.lm, folder / "sound again", connectors=again.connectors)
    _close(logits(again, mixed(1)), logits(model, mixed(2)))

    remove_extension(model.lm, "sound")
    _close(logits(model, mixed(1)), alone["vision"]["media"])
    remove_extension(model.lm, "vision")
    assert text_hash(model) == untouched
    assert torch.equal(logits(model, mixed(1)), logits(_bare(base, model, topology), mixed(1)))


def _bare(base: Path, model: MultimodalMoE, topology: Topology) -> MultimodalMoE:
    """The base and the model's connectors."""
    bare = new_model(base, topology, "image", "noise")
    bare.connectors.load_state_dict(model.connectors.state_dict())
    return bare


def test_trained_apart_loaded_together(tmp_path):
    for family in FAMILIES:
        save_tiny(tmp_path / family, family)
    run_ranks(on_a_rank, 2, tmp_path)
    for family in FAMILIES:
        for name, connector in (("vision", "image"), ("sound", "noise"), ("sound again", "noise")):
            manifest = read_manifest(tmp_path / f"{family}-extensions" / name)
            (extension,) = manifest["extensions"].values()
            assert extension["modalities"] == [1]
            assert manifest["connectors"] == [connector]

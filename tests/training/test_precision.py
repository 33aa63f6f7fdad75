"""What a family keeps in fp32 stays so, and what trains beside it too, under DeepSpeed's bf16 on two ranks.

Ernie's routers are fp32 in a bf16 model, and new rows beside them; DeepSeek-V3 has an fp32 correction of
the choice beside bf16 rows. DeepSpeed 0.19.8 casts every parameter of the module it is given.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext.config import ExtensionConfig, Placement, Trainable
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import LayerPlan, add_extension, extended_layers
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training import topology as topologies
from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.parts import choose
from moe_ext.training.topology import Ranks, Topology
from tests.model.test_multimodal import FEATURES, MIXED, Pixels, batch_of
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks

ROW_DTYPE = {"ernie4_5_moe": torch.float32, "deepseek_v3": torch.bfloat16}
TRAIN = [
    Trainable.connector, Trainable.new_experts, Trainable.new_rows, Trainable.calibration,
]  # fmt: skip
RATE, STEPS = 1e-4, 3


def model_of(base, topology: Topology, extended: bool) -> MultimodalMoE:
    lm = load_base(base, dtype=torch.bfloat16, ep_rank=topology.ep_rank, ep_size=topology.ep_size,
                   ep_group=topology.ep_group)  # fmt: skip
    if extended:
        settings = ExtensionConfig(placement=Placement.shard, loss_free_rate=0.01)
        plans = [LayerPlan(layer, 2, [1, 2]) for layer in extended_layers(lm)]
        add_extension(lm, str(base), "vision", plans, settings)
    connector = Connector(FEATURES, 8, lm.config.hidden_size, dtype=torch.bfloat16)
    return MultimodalMoE(lm, {1: Pixels()}, nn.ModuleDict({"image": connector}))


def fp32_tensors(model: MultimodalMoE) -> dict[str, Tensor]:
    """Name -> router tensor that is fp32 in a bf16 model."""
    return {
        f"{index}.{name}": tensor
        for index, layer in extended_layers(model.lm).items()
        for name, tensor in [*layer.router.named_parameters(), *layer.router.named_buffers()]
        if tensor.dtype is torch.float32
    }


def engine_of(
    model: MultimodalMoE, topology: Topology, train: list[Trainable], stage: int
) -> Engine:
    chosen = choose(model, train)
    model.set_liveness()
    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in chosen
    ]
    settings = EngineSettings(stage, 0.0, 1, 3, bf16=True)
    return Engine(model.forward, trainable, settings, topology)


class Reference:
    """Plain AdamW in fp32 on a router tensor, from the ranks' own gradients as bf16 carries them."""

    def __init__(self, parameter: nn.Parameter, eps: float):
        self.weight = nn.Parameter(parameter.detach().float().clone())
        self.adam = torch.optim.AdamW([self.weight], RATE, (0.9, 0.99), eps, weight_decay=0.0)
        parameter.register_hook(self.keep)

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach().to(torch.bfloat16)

    def step(self) -> None:
        halves = [torch.empty_like(self.gradient) for _ in range(2)]
        dist.all_gather(halves, self.gradient / 2)
        self.weight.grad = (halves[0] + halves[1]).float()
        self.adam.step()


def on_a_rank(root) -> None:
    rank = dist.get_rank()
    topology = topologies.start(Ranks(rank, 2, rank, 2), 2, 60.0, 1)
    for family in ROW_DTYPE:
        for stage in (1, 2) if family == "ernie4_5_moe" else (1,):
            trains_rows(family, model_of(root / family, topology, True), topology, stage)
        trains_differences(family, model_of(root / family, topology, False), topology)


def trains_rows(family: str, model: MultimodalMoE, topology: Topology, stage: int) -> None:
    rows = {i: layer.router.rows["vision"] for i, layer in extended_layers(model.lm).items()}
    kept = {name: tensor.clone() for name, tensor in fp32_tensors(model).items()}
    engine = engine_of(model, topology, TRAIN, stage)
    references = {i: Reference(r.weight, engine.settings.eps) for i, r in rows.items()}
    batch = batch_of(MIXED if topology.rank == 0 else MIXED[1:])
    for _ in range(STEPS):
        engine.backward(engine(batch, None, False).nll_sum / 10)
        for reference in references.values():
            reference.step()
        engine.step(RATE)
    for index, own in rows.items():
        row, wanted = own.weight, references[index].weight.detach()
        assert row.dtype is ROW_DTYPE[family] is own.bias.dtype
        assert own.correction.dtype is torch.float32
        torch.testing.assert_close(row.float(), wanted.to(row.dtype).float(), rtol=0, atol=1e-7)
        if row.dtype is torch.float32:  # steps that bf16 could not hold
            assert not torch.equal(row, row.bfloat16().float())
    after = fp32_tensors(model)
    assert after.keys() == kept.keys()
    for name, tensor in after.items():
        trained = name.endswith(("rows.vision.weight", "rows.vision.bias"))
        assert trained or torch.equal(tensor, kept[name]), name
    engine.destroy()


def trains_differences(family: str, model: MultimodalMoE, topology: Topology) -> None:
    """The probe's stage: in Ernie all that trains is fp32."""
    for layer in extended_layers(model.lm).values():
        layer.router.add_delta()
    engine = engine_of(model, topology, [Trainable.router_delta], 1)
    assert engine.settings.bf16 == (ROW_DTYPE[family] is torch.bfloat16)
    engine.backward(engine(batch_of(MIXED), None, False).nll_sum / 10)
    taken, norm = engine.step(RATE)
    assert taken
    assert norm > 0
    for layer in extended_layers(model.lm).values():
        assert layer.router.delta.dtype is ROW_DTYPE[family] is layer.router.frozen_weight.dtype
        assert layer.router.delta.abs().max() > 0
    engine.destroy()


def test_fp32_rows_train_in_fp32(tmp_path):
    for family in ROW_DTYPE:
        save_tiny(tmp_path / family, family)
    run_ranks(on_a_rank, 2, tmp_path)

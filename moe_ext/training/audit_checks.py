"""The audit's checks: each returns a line a finding, and compares two accounts of one fact.

Those that ask all ranks are collectives, and say so; see `audit.py` for when each is called.
"""

import re
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from moe_ext.config import Placement, Trainable
from moe_ext.model.experts import FrozenBank, PackedBank
from moe_ext.model.extend import extended_layers
from moe_ext.model.files import Checkpoint
from moe_ext.model.load import BaseExperts, stored_router, views_of
from moe_ext.model.lora import LoraBank
from moe_ext.model.multimodal import MultimodalMoE, Output
from moe_ext.model.row_plan import NO_EXPERT
from moe_ext.training.checkpoint import Published
from moe_ext.training.engine import Engine
from moe_ext.training.parts import Part
from moe_ext.training.resume import pieces_of
from moe_ext.training.topology import Topology
from moe_ext.training.zero import ranks_of, reductions

KIND_OF_PATH = (
    (r"^connectors\.", Trainable.connector),
    (r"\.router\.delta$", Trainable.router_delta),
    (r"\.router\.rows\.[^.]+\.calibration\.", Trainable.calibration),
    (r"\.router\.rows\.", Trainable.new_rows),
    (r"\.new\.", Trainable.new_experts),
)
"""Path of a parameter in the model -> the kind of part it is; any other is the base's."""

COMPARED = 4096
"""Numbers at a tensor's end that are compared with its checkpoint's."""

STEPS_UNTIL_ALL_MOVE = 3
LATE = re.compile(r"(_a|\.w2|\.hidden_weight|\.hidden_bias)$")
"""Factors whose partner may start at zero: they have a gradient only from its second one on."""


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank. A collective."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sharded_tensors(model: MultimodalMoE) -> set[int]:
    """`id`s of parameters and buffers of which other ranks of the expert-parallel group hold others."""
    banks = [
        bank
        for block in extended_layers(model.lm).values()
        for bank in block.banks
        if bank.placement is Placement.shard and block.ep_group is not None
    ]
    return {id(t) for bank in banks for t in [*bank.parameters(), *bank.buffers()]}


def modalities_of_others(model: MultimodalMoE, extension: str) -> set[int]:
    """Modality ids that open the experts of another extension: their connectors are not `extension`'s."""
    return {
        modality
        for block in extended_layers(model.lm).values()
        for name, rows in block.router.rows.items()
        for modality in rows.modalities
        if name != extension
    }


def what_trains(model: MultimodalMoE, train: list[Trainable], extension: str) -> list[str]:
    """A parameter trains if and only if the stage lists its kind and it is no other extension's, told
    by its place in the model."""
    found, theirs = [], modalities_of_others(model, extension)
    kept = [f"connectors.{name}." for name, m in model.modality_of.items() if m in theirs]
    for path, parameter in model.named_parameters():
        owner = re.search(r"\.(?:new|rows)\.([^.]+)\.", path)
        if path.startswith(tuple(kept)) or (owner is not None and owner[1] != extension):
            if parameter.requires_grad:
                found.append(f"{path} trains, but it is not extension.name={extension}'s alone")
            continue
        kind = next((kind for pattern, kind in KIND_OF_PATH if re.search(pattern, path)), None)
        if kind is Trainable.router_delta and kind not in train:
            found.append(f"{path} is still there: the probe's difference must be dropped after it")
        elif parameter.requires_grad and kind not in train:
            found.append(f"{path} trains, but the stage trains {[k.name for k in train]} only")
        elif not parameter.requires_grad and kind in train:
            found.append(f"{path} is {kind.name}, which the stage trains, but it is frozen")
    return found


def optimizer_errors(model: MultimodalMoE, engine: Engine) -> list[str]:
    """Every trainable parameter is in exactly one optimizer group, which reduces over its replicas."""
    live = {id(p): (n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    sharded, found = sharded_tensors(model), []
    count: dict[int, int] = defaultdict(int)
    for parameter, over, among in reductions(engine):
        count[id(parameter)] += 1
        if parameter is engine.anchor:
            continue
        if id(parameter) not in live:
            what = names.get(id(parameter), f"a tensor of shape {tuple(parameter.shape)}")
            why = "frozen" if id(parameter) in names else "not in the model, or not any more"
            found.append(f"the optimizer holds {what}, which is {why}")
            continue
        name, _ = live[id(parameter)]
        wanted = engine.topology.replicas(id(parameter) in sharded)
        if over != wanted:
            found.append(
                f"the gradient of {name} is averaged over ranks {over}, but {wanted} hold it"
            )
        if among != wanted:
            found.append(
                f"the optimizer's state of {name} is divided among ranks {among}, but {wanted} hold it"
            )
    found += [
        f"{name} trains, but is in {count[key]} optimizer groups instead of 1"
        for key, (name, _) in live.items()
        if count[key] != 1
    ]
    return found


def placement_errors(model: MultimodalMoE, topology: Topology) -> list[str]:
    """The ranks of a group hold every expert: one of them, or all. A collective."""
    found: list[str] = []
    first = topology.rank - topology.rank % topology.ep_size
    group = list(range(first, first + topology.ep_size))
    held: dict[tuple[int, str], tuple[int, list[int]]] = {}
    for index, block in extended_layers(model.lm).items():
        seen = [topology.rank] if block.ep_group is None else ranks_of(block.ep_group)
        if seen != group:
            found.append(f"layer {index} exchanges tokens with ranks {seen} instead of {group}")
        frozen = [
            e for bank in block.banks if isinstance(bank, FrozenBank) for e in bank.expert_ids
        ]
        held[index, "frozen"] = (block.num_frozen, frozen)
        for name, bank in block.new.items():
            held[index, name] = (bank.num_experts, list(bank.expert_ids))
        names = {id(bank): name for name, bank in block.new.items()}
        for bank in block.banks:
            name = names.get(id(bank), "frozen")
            ids, start = bank.expert_ids, bank.first_held
            rows = {shape[0] for shape in bank.tensor_shapes().values()}
            if ids != sorted(ids) or rows != {len(ids)}:
                found.append(f"layer {index}'s {name} experts here are {ids}, out of order")
            goes = set(block.owner_of[start : start + len(ids)].tolist())
            if not goes <= {topology.ep_rank, NO_EXPERT}:
                found.append(
                    f"layer {index} sends the tokens of its {name} experts {ids} to place {goes} of the "
                    f"group, but they are held at {topology.ep_rank}"
                )
    of_rank = gather(held)
    for (index, name), (total, _) in held.items():
        for expert in range(total):
            holders = [rank for rank in group if expert in of_rank[rank][index, name][1]]
            if len(holders) not in (1, len(group)):
                who = f"ranks {holders}" if holders else "nobody"
                found.append(
                    f"layer {index}'s {name} expert {expert} is held by {who} of {group}, instead of by "
                    "one rank or by all"
                )
    return found


def base_errors(model: MultimodalMoE) -> list[str]:
    """Router rows, and a few numbers of some experts of every bank, are those of the base's files: of
    frozen experts, hot ones too, and of the sources that low-rank experts stand on."""
    info: Any = model.lm.base_info
    blocks, found = extended_layers(model.lm), []
    checkpoint = Checkpoint(info.path)
    experts = BaseExperts(checkpoint, info.family, list(blocks))
    for index, block in blocks.items():
        rows = stored_router(block.router, checkpoint, info.family, index)
        for key, (target, stored) in rows.items():
            if not torch.equal(target, stored.to(target.device, target.dtype)):
                found.append(f"layer {index}'s router has not the {key} of {info.path}")
        for bank in block.banks:
            name, ids = "frozen", bank.expert_ids
            if isinstance(bank, LoraBank):
                name, ids = "low-rank", [bank.sources[expert] for expert in ids]
            elif not isinstance(bank, FrozenBank) or isinstance(bank, PackedBank):
                continue  # it trains; or is packed into fewer bits: no number is the file's any more
            for slot in sorted({0, index % len(ids), len(ids) - 1} if ids else ()):
                stored = experts.read(index, ids[slot])
                found += [
                    f"layer {index}'s {name} expert {bank.expert_ids[slot]} has a {part} that is not the "
                    f"one of expert {ids[slot]} in {info.path}"
                    for part, view in views_of(bank, slot).items()
                    if not torch.equal(
                        view[-1], getattr(stored, part)[-1].to(view.device, view.dtype)
                    )
                ]
    return found


def restored_errors(parts: list[Part], source: Published | None) -> list[str]:
    """What trains starts as the checkpoint has it under its name: some numbers of every tensor held here."""
    found = []
    for part in parts if source is not None else ():
        flat = part.parameter.detach().reshape(-1)
        for logical in part.logical():
            if logical.name not in source.tensors:
                continue
            stored = torch.empty(min(logical.numel, COMPARED))
            end = logical.offset + logical.numel
            here = flat[end - len(stored) : end]
            source.fill(logical.name, logical.numel - len(stored), stored)
            if not torch.equal(here, stored.to(here.device, here.dtype)):
                found.append(
                    f"{logical.name} is not what the checkpoint {source.folder.name} has for it"
                )
    return found


def unequal_replicas(sums: dict[str, int], topology: Topology) -> list[str]:
    """Tensors that ranks hold in common and that are not equal. A collective."""
    holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(gather(sums)):
        for name, total in theirs.items():
            holders[name][total].append(rank)
    return [
        f"{name} is not the same on ranks {' and '.join(map(str, groups.values()))}, which should "
        "hold one and the same tensor"
        for name, groups in holders.items()
        if len(groups) > 1
    ]


def stale_weights(model: MultimodalMoE, engine: Engine) -> list[str]:
    """The model computes with what the optimizer has, rounded to the model's precision."""
    live = {id(p) for p in model.parameters()}
    found, fragments = [], engine.fragments()
    for item in engine.trainable:
        if id(item.parameter) not in live:
            found.append(f"the optimizer trains a {item.name} that the model does not use any more")
        piece = fragments.get(item.name)
        if piece is None:
            continue
        weight = item.parameter.detach().reshape(-1)[piece.start :][: piece.weight.numel()]
        if not torch.equal(weight, piece.weight.to(weight.dtype)):
            found.append(f"{item.name} is not what the optimizer has for it, rounded")
    return found


def reached_kinds(model: MultimodalMoE, output: Output, extension: str) -> set[Trainable]:
    """Kinds of the extension's parts that have a gradient from this pass if all is well: what its
    tokens reached."""
    reached = {Trainable.router_delta}
    not_own = {0, *modalities_of_others(model, extension)}
    if set(output.context.modality_BS.unique().tolist()) - not_own:
        reached.add(Trainable.connector)
    for index, block in extended_layers(model.lm).items():
        record, first = output.context.records.get(index), block.num_frozen
        for name, bank in block.new.items():
            own = range(first, first + bank.num_experts)
            first = own.stop
            if name != extension or record is None:
                continue
            if bool(((record.expert_TS >= own.start) & (record.expert_TS < own.stop)).any()):
                reached |= {Trainable.new_experts, Trainable.new_rows, Trainable.calibration}
    return reached


def fate_errors(
    engine: Engine, parts: list[Part], model: MultimodalMoE, reached: set[Trainable]
) -> tuple[list[str], list[str]]:
    """(findings, tensors without a gradient so far). A collective.

    An expert that no token chose has no gradient, and may. But the tensors of one expert share its
    fate, and an expert that learns has router rows and a calibration that learn; a whole kind of
    parts that tokens reached, without any gradient, is wrong as well.
    """
    own: dict[str, bool] = {}
    for piece in pieces_of(engine, parts)[0]:
        own[piece.name] = own.get(piece.name, False) or bool(piece.tensors["exp_avg"].any())
    kind_of = {item.name: part.trainable for part in parts for item in part.logical()}
    moved: dict[str, bool] = {}
    for theirs, their_reached, their_kinds in gather((own, reached, kind_of)):
        reached = reached | their_reached
        kind_of = kind_of | their_kinds  # an expert of another rank's has a kind as well
        for name, did in theirs.items():
            moved[name] = moved.get(name, False) or did
    families: dict[str, list[str]] = defaultdict(list)
    for name in moved:
        families[_family(name)].append(name)
    learns = {family for family, names in families.items() if any(moved[n] for n in names)}
    found = [
        f"{name} had no gradient in {STEPS_UNTIL_ALL_MOVE} steps, but what it belongs to ({family}) "
        "learns: it is left out of the computation"
        for family in sorted(learns | _wanted_with(learns, model))
        for name in families.get(family, ())
        if not moved[name] and not LATE.search(name)
    ]
    for kind in reached:
        named = [name for name in moved if kind_of[name] is kind]
        if named and not any(moved[name] for name in named):
            found.append(
                f"the stage trains {kind.name}, but none of its {len(named)} tensors, first {named[0]}, "
                f"received a gradient in {STEPS_UNTIL_ALL_MOVE} steps"
            )
    return found, sorted(name for name, did in moved.items() if not did)


def _wanted_with(learns: set[str], model: MultimodalMoE) -> set[str]:
    """Families that learn because an expert of their extension in their layer does."""
    wanted = set()
    for index, block in extended_layers(model.lm).items():
        rule = block.router.rule
        if rule.top_k == 1 and rule.renormalise:
            continue  # the weight of an only expert is one whatever its row is
        for extension in block.new:
            prefix = f"layers.{index}.{extension}"
            if any(family.startswith(f"{prefix}.experts.") for family in learns):
                wanted |= {f"{prefix}.rows", f"{prefix}.calibration"}
    return wanted


def same_samples(keys: list[str]) -> list[str]:
    """Ranks must read different samples; few samples, read again and again, are no finding. A collective."""
    readers: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, theirs in enumerate(gather(keys)):
        if len(set(theirs)) == len(theirs) > 1:
            readers[tuple(theirs)].append(rank)
    return [
        f"ranks {ranks} read the same samples, first {theirs[0]}: the data is not divided among them"
        for theirs, ranks in readers.items()
        if len(ranks) > 1
    ]


def _family(name: str) -> str:
    """The part of a logical tensor's name that it shares with those of the same fate."""
    return "router_delta" if name.endswith("router_delta") else name.rpartition(".")[0]

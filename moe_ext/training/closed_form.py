"""The connector's start: ridge regression from pooled features to mean caption embeddings.

Ranks divide the samples; all get the same connector, bit by bit.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from moe_ext.batch import IGNORED_LABEL
from moe_ext.config import TrainConfig
from moe_ext.data import BadSample, ShardStream
from moe_ext.data.configured import open_streams
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training.build import Prepared
from moe_ext.training.topology import Topology
from moe_ext.training.tracking import Tracker

FEATURES_FILE = "features.safetensors"
"""Pooled features (N, F) and caption ids (N, longest; -1 fills up) of the samples, in the run folder."""
TOGETHER = 16


@torch.no_grad()
def start_connectors(
    config: TrainConfig,
    prepared: Prepared,
    model: MultimodalMoE,
    topology: Topology,
    tracker: Tracker,
    folder: Path,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Start the run's own connectors from `connector.closed_form_samples` training samples; 0 does nothing.

    Args:
        between: called as often on every rank, between passes of the encoder.
    """
    wanted = config.connector.closed_form_samples
    if wanted == 0:
        return
    first = next(name for name in config.chain if config.stages[name].steps)
    stream = open_streams(
        prepared.data, config.stages[first].data, seed=config.seed, cache_dir=config.cache_dir
    )
    if isinstance(stream, ShardStream):
        wanted = min(wanted, len(stream))  # an epoch: no sample counts twice
    for name, modality in model.modality_of.items():
        if modality not in prepared.own_modalities:
            continue
        features, captions = [], []
        build, encoder = prepared.build, model.encoders[modality]
        own = range(topology.rank, wanted, topology.world_size)
        most = -(-wanted // topology.world_size)  # the longest share: as many passes on every rank
        with tracker.progress(f"start of {name}", most) as show:
            for start in range(0, most, TOGETHER):
                between()
                pixels = []
                for at in own[start : start + TOGETHER]:
                    try:
                        sample = build(stream.raw(at))
                    except BadSample:
                        continue
                    target = sample.labels[sample.labels != IGNORED_LABEL]
                    if sample.media and sample.media[0][0] == modality and len(target):
                        pixels.append(sample.media[0][1])
                        captions.append(target[target != build.eos_id])
                if pixels:
                    media = torch.stack(pixels).to(topology.device)
                    features.append(model.features(modality, media).float().mean(1).cpu())
                show(min(start + TOGETHER, most))
        embedding = model.lm.get_input_embeddings().weight
        targets = [embedding[ids.to(embedding.device)].float().mean(0).cpu() for ids in captions]
        feature_NF = torch.cat(features) if features else torch.zeros(0, encoder.feature_dim)
        target_ND = torch.stack(targets) if targets else torch.zeros(0, embedding.shape[1])
        longest = max((len(ids) for ids in captions), default=0)
        ids = torch.full((len(captions), longest), -1)
        for row, caption in enumerate(captions):
            ids[row, : len(caption)] = caption
        parts = [(feature_NF, target_ND, ids)]
        if topology.world_size > 1:
            parts = [parts[0]] * topology.world_size
            dist.all_gather_object(parts, (feature_NF, target_ND, ids))
        feature_NF = torch.cat([p[0] for p in parts])
        target_ND = torch.cat([p[1] for p in parts])
        if len(feature_NF) < 2:
            raise ValueError(
                f"connector.closed_form_samples={wanted}: the first samples hold fewer than two of "
                f"modality {name}; raise it, or set it to 0 for a random start"
            )
        connector = model.connectors[name]
        spread = float(embedding.float().std())
        fit = connector.closed_form_start(feature_NF, target_ND, spread, config.connector.ridge)
        for tensor in [*connector.parameters(), *connector.buffers()]:
            dist.broadcast(tensor.data, 0)
        tracker.say(f"connector of {name}: started from {len(feature_NF)} samples, R2 {fit:.2f}")
        if topology.rank == 0 and modality == build.modality_id:
            width = max(p[2].shape[1] for p in parts)
            padded = [
                torch.nn.functional.pad(p[2], (0, width - p[2].shape[1]), value=-1) for p in parts
            ]
            tensors = {"features": feature_NF, "captions": torch.cat(padded)}
            save_file(tensors, str(folder / FEATURES_FILE))

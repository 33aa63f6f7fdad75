"""From router statistics to new experts: the probe's measurements and manifest, and the surgery."""

from collections.abc import Iterator

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moe_ext.analysis.gaps import Measured, measure
from moe_ext.analysis.probe import load_plans, make_manifest, save_manifest
from moe_ext.batch import Batch
from moe_ext.config import RowInit, StageConfig, StageKind
from moe_ext.data.configured import open_loader
from moe_ext.model.extend import add_extension, base_sha256
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training.loop import check_bad_samples, sum_over_ranks
from moe_ext.training.run import Run

PROBE_FILE = "probe.json"
PROBE_INPUTS = "probe_inputs.safetensors"
"""Mean router input of the new modality's tokens by layer (`extension.row_init=domain`)."""


def measure_probe(
    run: Run, stage: StageConfig, model: MultimodalMoE, modality: int | None = None
) -> Measured:
    """Selections over the probe's samples, equally many batches on every rank."""
    return measure(
        model, probe_batches(run, stage.statistics_data, stage.statistics_samples),
        modality=modality, ranks=run.ranks,
    )  # fmt: skip


def probe_batches(run: Run, stream: str, samples: int) -> Iterator[Batch]:
    """This rank's share of the first `samples` samples of a stream, rounded up to whole batches."""
    config, topology, together = run.config, run.topology, 8
    loader = open_loader(
        run.prepared.data,
        stream,
        run.prepared.build,
        sequences_per_rank=together,
        rank=topology.rank,
        world_size=topology.world_size,
        seed=config.seed,
        cache_dir=config.cache_dir,
        stop_alone=False,
    )
    loader.num_workers = 0
    batches = iter(loader)
    for _ in range(-(-samples // (together * topology.world_size))):
        run.leave_if_asked()
        yield next(batches).to(topology.device)
    new_skips = sum_over_ranks([float(loader.num_new_skips)], topology.device)[0]
    check_bad_samples(loader, int(new_skips))


def write_probe(run: Run, before: Measured, after: Measured, samples: int) -> None:
    """Choose layers and sources, and publish the manifest."""
    extension = run.config.extension
    manifest = make_manifest(
        before,
        after,
        extension=extension.name,
        base_sha256=base_sha256(run.prepared.base_path),
        modality=run.modality,
        samples=samples,
        layer_share=extension.layer_share,
        num_new=extension.num_new_experts,
        affected_share=extension.affected_share,
        row_init=extension.row_init,
        layers=extension.layers or None,
        source_expert=extension.source_expert,
        named=extension.sources,
        ranks=run.ranks,
    )
    run.check_owner()
    if run.topology.rank == 0:
        inputs = {str(layer): mean for layer, mean in before.mean_input.items()}
        save_file(inputs, run.folder / PROBE_INPUTS)
        save_manifest(manifest, run.folder / PROBE_FILE)
    dist.barrier()
    chosen = [row["layer"] for row in manifest["layers"] if row["chosen"]]
    run.tracker.say(f"layers {chosen} are to be extended ({run.folder / PROBE_FILE})")


def extend(run: Run, model: MultimodalMoE) -> None:
    """Add the new experts where the probe's manifest says, or the configuration without a probe."""
    config = run.config
    path = run.folder / PROBE_FILE
    kinds = [config.stages[name].kind for name in config.chain]
    if StageKind.probe not in kinds:
        stream = "probe" if config.data.builtin or "probe" in config.data.streams else "train"
        settings = StageConfig(statistics_data=stream)
        measured = measure_probe(run, settings, model, modality=run.modality)
        write_probe(run, measured, measured, settings.statistics_samples)
    plans = load_plans(path, base_sha256(run.prepared.base_path))
    rows = None
    if config.extension.row_init is RowInit.domain:
        inputs = load_file(run.folder / PROBE_INPUTS)
        rows = {int(layer): mean for layer, mean in inputs.items()}
    add_extension(
        model.lm,
        str(run.prepared.base_path),
        config.extension.name,
        plans,
        config.extension,
        modalities=run.prepared.own_modalities,
        modality_rows=rows,
        seed=config.seed,
    )

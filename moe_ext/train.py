"""The entry that launchers start on every rank: compose or read the configuration, build, run the chain.

deepspeed --num_accelerators 2 --module moe_ext.train experiment=demo parallel.ep_size=2
torchrun --nproc-per-node 2 -m moe_ext.train experiment=demo parallel.ep_size=2
python -m moe_ext.train experiment=demo
python -m moe_ext.train --config-file runs/demo/launch/resolved.yaml
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_ext.compose import ConfigError, load, parser, to_yaml
from moe_ext.config import TrainConfig
from moe_ext.config_check import check_world
from moe_ext.training.ownership import Claim, claim, read_status
from moe_ext.training.signals import STOP_FILE, STOPPED_EXIT_CODE, StopFlag, StopRequested
from moe_ext.training.topology import Ranks, ranks_from_environment

CONFIG_FILE = "config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, 2 the configuration is refused, 75 stopped on request, 1 failed."""
    options = parser("moe-ext train").parse_args(argv)
    ranks = ranks_from_environment()
    try:
        config = load(options.config_dir, options.overrides, options.config_file)
        if not options.show:
            check_world(config, ranks.world_size, ranks.local_world_size)
            from moe_ext.preflight import check_files  # heavy imports, which --show needs not

            check_files(config)
    except (ConfigError, ValueError) as error:
        if ranks.rank == 0:
            print(f"moe-ext train: {error}", file=sys.stderr, flush=True)
        return 2
    if options.show:
        print(to_yaml(config), end="")
        return 0
    code = run(config, ranks)
    if code in (0, STOPPED_EXIT_CODE):
        from moe_ext.training.topology import stop

        try:
            stop()
        except RuntimeError as error:  # a peer failed where this rank had nothing left to do
            print(f"[rank {ranks.rank}] another rank failed: {error}", file=sys.stderr, flush=True)
            return 1
    return code


def run(config: TrainConfig, ranks: Ranks) -> int:
    """Train and evaluate; what goes wrong on this rank is printed, and named in `status.json`."""
    folder = Path(config.run_dir)
    claims: list[Claim] = []
    trackers: list[Any] = []
    peers: list[Any] = []
    try:
        # Open from here on: a request that comes while the ranks still meet must not kill one of them.
        with StopFlag(folder / STOP_FILE if ranks.rank == 0 else None) as stop:
            return _run(config, ranks, folder, claims, trackers, peers, stop)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from moe_ext.training.peers import headline, is_lost

        text, last = "".join(traceback.format_exception(error)), headline(error)
        # A peer's death shows here as a broken connection: the rank with the cause comes first.
        if peers and (missing := peers[0].explain(last, is_lost(last))):
            last += f"; {missing}"
            text += f"{missing}\n"
        prefix = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
        with contextlib.suppress(OSError):  # the log's disk may be full
            print("".join(prefix + line + "\n" for line in text.splitlines()), file=sys.stderr)
        known = read_status(folder)
        if claims and (known is None or known.state != "failed"):  # `running` since our start
            stage, step = (known.stage, known.step) if known else ("", 0)
            with contextlib.suppress(OSError):  # the disk may be what failed
                claims[0].write_status("failed", stage, step, f"rank {ranks.rank}: {last}")
        for tracker in trackers:
            tracker.close(1)
        return 1
    finally:
        for watched in peers:
            watched.close()


def _run(
    config: TrainConfig,
    ranks: Ranks,
    folder: Path,
    claims: list[Claim],
    trackers: list[Any],
    peers: list[Any],
    stop: StopFlag,
) -> int:
    # Heavy imports wait until the configuration has been accepted.
    from moe_ext.beside import beside_of
    from moe_ext.training import topology as topologies
    from moe_ext.training.build import prepare
    from moe_ext.training.conclusion import measure_step0, measure_text_before
    from moe_ext.training.peers import watch
    from moe_ext.training.run import Run, status, to_plain
    from moe_ext.training.stages import run_chain
    from moe_ext.training.tracking import Tracker

    plain = to_plain(asdict(config))
    if ranks.rank == 0:
        claims.append(claim(folder))
        (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=1) + "\n")
    topology = topologies.start(
        ranks,
        config.parallel.ep_size,
        config.parallel.timeout_s,
        config.parallel.threads_per_rank,
    )
    peers.append(watch(topology))
    token = topologies.from_rank_0(claims[0].token if claims else "")
    claims[:] = [Claim(folder, token)]
    group = os.environ.get("MOE_EXT_GROUP", "")
    tracker = Tracker(
        folder, plain, config.tracking, rank=ranks.rank, group=group, owned=claims[0].check
    )
    trackers.append(tracker)
    if config.parallel.planned:
        tracker.say(f"parallel=auto: {config.parallel.planned}")
    began = time.perf_counter()
    prepared = prepare(config, topology, lambda: base_folder(config, tracker), beside_of(config))
    context = Run(config, topology, prepared, tracker, claims[0], stop)
    tracker.stage(
        {
            "stage": "prepare",
            "kind": "prepare",
            "steps": 0,
            "minutes": (time.perf_counter() - began) / 60,
        }
    )
    try:
        measure_text_before(context)
        finished = run_chain(context, at_step0=measure_step0)
        if finished:
            conclude(context)
    except StopRequested:  # between steps: all that is done is published
        finished = False
        known = read_status(folder)
        tracker.say("stopped on request, nothing was under way")
        if known is not None:
            status(context, "stopped", known.stage, known.step)
    if not finished:
        stop.answered()
        tracker.close(STOPPED_EXIT_CODE, resumable=True)
        return STOPPED_EXIT_CODE
    status(context, "finished")
    tracker.close()
    return 0


def base_folder(config: TrainConfig, tracker: Any) -> Path:
    """The base's folder; upcycled now, with a bar, when it is not in the cache."""
    from moe_ext.model.upcycle import sparse_layers
    from moe_ext.upcycle import dense_folder, prepare_base

    base, cache = config.base, Path(config.cache_dir)
    if base.path:
        return Path(base.path)
    dense = json.loads((dense_folder(base.dense, cache) / "config.json").read_text())
    layers = sparse_layers(dense["num_hidden_layers"], base.sparse_every, base.sparse_offset)
    with tracker.progress("base", len(layers)) as show:
        return prepare_base(
            base,
            cache,
            lambda report: show(layers.index(report.layer) + 1, f"experts of layer {report.layer}"),
        )


def conclude(run: Any) -> None:
    """Evaluate, save the extension's folder and write the report; what is there stays."""
    from moe_ext.analysis.report import write_report
    from moe_ext.analysis.run_folder import load_run
    from moe_ext.analysis.summary import print_summary
    from moe_ext.export import read_manifest, save_extension
    from moe_ext.training.conclusion import evaluate_run, gather_extension, last_model

    model = last_model(run)
    evaluate_run(run, model)
    run.check_owner()
    if run.topology.rank == 0:
        folder = run.folder / "extension"
        if not folder.exists():
            notes = {"run": run.config.name, "encoder": list(run.config.encoder)}
            if run.others:
                notes["beside"] = run.prepared.beside.identity
            if run.config.base.frozen_bits:  # it was trained beside experts rounded to so many bits
                notes["frozen_bits"] = run.config.base.frozen_bits
                notes["frozen_format"] = run.config.base.frozen_format.name
            save_extension(
                model.lm,
                folder,
                names=[run.config.extension.name],
                connectors=model.connectors,
                state=gather_extension(run, model),
                notes=notes,
            )
        run.tracker.say(f"extension: {folder}")
        run.tracker.evaluation(load_run(run.folder).evaluation, folder, read_manifest(folder))
        report = write_report(run.folder)
        print_summary(load_run(run.folder))
        run.tracker.say(f"report: {report}")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (1, 130):
        os._exit(code)  # an orderly exit may wait for a peer that waits for us
    sys.exit(code)

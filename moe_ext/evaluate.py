"""`moe-ext evaluate RUN`: measure a finished run's model again, and write its report anew."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_ext.compose import CONF_DIR, ConfigError, load
from moe_ext.config import TrackingConfig
from moe_ext.config_check import check_world
from moe_ext.training.ownership import joined
from moe_ext.training.signals import StopFlag
from moe_ext.training.topology import ranks_from_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 when the folder holds no finished run."""
    options = argparse.ArgumentParser(
        prog="moe-ext evaluate",
        description="Held-out retrieval and captions, held-out text and the use of experts, of the last stage's "
        "result. On several ranks start it with deepspeed or torchrun, as training was.",
    )
    options.add_argument("run", type=Path, help="folder of a finished run, such as runs/demo")
    options.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings to change, such as evaluation.candidates=200 parallel.ep_size=1",
    )
    options.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    ranks = ranks_from_environment()
    try:
        config = load(CONF_DIR, given.overrides, given.run / "config.json")
        check_world(config, ranks.world_size, ranks.local_world_size)
        if config.beside:
            from moe_ext.beside import check_beside

            check_beside(config)
    except (ConfigError, ValueError) as error:
        options.exit(2, f"moe-ext evaluate: {error}\n")
    config.run_dir = str(given.run)

    from moe_ext.analysis.report import write_report
    from moe_ext.beside import beside_of
    from moe_ext.train import base_folder
    from moe_ext.training import topology as topologies
    from moe_ext.training.build import prepare
    from moe_ext.training.conclusion import evaluate_run, last_model, measure_text_before
    from moe_ext.training.run import Run
    from moe_ext.training.tracking import Tracker

    topology = topologies.start(
        ranks, config.parallel.ep_size, config.parallel.timeout_s, config.parallel.threads_per_rank
    )
    quiet = TrackingConfig(wandb=False, progress=config.tracking.progress)
    tracker = Tracker(given.run, {}, quiet, rank=ranks.rank)
    with StopFlag() as stop:
        prepared = prepare(
            config, topology, lambda: base_folder(config, tracker), beside_of(config)
        )
        run = Run(config, topology, prepared, tracker, joined(given.run), stop)
        if run.result(config.chain[-1]) is None:
            options.exit(
                2,
                f"moe-ext evaluate: {given.run} has no result of stage {config.chain[-1]}; "
                "finish the run first (moe-ext train, with the same settings)\n",
            )
        measure_text_before(run, again=True)
        evaluate_run(run, last_model(run), again=True)
        if ranks.rank == 0:
            print(write_report(given.run))
    tracker.close()
    topologies.stop()
    return 0

"""`moe-ext plan`: memory, traffic and time of every placement, from configurations alone.

moe-ext plan base=folder base.path=/models/mixtral cluster=h100x8
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moe_ext.compose import CONF_DIR, ConfigError, compose_only
from moe_ext.plan import plan_of
from moe_ext.planning.candidates import NEW_SHARE
from moe_ext.planning.table import table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 something fits, 1 nothing does, 2 the configuration is refused."""
    parser = argparse.ArgumentParser(
        prog="moe-ext plan",
        description="Memory a rank, bytes on the wire and predicted step time of every placement of a "
        "base on a cluster. Reads configurations only, no weights.",
        epilog="Overrides are Hydra's: `moe-ext plan base=folder base.path=/models/mixtral "
        "cluster=h100x8 data=shards data.max_length=2048`. Clusters: conf/cluster.",
    )
    parser.add_argument("--json", type=Path, help="write everything to this file; - is the screen")
    parser.add_argument("--all", action="store_true", help="every candidate, not the first 24")
    parser.add_argument(
        "--new-share",
        type=float,
        default=NEW_SHARE,
        help="share of the slots that choose new experts; default %(default)s",
    )
    parser.add_argument("--config-dir", type=Path, default=CONF_DIR, help="another conf/ folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(argv)
    try:
        if not 0.0 <= options.new_share < 1.0:
            raise ConfigError(f"--new-share={options.new_share} is a share, at least 0 and below 1")
        config = compose_only(options.config_dir, options.overrides)
        plan = plan_of(config, options.new_share)
    except ValueError as error:
        print(f"moe-ext plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        text = json.dumps(plan.to_json(), indent=1)
        if str(options.json) == "-":
            print(text)
            return 0 if plan.best else 1
        options.json.write_text(text + "\n")
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file has no width; the default would break lines
    console.print(table(plan, len(plan.candidates) if options.all else 24))
    return 0 if plan.best else 1

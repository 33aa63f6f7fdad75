"""A rank without model and group: what the launch commands of the documents start in tests, up to 48 at a
time. Each says where it is; the first, once all have, that the run is finished."""

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

import yaml

from moe_ext.analysis.run_folder import write_json
from moe_ext.training.ownership import claim

WAIT_S = 90.0


def ranks_of(run_dir: Path) -> list[dict[str, str]]:
    """What the ranks of a run said, in order."""
    files = sorted((run_dir / "ranks").glob("*.json"), key=lambda file: int(file.stem))
    return [json.loads(file.read_text()) for file in files]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    config = yaml.safe_load(parser.parse_args().config_file.read_text())
    run_dir, rank = Path(config["run_dir"]), int(os.environ["RANK"])
    seen = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    seen |= {"host": socket.gethostname(), "node": os.environ.get("SLURMD_NODENAME", "")}
    seen |= {"group": os.environ.get("MOE_EXT_GROUP", "")}
    (run_dir / "ranks").mkdir(exist_ok=True)
    write_json(run_dir / "ranks" / f"{rank}.json", seen)
    if rank == 0:
        owner, end = claim(run_dir), time.monotonic() + WAIT_S
        while len(ranks_of(run_dir)) < int(os.environ["WORLD_SIZE"]):
            if time.monotonic() > end:
                return 1
            time.sleep(0.1)
        owner.write_status("finished", config["chain"][-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())

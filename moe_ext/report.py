"""`moe-ext report RUN`: the page and the summary of a run, from the files of its folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_ext.analysis.report import write_report
from moe_ext.analysis.run_folder import load_run
from moe_ext.analysis.summary import print_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 when the folder holds no run."""
    options = argparse.ArgumentParser(
        prog="moe-ext report",
        description="Write report.html (one page that needs no other file) and summary.json into a run's folder, "
        "also of a run that is still under way. Nothing is computed anew: see `moe-ext evaluate`.",
    )
    options.add_argument("run", type=Path, nargs="+", help="folder of a run, such as runs/demo")
    for folder in options.parse_args(argv).run:
        try:
            page = write_report(folder)
            print_summary(load_run(folder))
            print(page)
        except (ValueError, OSError) as error:
            options.exit(2, f"moe-ext report: {error}\n")
    return 0

"""`moe-ext bench <benchmark>`."""

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "layer": ("moe_ext.benchmarks.layer", "one extended layer beside its peers"),
    "stream": (
        "moe_ext.benchmarks.stream",
        "reading samples, beside raw tar reading and its peers",
    ),
    "checkpoint": ("moe_ext.benchmarks.checkpoint", "how long a checkpoint stops training"),
    "plan": ("moe_ext.benchmarks.plan", "the planner's step time beside real steps"),
    "step": ("moe_ext.benchmarks.step", "a whole training step on two ranks beside its peers"),
}
"""Benchmark -> (module with `main`, one line of help)."""


def main(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if not words or words[0] not in BENCHMARKS:
        listing = "\n".join(f"  {name:<10} {text}" for name, (_, text) in BENCHMARKS.items())
        print(f"usage: moe-ext bench BENCHMARK [OPTIONS]\n\n{listing}", file=sys.stderr)
        return 0 if words and words[0] in ("-h", "--help") else 2
    return importlib.import_module(BENCHMARKS[words[0]][0]).main(words[1:])

"""`moe-ext <command>`: a thin table of commands; each module's `main(arguments)` has the rest."""

import importlib
import sys
from collections.abc import Sequence

import moe_ext

COMMANDS: dict[str, tuple[str, str]] = {
    "train": (
        "moe_ext.train",
        "run or resume a chain of stages in this process (launchers start it)",
    ),
    "shards": ("moe_ext.data.commands", "make, index, check and look at webdataset shards"),
    "upcycle": ("moe_ext.upcycle", "make a mixture-of-experts base out of a dense model"),
    "plan": (
        "moe_ext.plan_command",
        "memory, traffic and step time of every placement on a cluster",
    ),
    "launch": ("moe_ext.launch", "start a run or a sweep: this machine, a hostfile, Slurm"),
    "jobs": (
        "moe_ext.jobs.status",
        "how runs stand: state, last step, loss, error line; or their end",
    ),
    "watch": ("moe_ext.jobs.watch", "how one run goes, live in the terminal, from its files"),
    "dashboard": ("moe_ext.jobs.dashboard", "the W&B workspace of the project as code"),
    "evaluate": ("moe_ext.evaluate", "measure a finished run's model again"),
    "report": ("moe_ext.report", "write a run's page and summary from its folder"),
    "export": ("moe_ext.export_command", "a run's extension, for us or for Hugging Face users"),
    "compare": ("moe_ext.jobs.compare", "mean and spread over runs with different seeds"),
    "bench": (
        "moe_ext.benchmarks.commands",
        "measure the layer, a step or the stream beside its peers",
    ),
}
"""Command -> (module with `main`, one line of help). Modules are imported only when they are
run."""


def usage() -> str:
    lines = [
        "usage: moe-ext COMMAND [ARGUMENTS]",
        "",
        f"moe_ext {moe_ext.__version__}: teach a frozen mixture-of-experts language model a new "
        "modality",
        "by adding experts. `moe-ext COMMAND --help` explains a command.",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command; 0 when it succeeded, 2 for a command that does not exist."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(moe_ext.__version__)
        return 0
    if words[0] not in COMMANDS:
        print(
            f"moe-ext: {words[0]!r} is not a command; there are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module = importlib.import_module(COMMANDS[words[0]][0])
    return module.main(words[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())

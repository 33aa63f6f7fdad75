"""A plan as a table for a terminal, and the one line that `parallel=auto` announces."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_ext.planning.candidates import Candidate, Plan
from moe_ext.planning.memory import Placed

KINDS = ("frozen", "rest", "encoder", "trained", "gradients", "optimizer", "activations", "buckets")


def size(count: float) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    if count >= 0.1 * 2**30:
        return f"{count / 2**30:.2f}G"
    return f"{count / 2**20:.1f}M"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{1000 * value:.1f}m"


def describe(placed: Placed) -> str:
    """A placement in words: `ep 8, frozen shard, new replicate, ZeRO 1`."""
    words = [f"ep {placed.ep_size}"]
    if placed.ep_size > 1:
        words += [f"frozen {placed.frozen.value}", f"new {placed.new.value}"]
    words.append(f"ZeRO {placed.zero_stage}")
    if placed.frozen_bits:
        words.append(f"{placed.frozen_bits} bits{' (NF4)' if placed.nf4 else ''}")
    if any(placed.hot):
        least, most = min(placed.hot), max(placed.hot)
        words.append(f"{most} hot" if least == most else f"{least} to {most} hot")
    return ", ".join(words)


def headline(plan: Plan) -> str:
    """What was planned for, in two lines."""
    base, work, cluster = plan.subject.base, plan.subject.work, plan.cluster
    replicated, experts = plan.subject.trains
    return (
        f"{base.model_type}: {base.total / 1e9:.2f} B parameters ({base.active / 1e9:.2f} B a token), "
        f"{len(base.sparse_layers)} sparse layers of {base.num_experts} experts, top {base.top_k}; "
        f"trains {(replicated + experts) / 1e6:.1f} M\n"
        f"{cluster.name}: {cluster.nodes} x {cluster.ranks_per_node} ranks of "
        f"{cluster.memory_gib:g} GiB ({cluster.usable_share:.0%} usable), "
        f"{cluster.peak_tflops:g} TFLOP/s at {cluster.achieved_share:.0%}; a step of "
        f"{work.accumulation} x {work.sequences} sequences of {work.length} tokens a rank"
    )


def assumptions(plan: Plan) -> str:
    work = plan.subject.work
    return (
        "Memory of the rank that holds most. Every set of experts equally likely, "
        f"{work.new_share:.0%} of the slots of extended layers to new experts, experts of a bank equally loaded, "
        "nothing overlaps. Bytes on the wire: of a token, all layers, forward and backward."
    )


def table(plan: Plan, most: int = 24) -> Group:
    """The first `most` candidates, the best one marked; then what was taken for granted."""
    result = Table(title=headline(plan), title_justify="left", title_style="bold", box=None)
    result.add_column("placement", no_wrap=True)
    for kind in (*KINDS, "total", "wire", "compute", "within", "between", "reduce", "step s"):
        result.add_column(kind, justify="right", no_wrap=True)
    best = plan.best
    for candidate in plan.candidates[:most]:
        style = "bold green" if candidate is best else ("" if candidate.fits else "dim")
        mark = "* " if candidate is best else "  "
        result.add_row(mark + describe(candidate.placed), *_cells(candidate), style=style)
    notes = [assumptions(plan)]
    if len(plan.candidates) > most:
        notes.insert(0, f"{len(plan.candidates) - most} more with --all.")
    if best is None:
        notes.insert(0, nothing_fits(plan))
    return Group(result, *(Text(note) for note in notes))


def _cells(candidate: Candidate) -> list[str]:
    memory, time = candidate.memory, candidate.time
    total = size(memory.total) + ("" if candidate.fits else " !")
    return [
        *(size(getattr(memory, kind)) for kind in KINDS),
        total,
        f"{candidate.wire_bytes / 1024:.1f}K",
        seconds(time.compute),
        seconds(time.exchange_within),
        seconds(time.exchange_between),
        seconds(time.reduction),
        seconds(time.total),
    ]


def nothing_fits(plan: Plan) -> str:
    """What is missing, and the ways out."""
    least = min(plan.candidates, key=lambda c: c.memory.total)
    return (
        f"nothing fits: the smallest ({describe(least.placed)}) needs {size(least.memory.total)} a "
        f"rank of {size(plan.cluster.memory_bytes)} usable; take more ranks "
        "(cluster.nodes, cluster.ranks_per_node), parallel.activation_checkpointing=true, fewer "
        "stages.*.sequences_per_rank, or base.frozen_bits=8"
    )

"""The tables of docs/scaling.md, made by the planner: `python -m tests.planning.scaling` writes them anew."""

from functools import cache, partial

from transformers import AutoConfig

from moe_ext.compose import CONF_DIR, compose_only
from moe_ext.config import Placement
from moe_ext.config_cluster import ClusterConfig
from moe_ext.planning.candidates import Candidate, Plan, Subject, evaluate, make_plan, subject_of
from moe_ext.planning.memory import Placed
from moe_ext.planning.table import describe, nothing_fits
from tests.infra.machine import ROOT
from tests.infra.tables import with_table
from tests.planning.known import BASES

PAGE = ROOT / "docs" / "scaling.md"
WORK = (
    "base=folder", "base.path=/nowhere", "data.builtin=openmoji", "data.max_length=4096",
    "stages.tune.sequences_per_rank=1", "parallel.activation_checkpointing=true",
)  # fmt: skip
NODES = (1, 2, 4)
GIB = 2**30


@cache
def subjects() -> dict[str, Subject]:
    """Name -> what is placed, the same extension for every base: one new expert in half of the layers."""
    config = compose_only(CONF_DIR, [*WORK, "cluster=h100x8"])
    return {
        name: subject_of(config, AutoConfig.for_model(kind, **dimensions))
        for name, (kind, dimensions, _) in BASES.items()
    }


@cache
def cluster_of(nodes: int) -> ClusterConfig:
    return compose_only(CONF_DIR, [*WORK, "cluster=h100x8", f"cluster.nodes={nodes}"]).cluster


def decides(plan: Plan, best: Candidate) -> str:
    """What keeps the plan from a quicker or a plainer placement."""
    time, placed = best.time, best.placed
    parts = {
        "products": time.compute,
        "exchange inside a node": time.exchange_within,
        "exchange between nodes": time.exchange_between,
        "gradients": time.reduction,
    }
    most = max(parts, key=parts.__getitem__)
    words = f"{most}, {parts[most] / time.total:.0%} of the step"
    whole = min(c.memory.total for c in plan.candidates if c.placed == Placed(
        1, Placement.shard, Placement.replicate, placed.zero_stage))  # fmt: skip
    if placed.ep_size > 1 or placed.frozen_bits:
        words = f"memory: a whole copy takes {whole / GIB:.0f} GiB a rank; then {words}"
    return words


def best_placements(subjects: dict[str, Subject]) -> str:
    rows = ["| base | nodes | best placement | GiB a rank | KiB a token | step s | what decides |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, subject in subjects.items():
        for nodes in NODES:
            plan = make_plan(subject, cluster_of(nodes))
            best = plan.best
            if best is None:
                rows.append(
                    f"| {name} | {nodes} | none | | | | {nothing_fits(plan).split(';')[0]} |"
                )
                continue
            rows.append(
                f"| {name} | {nodes} | {describe(best.placed)} | {best.memory.total / GIB:.1f} | "
                f"{best.wire_bytes / 1024:,.0f} | {best.time.total:.2f} | {decides(plan, best)} |"
            )
    return "\n".join(rows)


def across_nodes(subjects: dict[str, Subject]) -> str:
    """One placement inside a node and across nodes, memory left out of account."""
    rows = ["| base | width of an expert | inside: ep 8 | across 2 nodes: ep 16 | across 4: ep 32 |",
            "|---|---|---|---|---|"]  # fmt: skip
    for name, subject in subjects.items():
        cells, base = [], subject.base
        whole = evaluate(subject, frozen_shard(1), cluster_of(4)).time.total
        for ep_size, nodes in ((8, 4), (16, 2), (32, 4)):
            if ep_size > base.num_experts:
                cells.append("")
                continue
            time = evaluate(subject, frozen_shard(ep_size), cluster_of(nodes)).time.total
            cells.append(f"{time / whole:.2f}")
        rows.append(f"| {name} | {base.expert.intermediate_dim:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def hot_experts(subjects: dict[str, Subject]) -> str:
    """An eighth and a quarter of the experts on every rank, at an even load."""
    rows = [
        "| base | ep | hot experts a layer | GiB a rank | KiB a token |",
        "|---|---|---|---|---|",
    ]
    for name in ("Qwen3-30B-A3B", "Mixtral-8x7B", "GPT-OSS-120B"):
        subject = subjects[name]
        for part in (0, 8, 4):
            count = subject.base.num_experts // part if part else 0
            hot = (count,) * len(subject.base.sparse_layers) if count else ()
            found = evaluate(subject, frozen_shard(8, hot), cluster_of(1))
            rows.append(
                f"| {name} | 8 | {count} of {subject.base.num_experts} | "
                f"{found.memory.total / GIB:.1f} | {found.wire_bytes / 1024:,.0f} |"
            )
    return "\n".join(rows)


def frozen_shard(ep_size: int, hot: tuple[int, ...] = ()) -> Placed:
    return Placed(ep_size, Placement.shard, Placement.replicate, 1, hot=hot)


def written(page: str) -> str:
    """The page with its tables made anew; everything else as it is."""
    found = subjects()
    for make in (best_placements, across_nodes, hot_experts):
        name = make.__name__
        assert f"<!-- {name} -->" in page, f"docs/scaling.md has no place for {name}"
        page = with_table(page, name, partial(make, found))
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))

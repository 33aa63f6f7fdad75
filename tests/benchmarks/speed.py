"""The tables of figures in README and docs/, from the benchmarks' JSON: `python -m tests.benchmarks.speed` writes
them anew."""

import json
import statistics
from collections.abc import Iterable
from functools import cache
from typing import Any

from moe_ext.benchmarks.report import TARGETS, case_name, spread
from moe_ext.benchmarks.workload import LOADS, SHAPES
from tests.infra.machine import ROOT
from tests.infra.tables import with_table

PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("speed.md", "placement.md"))]
RESULTS = ROOT / "moe_ext" / "benchmarks" / "results"
DTYPES = ("fp32", "bf16")
NAMES = {
    "moextend_mask": "MoExtend's `mask` loop",
    "moextend_one_hot": "MoExtend's `one-hot` loop",
    "deepspeed_moe": "DeepSpeed `MoE`",
    "grouped_mm": "transformers' `grouped_mm`, all experts trainable",
    "eager": "transformers' `eager`, all experts trainable",
    "autoep": "DeepSpeed AutoEP, all experts trainable",
    "masking": "gradient masking in our own layer",
    "flop_ceiling": "share of the FLOP ceiling",
}
LOAD_NAMES = {
    "balanced": "even load",
    "skew2": "busiest 2 times the mean",
    "skew8": "busiest 8 times the mean (at most E / k)",
}
STEPS = {
    "moextend_script": "MoExtend's script as published: padded, `mask` loop, ZeRO-3",
    "moextend_zero2": "the same under ZeRO-2, every expert on each rank on both sides",
    "moextend_equal": "the same at equal lengths",
    "autoep_equal": "DeepSpeed AutoEP at equal lengths, experts sharded on both sides",
}


@cache
def results(benchmark: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{benchmark}.json").read_text())


def between(values: Iterable[float], digits: int) -> str:
    """`least to greatest`, once where they read alike."""
    found = sorted(values)
    low, high = (f"{value:.{digits if value < 10 else 0}f}" for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def medians(peer: str, shape: str, loads: Iterable[str], dtype: str) -> list[float]:
    ratios = results("layer")["ratios"]
    return [ratios[f"{peer}/{case_name(shape, load, dtype)}"] for load in loads]


def layer_ratios() -> str:
    """Peer time over ours, the range over the loads; DeepSpeed's apart for each, where they differ most."""
    shapes = ["8 experts x top-2", "32 x top-4", "128 x top-8"]
    rows = [f"| fp32; bf16 | {' | '.join(shapes)} |", "|---|---|---|---|"]
    for peer, name in NAMES.items():
        groups = [[load] for load in LOADS] if peer == "deepspeed_moe" else [list(LOADS)]
        for loads in groups:
            words = f"{name}, {LOAD_NAMES[loads[0]]}" if len(groups) > 1 else name
            cells = ["; ".join(between(medians(peer, shape, loads, d), 2) for d in DTYPES) for shape in SHAPES]  # fmt: skip
            rows.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(rows)


def layer_aims() -> str:
    """Every aim, what was measured, in how many cases it holds, and what the bare products would give."""
    rows = ["| against | aim | fp32 | bf16 | holds in | without any work but products: fp32 | bf16 |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for peer, shape, load, least in TARGETS:
        loads, shapes = [load] if load else list(LOADS), [shape] if shape else list(SHAPES)
        measured, bounds = {}, {}
        for dtype in DTYPES:
            found = [value for s in shapes for value in medians(peer, s, loads, dtype)]
            alone = [value for s in shapes for value in medians("products", s, loads, dtype)]
            measured[dtype] = found
            bounds[dtype] = [value / share for value, share in zip(found, alone, strict=True)]
        every = [value for found in measured.values() for value in found]
        where = ", ".join(word for word in (shape, LOAD_NAMES[load] if load else "") if word)
        cells = [between(measured[d], 2) for d in DTYPES]
        cells += [f"{sum(value >= least for value in every)} of {len(every)}"]
        bounded = peer != "flop_ceiling"  # our own layer on both sides
        cells += [between(bounds[d], 2) if bounded else "" for d in DTYPES]
        rows.append(
            f"| {NAMES[peer]}{': ' + where if where else ''} | {least} | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def layer_rates() -> str:
    """What our layer makes of the machine. The best product is the best of a shape's three measurements."""
    rows = ["| experts | load | | ms | GFLOP/s | of the best product | of products of its own numbers of rows | in products |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    cases = {case["case"]: case for case in results("layer")["cases"]}
    for shape in SHAPES:
        for dtype in DTYPES:
            of_loads = (cases[case_name(shape, load, dtype)]["achieved"] for load in LOADS)
            peak = max(rate["gemm_peak_gflops"] for rate in of_loads)
            for load in LOADS:
                case = cases[case_name(shape, load, dtype)]
                rate, ours = case["achieved"], statistics.median(case["samples"]["ours"]["cpu_s"])
                (alone,) = medians("products", shape, [load], dtype)
                rows.append(
                    f"| {shape} | {LOAD_NAMES[load].split(' (')[0]} | {dtype} | {1e3 * ours:.0f} | {rate['gflops']:.0f} | "
                    f"{rate['gflops'] / peak:.0%} | {rate['of_rows']:.0%} | {alone:.0%} |"
                )
    return "\n".join(rows)


def step_ratios() -> str:
    """A whole step's CPU time over ours: median and quartiles."""
    found, dtypes = results("step")["spread"], [c["case"] for c in results("step")["cases"]]
    rows = [f"| a whole step, two ranks | {' | '.join(dtypes)} |", "|---" * (len(dtypes) + 1) + "|"]
    for peer, name in STEPS.items():
        spreads = [found[f"{peer}/{dtype}"] for dtype in dtypes]
        cells = [f"{s['median']:.2f} ({s['q1']:.2f} to {s['q3']:.2f})" for s in spreads]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def step_rates() -> str:
    """What our step makes of the machine."""
    rows = ["| our step | | CPU ms, both ranks | GFLOP/s a rank | of the best product |", "|---|---|---|---|---|"]  # fmt: skip
    names = {
        "ours": "packed, frozen experts sharded",
        "ours_replica": "packed, every expert on each rank",
        "ours_equal": "full lengths, sharded",
        "ours_replica_equal": "full lengths, every expert on each rank",
    }
    for name, words in names.items():
        for case in results("step")["cases"]:
            rate, cpu_s = case["achieved"][name], spread(case["samples"][name]["cpu_s"])["median"]
            rows.append(
                f"| {words} | {case['case']} | {1e3 * cpu_s:,.0f} | {rate['gflops']:.0f} | {rate['of_peak']:.0%} |"
            )
    return "\n".join(rows)


def plan_shares() -> str:
    """Planned beside real steps: the planner's seconds at the rate of plain products over measured ones."""
    cases = {(case["case"], case["dtype"]): case for case in results("plan")["cases"]}
    dtypes = [d for d in DTYPES if any(dtype == d for _, dtype in cases)]
    heads = [f"{d}: measured ms | planned ms | share" for d in dtypes]
    rows = [f"| experts x top-k, ranks | {' | '.join(heads)} |", "|---" * (1 + 3 * len(dtypes)) + "|"]  # fmt: skip
    for name in dict.fromkeys(name for name, _ in cases):
        cells = []
        for case in (cases[name, dtype] for dtype in dtypes):
            measured, planned = case["cpu_s"]["median"], case["predicted_s"]["total"]
            cells += [f"{1e3 * measured:,.0f} | {1e3 * planned:,.0f} | {planned / measured:.2f}"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


TABLES = (layer_ratios, layer_aims, layer_rates, step_ratios, step_rates, plan_shares)


def written(page: str) -> str:
    """The page with its tables made anew; everything else as it is."""
    for make in TABLES:
        page = with_table(page, make.__name__, make)
    return page


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text()))

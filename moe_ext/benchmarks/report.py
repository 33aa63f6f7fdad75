"""Figures out of samples: ratios, FLOP/s, tables, JSON."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moe_ext.benchmarks.workload import Work

COLUMNS = (
    "moextend_mask",
    "moextend_one_hot",
    "deepspeed_moe",
    "grouped_mm",
    "eager",
    "autoep",
    "masking",
    "flop_ceiling",
    "products",
)
"""Peers of the layer benchmark in the order of the table, and the bare products of our layer."""

TARGETS: tuple[tuple[str, str, str, float], ...] = (
    ("moextend_mask", "8x2", "", 1.0),
    ("moextend_mask", "32x4", "", 2.0),
    ("moextend_mask", "128x8", "", 6.0),
    ("moextend_one_hot", "8x2", "", 1.0),
    ("moextend_one_hot", "32x4", "", 1.2),
    ("moextend_one_hot", "128x8", "", 1.4),
    ("deepspeed_moe", "128x8", "balanced", 1.8),
    ("deepspeed_moe", "128x8", "skew8", 8.0),
    ("grouped_mm", "", "", 1.3),
    ("autoep", "", "", 1.3),
    ("masking", "", "", 1.25),
    ("flop_ceiling", "", "", 0.9),
)
"""(peer, shape, load, least ratio) that we hold ourselves to; an empty word is every one."""


BF16_PRODUCTS = ("amx_bf16", "avx512_bf16")
"""Instructions of a processor that multiply bf16, by their names in /proc/cpuinfo."""


@dataclass
class Samples:
    """Seconds of every repetition."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)


def case_name(shape: str, load: str, dtype: str) -> str:
    return f"{shape}/{load}/{dtype}"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "deepspeed", "transformers")
    cpu = platform.processor() or platform.machine()
    info, flags = Path("/proc/cpuinfo"), ""
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
        flags = next((x for x in lines if x.startswith("flags")), "")
    return {name: version(name) for name in packages} | {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_products": [name for name in BF16_PRODUCTS if name in flags.split()],
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    if len(values) < 2:
        return dict.fromkeys(("median", "q1", "q3", "min", "max"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "max": max(values)}


def ratios(
    shape: str, load: str, dtype: str, samples: dict[str, Samples], new_share: float
) -> dict[str, dict[str, float]]:
    """`<peer>/<shape>/<load>/<dtype>` -> spread of peer CPU time over ours in the same repetition.

    `flop_ceiling` is the speed-up over our own all-trainable path divided by what the operations
    allow, 6 / (4 + 2 f): forward, input gradient and weight gradient of every expert against a
    weight gradient for the share f of the rows only.
    """
    out = {}
    base = samples["ours"].cpu_s
    for name, peer in samples.items():
        if name == "ours":
            continue
        values = [a / b for a, b in zip(peer.cpu_s, base, strict=True)]
        if name == "all_trainable":
            name = "flop_ceiling"
            values = [value / (6 / (4 + 2 * new_share)) for value in values]
        out[f"{name}/{case_name(shape, load, dtype)}"] = spread(values)
    return out


def achieved(work: Work, samples: Samples, rates: dict[str, float]) -> dict[str, float]:
    """FLOP/s of our layer's expert products over its whole time, and against plain products."""
    expert = work.weights.gate_up[0].numel() + work.weights.down[0].numel()
    flop = (4 + 2 * work.new_share) * sum(work.rows_X) * expert
    rate = flop / statistics.median(samples.cpu_s)
    return {
        "gflops": rate / 1e9,
        "gemm_peak_gflops": rates["peak"] / 1e9,
        "of_peak": rate / rates["peak"],
        "gemm_rows_gflops": rates["rows"] / 1e9,
        "of_rows": rate / rates["rows"],
    }


def layer_table(cases: Sequence[dict[str, Any]], header: bool = True) -> str:
    """One line a case: our time, FLOP/s, and every peer's time over ours (median, quartiles)."""
    lines = []
    if header:
        names = "".join(f"{name:>18}" for name in COLUMNS)
        lines.append(f"{'case':<20}{'ours ms':>9}{'GFLOP/s':>9}{'of peak':>9}{names}")
    for case in cases:
        ours = 1e3 * statistics.median(case["samples"]["ours"]["cpu_s"])
        rate = case["achieved"]
        line = f"{case['case']:<20}{ours:9.1f}{rate['gflops']:9.0f}{rate['of_peak']:9.0%}"
        for name in COLUMNS:
            found = case["ratios"].get(f"{name}/{case['case']}")
            if found is None:
                line += f"{'-':>18}"
            else:
                text = f"{found['median']:.2f} ({found['q1']:.2f}-{found['q3']:.2f})"
                line += f"{text:>18}"
        lines.append(line)
    return "\n".join(lines)


def targets_table(medians: dict[str, float]) -> str:
    """One line a target: the least and the greatest of the ratios it covers, in how many cases it
    holds, and what the ratios would be if our layer took no longer than its bare products."""
    lines = [f"{'target':<36}{'least':>7}{'measured':>16}{'products alone':>16}"]
    for peer, shape, load, least in TARGETS:
        covered, bounds = [], []
        for key, value in medians.items():
            its_peer, its_shape, its_load, dtype = key.split("/")
            if its_peer == peer and shape in ("", its_shape) and load in ("", its_load):
                covered.append(value)
                alone = medians[f"products/{case_name(its_shape, its_load, dtype)}"]
                bounds.append(value / alone)
        if covered:
            texts = (f"{min(found):.2f} .. {max(found):.2f}" for found in (covered, bounds))
            held = sum(value >= least for value in covered)
            name = " ".join(word for word in (peer, shape, load) if word)
            columns = "".join(f"{text:>16}" for text in texts)
            lines.append(f"{name:<36}{least:>7}{columns}  in {held} of {len(covered)} cases")
    return "\n".join(lines)


def write_json(
    path: Path, benchmark: str, settings: dict[str, Any], cases: Sequence[dict[str, Any]]
) -> None:
    """`ratios` (medians), `spread` of each, and `cases` with every sample behind them."""
    every = {key: value for case in cases for key, value in case["ratios"].items()}
    content = {
        "benchmark": benchmark,
        "environment": settings,
        "ratios": {key: value["median"] for key, value in every.items()},
        "spread": every,
        "cases": [{k: v for k, v in case.items() if k != "ratios"} for case in cases],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")

"""`moe-ext bench layer`: the extended layer beside its peers, in one process, on one thread.

Forward and backward of one layer with its gate, dispatch and combine on all sides, the input live,
on 2,048 tokens: one sequence of the length that MoExtend and LLaVA-1.5 are tuned with.
Repetitions are interleaved (every peer once, then again, in an order that rotates), and a ratio is
the median over repetitions of peer time over ours in the same repetition. CPU time decides; wall
time is recorded beside it. Freed memory stays with the process, for all alike: with glibc's default a
peer that allocates 32 MiB at a time pays up to three times its own time for zeroed pages.

Beside the peers runs `products`: the matrix products of our layer, of the same matrices and numbers of
rows, and nothing else. Its time is what a layer without any other work would take, and a peer's time
over it the ratio that no layer made of these products can pass.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.benchmarks.host_memory import keep_freed_memory
from moe_ext.benchmarks.peers import PEERS, Peer
from moe_ext.benchmarks.report import (
    Samples,
    achieved,
    case_name,
    environment,
    layer_table,
    ratios,
    targets_table,
    write_json,
)
from moe_ext.benchmarks.workload import LOADS, SHAPES, Work, make_work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def single_rank_group() -> None:
    """A gloo group of one rank, for DeepSpeed's layer; nothing leaves the process."""
    import deepspeed.comm
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler runs at the first init
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.comm.init_distributed(dist_backend="gloo", verbose=False)


def once(peer: Peer, work: Work) -> tuple[float, float]:
    """(CPU s, wall s) of one forward and backward pass."""
    hidden_BSD = work.hidden_BSD.detach().requires_grad_()
    for parameter in peer.parameters:
        parameter.grad = None
    cpu, wall = time.process_time(), time.perf_counter()
    peer.forward(hidden_BSD).backward(work.grad_BSD)
    peer.after_backward()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(
    peers: dict[str, Callable[[], tuple[float, float]]], repetitions: int
) -> dict[str, Samples]:
    """Interleaved samples of every peer, after one call each that does not count."""
    samples = {name: Samples() for name in peers}
    names = list(peers)
    for repetition in range(-1, repetitions):
        first = max(repetition, 0) % len(names)
        for name in names[first:] + names[:first]:
            cpu, wall = peers[name]()
            if repetition >= 0:
                samples[name].cpu_s.append(cpu)
                samples[name].wall_s.append(wall)
    return samples


def products(work: Work) -> Callable[[], tuple[float, float]]:
    """(CPU s, wall s) of the layer's products alone: forward, the input's gradient, new weights'."""
    weights, rows_X = work.weights, work.rows_X
    _, double, dim = weights.gate_up.shape
    most, dtype = max(rows_X), weights.gate_up.dtype
    x, y = (torch.randn(most, dim).to(dtype) for _ in range(2))
    h, grad_h = (torch.randn(most, double).to(dtype) for _ in range(2))
    act, grad_act = (torch.randn(most, double // 2).to(dtype) for _ in range(2))
    grads = [torch.empty_like(weights.gate_up[0]), torch.empty_like(weights.down[0])]

    def call() -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for number, up, down in zip(rows_X, weights.gate_up, weights.down, strict=True):
            torch.mm(x[:number], up.t(), out=h[:number])
            torch.mm(act[:number], down.t(), out=y[:number])
        for e, (number, up, down) in enumerate(
            zip(rows_X, weights.gate_up, weights.down, strict=True)
        ):
            torch.mm(y[:number], down, out=grad_act[:number])
            torch.mm(grad_h[:number], up, out=x[:number])
            if e >= weights.num_frozen:
                torch.mm(grad_h[:number].t(), x[:number], out=grads[0])
                torch.mm(y[:number].t(), act[:number], out=grads[1])
        return time.process_time() - cpu, time.perf_counter() - wall

    return call


def plain_products(work: Work) -> dict[str, tuple[float, Callable[[], tuple[float, float]]]]:
    """Name -> operations and (CPU s, wall s) of plain products at the layer's widths.

    `peak`: all rows against one expert's matrix, the best that the library does at these widths;
    `rows`: as many rows as an average expert gets, a different matrix every time.
    """
    gate_up, num_rows = work.weights.gate_up, sum(work.rows_X)
    x = torch.randn(num_rows, gate_up.shape[2], dtype=gate_up.dtype)
    out = x.new_empty(num_rows, gate_up.shape[1])
    each = num_rows // len(work.rows_X)

    def call(matrices: Tensor, number: int) -> Callable[[], tuple[float, float]]:
        def timed() -> tuple[float, float]:
            cpu, wall = time.process_time(), time.perf_counter()
            for matrix in matrices.unbind(0):
                torch.mm(x[:number], matrix.t(), out=out[:number])
            return time.process_time() - cpu, time.perf_counter() - wall

        return timed

    flop = 2 * gate_up[0].numel()
    return {
        "peak": (flop * num_rows, call(gate_up[:1], num_rows)),
        "rows": (flop * each * len(gate_up), call(gate_up, each)),
    }


def bench_case(
    shape: str, load: str, dtype: str, names: Sequence[str], tokens: int, repetitions: int
) -> dict[str, Any]:
    """Everything measured in one (shape, load, dtype)."""
    work = make_work(SHAPES[shape], load, DTYPES[dtype], tokens)
    peers = {name: PEERS[name](work.weights) for name in names}
    gc.collect()

    def call(peer: Peer) -> Callable[[], tuple[float, float]]:
        return lambda: once(peer, work)

    calls = {name: call(peer) for name, peer in peers.items()}
    plain = plain_products(work)
    calls |= {"products": products(work)} | {name: timed for name, (_, timed) in plain.items()}
    samples = measure(calls, repetitions)
    plain_s = {name: statistics.median(samples.pop(name).cpu_s) for name in plain}
    rates = {name: flop / plain_s[name] for name, (flop, _) in plain.items()}
    return {
        "case": case_name(shape, load, dtype),
        "tokens": tokens,
        "new_share": work.new_share,
        "skew": work.skew,
        "achieved": achieved(work, samples["ours"], rates),
        "samples": {name: vars(s) for name, s in samples.items()},
        "ratios": ratios(shape, load, dtype, samples, work.new_share),
    }


def _words(text: str, known: Sequence[str], option: str) -> list[str]:
    """The comma-separated words of an option."""
    chosen = [word for word in text.split(",") if word]
    unknown = [word for word in chosen if word not in known]
    if unknown or not chosen:
        raise SystemExit(f"{option}={text}: choose from {', '.join(known)}")
    return chosen


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="moe-ext bench layer", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all samples and ratios to this file")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--peers", default=",".join(PEERS))
    chosen = parser.parse_args(list(arguments))
    torch.set_num_threads(1)
    keep_freed_memory()
    single_rank_group()
    names = _words(chosen.peers, list(PEERS), "--peers")
    names = list(dict.fromkeys(["ours", *names]))
    settings = environment()
    print("  ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    cases = []
    for shape in _words(chosen.shapes, list(SHAPES), "--shapes"):
        for load in _words(chosen.loads, list(LOADS), "--loads"):
            for dtype in _words(chosen.dtypes, list(DTYPES), "--dtypes"):
                case = bench_case(shape, load, dtype, names, chosen.tokens, chosen.repetitions)
                cases.append(case)
                print(layer_table([case], header=len(cases) == 1), flush=True)
                if chosen.json:  # after every case: a long run that is stopped keeps what it has
                    write_json(chosen.json, "layer", settings, cases)
    medians = {k: v["median"] for case in cases for k, v in case["ratios"].items()}
    print(f"\n{targets_table(medians)}")
    return 0

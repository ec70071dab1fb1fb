"""Aggregation at scale: inner products, plan and mixture, over two bare matrix products.

The rival is `torch.mm` of the same number of operations on matrices that lie ready in memory, half
of it before our turn and half after, so that what slows the machine slows both. On disk there is
no rival: a few slabs of a file of full size are aggregated in place, and the whole is extrapolated.

Shapes: C clients, P parameters of one client, W columns of the rival's matrices.
"""

import argparse
import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fellray.jobs.display import console
from fellray.jobs.timings import Taken, load_average, ratios
from fellray.platform.aggregation import Method, Plan, describe, reduce_
from fellray.platform.fellrec import Fellrec
from fellray.platform.methods import FedAvg
from fellray.platform.slabs import SLAB, Stack
from fellray.platform.stack_file import StackFile

METHODS: dict[str, Method] = {
    "affine": Fellrec(),
    "softmax": Fellrec(attention="softmax"),
    "top_k": Fellrec(attention="top_k"),
    "fedavg": FedAvg(),
}
READY = 65_536
"""W: wide enough that the rival's products are at full speed."""
GOAL = 1.15
MEMORY_GOAL = 0.05


def aggregate(method: Method, theta: Stack, start: Stack) -> tuple[Plan, dict[str, float]]:
    """A whole aggregation in place: its plan, and the seconds of its parts."""
    num_clients = theta.shape[0]
    names = [f"c{i:06d}" for i in range(num_clients)]
    marks = [time.perf_counter()]
    losses = torch.linspace(1.9, 2.1, num_clients).tolist()
    meta = describe(1, names, losses, [1] * num_clients, theta, start, method.compares())
    marks.append(time.perf_counter())
    plan = method.plan(meta)
    del meta  # as much memory as the plan, and nobody looks at it again
    marks.append(time.perf_counter())
    reduce_(plan, theta)
    marks.append(time.perf_counter())
    parts = ("describe", "plan", "reduce")
    return plan, {n: b - a for n, a, b in zip(parts, marks, marks[1:], strict=False)}


def measure_in_memory(
    method: Method, num_clients: int, num_parameters: int, turns: int, own_starts: bool
) -> dict[str, Any]:
    """The ratio to two bare products, and how much memory was taken beside the stack."""
    before = load_average()
    draw = torch.Generator().manual_seed(0)
    row_P = torch.randn(1, num_parameters, generator=draw)
    start_CP = row_P.expand(num_clients, num_parameters)
    theta_CP = torch.empty(num_clients, num_parameters)
    for client in theta_CP:
        torch.randn(num_parameters, generator=draw, out=client)
        client.mul_(0.1).add_(row_P[0])
    if own_starts:
        start_CP = start_CP.clone()
    width = min(READY, -(-num_parameters // 2))
    turns_of_half = max(1, round(num_parameters / 2 / width))
    ready_CW = torch.randn(num_clients, width, generator=draw)
    out_CW, out_CC = torch.empty_like(ready_CW), torch.empty(num_clients, num_clients)
    weights_CC = torch.rand(num_clients, num_clients, generator=draw)

    def half() -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(turns_of_half):
            torch.mm(ready_CW, ready_CW.T, out=out_CC)
            torch.mm(weights_CC, ready_CW, out=out_CW)
        share = num_parameters / 2 / (width * turns_of_half)
        return share * (time.perf_counter() - wall), share * (time.process_time() - cpu)

    few = slice(0, min(2 * SLAB, num_parameters))
    aggregate(method, theta_CP[:, few].clone(), start_CP[:, few])  # what a first call sets up
    half()
    ours, bare, parts, peaks = Taken([], []), Taken([], []), [], []
    for _ in range(turns):
        first = half()
        cpu, wall = time.process_time(), time.perf_counter()
        extra, (_, seconds) = _watched(lambda: aggregate(method, theta_CP, start_CP))
        ours.wall.append(time.perf_counter() - wall)
        ours.cpu.append(time.process_time() - cpu)
        second = half()
        bare.wall.append(first[0] + second[0])
        bare.cpu.append(first[1] + second[1])
        parts.append(seconds)
        peaks.append(extra)
    stack = theta_CP.numel() * theta_CP.element_size()
    return {
        "ours": asdict(ours),
        "bare": asdict(bare),
        "parts": parts,
        "ratio": ratios(ours.wall, bare.wall).median,
        "cpu_ratio": ratios(ours.cpu, bare.cpu).median,
        "extra_mib": max(peaks) / 2**20,
        "extra_memory": max(peaks) / stack,
        "load": (before, load_average()),
    }


def measure_on_disk(
    method: Method, num_clients: int, num_parameters: int, slabs: int, folder: Path
) -> dict[str, Any]:
    """Seconds of a few slabs from the middle of files of full size, and of all slabs by them."""
    before = load_average()
    theta = StackFile.create(folder / "theta.safetensors", num_clients, num_parameters)
    start = StackFile.create(folder / "start.safetensors", num_clients, num_parameters)
    begin = num_parameters // 2 // SLAB * SLAB
    few = slice(begin, begin + slabs * SLAB)
    assert few.stop <= num_parameters, "so many slabs there are not"
    narrow = theta.narrow(few), start.narrow(few)
    draw = torch.Generator().manual_seed(0)
    for row in range(num_clients):
        one, whole = slice(row, row + 1), slice(0, slabs * SLAB)
        values: Tensor = torch.randn(1, slabs * SLAB, generator=draw)
        narrow[1].write(one, whole, values)
        narrow[0].write(one, whole, values + 0.1 * torch.randn(values.shape, generator=draw))
    for stack in (theta, start):
        _make_cold(stack.path)
    del values
    cpu = time.process_time()
    _, (plan, parts) = _watched(lambda: aggregate(method, *narrow))
    cpu = time.process_time() - cpu
    all_slabs = -(-num_parameters // SLAB)
    each = (parts["describe"] + parts["reduce"]) / slabs
    return {
        "parts": parts,
        "own_weight": plan.own_weight_C.median().item(),
        "slab_seconds": each,
        "whole_hours": (each * all_slabs + parts["plan"]) / 3600,
        "cpu_hours": (cpu - parts["plan"]) / slabs * all_slabs / 3600,
        "peak_gib": _held("VmHWM") / 2**30,
        "load": (before, load_average()),
    }


def _watched(work: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes this process held beyond what it had before, and what the work returned."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier turns freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _held("VmRSS")
    returned = work()
    return _held("VmHWM") - before, returned


def _held(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise AssertionError(field)


def _make_cold(path: Path) -> None:
    """Write the file out and drop it from the page cache."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def main() -> None:
    """`python -m fellray.jobs.scale_aggregation memory 1000 1048576 --threads 2`, or `disk 10000
    4194304 --folder /a/disk`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("where", choices=("memory", "disk"))
    parser.add_argument("clients", type=int)
    parser.add_argument("parameters", type=int)
    parser.add_argument("--method", choices=METHODS, default="affine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--slabs", type=int, default=3)
    parser.add_argument(
        "--own-starts", action="store_true", help="a start per client: twice the memory"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    method = METHODS[told.method]
    console.print(
        f"{told.method}, {told.clients:,} clients x {told.parameters:,}, {told.threads} thread(s)"
    )
    if told.where == "memory":
        found = measure_in_memory(
            method, told.clients, told.parameters, told.turns, told.own_starts
        )
        met = found["ratio"] <= GOAL and found["extra_memory"] <= MEMORY_GOAL
        console.print(found)
        console.print(
            f"whole / two bare products {found['ratio']:.2f} (goal {GOAL}; by CPU time "
            f"{found['cpu_ratio']:.2f}), extra memory "
            f"{100 * found['extra_memory']:.1f} % of the stack (goal {100 * MEMORY_GOAL:.0f} %): "
            f"{'met' if met else 'missed'}"
        )
        return
    with tempfile.TemporaryDirectory(dir=told.folder) as folder:
        found = measure_on_disk(method, told.clients, told.parameters, told.slabs, Path(folder))
    console.print(found)
    console.print(
        f"{found['slab_seconds']:.1f} s a slab, the whole {found['whole_hours']:.2f} h "
        f"({found['cpu_hours']:.2f} h of CPU), {found['peak_gib']:.2f} GiB at most"
    )


if __name__ == "__main__":
    main()

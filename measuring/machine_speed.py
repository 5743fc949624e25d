"""What this machine can do and what a process holds, measured on the spot: the bounds that measured steps are compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

BUFFER_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # several times the largest caches of either
RUNS = 10
PEAK_RESET = "/proc/self/clear_refs"


def memory_bandwidth(device: torch.device | str) -> float:
    """Bytes per second between memory and processor: the best of RUNS passes over a buffer that fits in no cache.

    On the CPU a buffer is read (summed) by torch's current number of threads; on CUDA it is copied, and its bytes
    count twice, as read and as written. Not yet measured on a GPU.
    """
    device = torch.device(device)
    # Written in full: pages that never were are all one page of zeros, and read at the speed of the cache.
    buffer = torch.ones(BUFFER_BYTES[device.type] // 4, device=device)
    if device.type == "cpu":
        return buffer.nbytes / min(_host_seconds(buffer.sum) for _ in range(RUNS))
    copy = torch.empty_like(buffer)
    return 2 * buffer.nbytes / min(_device_seconds(lambda: copy.copy_(buffer)) for _ in range(RUNS))


def _host_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _device_seconds(work: Callable[[], object]) -> float:
    """By the device's own clock: what starting the work takes on the host is no part of it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def counts_memory(device: torch.device | str) -> bool:
    """Whether the functions below can tell: on CUDA, and on the CPU where Linux lets a process see and reset its peak."""
    return torch.device(device).type == "cuda" or os.access(PEAK_RESET, os.W_OK)


def held_memory(device: torch.device | str) -> int:
    """Bytes that this process holds: of the GPU's memory, by torch's tensors; on the CPU resident, libraries and all (see counts_memory)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def peak_memory(device: torch.device | str) -> int:
    """The most that `held_memory` was since `restart_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def restart_peak(device: torch.device | str) -> None:
    """Let `peak_memory` begin anew."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path(PEAK_RESET).write_text("5")


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])

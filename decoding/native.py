"""The C++ blocks for the CPU (llama_blocks.cpp): compiled at first use, where there is a compiler, and called with tensors.

Python and torch's calls take more time than the arithmetic of a small model's step, and torch's products for a few rows read the weights
at a third of the memory's speed. Without a compiler torch does it all the same; a line says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("llama_blocks.cpp")
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp", "-fPIC", "-shared", "-std=c++17")
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
UP_TO = {torch.float32: 32, torch.bfloat16: 12}  # rows for which the C++ blocks are faster than torch's


class BlockPointers(ctypes.Structure):
    """struct Block of the source."""

    _fields_ = [(name, ctypes.c_void_p) for name in (
        "qkv", "qkv_bias", "out", "out_bias", "gate_up", "gate_up_bias", "down", "down_bias", "attention_norm", "mlp_norm", "keys", "values")]


class Shape(ctypes.Structure):
    """struct Shape of the source."""

    _fields_ = [*[(name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "capacity")], ("eps", ctypes.c_float)]


class Rows(ctypes.Structure):
    """struct Rows of the source."""

    _fields_ = [("count", ctypes.c_int64), ("start", ctypes.c_int64), *[(name, ctypes.c_void_p) for name in ("cos", "sin", "visible")]]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled SOURCE, or None where it cannot be had: said once, on stderr."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or compiler is None:
        print("no C++ compiler (g++): decoding on the CPU goes through torch, which is slower", file=sys.stderr)
        return None
    path = _cache_folder() / f"llama_blocks-{_fingerprint(compiler)}.so"
    if not path.exists() and not _compile(compiler, path):
        return None
    return ctypes.CDLL(str(path))


@cache
def function(name: str, dtype: torch.dtype) -> ctypes._CFuncPtr:
    """`name` of the library, for tensors of `dtype`."""
    found = getattr(library(), f"{name}_{SUFFIXES[dtype]}")
    pointer, number, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.argtypes = {
        "run_blocks": [pointer, number, pointer, pointer, pointer, count],
        "run_head": [*[pointer] * 5, *[number] * 3, ctypes.c_float, count],
    }[name]
    found.restype = None
    return found


def serves(dtype: torch.dtype, device: torch.device, *sizes: int) -> bool:
    """Whether the C++ blocks run tensors of `dtype` on `device`, with these numbers of outputs."""
    return device.type == "cpu" and dtype in SUFFIXES and all(size % 16 == 0 for size in sizes) and library() is not None


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's data begins."""
    return None if tensor is None else tensor.data_ptr()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "early-exit-decoding"


def _fingerprint(compiler: str) -> str:
    """Identifies the source, the flags, the compiler and, as -march=native depends on it, the CPU."""
    features = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.lower().startswith(("flags", "features"))), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return hashlib.sha256("\0".join([SOURCE.read_text(), *FLAGS, version, features]).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> bool:
    """Build the library, complete or not at all; a failure is said on stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        run = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, text=True)
        if run.returncode != 0:
            print(f"{SOURCE.name} does not compile here; decoding on the CPU goes through torch, which is slower:\n{run.stderr.strip()[:500]}", file=sys.stderr)
            return False
        built.replace(path)
    return True

"""The C++ of decoding on the CPU (llama_blocks.cpp, sampling.cpp): compiled at first use, where there is a compiler.

The calls of Python and torch take more time than the arithmetic of a small model's step, and torch's products for a few rows read
the weights at a third of the memory's speed. Without a compiler torch does it all the same; a line says so.
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
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("llama_blocks.cpp", "sampling.cpp"))
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp", "-fPIC", "-shared", "-std=c++17")
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
UP_TO = {torch.float32: 96, torch.bfloat16: 12}  # rows for which the C++ blocks are faster than torch's


class BlockPointers(ctypes.Structure):
    """struct Block of the source."""

    _fields_ = [(name, ctypes.c_void_p) for name in (
        "qkv", "qkv_bias", "out", "out_bias", "gate_up", "gate_up_bias", "down", "down_bias", "attention_norm", "mlp_norm", "keys", "values")]


class Shape(ctypes.Structure):
    """struct Shape of the source."""

    _fields_ = [*[(name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "capacity", "text_stride")], ("eps", ctypes.c_float)]


class Rows(ctypes.Structure):
    """struct Rows of the source."""

    _fields_ = [("count", ctypes.c_int64), ("slots", ctypes.c_void_p), ("texts", ctypes.c_void_p), ("start", ctypes.c_int64),
                *[(name, ctypes.c_void_p) for name in ("cos", "sin", "visible")]]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled SOURCES, or None where it cannot be had: said once, on stderr."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or compiler is None:
        print("no C++ compiler (g++): decoding on the CPU goes through torch, which is slower", file=sys.stderr)
        return None
    path = _cache_folder() / f"decoding-{_fingerprint(compiler)}.so"
    if not path.exists() and not _compile(compiler, path):
        return None
    return ctypes.CDLL(str(path))


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = {
    "run_blocks": [_POINTER, _NUMBER, _POINTER, _POINTER, _POINTER, ctypes.c_int],
    "run_head": [*[_POINTER] * 5, *[_NUMBER] * 3, ctypes.c_float, ctypes.c_int],
    "policy_probs": [_POINTER, _POINTER, _NUMBER, _NUMBER, ctypes.c_float, _NUMBER, ctypes.c_float],
    "draw": [*[_POINTER] * 4, *[_NUMBER] * 3, _POINTER, _POINTER],
    "verify_rejection": [*[_POINTER] * 6, *[_NUMBER] * 4, _POINTER, _POINTER],
}


@cache
def function(name: str, dtype: torch.dtype | None = None) -> Callable[..., None]:
    """`name` of the library, for tensors of `dtype` where there is one for each."""
    found = getattr(library(), name if dtype is None else f"{name}_{SUFFIXES[dtype]}")
    found.argtypes, found.restype = ARGUMENTS[name], None
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
    return hashlib.sha256("\0".join([*(source.read_text() for source in SOURCES), *FLAGS, version, features]).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> bool:
    """Build the library, complete or not at all; a failure is said on stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        run = subprocess.run([compiler, *FLAGS, *map(str, SOURCES), "-o", str(built)], capture_output=True, text=True)
        if run.returncode != 0:
            print(f"the C++ of decoding/ does not compile here; decoding on the CPU goes through torch, which is slower:\n{run.stderr.strip()[:500]}", file=sys.stderr)
            return False
        built.replace(path)
    return True

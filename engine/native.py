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
WIDE = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
COMPILE = ("-O3", "-march=native", *WIDE, "-ffast-math", "-fno-associative-math", "-fopenmp", "-fPIC", "-std=c++17")
LINK = ("-shared", "-fopenmp")  # without -ffast-math, which would make the whole process round its smallest numbers to 0
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
OUTPUTS = 16  # every product makes a multiple of so many
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

    _fields_ = [*[(name, ctypes.c_int64) for name in ("count", "start", "one_text")],
                *[(name, ctypes.c_void_p) for name in ("slots", "texts", "positions", "cosines", "sines")], ("tables", ctypes.c_int64),
                ("visible", ctypes.c_void_p), ("window", ctypes.c_int64)]


class Pass(ctypes.Structure):
    """struct Pass of the source."""

    _fields_ = [("blocks", ctypes.c_void_p), ("number", ctypes.c_int64), ("x", ctypes.c_void_p), ("kept", ctypes.c_void_p), ("kept_at", ctypes.c_int64)]


class Head(ctypes.Structure):
    """struct Head of the source."""

    _fields_ = [*[(name, ctypes.c_void_p) for name in ("norm", "inner", "inner_bias", "w", "bias")],
                *[(name, ctypes.c_int64) for name in ("hidden", "k", "n")], ("eps", ctypes.c_float)]


class Noise(ctypes.Structure):
    """struct Noise of the source."""

    _fields_ = [("keys", ctypes.c_void_p), ("starts", ctypes.c_void_p), ("rows_per_key", ctypes.c_int64)]


class Places(ctypes.Structure):
    """struct Places of the source."""

    _fields_ = [("spacing", ctypes.c_int64), ("offset", ctypes.c_int64)]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled SOURCES, or None where they cannot be had: said once, on stderr."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or compiler is None:
        return _without("no C++ compiler (g++)")
    try:
        path = _cache_folder() / f"decoding-{_fingerprint(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return _without(f"the C++ of decoding/ does not compile here: {(error.stderr or str(error)).strip()[:300]}")
    except OSError as error:
        return _without(f"the C++ of decoding/ cannot be kept or loaded: {error}")


def _without(reason: str) -> None:
    print(f"{' '.join(reason.split())}; decoding on the CPU goes through torch, which is slower", file=sys.stderr)


_POINTER, _NUMBER, _NOISE, _PLACES = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Noise), ctypes.POINTER(Places)
ARGUMENTS = {
    "run_blocks": [ctypes.POINTER(Pass), ctypes.POINTER(Shape), ctypes.POINTER(Rows), ctypes.c_int],
    "run_head": [ctypes.POINTER(Head), *[_POINTER] * 2, _NUMBER, ctypes.c_int],
    "policy_probs": [_POINTER, _POINTER, _NUMBER, _NUMBER, ctypes.c_float, _NUMBER, ctypes.c_float, ctypes.c_int],
    "draw": [_POINTER, _NOISE, _PLACES, *[_POINTER] * 2, *[_NUMBER] * 2, *[_POINTER] * 2],
    "verify_coupled": [*[_POINTER] * 2, _NOISE, _PLACES, _POINTER, *[_NUMBER] * 3, *[_POINTER] * 2],
    "verify_match": [*[_POINTER] * 4, *[_NUMBER] * 2, ctypes.c_float, _NUMBER, ctypes.c_float, _NOISE, _PLACES, *[_POINTER] * 3],
    "gumbel_children": [_POINTER, *[_NUMBER] * 2, *[ctypes.c_float] * 2, _NOISE, _PLACES, *[_POINTER] * 2, _NUMBER, *[_POINTER] * 2],
    "verify_rejection": [*[_POINTER] * 4, _NOISE, _PLACES, _PLACES, _POINTER, *[_NUMBER] * 4, *[_POINTER] * 2],
}


@cache
def function(name: str, dtype: torch.dtype | None = None) -> Callable[..., None]:
    """`name` of the library, for tensors of `dtype` where there is one for each."""
    found = getattr(library(), name if dtype is None else f"{name}_{SUFFIXES[dtype]}")
    found.argtypes, found.restype = ARGUMENTS[name], None
    return found


def serves(dtype: torch.dtype, device: torch.device, *sizes: int) -> bool:
    """Whether the C++ blocks run tensors of `dtype` on `device`, with these numbers of outputs."""
    return device.type == "cpu" and dtype in SUFFIXES and all(size % OUTPUTS == 0 for size in sizes) and library() is not None


def samples(*tensors: torch.Tensor) -> bool:
    """Whether the C++ samples from these tensors: fp32 on the CPU."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors) and library() is not None


def dense(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as C++ reads them: row after row, without gaps."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's data begins."""
    return None if tensor is None else tensor.data_ptr()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "early-exit-decoding"


def _fingerprint(compiler: str) -> str:
    """Identifies the source, the flags, the compiler and, as -march=native depends on it, the CPU."""
    features = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.lower().startswith(("flags", "features"))), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = (source.read_text() for source in SOURCES)
    return hashlib.sha256("\0".join([*sources, *COMPILE, *LINK, version, features]).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Build the library, complete or not at all. Raises CalledProcessError, or OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{folder}/{source.stem}.o" for source in SOURCES]
        for source, made in zip(SOURCES, objects, strict=True):
            subprocess.run([compiler, *COMPILE, "-c", str(source), "-o", made], capture_output=True, text=True, check=True)
        built = Path(folder) / path.name
        subprocess.run([compiler, *LINK, *objects, "-lm", "-o", str(built)], capture_output=True, text=True, check=True)
        built.replace(path)

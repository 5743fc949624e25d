"""Fixed sequences of device work: on CUDA captured once in a graph and replayed with one launch, elsewhere plain calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

WARM_UPS = 2  # runs before a capture: they allocate what is kept, and let libraries choose their kernels


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


class Programs:
    """Calls functions of tensors. Two calls with equal `key` and input shapes must do the same work in the same memory.

    That is so where a function depends on its inputs, the key, and buffers that live as long as this object. Not yet
    measured on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._captures = device, device.type == "cuda"
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: tuple[int, int] | None = None

    def another(self) -> Programs:
        """An empty set of programs for the same device."""
        return Programs(self._device)

    def __call__(self, key: Hashable, function: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """function(*inputs), of which a replay returns copies."""
        if not self._captures:
            return function(*inputs)
        key = (key, *((tuple(tensor.shape), tensor.dtype) for tensor in inputs))
        if key not in self._captured:
            self._captured[key] = self._capture(function, inputs)
        captured = self._captured[key]
        for held, new in zip(captured.inputs, inputs, strict=True):
            held.copy_(new, non_blocking=True)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)

    def _capture(self, function: Callable[..., tuple[torch.Tensor, ...]], inputs: tuple[torch.Tensor, ...]) -> _Captured:
        held = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function(*held)
        self._pool = graph.pool()
        return _Captured(graph, held, outputs)

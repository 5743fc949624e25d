"""Linear maps of a frozen model, multiplied by whoever multiplies fastest: on the CPU, in fp32, that is oneDNN."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("exits::onednn_linear", mutates_args=())  # an operator of its own, as torch.compile refuses oneDNN's with weights that are not constants
def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (…, K) · weight (N, K)ᵀ + bias (N,), in fp32 on the CPU; has no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@onednn_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


class _OneDnn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (onednn_linear if function is linear else function)(*args, **(kwargs or {}))


def fast_linears(like: torch.Tensor) -> AbstractContextManager:
    """Within it, linear maps of tensors in `like`'s dtype and on its device are multiplied the fastest way, without gradients."""
    if like.device.type == "cpu" and like.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return _OneDnn()
    return nullcontext()

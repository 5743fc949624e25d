"""x·Wᵀ for a few rows of x: the same product, asked for in the way that reads W fastest.

Decoding multiplies one to a few rows with every weight matrix, so it is bound by reading W. On the CPU the usual call,
mm(x, Wᵀ), reads W at a fraction of the memory's speed: in fp32 W·xᵀ, or one row as a batch of two, is faster, and in
bf16 a row given twice is faster than once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

COLUMNS_UP_TO = 16  # rows for which W·xᵀ is faster than x·Wᵀ


@dataclass(frozen=True)
class Form:
    """One way to ask for x (T, K) · Wᵀ, W (N, K): `multiply(weight view, x view, out=buffer)`, and where T rows lie in the buffer."""

    multiply: Callable[..., torch.Tensor]
    weight: Callable[[torch.Tensor], torch.Tensor]
    input: Callable[[torch.Tensor], torch.Tensor]
    buffer: Callable[[int, int], tuple[int, ...]]
    result: Callable[[torch.Tensor], torch.Tensor]


def _rows_first(w: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w, out=out)


def _halves(weight: torch.Tensor) -> torch.Tensor:
    return weight.unflatten(0, (2, -1))


ROWS = Form(_rows_first, torch.t, lambda x: x, lambda t, n: (t, n), lambda out: out)
DOUBLED = Form(_rows_first, torch.t, lambda x: x.expand(2, -1), lambda t, n: (2, n), lambda out: out[:1])
COLUMNS = Form(torch.mm, lambda w: w, torch.t, lambda t, n: (n, t), torch.t)
HALVES = Form(torch.bmm, _halves, lambda x: x.t().expand(2, -1, -1), lambda t, n: (2, n // 2, 1), lambda out: out.view(1, -1))


def fastest_form(rows: int, columns: int, like: torch.Tensor) -> Form:
    """The form for `rows` rows of x and `columns` rows of W, in `like`'s dtype and on its device."""
    if like.device.type != "cpu":
        return ROWS
    if like.dtype in (torch.bfloat16, torch.float16):
        return DOUBLED if rows == 1 else ROWS
    if rows == 1 and columns % 2 == 0:
        return HALVES
    return COLUMNS if rows <= COLUMNS_UP_TO else ROWS


class Projection:
    """A linear map: weight (N, K) and bias (N,) or None. Holds views, no copies."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._views: dict[Form, torch.Tensor] = {}

    def view(self, form: Form) -> torch.Tensor:
        """The weight as `form` multiplies it."""
        if form not in self._views:
            self._views[form] = form.weight(self.weight)
        return self._views[form]


class Product:
    """The place of one product: reads `x` (T, K), which stays where it is, and writes `result` (T, N) anew in each call."""

    def __init__(self, x: torch.Tensor, columns: int) -> None:
        self.form = fastest_form(len(x), columns, x)
        self._x = self.form.input(x)
        self._out = x.new_empty(self.form.buffer(len(x), columns))
        self.result = self.form.result(self._out)

    def __call__(self, projection: Projection) -> torch.Tensor:
        self.form.multiply(projection.view(self.form), self._x, out=self._out)
        if projection.bias is not None:
            self.result.add_(projection.bias)
        return self.result

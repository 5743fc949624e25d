"""What a model's logits become before a token is drawn, and the noise that draws it.

Notation of Leviathan et al. 2023 (2211.17192): p is the target's distribution, q the draft's. Chen et al. 2023 swap
them. The same `policy_probs` serves baseline, draft and target, so every accept rule sees the distributions that
tokens are really drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


@dataclass(frozen=True)
class SamplingPolicy:
    """How tokens are drawn: temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep everything."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} must be >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be >= 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must lie in (0, 1]")


def policy_probs(logits: torch.Tensor, policy: SamplingPolicy) -> torch.Tensor:
    """Distributions (..., V) that `policy` draws from, given logits (..., V); fp32, or fp64 for fp64 logits.

    Temperature, then top-k, then top-p (the token that crosses p is kept), then softmax, as transformers' processors.
    At temperature 0 each row is one-hot at the lowest-index argmax, so exact accept rules need no greedy case.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if policy.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / policy.temperature
    if 0 < policy.top_k < logits.shape[-1]:
        kth = logits.topk(policy.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if policy.top_p < 1:
        logits = _keep_nucleus(logits, policy.top_p)
    return logits.softmax(-1)


def _keep_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """`logits` (..., V) with -inf outside the smallest head whose mass reaches `top_p` (at least one token)."""
    ascending, order = logits.sort(dim=-1, stable=True)  # ties alike in every pass, whatever its number of rows
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    outside[..., -1] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


class Purpose(IntEnum):
    """What a noise value decides. Coupled verification shares TOKEN; rejection keeps its three draws apart."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


_PURPOSES = 16  # room for more, so that a new one changes no text of today's seeds
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_U64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the bits of the unsigned 64-bit `value`."""
    value &= _U64
    return value - (1 << 64) if value >> 63 else value


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64 `bits`, elementwise (Steele et al. 2014): flips half the bits per changed bit."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits = (bits ^ _shift_right(bits, shift)) * _signed(multiplier)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """Logical right shift of int64 `bits`."""
    return (bits >> shift) & ((1 << (64 - shift)) - 1)


class Noise:
    """Random numbers as a function of (seed, prompt, position, purpose, token): no state, so no order of drawing.

    `position` is the absolute index of the token that is decided. Any pass, batch or draft that asks for the noise
    of a position gets the same values.
    """

    def __init__(self, seed: int, prompt_id: int = 0, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        key = torch.tensor([_signed(seed * _GOLDEN + 1)])
        self._key = _mix(_mix(key) ^ _signed(prompt_id * _GOLDEN + 2)).to(self.device)

    def uniform(self, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
        """Uniforms (N,) in (0, 1), fp64, for int64 `positions` (N,)."""
        return self._uniform(self._row_keys(positions, purpose))

    def exponential(self, positions: torch.Tensor, vocab_size: int, purpose: Purpose) -> torch.Tensor:
        """Independent standard exponential values (N, V), fp64, for int64 `positions` (N,); −log of one is a Gumbel value."""
        tokens = torch.arange(1, vocab_size + 1, device=self.device) * _signed(_GOLDEN)
        keys = self._row_keys(positions, purpose)[:, None] ^ tokens
        return self._uniform(keys).log_().neg_()

    def _row_keys(self, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
        counters = (positions.to(self.device) * _PURPOSES + int(purpose) + 1) * _signed(_GOLDEN)
        return _mix(self._key ^ counters)

    def _uniform(self, keys: torch.Tensor) -> torch.Tensor:
        return (_shift_right(_mix(keys), 12).double() + 0.5) * 2.0**-52


def draw(probs: torch.Tensor, noise: Noise, positions: torch.Tensor, purpose: Purpose = Purpose.TOKEN) -> torch.Tensor:
    """One token per row of `probs` (N, V), int64 (N,), by the Gumbel-max rule argmax(log p + g) of that position's noise.

    Computed as argmax p/e with e = exp(−g) exponential, which orders the tokens alike and needs no logarithm of p. A
    token of probability 0 has score 0 and is never drawn; ties go to the lowest index.
    """
    return (probs.double() / noise.exponential(positions, probs.shape[-1], purpose)).argmax(-1)

"""What a model's logits become before a token is drawn, and the noise that draws it.

Notation of Leviathan et al. 2023 (2211.17192): p is the target's distribution, q the draft's. Chen et al. 2023 swap
them. The same `policy_probs` serves baseline, draft and target, so every accept rule sees the distributions that
tokens are really drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from engine import native

LEAST = 1e-10  # temperatures and top-p below it are 0 in fp32 arithmetic, or overflow it


@dataclass(frozen=True)
class SamplingPolicy:
    """How tokens are drawn: temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep everything. Raises ValueError for values outside these ranges."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LEAST <= self.temperature < float("inf")):
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or a finite number of at least {LEAST:g}")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be >= 0 (0 keeps all tokens)")
        if not LEAST <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must lie between {LEAST:g} and 1; temperature 0 keeps the likeliest token alone")


def policy_probs(logits: torch.Tensor, policy: SamplingPolicy) -> torch.Tensor:
    """Distributions (..., V) that `policy` draws from, given logits (..., V); fp32, or fp64 for fp64 logits.

    Temperature, then top-k, then top-p (the token that crosses p is kept), then softmax, as transformers' processors.
    At temperature 0 each row is one-hot at the lowest-index argmax, so exact accept rules need no greedy case. A row of logits with
    a NaN or +inf, or of nothing but -inf, becomes a row of NaN (see `no_law`).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if native.samples(logits):
        probs, logits = torch.empty_like(logits, memory_format=torch.contiguous_format), logits.contiguous()
        vocab_size = logits.shape[-1]
        native.function("policy_probs")(
            logits.data_ptr(), probs.data_ptr(), logits.numel() // vocab_size, vocab_size, policy.temperature, policy.top_k, policy.top_p,
            torch.get_num_threads())
        return probs
    if policy.temperature == 0:
        greedy = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return greedy.masked_fill(~logits.amax(-1, keepdim=True).isfinite(), torch.nan)
    logits = logits / policy.temperature
    if 0 < policy.top_k < logits.shape[-1]:
        kth = logits.topk(policy.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    return _nucleus(probs, policy.top_p) if policy.top_p < 1 else probs


def no_law(probs: torch.Tensor) -> torch.Tensor:
    """Which rows (...) of what `policy_probs` made (..., V) come from logits that are not finite, bool."""
    return probs[..., 0].isnan()


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """`probs` (..., V) renormalised over the smallest head whose mass reaches `top_p` (at least one token), ties by id."""
    mass, tokens = probs.sort(dim=-1, descending=True, stable=True)
    kept = mass.masked_fill(mass.cumsum(-1) - mass >= top_p, 0.0)
    return torch.zeros_like(probs).scatter_(-1, tokens, kept / kept.sum(-1, keepdim=True))


class Purpose(IntEnum):
    """What a noise value decides. Coupled verification shares TOKEN; rejection keeps its three draws apart."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def _signed(value: int) -> int:
    """The int64 with the bits of the unsigned 64-bit `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_PURPOSES = 16  # room for more, so that a new one changes no text of today's seeds
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
_UNIT = 2.0**-52


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64 `bits`, elementwise (Steele et al. 2014): flips half the bits per changed bit."""
    for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1])):
        bits = (bits ^ _shift_right(bits, shift)) * multiplier
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """Logical right shift of int64 `bits`."""
    return (bits >> shift) & ((1 << (64 - shift)) - 1)


def noise_places(purpose: Purpose) -> tuple[int, int]:
    """(spacing, offset): the noise of `purpose` at a position has the place position · spacing + offset, its own."""
    return _PURPOSES, int(purpose) + 1


def _row_keys(key: torch.Tensor, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
    """What the noise of each of `positions` depends on, its tokens apart."""
    spacing, offset = noise_places(purpose)
    return _mix(key ^ (positions * spacing + offset) * _GOLDEN)


def _token_bits(row_keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """52 random bits for each of `tokens` in its row."""
    return _shift_right(_mix(row_keys ^ (tokens + 1) * _GOLDEN), 12)


class Noise:
    """Random numbers as a function of (seed, prompt, position, purpose, token): no state, so no order of drawing.

    `position` is the absolute index of the token that is decided. Any pass, batch or draft that asks for the noise
    of a position gets the same values. `key` (1,) belongs to one prompt, (B, 1) to a batch of them; `starts` see `of_round`.
    """

    def __init__(self, key: torch.Tensor, starts: torch.Tensor | None = None) -> None:
        self.key, self._starts = key, starts

    @classmethod
    def of(cls, seed: int, prompt_id: int | list[int] = 0, device: torch.device | str = "cpu") -> Noise:
        """The noise of one prompt, for positions (N,), or of a batch of prompts, for positions (B, N)."""
        ids = [[i] for i in prompt_id] if isinstance(prompt_id, list) else [prompt_id]
        prompts = (torch.tensor(ids) * _GOLDEN + 2)
        return cls(_mix(_mix(torch.tensor(_signed(seed * _GOLDEN + 1))) ^ prompts).to(device))

    def of_round(self, starts: torch.Tensor) -> Noise:
        """Other noise for each round, told apart by where it starts, int64 (B,).

        A position that was drafted behind a rejection is drafted again in the next round. Drawn with the same noise, that second draft
        would depend on what the first made of the round: how long it became, and what an adaptive rule learnt from it.
        """
        return Noise(self.key, starts)

    def _text_keys(self) -> torch.Tensor:
        return self.key if self._starts is None else _mix(self.key ^ (self._starts[:, None] + 1) * _MULTIPLIERS[0])

    def for_cpp(self, rows: int) -> native.Noise:
        """The same where C++ reads it, for so many rows, those of a text together. Valid as long as this object is."""
        if self._starts is not None and self._starts.numel() != self.key.numel():
            self.key, self._starts = self._text_keys(), None
        return native.Noise(native.address(self.key), native.address(self._starts), rows // self.key.numel())

    def uniform(self, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
        """Uniforms in (0, 1), fp64, of the shape of int64 `positions`."""
        return (_shift_right(_mix(_row_keys(self._text_keys(), positions, purpose)), 12).double() + 0.5) * _UNIT

    def exponential(self, positions: torch.Tensor, tokens: torch.Tensor | int, purpose: Purpose) -> torch.Tensor:
        """Standard exponential values (..., V), fp64, of each of `tokens` at `positions` (...); −log of one is a Gumbel value.

        `tokens`: int64 ids (V,), or the number V of all ids.
        """
        if isinstance(tokens, int):
            tokens = torch.arange(tokens, device=self.key.device)
        bits = _token_bits(_row_keys(self._text_keys(), positions, purpose)[..., None], tokens)
        return ((bits.double() + 0.5) * _UNIT).log_().neg_()


def draw(
    probs: torch.Tensor, noise: Noise, positions: torch.Tensor, purpose: Purpose = Purpose.TOKEN, token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """One token per row of `probs` (..., V), int64 (...), by the Gumbel-max rule argmax(log p + g) of that position's noise.

    A token of probability 0 is never drawn; ties go to the lowest index. `token_ids` (V,) names the columns of `probs`
    where they are not all ids in order.
    """
    if native.samples(probs):
        return _draw_natively(probs, noise, positions, purpose, token_ids)[0]
    columns = _scores(probs, noise, positions, purpose, token_ids).argmax(-1)
    return columns if token_ids is None else token_ids[columns]


def draw_with_margin(
    probs: torch.Tensor, noise: Noise, positions: torch.Tensor, purpose: Purpose, token_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw`, and by how much the drawn token won: fp64 (...), the distance of the two largest log p + g."""
    if native.samples(probs):
        return _draw_natively(probs, noise, positions, purpose, token_ids)
    scores = _scores(probs, noise, positions, purpose, token_ids)
    best, columns = scores.max(-1)
    second = scores.scatter(-1, columns[..., None], 0.0).amax(-1)
    return columns if token_ids is None else token_ids[columns], best.log() - second.log()


def _scores(probs: torch.Tensor, noise: Noise, positions: torch.Tensor, purpose: Purpose, token_ids: torch.Tensor | None) -> torch.Tensor:
    """p/e (..., V) with e = exp(−g) exponential: orders tokens as log p + g does, needs no logarithm of p, and is 0 where p is."""
    return probs.double() / noise.exponential(positions, probs.shape[-1] if token_ids is None else token_ids, purpose)


def _draw_natively(
    probs: torch.Tensor, noise: Noise, positions: torch.Tensor, purpose: Purpose, token_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw_with_margin` in C++, which computes the noise of possible tokens only."""
    probs, positions, token_ids = native.dense(probs, positions, token_ids)
    rows = positions.numel()
    tokens, margins = torch.empty(positions.shape, dtype=torch.int64), torch.empty(positions.shape, dtype=torch.float64)
    native.function("draw")(
        native.address(probs), noise.for_cpp(rows), native.Places(*noise_places(purpose)), native.address(positions), native.address(token_ids),
        rows, probs.shape[-1], native.address(tokens), native.address(margins))
    return tokens, margins

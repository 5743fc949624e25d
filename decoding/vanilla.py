"""Vanilla decoding: one target call, one token. The baseline that every method is compared with."""

from __future__ import annotations

import torch

from decoding.sampling import Noise, draw, no_law, policy_probs
from decoding.state import NO_TARGET_LAW, DecodeState, Forward, RoundResult, check_finite


def vanilla_round(state: DecodeState, forward: Forward | None = None) -> list[RoundResult]:
    """Feed the last committed token of every text and draw the next with its position's TOKEN noise.

    `forward` is the target's, or a draft's that takes note of what passes.
    """
    forward = forward or state.target.forward

    def step(tokens: torch.Tensor, starts: torch.Tensor, noise: Noise) -> tuple[torch.Tensor]:
        p = policy_probs(forward(tokens, starts), state.policy)  # (B, 1, V)
        return (draw(p, noise, starts[:, None] + 1).masked_fill(no_law(p), NO_TARGET_LAW),)

    with state.clock("verify"):
        drawn, = state.program((state.draft or state.target).programs, ("vanilla", forward.__name__), step, state.last(), state.target.starts())
        tokens = drawn[:, 0].tolist()
    check_finite(min(tokens))
    state.target.advance(1)
    return [RoundResult([token]) for token in tokens]

"""Vanilla decoding: one target call, one token. The baseline that every method is compared with."""

from __future__ import annotations

import torch

from decoding.sampling import draw, policy_probs
from decoding.state import DecodeState, RoundResult


def vanilla_round(state: DecodeState) -> RoundResult:
    """Feed the last committed token and draw the next with its position's TOKEN noise."""
    with state.clock("verify"):
        logits = state.target.forward(torch.tensor(state.committed[-1:]))  # (1, V)
    with state.clock("sampling"):
        p = policy_probs(logits, state.policy)
        token = int(draw(p, state.noise, torch.tensor([len(state.committed)])))
    return RoundResult([token])

"""Speculative sampling with a chain of drafted tokens (Leviathan et al. 2211.17192; Chen et al. 2302.01318).

Lossless with both verifications, LOSSY with a judge (autojudge.py). Deviation from the papers: the last drafted token is fed to the draft only in the
next round, and only if it was kept. γ is not cut near the length limit, so that every round counts alike; surplus tokens
are cut after verification.
"""

from __future__ import annotations

import torch

from decoding.autojudge import AnyJudge
from decoding.draft_length import DraftLength
from decoding.drafting import ChainRound
from decoding.state import DecodeState, RoundResult
from decoding.verify import Verification
from engine.static_llama import KEPT_WIDTHS


def chain_round(state: DecodeState, length: DraftLength, verification: Verification, judge: AnyJudge | None = None) -> list[RoundResult]:
    """Draft, and verify in one target call. What both caches then hold too much is rolled back when tokens are committed."""
    target, draft = state.target, state.draft
    this_round = ChainRound(state, length, verification, judge)
    pending = max(len(text) - held for text, held in zip(state.committed, draft.lengths, strict=True))
    draft.crop([max(len(text) - pending, 0) for text in state.committed])
    if this_round.drafts and pending > 2:  # behind rounds that did not: in passes of their own, which no program has to be captured for
        with state.clock("draft"):
            for tokens in state.last(pending)[:, :-1].split(KEPT_WIDTHS, 1):
                draft.append(tokens)
        pending = 1

    def step(tokens: torch.Tensor, starts: torch.Tensor, index: int) -> torch.Tensor:
        return draft.forward(tokens, starts + (index + 1 - tokens.shape[1]))[:, -1:]

    this_round.draft(pending, step, lambda index: draft.advance(pending if index == 0 else 1))
    return this_round.verify(target.forward)

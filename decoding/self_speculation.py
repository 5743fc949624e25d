"""Early-exit self-speculation: the draft is the target's first blocks under an exit (LayerSkip 2404.16710; Kangaroo 2404.18911).

Draft and verification share embeddings, the first blocks' keys and values and their hidden states h_E: nothing is
computed twice. A drafted token costs the first E blocks and the exit; verification takes the first E blocks of the last
drafted token and the others of all γ+1. An exit with a block of its own keeps that block's keys and values itself.
Lossless with both verifications, LOSSY with a judge (autojudge.py). Deviation from the papers: the prompt goes through all blocks before the first round.
"""

from __future__ import annotations

import torch

from decoding.autojudge import AnyJudge
from decoding.draft_length import DraftLength
from decoding.drafting import ChainRound
from decoding.state import DecodeState, RoundResult
from decoding.verify import Verification


def self_speculation_round(state: DecodeState, length: DraftLength, verification: Verification, judge: AnyJudge | None = None) -> list[RoundResult]:
    """Draft with the exit, and verify in one target call. What the caches then hold too much is rolled back when tokens are committed."""
    target, draft = state.target, state.draft
    this_round = ChainRound(state, length, verification, judge)
    if this_round.drafts and draft.behind > 1:  # more than behind a round that kept all
        with state.clock("draft"):
            draft.catch_up()
    behind = draft.behind

    def step(tokens: torch.Tensor, starts: torch.Tensor, index: int) -> torch.Tensor:
        return draft.draft(tokens, starts, index, behind if index == 0 else 0)

    this_round.draft(1, step, lambda index: draft.advance(behind if index == 0 else 0, target.batch), key=behind)
    drafted = len(this_round.rows)
    if drafted:
        draft.lengths = [fed + drafted for fed in target.lengths]
    draft.block_tokens += target.batch * (draft.prefix + (len(target.stack.blocks) - draft.prefix) * (drafted + 1))
    return this_round.verify(draft.verify)

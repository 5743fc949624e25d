"""Speculative sampling with a chain of drafted tokens (Leviathan et al. 2211.17192; Chen et al. 2302.01318).

Lossless with both verifications. Deviation from the papers: the last drafted token is fed to the draft only in the
next round, and only if it was kept. γ is not cut near the length limit, so that every round counts alike; surplus tokens
are cut after verification.
"""

from __future__ import annotations

import torch

from decoding.sampling import Purpose, draw, policy_probs
from decoding.state import DecodeState, RoundResult
from decoding.verify import Verification, expected_acceptance, overlap, verify_chain


def chain_round(state: DecodeState, gamma: int, verification: Verification) -> RoundResult:
    """Draft `gamma` tokens, verify them in one target call, and roll both caches back to what is kept."""
    start = len(state.committed)
    drafted, q = draft_chain(state, gamma, verification)
    with state.clock("verify"):
        logits = state.target.forward(torch.cat([torch.tensor(state.committed[-1:]), drafted.cpu()]))  # (γ+1, V)
    with state.clock("sampling"):
        p = policy_probs(logits, state.policy)
        positions = torch.arange(start, start + len(p), device=p.device)
        outcome = verify_chain(verification, p, q, drafted, state.noise, positions)
        accepted, next_token = torch.stack(outcome).tolist()
    for model in (state.target, state.draft):
        model.crop(start + accepted)
    result = RoundResult([*drafted[:accepted].tolist(), next_token], proposed=len(drafted), accepted=accepted)
    if state.record_overlap:
        with state.clock("record"):
            tested_p, tested_q = p[: result.tested], q[: result.tested]
            result.overlaps = overlap(tested_p, tested_q).tolist()
            result.expected = expected_acceptance(tested_p, tested_q, verification).tolist()
    return result


def draft_chain(state: DecodeState, gamma: int, verification: Verification) -> tuple[torch.Tensor, torch.Tensor]:
    """`gamma` tokens (γ,) drawn one after another from the draft, and the distributions q (γ, V) they came from.

    Fewer where an end-of-text token is drafted: nothing is drafted behind it. Coupled drafting uses the very noise
    that the target will use.
    """
    purpose = Purpose.TOKEN if verification == "coupled" else Purpose.DRAFT
    start = len(state.committed)
    tokens: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    pending = torch.tensor(state.committed[state.draft.length :])
    while len(tokens) < gamma and not (tokens and int(tokens[-1]) in state.eos_ids):
        with state.clock("draft"):
            logits = state.draft.forward(pending)[-1:]
        with state.clock("sampling"):
            q = policy_probs(logits.to(state.noise.device), state.policy)
            pending = draw(q, state.noise, torch.tensor([start + len(tokens)]), purpose)
        tokens.append(pending)
        rows.append(q)
    return torch.cat(tokens), torch.cat(rows)

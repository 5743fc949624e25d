"""Judge decoding (AutoJudge 2504.20039): drafted tokens that verification would reject are kept where they do not matter. LOSSY.

A round is that of an exact chain, but where the exact rule would reject a drafted token a judge is asked: an unimportant one is kept and the scan goes on, an
important one is replaced by what the exact rule draws, which ends the round. Threshold θ = 0 is exact speculative decoding, token for token.

What the papers and the published code say, and what is done here: the bonus token behind a window that was kept whole is emitted, too (the published loop leaves it
out); a token that ends the text is neither kept nor suppressed against the exact rule (`spare_eos`); the older draft-only judge (mode "draft") is asked where
the exact rule rejects, and what follows is the residual: it used to replace verification.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch.nn.functional import linear

from decoding.verify import leading

Features = Literal["target", "both", "law"]
LAW_FEATURES = 7  # q(x), largest q, second largest, their distance, entropy in nats, whether x is the largest, place in the window


@dataclass(frozen=True, eq=False)
class Judge:
    """A classifier of drafted tokens: `layers` of (weight (O, I), bias (O,)) with ReLU between them, on features less `mean` (F,), over `scale` (F,).

    `features` "target": the target's hidden state behind the final norm at the drafted token's own position. "both": the draft's there, then the target's; the
    last token of a window is not fed to the draft, so it is not judged, and the exact rule has it. These two (mode "paper") predict P(important), and a token is
    kept below `threshold`. "law": LAW_FEATURES of the draft's distribution at temperature 1 (mode "draft") predict P(accept), and a token is kept above
    `threshold`. With `spare_eos` no token is kept where it, or what the exact rule puts in its place, is an end-of-text token.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    threshold: float
    features: Features = "target"
    spare_eos: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} must lie between 0 and 1")

    @property
    def mode(self) -> Literal["paper", "draft"]:
        """What the classifier predicts: P(important) or P(accept)."""
        return "draft" if self.features == "law" else "paper"

    @property
    def theta(self) -> float:
        """A token is kept where P(important) = 1 − P(accept) lies below."""
        return 1 - self.threshold if self.mode == "draft" else self.threshold

    @property
    def reads_states(self) -> bool:
        """Whether hidden states are needed, which only StaticLlama has."""
        return self.features != "law"

    @property
    def of_draft(self) -> Literal["state", "law"] | None:
        """What each draft step has to leave: the state of the token that it was fed, or LAW_FEATURES of the one that it drew."""
        return {"target": None, "both": "state", "law": "law"}[self.features]

    def to(self, device: torch.device) -> Judge:
        """This judge on `device`."""
        layers = tuple((weight.to(device), bias.to(device)) for weight, bias in self.layers)
        return replace(self, mean=self.mean.to(device), scale=self.scale.to(device), layers=layers)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Log odds (...) of what the classifier predicts, for tokens with `features` (..., F)."""
        x = (features - self.mean) / self.scale
        for weight, bias in self.layers[:-1]:
            x = linear(x, weight, bias).relu()
        return linear(x, *self.layers[-1])[..., 0]

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """P(important) (...) of tokens with `features` (..., F)."""
        logits = self.logits(features)
        return (-logits if self.mode == "draft" else logits).sigmoid()

    def scores(self, drafted: torch.Tensor, logits: torch.Tensor, states: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor:
        """P(important) of `drafted` (B, γ), NaN where it cannot be told.

        `logits` (B, γ+1, V) and `states` (B, γ+1, D) are the target's behind the last committed and each drafted token; `seen` (B, γ, F) is `of_draft`.
        """
        if self.features == "target":
            return self.predict(states[:, 1:])
        if self.features == "law":
            return self.predict(seen)
        judged = self.predict(torch.cat([seen[:, 1:], states[:, 1:-1]], -1))
        return torch.cat([judged, torch.full_like(states[:, :1, 0], torch.nan)], 1)


@dataclass(frozen=True, eq=False)
class TopK:
    """The judge that any trained one has to beat: a token is unimportant if it is among the target's `rank` most likely ones (None: always). `spare_eos` as Judge's."""

    rank: int | None
    spare_eos: bool = True
    theta = 0.5
    reads_states, of_draft = False, None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1, or None for all tokens")

    def scores(self, drafted: torch.Tensor, logits: torch.Tensor, states: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor:
        """As Judge.scores: 0 or 1. Of equal logits the lower id is the more likely one, as for greedy decoding."""
        if self.rank is None:
            return torch.zeros_like(drafted, dtype=torch.float32)
        logits, own = logits[:, :-1], logits[:, :-1].gather(-1, drafted[..., None])
        lower = torch.arange(logits.shape[-1], device=logits.device) < drafted[..., None]
        better = (logits > own) | ((logits == own) & lower)
        return (better.sum(-1) >= self.rank).float()


AnyJudge = Judge | TopK


def law_features(logits: torch.Tensor, tokens: torch.Tensor, token_ids: torch.Tensor | None, place: float) -> torch.Tensor:
    """LAW_FEATURES (..., 7) of `tokens` (...) that were drawn from `logits` (..., V_d) of the ids `token_ids` (V_d,), `place` of the way through their window."""
    columns = tokens if token_ids is None else torch.searchsorted(token_ids, tokens)
    law = logits.float().softmax(-1)
    own, (best, second) = law.gather(-1, columns[..., None])[..., 0], law.topk(2).values.unbind(-1)
    entropy = torch.special.entr(law).sum(-1)
    return torch.stack([own, best, second, best - second, entropy, (columns == law.argmax(-1)).float(), torch.full_like(own, place)], -1)


def judge_chain(
    judge: AnyJudge, scores: torch.Tensor, kept: torch.Tensor, instead: torch.Tensor, drafted: torch.Tensor, eos_ids: frozenset[int]
) -> torch.Tensor:
    """What becomes of `drafted` (B, γ), int64 (B, 4): how many are kept, the token that follows, how often the judge was asked, and how often it kept a token.

    `kept` (B, γ) and `instead` (B, γ+1) are the exact rule's (verify.chain_choices), `scores` (B, γ) the judge's. Nothing is counted behind a drafted end of text.
    """
    ends = is_one_of(drafted, eos_ids)
    asked = ~kept & ~scores.isnan()
    if judge.spare_eos:
        asked &= ~ends & ~is_one_of(instead[:, :-1], eos_ids)
    overrides = asked & (scores < judge.theta)
    accepted = leading(kept | overrides)
    reached = torch.arange(drafted.shape[1], device=drafted.device) <= accepted[:, None]
    reached &= ends.cumsum(1) - ends.long() == 0
    counts = [(which & reached).sum(1) for which in (asked, overrides)]
    return torch.stack([accepted, instead.gather(1, accepted[:, None])[:, 0], *counts], 1)


def is_one_of(tokens: torch.Tensor, ids: frozenset[int]) -> torch.Tensor:
    """Which of `tokens` are among `ids`, bool; no tensor is made of the ids, which a captured program could not."""
    return reduce(torch.logical_or, (tokens == id_ for id_ in ids), torch.zeros_like(tokens, dtype=torch.bool))

"""How many tokens a round drafts: a fixed number, or a choice from measured step times and what the draft says while drafting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from decoding.state import RoundResult


class DraftLength(Protocol):
    """What a round asks. `longest` bounds the drafted tokens; `wants_signals` makes drafting compute them (ChainRound.draw_draft)."""

    longest: int
    wants_signals: bool

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        """Whether to draft one more token behind `drafted` ones with these signals (B, 1) (empty where unwanted)."""

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult]) -> None:
        """Take note of how a round ended, for the next."""


@dataclass(frozen=True)
class FixedLength:
    """Always γ tokens."""

    longest: int
    wants_signals = False

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        return drafted < self.longest

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult]) -> None:
        pass

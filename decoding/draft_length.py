"""How many tokens a round drafts: a fixed number, or a choice from measured round costs and what the draft says while drafting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from decoding.state import RoundResult

MEMORY = 200  # drafted positions and rounds after which half of what was learnt is forgotten
PROBE_COST = 0.005  # share of the time that may go into drafting where it does not pay, to notice when it does
SIGNAL_LIMIT = 12.0  # signals beyond tell no more


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


class Calibration:
    """P(kept | signal) = σ(a + b·signal), fitted as outcomes come in: online Newton steps that forget slowly."""

    def __init__(self) -> None:
        self.offset, self.slope = 0.0, 0.5
        self._information = [2.0, 0.0, 2.0]  # of (offset, offset), (offset, slope), (slope, slope): the weight of the guess above

    def __call__(self, signal: float) -> float:
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, self.offset + self.slope * _limited(signal)))))

    def learn(self, signal: float, kept: bool) -> None:
        """One outcome."""
        chance, x = self(signal), _limited(signal)
        weight, error = chance * (1 - chance), kept - chance
        oo, os, ss = (0.5 ** (1 / MEMORY) * value for value in self._information)
        self._information = [oo + weight, os + weight * x, ss + weight * x * x]
        oo, os, ss = self._information
        determinant = oo * ss - os * os
        self.offset += (ss - os * x) * error / determinant
        self.slope += (oo * x - os) * error / determinant


def _limited(signal: float) -> float:
    return max(-SIGNAL_LIMIT, min(SIGNAL_LIMIT, signal))


class RecentMean:
    """Σ value / Σ weight, in which an entry counts half after MEMORY further ones."""

    def __init__(self, value: float, weight: float) -> None:
        self._value, self._weight = value, weight

    def add(self, value: float, weight: float) -> None:
        """One entry."""
        fade = 0.5 ** (1 / MEMORY)
        self._value, self._weight = fade * self._value + value, fade * self._weight + weight

    def __call__(self) -> float:
        return self._value / self._weight


class AdaptiveLength:
    """γ as it pays: drafts on while the tokens to be expected from it are worth more than the time that it takes.

    `costs[n]` are the seconds of a round that drafts n tokens, n = 0 … longest; costs[0] is a vanilla step. One more
    token brings Π cᵢ·a tokens, with cᵢ the calibrated chance that the i-th drafted token is kept and a the recent share that is,
    and takes costs[n+1] − costs[n]; it pays while tokens per second exceed those reached lately (the optimal stopping rule
    of a renewal process: with equal chances it is α^(γ+1) > c·S(γ)). Where drafting lately reached less than vanilla decoding
    does, rounds draft nothing, but for rare probes.

    Both verifications stay exact. Coupled: whatever is drafted, the output is vanilla's, so the signal may be the
    margin by which the drafted token won its draw. Rejection: the decision to draft on behind a token comes after the token was
    drawn, and it is kept and verified whatever its signal; the signal is a function of q; and noise that an earlier
    round has drafted with, and that what was learnt therefore depends on, is never drawn with again (Noise.of_round).

    One object serves many prompts, and keeps what it has learnt. Texts of a batch share the decision.
    """

    wants_signals = True

    def __init__(self, costs: Sequence[float]) -> None:
        """Raises ValueError for fewer than two costs, or one that is not positive."""
        if len(costs) < 2 or min(costs) <= 0:
            raise ValueError(f"costs {list(costs)}: give the positive seconds of a round that drafts 0, 1, … tokens")
        self.costs, self.longest = list(costs), len(costs) - 1
        self._calibration = Calibration()
        self._accepted = RecentMean(3.0, 5.0)
        self._pace = RecentMean(1.2 * MEMORY / 20, costs[0] * MEMORY / 20)  # tokens per second of rounds that draft: at first believed to be good
        self._idle_rounds = 0
        self._reach: list[float] = []  # for each text the chance that all tokens drafted in this round are kept

    @property
    def vanilla_pace(self) -> float:
        """Tokens per second without drafting."""
        return 1 / self.costs[0]

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        if drafted == 0:
            self._reach = []
            return self._pays() or self._probes()
        if drafted == self.longest or not self._pays():
            return False
        chances = [self._calibration(signal) for signal in signals[-1][:, 0].tolist()]
        self._reach = [reach * chance for reach, chance in zip(self._reach or [1.0] * len(chances), chances, strict=True)]
        gain = sum(self._reach) / len(self._reach) * self._accepted()
        return gain > max(self._pace(), self.vanilla_pace) * (self.costs[drafted + 1] - self.costs[drafted])

    def _pays(self) -> bool:
        """Whether drafting reaches more than vanilla decoding, by what it did lately or by what equal chances would give."""
        alpha = self._accepted()
        best = max(sum(alpha**i for i in range(n + 1)) / self.costs[n] for n in range(1, self.longest + 1))
        return max(self._pace(), best) > self.vanilla_pace

    def _probes(self) -> bool:
        """Whether to draft one token all the same: as often as PROBE_COST allows."""
        self._idle_rounds += 1
        lost = self.costs[1] - self._accepted() * self.costs[0] - self.costs[0]
        if self._idle_rounds * PROBE_COST * self.costs[0] < max(lost, 0.0):
            return False
        self._idle_rounds = 0
        return True

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult]) -> None:
        if not signals:
            return
        for row, result in enumerate(results):
            for i in range(result.tested):
                kept = i < result.accepted
                self._calibration.learn(float(signals[i][row, 0]), kept)
                self._accepted.add(kept, 1.0)
        self._pace.add(sum(result.accepted + 1 for result in results) / len(results), self.costs[len(signals)])

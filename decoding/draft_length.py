"""How many tokens a round drafts: a fixed number, or a choice from measured round costs and what the draft says while drafting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from decoding.state import RoundResult

MEMORY = 200  # drafted positions after which half of what was learnt about acceptance is forgotten
GAIN_MEMORY, PAIR_MEMORY = 100, 8  # the same for what drafting reaches, in rounds, and for the clock's corrections, in pairs of spells
SPELL, SETTLED = 32, 8  # rounds that draft, or do not, in a row, and those of them that are not timed: caches still hold what was used before
EXPLORED, AT_ONCE = 0.005, 0.2  # share of the time that may be lost to trying what seems slower, and how much of a spell of it at the beginning
TRUST = 2.0  # pairs of spells that the given costs count for
GUESS = (2.0, 0.0, 25.0)  # information that the calibration is taken to start with
SIGNAL_LIMIT = 12.0  # signals beyond tell no more


class DraftLength(Protocol):
    """What a round asks. `longest` bounds the drafted tokens; `wants_signals` makes drafting compute them (ChainRound.draw_draft)."""

    longest: int
    wants_signals: bool

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        """Whether to draft one more token behind `drafted` ones with these signals (R, 1) of the texts that have not ended (empty where unwanted)."""

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        """Take note of how a round ended, and how long it took, for the next."""


@dataclass(frozen=True)
class FixedLength:
    """Always γ tokens."""

    longest: int
    wants_signals = False

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        return drafted < self.longest

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        pass


class Calibration:
    """P(kept | signal) = σ(a + b·signal), fitted as outcomes come in: online Newton steps that forget slowly."""

    def __init__(self) -> None:
        self.offset, self.slope = 0.0, 0.5
        self._information = [0.0, 0.0, 0.0]  # of (offset, offset), (offset, slope), (slope, slope), beside GUESS

    def __call__(self, signal: float) -> float:
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, self.offset + self.slope * _limited(signal)))))

    def learn(self, signal: float, kept: bool) -> None:
        """One outcome."""
        chance, x = self(signal), _limited(signal)
        weight, error = chance * (1 - chance), kept - chance
        oo, os, ss = (0.5 ** (1 / MEMORY) * value for value in self._information)
        self._information = [oo + weight, os + weight * x, ss + weight * x * x]
        oo, os, ss = (value + guess for value, guess in zip(self._information, GUESS, strict=True))
        determinant = oo * ss - os * os
        self.offset += (ss - os * x) * error / determinant
        self.slope += (oo * x - os) * error / determinant


def _limited(signal: float) -> float:
    return max(-SIGNAL_LIMIT, min(SIGNAL_LIMIT, signal))


class RecentMean:
    """Σ value / Σ weight, in which an entry counts half after `memory` further ones."""

    def __init__(self, value: float, weight: float, memory: int = MEMORY) -> None:
        self.value, self.weight, self._fade = value, weight, 0.5 ** (1 / memory)

    def add(self, value: float, weight: float) -> None:
        """One entry."""
        self.value, self.weight = self._fade * self.value + value, self._fade * self.weight + weight

    def __call__(self) -> float:
        return self.value / self.weight


class AdaptiveLength:
    """γ as it pays: drafts on while the tokens to be expected from it are worth more than the time that it takes.

    `costs[n]` are the seconds of a round that drafts n tokens, n = 0 … longest; costs[0] is a vanilla step. One more
    token brings Π cᵢ·a tokens, with cᵢ the calibrated chance that the i-th drafted token is kept and a the recent share that is,
    and takes what the slope of `costs` says; it pays while tokens per second exceed those reached lately (the optimal stopping rule
    of a renewal process: with equal chances it is α^(γ+1) > c·S(γ)).

    Whether rounds draft at all is decided for a spell of them: they do if drafting lately reached more tokens per second of `costs` than vanilla
    rounds do. The other kind is tried for a spell when what that is expected to lose is EXPLORED of the time since; the clock then corrects the
    ratio of both kinds' costs, by the medians of neighbouring spells, as a machine may be fast now and slow later. On a device every drafted token
    waits for its signal.

    Both verifications stay exact. Coupled: whatever is drafted, the output is vanilla's, so the signal may be the
    margin by which the drafted token won its draw. Rejection: the decision to draft on behind a token comes after the token was
    drawn, and it is kept and verified whatever its signal; the signal is a function of q; and noise that an earlier
    round has drafted with, and that what was learnt therefore depends on, is never drawn with again (Noise.of_round). As the clock decides, a text
    under rejection is not the same again with the same seed; a coupled one is.

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
        self._gain = RecentMean(1.2, costs[0], GAIN_MEMORY)  # tokens per second of `costs` in rounds that draft
        self._correction = RecentMean(0.0, TRUST, PAIR_MEMORY)  # log of how much slower than `costs` vanilla rounds are, over the same of drafting rounds
        self._drafts, self._slowness = True, []  # of the present spell: its kind, and each round's seconds over its cost
        self._last: tuple[bool, float] | None = None  # kind and slowness of the spell before
        self._explorable_s = AT_ONCE * SPELL * costs[0]
        self._reach: list[float] = []  # for each text the chance that all tokens drafted in this round are kept

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        if drafted == 0:
            self._reach = []
            return self._drafts
        if drafted == self.longest:
            return False
        chances = [self._calibration(signal) for signal in signals[-1][:, 0].tolist()]
        self._reach = [reach * chance for reach, chance in zip(self._reach or [1.0] * len(chances), chances, strict=True)]
        tokens = sum(self._reach) / len(self._reach) * self._accepted()
        return tokens > max(self._gain(), 1 / self._vanilla_s) * self._token_s(drafted)

    def _token_s(self, drafted: int) -> float:
        """Seconds that one more token takes behind `drafted` ones, by the slope of `costs` around there: their differences are noisy."""
        low, high = max(drafted - 1, 1), min(drafted + 2, self.longest)
        return (self.costs[high] - self.costs[low]) / (high - low)

    @property
    def _vanilla_s(self) -> float:
        """Seconds of a vanilla round, beside rounds that take `costs`."""
        return self.costs[0] * math.exp(self._correction())

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        cost = self.costs[len(signals)]
        if signals:
            self._gain.add(sum(result.accepted + 1 for result in results) / len(results), cost)
            for row, result in zip(torch.cat(signals, 1).tolist(), results, strict=True):
                for i in range(result.tested):
                    kept = i < result.accepted
                    self._calibration.learn(row[i], kept)
                    self._accepted.add(kept, 1.0)
        self._slowness.append(seconds / cost)
        self._explorable_s += EXPLORED * cost
        if len(self._slowness) == SPELL:
            self._end_spell()

    def _end_spell(self) -> None:
        """Compare the spell with the one before, where that was of the other kind, and choose the kind of the next."""
        slowness = statistics.median(self._slowness[SETTLED:])
        if self._last is not None and self._last[0] != self._drafts:
            idle, drafting = (self._last[1], slowness) if self._drafts else (slowness, self._last[1])
            self._correction.add(math.log(idle / drafting), 1.0)
        self._last, self._slowness = (self._drafts, slowness), []
        self._drafts = self._next_kind()

    def _next_kind(self) -> bool:
        """Whether the next spell drafts: if that is the faster kind, or, where that may be afforded, the slower."""
        speedup = self._gain() * self._vanilla_s
        faster = speedup > 1
        loss = SPELL * self.costs[0] * (1 - min(speedup, 1 / speedup))
        if self._drafts != faster or self._explorable_s < loss:
            return faster
        self._explorable_s = 0.0
        return not faster

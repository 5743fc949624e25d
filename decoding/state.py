"""What one generation carries from round to round, and the raw counts and seconds that it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from decoding.kv_cache import CachedModel
from decoding.sampling import Noise, SamplingPolicy

PHASES = ("prefill", "draft", "verify", "sampling", "record")


@dataclass
class RoundResult:
    """One round's tokens (kept drafts, then the correction or bonus) and its counts.

    `overlaps` and `expected` hold, for each tested position, Σ min(p, q) and the verification's own chance of keeping
    the drafted token; they are filled only when `record_overlap` is set.
    """

    tokens: list[int]
    proposed: int = 0
    accepted: int = 0
    overlaps: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)

    @property
    def tested(self) -> int:
        """Drafted positions that verification reached: the kept ones and, where there is one, the first rejected."""
        return min(self.accepted + 1, self.proposed)


@dataclass
class DecodeStats:
    """Raw counts and unrounded seconds of one generation; rates are computed by `metrics.speculation_metrics`.

    `emitted` counts tokens after the cuts at end-of-text and length; `rounds` and calls are after the prefill.
    `seconds` holds the phases of PHASES, of which "record" is measurement, not decoding; `wall_s` is the whole.
    """

    prompt_tokens: int = 0
    emitted: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    rounds: list[RoundResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    wall_s: float = 0.0

    @property
    def decode_s(self) -> float:
        """Seconds from the end of the prefill to the last token, without those spent on recording overlaps."""
        return self.wall_s - self.seconds["prefill"] - self.seconds["record"]

    @property
    def host_s(self) -> float:
        """Seconds outside every phase: Python between the calls."""
        return self.wall_s - sum(self.seconds.values())


@dataclass
class DecodeState:
    """The models, their caches, the committed tokens and the noise of one generation.

    Between rounds the target's cache holds all committed tokens but the last, the draft's at most that many.
    """

    target: CachedModel
    draft: CachedModel | None
    policy: SamplingPolicy
    noise: Noise
    committed: list[int]
    eos_ids: frozenset[int] = frozenset()
    record_overlap: bool = False
    stats: DecodeStats = field(default_factory=DecodeStats)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to `phase`, the device's queue included."""
        synchronize(self.target.device)
        start = time.perf_counter()
        yield
        synchronize(self.target.device)
        self.stats.seconds[phase] += time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what was queued (nothing to wait for on the CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What a generation carries from round to round, and the raw counts and seconds that it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from decoding.common_sense import CommonSense
from decoding.sampling import Noise, SamplingPolicy
from engine.kv_cache import CachedModel
from engine.programs import Programs
from engine.static_llama import StaticLlama

Model = StaticLlama | CachedModel
NO_TARGET_LAW, NO_DRAFT_LAW = -1, -2  # what a round's decision says in place of a count or token where a model's logits are not finite
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens (B, T) fed at starts (B,) -> logits (B, T, V)
PHASES = ("prefill", "draft", "verify", "record")


@dataclass
class TreeCounts:
    """Of a round over a tree (on a device, where passes have fixed widths, what fills them counts): `passes` of the draft, which fed it `fed` nodes, `widest` at once, and made `considered` candidates (both root and all);
    `nodes` of the tree that was verified, the root included, its `depth`, and the tokens that it was `expected` to bring; `rank`, from 0, of the root's child that
    was accepted, if one was."""

    considered: int
    passes: int = 1
    fed: int = 1
    widest: int = 1
    nodes: int = 1
    depth: int = 0
    expected: float = 1.0
    rank: int | None = None

    def add_pass(self, fed: int, considered: int) -> None:
        """Count a draft pass over `fed` nodes, and the candidates that came of it."""
        self.passes += 1
        self.fed += fed
        self.widest = max(self.widest, fed)
        self.considered += considered


@dataclass
class RoundResult:
    """One text's share of a round: its tokens (kept drafts, then the correction or bonus) and its counts.

    `tested`: drafted positions that verification reached: the kept ones and, where there is one, the first rejected (in a tree, where something was
    drafted). `overlaps` and `expected` hold, for each of them, Σ min(p, q) and the verification's own chance of keeping
    the drafted token; they are filled only when `record_overlap` is set, and not for trees. `judged`: mismatches that a judge was asked about, and
    `overridden`: those that it kept (autojudge.py).
    """

    tokens: list[int]
    proposed: int = 0
    accepted: int = 0
    tested: int | None = None
    overlaps: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    tree: TreeCounts | None = None
    judged: int = 0
    overridden: int = 0

    def __post_init__(self) -> None:
        if self.tested is None:
            self.tested = min(self.accepted + 1, self.proposed)


@dataclass
class DecodeStats:
    """Raw counts and unrounded seconds of one text's generation; rates are computed by `metrics.speculation_metrics`.

    `emitted` counts tokens after the cuts at end-of-text and length, `with_prefill` those of them that came with the prefill (none,
    but in transformers' own decoders); `rounds`, calls and processed tokens are after the prefill. `seconds` holds the phases of PHASES, sampling included, of which "record" is measurement, not decoding;
    `wall_s` is the whole. In a batch the calls and seconds are those of all texts together.
    """

    prompt_tokens: int = 0
    emitted: int = 0
    with_prefill: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    target_tokens: int = 0
    draft_tokens: int = 0
    rounds: list[RoundResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    wall_s: float = 0.0

    @property
    def proposed(self) -> int:
        """Drafted tokens of all rounds."""
        return sum(one.proposed for one in self.rounds)

    @property
    def accepted(self) -> int:
        """Those of them that were kept."""
        return sum(one.accepted for one in self.rounds)

    @property
    def timed(self) -> int:
        """Tokens that `decode_s` covers."""
        return self.emitted - self.with_prefill

    @property
    def decode_s(self) -> float:
        """Seconds from the end of the prefill to the last token, without those spent on recording overlaps."""
        return self.wall_s - self.seconds["prefill"] - self.seconds["record"]

    @property
    def host_s(self) -> float:
        """Seconds outside every phase: Python between the calls."""
        return self.wall_s - sum(self.seconds.values())


class Clock:
    """Seconds per phase. On CUDA the device's own clock, read at the end: measuring makes no round wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `phase`."""
        if self._on_device:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start

    def add(self, phase: str, seconds: float) -> None:
        """Count `seconds` of the host's time as `phase`."""
        self._seconds[phase] += seconds

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds so far; waits for the device."""
        total = dict(self._seconds)
        for phase, begin, end in self._events:
            end.synchronize()
            total[phase] += begin.elapsed_time(end) / 1000
        return total


@dataclass
class DecodeState:
    """The models, their caches, the committed tokens of every text (B lists) and the noise of one generation.

    Between rounds the target's cache holds all committed tokens but the last, the draft's at most that many. `draft` is
    whatever the method drafts with.
    """

    target: Model
    draft: object
    policy: SamplingPolicy
    noise: Noise
    committed: list[list[int]]
    eos_ids: frozenset[int] = frozenset()
    record_overlap: bool = False
    common_sense: CommonSense | None = None
    stale_from: int | None = None  # where the target's cache is not the text's, if it is to be repaired

    def __post_init__(self) -> None:
        self.clock = Clock(self.target.device)
        self.running = list(range(len(self.committed)))  # texts that have not ended

    @property
    def vocab_size(self) -> int:
        """V, of the target."""
        return self.target.config.vocab_size

    def last(self, count: int = 1) -> torch.Tensor:
        """The last `count` committed tokens of every text, int64 (B, count)."""
        texts = [[*text[:1] * (count - len(text)), *text[-count:]] for text in self.committed]  # one that has ended may be shorter: what is fed for it is not used
        return torch.tensor(texts, device=self.target.device)

    def roll_back(self) -> None:
        """Let every cache hold no more than the committed tokens but the last."""
        for model in filter(None, (self.target, self.draft)):
            model.crop([len(text) - 1 for text in self.committed])

    def program(
        self, programs: Programs, key: Hashable, function: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """function(*inputs, noise) as one of `programs`; `key` must name all that the work depends on beside policy and cache."""
        whole = (key, self.policy, *(model.reach for model in (self.target, self.draft) if model is not None))
        return programs(whole, lambda *tensors: function(*tensors[:-1], Noise(tensors[-1])), *inputs, self.noise.key)

    def results(self, drafted: torch.Tensor, decision: torch.Tensor) -> list[RoundResult]:
        """Every text's result for drafted tokens (B, γ) and decision (B, 2): how many are kept, and the token that follows; (B, 4) with `judged` and `overridden`.

        Waits for the device. What was drafted behind an end-of-text token does not count as proposed.
        """
        gamma = drafted.shape[1]
        return [self._result(row[:gamma], *row[gamma:]) for row in torch.cat([drafted, decision], 1).tolist()]

    def _result(self, drafted: list[int], accepted: int, next_token: int, judged: int = 0, overridden: int = 0) -> RoundResult:
        check_finite(accepted)
        proposed = next((i + 1 for i, token in enumerate(drafted) if token in self.eos_ids), len(drafted))
        accepted = min(accepted, proposed)
        return RoundResult([*drafted[:accepted], next_token], proposed, accepted, judged=judged, overridden=overridden)


def check_finite(decided: int) -> None:
    """Raise FloatingPointError where a round's decision is NO_TARGET_LAW or NO_DRAFT_LAW."""
    if decided < 0:
        whose = "draft" if decided == NO_DRAFT_LAW else "target"
        raise FloatingPointError(
            f"the {whose}'s logits are not finite (NaN or infinite): check its weights, or choose a number format of wider range (fp32, bf16)")


def check_logits(logits: torch.Tensor, fault: int) -> None:
    """`check_finite` of `fault` where a row of `logits` (..., V) is not finite. Waits for the device."""
    if not logits.amax(-1).isfinite().all():
        check_finite(fault)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what was queued (nothing to wait for on the CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

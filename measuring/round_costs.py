"""What decoding costs on this machine, and what follows: step times, round costs, and the exit, head size and γ to use.

A round's cost is measured as a whole, so that launch overhead, sampling and Python count as they do in decoding.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn

from decoding.sampling import policy_probs
from decoding.state import NO_DRAFT_LAW, NO_TARGET_LAW, RoundResult, check_logits
from decoding.verify import expected_acceptance
from engine.views import AnyPrompt
from speculative import DecodeOptions, generate, room_behind
from truncated_llama import TruncatedLlama

LONGEST = 8  # most tokens that an adaptive round drafts
REPEATS = 3  # generations of each length that are timed
SETTLE_S, TIMED_S, FEWEST = 0.01, 0.1, 6  # seconds of a generation that do not count, as caches hold what the one before used; seconds and rounds that are enough


class TimedLength:
    """Drafts `gamma` tokens in every round, 0 or more, and keeps each round's seconds."""

    wants_signals = True

    def __init__(self, gamma: int) -> None:
        self.gamma, self.longest = gamma, max(gamma, 1)
        self.seconds: list[float] = []

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        return drafted < self.gamma

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        self.seconds.append(seconds)

    def enough(self, tokens: list[int]) -> bool:
        """Whether the generation may end."""
        return len(self.seconds) > FEWEST and sum(self.seconds) > SETTLE_S + TIMED_S

    def settled(self) -> list[float]:
        """The seconds of all rounds but the first and those that follow it too soon; of the first where it is the only one."""
        late = [seconds for begin, seconds in zip(accumulate(self.seconds), self.seconds[1:], strict=False) if begin > SETTLE_S]
        return late or self.seconds[1:] or self.seconds


def round_costs(target: nn.Module, draft: nn.Module, prompt: AnyPrompt, options: DecodeOptions, longest: int = LONGEST) -> list[float]:
    """Median seconds of a round of `options` that drafts 0, 1, … `longest` tokens behind `prompt`; never falling.

    A length is measured in generations of its own: a vanilla step that follows others is faster than one that follows drafting,
    and whether drafting pays is a question of the former. They are as long as it takes, not as `options` are, where the context has room.
    """
    found: dict[int, list[float]] = {length: [] for length in range(longest + 1)}
    room = room_behind(target, draft, prompt, replace(options, gamma=TimedLength(longest)))
    wanted = min(room, (FEWEST + 2) * (longest + 1))
    plain = replace(options, eos_ids=frozenset(), record_overlap=False, max_new_tokens=max(options.max_new_tokens, wanted))
    for _ in range(REPEATS):
        for length, seconds in found.items():
            rule = TimedLength(length)
            generate(target, prompt, replace(plain, gamma=rule, stop=rule.enough), draft)
            seconds += rule.settled()
    return list(accumulate(map(statistics.median, found.values()), max))


def step_seconds(target: nn.Module, draft: nn.Module, prompt: list[int], options: DecodeOptions) -> dict[str, float]:
    """Median seconds of one step with all its overhead: "target" on 1 token, "draft" on 1, "verify" of the γ+1 of `options`.

    Vanilla and drafting generations take turns behind the same prompt; the first pair is not counted.
    """
    drafting = replace(options, eos_ids=frozenset(), stop=None, record_overlap=False)
    found: list[dict[str, float]] = []
    for _ in range(REPEATS + 1):
        plain, drafted = (generate(target, prompt, options, draft).stats for options in (replace(drafting, method="vanilla"), drafting))
        rounds, drafts = len(drafted.rounds), sum(r.proposed for r in drafted.rounds)
        found.append({
            "target": plain.decode_s / len(plain.rounds), "draft": drafted.seconds["draft"] / drafts,
            "verify": (drafted.decode_s - drafted.seconds["draft"]) / rounds,
        })
    return {name: statistics.median(row[name] for row in found[1:]) for name in found[0]}


# ---- recommending an exit, a head size and γ ----

def frequent_tokens(texts: Iterable[Sequence[int]], count: int, vocab_size: int) -> torch.Tensor:
    """The `count` most frequent ids of `texts`, ascending, int64 (count,); filled up with the lowest ids where there are fewer."""
    ranked = [token for token, _ in Counter(token for text in texts for token in text).most_common(count)]
    known = set(ranked)
    missing = (token for token in range(vocab_size) if token not in known)
    ranked += [token for token, _ in zip(missing, range(count - len(ranked)), strict=False)]
    return torch.tensor(sorted(ranked))


@torch.inference_mode()
def acceptance_along(target: nn.Module, draft: TruncatedLlama, texts: list[tuple[list[int], int]], options: DecodeOptions) -> list[torch.Tensor]:
    """For each (tokens, prompt length): the chance that `options.verification` keeps a token drafted at each position behind the prompt.

    The texts must be the target's own under `options.policy`: what is drafted behind kept tokens is drafted behind such text.
    """
    found = []
    for tokens, start in texts:
        ids = torch.tensor([tokens[:-1]], device=target.device)
        laws = []
        for model, fault in ((target, NO_TARGET_LAW), (draft, NO_DRAFT_LAW)):
            logits = model(ids, use_cache=False).logits[0, start - 1 :]
            check_logits(logits, fault)
            laws.append(policy_probs(logits, options.policy))
        p, q = laws
        found.append(expected_acceptance(p, q, options.verification).cpu())
    return found


def tokens_per_round(chances: list[torch.Tensor], gamma: int) -> float:
    """Mean over all starts of 1 + Σ_j Π_{i ≤ j} a_i for γ tokens drafted in a row, from the chances a along each text.

    Unlike a single α it knows that easy positions come in runs. Where no text has γ positions, those of the longest are all that counts.
    """
    gamma = min(gamma, max(map(len, chances)))
    total = count = 0.0
    for along in chances:
        starts = max(len(along) - gamma + 1, 0)
        reach = torch.ones(starts)
        for i in range(gamma):
            reach = reach * along[i : i + starts]
            total += float(reach.sum())
        count += starts
    return 1 + total / count


@dataclass(frozen=True)
class Candidate:
    """A draft with its head size, mean chance α of being kept, round costs (seconds, by drafted tokens) and tokens per round."""

    name: str
    draft: TruncatedLlama
    vocab: int
    alpha: float
    costs: list[float]
    tokens: list[float]  # by drafted tokens, from 0

    def speedup(self, gamma: int) -> float:
        """Predicted: tokens per round over the round's cost in vanilla steps."""
        return self.tokens[gamma] * self.costs[0] / self.costs[gamma]

    @property
    def best_gamma(self) -> int:
        """The γ of the largest predicted speedup; 0 where drafting does not pay."""
        return max(range(len(self.costs)), key=self.speedup)

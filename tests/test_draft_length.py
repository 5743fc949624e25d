"""How many tokens a round drafts: what a rule learns, what it reaches in simulated traffic, and that no rule changes what is written."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

import decoding.draft_length as draft_length
import decoding.drafting as drafting
from decoding.draft_length import AdaptiveLength, Calibration, FixedLength, RecentMean
from decoding.sampling import Noise, Purpose, SamplingPolicy
from decoding.state import DecodeStats, RoundResult
from engine.static_llama import Stack
from measuring.metrics import expected_tokens
from speculative import DecodeOptions, generate, generate_batch
from toy_models import (
    BigramModel,
    PeekingLength,
    bigram_pair,
    check_same_text,
    chi_square_p,
    context_free_pair,
    decode,
    native_llama,
    noisy_exit,
    tiny_llama,
    transition_p,
)
from truncated_llama import Exit, ExitForm, TruncatedLlama

GREEDY = SamplingPolicy(0.0)
SAMPLED = [SamplingPolicy(1.0), SamplingPolicy(0.7, top_p=0.95), SamplingPolicy(1.0, top_k=5)]


def logit(chance: float) -> float:
    return math.log(chance / (1 - chance))


# ---- what is learnt ----

def calibrated(curve: Callable[[int, float, Calibration], float], outcomes: int, seed: int = 0) -> Calibration:
    """A Calibration that saw as many outcomes; the i-th, behind a signal s of deviation 2, was kept with the chance curve(i, s, what is found so far)."""
    rng, found = random.Random(seed), Calibration()
    for i in range(outcomes):
        signal = rng.gauss(0, 2)
        found.learn(signal, rng.random() < curve(i, signal, found))
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("offset", "slope"), [(0.0, 1.0), (1.5, 0.3), (-1.0, 2.0), (0.5, 0.0)])
def test_calibration_finds_the_chances_behind_the_outcomes(offset, slope):
    """On average over what it says from the 2000th outcome on; and always about, as 290 outcomes' worth has a standard error of 0.03."""
    seen: list[list[float]] = []
    signals = (-2.0, -1.0, 0.0, 1.0, 2.0)

    def curve(i: int, signal: float, found: Calibration) -> float:
        if i > 2000 and i % 20 == 0:
            seen.append([found(s) for s in signals])
        return sigmoid(offset + slope * signal)

    calibrated(curve, 12_000)
    for s, said in zip(signals, zip(*seen, strict=True), strict=True):
        truth = sigmoid(offset + slope * s)
        assert abs(statistics.mean(said) - truth) < 0.025 and statistics.mean(abs(chance - truth) for chance in said) < 0.06


@pytest.mark.parametrize("forgets", [True, False])
def test_calibration_forgets(forgets, monkeypatch):
    """1000 outcomes of another curve, five half-lives, leave 3 % of the first."""
    if not forgets:
        monkeypatch.setattr(draft_length, "MEMORY", 10**9)
    found = calibrated(lambda i, s, found: sigmoid(s + (2 if i < 1000 else -2)), 2000)
    assert (abs(found(0.0) - sigmoid(-2)) < 0.1) == forgets


@pytest.mark.parametrize("signal", [math.inf, -math.inf])
def test_a_token_that_was_certain_or_impossible_is_an_outcome_like_others(signal):
    """One-hot q has infinite log odds; a coupled draw among one possible token an infinite margin."""
    found, rng = Calibration(), random.Random(0)
    for _ in range(1000):
        found.learn(signal, rng.random() < 0.7)
        found.learn(rng.gauss(0, 2), rng.random() < 0.7)
    assert abs(found(signal) - 0.7) < 0.15


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.99])
def test_calibration_stands_one_signal_for_ever(chance):
    """So it is with top-k 1: q is one-hot in every round, and one rule serves many prompts. 25,000 are enough for what fades to be nothing."""
    found, rng = Calibration(), random.Random(0)
    seen = []
    for _ in range(25_000):
        found.learn(math.inf, rng.random() < chance)
        seen.append(found(math.inf))
    assert abs(statistics.mean(seen[1000:]) - chance) < 0.05 and abs(found(math.inf) - chance) < 0.15


def test_recent_mean_counts_an_entry_half_after_its_memory():
    mean = RecentMean(0.0, 0.0, memory=50)
    mean.add(1.0, 1.0)
    for _ in range(50):
        mean.add(0.0, 1.0)
    rest = sum(0.5 ** (i / 50) for i in range(50))
    assert mean.value == pytest.approx(0.5) and mean() == pytest.approx(0.5 / (0.5 + rest))


def test_recent_mean_is_a_ratio_of_sums():
    """Tokens per second of rounds of different lengths: not the mean of their rates."""
    mean = RecentMean(0.0, 0.0, memory=10**9)
    mean.add(4.0, 1.0)
    mean.add(1.0, 4.0)
    assert mean() == pytest.approx(1.0)


def test_fixed_length_drafts_its_number_and_needs_no_signals():
    rule = FixedLength(3)
    assert [rule.goes_on(drafted, []) for drafted in range(5)] == [True, True, True, False, False] and not rule.wants_signals


@pytest.mark.parametrize("costs", [[], [1.0], [1.0, 0.0], [-1.0, 2.0]])
def test_costs_that_cannot_be_are_refused(costs):
    with pytest.raises(ValueError, match="positive seconds"):
        AdaptiveLength(costs)


def test_a_further_token_costs_what_the_slope_says():
    """By hand, around each length; that the first one takes more, as drafting at all does, is no part of it."""
    rule = AdaptiveLength([1.0, 3.0, 3.5, 4.5, 4.75])
    assert [rule._token_s(drafted) for drafted in (1, 2, 3)] == pytest.approx([1.5 / 2, 1.75 / 3, 1.25 / 2])


# ---- simulated traffic ----

COSTS = [0.7, 1.05, 1.25, 1.45, 1.7, 1.95, 2.25, 2.5, 2.75]  # milliseconds: drafting at all costs half a vanilla step
EASY, HARD, EVEN = 0.95, 0.3, 0.6
Chance = Callable[[int, random.Random], float]


class Traffic:
    """Rounds in which the next drafted token is kept with chance(round, rng), its log odds and noise are its signal, and seconds are noisy.

    `signal` is every token's instead, where it is given.
    """

    def __init__(self, chance: Chance, seed: int = 0, signal_noise: float = 0.5, signal: float | None = None) -> None:
        self.chance, self.rng, self.signal_noise, self.signal = chance, random.Random(seed), signal_noise, signal
        self.lengths: list[int] = []
        self.tokens: list[int] = []
        self.seconds: list[float] = []

    def run(self, rule: AdaptiveLength, rounds: int, slow: dict[int, float] | None = None) -> Traffic:
        """So many more rounds under `rule`; those of `slow`, counted from the first, take so many times longer."""
        for _ in range(rounds):
            signals, kept = self._draft(rule)
            accepted = (kept + [False]).index(False)
            seconds = COSTS[len(kept)] * self.rng.gauss(1, 0.1) * (slow or {}).get(len(self.lengths), 1)
            rule.learn(signals, [RoundResult([0] * (accepted + 1), len(kept), accepted)], seconds)
            self.lengths.append(len(kept))
            self.tokens.append(accepted + 1)
            self.seconds.append(seconds)
        return self

    def _draft(self, rule: AdaptiveLength) -> tuple[list[torch.Tensor], list[bool]]:
        signals, kept = [], []
        while rule.goes_on(len(signals), signals):
            chance = self.chance(len(self.lengths), self.rng)
            signal = logit(chance) + self.rng.gauss(0, self.signal_noise)
            signals.append(torch.tensor([[signal if self.signal is None else self.signal]]))
            kept.append(self.rng.random() < chance)
        return signals, kept

    def pace(self, first: int = 0) -> float:
        """Tokens per vanilla step from round `first` on."""
        return COSTS[0] * sum(self.tokens[first:]) / sum(self.seconds[first:])


def best_fixed(alpha: float) -> float:
    """Tokens per vanilla step of the best γ ≥ 1 where a drafted token is kept with chance `alpha`, on average over independent positions."""
    return max(expected_tokens(alpha, gamma) * COSTS[0] / cost for gamma, cost in enumerate(COSTS) if gamma > 0)


def drafting_share(lengths: list[int]) -> float:
    return sum(length > 0 for length in lengths) / len(lengths)


def pace_at(alpha: float, costs: list[float], rounds: int, seeds: int, **signals: float) -> float:
    """Tokens per vanilla step of rules that believe in `costs`, learning included, where every token is kept with chance `alpha`."""
    runs = [Traffic(lambda i, rng: alpha, seed, **signals).run(AdaptiveLength(costs), rounds) for seed in range(seeds)]
    return statistics.mean(run.pace() for run in runs)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.6, 0.8, 0.9, 0.97])
def test_adaptive_length_reaches_the_best_fixed_one_and_vanilla(alpha):
    """From the first round on. The standard error is below 0.006."""
    found = pace_at(alpha, COSTS, rounds=3000, seeds=3)
    assert found >= 0.97 * best_fixed(alpha) and found >= 0.98


@pytest.mark.parametrize("alpha", [0.6, 0.8, 0.95])
def test_adaptive_length_reaches_the_best_fixed_one_where_all_signals_are_the_same(alpha):
    """Infinite: the log odds of one-hot q."""
    assert pace_at(alpha, COSTS, rounds=2500, seeds=2, signal=math.inf) >= 0.95 * best_fixed(alpha)


@pytest.mark.parametrize("informative", [True, False])
def test_adaptive_length_beats_every_fixed_one_where_easy_and_hard_positions_mix(informative):
    """It does so by its signals: without what they say it is as good as the best fixed length, but no better."""
    chance: Chance = lambda i, rng: 0.97 if rng.random() < 0.7 else 0.4  # noqa: E731
    traffic = Traffic(chance, signal_noise=0.5 if informative else 50.0).run(AdaptiveLength(COSTS), 4000)
    advantage = traffic.pace() / best_fixed(0.7 * 0.97 + 0.3 * 0.4)
    assert advantage > 1.04 if informative else 0.96 < advantage < 1.02


def test_adaptive_length_takes_up_drafting_again_when_traffic_turns_easy():
    traffic = Traffic(lambda i, rng: HARD if i < 2000 else EASY).run(AdaptiveLength(COSTS), 5000)
    assert drafting_share(traffic.lengths[1000:2000]) < 0.1
    assert traffic.pace(first=3000) > 0.97 * best_fixed(EASY)


def test_adaptive_length_leaves_drafting_when_traffic_turns_hard():
    traffic = Traffic(lambda i, rng: EASY if i < 2000 else HARD).run(AdaptiveLength(COSTS), 5000)
    assert drafting_share(traffic.lengths[1000:2000]) > 0.9
    assert traffic.pace(first=3000) > 0.97


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.6, 0.9])
def test_wrong_costs_mislead_little(alpha):
    """Whether drafting pays is decided by the clock, so a vanilla step believed to take 30 % longer costs no more than 4 %."""
    wrong = [1.3 * COSTS[0], *[0.9 * cost for cost in COSTS[1:]]]
    found = pace_at(alpha, wrong, rounds=4000, seeds=2)
    assert found >= 0.96 * max(1.0, best_fixed(alpha))


@pytest.mark.parametrize("mean", ["median", "mean"])
def test_an_interrupted_round_does_not_end_drafting(mean, monkeypatch):
    """One of 100 times its length, in a spell whose rounds are compared with vanilla ones. Were their mean, drafting would seem far slower."""
    monkeypatch.setattr(statistics, "median", {"median": statistics.median, "mean": statistics.mean}[mean])
    rule = AdaptiveLength(COSTS)
    traffic = Traffic(lambda i, rng: 0.7).run(rule, 2000)
    while not (traffic.lengths[-1] == 0 and len(rule._slowness) == 0):  # behind a vanilla spell
        traffic.run(rule, 1)
    now = len(traffic.lengths)
    traffic.run(rule, 400, {now + draft_length.SETTLED + 5: 100.0})
    assert (drafting_share(traffic.lengths[now:]) > 0.85) == (mean == "median")


def test_rounds_of_a_kind_come_in_spells():
    lengths = Traffic(lambda i, rng: EVEN).run(AdaptiveLength(COSTS), 40 * draft_length.SPELL).lengths
    spells = [lengths[i : i + draft_length.SPELL] for i in range(0, len(lengths), draft_length.SPELL)]
    assert all(len({length > 0 for length in spell}) == 1 for spell in spells)
    assert {spell[0] > 0 for spell in spells} == {True, False}, "both kinds are tried"


def test_texts_of_a_batch_share_the_decision():
    """Two texts' chances are averaged: what one sure text alone would go on for, it does not beside three that are lost."""
    def goes_on(signals: list[float]) -> bool:
        rule = AdaptiveLength([1.0, 1.2, 1.4])
        rule._calibration.offset, rule._calibration.slope = 0.0, 1.0
        assert rule.goes_on(0, [])
        return rule.goes_on(1, [torch.tensor(signals)[:, None]])

    assert goes_on([8.0]) and goes_on([8.0] * 4)
    assert not goes_on([-8.0]) and not goes_on([8.0, -8.0, -8.0, -8.0])


# ---- texts ----

class OnSchedule(AdaptiveLength):
    """Takes every round to last what it costs, so that texts do not depend on the clock, and what is found of their law is found again."""

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        super().learn(signals, results, self.costs[len(signals)])


COSTS_OF_TEXTS = [1.0, 1.1, 1.2, 1.3]
LENGTHS = {
    "fixed": lambda: FixedLength(3),
    "peeking": lambda: PeekingLength(3, 0.5),
    "adaptive": lambda: OnSchedule(COSTS_OF_TEXTS),
}
METHODS = ["speculative", "self_speculative"]


@pytest.fixture
def alternating(monkeypatch):
    """AdaptiveLength drafts in four rounds and not in the next four, whatever the clock says: trying the slower kind is always affordable."""
    for name, value in (("SPELL", 4), ("SETTLED", 1), ("EXPLORED", 1e9)):
        monkeypatch.setattr(draft_length, name, value)


def check_pauses(rule: object, runs: list[DecodeStats]) -> None:
    """The rule has drafted in some rounds and not in others, as it is there to."""
    lengths = [r.proposed for stats in runs for r in stats.rounds]
    if isinstance(rule, AdaptiveLength):
        assert [length > 0 for length in lengths] == [i // 4 % 2 == 0 for i in range(len(lengths))]
    elif isinstance(rule, PeekingLength):
        assert min(lengths) == 0 and max(lengths) == 3


def check_law_under(rule: object, policy: SamplingPolicy, tokens: int = 3000) -> None:
    """Under rejection: tokens within rounds, behind rounds that drafted and behind those that did not have the target's law."""
    target, draft = bigram_pair(dtype=torch.float32)
    text, stats = decode(target, draft, [0], policy=policy, verification="rejection", gamma=rule, max_new_tokens=tokens, seed=3)
    check_pauses(rule, [stats])
    pairs = list(pairwise([0, *text]))
    behind = dict(zip(accumulate(len(r.tokens) for r in stats.rounds), (r.proposed > 0 for r in stats.rounds), strict=True))
    for drafted in (None, True, False):
        chosen = [pair for i, pair in enumerate(pairs) if behind.get(i) == drafted]
        assert len(chosen) < 100 or transition_p(chosen, target, policy) > 1e-4, f"law ({len(chosen)} tokens, {drafted=})"


@pytest.mark.parametrize("rule", LENGTHS)
@pytest.mark.parametrize("policy", SAMPLED, ids=str)
def test_law_is_the_targets_under_every_rule(policy, rule, alternating):
    check_law_under(LENGTHS[rule](), policy)


def take_back(monkeypatch, unwanted: Callable[[drafting.ChainRound], bool]) -> None:
    """Let every round drop the last drafted token, but for the first, as long as it is `unwanted`."""
    exact = drafting.ChainRound.draft

    def draft(self, *arguments, **names):
        exact(self, *arguments, **names)
        while len(self.rows) > 1 and unwanted(self):
            for held in (self.tokens, self.rows, self.signals):
                del held[-1:]

    monkeypatch.setattr(drafting.ChainRound, "draft", draft)


def drawn_against_the_odds(this_round: drafting.ChainRound) -> bool:
    return float(this_round.rows[-1].flatten()[this_round.tokens[-1]]) < 0.5


@pytest.mark.parametrize("rule", LENGTHS)
def test_taking_back_a_token_because_of_its_draw_breaks_the_law(rule, alternating, monkeypatch):
    """Planted: what is left to be verified no longer comes from q. Its p-values are below 1e-6."""
    take_back(monkeypatch, drawn_against_the_odds)
    with pytest.raises(AssertionError, match="law"):
        check_law_under(LENGTHS[rule](), SAMPLED[0], tokens=4000)


def check_law_within_rounds(rule: object, tokens: int = 5000) -> None:
    """Under rejection, those of so many tokens that stand behind a kept draft have the target's law, which is the same at every place.

    Theirs is what depends on how far a rule drafts; the first token of a round only dilutes them. The draft has three laws, so that its signals differ.
    """
    p = [0.7, 0.25, 0.05]
    target, _ = context_free_pair(p, p, torch.float32)
    draft = BigramModel(torch.tensor([[0.25, 0.7, 0.05], [0.3, 0.4, 0.3], [0.15, 0.8, 0.05]]).log())
    _, stats = decode(target, draft, [0], policy=SAMPLED[0], gamma=rule, max_new_tokens=tokens, seed=3)
    within = torch.tensor([token for r in stats.rounds for token in r.tokens[1:]])
    assert len({r.proposed for r in stats.rounds}) > 1 and len(within) > tokens / 3
    assert chi_square_p(torch.bincount(within, minlength=len(p))[None], len(within) * torch.tensor([p])) > 1e-4, "law"


class PeeksAtAcceptance(OnSchedule):
    """Planted: drafts no further token where the number that will decide whether it is kept is large, so that its place is filled from p."""

    largest = 0.7

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        return super().goes_on(drafted, signals) and (drafted == 0 or self._next_number(drafted) < self.largest)

    def _next_number(self, drafted: int) -> float:
        place = self.this_round.starts[:, None] + drafted + 1
        return float(self.this_round.state.noise.uniform(place, Purpose.ACCEPT))


@pytest.mark.parametrize("rule", ["peeking", "adaptive"])
def test_a_signal_of_rejection_says_nothing_about_the_draw(rule, alternating, monkeypatch):
    """So even taking a token back because of its signal leaves the law as it is."""
    take_back(monkeypatch, lambda this_round: float(this_round.signals[-1]) < 0)
    check_law_under(LENGTHS[rule](), SAMPLED[0])


def test_law_within_rounds_of_an_adaptive_rule():
    check_law_within_rounds(LENGTHS["adaptive"]())


def test_a_rule_that_peeks_at_the_next_acceptance_breaks_the_law(monkeypatch):
    exact, rule = drafting.ChainRound.__init__, PeeksAtAcceptance(COSTS_OF_TEXTS)

    def begin(self, *arguments, **names):
        rule.this_round = self
        exact(self, *arguments, **names)

    monkeypatch.setattr(drafting.ChainRound, "__init__", begin)
    with pytest.raises(AssertionError, match="law"):
        check_law_within_rounds(rule)


def check_coupled_text(rule: object, policy: SamplingPolicy, tokens: int = 1500) -> None:
    """Coupled text is vanilla's."""
    target, draft = bigram_pair(dtype=torch.float32)
    settings = {"policy": policy, "max_new_tokens": tokens, "seed": 4}
    speculated, stats = decode(target, draft, [0], gamma=rule, verification="coupled", **settings)
    check_pauses(rule, [stats])
    assert speculated == decode(target, None, [0], **settings)[0], "text"


@pytest.mark.parametrize("rule", LENGTHS)
@pytest.mark.parametrize("policy", SAMPLED, ids=str)
def test_coupled_text_is_vanillas_under_every_rule(policy, rule, alternating):
    check_coupled_text(LENGTHS[rule](), policy)


@pytest.mark.parametrize("rule", LENGTHS)
def test_coupled_text_is_vanillas_whatever_is_taken_back(rule, alternating, monkeypatch):
    take_back(monkeypatch, drawn_against_the_odds)
    check_coupled_text(LENGTHS[rule](), SAMPLED[0])


def change_pauses(monkeypatch, vanilla: Callable) -> None:
    """Let rounds without drafts end in vanilla(exact, state, forward)."""
    exact = drafting.vanilla_round
    monkeypatch.setattr(drafting, "vanilla_round", lambda state, forward: vanilla(exact, state, forward))


def with_other_noise(exact: Callable, state, forward) -> list[RoundResult]:
    own, state.noise = state.noise, Noise.of(99, [0], state.target.device)
    results = exact(state, forward)
    state.noise = own
    return results


def without_its_token(exact: Callable, state, forward) -> list[RoundResult]:
    results = exact(state, forward)
    state.target.crop([length - 1 for length in state.target.lengths])
    return results


@pytest.mark.parametrize("rule", ["peeking", "adaptive"])
def test_other_noise_in_rounds_that_do_not_draft_shows_in_coupled_text(rule, alternating, monkeypatch):
    """Planted: the law is right, the text another."""
    change_pauses(monkeypatch, with_other_noise)
    check_law_under(LENGTHS[rule](), SAMPLED[0], tokens=1500)
    with pytest.raises(AssertionError, match="text"):
        check_coupled_text(LENGTHS[rule](), SAMPLED[0])


def check_llama_text(target, method: str, own_block: bool, policy: SamplingPolicy, verification: str) -> None:
    """One alternating rule serves several prompts, and their text is vanilla's."""
    rule = LENGTHS["adaptive"]()
    check_pauses(rule, check_same_text(target, noisy_exit(target, 2, own_block), policy, verification, count=3, gamma=rule, method=method))


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("policy", "verification"), [(GREEDY, "rejection"), (GREEDY, "coupled"), (SAMPLED[1], "coupled")])
def test_text_of_a_llama_is_vanillas_where_rounds_pause(policy, verification, method, own_block, alternating):
    check_llama_text(native_llama(), method, own_block, policy, verification)


@pytest.mark.parametrize("method", METHODS)
def test_a_pause_that_forgets_its_token_shows_in_greedy_text(method, alternating, monkeypatch):
    """Planted: the cache lacks the token that the round without drafts has fed."""
    change_pauses(monkeypatch, without_its_token)
    with pytest.raises((AssertionError, RuntimeError)):
        check_llama_text(native_llama(), method, False, GREEDY, "rejection")


@pytest.mark.parametrize("method", METHODS)
def test_texts_of_a_batch_are_vanillas_where_rounds_pause(method, alternating):
    """They share the rule, accept different numbers of drafted tokens and end at different times."""
    target, prompts = native_llama(), [[1], [2, 3, 4, 5, 6], [7] * 20]
    options = DecodeOptions(policy=SAMPLED[1], verification="coupled", max_new_tokens=40, seed=5)
    alone = [generate(target, prompt, options, prompt_id=i).tokens for i, prompt in enumerate(prompts)]
    ends = frozenset(alone[0][10:12])
    drafting_options = replace(options, method=method, gamma=LENGTHS["adaptive"](), eos_ids=ends)
    found = generate_batch(target, prompts, drafting_options, noisy_exit(target, 2, own_block=True))
    wanted = [generate(target, prompt, replace(options, eos_ids=ends), prompt_id=i).tokens for i, prompt in enumerate(prompts)]
    assert [generation.tokens for generation in found] == wanted and len({len(text) for text in wanted}) > 1
    assert {r.proposed > 0 for generation in found for r in generation.stats.rounds} == {True, False}


class LongPauses:
    """Drafts three tokens in every `every`-th round only."""

    wants_signals, longest = True, 3

    def __init__(self, every: int) -> None:
        self.every, self.rounds = every, 0

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        return self.rounds % self.every == self.every - 1 and drafted < 3

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        self.rounds += 1


def check_drafts_after_pauses(target, method: str, every: int) -> None:
    """A draft that equals the target has everything accepted, so it knows all tokens of the rounds that it slept through.

    Texts are exact without, whatever it has missed.
    """
    draft = TruncatedLlama(target, Exit(target, 3, ExitForm("last")))
    _, stats = decode(target, draft, [1, 2, 3], policy=SAMPLED[0], gamma=LongPauses(every), max_new_tokens=2 * (every + 3), method=method)
    drafted = [r for r in stats.rounds if r.proposed]
    assert len(drafted) >= 2 and all(r.accepted == r.proposed == 3 for r in drafted), "draft"


@pytest.mark.parametrize("every", [2, 5, 80])  # tokens that the draft has to catch up with: more than the widths whose buffers are kept, too
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("llama", [native_llama, tiny_llama])
def test_a_draft_knows_what_was_written_while_it_paused(llama, method, every):
    check_drafts_after_pauses(llama(), method, every)


@pytest.mark.parametrize("llama", [native_llama, tiny_llama])
def test_pauses_that_keep_no_hidden_states_show_in_what_is_accepted(llama, monkeypatch):
    """Planted: the exit's own block reads h_E of tokens that only vanilla rounds have seen."""
    exact = Stack.run

    def run(self, x, place, first=0, last=None, kept=None):
        is_pause = first == 0 and last is None and place.count == 1
        return exact(self, x, place, first, last, None if is_pause else kept)

    monkeypatch.setattr(Stack, "run", run)
    with pytest.raises(AssertionError, match="draft"):
        check_drafts_after_pauses(llama(), "self_speculative", 5)

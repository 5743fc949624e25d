"""Judge decoding: θ = 0 is exact decoding, what a judge may change and what not, and the known bugs of such code, planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import decoding.autojudge as autojudge
import decoding.drafting as drafting
from decoding.autojudge import LAW_FEATURES, Judge, TopK, judge_chain, law_features
from decoding.sampling import SamplingPolicy
from decoding.state import DecodeStats
from engine.static_llama import StaticLlama
from speculative import DecodeOptions, generate
from toy_models import check_batch, decode, native_llama, near_copy, noisy_exit, some_prompts, tiny_llama
from truncated_llama import TruncatedLlama

POLICIES = [SamplingPolicy(0.0), SamplingPolicy(0.9, top_p=0.95)]
LLAMAS = [native_llama, tiny_llama]  # through C++, and through torch
DRAFTS = {
    "exit": lambda target: noisy_exit(target, 2, scale=0.2), "own block": lambda target: noisy_exit(target, 2, own_block=True), "model": lambda target: near_copy(target, 0.1),
    "trimmed": lambda target: TruncatedLlama(target, noisy_exit(target, 2).exit.trimmed(torch.arange(1, 64, 2))),
}
EVERY_SIZE = ["target", "both", "law"]


def random_judge(target: nn.Module, features: str, threshold: float, **more: object) -> Judge:
    """A linear judge with random weights: its opinion means nothing, but depends on every feature."""
    size = {"target": 1, "both": 2}.get(features, 0) * target.config.hidden_size or LAW_FEATURES
    generator = torch.Generator().manual_seed(3)
    layer = torch.randn(1, size, generator=generator) / size**0.5, torch.randn(1, generator=generator)
    return Judge(torch.zeros(size), torch.ones(size), (layer,), threshold, features, **more)


def exactly_kept(threshold: float, features: str) -> float:
    """The threshold in the sense of the judge's mode."""
    return 1 - threshold if features == "law" else threshold


def judged(target: nn.Module, draft: nn.Module, judge: Judge | TopK, prompt: list[int], prompt_id: int = 0, **options: object) -> tuple[list[int], DecodeStats]:
    method = "topk" if isinstance(judge, TopK) else "autojudge"
    return decode(target, draft, prompt, prompt_id, **{"method": method, "judge": judge, "gamma": 4, "max_new_tokens": 32, "seed": 5, **options})


def shape(stats: DecodeStats) -> list[tuple]:
    return [(r.proposed, r.accepted, r.judged, r.overridden, r.tokens) for r in stats.rounds]


# ---- equalities: checks that the planted bugs share ----

def check_theta_0(target: nn.Module, draft: nn.Module, judge: Judge, policy: SamplingPolicy, verification: str, count: int = 4, **options: object) -> None:
    """With θ = 0 text and rounds are those of plain speculative decoding with the same draft."""
    settings = {"policy": policy, "verification": verification, "gamma": 4, "max_new_tokens": 32, "seed": 5, **options}
    plain = "self_speculative" if isinstance(draft, TruncatedLlama) and "engine" not in options else "speculative"
    asked = 0
    for prompt_id, prompt in enumerate(some_prompts(count)):
        wanted, wanted_stats = decode(target, draft, prompt, prompt_id, method=plain, **settings)
        found, stats = judged(target, draft, judge, prompt, prompt_id, **settings)
        assert found == wanted
        assert [(r.proposed, r.accepted) for r in stats.rounds] == [(r.proposed, r.accepted) for r in wanted_stats.rounds]
        assert not any(r.overridden for r in stats.rounds)
        asked += sum(r.judged for r in stats.rounds)
    assert asked > 0, "nothing was asked, so nothing is shown"


def check_end_of_text_spared(target: nn.Module, draft: nn.Module) -> None:
    """However lenient the judge, a token that ends the text stands only where exact decoding of that very prefix has it, and is not lost where it has it."""
    policy, ends = SamplingPolicy(0.0), 0
    for prompt_id, prompt in enumerate(some_prompts(8)):
        free, _ = judged(target, draft, TopK(None), prompt, prompt_id, policy=policy, max_new_tokens=48)
        eos_ids = frozenset(free[10:12])
        text, _ = judged(target, draft, TopK(None), prompt, prompt_id, policy=policy, max_new_tokens=48, eos_ids=eos_ids)
        with torch.inference_mode():
            greedy = target(input_ids=torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        ends += any(token in eos_ids for token in text)
        assert all((token in eos_ids) == (own in eos_ids) for token, own in zip(text, greedy, strict=True))
    assert ends > 0


def check_own_states(target: nn.Module, draft: nn.Module) -> None:
    """A judge is given, for each drafted token, the states behind that very token, as fresh passes over the text compute them."""
    given: list[torch.Tensor] = []
    predict = Judge.predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "predict", lambda self, features: given.append(features[0]) or predict(self, features))
        text = some_prompts(3)[2]
        _, stats = judged(target, draft, random_judge(target, "both", 0.5), text)
    engines = draft_engine(target, draft), StaticLlama(target, 128)
    for features, result in zip(given, stats.rounds, strict=True):
        kept = min(result.accepted, len(features))
        wanted = torch.cat([fresh_states(engine, text + result.tokens[:kept])[len(text) :] for engine in engines], -1)
        assert torch.allclose(features[:kept], wanted, atol=1e-3)
        text = text + result.tokens
    assert sum(r.accepted for r in stats.rounds) > 8


@torch.inference_mode()
def fresh_states(engine: StaticLlama, text: list[int]) -> torch.Tensor:
    """States (T, D) behind each token of `text`."""
    engine.start()
    engine.append(torch.tensor([text]))
    return engine.head.states()


def draft_engine(target: nn.Module, draft: nn.Module) -> StaticLlama:
    return StaticLlama(target, 128, parts=draft.parts()) if isinstance(draft, TruncatedLlama) else StaticLlama(draft, 128)


@pytest.mark.parametrize("llama", LLAMAS)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_theta_0_is_exact_decoding(llama, draft, policy, verification):
    target = llama()
    for features in EVERY_SIZE if llama is native_llama else ["both"]:
        check_theta_0(target, DRAFTS[draft](target), random_judge(target, features, exactly_kept(0, features)), policy, verification, 3)


def test_theta_0_through_transformers_engine():
    target = tiny_llama()
    check_theta_0(target, noisy_exit(target, 2), random_judge(target, "law", 1.0), POLICIES[1], "rejection", engine="transformers")
    with pytest.raises(ValueError, match="hidden states"):
        judged(target, noisy_exit(target, 2), random_judge(target, "target", 0.5), [1, 2], engine="transformers")


@pytest.mark.parametrize("features", EVERY_SIZE)
@pytest.mark.parametrize("draft", DRAFTS)
def test_theta_1_keeps_all_that_is_judged(features, draft):
    target = native_llama()
    judge = random_judge(target, features, exactly_kept(1, features))
    for policy in POLICIES:
        _, stats = judged(target, DRAFTS[draft](target), judge, [1, 2, 3], policy=policy)
        for r in stats.rounds:
            assert r.judged == r.overridden
            assert r.accepted >= r.proposed - (features == "both")  # the window's last token has no state of the draft's
    assert sum(r.overridden for r in stats.rounds) > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_any_rank_keeps_everything(policy, verification):
    target = native_llama()
    _, stats = judged(target, noisy_exit(target, 2, scale=0.3), TopK(None), [1, 2, 3], policy=policy, verification=verification)
    assert all(r.accepted == r.proposed for r in stats.rounds) and sum(r.overridden for r in stats.rounds) > 0
    _, again = judged(target, noisy_exit(target, 2, scale=0.3), TopK(64), [1, 2, 3], policy=policy, verification=verification)
    assert shape(again) == shape(stats)


@pytest.mark.parametrize("llama", LLAMAS)
def test_rank_1_is_greedy_decoding(llama):
    target = llama()
    for prompt_id, prompt in enumerate(some_prompts(4)):
        wanted, _ = decode(target, None, prompt, prompt_id, max_new_tokens=32)
        found, stats = judged(target, noisy_exit(target, 2, scale=0.3), TopK(1), prompt, prompt_id)
        assert found == wanted and not any(r.overridden for r in stats.rounds)


def test_ranks_grow_with_leniency():
    target = native_llama()
    kept = [sum(r.accepted for r in judged(target, noisy_exit(target, 2, scale=0.3), TopK(rank), [1, 2, 3])[1].rounds) / 32 for rank in (1, 4, None)]
    assert kept[0] < kept[-1]


def test_a_tie_goes_to_the_lower_id():
    logits = torch.tensor([[[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]]])
    ranks = [TopK(rank).scores(torch.tensor([[token]]), logits, None, None).item() for token, rank in ((1, 1), (2, 1), (2, 2), (0, 2))]
    assert ranks == [0, 1, 0, 1]


@pytest.mark.parametrize("draft", ["exit", "model"])
def test_end_of_text_is_the_exact_rules(draft):
    target = native_llama()
    check_end_of_text_spared(target, DRAFTS[draft](target))


def test_end_of_text_may_be_judged():
    target, ended = native_llama(), []
    for spare_eos in (True, False):
        texts = [judged(target, noisy_exit(target, 2, scale=0.3), TopK(None, spare_eos), prompt, eos_ids=frozenset(range(8)))[0] for prompt in some_prompts(6)]
        ended.append(texts)
    assert ended[0] != ended[1]


@pytest.mark.parametrize("draft", ["exit", "own block", "model"])
def test_states_are_the_drafted_tokens_own(draft):
    target = native_llama()
    check_own_states(target, DRAFTS[draft](target))


@pytest.mark.parametrize("features", EVERY_SIZE)
@pytest.mark.parametrize("draft", ["exit", "model"])
def test_a_batch_gives_each_text_what_it_gets_alone(features, draft):
    target = native_llama()
    check_batch(target, DRAFTS[draft](target), some_prompts(3), method="autojudge", judge=random_judge(target, features, 0.5), policy=POLICIES[1], max_new_tokens=24)


def test_one_target_call_per_round():
    target = native_llama()
    _, stats = judged(target, noisy_exit(target, 2), random_judge(target, "both", 0.5), [1, 2, 3])
    assert stats.target_calls == len(stats.rounds)


def test_features_of_the_drafts_law():
    logits = torch.tensor([[[0.0, 2.0, 1.0]]]).log_softmax(-1)
    law = logits[0, 0].exp()
    wanted = [law[2], law[1], law[2], law[1] - law[2], -(law * law.log()).sum(), 0.0, 0.5]
    assert torch.allclose(law_features(logits, torch.tensor([[7]]), torch.tensor([3, 5, 7]), 0.5)[0, 0], torch.tensor(wanted))


def test_place_in_the_window_counts_from_1(monkeypatch):
    """As where a judge was fitted: the last token's is 1."""
    given, predict, target = [], Judge.predict, native_llama()
    monkeypatch.setattr(Judge, "predict", lambda self, features: given.append(features[0, :, -1].tolist()) or predict(self, features))
    judged(target, noisy_exit(target, 2), random_judge(target, "law", 0.5), [1, 2, 3], max_new_tokens=8)
    assert given and all(places == [0.25, 0.5, 0.75, 1.0] for places in given)


# ---- the rule, by hand ----

KEPT = torch.tensor([[True, False, False, True]])
INSTEAD, DRAFTED = torch.tensor([[11, 12, 13, 14, 15]]), torch.tensor([[1, 2, 3, 4]])


def decision(scores: list[float], eos_ids: frozenset[int] = frozenset(), **judge: object) -> list[int]:
    """(kept, next token, asked, overridden) at θ = 0.5."""
    rule = replace(TopK(1), **judge)
    return judge_chain(rule, torch.tensor([scores]), KEPT, INSTEAD, DRAFTED, eos_ids)[0].tolist()


@pytest.mark.parametrize(("scores", "eos_ids", "wanted"), [
    ([0.0, 0.1, 0.2, 0.9], {99}, [4, 15, 2, 2]),  # both kept: the bonus
    ([0.9, 0.1, 0.9, 0.1], {99}, [2, 13, 2, 1]),  # where the exact rule keeps a token nobody is asked
    ([0.0, 0.9, 0.1, 0.1], {99}, [1, 12, 1, 0]),  # behind the first important one nothing is reached
    ([0.0, torch.nan, 0.1, 0.1], {99}, [1, 12, 0, 0]),  # no opinion
    ([0.0, 0.1, torch.nan, 0.1], {99}, [2, 13, 1, 1]),
    ([0.0, 0.1, 0.1, 0.1], {2}, [1, 12, 0, 0]),  # the drafted token would end the text
    ([0.0, 0.1, 0.1, 0.1], {13}, [2, 13, 1, 1]),  # the exact rule ends it
    ([0.0, 0.1, 0.1, 0.1], {1}, [4, 15, 0, 0]),  # ended by a kept token: what is behind counts for nothing
    ([0.5, 0.5, 0.5, 0.5], {99}, [1, 12, 1, 0]),  # strict
])
def test_decision(scores, eos_ids, wanted):
    assert decision(scores, frozenset(eos_ids)) == wanted


def test_decision_without_the_valve():
    assert decision([0.0, 0.1, 0.1, 0.1], frozenset({2}), spare_eos=False) == [4, 15, 1, 1]


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "autojudge"}, "needs a Judge"), ({"method": "topk", "judge": "judge"}, "needs a TopK"), ({"method": "vanilla", "judge": TopK(2)}, "has no judge"),
])
def test_a_judge_goes_with_its_methods(options, message):
    options = {name: random_judge(tiny_llama(), "law", 0.5) if value == "judge" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        DecodeOptions(**options)


def test_mistakes_are_told():
    target = tiny_llama()
    with pytest.raises(ValueError, match="threshold 1.5"):
        random_judge(target, "law", 1.5)
    with pytest.raises(ValueError, match="rank 0"):
        TopK(0)
    judge = random_judge(tiny_llama(hidden_size=64), "target", 0.5)
    with pytest.raises(ValueError, match="reads 64 features"):
        generate(target, [1], DecodeOptions(method="autojudge", judge=judge), noisy_exit(target, 2))


def test_lossy_methods_say_so():
    target = tiny_llama()
    assert not DecodeOptions(method="topk", judge=TopK(2)).lossless
    assert not DecodeOptions(method="autojudge", judge=random_judge(target, "law", 0.5)).lossless


# ---- planted bugs ----

def theta_0_everywhere() -> None:
    target = native_llama()
    for policy in POLICIES:
        for draft in (noisy_exit(target, 2, scale=0.2), near_copy(target, 0.03)):  # one that is mostly rejected, and one that is mostly kept
            check_theta_0(target, draft, random_judge(target, "target", 0.0), policy, "rejection")


def test_correction_from_p_instead_of_the_residual(monkeypatch):
    """A published draft-only judge falls back on p: at T > 0 a rejected token then comes back too often."""
    exact = drafting.chain_choices

    def from_p(verification, p, q, drafted, *rest):
        kept, _ = exact(verification, p, q, drafted, *rest)
        return kept, exact(verification, p, torch.zeros_like(q), drafted, *rest)[1]

    theta_0_everywhere()
    monkeypatch.setattr(drafting, "chain_choices", from_p)
    with pytest.raises(AssertionError):
        theta_0_everywhere()


def test_threshold_in_the_sense_of_the_other_mode(monkeypatch):
    monkeypatch.setattr(Judge, "theta", property(lambda self: 1 - self.threshold))
    with pytest.raises(AssertionError):
        theta_0_everywhere()


def test_no_bonus_behind_a_window_that_was_kept(monkeypatch):
    """The published loop leaves it out, and puts the target's token of the last place there."""
    exact = drafting.judge_chain

    def no_bonus(judge, scores, kept, instead, drafted, eos_ids):
        return exact(judge, scores, kept, torch.cat([instead[:, :-1], instead[:, -2:-1]], 1), drafted, eos_ids)

    monkeypatch.setattr(drafting, "judge_chain", no_bonus)
    with pytest.raises(AssertionError):
        theta_0_everywhere()


def test_judge_that_sees_the_position_before(monkeypatch):
    target, exact = native_llama(), Judge.scores
    monkeypatch.setattr(Judge, "scores", lambda self, drafted, logits, states, seen: exact(self, drafted, logits, states.roll(1, 1), seen))
    with pytest.raises(AssertionError):
        check_own_states(target, near_copy(target, 0.1))


def test_draft_states_of_the_next_token(monkeypatch):
    """A step's state belongs to the token that it was fed, not to the one that it drew."""
    target, exact = native_llama(), Judge.scores
    monkeypatch.setattr(Judge, "scores", lambda self, drafted, logits, states, seen: exact(self, drafted, logits, states, seen.roll(1, 1)))
    with pytest.raises(AssertionError):
        check_own_states(target, near_copy(target, 0.1))


def test_end_of_text_that_is_judged(monkeypatch):
    target = native_llama()
    monkeypatch.setattr(autojudge, "is_one_of", lambda tokens, ids: torch.zeros_like(tokens, dtype=torch.bool))
    with pytest.raises(AssertionError):
        check_end_of_text_spared(target, noisy_exit(target, 2, scale=0.2))

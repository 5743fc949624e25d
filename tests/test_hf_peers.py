"""transformers' own decoders as peers: our greedy text, honest counts, the policy and nothing else, and models left as they were."""

from __future__ import annotations

import pytest
import torch

from decoding.hf_peers import generation_config
from decoding.sampling import SamplingPolicy, policy_probs
from decoding.state import DecodeStats
from toy_models import chi_square_p, decode, noisy_exit, some_prompts, tiny_llama
from truncated_llama import Exit, TruncatedLlama

GREEDY, SAMPLED = SamplingPolicy(0.0), SamplingPolicy(1.0)
PEERS, DRAFTING = ["hf_generate", "hf_assisted", "hf_early_exit"], ["hf_assisted", "hf_early_exit"]
GAMMA, NEW_TOKENS = 3, 18


@pytest.fixture
def target():
    return tiny_llama()


def exit_like_the_target(target) -> TruncatedLlama:
    return TruncatedLlama(target, Exit(target, 3))


def hf(target, method: str, draft=None, prompt: list[int] | None = None, **options: object) -> tuple[list[int], DecodeStats]:
    """Tokens and stats of one generation."""
    settings = {"policy": GREEDY, "gamma": GAMMA, "max_new_tokens": NEW_TOKENS, **options}
    return decode(target, draft or noisy_exit(target, 1, scale=0.02), prompt or [1, 2, 3], method=method, **settings)


def vanilla(target, prompt: list[int] | None = None, **options: object) -> list[int]:
    return decode(target, None, prompt or [1, 2, 3], **{"max_new_tokens": NEW_TOKENS, **options})[0]


# ---- texts ----

@pytest.mark.parametrize("method", PEERS)
def test_greedy_text_is_ours(target, method):
    for exit_ in ((1, False), (2, False), (2, True)):
        draft = noisy_exit(target, *exit_, scale=0.02)
        for prompt in some_prompts(2):
            assert hf(target, method, draft, prompt)[0] == vanilla(target, prompt)


def test_greedy_text_with_an_independent_assistant_is_ours(target):
    assert hf(target, "hf_assisted", tiny_llama(seed=9, num_hidden_layers=1))[0] == vanilla(target)


@pytest.mark.parametrize("method", PEERS)
def test_text_ends_where_ours_does(target, method):
    """At the first of the given ends. Which end the model's own configuration names does not matter."""
    text = vanilla(target)
    target.generation_config.eos_token_id = text[3]
    ends = frozenset(text[8:10])
    assert hf(target, method, eos_ids=ends)[0] == vanilla(target, eos_ids=ends) == text[: 1 + min(map(text.index, ends))]
    assert hf(target, method)[0] == text


@pytest.mark.parametrize("method", PEERS)
def test_seed_names_the_text_and_nothing_else_is_drawn_from(target, method):
    before = torch.random.get_rng_state()
    first, again, other = (hf(target, method, policy=SAMPLED, seed=seed)[0] for seed in (5, 5, 6))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- counts ----

def count_whole_passes(target) -> list[int]:
    """Grows by one whenever the target's last block is run: a draft of its first blocks does not come so far."""
    passes: list[int] = []
    target.model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("policy", [GREEDY, SAMPLED], ids=str)
@pytest.mark.parametrize("method", PEERS)
def test_every_target_call_is_counted(target, method, policy):
    passes = count_whole_passes(target)
    tokens, stats = hf(target, method, noisy_exit(target, 1, scale=0.02), policy=policy)
    assert stats.target_calls == len(passes) - 3 and stats.emitted == len(tokens)  # a pass is the prefill's, and two see that logits are finite
    assert stats.prompt_tokens == 3 and stats.wall_s > stats.decode_s > 0 and stats.seconds["prefill"] > 0


@pytest.mark.parametrize("method", DRAFTING)
def test_a_round_makes_no_more_than_its_drafts_and_one(target, method):
    _, stats = hf(target, method, max_new_tokens=40)
    lengths = [len(r.tokens) for r in stats.rounds]
    assert set(lengths) <= set(range(1, GAMMA + 2)) and len(set(lengths)) > 1 and 1 <= stats.with_prefill <= GAMMA + 1


@pytest.mark.parametrize("ends", [
    pytest.param(frozenset(), id="endless"),
    pytest.param(frozenset({63}), id="ends"),
])
@pytest.mark.parametrize("policy", [GREEDY, SAMPLED], ids=str)
@pytest.mark.parametrize("gamma", [1, 3])
@pytest.mark.parametrize("method", DRAFTING)
def test_exit_like_the_target_has_everything_accepted(target, method, gamma, policy, ends):
    """Every call makes γ + 1 tokens, but for the last. So it is where texts have no end, too: no token may pass for padding."""
    for prompt_id, prompt in enumerate(some_prompts(3)):
        tokens, stats = decode(target, exit_like_the_target(target), prompt, prompt_id, method=method, policy=policy, gamma=gamma, max_new_tokens=32, eos_ids=ends)
        assert stats.target_calls == -(-len(tokens) // (gamma + 1)) - 1 and stats.with_prefill == gamma + 1


def test_one_token_comes_with_the_prefill(target):
    tokens, stats = hf(target, "hf_generate", max_new_tokens=1)
    assert len(tokens) == stats.emitted == stats.with_prefill == 1 and stats.timed == 0


@pytest.mark.parametrize("method", PEERS)
def test_rounds_are_those_that_decoding_seconds_cover(target, method):
    """DecodeStats: rounds and calls are after the prefill; commands/sweep_settings.py divides decode_s by them."""
    _, stats = hf(target, method)
    assert sum(len(r.tokens) for r in stats.rounds) == stats.timed


# ---- the policy ----

@pytest.mark.parametrize("policy", [GREEDY, SamplingPolicy(1.0), SamplingPolicy(0.7, top_p=0.95), SamplingPolicy(1.3, top_k=7)], ids=str)
def test_policy_in_transformers_words(policy):
    """top_k is named though it is off: transformers' own default is 50."""
    config = generation_config(policy, 9, frozenset({4, 2}))
    assert config.max_new_tokens == 9 and config.eos_token_id == [2, 4] and config.do_sample == (policy.temperature > 0)
    if config.do_sample:
        assert (config.temperature, config.top_k, config.top_p) == (policy.temperature, policy.top_k, policy.top_p)


def tokens_below_the_first_50(target, tokens: list[int], prompt: list[int]) -> int:
    """How many of `tokens` behind `prompt` were less likely than 50 others."""
    logits = target(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return int(((logits > logits.gather(1, torch.tensor(tokens)[:, None])).sum(1) >= 50).sum())


@pytest.mark.parametrize("method", PEERS)
def test_sampling_keeps_what_the_policy_keeps(target, method):
    """At temperature 4 one in ten tokens of 64 is none of the first 50. Planted: top_k 50, as transformers has it where nothing is said."""
    for policy, found in ((SamplingPolicy(4.0), True), (SamplingPolicy(4.0, top_k=50), False)):
        tokens, _ = hf(target, method, policy=policy, max_new_tokens=60)
        assert (tokens_below_the_first_50(target, tokens, [1, 2, 3]) > 0) == found


@pytest.mark.parametrize("policy", [SAMPLED, SamplingPolicy(1.5, top_k=6, top_p=0.9)], ids=str)
def test_first_token_has_the_law_of_the_policy(target, policy):
    """Over 200 generations, and not that of another temperature."""
    law = policy_probs(target(torch.tensor([[1, 2, 3]])).logits[0, -1:], policy)
    tokens = [hf(target, "hf_generate", policy=policy, max_new_tokens=1, seed=seed)[0][0] for seed in range(200)]
    counts = torch.bincount(torch.tensor(tokens), minlength=64)[None]
    assert not counts[law == 0].any() and chi_square_p(counts, 200 * law) > 1e-4
    other = policy_probs(target(torch.tensor([[1, 2, 3]])).logits[0, -1:], SamplingPolicy(0.4))
    assert chi_square_p(counts, 200 * other) < 1e-4


@pytest.mark.parametrize("method", PEERS)
def test_the_models_own_generation_settings_change_nothing(target, method):
    """Chat models come with a temperature, a top_p, and sometimes with a penalty that would change the greedy text."""
    text = vanilla(target)
    for name, value in (("repetition_penalty", 3.0), ("no_repeat_ngram_size", 1), ("temperature", 0.1), ("top_k", 1), ("do_sample", True)):
        setattr(target.generation_config, name, value)
    assert hf(target, method)[0] == text
    assert tokens_below_the_first_50(target, hf(target, method, policy=SamplingPolicy(4.0), max_new_tokens=60)[0], [1, 2, 3]) > 0


# ---- what is left behind ----

def broken(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", PEERS)
def test_models_are_as_they_were(target, method, fails, monkeypatch):
    """Also behind a decoding that fails half-way: early exit shortens the target for as long as it drafts."""
    own, settings, layers = target.generation_config, target.generation_config.to_dict(), target.config.num_hidden_layers
    draft = noisy_exit(target, 1, scale=0.02)
    if fails:
        monkeypatch.setattr(target.model.layers[1], "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            hf(target, method, draft)
    else:
        hf(target, method, draft)
    assert target.generation_config is own and own.to_dict() == settings and target.config.num_hidden_layers == layers

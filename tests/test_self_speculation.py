"""An exit on the target's own blocks: vanilla's text for every exit, caches as a fresh prefill leaves them, nothing computed twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from decoding.drafting import ChainRound
from decoding.sampling import SamplingPolicy, policy_probs
from decoding.state import DecodeState, RoundResult
from engine import native
from engine.shared_exit import SharedExit
from engine.static_llama import KEPT_WIDTHS, PREFILL_CHUNK, REACH_STEP, Span, Stack, StaticLlama
from measuring import metrics
from speculative import DecodeOptions, generate, generate_batch
from toy_models import check_batch, chi_square_p, decode, native_llama, noisy_exit, random_text, same_layers, some_prompts, tiny_llama
from truncated_llama import Exit, ExitForm, TruncatedLlama

GREEDY, SAMPLED, NUCLEUS = SamplingPolicy(0.0), SamplingPolicy(1.0), SamplingPolicy(0.7, top_p=0.95)
LLAMAS = {"cpp": native_llama, "torch": tiny_llama}  # in fp32 through C++, in fp64 through torch
EXITS = [(0, False), (1, False), (2, False), (3, False), (0, True), (2, True), (3, True)]  # layer, and whether it has a block of its own
BLOCKS = 4


@pytest.fixture(params=LLAMAS)
def target(request):
    return LLAMAS[request.param]()


def exit_like_the_target(target, own_block: bool = False) -> TruncatedLlama:
    """An exit that drafts what the target would say."""
    return TruncatedLlama(target, Exit(target, BLOCKS - 1, ExitForm("last" if own_block else "none")))


# ---- texts ----

@pytest.mark.parametrize("exit_", EXITS, ids=str)
@pytest.mark.parametrize("llama", LLAMAS)
def test_text_is_vanillas(llama, exit_):
    """Coupled at every temperature; greedy under both verifications, and transformers' too."""
    target = LLAMAS[llama]()
    draft = noisy_exit(target, *exit_)
    for prompt_id, prompt in enumerate(some_prompts(3 if llama == "cpp" else 1)):
        for policy in (GREEDY, NUCLEUS, SAMPLED):
            settings = {"policy": policy, "max_new_tokens": 20, "seed": 5}
            vanilla, _ = decode(target, None, prompt, prompt_id, **settings)
            if policy == GREEDY:
                ids = torch.tensor([prompt])
                assert vanilla == target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()
            for gamma in (1, 2, 5):
                for verification in ("coupled", "rejection") if policy == GREEDY else ("coupled",):
                    settings_now = {**settings, "gamma": gamma, "verification": verification}
                    assert decode(target, draft, prompt, prompt_id, method="self_speculative", **settings_now)[0] == vanilla


def test_coupled_text_is_vanillas_over_200_prompts():
    target = native_llama(num_hidden_layers=2)
    draft = noisy_exit(target, 1, own_block=True, scale=0.02)
    proposed = accepted = 0
    for prompt_id, prompt in enumerate(some_prompts(200)):
        settings = {"policy": SAMPLED, "max_new_tokens": 64, "verification": "coupled"}
        speculated, stats = decode(target, draft, prompt, prompt_id, method="self_speculative", **settings)
        assert speculated == decode(target, None, prompt, prompt_id, **settings)[0]
        proposed, accepted = proposed + sum(r.proposed for r in stats.rounds), accepted + sum(r.accepted for r in stats.rounds)
    assert 0.1 < accepted / proposed < 0.9


@pytest.mark.parametrize("exit_", EXITS, ids=str)
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_rounds_are_those_of_an_independent_draft(target, exit_, verification):
    """Sharing blocks changes what is computed, not what is drafted or kept."""
    draft = noisy_exit(target, *exit_, scale=0.02)
    for prompt_id, prompt in enumerate(some_prompts(3)):
        settings = {"policy": NUCLEUS, "max_new_tokens": 24, "gamma": 3, "verification": verification}
        shared, apart = (decode(target, draft, prompt, prompt_id, method=method, **settings) for method in ("self_speculative", "speculative"))
        assert shared[0] == apart[0]
        assert [(r.tokens, r.proposed, r.accepted) for r in shared[1].rounds] == [(r.tokens, r.proposed, r.accepted) for r in apart[1].rounds]


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_exit_like_the_target_has_everything_accepted(target, verification, own_block):
    draft = exit_like_the_target(target, own_block)
    for policy in (GREEDY, NUCLEUS, SAMPLED):
        for prompt_id, prompt in enumerate(some_prompts(6)):
            settings = {"policy": policy, "max_new_tokens": 16, "gamma": 3, "verification": verification}
            _, stats = decode(target, draft, prompt, prompt_id, method="self_speculative", **settings)
            assert all(r.accepted == r.proposed for r in stats.rounds)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100, 400, PREFILL_CHUNK + 40])
def test_prompts_of_any_length(length):
    target = native_llama(max_position_embeddings=1024)
    draft = noisy_exit(target, 2, own_block=True)
    prompt = random_text(length)[0].tolist()
    for policy in (GREEDY, SAMPLED):
        settings = {"policy": policy, "max_new_tokens": 16, "verification": "coupled"}
        speculated, _ = decode(target, draft, prompt, method="self_speculative", **settings)
        assert speculated == decode(target, None, prompt, **settings)[0]


class Pause:
    """Drafts nothing for so many rounds, then two tokens in each."""

    longest, wants_signals = 2, False

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        return self.rounds <= 0 and drafted < self.longest

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        self.rounds -= 1


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("method", ["self_speculative", "speculative"])
@pytest.mark.parametrize("texts", [1, 2])
def test_drafting_after_a_long_pause(target, method, own_block, texts):
    """What the draft has not seen meanwhile is more than a pass on a device may take: afterwards everything is kept all the same."""
    prompts = [random_text(REACH_STEP - KEPT_WIDTHS - 2 - text, seed=text)[0].tolist() for text in range(texts)]
    settings = {"policy": SAMPLED, "max_new_tokens": KEPT_WIDTHS + 60}
    vanilla = generate_batch(target, prompts, DecodeOptions(**settings))
    for rounds in (2, 3, KEPT_WIDTHS + 20):
        options = DecodeOptions(method=method, gamma=Pause(rounds), verification="coupled", **settings)
        drafted = generate_batch(target, prompts, options, exit_like_the_target(target, own_block))
        assert [generation.tokens for generation in drafted] == [generation.tokens for generation in vanilla]
        found = [r for generation in drafted for r in generation.stats.rounds]
        assert [r.proposed for r in found[:rounds]] == [0] * rounds
        assert all(r.accepted == r.proposed for r in found) and sum(r.proposed for r in found) > 20


# ---- caches ----

def check_caches(state: DecodeState, target, draft) -> None:
    """Every block's keys and values, the exit's own block's and the kept h_E are those of a fresh prefill of the same tokens."""
    shared, text = state.draft, state.committed[0]
    assert shared.target.lengths == [len(text) - 1]
    assert len(text) - 2 <= shared.lengths[0] <= len(text) - 1
    fresh = SharedExit(StaticLlama(target, len(text)), draft.exit)
    fresh.prefill([text[:-1]])
    tolerance = 1e-4 if target.dtype == torch.float32 else 1e-12
    assert same_layers(shared.target.layers(), fresh.target.layers(), tolerance)
    held = shared.lengths[0]
    wholes = [(shared.kept.store[:, : len(text) - 1], fresh.kept.store[:, : len(text) - 1])]
    if shared.own is not None:
        wholes += [(now[..., :held, :], then[..., :held, :]) for now, then in zip(shared.own.cache.halves(), fresh.own.cache.halves(), strict=True)]
    assert same_layers([(now,) for now, _ in wholes], [(then,) for _, then in wholes], tolerance)


def after_every_round(monkeypatch, check) -> list[int]:
    """Call check(state) after every round; returns a list that grows by one in each."""
    rounds: list[int] = []
    plain = DecodeState.roll_back

    def roll_back(state):
        plain(state)
        rounds.append(len(rounds))
        check(state)

    monkeypatch.setattr(DecodeState, "roll_back", roll_back)
    return rounds


@pytest.mark.parametrize("exit_", [(1, False), (3, False), (0, True), (2, True)], ids=str)
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_caches_equal_a_fresh_prefill_after_every_round(target, exit_, verification, monkeypatch):
    draft = noisy_exit(target, *exit_, scale=0.02)
    rounds = after_every_round(monkeypatch, lambda state: check_caches(state, target, draft))
    _, stats = decode(target, draft, [1, 2, 3], method="self_speculative", policy=NUCLEUS, verification=verification, gamma=3, max_new_tokens=24)
    assert len(rounds) == len(stats.rounds)


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("wrong", [0, 1, 2, 3, None])
def test_caches_after_a_rejection_at_each_position(target, own_block, wrong, monkeypatch):
    """An exit like the target drafts a wrong token at one place, so every round ends there; without one, every round keeps all."""
    draft = exit_like_the_target(target, own_block)
    vanilla, _ = decode(target, None, [1, 2, 3], policy=SAMPLED, max_new_tokens=21)
    exact = ChainRound.draw_draft

    def mistaken(self, logits, noise, starts, index):
        tokens, *rest = exact(self, logits, noise, starts, index)
        return (tokens + 1) % 64 if index == wrong else tokens, *rest

    monkeypatch.setattr(ChainRound, "draw_draft", mistaken)
    rounds = after_every_round(monkeypatch, lambda state: check_caches(state, target, draft))
    tokens, stats = decode(target, draft, [1, 2, 3], method="self_speculative", policy=SAMPLED, verification="coupled", gamma=4, max_new_tokens=21)
    assert [r.accepted for r in stats.rounds] == [4 if wrong is None else wrong] * len(rounds)
    assert tokens == vanilla


# ---- counts and work ----

def count_rows(monkeypatch) -> Counter:
    """(stack, block, position) -> how often a row of one text went through that block there, from now on."""
    seen: Counter = Counter()
    plain = Stack.run

    def run(self, x, place, first=0, last=None, kept=None):
        assert isinstance(place, Span) and len(x) == place.count
        for block in range(first, len(self.blocks) if last is None else last):
            seen.update((id(self), block, place.start + i) for i in range(place.count))
        return plain(self, x, place, first, last, kept)

    monkeypatch.setattr(Stack, "run", run)
    return seen


@pytest.mark.parametrize("gamma", [1, 2, 5])
@pytest.mark.parametrize("exit_", [(0, False), (2, False), (3, False), (0, True), (2, True)], ids=str)
def test_every_round_does_the_work_that_it_counts(target, exit_, gamma, monkeypatch):
    """(γ+1)·E + (L−E)·(γ+1) rows of the target's blocks a round; of the own block γ, and one more behind a round that kept all."""
    draft = noisy_exit(target, *exit_, scale=0.01)
    seen, sums, counted = count_rows(monkeypatch), [], []

    def note(state):
        sums.append(sum(seen.values()))
        counted.append(state.draft.block_tokens)

    after_every_round(monkeypatch, note)
    tokens, stats = decode(target, draft, [1, 2, 3, 4], method="self_speculative", policy=SAMPLED, gamma=gamma, max_new_tokens=40)
    own, prompt = draft.exit.block is not None, 3
    wanted, behind = prompt * (BLOCKS + own), 0
    for r, total, in_count in zip(stats.rounds, sums, counted, strict=True):
        wanted += (gamma + 1) * BLOCKS + own * (gamma + behind)
        behind = r.accepted == gamma
        assert total == wanted and in_count == wanted - prompt * (BLOCKS + own)
    assert stats.target_calls == len(stats.rounds) and stats.draft_calls == sum(r.proposed for r in stats.rounds) == gamma * len(stats.rounds)
    assert stats.target_tokens == (gamma + 1) * len(stats.rounds) and stats.draft_tokens == stats.draft_calls
    assert stats.emitted == len(tokens) == 40


@pytest.mark.parametrize("own_block", [False, True])
def test_nothing_is_computed_twice(target, own_block, monkeypatch):
    """Where everything is kept, each block sees each position once, from the first token of the prompt to the last."""
    draft = exit_like_the_target(target, own_block)
    seen = count_rows(monkeypatch)
    tokens, stats = decode(target, draft, [1, 2, 3, 4], method="self_speculative", policy=SAMPLED, gamma=3, max_new_tokens=24)
    assert len(tokens) == 24 and all(r.accepted == 3 for r in stats.rounds)
    assert set(seen.values()) == {1}
    stacks = {stack for stack, _, _ in seen}
    assert len(stacks) == 1 + own_block
    for stack in stacks:
        blocks = {block for of, block, _ in seen if of == stack}
        positions = [{position for of, b, position in seen if of == stack and b == block} for block in blocks]
        assert len(blocks) in (1, BLOCKS) and all(len(found) == max(found) + 1 >= 26 for found in positions)


# ---- where a text ends ----

@pytest.mark.parametrize("method", ["vanilla", "speculative", "self_speculative"])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_generation_ends_at_the_first_of_several_eos_ids(target, method, verification):
    draft = None if method == "vanilla" else noisy_exit(target, 2, own_block=True, scale=0.01)
    settings = {"policy": SAMPLED, "verification": verification, "max_new_tokens": 30, "gamma": 4, "method": method}
    for prompt_id in range(6):
        full, _ = decode(target, draft, [5, 6], prompt_id, **settings)
        ends = frozenset(full[10:12])
        cut, stats = decode(target, draft, [5, 6], prompt_id, eos_ids=ends, **settings)
        assert cut == full[: 1 + next(i for i, token in enumerate(full) if token in ends)]
        assert stats.emitted == len(cut) and not any(token in ends for r in stats.rounds for token in r.tokens[: r.accepted - 1])


@pytest.mark.parametrize("method", ["vanilla", "speculative", "self_speculative"])
@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_stop_and_length_cut_committed_tokens(target, method, count):
    draft = None if method == "vanilla" else noisy_exit(target, 2, own_block=True, scale=0.01)
    settings = {"policy": SAMPLED, "verification": "coupled", "gamma": 4, "method": method}
    full, _ = decode(target, draft, [5], max_new_tokens=30, **settings)
    assert decode(target, draft, [5], max_new_tokens=count, **settings)[0] == full[:count]
    stopped, stats = decode(target, draft, [5], max_new_tokens=30, stop=lambda tokens: len(tokens) == count, **settings)
    assert stopped == full[: count - 1] and stats.emitted == count - 1
    streamed: list[int] = []
    generate(target, [5], DecodeOptions(max_new_tokens=30, **settings), draft, on_tokens=streamed.extend)
    assert streamed == full


@pytest.mark.parametrize("method", ["vanilla", "speculative", "self_speculative"])
def test_what_exactly_fits_the_context(target, method):
    """512 positions: prompt, new tokens and, where drafted tokens run ahead, γ."""
    draft = None if method == "vanilla" else noisy_exit(target, 2, own_block=True)
    ahead = 0 if draft is None else 4
    options = DecodeOptions(method=method, policy=GREEDY, gamma=4, max_new_tokens=30, verification="coupled")
    prompt = random_text(512 - 30 - ahead)[0].tolist()
    assert generate(target, prompt, options, draft).tokens == decode(target, None, prompt, policy=GREEDY, max_new_tokens=30)[0]
    with pytest.raises(ValueError, match="exceed the context of 512"):
        generate(target, [1, *prompt], options, draft)


# ---- batches ----

PROMPTS = [[1], [2, 3, 4, 5, 6], [9] * 40, random_text(120)[0].tolist(), [7, 7]]


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("method", ["vanilla", "speculative", "head only", "own block"])
def test_batch_gives_each_text_what_it_gets_alone(target, method, verification):
    """Prompts of 1 to 120 tokens that keep different numbers of drafted tokens and end at different times."""
    draft = None if method == "vanilla" else noisy_exit(target, 2, own_block=method != "head only", scale=0.01)
    method = "self_speculative" if method in ("head only", "own block") else method
    settings = {"method": method, "policy": NUCLEUS, "verification": verification, "gamma": 3, "max_new_tokens": 20}
    check_batch(target, draft, PROMPTS, **settings)
    ends = frozenset(generate(target, PROMPTS[1], DecodeOptions(**settings), draft, prompt_id=1).tokens[4:6])
    lengths = [len(generation.tokens) for generation in generate_batch(target, PROMPTS, DecodeOptions(eos_ids=ends, **settings), draft)]
    assert len(set(lengths)) > 1
    check_batch(target, draft, PROMPTS, eos_ids=ends, **settings)


@pytest.mark.parametrize("method", ["vanilla", "speculative", "self_speculative"])
def test_text_of_a_batch_that_ends_before_it_begins(target, method):
    """`stop` leaves a prompt of one token with nothing behind it, while another text goes on."""
    draft = None if method == "vanilla" else exit_like_the_target(target, own_block=True)
    first = decode(target, None, [1], policy=SAMPLED, max_new_tokens=1)[0]
    settings = {"method": method, "policy": SAMPLED, "verification": "coupled", "gamma": 3, "max_new_tokens": 20}
    check_batch(target, draft, [[1], [2, 3, 4, 5, 6]], stop=lambda tokens: tokens == first, **settings)
    check_batch(target, draft, [[1], [2, 3, 4, 5, 6]], **settings)


@pytest.mark.parametrize("method", ["vanilla", "speculative", "self_speculative"])
def test_batch_beyond_a_dynamic_ntk_models_length(method):
    """Each text is rotated by its own length, not by the first one's."""
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, "max_position_embeddings": 64}
    target = tiny_llama(**rope)
    draft = None if method == "vanilla" else noisy_exit(target, 2, own_block=True)
    check_batch(target, draft, [random_text(90)[0].tolist(), [1, 2, 3], random_text(70, seed=1)[0].tolist()],
                method=method, policy=SAMPLED, verification="coupled", max_new_tokens=20)


class Learns(Pause):
    """Keeps what it is told."""

    wants_signals = True

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        self.told = [*getattr(self, "told", []), (len(results), {len(signal) for signal in signals})]


def test_ended_texts_of_a_batch_teach_nothing(target):
    options = {"method": "self_speculative", "policy": SAMPLED, "max_new_tokens": 40}
    first = generate(target, PROMPTS[0], DecodeOptions(**options), noisy_exit(target, 2)).tokens[0]
    rule = Learns(0)
    ended, other = generate_batch(target, PROMPTS[:2], DecodeOptions(gamma=rule, eos_ids=frozenset({first}), **options), noisy_exit(target, 2))
    assert len(ended.stats.rounds) == 1 < len(other.stats.rounds) == len(rule.told)
    assert rule.told[0] == (2, {2}) and set(map(str, rule.told[1:])) == {"(1, {1})"}


def test_names_of_a_batch():
    target = native_llama()
    options = DecodeOptions(policy=SAMPLED, max_new_tokens=8)
    got: list[list[int]] = [[], []]
    found = generate_batch(target, [[1], [2]], options, prompt_ids=[7, 3], on_tokens=lambda row, tokens: got[row].extend(tokens))
    assert [g.tokens for g in found] == got == [generate(target, [prompt], options, prompt_id=i).tokens for prompt, i in ((1, 7), (2, 3))]
    for ids in ([7], [7, 3, 1]):  # the C++ would read noise keys behind the end
        with pytest.raises(ValueError, match="prompt_ids"):
            generate_batch(target, [[1], [2]], options, prompt_ids=ids)


# ---- a draft that knows fewer tokens ----

def trimmed(target, keep: int, own_block: bool = False, scale: float = 0.02) -> TruncatedLlama:
    """An exit whose head has every 64/keep-th token only."""
    exit_ = noisy_exit(target, BLOCKS - 1, own_block, scale).exit
    return TruncatedLlama(target, exit_.trimmed(torch.arange(0, 64, 64 // keep)))


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("method", ["self_speculative", "speculative"])
def test_trimmed_vocabulary_coupled(target, method, own_block):
    draft = trimmed(target, 32, own_block)
    accepted = 0
    for prompt_id, prompt in enumerate(some_prompts(2)):
        for policy in (GREEDY, NUCLEUS, SAMPLED):
            settings = {"policy": policy, "verification": "coupled", "max_new_tokens": 24, "gamma": 2}
            speculated, stats = decode(target, draft, prompt, prompt_id, method=method, **settings)
            assert speculated == decode(target, None, prompt, prompt_id, **settings)[0]
            accepted += sum(r.accepted for r in stats.rounds)
            drafted = [token for r in stats.rounds for token in r.tokens[: r.accepted]]
            assert all(token % 2 == 0 for token in drafted)
    assert accepted > 10


@pytest.mark.parametrize("method", ["self_speculative", "speculative"])
def test_trimmed_vocabulary_has_the_acceptance_of_its_distributions(method):
    """|z| of Σ min(p, q) over 2000 positions, with q 0 for the tokens that the draft does not know."""
    target = native_llama()
    draft, policy = trimmed(target, 32, scale=0.05), SamplingPolicy(1.5)
    runs = [decode(target, draft, [1, 2, i], i, method=method, policy=policy, gamma=2, max_new_tokens=200, record_overlap=True)[1] for i in range(15)]
    assert sum(r.tested for stats in runs for r in stats.rounds) > 2000
    assert abs(metrics.acceptance_z(runs)) < 4
    assert 0.1 < metrics.speculation_metrics(runs, longest=2)["spec_overlap"] < 0.9


def test_trimmed_vocabulary_leaves_the_law_as_it_is():
    """The first two tokens behind a fixed prompt, over 1200 generations: tokens that the draft does not know are as likely as ever."""
    target = native_llama()
    draft, policy, runs = trimmed(target, 16, scale=0.05), SamplingPolicy(1.5), 1200
    texts = torch.tensor([decode(target, draft, [1, 2, 3], i, method="self_speculative", policy=policy, gamma=1, max_new_tokens=2)[0] for i in range(runs)])
    with torch.inference_mode():
        first = policy_probs(target(torch.tensor([[1, 2, 3]])).logits[0, -1], policy)
        rows = torch.cat([torch.tensor([[1, 2, 3]]).expand(64, -1), torch.arange(64)[:, None]], 1)
        second = first @ policy_probs(target(rows).logits[:, -1], policy)
    for tokens, law in zip(texts.t(), (first, second), strict=True):
        assert chi_square_p(torch.bincount(tokens, minlength=64)[None], runs * law[None]) > 1e-4


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_draft_that_knows_all_tokens_by_name_is_the_draft(target, verification):
    draft = noisy_exit(target, 2, own_block=True, scale=0.02)
    named = TruncatedLlama(target, draft.exit.trimmed(torch.arange(64)))
    settings = {"method": "self_speculative", "policy": NUCLEUS, "verification": verification, "max_new_tokens": 24}
    plain, by_name = (decode(target, model, [1, 2, 3], **settings) for model in (draft, named))
    assert plain[0] == by_name[0] and [r.accepted for r in plain[1].rounds] == [r.accepted for r in by_name[1].rounds]


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_trimmed_vocabulary_in_a_batch(target, verification):
    check_batch(target, trimmed(target, 32, own_block=True), PROMPTS, method="self_speculative", policy=NUCLEUS, verification=verification, max_new_tokens=16)


# ---- bits ----

def test_trimmed_vocabulary_moves_with_its_exit(target):
    assert trimmed(target, 32).exit.to("meta").token_ids.device.type == "meta"


def test_bf16_text_is_vanillas_through_cpp():
    """A row gets the same bits in passes of any width, so not even near ties flip."""
    target = native_llama().bfloat16()
    draft = noisy_exit(target, 2, own_block=True)
    assert native.UP_TO[torch.bfloat16] >= 6
    for prompt_id, prompt in enumerate(some_prompts(20)):
        settings = {"policy": SAMPLED, "max_new_tokens": 40, "verification": "coupled", "gamma": 5}
        for method in ("self_speculative", "speculative"):
            assert decode(target, draft, prompt, prompt_id, method=method, **settings)[0] == decode(target, None, prompt, prompt_id, **settings)[0]

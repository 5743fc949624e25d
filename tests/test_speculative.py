"""The public door: exact output for every draft, honest counters, cuts at end-of-text, stop and length."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from decoding.common_sense import CommonSense
from decoding.dynamic_tree import DynamicTree
from decoding.sampling import SamplingPolicy
from decoding.specexec import SpecExec
from decoding.state import DecodeState
from measuring import metrics
from speculative import DecodeOptions, _new_engine, generate, generate_batch
from toy_models import (
    COUPLED_TREES,
    TREES,
    bigram_pair,
    check_all_accepted,
    check_first_two_tokens,
    check_law,
    check_same_text,
    decode,
    native_llama,
    noisy_exit,
    same_layers,
    some_prompts,
    tiny_llama,
)
from truncated_llama import Exit, TruncatedLlama

SAMPLED = [SamplingPolicy(0.7, top_p=0.95), SamplingPolicy(1.0), SamplingPolicy(1.2, top_k=7)]
GREEDY = SamplingPolicy(0.0)


@pytest.fixture(scope="module")
def target():
    return tiny_llama()


def drafts(target):
    """One draft of every kind: head only at each layer, a tuned last block, an unrelated model."""
    return [*[noisy_exit(target, layer) for layer in range(4)], noisy_exit(target, 0, own_block=True), noisy_exit(target, 2, own_block=True),
            tiny_llama(seed=9, num_hidden_layers=1)]


@pytest.mark.parametrize("policy", [GREEDY, *SAMPLED])
def test_coupled_text_is_vanillas_for_every_draft(target, policy):
    for draft in drafts(target):
        check_same_text(target, draft, policy, "coupled", count=2)


@pytest.mark.parametrize("tree", COUPLED_TREES)
def test_text_of_trees_is_vanillas_for_every_draft(target, tree):
    for draft in drafts(target):
        check_same_text(target, draft, SAMPLED[2], "coupled", count=1, **COUPLED_TREES[tree])


def test_greedy_text_is_vanillas_for_every_draft(target):
    for draft in drafts(target):
        check_same_text(target, draft, GREEDY, "rejection", count=2)


@pytest.mark.parametrize("tree", ["static, swor", "dynamic, swor"])
def test_greedy_text_of_trees_by_rejection_is_vanillas_for_every_draft(target, tree):
    for draft in drafts(target):
        check_same_text(target, draft, GREEDY, "rejection", count=1, **TREES[tree])


def test_greedy_vanilla_is_transformers_greedy(target):
    for prompt in some_prompts(3):
        tokens, _ = decode(target, None, prompt, policy=GREEDY, max_new_tokens=20)
        ids = torch.tensor([prompt])
        reference = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert tokens == reference[0, len(prompt) :].tolist()


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", [GREEDY, *SAMPLED])
def test_draft_equal_to_target_has_everything_accepted(target, policy, verification):
    """The predecessor's evaluator reported 0.11 of 8 for such a draft: its caches were references to one object."""
    check_all_accepted(target, TruncatedLlama(target, Exit(target, 3)), policy, verification, count=15)


@pytest.mark.parametrize(("verification", "runs", "dtype"), [("rejection", 4000, torch.float32), ("coupled", 1000, torch.float32), ("rejection", 1000, torch.float64)])
def test_joint_law_of_the_first_two_tokens(verification, runs, dtype):
    check_first_two_tokens(SamplingPolicy(1.0), verification, runs, dtype)


@pytest.mark.parametrize(
    ("verification", "tested", "dtype"), [("rejection", 20_000, torch.float32), ("coupled", 6000, torch.float32), ("rejection", 4000, torch.float64)])
def test_law_and_acceptance_of_a_long_text(verification, tested, dtype):
    """Tokens within and behind rounds have the target's law; acceptance has its closed form (Σ min(p, q); P-MinHash)."""
    stats = check_law(SamplingPolicy(0.7, top_p=0.95), verification, int(1.3 * tested), bigram_pair(dtype=dtype))
    row = metrics.speculation_metrics([stats], longest=2)
    assert row["spec_tested"] >= tested and abs(row["spec_accept_z"]) < 4


@pytest.mark.parametrize("engine", ["static", "transformers"])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_caches_equal_a_fresh_prefill_after_every_round(target, verification, engine, monkeypatch):
    """Draft-side cache errors only lower acceptance, so texts never show them: compare keys and values per block."""
    def compare(state):
        plain_roll_back(state)
        text = state.committed[0]
        for model, cached in ((target, state.target), (draft, state.draft)):
            held = cached.lengths[0]
            assert len(text) - 2 <= held <= len(text) - 1
            fresh = _new_engine(model, held, 1, engine)
            fresh.prefill([text[:held]])
            assert same_layers(cached.layers(), fresh.layers(), 1e-12)
        checked.append(len(text))

    plain_roll_back = DecodeState.roll_back
    monkeypatch.setattr(DecodeState, "roll_back", compare)
    for draft in (noisy_exit(target, 1), noisy_exit(target, 2, own_block=True), tiny_llama(seed=9, num_hidden_layers=1)):
        checked: list[int] = []
        _, stats = decode(target, draft, [1, 2, 3], policy=SamplingPolicy(0.7), verification=verification, max_new_tokens=24, engine=engine)
        assert len(checked) == len(stats.rounds)


def test_counters(target):
    tokens, stats = decode(target, noisy_exit(target, 2), [1, 2, 3], policy=SamplingPolicy(1.0), gamma=3, max_new_tokens=50)
    assert stats.target_calls == len(stats.rounds)
    assert stats.emitted == len(tokens) == 50
    assert stats.draft_calls == sum(r.proposed for r in stats.rounds)
    assert all(len(r.tokens) == r.accepted + 1 for r in stats.rounds)
    assert stats.wall_s > stats.decode_s > 0


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_generation_ends_at_the_first_of_several_eos_ids(target, verification):
    draft = noisy_exit(target, 2)
    settings = {"policy": SamplingPolicy(1.0), "verification": verification, "max_new_tokens": 60, "gamma": 4}
    for prompt_id in range(10):
        full, _ = decode(target, draft, [5], prompt_id, **settings)
        ends = frozenset(full[10:12])
        cut, stats = decode(target, draft, [5], prompt_id, eos_ids=ends, **settings)
        assert cut == full[: 1 + next(i for i, token in enumerate(full) if token in ends)]
        assert stats.emitted == len(cut)


def test_nothing_is_drafted_behind_a_drafted_eos():
    """With every token an end-of-text token, each round drafts exactly one."""
    toy, draft = bigram_pair()
    _, stats = decode(toy, draft, [0], policy=SamplingPolicy(1.0), gamma=4, eos_ids=frozenset(range(8)), max_new_tokens=9)
    assert stats.emitted == 1 and stats.rounds[0].proposed == 1


def test_stop_cuts_committed_tokens(target):
    full, _ = decode(target, None, [5], policy=SamplingPolicy(1.0), max_new_tokens=30)
    draft = noisy_exit(target, 2)
    cut, _ = decode(target, draft, [5], policy=SamplingPolicy(1.0), verification="coupled", max_new_tokens=30,
                    stop=lambda tokens: len(tokens) == 12)
    assert cut == full[:11]


def test_callback_gets_every_token_in_order(target):
    streamed: list[int] = []
    options = DecodeOptions("speculative", SamplingPolicy(1.0), max_new_tokens=20)
    generation = generate(target, [1, 2], options, noisy_exit(target, 2), on_tokens=streamed.extend)
    assert streamed == generation.tokens and len(streamed) == 20


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1], {"method": "speculative"}, "pass draft="),
        ([1] * 500, {}, "exceed the context of 512"),
        ([[1, 2]], {}, r"not a list of lists: give one text's ids"),
        (torch.tensor([1, 2]), {}, r"not a Tensor of shape \(2,\): give"),
        (torch.tensor([[1, 2]]), {}, r"not a Tensor of shape \(1, 2\): give"),
        (np.array([1, 2]), {}, r"not a ndarray of shape \(2,\): give"),
        (BatchEncoding({"input_ids": [1, 2]}), {}, r"not a BatchEncoding: give one text's ids, of a tokenizer's output encoding\['input_ids'\]"),
        ("text", {}, "not a str: give"),
        ([1.0], {}, "not a list of floats: give"),
        ([1, 64], {}, "has token 64, but LlamaForCausalLM knows tokens 0 to 63"),
        ([-1, 1], {}, "has token -1, but"),
        ([1], {"gamma": 2.0}, "gamma 2.0 must be a whole number"),
        ([1], {"gamma": "auto"}, "gamma 'auto' must be a whole number"),
        ([1], {"eos_ids": 6}, r"eos_ids 6 must be a set of token ids"),
        ([1], {"eos_ids": "6"}, r"eos_ids '6' must be a set of token ids"),
        ([1], {"max_new_tokens": 8.0}, "max_new_tokens 8.0 must be a whole number"),
        ([1], {"seed": 0.5}, "seed 0.5 must be a whole number"),
        ([1], {"method": "tree"}, "unknown method 'tree'"),
        ([1], {"verification": "hope"}, "unknown verification 'hope'"),
        ([1], {"gamma": 0}, "gamma 0"),
        ([1], {"method": "static_tree"}, "needs tree=StaticTree"),
        ([1], {"method": "dynamic_tree", "tree": SpecExec()}, "takes a DynamicTree as tree=, not a SpecExec"),
        ([1], {"method": "specexec"}, "pass draft="),
        ([1], {"method": "speculative", "tree": DynamicTree()}, "drafts no trees: leave out tree="),
        ([1], {"common_sense": CommonSense(torch.zeros(64, 2, dtype=torch.int64))}, "common_sense goes with tree methods"),
    ],
)
def test_bad_calls_name_the_mistake(target, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(target, prompt, DecodeOptions(**options))


@pytest.mark.parametrize("prompts", [torch.tensor([[1, 2]]), [torch.tensor([1, 2])], [1, 2], BatchEncoding({"input_ids": [[1, 2]]})])
def test_bad_batches_name_the_mistake(target, prompts):
    with pytest.raises(ValueError, match="a prompt is a list of token ids, not a "):
        generate_batch(target, prompts, DecodeOptions())


def test_ids_of_a_numpy_array_are_ids(target):
    assert decode(target, None, list(np.array([1, 2])), max_new_tokens=5)[0] == decode(target, None, [1, 2], max_new_tokens=5)[0]


def test_trees_of_a_batch_and_pruned_trees_by_rejection_are_refused(target):
    with pytest.raises(ValueError, match="one text at a time, not 2"):
        generate_batch(target, [[1], [2]], DecodeOptions("dynamic_tree"), noisy_exit(target, 1))
    with pytest.raises(ValueError, match="choose 'match' or 'coupled'"):
        SpecExec(verification="swor")


def test_draft_with_another_vocabulary_is_refused(target):
    with pytest.raises(ValueError, match="different vocabularies"):
        decode(target, tiny_llama(vocab_size=65), [1])


@pytest.mark.parametrize("method", [{"method": "self_speculative"}, TREES["static"], TREES["dynamic"]], ids=lambda options: options["method"])
def test_generations_within_and_beside_each_other(method):
    """They share a target, but not its cache."""
    target, settings = native_llama(), {"policy": SamplingPolicy(1.0), "max_new_tokens": 40}
    draft = noisy_exit(target, 2, own_block=True)
    alone = [decode(target, None, [1, i], i, **settings)[0] for i in range(4)]
    drafting = DecodeOptions(verification="coupled", **method, **settings)
    inner: list[list[int]] = []
    outer = generate(target, [1, 0], drafting, draft, prompt_id=0, on_tokens=lambda tokens: inner.append(
        generate(target, [1, 1], drafting, draft, prompt_id=1).tokens))
    assert outer.tokens == alone[0] and all(tokens == alone[1] for tokens in inner)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: generate(target, [1, i], drafting, draft, prompt_id=i).tokens, range(4)))
    assert found == alone

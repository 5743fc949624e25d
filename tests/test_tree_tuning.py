"""What trees are fitted to: texts, acceptance by rank and in rounds, and the weights of coupled values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from decoding.children import Chooser, Coupling
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import Growmap
from decoding.sampling import SamplingPolicy
from decoding.static_tree import StaticTree
from decoding.verify import TREE_RULES
from measuring.tree_fitting import OwnText, acceptance_by_rank, fit_coupling, fit_trust, mean_acceptance, own_texts, replayed
from speculative import DecodeOptions, generate
from toy_models import bigram_pair, native_llama, noisy_exit, some_prompts, tiny_llama
from truncated_llama import TruncatedLlama

POLICY = SamplingPolicy(0.8)
OPTIONS = DecodeOptions(policy=POLICY, max_new_tokens=40, seed=3)
SHAPE = Growmap((-1, 0, 0, 0, 1, 1, 2, 4, 7))


def chances_of(verification: str, target: nn.Module, draft: nn.Module, texts: list[OwnText]) -> list[torch.Tensor]:
    chooser = Chooser(TREE_RULES[verification], POLICY, target.config.vocab_size)
    return acceptance_by_rank(target, draft, texts, chooser, width=4)


@pytest.mark.parametrize("verification", ["coupled", "match"])
def test_replaying_a_tree_over_texts_finds_the_rounds_that_decode_them(verification):
    """Exactly, as coupled and matched trees decode the very texts that the target decodes; shares from the product of v do not."""
    target = tiny_llama()
    draft, prompts = noisy_exit(target, 1, own_block=True, scale=0.02), some_prompts(12)
    by_text = chances_of(verification, target, draft, own_texts(target, prompts, OPTIONS))
    growmap = replayed(replace(SHAPE, acceptance=tuple(mean_acceptance(by_text))), by_text)
    plan = StaticTree(SHAPE, verification)
    whole = []  # rounds that begin early enough to end
    for i, prompt in enumerate(prompts):
        begins = 0
        for one in generate(target, prompt, replace(OPTIONS, method="static_tree", tree=plan), draft, prompt_id=i).stats.rounds:
            whole += [one] if begins + SHAPE.depth <= OPTIONS.max_new_tokens else []
            begins += 1 + one.accepted
    assert growmap.tokens_per_call == pytest.approx(sum(1 + one.accepted for one in whole) / len(whole), abs=1e-12)
    assert growmap.replayed[1] == pytest.approx(sum(one.tree.rank == 0 for one in whole) / len(whole), abs=1e-12)
    independent = replace(growmap, replayed=()).reach
    assert max(abs(one - other) for one, other in zip(growmap.reach, independent, strict=True)) > 1e-3


def test_replaying_drawn_children_weighs_every_way_through_the_texts():
    """Against all walks of one text of four positions, one by one, which begin no round behind the third."""
    chances = torch.tensor([[0.5, 0.25], [0.6, 0.1], [0.3, 0.7], [0.2, 0.2]], dtype=torch.float64)
    growmap = Growmap((-1, 0, 0, 1))  # the first child has a child
    visits = {node: 0.0 for node in range(4)}

    def walk(position: int, node: int, chance: float) -> None:
        if node == 0 and position + growmap.depth > len(chances):
            return
        visits[node] += chance
        kept = 0.0
        for child, rank in ((child, growmap.ranks[child]) for child in range(4) if growmap.parents[child] == node):
            walk(position + 1, child, chance * float(chances[position, rank]))
            kept += float(chances[position, rank])
        walk(position + 1, 0, chance * (1 - kept))

    walk(0, 0, 1.0)
    found = replayed(growmap, [chances]).replayed
    assert found == pytest.approx([visits[node] / visits[0] for node in range(4)], abs=1e-12)
    alone, beside = replayed(growmap, [chances]).replayed, replayed(growmap, [chances, chances[:3]]).replayed
    assert beside[0] == 1 and beside != alone  # a shorter text counts as far as it goes


def test_texts_that_are_alike_are_replayed_as_the_product_of_v():
    by_text = [torch.tensor([0.5, 0.25]).double().repeat(4000, 1)]
    growmap = Growmap((-1, 0, 0, 1, 1, 3), (0.5, 0.25))
    assert replayed(growmap, by_text).replayed == pytest.approx(growmap.reach, abs=1e-3)


def test_acceptance_sums_to_at_most_one_and_falls_with_rank():
    target, draft = bigram_pair()
    texts = own_texts(target, some_prompts(6, vocab_size=target.config.vocab_size), OPTIONS)
    for verification in ("coupled", "match", "swor"):
        v = mean_acceptance(chances_of(verification, target, draft, texts))
        assert 0 < v[0] and sum(v) <= 1 + 1e-9 and v[0] == max(v)


def test_trust_makes_trees_promise_what_rounds_bring():
    """In the very rounds that it is fitted to, without changing a token; weights that expect too much are found."""
    target = native_llama()
    draft, prompts = noisy_exit(target, 1, own_block=True, scale=0.02), some_prompts(16)

    def promised_over_found(coupling: Coupling) -> float:
        options = replace(OPTIONS, method="dynamic_tree", tree=DynamicTree(coupling=coupling))
        rounds = [r for i, prompt in enumerate(prompts) for r in generate(target, prompt, options, draft, prompt_id=i).stats.rounds]
        return sum(r.tree.expected for r in rounds) / sum(1 + r.accepted for r in rounds)

    too_sure = Coupling(3.0, 3.0)
    trusted = fit_trust(target, draft, prompts, OPTIONS, too_sure)
    assert promised_over_found(too_sure) > 1.1 and trusted.trust < 0.97
    assert promised_over_found(trusted) == pytest.approx(1, abs=0.03)
    assert fit_trust(target, draft, prompts, OPTIONS, Coupling(0.1, 0.1)) == Coupling(0.1, 0.1)  # what expects too little is not trusted more than 1


def test_a_perfect_draft_has_children_that_are_all_accepted():
    """Coupled and under rejection the first child is kept always; and the fitted weights grow as far as they may."""
    target = tiny_llama()
    texts = own_texts(target, some_prompts(4), OPTIONS)
    for verification in ("coupled", "swor"):
        assert mean_acceptance(chances_of(verification, target, target, texts)) == pytest.approx([1, 0, 0, 0], abs=1e-9)
    weights = fit_coupling(target, texts, POLICY.temperature)
    assert min(weights.draft, weights.noise) > 5 > max(vars(fit_coupling(noisy_exit(target, 0, scale=0.05), texts, POLICY.temperature)).values())


@pytest.mark.parametrize("policy", [POLICY, SamplingPolicy(0.0)])
def test_weights_of_a_few_tokens_are_finite(policy):
    """One token says nothing of two weights: what it does not tell apart stays as it begins."""
    target = tiny_llama()
    texts = own_texts(target, [[1, 2]], replace(OPTIONS, policy=policy, max_new_tokens=1))
    weights = fit_coupling(noisy_exit(target, 1), texts, policy.temperature)
    assert all(math.isfinite(value) for value in vars(weights).values())
    unknown = noisy_exit(target, 1)
    unknown = TruncatedLlama(target, unknown.exit.trimmed(torch.tensor([token for token in range(64) if token != texts[0].tokens[-1]])))
    assert fit_coupling(unknown, texts, policy.temperature) == Coupling()

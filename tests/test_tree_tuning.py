"""What trees are fitted to: texts, acceptance by rank and in rounds, and the weights of coupled values."""

from __future__ import annotations

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
from speculative import DecodeOptions, generate
from toy_models import bigram_pair, noisy_exit, some_prompts, tiny_llama
from tree_tuning import OwnText, acceptance_by_rank, fit_coupling, fit_trust, mean_acceptance, own_texts, replayed

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
    stats = [generate(target, prompt, replace(OPTIONS, method="static_tree", tree=plan), draft, prompt_id=i).stats for i, prompt in enumerate(prompts)]
    rounds = sum(len(one.rounds) for one in stats)
    assert growmap.tokens_per_call == pytest.approx(sum(one.emitted for one in stats) / rounds, abs=1e-12)
    first = sum(bool(r.tree and r.accepted and r.tree.rank == 0) for one in stats for r in one.rounds)
    assert growmap.replayed[1] == pytest.approx(first / rounds, abs=1 / rounds * len(prompts))  # but for last rounds, which are cut
    assert abs(replace(growmap, replayed=()).tokens_per_call - growmap.tokens_per_call) > 1e-3


def test_replaying_drawn_children_weighs_every_way_through_the_texts():
    """Against all walks of one text of three positions, one by one."""
    chances = torch.tensor([[0.5, 0.25], [0.6, 0.1], [0.3, 0.7]], dtype=torch.float64)
    growmap = Growmap((-1, 0, 0, 1))  # the first child has a child
    visits = {node: 0.0 for node in range(4)}

    def walk(position: int, node: int, chance: float) -> None:
        if position == 3:
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
    alone, beside = replayed(growmap, [chances]).replayed, replayed(growmap, [chances, chances[:1]]).replayed
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
    target = tiny_llama()
    draft, prompts = noisy_exit(target, 1, own_block=True, scale=0.02), some_prompts(10)

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

"""Trees through the engine: vanilla's text for every tree and draft, caches as a fresh prefill leaves them, on the host and as a device would run it."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

import speculative
from decoding import tree_drafting
from decoding.children import Coupling
from decoding.common_sense import CommonSense
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import Growmap, chain
from decoding.sampling import Noise, SamplingPolicy
from decoding.specexec import SpecExec
from decoding.state import DecodeState, DecodeStats
from decoding.static_tree import StaticTree
from decoding.tree import Tree, ancestors
from decoding.tree_drafting import ExitDraft, ModelDraft, TreeRound
from engine import kv_cache, native, static_llama
from engine.kv_cache import CachedModel
from engine.programs import Programs
from engine.shared_exit import SharedExit
from engine.static_llama import KEPT_WIDTHS, Scatter, Stack, StaticLlama
from speculative import DecodeOptions, _new_engine, generate
from test_self_speculation import after_every_round
from toy_models import (
    COUPLED_TREES,
    TREES,
    bigram_pair,
    decode,
    native_llama,
    near,
    near_copy,
    noisy_exit,
    random_text,
    same_layers,
    some_prompts,
    tiny_llama,
)
from truncated_llama import Exit, ExitForm, TruncatedLlama

GREEDY, NUCLEUS, TEMPERED, SAMPLED = SamplingPolicy(0.0), SamplingPolicy(0.7, top_p=0.95), SamplingPolicy(0.7), SamplingPolicy(1.0)
LLAMAS = {"cpp": native_llama, "torch": tiny_llama}  # in fp32 through C++, in fp64 through torch
BLOCKS = 2
DRAFTS: dict[str, Callable] = {
    "head": lambda target: noisy_exit(target, 0, scale=0.02),
    "own block": lambda target: noisy_exit(target, 1, own_block=True, scale=0.02),
    "model": near_copy,
}
PERFECT_DRAFTS: dict[str, Callable] = {
    "head": lambda target: TruncatedLlama(target, Exit(target, BLOCKS - 1)),
    "own block": lambda target: TruncatedLlama(target, Exit(target, BLOCKS - 1, ExitForm("last"))),
    "model": copy.deepcopy,
}
SURE = Coupling(30.0, 30.0)  # in the same order, but nearly certain of the first child: trees as deep as they may be
DEEP = {
    "static": {"method": "static_tree", "tree": StaticTree(Growmap((-1, 0, 0, 1, 1, 3, 5)))},
    "dynamic": {"method": "dynamic_tree", "tree": DynamicTree(12, 4, 2, coupling=SURE)},
    "specexec": {"method": "specexec", "tree": SpecExec(5, 4, 1, verification="coupled")},
}


def llama(kind: str = "torch", **overrides: object) -> LlamaForCausalLM:
    return LLAMAS[kind](num_hidden_layers=BLOCKS, **overrides)


def as_on_device(patch: pytest.MonkeyPatch) -> None:
    """Every engine made from now on has its places in tensors and its trees of fixed shape, as on CUDA."""
    exact = StaticLlama.__init__

    def init(self, *args, **kwargs):
        exact(self, *args, **kwargs)
        self.on_host = False

    patch.setattr(StaticLlama, "__init__", init)


@pytest.fixture(params=[*LLAMAS, "device"])
def target(request, monkeypatch) -> LlamaForCausalLM:
    """A target through C++, through torch, and with its places on a device."""
    if request.param == "device":
        as_on_device(monkeypatch)
    return llama("torch" if request.param == "device" else request.param)


def tree_and_vanilla(target, draft, prompt: list[int], prompt_id: int = 0, **options: object) -> tuple[list[int], list[int], DecodeStats]:
    """A tree method's text, vanilla's, and the tree method's stats."""
    plain = {name: value for name, value in options.items() if name not in ("method", "tree", "common_sense")}
    text, stats = decode(target, draft, prompt, prompt_id, **options)
    return text, decode(target, None, prompt, prompt_id, **plain)[0], stats


def check_text(target, draft, count: int = 2, **options: object) -> list[DecodeStats]:
    """Vanilla's text, token for token, on `count` prompts; returns the stats."""
    found = []
    for prompt_id, prompt in enumerate(some_prompts(count)):
        text, vanilla, stats = tree_and_vanilla(target, draft, prompt, prompt_id, **{"policy": SAMPLED, "max_new_tokens": 24, **options})
        assert text == vanilla
        assert stats.target_calls == len(stats.rounds) and stats.draft_calls == sum(r.tree.passes for r in stats.rounds if r.tree)
        found.append(stats)
    return found


def accepted_share(stats: list[DecodeStats]) -> float:
    """Of the tokens, those that came from a tree."""
    return sum(r.accepted for each in stats for r in each.rounds) / sum(each.emitted for each in stats)


# ---- texts ----

@pytest.mark.parametrize("policy", [GREEDY, NUCLEUS, SAMPLED], ids=str)
@pytest.mark.parametrize(("kind", "prompts"), [("cpp", 50), ("torch", 18)])
def test_text_is_vanillas_over_200_prompts(kind, prompts, policy):
    """In each of six runs every tree meets every draft."""
    target = llama(kind)
    drafts = [make(target) for make in DRAFTS.values()]
    pairs = [(options, draft) for options in COUPLED_TREES.values() for draft in drafts]
    found = []
    for prompt_id, prompt in enumerate(some_prompts(prompts)):
        options, draft = pairs[prompt_id % len(pairs)]
        text, vanilla, stats = tree_and_vanilla(target, draft, prompt, prompt_id, policy=policy, max_new_tokens=64, seed=3, **options)
        assert text == vanilla, (prompt_id, options)
        assert stats.emitted == len(text) == 64
        found.append(stats)
    assert 0.2 < accepted_share(found) < 0.8


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", COUPLED_TREES)
@pytest.mark.parametrize("kind", LLAMAS)
def test_text_is_vanillas_where_places_are_on_the_device(kind, tree, draft, monkeypatch):
    as_on_device(monkeypatch)
    target = llama(kind)
    stats = [each for policy in (NUCLEUS, GREEDY)
             for each in check_text(target, DRAFTS[draft](target), count=1, policy=policy, **COUPLED_TREES[tree])]
    assert accepted_share(stats) > 0


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", COUPLED_TREES)
def test_text_is_vanillas_through_transformers(tree, draft):
    target = llama()
    stats = check_text(target, DRAFTS[draft](target), count=1, policy=NUCLEUS, engine="transformers", **COUPLED_TREES[tree])
    assert accepted_share(stats) > 0


@pytest.mark.parametrize("tree", ["static", "dynamic", "specexec"])
@pytest.mark.parametrize("own_block", [False, True])
def test_trimmed_vocabulary(target, tree, own_block):
    """The draft's tokens are the even ones: no others are in a tree, and the text is what it was."""
    draft = TruncatedLlama(target, noisy_exit(target, 1, own_block, scale=0.02).exit.trimmed(torch.arange(0, 64, 2)))
    stats = check_text(target, draft, count=1, policy=NUCLEUS, **TREES[tree])
    kept = [token for each in stats for r in each.rounds for token in r.tokens[: r.accepted]]
    assert len(kept) > 2 and all(token % 2 == 0 for token in kept)


@pytest.mark.parametrize("options", [
    {"method": "dynamic_tree", "tree": DynamicTree(16, 6, 3, level_cost=0.4)}, {"method": "specexec", "tree": SpecExec(16, 6, 4, prune_threshold=0.3)}],
    ids=lambda options: options["method"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_rounds_that_stop_early_and_trees_that_are_pruned(target, draft, options):
    sizes = {(r.tree.nodes, r.tree.passes) for stats in check_text(target, DRAFTS[draft](target), count=1, **options) for r in stats.rounds}
    assert len(sizes) > 1 and all(nodes <= 16 for nodes, _ in sizes)


FOLLOWERS = torch.randint(0, 64, (64, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tree", ["static", "dynamic"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_leaves_of_common_sense(target, tree, draft):
    """Text and caches are what they are without."""
    options = {"common_sense": CommonSense(FOLLOWERS, nodes=4), **TREES[tree]}
    check_text(target, DRAFTS[draft](target), count=1, **options)
    check_caches_after_every_round(target, DRAFTS[draft](target), **options)


@pytest.mark.parametrize(("method", "tree"), [("dynamic_tree", DynamicTree(8, 4, 3)), ("specexec", SpecExec(8, 4, 3))])
def test_leaves_of_common_sense_are_part_of_the_budget(target, method, tree):
    """What it reserves is not drafted, so that one target call takes as many nodes with it as without."""
    options = {"method": method, "tree": tree, "common_sense": CommonSense(FOLLOWERS, nodes=4), "max_new_tokens": 12}
    _, stats = decode(target, DRAFTS["head"](target), [1, 2, 3], **options)
    assert {result.tree.nodes for result in stats.rounds} == {8}


@pytest.mark.parametrize("tree", COUPLED_TREES)
def test_dynamic_ntk_beyond_its_length(tree):
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, "max_position_embeddings": 64}
    target = llama(**rope)
    for draft in (DRAFTS["own block"](target), near_copy(target)):
        text, vanilla, _ = tree_and_vanilla(target, draft, random_text(60)[0].tolist(), policy=SAMPLED, max_new_tokens=20, **COUPLED_TREES[tree])
        assert text == vanilla


# ---- caches ----

def check_caches_after_every_round(target, draft, prompt: tuple[int, ...] = (1, 2, 3), **options: object) -> DecodeStats:
    """Decode; after every round all keys, values and kept h_E are those of a fresh prefill, and the draft holds the text up to the round's root."""
    engine, committed = options.get("engine", "static"), [len(prompt)]

    def check(state: DecodeState) -> None:
        text = state.committed[0]
        assert state.target.lengths == [len(text) - 1]
        assert state.draft.lengths == [min(committed[-1], len(text) - 1)]
        committed.append(len(text))
        compare = _compare_exit if isinstance(state.draft, SharedExit) else _compare_models
        compare(state, target, draft, engine, 1e-4 if target.dtype == torch.float32 else 1e-9)

    with pytest.MonkeyPatch.context() as patch:
        rounds = after_every_round(patch, check)
        _, stats = decode(target, draft, list(prompt), **{"policy": NUCLEUS, "max_new_tokens": 16, **options})
    assert len(rounds) == len(stats.rounds)
    return stats


def _compare_models(state: DecodeState, target, draft, engine: str, tolerance: float) -> None:
    for model, cached in ((target, state.target), (draft, state.draft)):
        fresh = _new_engine(model, len(state.committed[0]), 1, engine)
        fresh.prefill([state.committed[0][: cached.lengths[0]]])
        assert same_layers(cached.layers(), fresh.layers(), tolerance)


def _compare_exit(state: DecodeState, target, draft, engine: str, tolerance: float) -> None:
    shared, text = state.draft, state.committed[0][:-1]
    fresh = SharedExit(StaticLlama(target, len(text)), draft.exit)
    fresh.prefill([text])
    assert same_layers(shared.target.layers(), fresh.target.layers(), tolerance)
    pairs = [(shared.kept.store[:, : len(text)], fresh.kept.store[:, : len(text)])]
    if shared.own is not None:
        held = shared.lengths[0]
        pairs += [(now[..., :held, :], then[..., :held, :]) for now, then in zip(shared.own.cache.halves(), fresh.own.cache.halves(), strict=True)]
    assert same_layers([(now,) for now, _ in pairs], [(then,) for _, then in pairs], tolerance)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", TREES)
def test_caches_equal_a_fresh_prefill_after_every_round(target, tree, draft):
    stats = check_caches_after_every_round(target, DRAFTS[draft](target), **TREES[tree])
    assert accepted_share([stats]) > 0


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", TREES)
def test_caches_of_transformers(tree, draft):
    target = llama()
    check_caches_after_every_round(target, DRAFTS[draft](target), engine="transformers", max_new_tokens=10, **TREES[tree])


# ---- counts ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tree", TREES)
def test_calls_are_those_that_the_models_got(tree, dtype):
    """One of the target a round, and of the draft as many passes as the trees took."""
    target, draft = bigram_pair(dtype=dtype)
    decode(target, None, [0, 1], max_new_tokens=1)
    before = target.calls, draft.calls
    text, stats = decode(target, draft, [0, 1], policy=SAMPLED, max_new_tokens=100, **TREES[tree])
    assert stats.target_calls == len(stats.rounds) == target.calls - before[0] - 1  # the prompt's pass
    assert stats.draft_calls == sum(r.tree.passes for r in stats.rounds) == draft.calls - before[1] - 1
    assert stats.target_tokens == sum(r.tree.nodes for r in stats.rounds)
    assert stats.emitted == len(text) == 100 <= sum(len(r.tokens) for r in stats.rounds)
    assert all(len(r.tokens) == r.accepted + 1 and r.proposed == r.tree.nodes - 1 for r in stats.rounds)
    assert stats.draft_tokens == sum(r.tree.fed for r in stats.rounds) + sum(r.accepted for r in stats.rounds[:-1])  # these it sees again, as text


def check_work(target, draft, **options: object) -> None:
    """Rows of all blocks: N·L of the target, E of each node that is fed; of the own block these and what it catches up with."""
    rows, counted, plain = [], [], Stack.run

    def run(self, x, place, first=0, last=None, kept=None):
        rows.append(len(x) * ((len(self.blocks) if last is None else last) - first))
        return plain(self, x, place, first, last, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "run", run)
        after_every_round(patch, lambda state: counted.append((sum(rows), state.draft.block_tokens)))
        _, stats = decode(target, draft, [1, 2], **{"policy": SAMPLED, "max_new_tokens": 30, **options})
    own, behind = draft.exit.block is not None, 0
    wanted = prompt = BLOCKS + own
    for r, (done, block_tokens) in zip(stats.rounds, counted, strict=True):
        wanted += r.tree.nodes * BLOCKS + r.tree.fed * (draft.exit.prefix + own) + own * behind
        assert done == wanted, "rows"
        assert block_tokens == wanted - prompt, "count"
        behind = r.accepted
    assert stats.draft_tokens == sum(r.tree.fed for r in stats.rounds)


@pytest.mark.parametrize("draft", ["head", "own block"])
@pytest.mark.parametrize("tree", ["static", "dynamic", "specexec", "dynamic, swor"])
def test_every_round_does_the_work_that_it_counts(target, tree, draft):
    check_work(target, DRAFTS[draft](target), **TREES[tree])


@pytest.mark.parametrize("policy", [GREEDY, TEMPERED, SAMPLED], ids=str)
@pytest.mark.parametrize("draft", PERFECT_DRAFTS)
@pytest.mark.parametrize("tree", DEEP)
def test_draft_like_the_target_has_a_path_of_full_depth_accepted(target, tree, draft, policy):
    plan = DEEP[tree]["tree"]
    for stats in check_text(target, PERFECT_DRAFTS[draft](target), count=1, policy=policy, **DEEP[tree]):
        assert {r.accepted for r in stats.rounds} == {plan.depth} and all(r.tested == r.accepted for r in stats.rounds)


@pytest.mark.parametrize("draft", PERFECT_DRAFTS)
def test_matched_children_of_a_draft_like_the_target_at_temperature_0(target, draft):
    for options in (TREES["static, match"], {"method": "specexec", "tree": SpecExec(5, 4, 1)}):
        for stats in check_text(target, PERFECT_DRAFTS[draft](target), policy=GREEDY, **options):
            assert {r.accepted for r in stats.rounds} == {4}


@pytest.mark.parametrize("depth", [KEPT_WIDTHS - 1, KEPT_WIDTHS + 30])
@pytest.mark.parametrize("draft", PERFECT_DRAFTS)
def test_paths_longer_than_a_pass_whose_buffers_are_kept(target, draft, depth):
    """Then the draft has more to catch up with than a pass on a device can see: it must still accept every node, and end with the right cache."""
    draft = PERFECT_DRAFTS[draft](target)
    prompt = tuple(random_text(static_llama.REACH_STEP - depth - 30)[0].tolist())
    options = {"method": "static_tree", "tree": StaticTree(chain(depth)), "policy": SAMPLED, "max_new_tokens": 2 * depth + 20}
    stats = check_caches_after_every_round(target, draft, prompt, **options)
    assert {r.accepted for r in stats.rounds} == {depth}


# ---- where a text ends ----

@pytest.mark.parametrize("tree", DEEP)
@pytest.mark.parametrize("draft", ["own block", "model"])
def test_end_of_text_in_the_middle_of_an_accepted_path(target, tree, draft):
    """Of several ids, the first that comes ends the text; nothing behind it counts as accepted."""
    draft = PERFECT_DRAFTS[draft](target)
    settings = {"policy": SAMPLED, "max_new_tokens": 20, **DEEP[tree]}
    for prompt_id in range(2):
        full, vanilla, _ = tree_and_vanilla(target, draft, [5, 6], prompt_id, **settings)
        assert full == vanilla
        for middle in (6, 7, 8):  # the second round's tokens
            ends = frozenset({full[middle], full[-1]})
            cut, stats = decode(target, draft, [5, 6], prompt_id, eos_ids=ends, **settings)
            assert cut == full[: 1 + next(i for i, token in enumerate(full) if token in ends)]
            assert stats.emitted == len(cut)
            assert not any(token in ends for r in stats.rounds for token in r.tokens[: r.accepted - 1])


def seen_trees(patch: pytest.MonkeyPatch) -> list[Tree]:
    """Grows by every tree that is verified from now on."""
    trees: list[Tree] = []
    exact = TreeRound.verify

    def verify(self, tree, *rest):
        trees.append(tree)
        return exact(self, tree, *rest)

    patch.setattr(TreeRound, "verify", verify)
    return trees


def check_ends_have_no_children(trees: list[Tree], ends: frozenset[int]) -> None:
    """No node that a walk may reach stands behind an end-of-text token, and there are such tokens."""
    parents = [int(tree.tokens[parent]) for tree in trees for parent, value in zip(tree.parents.tolist(), tree.values.tolist(), strict=True)
               if parent > 0 and value > -torch.inf]
    assert parents and not ends.intersection(parents)
    assert any(token in ends for tree in trees for token in tree.tokens[1:].tolist())


@pytest.mark.parametrize("tree", ["dynamic", "dynamic, match", "dynamic, swor", "specexec"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_end_of_text_as_a_node_has_no_children(target, tree, draft, monkeypatch):
    """One generation after another with other ids: each has its own."""
    trees, draft = seen_trees(monkeypatch), DRAFTS[draft](target)
    for ends in (frozenset(range(0, 64, 3)), frozenset(range(1, 64, 3))):
        trees.clear()
        for prompt_id in range(2):
            options = {"policy": SAMPLED, "max_new_tokens": 30, "eos_ids": ends, **TREES[tree]}
            if "swor" in tree:
                decode(target, draft, [5, 6], prompt_id, **options)
            else:
                text, vanilla, _ = tree_and_vanilla(target, draft, [5, 6], prompt_id, **options)
                assert text == vanilla
        check_ends_have_no_children(trees, ends)


@pytest.mark.parametrize("tree", ["dynamic", "specexec"])
def test_nothing_is_drafted_behind_a_root_full_of_ends(target, tree):
    """With every token an end-of-text token a tree has one level."""
    options = {"policy": SAMPLED, "eos_ids": frozenset(range(64)), "max_new_tokens": 9, **TREES[tree]}
    for draft in (noisy_exit(target, 0), near_copy(target)):
        text, vanilla, stats = tree_and_vanilla(target, draft, [3, 4], **options)
        assert text == vanilla and stats.emitted == 1
        assert stats.rounds[0].accepted <= 1


@pytest.mark.parametrize("plan", [(16, 3, 2), (64, 3, 3), (40, 1, 3)], ids=str)
@pytest.mark.parametrize("draft", DRAFTS)
def test_trees_with_fewer_candidates_than_their_budget(draft, plan, monkeypatch):
    """On a device a pass has a fixed width all the same: what fills it, here nodes that were fed already, must not be walked to."""
    as_on_device(monkeypatch)
    target = llama()
    draft = DRAFTS[draft](target)
    for prompt_id, prompt in enumerate(some_prompts(3)):
        settings = {"policy": (GREEDY, NUCLEUS, SAMPLED)[prompt_id % 3], "max_new_tokens": 24}
        full, _ = decode(target, None, prompt, prompt_id, **settings)
        ends = frozenset(token for token in range(64) if token not in full[:20])
        for verification in ("coupled", "match"):
            options = {"method": "dynamic_tree", "tree": DynamicTree(*plan, verification=verification), "eos_ids": ends, **settings}
            text, vanilla, _ = tree_and_vanilla(target, draft, prompt, prompt_id, **options)
            assert text == vanilla


@pytest.mark.parametrize("tree", ["static", "dynamic", "specexec"])
@pytest.mark.parametrize("count", [1, 7])
def test_stop_and_length_cut_committed_tokens(target, tree, count):
    """Behind a prompt of one token."""
    for draft in (noisy_exit(target, 1, own_block=True, scale=0.01), near_copy(target, 0.01)):
        settings = {"policy": SAMPLED, **TREES[tree]}
        full, vanilla, _ = tree_and_vanilla(target, draft, [5], max_new_tokens=20, **settings)
        assert full == vanilla
        cut, stats = decode(target, draft, [5], max_new_tokens=count, **settings)
        assert cut == full[:count] and stats.emitted == count
        stopped, stats = decode(target, draft, [5], max_new_tokens=20, stop=lambda tokens: len(tokens) == count, **settings)
        assert stopped == full[: count - 1] and stats.emitted == count - 1
        streamed: list[int] = []
        generate(target, [5], DecodeOptions(max_new_tokens=20, **settings), draft, on_tokens=streamed.extend)
        assert streamed == full


@pytest.mark.parametrize("tree", ["static", "dynamic", "specexec"])
@pytest.mark.parametrize("draft", ["own block", "model"])
def test_what_exactly_fits_the_context(target, tree, draft):
    """512 positions: prompt, new tokens and the tree's levels; a perfect draft goes as far as it may."""
    draft, depth = PERFECT_DRAFTS[draft](target), DEEP[tree]["tree"].depth
    prompt = random_text(512 - 30 - depth)[0].tolist()
    settings = {"policy": SAMPLED, "max_new_tokens": 30, **DEEP[tree]}
    text, vanilla, _ = tree_and_vanilla(target, draft, prompt, **settings)
    assert text == vanilla
    with pytest.raises(ValueError, match="exceed the context of 512"):
        decode(target, draft, [1, *prompt], **settings)


@pytest.mark.parametrize("options", [
    {"method": "static_tree", "tree": StaticTree(Growmap((-1,)))}, {"method": "dynamic_tree", "tree": DynamicTree(1)},
    {"method": "specexec", "tree": SpecExec(1)}], ids=lambda options: options["method"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_budget_of_one_is_vanilla(target, draft, options):
    for stats in check_text(target, DRAFTS[draft](target), count=1, **options):
        assert stats.target_calls == stats.target_tokens == stats.emitted and stats.draft_calls == 0
        assert all((r.proposed, r.accepted, len(r.tokens)) == (0, 0, 1) for r in stats.rounds)


NARROW = {
    **{name: TREES[name] for name in ("static", "dynamic", "specexec")},
    # grow far where one child is nearly certain and its siblings are among the best for a while
    "specexec of few nodes": {"method": "specexec", "tree": SpecExec(9, 16, 8)},
    "specexec of few nodes, coupled": {"method": "specexec", "tree": SpecExec(16, 16, 8, verification="coupled")},
}


@pytest.mark.parametrize("draft", ["own block", "model"])
@pytest.mark.parametrize("tree", NARROW)
def test_a_cache_without_a_slot_to_spare(target, tree, draft, monkeypatch):
    """Capacity is rounded up, which could hide a pass that writes behind its end."""
    monkeypatch.setattr(static_llama, "REACH_STEP", 1)
    draft = DRAFTS[draft](target)
    for length in (50, 1):  # the second with the first one's engines, a new one's draft
        prompt, settings = random_text(length, seed=length)[0].tolist(), {"policy": SAMPLED, "max_new_tokens": 24, **NARROW[tree]}
        text, vanilla, _ = tree_and_vanilla(target, draft, prompt, **settings)
        assert text == vanilla
        assert speculative._engines[target].target.capacity == 50 + 24 + NARROW[tree]["tree"].slots + 1


@pytest.mark.parametrize("draft", DRAFTS)
def test_trees_wider_than_the_capacity_step(target, draft):
    """300 nodes of which a device's pass of 256 slots would see the first only."""
    growmap = Growmap((-1, *[node // 7 for node in range(299)]))
    assert growmap.size > static_llama.REACH_STEP and max(growmap.children) == 7
    for options in ({"method": "static_tree", "tree": StaticTree(growmap)}, {"method": "dynamic_tree", "tree": DynamicTree(300, 3, 30)}):
        text, vanilla, stats = tree_and_vanilla(target, DRAFTS[draft](target), random_text(100)[0].tolist(), policy=SAMPLED, max_new_tokens=12, **options)
        assert text == vanilla and max(r.accepted for r in stats.rounds) >= 2


# ---- one engine for many generations ----

def check_generations_in_turn(target, draft) -> None:
    """Trees of several plans, chains and vanilla, in turn on the same engines, some broken off, from short texts to long ones."""
    chains = [{"method": "speculative"}]
    if isinstance(draft, TruncatedLlama):
        chains.append({"method": "self_speculative"})
    others = [{"method": "static_tree", "tree": StaticTree(chain(3))}, {"method": "dynamic_tree", "tree": DynamicTree(32, 7, 8)}]
    for prompt_id, length in enumerate((120, 2, 60)):
        prompt, settings = random_text(length, seed=length)[0].tolist(), {"policy": SAMPLED, "verification": "coupled", "max_new_tokens": 24}
        vanilla, _ = decode(target, None, prompt, prompt_id, **settings)
        for options in [*list(COUPLED_TREES.values())[prompt_id % 2 :: 2], *chains, *others]:
            assert decode(target, draft, prompt, prompt_id, **settings, **options)[0] == vanilla, options
        for options in (*others, chains[-1], TREES["static"]):
            with pytest.raises(KeyboardInterrupt):
                generate(target, prompt[::-1], DecodeOptions(**settings, **options), draft, on_tokens=_interrupt)
            assert decode(target, draft, prompt, prompt_id, **settings, **TREES["specexec, coupled"])[0] == vanilla


def _interrupt(tokens: list[int]) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("draft", DRAFTS)
def test_generations_with_other_plans_and_methods_do_not_disturb_each_other(draft):
    target = llama("cpp")
    draft = DRAFTS[draft](target)
    check_generations_in_turn(target, draft)
    engines = speculative._engines[target]
    used = engines.target, engines.drafts[draft]
    decode(target, draft, [1, 2], max_new_tokens=4, **TREES["static"])
    assert used == (speculative._engines[target].target, speculative._engines[target].drafts[draft])


# ---- what a device would do: programs that are captured once, and replayed ----

class Replaying(Programs):
    """What a CUDA graph does: a key's first call is what every later one does again, with the numbers that the host had then; only the inputs are new."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.first: dict = {}
        self.replays = 0

    def another(self) -> Replaying:
        return Replaying(self._device)

    def __call__(self, key, function, *inputs):
        whole = (key, *((tuple(tensor.shape), tensor.dtype) for tensor in inputs))
        known = whole in self.first
        self.replays += known
        function, reaches = self.first.setdefault(whole, (function, []))
        again = iter(tuple(reaches))

        class Frozen(Scatter):
            def __init__(self, rotary, slots, reach, *tree):
                if not known:
                    reaches.append(reach)
                super().__init__(rotary, slots, next(again) if known else reach, *tree)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(static_llama, "Scatter", Frozen)
            return tuple(output.clone() for output in function(*inputs))


@pytest.fixture
def replayed(monkeypatch) -> None:
    """Engines as on a device, with programs that are captured and replayed. In fp64: the C++ does not look at what a pass may see."""
    as_on_device(monkeypatch)
    monkeypatch.setattr(static_llama, "Programs", Replaying)
    monkeypatch.setattr(static_llama, "REACH_STEP", 32)  # so that short texts cross many of these edges


@pytest.mark.parametrize("draft", DRAFTS)
def test_replayed_programs_give_vanillas_text(replayed, draft):
    """A key that does not name all that the work depends on would give a later generation an earlier one's reach, plan or position."""
    target = llama()
    draft = DRAFTS[draft](target)
    check_generations_in_turn(target, draft)
    assert speculative._engines[target].drafts[draft].programs.replays > 100


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", ["static", "dynamic", "dynamic, swor", "specexec, coupled"])
def test_replayed_programs_leave_the_draft_as_good_as_it_is(replayed, tree, draft):
    """A draft's mistakes change no text: rounds, compared with those of programs that are run anew, show them. Texts cross the capacity step, other ids end them."""
    target = llama()
    draft = DRAFTS[draft](target)
    for length, ends in ((100, ()), (30, (1, 2)), (60, ())):
        prompt = random_text(length, seed=length)[0].tolist()
        settings = {"policy": SAMPLED, "max_new_tokens": 30, "eos_ids": frozenset(ends), **TREES[tree]}
        rounds = [(r.tokens, r.accepted, r.proposed) for r in decode(target, draft, prompt, **settings)[1].rounds]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Replaying, "__call__", lambda self, key, function, *inputs: function(*inputs))
            assert rounds == [(r.tokens, r.accepted, r.proposed) for r in decode(target, draft, prompt, **settings)[1].rounds]


@pytest.mark.parametrize("draft", ["own block", "model"])
def test_ends_of_an_earlier_generation_are_not_replayed(replayed, draft, monkeypatch):
    target = llama()
    trees, draft = seen_trees(monkeypatch), DRAFTS[draft](target)
    for ends in (frozenset(range(0, 64, 3)), frozenset(range(1, 64, 3))):
        trees.clear()
        for prompt_id in range(4):
            decode(target, draft, [5, 6], prompt_id, policy=SAMPLED, max_new_tokens=30, eos_ids=ends, **TREES["dynamic"])
        check_ends_have_no_children(trees, ends)


@pytest.mark.parametrize("tree", ["static", "static, match", "dynamic", "dynamic, match"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_another_text_needs_no_further_program(replayed, tree, draft):
    """Shapes do not hang on the text, but for how much of it the draft has still to see: captures would else never end."""
    target = llama()
    draft = DRAFTS[draft](target)

    def programs(prompt_id: int) -> set:
        decode(target, draft, [5, 6], prompt_id, policy=SAMPLED, max_new_tokens=25, eos_ids=frozenset({3, 9, 12}), **TREES[tree])
        return {key for key in speculative._engines[target].drafts[draft].programs.first if "root" not in str(key)[:40]}

    found = programs(0)
    assert 0 < len(found) <= TREES[tree]["tree"].depth  # a level pass fewer than there are levels, and verification
    assert all(programs(prompt_id) == found for prompt_id in range(1, 4))


WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select", "aten._unique2")


class Watch(TorchDispatchMode):
    """Notes the memory that is read, and was neither given nor made inside; refuses what a graph cannot capture."""

    def __init__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.inside = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.made: list[torch.Tensor] = []  # held, so that no address is used twice
        self.outside: dict[int, tuple[StorageWeakRef, str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        masks = "index" in str(func) and any(tensor.dtype == torch.bool for tensor in tree_leaves(args[1]) if isinstance(tensor, torch.Tensor))
        assert not str(func).startswith(WAITS) and not masks, f"a graph cannot capture {func}, which waits for the device"
        fresh = str(func).startswith("aten.lift_fresh")
        for storage in (tensor.untyped_storage() for tensor in read):
            if storage._cdata not in self.inside and not fresh:
                self.outside.setdefault(storage._cdata, (StorageWeakRef(storage), str(func)))
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.outside:
                self.inside.add(tensor.untyped_storage()._cdata)
                self.made.append(tensor)
        return made


def no_upload(*args: object, **kwargs: object) -> None:
    raise AssertionError("a graph cannot capture an upload: torch.tensor(...)")


class Watched(Programs):
    """Plain calls that may do only what a CUDA graph can, and read only memory that is there as long as the programs are."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.read: list[tuple[StorageWeakRef, str, str]] = []

    def another(self) -> Watched:
        return Watched(self._device)

    def __call__(self, key, function, *inputs):
        with pytest.MonkeyPatch.context() as patch, Watch(inputs) as watch:
            patch.setattr(torch, "tensor", no_upload)
            found = function(*inputs)
        self.read += [(*each, str(key)[:30]) for each in watch.outside.values()]
        return found

    def check(self) -> None:
        gc.collect()
        gone = Counter((operation, key) for ref, operation, key in self.read if ref.expired())
        assert not gone, f"a graph would read memory that was freed: {gone}"


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", ["static", "dynamic", "specexec, coupled", "chain"])
def test_programs_are_what_a_graph_can_capture(monkeypatch, tree, draft):
    """Rejection's walk asks the host where there is one, so it is not among these."""
    as_on_device(monkeypatch)
    monkeypatch.setattr(static_llama, "Programs", Watched)
    target = llama()
    draft = DRAFTS[draft](target)
    options = {"method": "speculative", "verification": "coupled"} if tree == "chain" else TREES[tree]
    decode(target, draft, [1, 2, 3], policy=NUCLEUS, max_new_tokens=6, **options)
    programs = speculative._engines[target].drafts[draft].programs
    assert programs.read
    programs.check()


def test_watched_programs_see_what_a_graph_cannot_do():
    programs, x, held = Watched(torch.device("cpu")), torch.ones(3), torch.ones(3)
    freed = [torch.full((3,), 2.0)]
    assert programs("held", lambda x: (x + held,), x)[0].tolist() == [2, 2, 2]
    programs.check()
    programs("freed", lambda x: (x + freed[0],), x)
    freed.clear()
    with pytest.raises(AssertionError, match="freed"):
        programs.check()
    for work in (lambda x: (x * float(x.sum()),), lambda x: (x[x > 0],), lambda x: (x + torch.tensor(1.0),), lambda x: (x.nonzero(),)):
        with pytest.raises(AssertionError, match="a graph cannot capture"):
            programs("work", work, x)


# ---- trees ----

def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    """Each node's parent is any before it; often the last, so that trees are deep."""
    return [-1, *[int(torch.randint(max(0, i - 4) if i % 2 else 0, i, (1,), generator=generator)) for i in range(1, nodes)]]


def lines(parents: list[int]) -> list[list[int]]:
    """Each node's path from the root, itself the last."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


def test_what_a_trees_nodes_see():
    """50 random trees: the closure of parents, whether all come at once or the last leaves later."""
    generator = torch.Generator().manual_seed(0)
    for nodes in range(1, 51):
        parents = random_parents(nodes, generator)
        paths = lines(parents)
        wanted = torch.zeros(nodes, nodes, dtype=torch.bool)
        for node, path in enumerate(paths):
            wanted[node, path] = True
        deepest = max(map(len, paths)) - 1
        tokens, values = torch.randint(0, 64, (nodes,), generator=generator), torch.zeros(nodes, dtype=torch.float64)
        for bound in (deepest, deepest + 3):
            assert torch.equal(ancestors(torch.tensor(parents), bound), wanted)
        tree = Tree.of(tokens, torch.tensor(parents), values, deepest)
        assert torch.equal(tree.visible, wanted) and tree.depths.tolist() == [len(path) - 1 for path in paths] and len(tree) == nodes
        inner = max(*parents, 0) + 1  # nodes up to the last that has children: the others are leaves
        first = Tree.of(tokens[:inner], torch.tensor(parents[:inner]), values[:inner], deepest)
        whole = first.with_leaves(tokens[inner:], torch.tensor(parents[inner:], dtype=torch.int64), torch.ones(nodes - inner, dtype=torch.bool))
        for made in ("tokens", "parents", "depths", "visible"):
            assert torch.equal(getattr(whole, made), getattr(tree, made))


def device_engine(model: LlamaForCausalLM, capacity: int) -> StaticLlama:
    with pytest.MonkeyPatch.context() as patch:
        as_on_device(patch)
        return StaticLlama(model, capacity)


ENGINES: dict[str, Callable] = {"span": StaticLlama, "scatter": device_engine, "transformers": lambda model, capacity: CachedModel(model)}


def check_level_passes(make: Callable, model, forward: str = "forward_tree", reference: Callable | None = None, prefix: int = 21) -> None:
    """Trees fed in passes, each behind the nodes of those before it: logits along every path are those of the path as a text."""
    generator, text = torch.Generator().manual_seed(prefix), random_text(prefix)[0].tolist()
    engine = make(model, 128)
    for nodes in (1, 2, 9, 23, 40):
        parents = random_parents(nodes, generator)
        paths, tokens = lines(parents), torch.randint(0, 64, (nodes,), generator=generator)
        tree = Tree.of(tokens, torch.tensor(parents), torch.zeros(nodes), nodes)
        getattr(engine, "target", engine).start()
        engine.prefill([text])
        starts, ends = torch.tensor([prefix]), sorted({1, nodes, *torch.randint(1, nodes + 1, (3,), generator=generator).tolist()})
        found = [getattr(engine, forward)(tokens[start:end], starts, tree.depths[start:end], tree.visible[start:end, :end]).clone()
                 for start, end in zip([0, *ends], ends, strict=False)]
        texts = torch.tensor([[*text, *tokens[path].tolist(), *[0] * (nodes - len(path))] for path in paths])
        wanted = (reference or model)(texts, use_cache=False).logits
        assert all(near(row, wanted[node, prefix + len(paths[node]) - 1]) for node, row in enumerate(torch.cat(found)))


@pytest.mark.parametrize("kind", ["cpp", "fp32", "torch"])
@pytest.mark.parametrize("engine", ENGINES)
def test_passes_behind_earlier_levels_are_their_paths(engine, kind, monkeypatch):
    if kind == "fp32":
        monkeypatch.setattr(native, "library", lambda: None)
    target = llama("torch" if kind == "torch" else "cpp")
    with torch.inference_mode():
        for prefix in (1, 21):
            check_level_passes(ENGINES[engine], target, prefix=prefix)
        if engine == "transformers":
            check_level_passes(ENGINES[engine], noisy_exit(target, 1, own_block=True))


@pytest.mark.parametrize("engine", ["span", "scatter"])
@pytest.mark.parametrize("own_block", [False, True])
def test_passes_of_an_exit_behind_earlier_levels_are_their_paths(target, engine, own_block):
    draft = noisy_exit(target, 1, own_block)
    with torch.inference_mode():
        def make(model, capacity):
            return SharedExit(ENGINES[engine](model, capacity), draft.exit)

        check_level_passes(make, target, "draft_tree", draft)
        check_level_passes(make, target, "verify_tree")


# ---- planted bugs ----

@pytest.mark.parametrize("tree", ["static", "dynamic"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_forgotten_compaction(monkeypatch, target, tree, draft):
    """The first slots of the tree stay where the accepted path belongs."""
    draft = DRAFTS[draft](target)
    for model in (StaticLlama, CachedModel):
        exact = model.keep
        monkeypatch.setattr(model, "keep", lambda self, start, nodes, exact=exact: exact(self, start, torch.arange(len(nodes))))
    with pytest.raises(AssertionError):
        check_text(target, draft, **TREES[tree])
    for engine in ("static", "transformers"):
        with pytest.raises(AssertionError):
            check_caches_after_every_round(target, draft, engine=engine, **TREES[tree])


def change_tree_passes(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let every pass over a tree take the depths and visibility that `change` makes of those that it is given."""
    for model, name in ((StaticLlama, "place_tree"), (CachedModel, "forward_tree")):
        exact = getattr(model, name)
        patch.setattr(model, name, lambda self, *args, exact=exact: exact(self, *args[:-2], *change(*args[-2:])))


@pytest.mark.parametrize("tree", ["static", "dynamic"])
@pytest.mark.parametrize("draft", ["own block", "model"])
def test_positions_of_nodes_off_by_one(monkeypatch, target, tree, draft):
    draft = DRAFTS[draft](target)
    change_tree_passes(monkeypatch, lambda depths, visible: (depths + 1, visible))
    for engine in ("static", "transformers"):
        with pytest.raises(AssertionError):
            check_caches_after_every_round(target, draft, engine=engine, **TREES[tree])
    with pytest.raises(AssertionError):
        check_level_passes(StaticLlama, target)


def siblings_seen(depths: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each node sees the one before it, which is often its sibling."""
    count = len(depths)
    before = torch.eye(count, dtype=torch.bool).roll(-1, 1).tril(-1)
    return depths, torch.cat([visible[:, :-count], visible[:, -count:] | before], 1)


@pytest.mark.parametrize("tree", ["static", "dynamic"])
@pytest.mark.parametrize("draft", ["own block", "model"])
def test_nodes_that_see_their_siblings(monkeypatch, target, tree, draft):
    draft = DRAFTS[draft](target)
    change_tree_passes(monkeypatch, siblings_seen)
    for engine in ("static", "transformers"):
        with pytest.raises(AssertionError):
            check_caches_after_every_round(target, draft, engine=engine, **TREES[tree])
    with pytest.raises(AssertionError):
        check_level_passes(StaticLlama, target)


@pytest.mark.parametrize("draft", ["own block", "model"])
def test_nodes_that_do_not_see_the_text(monkeypatch, draft):
    """A mask that is right within the tree, and forgets what is before it."""
    as_on_device(monkeypatch)
    target = llama()
    exact = Scatter.seen
    monkeypatch.setattr(Scatter, "seen", lambda self: exact(self) & (torch.arange(self.reach) >= (0 if self.tree is None else self.tree.starts[:, None, None])))
    with pytest.raises(AssertionError):
        check_text(target, DRAFTS[draft](target), **TREES["dynamic"])


def test_forgotten_crop_of_the_draft(monkeypatch, target):
    """transformers' cache holds the tree's levels behind the text until they are cropped."""
    draft, exact = near_copy(target), kv_cache.CachedModel.crop
    monkeypatch.setattr(kv_cache.CachedModel, "crop", lambda self, lengths: None if self.model is draft else exact(self, lengths))
    for tree in ("static", "dynamic"):
        with pytest.raises((AssertionError, RuntimeError)):
            check_caches_after_every_round(target, draft, engine="transformers", **TREES[tree])


def test_draft_that_counts_its_levels_as_text(monkeypatch, target):
    monkeypatch.setattr(ModelDraft, "count_root", lambda self: self._model.advance(self.pending + 1))
    with pytest.raises(AssertionError):
        check_caches_after_every_round(target, near_copy(target), **TREES["static"])


def test_draft_that_believes_the_accepted_nodes_are_in_its_cache(monkeypatch, target):
    """They are, but among the rejected ones, and the leaves were never fed."""
    exact = TreeRound._result

    def result(self, *args):
        found = exact(self, *args)
        self.state.draft.lengths = [self.state.draft.lengths[0] + found.accepted]
        return found

    monkeypatch.setattr(TreeRound, "_result", result)
    for draft in (near_copy(target), DRAFTS["own block"](target)):
        with pytest.raises(AssertionError):
            check_caches_after_every_round(target, draft, **TREES["static"])


def test_hidden_states_that_are_not_compacted(monkeypatch, target):
    """The own block then catches up with rejected nodes: texts stay exact, caches do not."""
    monkeypatch.setattr(SharedExit, "keep", lambda self, start, nodes: None)
    draft = DRAFTS["own block"](target)
    for tree in ("static", "dynamic"):
        check_text(target, draft, **TREES[tree])
        with pytest.raises(AssertionError):
            check_caches_after_every_round(target, draft, **TREES[tree])


@pytest.mark.parametrize(("wrong", "check"), [(-1, check_caches_after_every_round), (1, check_work)])
def test_what_the_own_block_has_not_seen_is_miscounted(monkeypatch, target, wrong, check):
    """Too few leave rejected nodes in its cache; too many are but wasted work."""
    exact = ExitDraft.__init__

    def init(self, state):
        exact(self, state)
        self.key = self._behind = max(0, self._behind + wrong)

    monkeypatch.setattr(ExitDraft, "__init__", init)
    with pytest.raises(AssertionError):
        for tree in ("static", "dynamic", "specexec, coupled"):
            check(target, DRAFTS["own block"](target), **{**TREES[tree], "max_new_tokens": 40})


def test_verification_noise_off_by_one_position(monkeypatch, target):
    exact = tree_drafting.verify_match
    monkeypatch.setattr(tree_drafting, "verify_match", lambda logits, policy, tree, noise, starts: exact(logits, policy, tree, noise, starts + 1))
    with pytest.raises(AssertionError):
        check_text(target, noisy_exit(target, 0), **TREES["static"])


def test_noise_of_children_off_by_one_position(monkeypatch, target):
    """Texts stay exact; a draft like the target has not everything accepted."""
    exact = tree_drafting.Nodes
    monkeypatch.setattr(tree_drafting, "Nodes", lambda noise, starts, depths, ids: exact(noise, starts + 1, depths, ids))
    for stats in check_text(target, PERFECT_DRAFTS["head"](target), **DEEP["static"]):
        assert any(r.accepted < 4 for r in stats.rounds)


def test_key_that_names_no_reach(monkeypatch, replayed):
    """Then a program that was captured for a short text is replayed for a long one, of which it sees the beginning."""
    monkeypatch.setattr(DecodeState, "program", lambda state, programs, key, function, *inputs: programs(
        (key[0], state.policy), lambda *tensors: function(*tensors[:-1], Noise(tensors[-1])), *inputs, state.noise.key))
    target = llama()
    with pytest.raises((AssertionError, RuntimeError)):
        check_generations_in_turn(target, noisy_exit(target, 1, scale=0.02))

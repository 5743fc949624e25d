"""The laws of tree drafting: what one node, one round and a whole text emit, which tokens become children, and which trees grow.

Enumeration runs the real code on noise that a test plans: every order of draws and every accept/reject pattern, each weighed by its chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise, permutations, product
from types import SimpleNamespace

import pytest
import torch

import decoding.best_first as best_first
import decoding.children as children
import decoding.verify as verify
from decoding.best_first import Growth
from decoding.children import Chooser, Coupling, Nodes
from decoding.dynamic_tree import DynamicTree, dynamic_tree_round
from decoding.growmap import Growmap
from decoding.sampling import Noise, Purpose, SamplingPolicy, draw, policy_probs
from decoding.specexec import SpecExec, specexec_round
from decoding.state import DecodeState, RoundResult, TreeCounts
from decoding.static_tree import StaticTree, static_tree_round
from decoding.tree import Tree
from decoding.tree_drafting import TreeRound
from decoding.verify import TREE_RULES, TreeRule
from engine.kv_cache import CachedModel
from toy_models import TOY_VOCAB, TREES, BigramModel, bigram_pair, chi_square_p, decode, transition_p

EXACT = 1e-12
PLAIN, NUCLEUS, GREEDY = SamplingPolicy(1.0), SamplingPolicy(1.5, top_p=0.8), SamplingPolicy(0.0)
POLICIES = [PLAIN, SamplingPolicy(0.3), NUCLEUS, SamplingPolicy(0.7, top_k=2), GREEDY]
DTYPES = [torch.float32, torch.float64]  # sampling and matching through C++, and through torch
ROUNDS: dict[type, Callable[[DecodeState, object], list[RoundResult]]] = {
    StaticTree: static_tree_round, DynamicTree: dynamic_tree_round, SpecExec: specexec_round}
TWO_LEVELS = Growmap((-1, 0, 0, 1, 1))


# ---- noise that is planned ----

class Chances:
    """Stands for chance: over all `runs`, what asks it gets every combination of answers, and `weight` is the chance of the current one."""

    def __init__(self) -> None:
        self._answers: list[list[tuple[int, float]]] = []  # to each question those still to be given, the current one last

    def runs(self) -> Iterator[None]:
        """Once per combination of answers."""
        while True:
            self._asked, self.weight = 0, 1.0
            yield
            while self._answers and len(self._answers[-1]) == 1:
                self._answers.pop()
            if not self._answers:
                return
            self._answers[-1].pop()

    def pick(self, chances: list[float]) -> int:
        """One of the indices of `chances`; none of chance 0."""
        if self._asked == len(self._answers):
            self._answers.append([(i, chance) for i, chance in enumerate(chances) if chance > 0])
        answer, chance = self._answers[self._asked][-1]
        self._asked += 1
        self.weight *= chance
        return answer


class Coin:
    """A uniform number u that is still open: u·d < r holds with the chance that it has."""

    def __init__(self, chances: Chances) -> None:
        self._chances = chances

    def __mul__(self, d: torch.Tensor) -> Coin:
        self._d = float(d)
        return self

    def __lt__(self, r: torch.Tensor) -> torch.Tensor:
        accept = min(float(r) / self._d, 1.0) if self._d > 0 else float(r > 0)
        return torch.tensor(self._chances.pick([accept, 1 - accept]) == 0)


class Coins:
    """The uniforms of a walk, each for one use."""

    def __init__(self, chances: Chances) -> None:
        self._chances, self._used = chances, set()

    def __getitem__(self, node: int | torch.Tensor) -> Coin:
        assert int(node) not in self._used, "two decisions share their noise"
        self._used.add(int(node))
        return Coin(self._chances)


class Planned:
    """From here on the noise of trees under rejection is planned: `draws` choose `width` children of a node, `coins` accept or reject them, and
    the `last` token of a round is not drawn: the laws that it would be drawn from are kept."""

    def __init__(self, patch: pytest.MonkeyPatch, width: int) -> None:
        self.draws, self.coins, self.last, self._width = Chances(), Chances(), [], width
        self._nodes: set[int] = set()
        patch.setattr(children, "policy_probs", self._note_law)
        patch.setattr(Noise, "exponential", lambda noise, ids, vocab_size, purpose: self._order(ids[0].tolist(), purpose))
        patch.setattr(Noise, "uniform", lambda noise, ids, purpose: [Coins(self.coins)])
        patch.setattr(verify, "draw", lambda law, *_: self.last.append(law[0, 0]) or torch.zeros(1, 1, dtype=torch.int64))

    def drafts(self) -> Iterator[None]:
        """Once per combination of draws."""
        for _ in self.draws.runs():
            self._nodes.clear()
            yield

    def _note_law(self, logits: torch.Tensor, policy: SamplingPolicy) -> torch.Tensor:
        self._q = policy_probs(logits, policy)
        return self._q

    def _order(self, nodes: list[int], purpose: Purpose) -> torch.Tensor:
        """Exponential values (1, M, V) under which each of M nodes draws `width` tokens in the order that `draws` says."""
        assert purpose == Purpose.DRAFT
        for node in nodes:
            assert node not in self._nodes, "two nodes share their noise"
            self._nodes.add(node)
        values = torch.ones_like(self._q)
        for row, left in zip(values, self._q.tolist(), strict=True):
            for place in range(self._width):
                if sum(left) > 0:
                    token = self.draws.pick([chance / sum(left) for chance in left])
                    row[token], left[token] = 1e-300 * 1e30**place, 0.0
        return values[None]


def continued(kept: list[int], next_law: torch.Tensor, p: torch.Tensor, length: int) -> torch.Tensor:
    """Law (V, …, V) of `length` tokens that start with `kept`, go on with `next_law` (V,), and then with the target's p (V, V)."""
    assert len(kept) < length
    law = next_law
    for _ in range(length - len(kept) - 1):
        law = law[..., None] * p
    for token in reversed(kept):
        law = torch.stack([law if token == other else torch.zeros_like(law) for other in range(len(p))])
    return law


def tables(seed: int, vocab_size: int = 4, sharpness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (V, V) of a first-order target and draft."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(sharpness * torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64) for _ in range(2))


def root_node(count: int = 1) -> Nodes:
    """So many nodes at the root's place, told apart by their ids."""
    zeros = torch.zeros(count, dtype=torch.int64)
    return Nodes(Noise.of(0, [0]), torch.tensor([0]), zeros, torch.arange(count))


def some_tree(tokens: list[int], parents: list[int]) -> Tree:
    return Tree.of(torch.tensor(tokens), torch.tensor(parents), torch.zeros(len(tokens), dtype=torch.float64), len(tokens))


# ---- one node ----

@torch.inference_mode()
def check_node(p: torch.Tensor, q_logits: torch.Tensor, policy: SamplingPolicy, width: int) -> None:
    """The law of the first two tokens of a round over `width` children drawn without replacement is the target's, given its p (V, V) and
    the draft's logits (V,) behind token 0; it takes the walk, the residual and the bonus."""
    with pytest.MonkeyPatch.context() as patch:
        planned = Planned(patch, width)
        chooser, law = Chooser(TREE_RULES["swor"], policy, len(p)), torch.zeros_like(p)
        for _ in planned.drafts():
            found = chooser(q_logits[None], width, root_node())
            tree = some_tree([0, *found.tokens[0].tolist()], [-1, *[0] * found.tokens.shape[1]])
            for _ in planned.coins.runs():
                reached, _ = verify.verify_swor(p[tree.tokens], found.q.expand(len(tree), -1), tree, root_node().noise, torch.tensor([0]))
                kept = tree.tokens[1:][reached[1:]].tolist()
                assert len(kept) <= 1, "two siblings were accepted"
                law += planned.draws.weight * planned.coins.weight * continued(kept, planned.last[-1], p, 2)
    assert (law - continued([], p[0], p, 2)).abs().max() < EXACT


def check_nodes() -> None:
    """A few nodes that between them show any wrong rule."""
    p, q = tables(0)
    for p_policy, q_policy in ((PLAIN, PLAIN), (NUCLEUS, NUCLEUS), (PLAIN, GREEDY)):
        check_node(policy_probs(p, p_policy), q[0], q_policy, 3)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(("vocab_size", "width", "seed"), [(2, 2, 0), (4, 1, 1), (4, 2, 2), (4, 3, 3), (5, 3, 4), (6, 3, 5)])
def test_rejection_at_a_node_has_the_targets_law(vocab_size, width, seed, policy):
    p, q = tables(seed, vocab_size)
    check_node(policy_probs(p, policy), q[0], policy, width)


@pytest.mark.parametrize(("p", "q"), [
    ([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]), ([0.5, 0.5, 0, 0], [0, 0.9, 0.1, 0]), ([0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0]),
    ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]), ([0.25] * 4, [0.7, 0.3, 0, 0]), ([0.999, 0.001, 0, 0], [0.001, 0.999, 0, 0])])
def test_rejection_at_a_node_with_zeros(p, q):
    """Among them: disjoint supports, more children than q has tokens, one-hot rows, and q equal to p."""
    rows = torch.tensor([p, *[[0.4, 0.3, 0.2, 0.1]] * 3], dtype=torch.float64)
    check_node(rows, torch.tensor(q, dtype=torch.float64).log(), PLAIN, 3)


def check_zero_is_never_accepted() -> None:
    """Not even by a uniform of 0."""
    p, q = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[0.5, 0.5]] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Noise, "uniform", lambda noise, ids, purpose: torch.zeros(ids.shape, dtype=torch.float64))
        reached, last = verify.verify_swor(p, q, some_tree([0, 0], [-1, 0]), root_node().noise, torch.tensor([0]))
    assert reached.tolist() == [True, False] and last == 1


def test_token_of_target_probability_zero_is_never_accepted():
    check_zero_is_never_accepted()


def test_rules_that_are_exact_and_those_that_are_not():
    assert all(rule.lossless for rule in TREE_RULES.values())
    assert not TreeRule("top_k", "overwrite").lossless
    for kind in ("top_k", "gumbel"):
        with pytest.raises(ValueError, match="exact for drawn children only"):
            TreeRule(kind, "swor")
    with pytest.raises(ValueError, match="choose 'match' or 'coupled'"):
        SpecExec(verification="swor")


# ---- matching: vanilla's text, whatever that is ----

def plan_text(patch: pytest.MonkeyPatch) -> list[int]:
    """From here on vanilla sampling behind position 0 draws the tokens of this list, to be filled, where they have any chance."""
    text: list[int] = []

    def exponential(noise: Noise, positions: torch.Tensor, tokens: int, purpose: Purpose) -> torch.Tensor:
        assert purpose == Purpose.TOKEN
        wanted = torch.tensor([*text, 0, 0])[positions - 1]
        return torch.ones(*positions.shape, tokens, dtype=torch.float64).scatter_(-1, wanted[..., None], 1e-300)

    patch.setattr(Noise, "exponential", exponential)
    return text


def texts(p: torch.Tensor, length: int) -> Iterator[tuple[int, ...]]:
    """Those of chance above 0 behind token 0."""
    for text in product(range(len(p)), repeat=length):
        if all(p[pair] > 0 for pair in pairwise((0, *text))):
            yield text


@torch.inference_mode()
def check_matching(parents: list[int], vocab_size: int, policy: SamplingPolicy) -> None:
    """For every text that vanilla may draw and all tokens that the nodes may have, the walk emits how that text begins, and stops only where no child goes on."""
    logits, _ = tables(0, vocab_size)
    depth = Growmap(tuple(parents)).depth
    with pytest.MonkeyPatch.context() as patch:
        planned = plan_text(patch)
        for tokens in product(range(vocab_size), repeat=len(parents) - 1):
            if len(set(zip(parents[1:], tokens, strict=True))) < len(tokens):
                continue  # siblings of one token
            tree = some_tree([0, *tokens], parents)
            for text in texts(policy_probs(logits, policy), depth + 1):
                planned[:] = text
                reached, last = verify.verify_match(logits[tree.tokens], policy, tree, root_node().noise, torch.tensor([0]))
                emitted = [*tree.tokens[reached][1:].tolist(), int(last)]
                assert tuple(emitted) == text[: len(emitted)]
                end = int(verify.last_of(reached))
                assert (end, emitted[-1]) not in zip(parents[1:], tokens, strict=True)


@pytest.mark.parametrize("policy", [PLAIN, NUCLEUS, GREEDY], ids=str)
@pytest.mark.parametrize(("parents", "vocab_size"), [([-1], 4), ([-1, 0], 4), ([-1, 0, 0, 0], 4), ([-1, 0, 1], 4), ([-1, 0, 0, 1, 1], 3)])
def test_matching_emits_vanillas_text_whatever_the_children(parents, vocab_size, policy):
    check_matching(parents, vocab_size, policy)


def toy_state(p_logits: torch.Tensor, q_logits: torch.Tensor, policy: SamplingPolicy, ends: frozenset[int] = frozenset(), seed: int = 0) -> DecodeState:
    """A generation behind the text [0]."""
    target, draft = (CachedModel(BigramModel(table)) for table in (p_logits, q_logits))
    return DecodeState(target, draft, policy, Noise.of(seed, [0]), [[0]], ends)


@torch.inference_mode()
def check_matching_round(plan: StaticTree | DynamicTree | SpecExec, policy: SamplingPolicy, vocab_size: int = 4) -> None:
    """For every text that vanilla may draw, a whole round emits how it begins; children are chosen as they are. At temperature 0 too."""
    p_logits, q_logits = tables(1, vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        planned = plan_text(patch)
        for text in texts(policy_probs(p_logits, policy), 3):
            planned[:] = text
            result, = ROUNDS[type(plan)](toy_state(p_logits, q_logits, policy), plan)
            assert tuple(result.tokens) == text[: len(result.tokens)] and len(result.tokens) == result.accepted + 1


@pytest.mark.parametrize("policy", [PLAIN, NUCLEUS, GREEDY], ids=str)
@pytest.mark.parametrize("verification", ["coupled", "match"])
@pytest.mark.parametrize("plan", [StaticTree(TWO_LEVELS), DynamicTree(6, 2, 3), SpecExec(6, 2, 3)], ids=lambda plan: type(plan).__name__)
def test_matching_round_emits_vanillas_text(plan, verification, policy):
    check_matching_round(type(plan)(**{**vars(plan), "verification": verification}), policy)


# ---- one round over two levels, under rejection ----

def strings(law: torch.Tensor, ends: frozenset[int]) -> Counter:
    """The chance of every string of `law`, cut behind the first end-of-text token."""
    chances: Counter = Counter()
    for string in product(range(len(law)), repeat=law.dim()):
        stop = next((i + 1 for i, token in enumerate(string) if token in ends), len(string))
        chances[string[:stop]] += float(law[string])
    return chances


@torch.inference_mode()
def check_round(plan: StaticTree | DynamicTree, policy: SamplingPolicy, width: int, seed: int = 0, ends: frozenset[int] = frozenset()) -> set:
    """The law of what a round emits, continued by the target, over all draws and all walks is the target's. Returns the shapes that trees had."""
    p_logits, q_logits = tables(seed, 3)
    p, laws, shapes = policy_probs(p_logits, policy), {}, set()
    law = torch.zeros([len(p)] * 3, dtype=torch.float64)
    exact = TreeRound.verify

    def every_walk(this_round: TreeRound, tree: Tree, q: torch.Tensor, counts: object) -> list[RoundResult]:
        key = tuple(map(repr, (tree.tokens.tolist(), tree.parents.tolist(), q.tolist())))  # equal trees have equal laws
        if key not in laws:
            laws[key] = 0
            for _ in planned.coins.runs():
                result, = exact(this_round, tree, q, counts)
                laws[key] += planned.coins.weight * continued(result.tokens[:-1], planned.last[-1], p, 3)
        law.add_(planned.draws.weight * laws[key])
        shapes.add(tuple(tree.parents.tolist()))
        return []

    with pytest.MonkeyPatch.context() as patch:
        planned = Planned(patch, width)
        patch.setattr(TreeRound, "verify", every_walk)
        for _ in planned.drafts():
            ROUNDS[type(plan)](toy_state(p_logits, q_logits, policy, ends), plan)
    found, wanted = (strings(each, ends) for each in (law, continued([], p[0], p, 3)))
    assert max(abs(found[string] - wanted[string]) for string in wanted) < EXACT
    return shapes


@pytest.mark.parametrize(("parents", "policy"), [
    *product([(-1, 0, 0), (-1, 0, 1), (-1, 0, 0, 1, 1)], [PLAIN, SamplingPolicy(0.3), NUCLEUS, GREEDY]), ((-1, 0, 0, 0, 1, 2, 2), PLAIN)], ids=str)
def test_round_over_a_static_tree_has_the_targets_law(parents, policy):
    check_round(StaticTree(Growmap(parents), "swor"), policy, max(Growmap(parents).children))


def growing(budget: int, top_k: int) -> DynamicTree:
    return DynamicTree(budget, 2, top_k, verification="swor")


@pytest.mark.parametrize("ends", [frozenset(), frozenset({1})], ids=["", "ends"])
@pytest.mark.parametrize(("budget", "policy", "seed"), [(3, PLAIN, 0), (4, PLAIN, 1), (5, PLAIN, 2), (4, NUCLEUS, 2), (9, NUCLEUS, 0)], ids=str)
def test_round_over_a_tree_that_grows_has_the_targets_law(budget, policy, seed, ends):
    """Its shape depends on what was drawn."""
    assert len(check_round(growing(budget, 2), policy, 2, seed, ends)) > 1 or budget == 3


@pytest.mark.parametrize(("budget", "ends"), [(4, frozenset()), (4, frozenset({1})), (6, frozenset({1}))], ids=str)
def test_round_over_a_tree_that_grows_in_passes_of_fixed_width_has_the_targets_law(budget, ends, monkeypatch):
    """As on a device."""
    monkeypatch.setattr(CachedModel, "on_host", False)
    check_round(growing(budget, 2), NUCLEUS, 2, 0, ends)


def check_round_with_a_level_cost() -> None:
    """Drawn trees take no note of it: were a level left out as its parents turned out unlikely, which of them stay would depend on which they are."""
    check_round(DynamicTree(3, 2, 2, level_cost=0.83, verification="swor"), PLAIN, 2, seed=7)


def test_round_over_drawn_children_does_not_stop_early():
    check_round_with_a_level_cost()


def check_adaptive_round() -> None:
    """Trees of which a third child may be a part or not."""
    assert len(check_round(growing(4, 3), NUCLEUS, 3, seed=1)) > 1


def test_round_over_a_tree_of_which_a_third_child_may_be_a_part_or_not():
    check_adaptive_round()


# ---- children ----

def in_order(q: torch.Tensor, count: int) -> torch.Tensor:
    """Law (V, …, V) of the first `count` tokens drawn from q (V,) without replacement."""
    law = torch.zeros([len(q)] * count, dtype=torch.float64)
    for tokens in permutations(range(len(q)), count):
        left, law[tokens] = 1.0, 1.0
        for token in tokens:
            law[tokens] *= q[token] / left if left > 1e-9 else 0.0
            left -= float(q[token])
    return law


def drawn_at(logits: torch.Tensor, count: int, start: int, nodes: int, policy: SamplingPolicy = PLAIN) -> torch.Tensor:
    """Children (nodes, count) of so many nodes of the round at `start`, all with these logits (V,)."""
    chooser = Chooser(TREE_RULES["swor"], policy, len(logits))
    return chooser(logits.expand(nodes, -1), count, root_node(nodes)._replace(starts=torch.tensor([start]))).tokens


def p_of_tuples(tuples: torch.Tensor, law: torch.Tensor) -> float:
    """p-value of so many tuples (n, K), under their law (V, …, V)."""
    counts = torch.zeros_like(law).index_put(tuple(tuples.T), torch.ones(len(tuples), dtype=law.dtype), accumulate=True)
    assert not counts[law == 0].any(), "a tuple of probability 0 was drawn"
    return chi_square_p(counts.flatten()[None], len(tuples) * law.flatten()[None])


def check_drawn_children(policy: SamplingPolicy, dtype: torch.dtype = torch.float64) -> None:
    """Drawn children come in the law of draws without replacement; those of two nodes, and of a node's places in two rounds, are independent."""
    logits = tables(3, 5)[0][0].to(dtype)
    q = policy_probs(logits, policy).double()
    now, then = (drawn_at(logits, 3, start, 20_000, policy) for start in (7, 8))
    if (q > 0).sum() >= 3:
        assert p_of_tuples(now, in_order(q, 3)) > 1e-4
    twice = q[:, None] * q
    assert p_of_tuples(torch.stack([now[:, 0], then[:, 0]], 1), twice) > 1e-4
    assert p_of_tuples(now[:, 0].reshape(-1, 2), twice) > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", [PLAIN, SamplingPolicy(0.7, top_p=0.9), NUCLEUS], ids=str)
def test_drawn_children_are_draws_without_replacement(policy, dtype):
    check_drawn_children(policy, dtype)


def check_ranks(policy: SamplingPolicy) -> None:
    """A drawn child ranks by the mass that its earlier siblings have left, which is known before it is drawn; where nothing is left it ranks nowhere."""
    logits = tables(4, 5)[0][0]
    q = policy_probs(logits, policy)
    chooser = Chooser(TREE_RULES["swor"], policy, 5)
    with pytest.MonkeyPatch.context() as patch:
        planned = Planned(patch, 4)
        for _ in planned.drafts():
            found = chooser(logits[None], 4, root_node())
            chances = q[found.tokens[0]]
            left = 1 - torch.tensor([float(chances[:j].sum()) for j in range(4)], dtype=torch.float64)
            assert len(found.tokens[0].unique()) == 4 and torch.equal(found.values[0], chances.log())
            assert torch.equal(found.ranks[0] > -torch.inf, left > EXACT) and torch.equal(found.q[0], q)
            assert ((found.ranks[0].exp() - left).abs() < EXACT).all()


@pytest.mark.parametrize("policy", [PLAIN, NUCLEUS, SamplingPolicy(0.7, top_k=2), GREEDY], ids=str)
def test_ranks_of_drawn_children_are_known_before_they_are_drawn(policy):
    check_ranks(policy)


def some_nodes(dtype: torch.dtype, vocab_size: int = 9) -> tuple[torch.Tensor, Nodes, torch.Tensor]:
    """Logits (40, V) of nodes at depths 0 to 3 behind position 11, and the Gumbel noise (40, V) of what follows them."""
    logits = 2 * torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nodes = Nodes(Noise.of(3, [0]), torch.tensor([11]), torch.arange(40) // 10, torch.arange(40))
    return logits.to(dtype), nodes, -nodes.noise.exponential(12 + nodes.depths[None], vocab_size, Purpose.TOKEN)[0].log()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coupling", [Coupling(), Coupling(0.6, 0.9), Coupling(1.4, 0.2)], ids=str)
@pytest.mark.parametrize("policy", [PLAIN, NUCLEUS, SamplingPolicy(0.3), GREEDY], ids=str)
def test_coupled_children_are_the_largest_of_q_and_the_targets_noise(policy, coupling, dtype):
    """In the order of softmax(a·log q + b·g), which are their values: over all tokens they sum to 1. q is whole: no top-p."""
    logits, nodes, gumbel = some_nodes(dtype)
    chooser = Chooser(TREE_RULES["coupled"], policy, 9, coupling)
    log_q = (logits.double() / (policy.temperature or 1)).log_softmax(-1)
    wanted = (coupling.draft * log_q + (coupling.noise * gumbel if policy.temperature > 0 else 0)).log_softmax(-1).topk(4, -1)
    found, whole = chooser(logits, 4, nodes), chooser(logits, 9, nodes)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert torch.equal(found.tokens, wanted.indices) and torch.equal(found.values, found.ranks)
    assert torch.allclose(found.values, wanted.values, atol=tolerance)
    assert torch.allclose(whole.values.exp().sum(-1), torch.ones(40, dtype=torch.float64), atol=tolerance)


def check_first_coupled_child(dtype: torch.dtype) -> None:
    """A draft that equals the target has the target's own draw as its first child."""
    logits, nodes, _ = some_nodes(dtype)
    for policy in (PLAIN, SamplingPolicy(0.3), SamplingPolicy(1.5), GREEDY):
        found = Chooser(TREE_RULES["coupled"], policy, 9)(logits, 2, nodes)
        drawn = draw(policy_probs(logits, policy)[None], nodes.noise, (nodes.starts + 1 + nodes.depths)[None])[0]
        assert torch.equal(found.tokens[:, 0], drawn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_coupled_child_of_a_draft_like_the_target_is_the_targets_draw(dtype):
    check_first_coupled_child(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.5])
def test_ranked_children_are_the_most_likely(temperature, dtype):
    """Valued by q, but never by one that is surer of itself than at temperature 1."""
    logits, nodes, _ = some_nodes(dtype)
    found = Chooser(TREE_RULES["match"], SamplingPolicy(temperature, top_p=0.5), 9)(logits, 4, nodes)
    best = logits.double().sort(descending=True).indices[:, :4]
    wanted = (logits.double() / max(1.0, temperature)).softmax(-1).log().gather(-1, best)
    assert torch.equal(found.tokens, best) and torch.allclose(found.values, wanted) and torch.equal(found.values, found.ranks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("verification", TREE_RULES)
def test_children_of_a_trimmed_vocabulary(verification, dtype):
    """Are those of a draft that holds all other tokens impossible, so no other token is one."""
    known = torch.tensor([1, 3, 4, 6, 8])
    logits, nodes, _ = some_nodes(dtype)
    whole = torch.full_like(logits, -1e4).index_copy(-1, known, logits[:, known])
    trimmed = Chooser(TREE_RULES[verification], SamplingPolicy(0.7), 9, token_ids=known)(logits[:, known], 5, nodes)
    assert torch.isin(trimmed.tokens, known).all() and (trimmed.tokens.sort().values == known).all()
    if verification == "swor":
        assert trimmed.q.shape == (40, 9) and torch.allclose(trimmed.q, policy_probs(whole, SamplingPolicy(0.7)))
    else:
        full = Chooser(TREE_RULES[verification], SamplingPolicy(0.7), 9)(whole, 5, nodes)
        assert torch.equal(trimmed.tokens, full.tokens) and torch.allclose(trimmed.values, full.values)


def test_no_more_children_than_tokens():
    logits, nodes, _ = some_nodes(torch.float64)
    for rule in TREE_RULES.values():
        assert Chooser(rule, PLAIN, 9)(logits, 20, nodes).tokens.shape == (40, 9)


@pytest.mark.parametrize("verification", TREE_RULES)
def test_static_trees_wider_than_the_vocabulary(verification):
    """They have nodes for which there is no token. It works, or the user is told."""
    target, draft = bigram_pair()
    plan = StaticTree(Growmap((-1, *[0] * (TOY_VOCAB + 1), 1)), verification)
    with suppress(ValueError):
        assert len(decode(target, draft, [0], policy=PLAIN, method="static_tree", tree=plan, max_new_tokens=5)[0]) == 5


# ---- shapes ----

def seen_trees(patch: pytest.MonkeyPatch) -> list[Tree]:
    """Grows by every tree that is verified from here on."""
    exact, trees = TreeRound.verify, []
    patch.setattr(TreeRound, "verify", lambda this_round, tree, *rest: trees.append(tree) or exact(this_round, tree, *rest))
    return trees


def paths(tree: Tree) -> list[tuple[int, ...]]:
    """The tokens behind the root that lead to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append((*found[parent], token) if parent >= 0 else ())
    return found


def check_shapes(name: str) -> None:
    """Trees have as many nodes as they may have, each behind its parent, at its depth, with its ancestors in sight, and no two with the same text."""
    target, draft = bigram_pair()
    with pytest.MonkeyPatch.context() as patch:
        trees = seen_trees(patch)
        decode(target, draft, [0], policy=SamplingPolicy(0.7), max_new_tokens=100, **TREES[name])
    plan = TREES[name]["tree"]
    for tree in trees:
        found = paths(tree)
        assert len(tree) == plan.budget and len(set(found)) == len(found)
        assert tree.depths.tolist() == [len(path) for path in found] and tree.depths.max() <= plan.depth
        assert tree.visible.tolist() == [[path[: len(above)] == above for above in found] for path in found]
        if isinstance(plan, StaticTree):
            assert tuple(tree.parents.tolist()) == plan.growmap.parents
    assert len({tuple(tree.parents.tolist()) for tree in trees}) > 1 or isinstance(plan, StaticTree)


@pytest.mark.parametrize("name", TREES)
def test_shapes_of_trees(name):
    check_shapes(name)


def fed_sets(patch: pytest.MonkeyPatch) -> list[dict[frozenset[int], tuple[int, ...]]]:
    """Grows by a dictionary per round from here on: which of the nodes fed to the draft each of them sees, itself included -> their tokens, without the root's."""
    begin, exact, rounds = TreeRound.__init__, TreeRound.level_children, []

    def began(this_round: TreeRound, *rest: object) -> None:
        begin(this_round, *rest)
        this_round.fed = [0]  # tokens, the root's first
        rounds.append({frozenset({0}): ()})

    def level(
        this_round: TreeRound, count: int, tokens: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor, *rest: object,
    ) -> children.Children:
        first = len(this_round.fed)
        this_round.fed += tokens.tolist()
        for place, (depth, row) in enumerate(zip(depths.tolist(), visible.tolist(), strict=True), start=first):
            seen = frozenset(i for i, sees in enumerate(row) if sees)
            assert place in seen and len(seen) == depth + 1, "a node sees itself and one node on each level above"
            assert seen - {place} in rounds[-1], "what its parent sees, it sees"
            rounds[-1][seen] = tuple(this_round.fed[i] for i in sorted(seen))[1:]
        return exact(this_round, count, tokens, depths, visible, *rest)

    patch.setattr(TreeRound, "__init__", began)
    patch.setattr(TreeRound, "level_children", level)
    return rounds


@pytest.mark.parametrize("name", TREES)
def test_a_drafted_node_sees_its_ancestors_alone(name):
    """And itself. Texts stay exact whatever it sees, but with more it is a worse draft."""
    target, draft = bigram_pair()
    with pytest.MonkeyPatch.context() as patch:
        fed, trees = fed_sets(patch), seen_trees(patch)
        decode(target, draft, [0], policy=SamplingPolicy(0.7), max_new_tokens=40, **TREES[name])
    for sight, tree in zip(fed, trees, strict=True):
        inner = set(tree.parents.tolist()) - {-1}
        assert {paths(tree)[node] for node in inner} <= set(sight.values()) and len(set(sight.values())) == len(sight)
    assert max(map(len, fed)) > 3


def test_every_drawn_node_has_children():
    """However unlikely it turned out to be: where the budget holds the whole tree, all of it is drafted."""
    plan = DynamicTree(15, 3, 2, verification="swor")
    for seed in range(5):
        with pytest.MonkeyPatch.context() as patch:
            trees = seen_trees(patch)
            dynamic_tree_round(toy_state(*tables(seed, TOY_VOCAB), PLAIN, seed=seed), plan)
        assert trees[0].depths.bincount().tolist() == [1, 2, 4, 8]


def test_growth_stops_when_a_pass_brings_less_than_the_round_in_its_time():
    """By hand: two draft passes, half a target pass each, and the target's own take the time of 2, in which 2 tokens are expected. At that pace half a
    token comes in a draft pass's time."""
    pool, growth = SimpleNamespace(expected=lambda count: torch.tensor(2.0)), Growth(8, 4, 2, 2, 4, level_cost=0.5)
    for gain, slows in ((0.55, False), (0.45, True)):
        counts = TreeCounts(considered=0, passes=2, expected=2.0 - gain)
        assert best_first._slows(pool, growth, counts) == slows and counts.expected == 2.0


def all_values(log_chances: Callable[[int, int], torch.Tensor], plan: SpecExec, ends: frozenset[int]) -> dict[tuple[int, ...], float]:
    """The value of every node that a tree could have: its path -> Σ of log_chances(token before, depth) (V,) along it."""
    values, level = {}, {(): 0.0}
    for depth in range(plan.depth):
        below = {}
        for path, value in level.items():
            before = path[-1] if path else 0
            if path and before in ends:
                continue
            best = log_chances(before, depth).topk(plan.branches)
            least = float(best.values[0]) + (math.log(plan.prune_threshold) if plan.prune_threshold else -math.inf)
            below |= {(*path, token): value + chance for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True) if chance >= least}
        values, level = values | below, below
    return values


def check_best_first(seed: int, verification: str, prune: float = 0.0, ends: frozenset[int] = frozenset(), temperature: float = 1.3) -> None:
    """A tree that grows until nothing unexpanded is among the best holds the nodes of the largest values, by brute force."""
    p_logits, q_logits = tables(seed, TOY_VOCAB, 2.0)
    noise, policy = Noise.of(seed, [0]), SamplingPolicy(temperature)

    def log_chances(before: int, depth: int) -> torch.Tensor:
        logits = q_logits[before] / (temperature if verification == "coupled" else max(temperature, 1))
        if verification == "coupled":
            logits = logits - noise.exponential(torch.tensor([[1 + depth]]), TOY_VOCAB, Purpose.TOKEN)[0, 0].log()
        return logits.log_softmax(-1)

    for budget in (2, 5, 9, 20, 60):
        plan = SpecExec(budget, 4, 3, prune, verification)
        values = all_values(log_chances, plan, ends)
        best = sorted(values, key=values.get, reverse=True)[: budget - 1]
        with pytest.MonkeyPatch.context() as patch:
            trees = seen_trees(patch)
            specexec_round(toy_state(p_logits, q_logits, policy, ends, seed), plan)
        assert set(paths(trees[0])) == {(), *best}
        assert torch.allclose(trees[0].values, torch.tensor([values.get(path, 0.0) for path in paths(trees[0])], dtype=torch.float64))


@pytest.mark.parametrize("ends", [frozenset(), frozenset({1, 6})], ids=["", "ends"])
@pytest.mark.parametrize("prune", [0.0, 0.2])
@pytest.mark.parametrize("verification", ["coupled", "match"])
def test_best_first_trees_hold_the_best_nodes(verification, prune, ends):
    for seed, temperature in ((0, 0.5), (1, 1.0), (2, 1.5)):
        check_best_first(seed, verification, prune, ends, temperature)


def test_specexec_feeds_no_more_nodes_than_it_has_slots_for():
    """A beam may feed nodes that better ones then displace: 17 of them here, for a tree of 10."""
    table = torch.full((20, 20), -20.0, dtype=torch.float64)
    table[0, 1], table[0, 2:9], table[1, 9:17] = 0.0, -3.0, 0.0
    plan = SpecExec(10, 16, 8)
    result, = specexec_round(toy_state(table, table, PLAIN), plan)
    assert result.tree.nodes == 10 and result.tree.fed <= plan.slots


@pytest.mark.parametrize("verification", ["coupled", "match"])
def test_what_fills_passes_of_fixed_width_is_part_of_no_walk(verification, monkeypatch):
    """As on a device: where ends leave fewer nodes to feed than a pass is wide, others are fed again, and their children are copies of a node's own."""
    monkeypatch.setattr(CachedModel, "on_host", False)
    settings = {"policy": PLAIN, "max_new_tokens": 30, "eos_ids": frozenset({1, 2, 5})}
    for seed in range(20):
        target, draft = bigram_pair(seed)
        tokens, _ = decode(target, draft, [0], seed, method="dynamic_tree", tree=DynamicTree(16, 3, 2, verification=verification), **settings)
        assert tokens == decode(target, None, [0], seed, **settings)[0]


# ---- whole texts, under rejection ----

SWOR_TREES = {name: TREES[name] for name in ("static, swor", "dynamic, swor")}


def check_law_of_a_text(name: str, policy: SamplingPolicy, tokens: int = 1200, dtype: torch.dtype = torch.float64) -> None:
    """In one long generation, tokens behind a round boundary and tokens within a round have the target's law, in one target call per round."""
    target, draft = bigram_pair(dtype=dtype)
    _, stats = decode(target, draft, [0], policy=policy, max_new_tokens=tokens, seed=3, **SWOR_TREES[name])
    assert stats.target_calls == target.calls == len(stats.rounds)
    before, pairs = 0, ([], [])
    for result in stats.rounds:
        for place, token in enumerate(result.tokens):
            pairs[min(place, 1)].append((before, token))
            before = token
    for place, seen in zip(("behind a boundary", "within a round"), pairs, strict=True):
        assert transition_p(seen, target, policy) > 1e-4, f"law {place}"


@pytest.mark.parametrize("policy", [SamplingPolicy(0.7, top_p=0.95), PLAIN, SamplingPolicy(1.5, top_p=0.9)], ids=str)
@pytest.mark.parametrize("name", SWOR_TREES)
def test_law_of_a_long_text(name, policy):
    check_law_of_a_text(name, policy)


@pytest.mark.parametrize("name", SWOR_TREES)
def test_law_of_a_long_text_in_fp32(name):
    check_law_of_a_text(name, PLAIN, dtype=torch.float32)


def check_law_behind_a_drawn_child(rounds: int = 1200) -> None:
    """What follows a rejection has noise of its own: where p is (.03, .38, .59), the children's would make it (.03, .42, .55)."""
    p, q = torch.tensor([0.03, 0.38, 0.59]), torch.tensor([0.63, 0.07, 0.30])
    chooser, found = Chooser(TREE_RULES["swor"], PLAIN, 3), []
    for start in range(rounds):
        nodes = root_node()._replace(starts=torch.tensor([start]))
        child = chooser(q.log()[None], 1, nodes)
        tree = some_tree([0, int(child.tokens)], [-1, 0])
        reached, last = verify.verify_swor(p.expand(2, -1), child.q.expand(2, -1), tree, nodes.noise, nodes.starts)
        found += [] if reached[1] else [int(last)]
    law = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
    assert chi_square_p(torch.bincount(torch.tensor(found), minlength=3)[None], len(found) * law[None]) > 1e-4


def test_law_behind_a_drawn_child():
    check_law_behind_a_drawn_child()


def check_first_two_tokens(plan: StaticTree | DynamicTree, method: str, policy: SamplingPolicy, runs: int) -> None:
    """The joint law of the first two tokens over independent generations, the second within the first round or behind it."""
    target, draft = bigram_pair()
    found = [decode(target, draft, [0], run, policy=policy, method=method, tree=plan, max_new_tokens=2)[0] for run in range(runs)]
    p = policy_probs(target.table, policy)
    assert p_of_tuples(torch.tensor(found), p[0][:, None] * p) > 1e-4


def check_all_accepted(name: str) -> None:
    """A draft that equals the target has a child accepted wherever there is one."""
    target, _ = bigram_pair()
    for policy in (PLAIN, NUCLEUS, GREEDY):
        _, stats = decode(target, target, [0], policy=policy, max_new_tokens=100, **SWOR_TREES[name])
        assert all(result.tested == result.accepted > 0 for result in stats.rounds)


@pytest.mark.parametrize("name", SWOR_TREES)
def test_draft_like_the_target_has_all_accepted(name):
    check_all_accepted(name)


@pytest.mark.parametrize(("plan", "method", "runs"), [
    (StaticTree(Growmap((-1, 0, 0)), "swor"), "static_tree", 2000), (DynamicTree(4, 2, 2, verification="swor"), "dynamic_tree", 1000)], ids=["static", "dynamic"])
def test_joint_law_of_the_first_two_tokens(plan, method, runs):
    check_first_two_tokens(plan, method, SamplingPolicy(0.7, top_p=0.95), runs)

"""Trees that grow best-first: what has the largest value is drafted on, and the best N nodes are verified.

The common principle of OPT-Tree 2406.17276, EAGLE-2 2406.16858, DySpec 2410.11744 and SpecExec 2406.02532: a node's value is the chance that it is on the
accepted path, the product of its edges' chances; the tree of N nodes with the largest sum of values is that of the N largest, as values
only fall along a path. Expanding nodes among the N best known so far never misses one of the N best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from decoding.children import IMPOSSIBLE, Children, Chooser, Coupling
from decoding.state import DecodeState, RoundResult, TreeCounts
from decoding.tree import Tree
from decoding.tree_drafting import TreeRound, reserved
from decoding.vanilla import vanilla_round
from decoding.verify import TREE_RULES, TreeVerification

DISPLACED = 4  # where passes are not counted, growth ends when this many times the budget has been fed


@dataclass(frozen=True)
class Growth:
    """How far a tree grows: `budget` nodes, the root included, at most `depth` levels below it; `top_k` children of a node, `beam` nodes in a draft pass.

    `passes` bounds the draft passes (None: as many as there are nodes to expand; then shapes depend on the text, and a device waits). `prune`: a child
    needs this share of its best sibling's chance. `level_cost`: what a draft pass takes, in target passes; a round stops when the last one brought
    less than that (0: never, and nothing waits to find out).
    """

    budget: int
    depth: int
    top_k: int
    beam: int
    passes: int | None
    prune: float = 0.0
    level_cost: float = 0.0

    def check(self) -> None:
        """Raise ValueError for sizes that nothing can grow to."""
        for name in ("budget", "depth", "top_k", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")

    @property
    def widest(self) -> int:
        """Most slots that a round fills behind the committed tokens: nodes of the tree, or nodes fed to the draft, some of which better ones displace."""
        if self.passes is None:
            return min(1 + (self.budget - 1) * self.beam, DISPLACED * self.budget + self.beam)
        return max(self.budget, 1 + (self.passes - 1) * self.beam)


class Pool(NamedTuple):
    """C candidates in the order in which they were drafted, the root first: `tokens`, `parents`, `depths`, int64 (C,), `values` and `ranks`, fp64 (C,), as in
    Children but along the path; `slots` (C,), which of the W nodes fed to the draft a candidate is (−1: not fed); `seen` bool (W, W), what these see of each other; `q` (W, V)."""

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor
    slots: torch.Tensor
    seen: torch.Tensor
    q: torch.Tensor

    @classmethod
    def of(cls, root: torch.Tensor, children: Children, growth: Growth) -> Pool:
        """The root, int64 (1,), and its children."""
        zero = torch.zeros_like(root)
        seen = torch.ones(1, 1, dtype=torch.bool, device=root.device)
        pool = cls(root, zero - 1, zero, zero.double(), zero.double(), zero, seen, children.q[:0])
        return pool.with_children(zero, children, growth)

    def with_children(self, expanded: torch.Tensor, children: Children, growth: Growth) -> Pool:
        """This pool with the children of its candidates `expanded` (M,), which are fed already."""
        values = self.values[expanded, None] + children.values
        ranks = torch.minimum(self.ranks[expanded, None], self.values[expanded, None] + children.ranks)
        if growth.prune > 0:
            ranks = ranks.masked_fill(children.values < children.values[:, :1] + math.log(growth.prune), IMPOSSIBLE)
        wide = children.tokens.shape[1]
        return self._replace(
            tokens=torch.cat([self.tokens, children.tokens.flatten()]), parents=torch.cat([self.parents, expanded.repeat_interleave(wide)]),
            depths=torch.cat([self.depths, (self.depths[expanded] + 1).repeat_interleave(wide)]), values=torch.cat([self.values, values.flatten()]),
            ranks=torch.cat([self.ranks, ranks.flatten()]), slots=torch.cat([self.slots, torch.full_like(children.tokens.flatten(), -1)]),
            q=torch.cat([self.q, children.q]),
        )

    def best(self, count: int) -> torch.Tensor:
        """The `count` candidates of the largest rank, ascending; of equals the earlier, so that none comes without its parent or an earlier sibling."""
        return self.ranks.sort(descending=True, stable=True).indices[:count].sort().values

    def frontier(self, growth: Growth, eos_ids: frozenset[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The candidates (M,) to feed next, by value, and which of them are worth it: those among the best that can have children and have none."""
        among_best = torch.zeros_like(self.slots, dtype=torch.bool)
        among_best[self.best(growth.budget)] = True
        fit = among_best & (self.slots < 0) & (self.depths < growth.depth) & (self.ranks > IMPOSSIBLE)
        for token in eos_ids:
            fit &= self.tokens != token
        chosen = torch.where(fit, self.values, IMPOSSIBLE).sort(descending=True, stable=True).indices[: growth.beam]
        return chosen, fit[chosen]

    def feed(self, chosen: torch.Tensor, worth: torch.Tensor) -> Pool:
        """This pool with `chosen` (M,) fed; those not `worth` it fill a pass of fixed width, and will have no children."""
        count, fed = len(chosen), len(self.seen)
        own = torch.eye(count, dtype=torch.bool, device=chosen.device)
        rows = torch.cat([self.seen[self.slots[self.parents[chosen]]], own], 1)
        above = torch.cat([self.seen, torch.zeros_like(self.seen[:, :1]).expand(-1, count)], 1)
        places = torch.arange(fed, fed + count, device=chosen.device)
        return self._replace(slots=self.slots.index_put((chosen,), torch.where(worth, places, self.slots[chosen])), seen=torch.cat([above, rows]))

    def expected(self, count: int) -> torch.Tensor:
        """Σ of values of the best `count`, fp64 (): the tokens that they are expected to bring, the last draw among them as the root's 1."""
        kept = self.best(count)
        return torch.where(self.ranks[kept] > IMPOSSIBLE, self.values[kept].exp(), 0.0).sum()

    def tree(self, count: int, deepest: int, trim: bool) -> tuple[Tree, torch.Tensor]:
        """The best `count` candidates as a tree, without impossible ones if `trim` (else no walk reaches these), and the q (N, V) of each node's children."""
        kept = self.best(count)
        if trim:
            kept = kept[self.ranks[kept] > IMPOSSIBLE]
        possible = self.ranks[kept] > IMPOSSIBLE
        parents = torch.searchsorted(kept, self.parents[kept]).where(possible & (self.parents[kept] >= 0), -1)
        q = self.q[self.slots[kept].clamp(min=0)] if self.q.shape[1] else self.q[:0]
        values = torch.where(possible, self.values[kept], IMPOSSIBLE)
        return Tree.of(self.tokens[kept], parents, values, deepest), q


def best_first_round(state: DecodeState, growth: Growth, verification: TreeVerification, coupling: Coupling) -> list[RoundResult]:
    """Grow a tree with the children of `verification` and `coupling`, and verify it in one target call."""
    growth = replace(growth, budget=growth.budget - reserved(state))
    if growth.budget <= 1:
        return vanilla_round(state, state.target.forward)
    chooser = Chooser(TREE_RULES[verification], state.policy, state.vocab_size, coupling, state.draft.token_ids)
    this_round = TreeRound(state, chooser)
    return this_round.verify(*grow(this_round, growth, state.eos_ids))


def grow(this_round: TreeRound, growth: Growth, eos_ids: frozenset[int]) -> tuple[Tree, torch.Tensor, TreeCounts]:
    """The tree that grows, and what else TreeRound.verify needs of it."""
    on_host = this_round.state.target.on_host
    fixed = not on_host and growth.passes is not None  # then a level's shapes do not depend on the text, and it can be a program

    def level(*inputs: torch.Tensor) -> Pool:
        *tensors, starts, noise = inputs
        pool = Pool(*tensors)
        chosen, worth = pool.frontier(growth, eos_ids)
        if not fixed:
            room = growth.widest - len(pool.seen)
            chosen, worth = chosen[worth][:room], worth[worth][:room]
            if len(chosen) == 0:
                return pool
        pool = pool.feed(chosen, worth)
        children = this_round.level_children(
            growth.top_k, pool.tokens[chosen], pool.depths[chosen], pool.seen[-len(chosen) :], starts, noise)
        children = children._replace(ranks=children.ranks.masked_fill(~worth[:, None], IMPOSSIBLE))
        return pool.with_children(chosen, children, growth)

    pool = Pool.of(this_round.root, this_round.root_pass(growth.top_k), growth)
    counts = TreeCounts(considered=len(pool.tokens) - 1)
    while counts.passes != growth.passes and not _slows(pool, growth, counts):
        grown = Pool(*this_round.level_pass(growth, level, pool, fixed))
        fed = len(grown.seen) - len(pool.seen)
        if fed == 0:
            break
        this_round.state.draft.note(fed)
        counts.add_pass(fed, len(grown.tokens) - len(pool.tokens))
        pool = grown
    return *pool.tree(growth.budget, deepest=min(growth.depth, counts.passes), trim=on_host), counts


def _slows(pool: Pool, growth: Growth, counts: TreeCounts) -> bool:
    """Whether the last draft pass brought fewer tokens than the round brings in that time (OPT-Tree's δ, from measured times)."""
    if growth.level_cost == 0:
        return False
    expected = float(pool.expected(growth.budget))
    gain, counts.expected = expected - counts.expected, expected
    return gain < growth.level_cost * expected / (1 + growth.level_cost * counts.passes)

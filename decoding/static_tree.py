"""Trees of one fixed shape (Sequoia 2402.12374): a growmap says how many children each node gets, and its ranks which.

"coupled" (the default): a node's children are those that the target most likely draws, given the noise that it will draw with; "match": its most likely tokens;
"swor": tokens drawn without replacement, accepted by rejection (the paper's). Lossless with all three. Deviation: leaves are never fed to the
draft, so that a tree of depth d takes d draft passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch

from decoding.children import Children, Chooser, Coupling
from decoding.growmap import Growmap
from decoding.sampling import Noise
from decoding.state import DecodeState, RoundResult, TreeCounts
from decoding.tree import Tree, ancestors
from decoding.tree_drafting import TreeRound
from decoding.vanilla import vanilla_round
from decoding.verify import TREE_RULES, TreeVerification, check_tree_verification


@dataclass(frozen=True)
class StaticTree:
    """A tree in the shape of `growmap` in every round."""

    growmap: Growmap
    verification: TreeVerification = "coupled"
    coupling: Coupling = Coupling()

    def __post_init__(self) -> None:
        check_tree_verification(self.verification)

    @property
    def budget(self) -> int:
        """Nodes, the root included."""
        return self.growmap.size

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return self.growmap.depth

    @property
    def slots(self) -> int:
        """Cache slots that a round needs behind the committed tokens."""
        return self.growmap.size


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes of one depth that have children, `nodes` (M,) of the tree, which see `visible` (M, W) of all such nodes so far; their children are the tree's
    nodes `children` (C,), each the `ranks`-th (C,) of the level's node `rows` (C,). At most `widest` of one node."""

    nodes: torch.Tensor
    visible: torch.Tensor
    children: torch.Tensor
    rows: torch.Tensor
    ranks: torch.Tensor
    widest: int


@dataclass(frozen=True, eq=False)
class Shape:
    """A growmap's tensors: `parents` and `depths` (N,), `values` fp64 (N,) and `visible` (N, N) as in a Tree (values NaN where reach is unknown), and its
    levels of nodes with children, from the root's."""

    parents: torch.Tensor
    depths: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor
    levels: tuple[Level, ...]


@cache
def shape_of(growmap: Growmap, device: torch.device) -> Shape:
    """The tensors of `growmap`."""
    parents, above = growmap.parents, torch.tensor(growmap.parents, device=device)
    visible = ancestors(above, growmap.depth)
    inner = [node for node in range(growmap.size) if growmap.children[node]]
    levels = []
    for _, group in groupby(inner, key=lambda node: growmap.depths[node]):
        nodes = list(group)
        fed = inner[: inner.index(nodes[-1]) + 1]
        children = [child for child in range(growmap.size) if parents[child] in nodes]
        rows, ranks = [nodes.index(parents[child]) for child in children], [growmap.ranks[child] for child in children]
        at, kids, of, rank = (torch.tensor(indices, device=device) for indices in (nodes, children, rows, ranks))
        levels.append(Level(at, visible[at][:, fed], kids, of, rank, max(ranks) + 1))
    reach = growmap.reach if growmap.acceptance or growmap.replayed else [torch.nan] * growmap.size
    values = torch.tensor(reach, dtype=torch.float64, device=device).log()
    return Shape(above, torch.tensor(growmap.depths, device=device), values, visible, tuple(levels))


def static_tree_round(state: DecodeState, plan: StaticTree) -> list[RoundResult]:
    """Fill the growmap with tokens, level by level, and verify it in one target call."""
    if plan.budget == 1:
        return vanilla_round(state, state.target.forward)
    shape = shape_of(plan.growmap, state.target.device)
    chooser = Chooser(TREE_RULES[plan.verification], state.policy, state.vocab_size, plan.coupling, state.draft.token_ids)
    this_round = TreeRound(state, chooser)
    tokens = this_round.root.repeat(plan.budget)
    drawn_from = []
    for number, level in enumerate(shape.levels):
        children = this_round.root_pass(level.widest) if number == 0 else _level_pass(this_round, level, tokens[level.nodes], number)
        if children.tokens.shape[1] < level.widest:
            raise ValueError(f"a node of the growmap has {level.widest} children, but the draft knows {children.tokens.shape[1]} tokens: build it with a smaller width")
        tokens[level.children] = children.tokens[level.rows, level.ranks]
        drawn_from.append(children.q)
    counts = TreeCounts(
        considered=plan.budget - 1, passes=len(shape.levels), fed=sum(len(level.nodes) for level in shape.levels),
        widest=max(len(level.nodes) for level in shape.levels))
    return this_round.verify(Tree(tokens, shape.parents, shape.depths, shape.values, shape.visible), _by_node(drawn_from, shape), counts)


def _level_pass(this_round: TreeRound, level: Level, tokens: torch.Tensor, number: int) -> Children:
    """The children of `tokens`, the nodes of `level`."""
    def run(tokens: torch.Tensor, starts: torch.Tensor, noise: Noise) -> Children:
        return this_round.level_children(level.widest, tokens, torch.full_like(tokens, number), level.visible, starts, noise)

    children = Children(*this_round.level_pass(level, run, (tokens,)))
    this_round.state.draft.note(len(tokens))
    return children


def _by_node(drawn_from: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    """q (N, V) of each node's children from that of each level's nodes; (0, 0) where there is none."""
    rows = torch.cat(drawn_from)
    if rows.shape[1] == 0:
        return rows[:0]
    return rows.new_zeros(len(shape.parents), rows.shape[1]).index_copy_(0, torch.cat([level.nodes for level in shape.levels]), rows)

"""Trees of drafted tokens behind the last committed one: what tree methods build, the target sees in one pass, and verification walks.

Shapes: N nodes, the root included; node 0, the root, is the last committed token; parents come before their children, and siblings are in
the order in which they were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Tree:
    """`tokens`, `parents` and `depths`, int64 (N,), the root's parent being −1 and its depth 0; `visible` (N, N): itself and its ancestors.

    A node at depth d stands d positions behind the root.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, parents: torch.Tensor, deepest: int) -> Tree:
        """The tree of these tokens and parents (N,), which is at most `deepest` levels deep."""
        visible = ancestors(parents, deepest)
        return cls(tokens, parents, visible.sum(-1) - 1, visible)

    def __len__(self) -> int:
        return len(self.tokens)

    def with_leaves(self, tokens: torch.Tensor, parents: torch.Tensor) -> Tree:
        """This tree with further nodes `tokens` (M,) behind all others, whose `parents` (M,) are among its nodes."""
        rows = torch.cat([self.visible, self.visible[parents]])
        own = torch.eye(len(rows), dtype=torch.bool, device=tokens.device)[:, len(self) :]
        return Tree(torch.cat([self.tokens, tokens]), torch.cat([self.parents, parents]), torch.cat([self.depths, self.depths[parents] + 1]), torch.cat([rows, own], 1))


def ancestors(parents: torch.Tensor, deepest: int) -> torch.Tensor:
    """bool (N, N): whether node j is node i or an ancestor of it, for `parents` (N,) of a tree of at most `deepest` levels below the root."""
    nodes = torch.arange(len(parents), device=parents.device)
    visible = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    above = parents
    for _ in range(deepest):
        found = above >= 0
        above = above.clamp(min=0)
        visible[nodes, above] |= found
        above = torch.where(found, parents[above], -1)
    return visible

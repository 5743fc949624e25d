"""Trees of drafted tokens behind the last committed one: what tree methods build, the target sees in one pass, and verification walks.

Shapes: N nodes, the root included; node 0, the root, is the last committed token; parents come before their children, and siblings are in
the order in which they were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Tree:
    """`tokens`, `parents` and `depths`, int64 (N,): the root's parent is −1, as is that of nodes that no walk may reach, and its depth 0. `values`, fp64 (N,): the
    logarithm of the chance that the node is on the accepted path, as far as the draft knows. `visible`, bool (N, N): itself and its ancestors.

    A node at depth d stands d positions behind the root.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, parents: torch.Tensor, values: torch.Tensor, deepest: int) -> Tree:
        """The tree of these tokens, parents and values (N,), which is at most `deepest` levels deep."""
        visible = ancestors(parents, deepest)
        return cls(tokens, parents, visible.sum(-1) - 1, values, visible)

    def __len__(self) -> int:
        return len(self.tokens)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What `Tree(*tensors)` makes it of."""
        return self.tokens, self.parents, self.depths, self.values, self.visible

    @property
    def expected(self) -> torch.Tensor:
        """The tokens that a round over it is expected to emit, fp64 (): its nodes' chances, the root's 1 standing for the last draw."""
        return self.values.exp().sum()

    def with_leaves(self, tokens: torch.Tensor, parents: torch.Tensor, reachable: torch.Tensor) -> Tree:
        """This tree with further leaves `tokens` (M,) behind all nodes; those not `reachable`, bool (M,), are reached by no walk. Nothing is known of their chances."""
        rows = torch.cat([self.visible, self.visible[parents]])
        own = torch.eye(len(rows), dtype=torch.bool, device=tokens.device)[:, len(self) :]
        return Tree(
            torch.cat([self.tokens, tokens]), torch.cat([self.parents, torch.where(reachable, parents, -1)]),
            torch.cat([self.depths, self.depths[parents] + 1]), torch.cat([self.values, torch.full_like(self.values[:1], -torch.inf).expand(len(tokens))]),
            torch.cat([rows, own], 1))

    def behind(self, text: torch.Tensor) -> Tree:
        """This tree behind the tokens `text` (C,), which become nodes in a row before the root."""
        count = len(text)
        places = torch.arange(count, device=text.device)
        sees_text = torch.ones(len(self), count, dtype=torch.bool, device=text.device)
        chain = torch.ones(count, count + len(self), dtype=torch.bool, device=text.device).tril()
        parents = torch.where(self.parents >= 0, self.parents + count, -1)
        parents[0] = count - 1
        return Tree(
            torch.cat([text, self.tokens]), torch.cat([places - 1, parents]), torch.cat([places, self.depths + count]),
            torch.cat([torch.full_like(self.values[:1], -torch.inf).expand(count), self.values]), torch.cat([chain, torch.cat([sees_text, self.visible], 1)]))


def last_of(reached: torch.Tensor) -> torch.Tensor:
    """The largest index that is true in bool (N,), int64 (1,): to gather with, as an index without dimensions would be waited for."""
    return (reached * torch.arange(len(reached), device=reached.device)).amax(0, keepdim=True)


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

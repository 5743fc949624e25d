"""Common-sense token verification: a table says which tokens often follow which (commands/build_followers.py makes one), and trees are helped by it.

"exact": the most frequent followers of the most promising nodes' tokens become further leaves, within the budget of a tree that grows and beside the nodes
of a growmap, and verification is what it is: lossless. "overwrite" is the published form, and LOSSY: where the target draws a token that is no child but a known follower, it takes the first
child's place, and the walk goes on behind it with what was computed for the child's own token. Keys and values of the child stay in the cache, unless
`repair` feeds the text's tokens again with the next round's pass: then only what one round emits behind an overwritten token is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from decoding.sampling import Noise, SamplingPolicy, draw, no_law, policy_probs
from decoding.tree import Tree, last_of


@dataclass(frozen=True, eq=False)
class CommonSense:
    """`followers` (V, F): of each token those that follow it most often, most often first, −1 where there are fewer. `nodes`: so many of a
    tree's are followers ("exact"). `repair`: see above ("overwrite")."""

    followers: torch.Tensor
    mode: Literal["exact", "overwrite"] = "exact"
    nodes: int = 8
    repair: bool = False

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes {self.nodes}: at least one node of the tree must be a follower")
        if self.repair and self.mode == "exact":
            raise ValueError("repair goes with mode 'overwrite': exact trees leave nothing to repair")

    @property
    def reserved(self) -> int:
        """Nodes of the budget that the draft does not fill."""
        return self.nodes if self.mode == "exact" else 0

    def add_leaves(self, tree: Tree, eos_ids: frozenset[int], trim: bool) -> Tree:
        """`tree` with up to `nodes` further leaves: followers of its nodes, from the most valuable node down, that are not their children already.

        Where there are fewer, leaves that no walk reaches fill it up, unless `trim`.
        """
        values = tree.values
        for token in eos_ids:
            values = values.masked_fill(tree.tokens == token, -torch.inf)
        of = values.sort(descending=True, stable=True).indices[: self.nodes]
        tokens = self.followers[tree.tokens[of]]  # (M, F)
        taken = ((tree.parents == of[:, None])[:, None] & (tree.tokens == tokens[..., None])).any(-1)
        fit = (tokens >= 0) & ~taken & (values[of] != -torch.inf)[:, None]
        chosen = (~fit).flatten().sort(stable=True).indices[: self.nodes]
        if trim:
            chosen = chosen[fit.flatten()[chosen]]
        parents = of.repeat_interleave(tokens.shape[1])[chosen]
        return tree.with_leaves(tokens.flatten()[chosen].clamp(min=0), parents, fit.flatten()[chosen])


def verify_overwriting(
    logits: torch.Tensor, policy: SamplingPolicy, tree: Tree, noise: Noise, starts: torch.Tensor, sense: CommonSense, trunk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lossy walk: emitted tokens (N,) of the nodes, which of them are reached, bool (N,), and the last draw. The first `trunk` nodes are text, and the next is the root.

    Arguments, and what is drawn from logits that are not finite, as verify.verify_match's.
    """
    p = policy_probs(logits, policy)
    drawn = draw(p[None], noise, (starts + 1 + tree.depths)[None])[0].masked_fill(no_law(p), -1)
    above = tree.parents.clamp(min=0)
    emitted = torch.where(torch.arange(len(tree), device=above.device) > trunk, drawn[above], tree.tokens)  # where a walk comes by
    equal = (drawn[above] == tree.tokens) & (tree.parents >= 0)
    matched = torch.zeros_like(equal).index_put((above,), equal, accumulate=True)
    siblings = (tree.parents == tree.parents[:, None]).tril(-1)
    known = (sense.followers[emitted] == drawn[:, None]).any(-1)
    takes = equal | (~siblings.any(-1) & ~matched[above] & known[above] & (tree.parents >= 0))
    takes[: trunk + 1] = True
    reached = (takes | ~tree.visible).all(-1)
    return emitted, reached, drawn.gather(0, last_of(reached))[0]

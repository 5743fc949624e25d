"""SpecExec (2406.02532): large trees of the most likely continuations, and ordinary sampling that looks its draws up in them.

The tree is the best-first one of algorithm 2, grown until nothing unexpanded is among the best. Lossless: a token is drawn from the target's law at
every step, with its position's noise, so the output is vanilla's token for token. Deviations: nodes are valued by q at temperature max(T, 1) and
without a decay by depth; the target draws along the walk only; the prompt's pass counts as prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

from decoding.best_first import Growth, best_first_round
from decoding.children import Coupling
from decoding.state import DecodeState, RoundResult
from decoding.verify import TreeVerification, check_tree_verification


@dataclass(frozen=True)
class SpecExec:
    """`budget` nodes, the root included, at most `depth` levels deep; `branches` children of a node and nodes of a draft pass; a child needs the share
    `prune_threshold` of its best sibling's q."""

    budget: int = 32
    depth: int = 16
    branches: int = 8
    prune_threshold: float = 0.0
    verification: TreeVerification = "match"
    coupling: Coupling = Coupling()

    def __post_init__(self) -> None:
        check_tree_verification(self.verification)
        self.growth.check()
        if self.verification == "swor":
            raise ValueError("SpecExec prunes and ranks its candidates, which rejection without replacement does not allow: choose 'match' or 'coupled'")

    @property
    def growth(self) -> Growth:
        """What grows."""
        return Growth(self.budget, self.depth, self.branches, self.branches, passes=None, prune=self.prune_threshold)

    @property
    def slots(self) -> int:
        """Cache slots that a round may need behind the committed tokens."""
        return self.growth.widest


def specexec_round(state: DecodeState, plan: SpecExec) -> list[RoundResult]:
    """Grow the tree and verify it in one target call."""
    return best_first_round(state, plan.growth, plan.verification, plan.coupling)

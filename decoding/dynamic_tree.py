"""Trees that take the shape of what the draft says: EAGLE-2 2406.16858, OPT-Tree 2406.17276, DySpec 2410.11744, and with coupled children.

"coupled" (the default): children are those that the target most likely draws, given the noise g that it will draw with, valued by softmax(a·log q + b·g); "match": the most likely
tokens, valued by q at temperature max(T, 1). Both accept what equals the target's draw, so the output is vanilla's token for token.
"swor": children drawn without replacement, accepted by rejection. Lossless with all three. Deviations: all share one builder, best-first in
level-batched passes; under "swor" every node among the best is expanded, whatever the beam, and rounds do not stop early: which drawn children
a tree keeps may depend on nothing but what was known before they were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from decoding.best_first import Growth, best_first_round
from decoding.children import Coupling
from decoding.state import DecodeState, RoundResult
from decoding.verify import TreeVerification, check_tree_verification


@dataclass(frozen=True)
class DynamicTree:
    """`budget` nodes, the root included; `depth` levels and as many draft passes; `top_k` children of a node and nodes of a pass.

    `level_cost`, a draft pass in target passes, lets a round stop early (0: never); `coupling` values coupled children.
    """

    budget: int = 32
    depth: int = 8
    top_k: int = 8
    level_cost: float = 0.0
    verification: TreeVerification = "coupled"
    coupling: Coupling = Coupling()

    def __post_init__(self) -> None:
        check_tree_verification(self.verification)
        self.growth.check()

    @property
    def growth(self) -> Growth:
        """What grows."""
        if self.verification == "swor":
            return Growth(self.budget, self.depth, self.top_k, beam=self.budget, passes=self.depth)
        return Growth(self.budget, self.depth, self.top_k, beam=self.top_k, passes=self.depth, level_cost=self.level_cost)

    @property
    def slots(self) -> int:
        """Cache slots that a round may need behind the committed tokens."""
        return self.growth.widest


def dynamic_tree_round(state: DecodeState, plan: DynamicTree) -> list[RoundResult]:
    """Grow a tree and verify it in one target call."""
    return best_first_round(state, plan.growth, plan.verification, plan.coupling)

"""Which tokens become a tree node's children, and how likely each is to be the accepted one.

Coupled and ranked children come from the draft's whole q, not cut by top-k or top-p: a token outside the draft's nucleus may be in the
target's. Shapes: M nodes, K children each, V_d tokens that the draft knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from decoding.sampling import Noise, Purpose, SamplingPolicy, noise_places, policy_probs
from decoding.verify import TreeRule, over_vocabulary
from engine import native

IMPOSSIBLE = -torch.inf
LEAST_MASS = 1e-12  # what is left of q behind draws that took all of it


class Children(NamedTuple):
    """K children of each of M nodes, in draw order: `tokens` int64 (M, K); the logarithms, fp64 (M, K), of `values`, the chance that a child is the
    accepted one, and of `ranks`, by which children are taken into a tree; `q` (M, V), what they were drawn from ((M, 0) if that does not matter)."""

    tokens: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor
    q: torch.Tensor


class Nodes(NamedTuple):
    """Where M nodes stand: at `depths` (M,) behind the root, which is the token at `starts` (1,); `ids` (M,) tell them apart within their round."""

    noise: Noise
    starts: torch.Tensor
    depths: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Coupling:
    """What the target's draw, argmax(log p + g), is expected to be from q and its noise g: trust·softmax(draft·log q + noise·g).

    log p is log q and an error, so that both count less the worse the draft is; a draft that is too unsure of itself counts more than the noise. `trust`: rounds
    begin where drafts have just failed, and expect less of a level than positions of any text do. Fitted on data (measuring/tree_fitting.py: fit_coupling,
    fit_trust). At T = 0 there is no noise, and q is taken at temperature 1.
    """

    draft: float = 1.0
    noise: float = 1.0
    trust: float = 1.0


@dataclass(frozen=True, eq=False)
class Chooser:
    """Chooses children as `rule` wants them, under the target's `policy` and `vocab_size`.

    `coupling` orders and values coupled children. `token_ids` (V_d,) names the logits' columns where the draft
    knows only a part of the vocabulary.
    """

    rule: TreeRule
    policy: SamplingPolicy
    vocab_size: int
    coupling: Coupling = Coupling()
    token_ids: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, count: int, nodes: Nodes) -> Children:
        """`count` children of each of M nodes (fewer where the draft knows no more tokens), from the draft's logits (M, V_d)."""
        choose = {"gumbel": self._gumbel, "top_k": self._top, "drawn": self._drawn}[self.rule.children]
        return choose(logits, min(count, logits.shape[-1]), nodes)

    def _gumbel(self, logits: torch.Tensor, count: int, nodes: Nodes) -> Children:
        """Those that the target most likely draws, given the noise g that it draws with (Daliri et al. 2408.07978, with several children)."""
        positions = nodes.starts + 1 + nodes.depths
        if native.samples(logits):
            tokens, values = self._gumbel_natively(logits, count, nodes.noise, positions)
            values += math.log(self.coupling.trust)
            return Children(tokens, values, values, logits[:, :0])
        z = logits.double() * self._sharpness
        if self.policy.temperature > 0:
            tokens = logits.shape[-1] if self.token_ids is None else self.token_ids
            z = z - self.coupling.noise * nodes.noise.exponential(positions[None], tokens, Purpose.TOKEN)[0].log()
        values, columns = (z.log_softmax(-1) + math.log(self.coupling.trust)).topk(count, -1)
        return Children(self._named(columns), values, values, logits[:, :0])

    @property
    def _sharpness(self) -> float:
        """What logits are multiplied by."""
        return self.coupling.draft / (self.policy.temperature or 1)

    def _gumbel_natively(self, logits: torch.Tensor, count: int, noise: Noise, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and values in C++, which computes the noise of a position once for neighbouring nodes."""
        logits, positions, ids = native.dense(logits, positions, self.token_ids)
        tokens, values = (torch.empty(len(logits), count, dtype=dtype) for dtype in (torch.int64, torch.float64))
        native.function("gumbel_children")(
            native.address(logits), *logits.shape, self._sharpness, self.coupling.noise if self.policy.temperature > 0 else 0.0, noise.for_cpp(1), native.Places(*noise_places(Purpose.TOKEN)),
            *map(native.address, (positions, ids)), count, native.address(tokens), native.address(values))
        return tokens, values

    def _top(self, logits: torch.Tensor, count: int, nodes: Nodes) -> Children:
        """The most likely tokens, valued by q at temperature max(T, 1): a colder q is too sure of itself."""
        values, columns = (logits.double() / max(self.policy.temperature, 1)).log_softmax(-1).topk(count, -1)
        return Children(self._named(columns), values, values, logits[:, :0])

    def _drawn(self, logits: torch.Tensor, count: int, nodes: Nodes) -> Children:
        """Drawn from q without replacement, with noise of each node's own.

        A child ranks by the chance that it is tried at all, if acceptance is as q says (DySpec 2410.11744): that is known before the child is drawn, and so may
        decide whether it is.
        """
        q = policy_probs(logits, self.policy)
        z = q.double().log() - nodes.noise.of_round(nodes.starts).exponential(nodes.ids[None], q.shape[-1], Purpose.DRAFT)[0].log()
        columns = z.topk(count, -1).indices
        chances = (q.double() / q.double().sum(-1, keepdim=True)).gather(-1, columns)
        tried = (1 - (chances.cumsum(-1) - chances)).clamp(min=LEAST_MASS)
        ranks = torch.where(chances > 0, torch.maximum(tried, chances).log(), IMPOSSIBLE).cummin(-1).values
        return Children(self._named(columns), chances.log(), ranks, over_vocabulary(q, self.token_ids, self.vocab_size))

    def _named(self, columns: torch.Tensor) -> torch.Tensor:
        return columns if self.token_ids is None else self.token_ids[columns]

"""Accept rules: pure functions of distributions and tokens, each exact for the way its tokens were drafted.

For a chain of γ drafted tokens: p (γ+1, V) are the target's distributions after the last committed token and after
each drafted one, q (γ, V) those that the drafted tokens came from. For a tree of N nodes: p (N, V) after each node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from decoding.sampling import Noise, Purpose, SamplingPolicy, draw, no_law, noise_places, policy_probs
from decoding.tree import Tree, last_of
from engine import native

Verification = Literal["rejection", "coupled"]
VERIFICATIONS: tuple[Verification, ...] = get_args(Verification)
TreeVerification = Literal["coupled", "match", "swor"]


def verify_chain(
    verification: Verification, p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, noise: Noise, positions: torch.Tensor,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of `drafted` (..., γ) `verification` keeps, and the token that follows them: int64 (...), both."""
    if verification == "coupled":
        return verify_coupled(p, drafted, noise, positions)
    return verify_rejection(p, q, drafted, noise, positions, token_ids)


def verify_rejection(
    p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, noise: Noise, positions: torch.Tensor, token_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leviathan et al. 2023, algorithm 1: how many of `drafted` (..., γ) are kept, and the token that follows them.

    p (..., γ+1, V), q (..., γ, V), or (..., γ, V_d) for the tokens `token_ids` (V_d,), ascending; `positions` (..., γ+1) are the absolute
    positions decided by the rows of p. Lossless for tokens drawn from q. Returns int64 (...), both on p's device.
    """
    if native.samples(p, q):
        return _verify_rejection_natively(p, q, drafted, noise, positions, token_ids)
    q = over_vocabulary(q, token_ids, p.shape[-1])
    uniforms = noise.uniform(positions[..., :-1], Purpose.ACCEPT)
    accepted = leading(accepts(p[..., :-1, :], q, drafted, uniforms))
    return accepted, draw(_source(p, q, accepted), noise, positions.gather(-1, accepted[..., None]), Purpose.RESIDUAL)[..., 0]


def chain_choices(
    verification: Verification, p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, noise: Noise, positions: torch.Tensor,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `verification` would make of each drafted token, were it reached: whether it keeps it, bool (..., γ), and what it puts in its place, int64
    (..., γ+1), of which the last is the bonus. Arguments as for `verify_rejection`; the first token that is not kept gives `verify_chain`'s result."""
    if verification == "coupled":
        drawn = draw(p, noise, positions)
        return drawn[..., :-1] == drafted, drawn
    q = over_vocabulary(q, token_ids, p.shape[-1])
    kept = accepts(p[..., :-1, :], q, drafted, noise.uniform(positions[..., :-1], Purpose.ACCEPT))
    q = torch.cat([q, torch.zeros_like(p[..., :1, :])], -2)
    return kept, draw(residual(p, q, normalised=not native.samples(p, q)), noise, positions, Purpose.RESIDUAL)  # as the C++, which need not normalise


def over_vocabulary(q: torch.Tensor, token_ids: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """q (..., V_d) of the tokens `token_ids` as (..., V): 0 for all others."""
    if token_ids is None or q.shape[-1] == vocab_size:
        return q
    return q.new_zeros(*q.shape[:-1], vocab_size).index_copy_(-1, token_ids, q)


def leading(kept: torch.Tensor) -> torch.Tensor:
    """Number of true values before the first false one, for bool (..., γ)."""
    return kept.long().cumprod(-1).sum(-1)


def _source(p: torch.Tensor, q: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
    """What the token behind the kept ones is drawn from, (..., 1, V): the residual, or p itself where all were kept (the bonus)."""
    q = torch.cat([q, torch.zeros_like(p[..., :1, :])], -2)
    row = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    return residual(p.gather(-2, row), q.gather(-2, row))


def _verify_rejection_natively(
    p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, noise: Noise, positions: torch.Tensor, token_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`verify_rejection` in C++."""
    accepted, next_token = (torch.empty(p.shape[:-2], dtype=torch.int64) for _ in range(2))
    texts = accepted.numel()
    p, q, token_ids, drafted, positions = inputs = native.dense(p, q, token_ids, drafted, positions)
    *pointers, last = map(native.address, inputs)
    places = (native.Places(*noise_places(purpose)) for purpose in (Purpose.ACCEPT, Purpose.RESIDUAL))
    native.function("verify_rejection")(
        *pointers, noise.for_cpp(texts), *places, last, texts, drafted.shape[-1], p.shape[-1], q.shape[-1], *map(native.address, (accepted, next_token)))
    return accepted, next_token


def _verify_coupled_natively(p: torch.Tensor, drafted: torch.Tensor, noise: Noise, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`verify_coupled` in C++, which draws no further than the first difference."""
    accepted, next_token = (torch.empty(p.shape[:-2], dtype=torch.int64) for _ in range(2))
    texts = accepted.numel()
    p, drafted, positions = native.dense(p, drafted, positions)
    native.function("verify_coupled")(
        native.address(p), native.address(drafted), noise.for_cpp(texts), native.Places(*noise_places(Purpose.TOKEN)), native.address(positions),
        texts, drafted.shape[-1], p.shape[-1], native.address(accepted), native.address(next_token))
    return accepted, next_token


def accepts(p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Whether u·q(x) < p(x) for each row of p, q (..., V), drafted x (...) and u (...) in [0, 1); bool (...).

    Strict, so a token of target probability 0 is never kept.
    """
    tokens = drafted[..., None]
    return uniforms * q.gather(-1, tokens)[..., 0] < p.gather(-1, tokens)[..., 0]


def residual(p: torch.Tensor, q: torch.Tensor, normalised: bool = True) -> torch.Tensor:
    """Distribution (..., V) of the token after a rejection: (p − q)₊ normalised, or without that what is proportional to it.

    Where rounding leaves nothing of p − q (p and q equal), p itself.
    """
    excess = (p - q).clamp(min=0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess / mass if normalised else excess, p)


def verify_coupled(p: torch.Tensor, drafted: torch.Tensor, noise: Noise, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel-coupled verification (Daliri et al. 2408.07978): keep drafted tokens while they equal the target's draw.

    The target's draw at each position uses that position's TOKEN noise, so the output is vanilla sampling's, token for
    token, whatever was drafted. Arguments and results as for `verify_rejection`.
    """
    if native.samples(p):
        return _verify_coupled_natively(p, drafted, noise, positions)
    drawn = draw(p, noise, positions)
    accepted = leading(drawn[..., :-1] == drafted)
    return accepted, drawn.gather(-1, accepted[..., None])[..., 0]


def overlap(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Σ min(p, q) = 1 − TV(p, q) of each row (..., V): the chance that rejection verification keeps a token of q."""
    return torch.minimum(p, q).sum(-1)


def coupled_agreement(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Chance that argmax(log p + g) = argmax(log q + g) for one shared Gumbel vector g, for rows (N, V); (N,).

    Both pick token v with probability 1 / Σ_w max(p_w / p_v, q_w / q_v) (the Jaccard index of P-MinHash, Moulton &
    Jiang 2018). Sorted by p/q, the maximum takes its first form behind v and its second before it: O(V log V).
    """
    p, q = p.double(), q.double()
    order = torch.where(q > 0, p / q, torch.inf).argsort(-1)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p_from = p.flip(-1).cumsum(-1).flip(-1)  # Σ of p over v and behind
    q_before = q.cumsum(-1) - q
    both = (p > 0) & (q > 0)
    terms = p_from / p + q_before / q
    return torch.where(both, 1 / torch.where(both, terms, 1.0), 0.0).sum(-1)


def expected_acceptance(p: torch.Tensor, q: torch.Tensor, verification: Verification) -> torch.Tensor:
    """Chance that `verification` keeps a token drafted from q, per row (N, V); (N,)."""
    return overlap(p, q) if verification == "rejection" else coupled_agreement(p, q)


# ---- trees ----

@dataclass(frozen=True)
class TreeRule:
    """How a node's children are chosen, and how one of them is accepted.

    "match" follows the child that equals the target's own draw, whatever the children: the output is vanilla's. "swor" is rejection for
    children drawn without replacement from q, tried in that order; it is exact for no others, and such a pair raises ValueError.
    "overwrite" is common_sense.py's, and lossy.
    """

    children: Literal["gumbel", "top_k", "drawn"]
    accept: Literal["match", "swor", "overwrite"] = "match"

    def __post_init__(self) -> None:
        if self.accept == "swor" and self.children != "drawn":
            raise ValueError(f"rejection without replacement is exact for drawn children only, not for {self.children!r} ones: accept them by 'match'")

    @property
    def lossless(self) -> bool:
        """Whether the output has the target's law."""
        return self.accept != "overwrite"


TREE_RULES: dict[TreeVerification, TreeRule] = {
    "coupled": TreeRule("gumbel"), "match": TreeRule("top_k"), "swor": TreeRule("drawn", "swor"),
}


def check_tree_verification(verification: str) -> None:
    """Raise ValueError for what no tree is verified by."""
    if verification not in TREE_RULES:
        raise ValueError(f"verification {verification!r}: trees are verified by {', '.join(TREE_RULES)}")


def verify_match(logits: torch.Tensor, policy: SamplingPolicy, tree: Tree, noise: Noise, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk to the child that equals the target's draw, while there is one: which nodes are reached, bool (N,), and the last draw, int64 ().

    `logits` (N, V) are the target's after each node, the root being the token at `starts` (1,). The draws have their position's TOKEN noise, so the
    output is vanilla sampling's, token for token, whatever the tree (§3 of SpecExec 2406.02532; coupled children: Daliri et al. 2408.07978).
    Where the walk comes to logits that are not finite it ends, and the last draw is -1.
    """
    if native.samples(logits):
        return _verify_match_natively(logits, policy, tree, noise, starts)
    p = policy_probs(logits, policy)
    drawn = draw(p[None], noise, (starts + 1 + tree.depths)[None])[0].masked_fill(no_law(p), -1)
    agrees = (drawn[tree.parents.clamp(min=0)] == tree.tokens) & (tree.parents >= 0)
    agrees[0] = True
    reached = (agrees | ~tree.visible).all(-1)
    return reached, drawn.gather(0, last_of(reached))[0]


def verify_swor(p: torch.Tensor, q: torch.Tensor, tree: Tree, noise: Noise, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection for children drawn without replacement (Sequoia 2402.12374, algorithm 2). Arguments as for `verify_match`, but p (N, V).

    q (N, V) are the laws that each node's children were drawn from (any rows for leaves). At a node, R starts as p and D as q; child x in draw order is accepted if
    u·D(x) < R(x), else R becomes (R − D)₊ and D loses x, both normalised. The last token is drawn from the R of where the walk ends.
    A child of probability 0, as there is none left to be drawn, is not tried. The last draw is -1 where there was no law to draw from.
    """
    noise, nodes = noise.of_round(starts), torch.arange(len(tree), device=p.device)
    uniforms = noise.uniform(nodes[None], Purpose.ACCEPT)[0]
    rest, left = p.clone(), q.clone()  # R and D of every node
    reached = nodes == 0
    open_ = torch.ones_like(reached)  # nodes of which no child was accepted
    for child in range(1, len(tree)):
        parent, token = tree.parents[child, None].clamp(min=0), tree.tokens[child, None]  # (1,): see last_of
        r, d = rest.index_select(0, parent), left.index_select(0, parent)  # (1, V)
        wanted, offered = r.gather(1, token[None])[0], d.gather(1, token[None])[0]
        tried = reached.gather(0, parent) & open_.gather(0, parent) & (offered > 0) & (tree.parents[child, None] >= 0)
        if p.device.type == "cpu" and not tried:
            continue
        kept = tried & (uniforms[child] * offered < wanted)
        reached[child : child + 1] = kept
        open_.index_copy_(0, parent, open_.gather(0, parent) & ~kept)
        rejected = (tried & ~kept)[:, None]
        rest.index_copy_(0, parent, torch.where(rejected, residual(r, d), r))
        left.index_copy_(0, parent, torch.where(rejected, without(d, token), d))
    last = last_of(reached)
    rest = rest.index_select(0, last)
    return reached, draw(rest[None], noise, last[None], Purpose.RESIDUAL)[0].masked_fill(no_law(rest), -1)[0]


def without(law: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Each row of `law` (R, V) without its one of `tokens` (R,), normalised; zeros where nothing is left."""
    law = law.scatter(-1, tokens[:, None], 0.0)
    return law / law.sum(-1, keepdim=True).clamp(min=torch.finfo(law.dtype).tiny)


def _verify_match_natively(
    logits: torch.Tensor, policy: SamplingPolicy, tree: Tree, noise: Noise, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`verify_match` in C++, which looks at the nodes on the walk only."""
    logits, tokens, parents, depths, starts = native.dense(logits, tree.tokens, tree.parents, tree.depths, starts)
    reached, drawn = torch.zeros(len(tokens), dtype=torch.bool), torch.empty((), dtype=torch.int64)
    native.function("verify_match")(
        *map(native.address, (logits, tokens, parents, depths)), *logits.shape, policy.temperature, policy.top_k, policy.top_p, noise.for_cpp(1),
        native.Places(*noise_places(Purpose.TOKEN)), native.address(starts), native.address(reached), native.address(drawn))
    return reached, drawn

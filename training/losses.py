"""Training objectives, with their gradients, token by token, in fp32: their sum is to be divided by the number of learned tokens.

p is the teacher's distribution, q the draft's, both over the tokens that the draft knows. A row of logits is V numbers, so the gradient with respect to the
draft's logits is computed with the loss, in closed form, instead of through a graph of V-wide tensors.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

LossType = Literal["kl_divergence", "cross_entropy", "combined", "reverse_kl", "total_variation", "lk"]
LOSS_TYPES = get_args(LossType)
SOFTENED = ("kl_divergence", "combined", "reverse_kl", "lk")  # those with a KL, which a temperature softens
LK_SHARPNESS = 3.0  # η of LK losses (2602.23881)


def learned_rows(states: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """What stands where the N tokens of `loss_mask` (B, T) bool are predicted, (N, …), of hidden states or logits (B, T, …): row t predicts token t+1."""
    return states[:, :-1][loss_mask[:, 1:]]


def learned_tokens(input_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """The tokens (N,) that `learned_rows` predicts, from `input_ids` (B, T)."""
    return input_ids[:, 1:][loss_mask[:, 1:]]


class Graded(NamedTuple):
    """Of N rows: the `loss` (N,), the `gradient` (N, V_d) of its sum with respect to the draft's logits, `overlap` (N,), which is Σ min(p, q) with p whole, and
    `lost_mass` (N,), which is p's on tokens that the draft does not know."""

    loss: torch.Tensor
    gradient: torch.Tensor
    overlap: torch.Tensor
    lost_mass: torch.Tensor


def grade(
    loss_type: LossType, teacher: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0, token_ids: torch.Tensor | None = None,
) -> Graded:
    """The objective over rows of teacher logits (N, V) and draft logits (N, V_d), which predict `tokens` (N,).

    kl_divergence: T²·KL(p‖q), both softened by T (Hinton et al. 1503.02531, §2; T² keeps gradients comparable between temperatures). cross_entropy: −log q(token).
    combined: both. reverse_kl: T²·KL(q‖p). total_variation: ½ Σ |p − q| = 1 − α, α = Σ min(p, q). lk: λ·T²·KL(p‖q) + (1 − λ)(1 − α) with
    λ = exp(−η·α), which is not differentiated (LK losses 2602.23881): KL where the draft is far off, acceptance where it is near.
    Where the draft knows `token_ids` (V_d,) only, p is renormalised on these, and cross-entropy counts only tokens among them.
    """
    teacher, draft = teacher.float(), draft.float()
    lost = draft.new_zeros(len(draft))
    share = 1.0  # of p that the known tokens have, by row
    if token_ids is not None:
        whole = teacher.logsumexp(-1)
        teacher = teacher[:, token_ids]
        share = (teacher.logsumexp(-1) - whole).exp()[:, None]
        lost = 1 - share[:, 0]
    log_q = draft.log_softmax(-1)
    log_p = teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    overlap = torch.minimum(share * p, q).sum(-1)
    loss, gradient = _objective(loss_type, (teacher, log_p, p), (draft, log_q, q), temperature)
    if loss_type in ("cross_entropy", "combined"):
        columns, known = _columns(tokens, token_ids)
        loss = loss - log_q.gather(-1, columns[:, None])[:, 0] * known
        gradient = gradient + q * known[:, None]
        gradient.scatter_add_(-1, columns[:, None], -known[:, None])
    return Graded(loss, gradient, overlap, lost)


Law = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # logits, their log-softmax and softmax


def _objective(loss_type: LossType, p_law: Law, q_law: Law, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What of the objective compares p and q, and its gradient."""
    (_, _, p), (_, _, q) = p_law, q_law
    if loss_type == "cross_entropy":
        return q.new_zeros(len(q)), torch.zeros_like(q)
    if loss_type == "total_variation":
        variation, gradient = _variation(p, q)
        return variation, gradient
    softened = (_softened(law, temperature) for law in (p_law, q_law))
    divergence, gradient = (_reverse_kl if loss_type == "reverse_kl" else _kl)(*softened, temperature)
    if loss_type != "lk":
        return divergence, gradient
    variation, toward = _variation(p, q)
    weight = torch.exp(-LK_SHARPNESS * (1 - variation))
    return weight * divergence + (1 - weight) * variation, torch.lerp(toward, gradient, weight[:, None])


def _softened(law: Law, temperature: float) -> Law:
    if temperature == 1:
        return law
    logits = law[0] / temperature
    log_law = logits.log_softmax(-1)
    return logits, log_law, log_law.exp()


def _kl(p_law: Law, q_law: Law, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """T²·KL(p‖q) by row (N,), and its gradient (N, V)."""
    (_, log_p, p), (_, log_q, q) = p_law, q_law
    return temperature**2 * (p * (log_p - log_q)).sum(-1), temperature * (q - p)


def _reverse_kl(p_law: Law, q_law: Law, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """T²·KL(q‖p) by row (N,), and its gradient (N, V)."""
    (_, log_p, _), (_, log_q, q) = p_law, q_law
    ratio = log_q - log_p
    divergence = (q * ratio).sum(-1)
    return temperature**2 * divergence, temperature * q * (ratio - divergence[:, None])


def _variation(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 − Σ min(p, q) by row (N,), and its gradient (N, V)."""
    over = (q > p).to(q.dtype)  # q there is not what limits the overlap
    return 1 - torch.minimum(p, q).sum(-1), q * (over - (q * over).sum(-1, keepdim=True))


def _columns(tokens: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The column (N,) of each of `tokens` (N,), and 1.0 where there is one, else 0.0."""
    if token_ids is None:
        return tokens, torch.ones_like(tokens, dtype=torch.float32)
    columns = torch.searchsorted(token_ids, tokens).clamp(max=len(token_ids) - 1)
    return columns, (token_ids[columns] == tokens).float()


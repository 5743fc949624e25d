"""Training objectives: sums over tokens, in fp32, to be divided by the number of learned tokens.

Rows are aligned first: row t of the logits predicts token t+1, so logits (B, T, V) lose their last position and masks
and labels their first (`learned_rows`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import kl_div, log_softmax

LossType = Literal["kl_divergence", "cross_entropy", "combined"]


def learned_rows(logits: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) that predict the N tokens of `loss_mask` (B, T) bool, from logits (B, T, V)."""
    return logits[:, :-1][loss_mask[:, 1:]]


def learned_tokens(input_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """The tokens (N,) that `learned_rows` predicts, from `input_ids` (B, T)."""
    return input_ids[:, 1:][loss_mask[:, 1:]]


def kl_divergence(teacher: torch.Tensor, draft: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T²·Σ KL(p‖q) over rows of logits (N, V), both softened by T (Hinton et al. 1503.02531, §2); nats.

    T² keeps the gradient's size comparable between temperatures.
    """
    log_p = log_softmax(teacher.float() / temperature, -1)
    log_q = log_softmax(draft.float() / temperature, -1)
    return temperature**2 * kl_div(log_q, log_p, reduction="sum", log_target=True)


def cross_entropy(draft: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Σ −log q(token) over rows of logits (N, V) and `tokens` (N,); nats."""
    return torch_cross_entropy(draft.float(), tokens, reduction="sum")


def training_loss(loss_type: LossType, teacher: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """The objective summed over rows (N, V): T²·KL(p‖q), cross-entropy on the text, or the sum of both ("combined")."""
    loss = teacher.new_zeros((), dtype=torch.float32)
    if loss_type in ("kl_divergence", "combined"):
        loss = loss + kl_divergence(teacher, draft, temperature)
    if loss_type in ("cross_entropy", "combined"):
        loss = loss + cross_entropy(draft, tokens)
    return loss

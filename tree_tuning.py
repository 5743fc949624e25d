"""What trees are fitted to: the scale of coupled values, acceptance by rank, and what draft and target passes cost on this machine.

All but the costs is measured on texts that the target itself decodes under the policy, with the noise that it decodes them with: what a tree
drafts behind accepted nodes is drafted behind such text.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from decoding.children import Chooser, Nodes
from decoding.sampling import Noise, Purpose, policy_probs
from decoding.state import synchronize
from decoding.verify import TREE_RULES, TreeVerification, residual
from speculative import DecodeOptions, generate

CHUNK_ROWS = 64  # positions of V numbers in fp64 at a time: 65 MB each at V = 128k
SCALES = (0.05, 20.0)  # where the scale is looked for
SEARCH_STEPS = 40


@dataclass(frozen=True)
class OwnText:
    """A text that the target decoded: `tokens`, of which the first `prompt` were given, and the `noise` of its positions."""

    tokens: list[int]
    prompt: int
    noise: Noise


def own_texts(target: nn.Module, prompts: Sequence[list[int]], options: DecodeOptions) -> list[OwnText]:
    """What the target makes of `prompts` under the policy, seed and lengths of `options`."""
    vanilla = replace(options, method="vanilla", tree=None)
    return [
        OwnText([*prompt, *generate(target, prompt, vanilla, prompt_id=i).tokens], len(prompt), Noise.of(options.seed, i, target.device))
        for i, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class Positions:
    """Some positions of an own text: logits (R, V) of the models that were asked, where they stand (R,), the tokens (R,) there, and the text's noise."""

    logits: tuple[torch.Tensor, ...]
    at: torch.Tensor
    tokens: torch.Tensor
    noise: Noise


@torch.inference_mode()
def positions_of(texts: Sequence[OwnText], *models: nn.Module) -> Iterator[Positions]:
    """The positions behind the prompts, with what each of `models` says there, teacher-forced."""
    for text in texts:
        ids = torch.tensor([text.tokens], device=models[0].device)
        logits = [model(ids[:, :-1], use_cache=False).logits[0, text.prompt - 1 :] for model in models]
        at = torch.arange(text.prompt, len(text.tokens), device=ids.device)
        for rows in zip(*(tensor.split(CHUNK_ROWS) for tensor in (*logits, at, ids[0, text.prompt :])), strict=True):
            yield Positions(rows[:-2], *rows[-2:], text.noise)


# ---- the scale of coupled values ----

def fit_scale(draft: nn.Module, texts: Sequence[OwnText], temperature: float) -> float:
    """The s for which softmax((log q + g)/s) says best which token the target draws: of largest likelihood over `texts`.

    Convex in 1/s, so a golden-section search over log s finds it.
    """
    scored = [_coupled_scores(positions, temperature) for positions in positions_of(texts, draft)]

    def loss(log_scale: float) -> float:
        s = math.exp(log_scale)
        return sum(float(((z / s).logsumexp(-1) - drawn / s).sum()) for z, drawn in scored)

    low, high = map(math.log, SCALES)
    shrink = (math.sqrt(5) - 1) / 2
    inner = [high - shrink * (high - low), low + shrink * (high - low)]
    losses = [loss(point) for point in inner]
    for _ in range(SEARCH_STEPS):
        if losses[0] < losses[1]:
            high, inner[1], losses[1] = inner[1], inner[0], losses[0]
            inner[0] = high - shrink * (high - low)
            losses[0] = loss(inner[0])
        else:
            low, inner[0], losses[0] = inner[0], inner[1], losses[1]
            inner[1] = low + shrink * (high - low)
            losses[1] = loss(inner[1])
    return math.exp((low + high) / 2)


def _coupled_scores(positions: Positions, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log q + g (R, V), and that of the token that the target drew (R,), where the draft knows that token at all."""
    z = positions.logits[0].double() / (temperature or 1)
    if temperature > 0:
        z = z - positions.noise.exponential(positions.at, z.shape[-1], Purpose.TOKEN).log()
    drawn = z.gather(-1, positions.tokens[:, None])[:, 0]
    known = drawn.isfinite()
    return z[known], drawn[known]


# ---- acceptance by rank ----

def acceptance_by_rank(target: nn.Module, draft: nn.Module, texts: Sequence[OwnText], options: DecodeOptions, verification: TreeVerification, width: int) -> list[float]:
    """v_1 … v_width: the share of positions whose k-th child `verification` accepts. Teacher-forced."""
    chooser = Chooser(TREE_RULES[verification], options.policy, target.config.vocab_size)
    total, count = torch.zeros(width, dtype=torch.float64), 0
    for positions in positions_of(texts, draft, target):
        zero = torch.zeros_like(positions.at[:1])
        children = chooser(positions.logits[0], width, Nodes(positions.noise, zero - 1, positions.at, positions.at))
        accepted = _swor_chances(policy_probs(positions.logits[1], options.policy), children.q, children.tokens) if verification == "swor" else (
            children.tokens == positions.tokens[:, None])
        total[: accepted.shape[1]] += accepted.double().sum(0).cpu()
        count += len(positions.at)
    return (total / count).tolist()


def _swor_chances(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The chance (R, K) that verify.verify_swor accepts each of `tokens` (R, K), drawn from q (R, V) in that order, under p (R, V)."""
    rest, left, reach, found = p.double(), q.double(), torch.ones(len(p), 1, dtype=torch.float64, device=p.device), []
    for token in tokens.split(1, 1):
        drawn_from = left.gather(-1, token)
        kept = torch.where(drawn_from > 0, (rest.gather(-1, token) / drawn_from).clamp(max=1), 0.0)
        found.append(reach * kept)
        reach = reach * (1 - kept)
        rest = torch.where(drawn_from > 0, residual(rest, left), rest)
        left = left.scatter(-1, token, 0.0)
        left = left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
    return torch.cat(found, -1)

"""What trees are fitted to: the weights of coupled values, acceptance by rank, and what draft and target passes cost on this machine.

All but the costs is measured on texts that the target itself decodes under the policy, with the noise that it decodes them with: what a tree
drafts behind accepted nodes is drafted behind such text.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from decoding.children import Chooser, Coupling, Nodes
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import Growmap
from decoding.sampling import Noise, Purpose, policy_probs
from decoding.state import NO_DRAFT_LAW, NO_TARGET_LAW, check_logits
from decoding.static_tree import StaticTree
from decoding.verify import residual, without
from engine.views import AnyPrompt, forced_logits, view_of
from speculative import METHODS, DecodeOptions, TreePlan, generate

CHUNK_ROWS = 64  # positions of V numbers in fp64 at a time: 65 MB each at V = 128k
NEWTON_STEPS, CONVERGED = 50, 1e-6
LEAST_WEIGHT = 0.01  # of Coupling
UNKNOWN = -1e4  # log q of tokens that the draft does not know
KEPT_TOKENS = 4096  # of a position: the others have no weight to speak of, and 128k of them would fill the memory
TYPICAL_DEPTH = 3  # of an accepted node, to guess a first trust by
REPEATS = 3  # generations that are timed
METHOD_OF = {method.plan: name for name, method in METHODS.items() if method.plan is not None}


@dataclass(frozen=True)
class OwnText:
    """A text that the target decoded behind the prompt `given`: `tokens`, of which the first `prompt` are that's, and the `noise` of its positions."""

    tokens: list[int]
    prompt: int
    noise: Noise
    given: AnyPrompt


def own_texts(target: nn.Module, prompts: Sequence[AnyPrompt], options: DecodeOptions) -> list[OwnText]:
    """What the target makes of `prompts` under the policy, seed and lengths of `options`."""
    vanilla = replace(options, method="vanilla", tree=None)
    asked = [view_of(prompt, target).ids for prompt in prompts]
    return [
        OwnText([*ids, *generate(target, prompt, vanilla, prompt_id=i).tokens], len(ids), Noise.of(options.seed, i, target.device), prompt)
        for i, (ids, prompt) in enumerate(zip(asked, prompts, strict=True))
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
    """The positions behind the prompts, with what each of `models`, the draft and if need be the target, says there, teacher-forced."""
    for text in texts:
        new = torch.tensor(text.tokens[text.prompt :], device=models[0].device)
        logits = [forced_logits(model, text.given, new.tolist()) for model in models]
        for said, fault in zip(logits, (NO_DRAFT_LAW, NO_TARGET_LAW), strict=False):
            check_logits(said, fault)
        at = torch.arange(text.prompt, len(text.tokens), device=new.device)
        for rows in zip(*(tensor.split(CHUNK_ROWS) for tensor in (*logits, at, new)), strict=True):
            yield Positions(rows[:-2], *rows[-2:], text.noise)


# ---- coupled values ----

def fit_coupling(draft: nn.Module, texts: Sequence[OwnText], temperature: float) -> Coupling:
    """The weights of log q and g for which their softmax says best which token the target draws: of largest likelihood over `texts`.

    A logistic regression: concave, so that Newton's method finds its maximum. Tokens that the draft does not know do not count.
    """
    chunks = [_features(positions, temperature) for positions in positions_of(texts, draft)]
    weights = torch.ones(len(chunks[0][0]), dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        gradients, information = zip(*(_gradient(weights, *chunk) for chunk in chunks), strict=True)
        step = _newton_step(sum(information), sum(gradients))
        weights = (weights + step.clamp(-1, 1)).clamp(min=LEAST_WEIGHT)
        if step.abs().max() < CONVERGED:
            break
    return Coupling(*weights.tolist())


def _newton_step(information: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """information⁻¹·gradient (F,); the shortest step where a few tokens do not tell the weights apart."""
    step, singular = torch.linalg.solve_ex(information, gradient)
    return torch.linalg.pinv(information) @ gradient if singular else step


def _features(positions: Positions, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log q and, unless T = 0, g, of the KEPT_TOKENS with the largest log q + g: (F, R, K); and the columns (R,) of the tokens that the target drew, where they are among them."""
    log_q = (positions.logits[0].double() / (temperature or 1)).log_softmax(-1)
    features = [log_q.clamp(min=UNKNOWN)]
    if temperature > 0:
        features.append(-positions.noise.exponential(positions.at, log_q.shape[-1], Purpose.TOKEN).log())
    kept = sum(features).topk(min(KEPT_TOKENS, log_q.shape[-1]), -1).indices
    found = kept == positions.tokens[:, None]
    known = found.any(-1) & log_q.gather(-1, positions.tokens[:, None])[:, 0].isfinite()
    return torch.stack([feature.gather(-1, kept)[known] for feature in features]), found.int().argmax(-1)[known]


def _gradient(weights: torch.Tensor, features: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient (F,) of the log-likelihood, and minus its second derivatives (F, F), on the CPU."""
    chances = torch.einsum("f,frv->rv", weights.to(features.device), features).softmax(-1)
    mean = torch.einsum("rv,frv->fr", chances, features)
    found = features.gather(-1, drawn.expand(len(features), -1)[..., None])[..., 0]
    second = torch.einsum("rv,frv,grv->fg", chances, features, features) - mean @ mean.T
    return (found - mean).sum(-1).cpu(), second.cpu()


def fit_trust(target: nn.Module, draft: nn.Module, prompts: Sequence[AnyPrompt], options: DecodeOptions, coupling: Coupling) -> Coupling:
    """`coupling` with the trust for which a dynamic tree brings in rounds behind `prompts` what it promises; at most 1."""
    def excess(trust: float) -> float:
        """log of the promised over the found tokens, the round's last draw apart: nearly linear in log trust."""
        plan = DynamicTree(coupling=replace(coupling, trust=trust))
        runs = [generate(target, prompt, replace(options, method="dynamic_tree", tree=plan), draft, prompt_id=i).stats for i, prompt in enumerate(prompts)]
        rounds = [r for run in runs for r in run.rounds if r.tree is not None]
        promised, found = sum(r.tree.expected for r in rounds) - len(rounds), sum(r.accepted for r in rounds)
        return math.log(promised / found) if promised > 0 and found > 0 else 0.0

    first = excess(1.0)
    guess = math.exp(-first / TYPICAL_DEPTH)
    if guess >= 1:
        return coupling
    slope = (excess(guess) - first) / math.log(guess)
    return replace(coupling, trust=min(1.0, math.exp(-first / slope))) if slope > 0 else replace(coupling, trust=guess)


# ---- acceptance by rank ----

def acceptance_by_rank(target: nn.Module, draft: nn.Module, texts: Sequence[OwnText], chooser: Chooser, width: int) -> list[torch.Tensor]:
    """Of each of `texts`, teacher-forced: the chance that the k-th child of `chooser` is the accepted one, fp64 (positions, width)."""
    found = []
    for text in texts:
        chances = torch.zeros(len(text.tokens) - text.prompt, width, dtype=torch.float64)
        for positions in positions_of([text], draft, target):
            zero = torch.zeros_like(positions.at[:1])
            children = chooser(positions.logits[0], width, Nodes(positions.noise, zero - 1, positions.at, positions.at))
            accepted = _swor_chances(policy_probs(positions.logits[1], chooser.policy), children.q, children.tokens) if chooser.rule.accept == "swor" else (
                children.tokens == positions.tokens[:, None])
            chances[positions.at.cpu() - text.prompt, : accepted.shape[1]] = accepted.double().cpu()
        found.append(chances)
    return found


def mean_acceptance(by_text: Sequence[torch.Tensor]) -> list[float]:
    """v_1 … v_width over all positions of acceptance_by_rank's texts."""
    return torch.cat(list(by_text)).mean(0).tolist()


def replayed(growmap: Growmap, by_text: Sequence[torch.Tensor]) -> Growmap:
    """`growmap` with the share of rounds that reach each of its nodes when rounds follow one another through acceptance_by_rank's texts.

    Unlike the product of v it knows that rounds begin where drafts have just failed, and that easy and hard places come in rows. No round begins so late that
    the text's end might cut it.
    """
    parents, ranks = torch.tensor(growmap.parents[1:]), torch.tensor(growmap.ranks[1:])
    chances, ends = pad(pad_sequence(list(by_text), batch_first=True), (0, 0, 0, 1)), torch.tensor([len(text) for text in by_text])
    at = torch.eye(growmap.size, dtype=torch.float64)[0].repeat(len(ends), 1)  # the chance that a walk stands at each node, text by text
    visits = torch.zeros_like(at[0])
    for position in range(chances.shape[1]):
        at[:, 0] *= position + growmap.depth <= ends  # at[:, 0]: rounds that would begin
        visits += at.sum(0)
        kept = at[:, parents] * chances[:, position, ranks]
        at = torch.cat([at.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True), kept], -1)
    if visits[0] == 0:
        return growmap  # no text is as long as the tree is deep
    return replace(growmap, replayed=tuple((visits / visits[0]).tolist()))


def _swor_chances(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The chance (R, K) that verify.verify_swor accepts each of `tokens` (R, K), drawn from q (R, V) in that order, under p (R, V)."""
    rest, left, reach, found = p.double(), q.double(), torch.ones(len(p), 1, dtype=torch.float64, device=p.device), []
    for token in tokens.split(1, -1):
        drawn_from = left.gather(-1, token)
        kept = torch.where(drawn_from > 0, (rest.gather(-1, token) / drawn_from).clamp(max=1), 0.0)
        found.append(reach * kept)
        reach = reach * (1 - kept)
        rest = torch.where(drawn_from > 0, residual(rest, left), rest)
        left = without(left, token[:, 0])
    return torch.cat(found, -1)


def acceptance_in_rounds(target: nn.Module, draft: nn.Module, prompts: Sequence[AnyPrompt], options: DecodeOptions, plan: StaticTree) -> list[float]:
    """The same of rounds that draft nothing but children of the root, as many as `plan`'s growmap has: behind a correction, where drafts are worse than elsewhere."""
    width = plan.growmap.size - 1
    counts, rounds = Counter(), 0
    for prompt_id, prompt in enumerate(prompts):
        stats = generate(target, prompt, replace(options, method="static_tree", tree=plan), draft, prompt_id=prompt_id).stats
        counts.update(r.tree.rank for r in stats.rounds if r.accepted)
        rounds += len(stats.rounds)
    return [counts[rank] / rounds for rank in range(width)]


# ---- costs ----

@dataclass(frozen=True)
class TreeCosts:
    """Seconds of a vanilla round; of a draft pass; of what else a round over n nodes takes, by n: target pass, walk, and Python between."""

    vanilla_s: float
    draft_s: float
    target_s: dict[int, float]

    @property
    def level_cost(self) -> float:
        """A draft pass in target passes over the largest tree."""
        return self.draft_s / self.target_s[max(self.target_s)]


def tree_costs(target: nn.Module, draft: nn.Module, prompt: AnyPrompt, options: DecodeOptions, plans: Sequence[TreePlan]) -> TreeCosts:
    """Median costs of rounds over `plans`, behind `prompt`, in generations that take turns with vanilla ones; the first turn is not counted."""
    plain = replace(options, method="vanilla", tree=None, common_sense=None, eos_ids=frozenset(), stop=None)
    found: dict[str, list[float]] = {"vanilla": [], "draft": []}
    sizes: dict[int, list[float]] = {plan.budget: [] for plan in plans}
    for turn in range(REPEATS + 1):
        stats = generate(target, prompt, plain, draft).stats
        if turn > 0:
            found["vanilla"].append(stats.decode_s / len(stats.rounds))
        for plan in plans:
            stats = generate(target, prompt, replace(plain, method=METHOD_OF[type(plan)], tree=plan), draft).stats
            rounds = [r for r in stats.rounds if r.tree is not None]
            if turn > 0 and rounds:
                found["draft"].append(stats.seconds["draft"] / sum(r.tree.passes for r in rounds))
                sizes[plan.budget].append((stats.decode_s - stats.seconds["draft"]) / len(rounds))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return TreeCosts(medians["vanilla"], medians["draft"], {size: statistics.median(values) for size, values in sizes.items() if values})

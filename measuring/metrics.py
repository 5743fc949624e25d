"""What is measured and how it is computed: quality against the teacher, speculation counts, intervals, cost model.

The columns of `results.csv` are DRAFT_COLUMNS, QUALITY_COLUMNS (each behind `<dataset>_`), SPECULATION_COLUMNS and, of lossy methods, LOSSY_COLUMNS;
those of the potential test are POTENTIAL_COLUMNS.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import log_softmax

from decoding.state import PHASES, DecodeStats
from decoding.verify import overlap

DRAFT_COLUMNS = {
    "checkpoint, checkpoint_hash": "path of the draft (`untuned@<layer>`, `target@<layer>`: made on the spot) and hash of its bytes",
    "kind": "which parts were tuned, joined by + (truncated_llama.ExitKind); untuned; target: the last layer; model: an independent one",
    "loss_type, learning_rate": "what it was trained with in the last stage",
    "target_layer, blocks, step": "ℓ, 0-based and inclusive; E = ℓ + 1; training steps of the last stage",
    "exit_bytes": "bytes of the draft's own tensors: an exit's without those that stay the target's",
    "cost_ratio_bytes": "bytes that a draft step reads / bytes that a target step reads",
    "method, lossless, gamma, verification, tree_budget, commonsense, temperature, top_p, top_k, settings_hash": "how speculation was measured; hash of all "
        "settings, target and data",
    "peak_memory_bytes": "most bytes that torch held on the GPU while decoding (absent on the CPU)",
}
QUALITY_COLUMNS = {
    "kl": "KL(p‖q) to the teacher at temperature 1, nats per token",
    "kl_at_train_temperature": "KL(p‖q) with both softened by the training temperature, without the factor T², nats per token",
    "ce": "cross-entropy of the draft on the text, nats per token",
    "ppl": "perplexity, exp(ce)",
    "teacher_ppl": "perplexity of the target on the same tokens",
    "top1": "share of tokens that are the draft's argmax",
    "top5": "share of tokens among the draft's five most likely",
    "agreement": "share of positions where draft and teacher have the same argmax",
    "overlap": "mean Σ min(p, q) at temperature 1",
    "tv": "total variation, 1 − overlap",
    "tokens": "number of tokens that the figures are means over",
}
SPECULATION_COLUMNS = {
    "spec_mean_accepted": "accepted tokens per round",
    "spec_mean_proposed": "drafted tokens per round (γ, but for rounds that end in a drafted end-of-text token, and for γ = auto; of a tree "
        "all nodes but the root)",
    "spec_accept_rate": "accepted / proposed; of a tree's nodes at most one on each level can be accepted: acceptance_rate says more there",
    "spec_token_accept_rate": "α: accepted / drafted positions that verification reached; of a tree the levels, however many nodes were tried "
        "there; of lossy methods accepted counts the mismatches that were kept, too",
    "spec_tokens_per_call": "τ: emitted tokens / target calls (correction or bonus included)",
    "spec_target_calls_per_token": "target calls / emitted tokens",
    "spec_overlap": "mean Σ min(p, q) over tested positions, under the sampling policy (chains)",
    "spec_tv": "1 − spec_overlap",
    "spec_expected_accept": "mean chance of keeping a drafted token at tested positions (= spec_overlap under rejection)",
    "spec_accept_z": "z of accepted − expected over tested positions; |z| < 4 unless counters or rule are wrong; absent if nothing varies",
    "spec_accept_at_<i>": "share of the rounds that reached drafted position i in which it was accepted",
    "spec_accepted_hist_<n>": "number of rounds with n accepted tokens",
    "spec_prompts, spec_rounds, spec_proposed, spec_tested, spec_accepted, spec_emitted": "counts",
    "vanilla_tokens_per_s, spec_tokens_per_s": "emitted tokens / decode seconds (prefill apart), over the same prompts",
    "spec_speedup": "spec_tokens_per_s / vanilla_tokens_per_s",
    "spec_predicted_speedup": "E[τ](α, γ) / (γ·c + v), from α and separately measured step times; for γ = auto emitted·t(0) / Σ t(n) over "
        "its rounds, t(n) the separately measured seconds of a round that drafts n tokens; for trees tree_expected_tokens, over separately measured seconds of such a round "
        "in vanilla ones",
    "spec_cost_ratio, spec_verify_ratio": "c = t_draft(1) / t_target(1); v = t_target(γ+1) / t_target(1)",
    "tree_nodes, tree_depth_offered, tree_passes": "means over rounds: nodes of the verified tree, root included; its levels; draft passes",
    "tree_expected_tokens": "mean tokens per round that the trees promised: Σ of node values (a growmap's: from its acceptance vector); fitted for coupled trees and "
        "growmaps, else as q says",
    "tree_found_tokens": "what tree_expected_tokens promises: mean tokens per round that drafted, before the cuts at the end of a text, which take "
        "some of a text's last round from spec_tokens_per_call",
    "tree_level_cost": "a draft pass in target passes, by which dynamic trees stop early; 0: they do not",
    "draft_calls_per_token": "draft passes / emitted tokens",
    "acceptance_rate": "trees: accepted nodes / levels offered",
    "branches_total, effective_parallelism, max_active_branches": "nodes fed to the draft: all, per round, most in one pass",
    "branches_kept, branches_pruned, branch_prune_rate": "candidate nodes that the verified trees hold, those that they do not, and the share of these",
    "cache_hits, cache_misses, cache_hit_rate": "tokens found in the tree; rounds; 1 − rounds / emitted = 1 − 1/τ",
    "vanilla_<phase>_s, spec_<phase>_s": "seconds of prefill, decode, draft, verify (sampling included) and host",
    "<metric>_ci_low, <metric>_ci_high": "bootstrap 95 % interval over prompts (absent for one prompt)",
}
POTENTIAL_COLUMNS = {
    "potential_kl": "KL(p‖q) in nats per token, both softened by potential_kl_temperature and not truncated (absent where infinite)",
    "potential_overlap": "mean Σ min(p, q) under the sampling policy",
    "potential_tv": "1 − potential_overlap",
    "potential_agreement": "share of positions where draft and target have the same argmax",
    "potential_tau_rejection": "τ that chains of γ promise: mean of 1 + Σ_j Π_{i ≤ j} a_i over all places where γ tokens follow, a_i = Σ min(p, q) at "
        "the i-th of them (absent where no sample has γ); for ranking drafts, as it lies above spec_tokens_per_call: prompts count, and rounds begin "
        "where the draft failed",
    "potential_tau_coupled": "the same with a_i = the chance that coupled verification keeps the token",
    "potential_kl_temperature": "the temperature of potential_kl alone",
    "potential_samples": "samples that count",
    "potential_skipped": "samples left out, as they have fewer than 2 tokens or the chat template refuses them",
    "potential_tokens": "positions that the figures are means over: every token of a sample but its first; no padding",
    "<metric>_ci_low, <metric>_ci_high": "bootstrap 95 % interval over samples (absent for one sample)",
}
LOSSY_COLUMNS = {
    "lossy_same_text": "share of prompts whose text is vanilla sampling's for the same seed (a lossless method that draws with the target's noise: 1)",
    "lossy_text_nll, vanilla_text_nll": "mean −log p of the decoded tokens under the target at the policy's temperature (1 at T = 0), untruncated, nats per token",
}
QUALITY_SUMS = ("kl", "kl_at_train_temperature", "ce", "teacher_ce", "top1", "top5", "agreement", "overlap", "tokens")
TOP_K = 5
CHUNK_ROWS = 2048  # rows of V logits in fp32 at a time: 1 GB at V = 128k
ROUNDING = 1e-3  # what fp32 probabilities may be off in a sum over one evaluation
NUM_RESAMPLES, INTERVAL = 2000, (2.5, 97.5)
NORMAL_95 = 1.959964  # of the standard normal distribution, 97.5 % lie below


# ---- quality: teacher-forced, token-weighted ----

def quality_sums(teacher: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, temperature: float) -> dict[str, float]:
    """Sums over rows of teacher and draft logits (N, V) that predict `tokens` (N,); keys as QUALITY_COLUMNS'."""
    sums: dict[str, float] = {}
    for rows in zip(teacher.split(CHUNK_ROWS), draft.split(CHUNK_ROWS), tokens.split(CHUNK_ROWS), strict=True):
        sums = add_sums(sums, _chunk_sums(*rows, temperature))
    return sums


def _chunk_sums(teacher: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, temperature: float) -> dict[str, float]:
    log_p, log_q = log_softmax(teacher.float(), -1), log_softmax(draft.float(), -1)
    soft_p, soft_q = log_p, log_q
    if temperature != 1:
        soft_p, soft_q = log_softmax(teacher.float() / temperature, -1), log_softmax(draft.float() / temperature, -1)
    top = draft.topk(TOP_K, -1).indices
    no_draft, no_teacher = log_q[:, 0].isnan(), log_p[:, 0].isnan()  # one number that is none makes all of its row so
    sums = {  # QUALITY_SUMS, but for the tokens
        "kl": _kl(log_p, log_q),
        "kl_at_train_temperature": _kl(soft_p, soft_q),
        "ce": -log_q.gather(-1, tokens[:, None]).sum(),
        "teacher_ce": -log_p.gather(-1, tokens[:, None]).sum(),
        "top1": _hits(draft.argmax(-1) == tokens, no_draft),
        "top5": _hits((top == tokens[:, None]).any(-1), no_draft),
        "agreement": _hits(draft.argmax(-1) == teacher.argmax(-1), no_draft | no_teacher),
        "overlap": overlap(log_p.exp(), log_q.exp()).sum(),
    }
    return {**{name: float(value) for name, value in sums.items()}, "tokens": len(tokens)}


def _hits(hit: torch.Tensor, no_row: torch.Tensor) -> torch.Tensor:
    """How many rows (N,) hit; NaN where a row has no numbers, which is no miss."""
    return torch.where(no_row, torch.nan, hit.float()).sum()


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum()


def quality_means(sums: dict[str, float]) -> dict[str, float]:
    """QUALITY_COLUMNS from added-up `quality_sums`, without those that are not finite: a draft that knows a part of the vocabulary has no KL, and nothing is known of a
    model whose logits are no numbers."""
    tokens = sums["tokens"]
    means = {name: value / tokens for name, value in sums.items() if name not in ("tokens", "teacher_ce")}
    found = {
        **means, "ppl": _exp(means["ce"]), "teacher_ppl": _exp(sums["teacher_ce"] / tokens),
        "tv": 1 - means["overlap"], "tokens": tokens,
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _exp(nats: float) -> float:
    """e to this power, infinite where it is no float."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def add_sums(total: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Key-wise sum; `total` may be empty."""
    return {name: total.get(name, 0) + value for name, value in more.items()}


# ---- speculation: counts of many prompts ----

def speculation_metrics(runs: list[DecodeStats], longest: int, seed: int = 0) -> dict[str, float]:
    """Acceptance columns of SPECULATION_COLUMNS from one generation per prompt, with intervals over prompts; at most `longest` drafted per round."""
    rounds = [r for run in runs for r in run.rounds]
    proposed, tested, accepted = (np.array([sum(getattr(r, name) for r in run.rounds) for run in runs]) for name in ("proposed", "tested", "accepted"))
    emitted, calls = np.array([run.emitted for run in runs]), np.array([run.target_calls for run in runs])
    overlaps, expected = (np.array([sum(sum(getattr(r, name)) for r in run.rounds) for run in runs]) for name in ("overlaps", "expected"))
    num_rounds = np.array([len(run.rounds) for run in runs])
    recorded = np.array([sum(len(r.overlaps) for r in run.rounds) for run in runs])
    row: dict[str, float] = {
        "spec_prompts": len(runs), "spec_rounds": len(rounds), "spec_proposed": int(proposed.sum()), "spec_tested": int(tested.sum()),
        "spec_accepted": int(accepted.sum()), "spec_emitted": int(emitted.sum()),
        "spec_target_calls_per_token": calls.sum() / emitted.sum(),
    }
    row |= {"spec_expected_accept": expected.sum() / tested.sum()} if recorded.any() else {}
    z = acceptance_z(runs)
    row |= {} if z is None else {"spec_accept_z": z}
    row |= tree_metrics(runs, seed)
    for name, numerator, denominator in (
        ("spec_mean_accepted", accepted, num_rounds),
        ("spec_mean_proposed", proposed, num_rounds),
        ("spec_accept_rate", accepted, proposed),
        ("spec_token_accept_rate", accepted, tested),
        ("spec_tokens_per_call", emitted, calls),
        ("spec_overlap", overlaps, recorded),
        ("spec_tv", recorded - overlaps, recorded),
    ):
        if not denominator.any():  # an adaptive rule may draft nothing
            continue
        row |= with_interval(name, numerator, denominator, seed)
    for i in range(1, longest + 1):
        reached = [r for r in rounds if r.tested >= i]
        if reached:
            row[f"spec_accept_at_{i}"] = sum(r.accepted >= i for r in reached) / len(reached)
    for n in range(longest + 1):
        row[f"spec_accepted_hist_{n}"] = sum(r.accepted == n for r in rounds)
    return row


def acceptance_z(runs: list[DecodeStats]) -> float | None:
    """z of Σ (accepted − expected) over tested positions, each a Bernoulli draw with its expected chance.

    Where every chance is 0 or 1 (T = 0, or draft = target) nothing varies: None if the counts agree, else infinite. None for trees, and where a judge was asked.
    """
    difference = variance = 0.0
    for run in runs:
        for r in run.rounds:
            if r.tree is not None or r.judged:
                return None
            difference += r.accepted - sum(r.expected)
            variance += sum(chance * (1 - chance) for chance in r.expected)
    if variance > ROUNDING:
        return difference / math.sqrt(variance)
    return None if abs(difference) < ROUNDING else math.copysign(math.inf, difference)


def tree_metrics(runs: list[DecodeStats], seed: int = 0) -> dict[str, float]:
    """Tree columns of SPECULATION_COLUMNS; none where no trees were drafted."""
    trees = [r.tree for run in runs for r in run.rounds if r.tree is not None]
    if not trees:
        return {}
    rounds, emitted = sum(len(run.rounds) for run in runs), sum(run.emitted for run in runs)
    accepted = sum(r.accepted for run in runs for r in run.rounds)
    fed, kept, considered = sum(tree.fed for tree in trees), sum(tree.nodes - 1 for tree in trees), sum(tree.considered for tree in trees)
    expected = sum(tree.expected for tree in trees) / len(trees)
    found, tree_rounds = (np.array([sum(count(r) for r in run.rounds if r.tree is not None) for run in runs]) for count in (lambda r: 1 + r.accepted, lambda r: 1))
    return {
        **with_interval("tree_found_tokens", found, tree_rounds, seed),
        "tree_nodes": sum(tree.nodes for tree in trees) / len(trees), "tree_depth_offered": sum(tree.depth for tree in trees) / len(trees),
        "tree_passes": sum(tree.passes for tree in trees) / len(trees),
        "draft_calls_per_token": sum(run.draft_calls for run in runs) / emitted,
        **({} if math.isnan(expected) else {"tree_expected_tokens": expected}),
        "acceptance_rate": accepted / max(sum(tree.depth for tree in trees), 1),
        "branches_total": fed, "effective_parallelism": fed / rounds, "max_active_branches": max(tree.widest for tree in trees),
        "branches_kept": kept, "branches_pruned": max(considered - kept, 0), "branch_prune_rate": max(considered - kept, 0) / considered,
        "cache_hits": accepted, "cache_misses": rounds, "cache_hit_rate": 1 - rounds / emitted,
    }


def speed_metrics(vanilla: list[DecodeStats], speculative: list[DecodeStats], seed: int = 0) -> dict[str, float]:
    """Tokens per second and phases of both, and the speedup with its interval over prompts (paired)."""
    row: dict[str, float] = {}
    paces = {name: pace([[run] for run in runs]) for name, runs in (("vanilla", vanilla), ("spec", speculative))}
    for (name, (tokens, seconds)), runs in zip(paces.items(), (vanilla, speculative), strict=True):
        row |= with_interval(f"{name}_tokens_per_s", tokens, seconds, seed)
        row[f"{name}_decode_s"], row[f"{name}_host_s"] = seconds.sum(), sum(run.host_s for run in runs)
        row |= {f"{name}_{phase}_s": sum(run.seconds[phase] for run in runs) for phase in PHASES if phase != "record"}
    return {**row, **speedup_interval("spec_speedup", paces["vanilla"], paces["spec"], seed)}


def pace(batches: list[list[DecodeStats]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the seconds that decoding them took, for each batch of texts that were decoded together."""
    return np.array([sum(run.timed for run in batch) for batch in batches]), np.array([batch[0].decode_s for batch in batches])


def speedup_interval(name: str, baseline: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], seed: int = 0) -> dict[str, float]:
    """{name, name_ci_low, name_ci_high}: tokens per second of `other` over those of `baseline`, both (tokens, seconds) of the same
    prompts or batches, paired bootstrap; nothing where one of them has no tokens to time."""
    (base_n, base_s), (other_n, other_s) = baseline, other
    if not (base_n.any() and other_n.any()):
        return {}

    def speedup(pick: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # all prompts that were picked may have ended with the prefill
            return (base_s[pick].sum(-1) / base_n[pick].sum(-1)) / (other_s[pick].sum(-1) / other_n[pick].sum(-1))

    count = len(base_n)
    return _with(name, float(speedup(np.arange(count))), speedup(_resamples(count, seed)), count)


def with_interval(name: str, numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> dict[str, float]:
    """{name, name_ci_low, name_ci_high} of Σ numerator / Σ denominator over prompts (arrays (P,)), bootstrapped; nothing where there is no denominator."""
    pick = _resamples(len(numerator), seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # rare events may be in none of the prompts that were picked, or in none at all
        return _with(name, float(np.divide(numerator.sum(), denominator.sum())), numerator[pick].sum(-1) / denominator[pick].sum(-1), len(numerator))


def _with(name: str, value: float, resampled: np.ndarray, prompts: int) -> dict[str, float]:
    """`name` and the two columns of its interval: none for a single prompt, which says nothing about others, and no column where there is no value."""
    if not math.isfinite(value):
        return {}
    if prompts < 2:
        return {name: value}
    low, high = np.percentile(resampled[np.isfinite(resampled)], INTERVAL)
    return {name: value, f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}


def _resamples(count: int, seed: int) -> np.ndarray:
    """Indices (NUM_RESAMPLES, count) drawn with replacement."""
    return np.random.default_rng(seed).integers(0, count, (NUM_RESAMPLES, count))


# ---- accuracy ----

def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """95 % interval of a share, `right` of `total` (Wilson 1927): it stays within 0 and 1, and is not empty where all or none are right."""
    share, z = right / total, NORMAL_95
    centre, spread = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, (centre - spread) / (1 + z * z / total)), min(1.0, (centre + spread) / (1 + z * z / total))


def mcnemar_p(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test: whether two methods that answered the same questions are equally often right. Only questions that one of them got right count."""
    only_one, only_other = (sum(bool(a) and not b for a, b in zip(first, second, strict=True)) for first, second in ((one, other), (other, one)))
    total = only_one + only_other
    tail = sum(math.comb(total, count) for count in range(min(only_one, only_other) + 1)) / 2**total
    return min(1.0, 2 * tail)


# ---- cost model ----

def expected_tokens(alpha: float, gamma: int) -> float:
    """E[τ] = (1 − α^(γ+1)) / (1 − α): tokens per round when each draft is kept with chance α (Leviathan et al., eq. 1)."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def predicted_speedup(alpha: float, gamma: int, cost_ratio: float, verify_ratio: float = 1.0) -> float:
    """S = E[τ] / (γ·c + v): Leviathan et al., theorem 3.8, with the measured price v of verifying γ+1 tokens for 1."""
    return expected_tokens(alpha, gamma) / (gamma * cost_ratio + verify_ratio)

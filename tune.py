"""Which exit, head size and γ to use on this machine and this traffic, and what speedup that gives: predicted, then measured.

    python tune.py --model_path assets/pydoc-llama-7m --checkpoint_glob "runs/demo/*/layer*/model_*.safetensors" \\
        --spec_prompt_dataset pydoc --draft_vocab_sizes 1024 2048 --spec_top_p 0.95 --num_threads 2 --out_dir runs/tune

The target writes the prompts' continuations; along them each exit's chance of being kept is computed exactly, and rounds of
every length are timed. Tokens per round over round costs is the predicted speedup; the best choice is then decoded beside
vanilla, with its γ and with γ = auto. Writes candidates.csv and recommendation.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from running.command_line import UserError, parse_args, run

import pandas as pd
import torch

from data.registry import find_dataset
from data.row_files import check_learnable
from decoding.draft_length import AdaptiveLength
from decoding.verify import Verification
from measuring.evaluation import EvaluationData, PolicyArgs, PromptArgs, choose_prompts, training_texts
from measuring.machine_speed import memory_bandwidth
from measuring.metrics import pace, speedup_interval, with_interval
from measuring.round_costs import LONGEST, Candidate, acceptance_along, frequent_tokens, round_costs, tokens_per_round
from models.target_model import Target, eos_token_ids, load_target
from running.run_files import new_output_dir, record_run, write_csv, write_json
from speculative import DecodeOptions, generate
from truncated_llama import TruncatedLlama, check_exit_fits, find_checkpoints, load_exit, read_exit_info, step_bytes

RESULTS_NAME = "recommendation.json"


@dataclass(kw_only=True)
class Args(PolicyArgs, PromptArgs):
    """Recommend exit, head size and γ."""

    checkpoint_glob: list[str] = field(metadata={"help": "globs or paths of exits made by train.py, quoted"})
    draft_vocab_sizes: list[int] = field(default_factory=list, metadata={"help": "sizes to which heads are cut on trial, multiples of 16, beside the full one"})
    verification: Verification = field(default="rejection", metadata={"help": "coupled returns vanilla's own tokens for the seed"})

    @property
    def longest(self) -> int:
        return LONGEST

    def check(self) -> None:
        vocab_size = self.config().vocab_size
        for size in self.draft_vocab_sizes:
            if size % 16 or not 0 < size < vocab_size:
                raise UserError(f"--draft_vocab_sizes {size}: must be a multiple of 16 below the vocabulary's {vocab_size}")
        if self.draft_vocab_sizes:
            check_learnable(find_dataset(self.dataset_names()[0]))
        for path in find_checkpoints(self.checkpoint_glob):
            read_exit_info(path)
        self.policy()
        super().check()

    def options(self, target: Target) -> DecodeOptions:
        """How drafts are decoded with."""
        return DecodeOptions(
            method="self_speculative", policy=self.policy(), verification=self.verification, max_new_tokens=self.spec_max_new_tokens,
            eos_ids=eos_token_ids(target), seed=self.seed,
        )


def candidate_drafts(target: Target, args: Args) -> dict[str, tuple[TruncatedLlama, int]]:
    """Name -> (draft, head size): every checkpoint with its full head, and cut to each size."""
    vocab_size = target.model.config.vocab_size
    texts = training_texts(target, args) if args.draft_vocab_sizes else []
    found = {}
    for path in find_checkpoints(args.checkpoint_glob):
        check_exit_fits(path, read_exit_info(path), target)
        exit_, _ = load_exit(path, target)
        found[path] = TruncatedLlama(target.model, exit_), vocab_size
        for size in args.draft_vocab_sizes:
            tokens = frequent_tokens(texts, size, vocab_size).to(target.model.device)
            found[f"{path} cut to {size}"] = TruncatedLlama(target.model, exit_.trimmed(tokens)), size
    return found


def measured_candidates(target: Target, prompts: list[list[int]], args: Args) -> list[Candidate]:
    """Every candidate with its round costs and the tokens per round to expect."""
    options = args.options(target)
    vanilla = replace(options, method="vanilla")
    texts = [(prompt + generate(target.model, prompt, vanilla, prompt_id=i).tokens, len(prompt)) for i, prompt in enumerate(prompts)]
    found = []
    for name, (draft, vocab) in candidate_drafts(target, args).items():
        chances = acceptance_along(target.model, draft, texts, options)
        costs = round_costs(target.model, draft, prompts[0], options)
        tokens = [tokens_per_round(chances, gamma) for gamma in range(LONGEST + 1)]
        found.append(Candidate(name, draft, vocab, float(torch.cat(chances).mean()), costs, tokens))
        print(f"{name}: α {found[-1].alpha:.3f}, predicted speedup {found[-1].speedup(found[-1].best_gamma):.2f} at γ = {found[-1].best_gamma}", flush=True)
    return found


def candidate_row(candidate: Candidate, target: Target) -> dict:
    """A candidate's figures: α, c and t(n)/t(0) of its rounds, bytes, best γ and predicted speedup."""
    exit_, costs = candidate.draft.exit, candidate.costs
    return {
        "draft": candidate.name, "target_layer": exit_.target_layer, "block": exit_.form.block, "head_tokens": candidate.vocab,
        "alpha": candidate.alpha, "cost_ratio_bytes": exit_.cost_ratio(target.model), "best_gamma": candidate.best_gamma,
        "predicted_speedup": candidate.speedup(candidate.best_gamma),
        **{f"round_cost_{n}": cost / costs[0] for n, cost in enumerate(costs)}, **{f"tokens_per_round_{n}": t for n, t in enumerate(candidate.tokens)},
    }


def measure(target: Target, best: Candidate, prompts: list[list[int]], args: Args) -> dict[str, dict]:
    """Tokens per second of vanilla, the recommended γ and γ = auto, prompt by prompt in turn; one prompt more before, uncounted."""
    options = args.options(target)
    ways = {"vanilla": replace(options, method="vanilla"), "auto": replace(options, gamma=AdaptiveLength(best.costs))}
    if best.best_gamma > 0:
        ways[f"gamma {best.best_gamma}"] = replace(options, gamma=best.best_gamma)
    runs: dict[str, list] = {name: [] for name in ways}
    for turn, prompt in enumerate([prompts[0], *prompts]):
        for name in sorted(ways, reverse=turn % 2 == 0):
            stats = generate(target.model, prompt, ways[name], best.draft, prompt_id=turn).stats
            runs[name] += [[stats]] if turn > 0 else []
    paces = {name: pace(batches) for name, batches in runs.items()}
    return {name: {**with_interval("tokens_per_s", *own, args.seed), **speedup_interval("speedup", paces["vanilla"], own, args.seed)} for name, own in paces.items()}


def recommendation(target: Target, prompts: list[list[int]], rows: list[dict], best: Candidate, args: Args) -> dict:
    """What to use, and what it was predicted and measured to give."""
    bandwidth = memory_bandwidth(target.model.device)
    measured = measure(target, best, prompts, args)
    step_s = 1 / measured["vanilla"]["tokens_per_s"]
    return {
        "draft": best.name, "gamma": best.best_gamma, "head_tokens": best.vocab, "predicted_speedup": best.speedup(best.best_gamma), "measured": measured,
        "memory_bytes_per_s": bandwidth, "vanilla_roofline_share": step_bytes(target.model) / bandwidth / step_s, "threads": torch.get_num_threads(),
        "candidates": len(rows),
    }


def report(found: dict) -> str:
    """The recommendation in words and a table."""
    if found["gamma"] == 0:
        advice = "no draft is predicted to pay on this machine: decode without one, or train an exit that is accepted more often"
    else:
        advice = f"use {found['draft']} with --gamma {found['gamma']}: predicted speedup {found['predicted_speedup']:.2f}"
    lines = pd.DataFrame(found["measured"]).T.to_string(float_format="%.2f")
    return f"{lines}\nvanilla reads {100 * found['vanilla_roofline_share']:.0f} % of the memory's {found['memory_bytes_per_s'] / 1e9:.1f} GB/s\n{advice}"


def main() -> None:
    args = parse_args(Args)
    args.check()
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "a recommendation")
    data: EvaluationData = args.open_data()
    target = load_target(args.model_path, args)
    record_run(folder, args, args.facts(target, data))
    prompts = choose_prompts(target, args, data)
    candidates = sorted(measured_candidates(target, prompts, args), key=lambda candidate: -candidate.speedup(candidate.best_gamma))
    rows = [candidate_row(candidate, target) for candidate in candidates]
    write_csv(folder / "candidates.csv", rows)
    found = recommendation(target, prompts, rows, candidates[0], args)
    write_json(folder / RESULTS_NAME, found)
    print(report(found))
    print(folder / RESULTS_NAME)


if __name__ == "__main__":
    run(main)

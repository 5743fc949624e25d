"""What judges gain and what they cost: tokens per target call against the share of problems that are solved, over thresholds and, as the baseline, ranks.

    python -m commands.evaluate_judge --model_path assets/pydoc-llama-7m --checkpoint runs/demo/ftlast/layer1/model_000300.safetensors \\
        --judges runs/judge/judge.safetensors --dataset arithmetic --out_dir runs/judge/evaluation

The test split's problems are decoded without a judge, then with every judge at every threshold and by every rank, and each way's answers are compared with
those of the first. Counts only: they do not depend on the machine, and nothing is timed. `<out_dir>/results.csv` has a row per way (the columns are COLUMNS),
`commands/plot_judges.py` draws it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from running.command_line import UserError, parse_args, run

import numpy as np
import pandas as pd
from torch import nn
from tqdm import tqdm

from data.answers import final_answer, same_answer
from data.registry import fingerprint, open_stream
from data_utils import encode_prompt
from decoding.autojudge import TopK
from decoding.state import DecodeStats
from decoding.verify import Verification
from measuring.evaluation import DraftArgs, PolicyArgs, chain_method, drafted_at_most, load_draft, shortest_context
from measuring.metrics import mcnemar_p, wilson_interval, with_interval
from models.target_model import EMBEDDED_TARGET, DeviceArgs, Target, eos_token_ids, load_config, load_target, text_facts
from running.run_files import file_hash, new_output_dir, record_run, write_csv
from speculative import DecodeOptions, Generation, context_length, generate_batch
from training.judges import JudgeInfo, load_judge, read_judge_info

RESULTS_NAME = "results.csv"
COLUMNS = {
    "method, lossless": "how it was decoded; whether the output has the target's law. The first row has no judge: the others are compared with it",
    "judge, judge_mode, judge_features": "the judge's file; P(important) (paper) or P(accept) (draft); what it reads",
    "threshold, own_threshold, rank": "of the judge, in its mode's own sense; whether it is the one that it was calibrated to; of topk (0: all)",
    "tokens_per_call": "τ: emitted tokens / rounds, with a bootstrap 95 % interval over problems (_ci_low, _ci_high)",
    "target_calls_per_token": "1 / τ",
    "judge_accept_rate": "tokens that the judge kept / tokens that it was asked about",
    "target_fallback_rate": "tokens that the target corrected / drafted tokens",
    "accuracy": "share of problems whose final answer is the reference's, with Wilson's 95 % interval (_ci_low, _ci_high)",
    "lost, gained": "problems that only the first row solves, that only this one solves",
    "mcnemar_p": "exact two-sided p of McNemar's test of lost against gained",
    "same_answers, same_texts": "shares of problems with the answer, and with the text, of the first row",
    "problems, unanswered, emitted, rounds, proposed, judged, overridden": "counts; unanswered: texts without a number",
    "gamma, verification, temperature, top_p, top_k, seed": "settings",
}


@dataclass(kw_only=True)
class Args(PolicyArgs, DraftArgs, DeviceArgs):
    """Accuracy and tokens per target call of judges, by threshold."""

    model_path: str = field(metadata={"help": f"the target: a Hugging Face id or folder ({EMBEDDED_TARGET.name} lies in assets/)"})
    out_dir: str = field(metadata={"help": "folder for results; made where missing"})
    judges: list[str] = field(default_factory=list, metadata={"help": "files made by commands/train_judge.py for this target and draft"})
    thresholds: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0], metadata={
        "help": "of every judge, in its mode's own sense, beside its own"})
    ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 0], metadata={
        "help": "of topk, the baseline: keep what is among the target's most likely tokens; 0: all"})
    dataset: Literal["gsm8k", "arithmetic"] = field(default="arithmetic", metadata={"help": "data set whose answers end in a number: its test split"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the data set's form"})
    num_problems: int = field(default=0, metadata={"help": "problems, in the data set's order; 0: all"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest answer, in tokens"})
    gamma: int = field(default=8, metadata={"help": "drafted tokens per round"})
    verification: Verification = field(default="rejection", metadata={"help": "the exact rule that is asked first"})
    batch_size: int = field(default=16, metadata={"help": "problems decoded together"})
    seed: int = field(default=0, metadata={"help": "seed of noise and bootstrap"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        self.check_device()
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("num_problems", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        for name, values, most in (("thresholds", self.thresholds, 1), ("ranks", self.ranks, np.inf)):
            if any(not 0 <= value <= most for value in values):
                raise UserError(f"--{name} {' '.join(map(str, values))}: must lie {'between 0 and 1' if most == 1 else 'at 0 or above'}")
        self.policy()
        for path in self.judges:
            read_judge_info(path)
        longest = self.max_new_tokens + drafted_at_most(str(self.gamma))
        if longest >= context_length(load_config(self.model_path)):
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: does not fit the context of {self.model_path}; lower it")
        self.check_draft(self.model_path, longest)


# ---- what is decoded, and how ----

@dataclass(frozen=True)
class Problem:
    """A prompt as token ids, and the final number of its reference answer."""

    ids: list[int]
    answer: str


@dataclass(frozen=True)
class Way:
    """Options to decode with, and the columns that say so."""

    options: DecodeOptions
    columns: dict


def read_problems(args: Args, target: Target) -> tuple[list[Problem], dict]:
    """The problems that have a number for an answer and fit the context, and what identifies the data. Raises UserError where there are none."""
    stream = open_stream(args.dataset, "test", args.dataset_path, shuffle=False)
    longest = min(context_length(target.model.config), shortest_context(target, args)) - args.max_new_tokens - args.gamma

    def as_problem(example: dict) -> Problem:
        return Problem(encode_prompt(target.tokenizer, example), final_answer(example["messages"][-1]["content"]))

    problems = islice(stream.usable(as_problem), args.num_problems or None)
    found = [problem for problem in problems if problem.answer is not None and len(problem.ids) <= longest]
    if not found:
        raise UserError(f"--dataset {args.dataset}: no problem with a number for an answer; {stream.account()}; give a file of GSM8K's form")
    stream.tell_losses()
    return found, fingerprint(stream)


def ways(args: Args, target: Target, draft: nn.Module) -> Iterator[Way]:
    """The exact way first. Raises UserError for judges of other models."""
    exact = DecodeOptions(
        method=chain_method(target, draft), policy=args.policy(), gamma=args.gamma, verification=args.verification,
        max_new_tokens=args.max_new_tokens, eos_ids=eos_token_ids(target), seed=args.seed,
    )
    yield Way(exact, {})
    for path in args.judges:
        judge, info = load_judge(path, target, draft)
        for threshold in sorted({judge.threshold, *args.thresholds}):
            yield Way(replace(exact, method="autojudge", judge=replace(judge, threshold=threshold)), judge_columns(path, info, threshold))
    for rank in args.ranks:
        yield Way(replace(exact, method="topk", judge=TopK(rank or None)), {"rank": rank})


def judge_columns(path: str, info: JudgeInfo, threshold: float) -> dict:
    """What a judge is, and where its threshold was set."""
    return {"judge": path, "judge_mode": info.mode, "judge_features": info.features, "threshold": threshold, "own_threshold": threshold == info.threshold}


def decode(target: nn.Module, draft: nn.Module, problems: list[Problem], options: DecodeOptions, batch_size: int) -> list[Generation]:
    """All problems' texts, in order."""
    found: list[Generation] = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        found += generate_batch(target, [problem.ids for problem in batch], options, draft, prompt_ids=list(range(start, start + len(batch))))
    return found


# ---- a row per way ----

@dataclass(frozen=True)
class Solved:
    """One way's texts: their answers, and which are right."""

    tokens: list[list[int]]
    answers: list[str | None]
    right: list[bool]


def solve(target: Target, problems: list[Problem], generations: list[Generation]) -> Solved:
    """Read the answers."""
    tokens = [generation.tokens for generation in generations]
    answers = [final_answer(target.tokenizer.decode(text, skip_special_tokens=True)) for text in tokens]
    return Solved(tokens, answers, [same_answer(answer, problem.answer) for answer, problem in zip(answers, problems, strict=True)])


def make_row(way: Way, runs: list[DecodeStats], solved: Solved, exact: Solved, seed: int) -> dict:
    """A row of COLUMNS."""
    options, rounds = way.options, [r for run in runs for r in run.rounds]
    emitted, calls = (np.array(counts) for counts in ([run.emitted for run in runs], [len(run.rounds) for run in runs]))
    proposed, judged, overridden = (sum(getattr(r, name) for r in rounds) for name in ("proposed", "judged", "overridden"))
    low, high = wilson_interval(sum(solved.right), len(runs))
    row = {"method": options.method, "lossless": options.lossless, **way.columns, **with_interval("tokens_per_call", emitted, calls, seed),
           "target_calls_per_token": calls.sum() / emitted.sum(), **({"judge_accept_rate": overridden / judged} if judged else {}),
           "target_fallback_rate": sum(r.accepted < r.proposed for r in rounds) / proposed,
           "accuracy": sum(solved.right) / len(runs), "accuracy_ci_low": low, "accuracy_ci_high": high}
    row |= comparison(solved, exact) if way.columns else {}
    counts = {"problems": len(runs), "unanswered": solved.answers.count(None), "emitted": int(emitted.sum()), "rounds": len(rounds), "proposed": proposed,
              "judged": judged, "overridden": overridden}
    policy = options.policy
    return {**row, **counts, "gamma": options.gamma, "verification": options.verification, "temperature": policy.temperature, "top_p": policy.top_p,
            "top_k": policy.top_k, "seed": seed}


def comparison(solved: Solved, exact: Solved) -> dict:
    """How a way's texts compare with those of exact decoding."""
    pairs = list(zip(solved.right, exact.right, strict=True))
    count = len(pairs)
    return {
        "lost": sum(before and not now for now, before in pairs), "gained": sum(now and not before for now, before in pairs),
        "mcnemar_p": mcnemar_p(exact.right, solved.right),
        "same_answers": sum(a == b or same_answer(a, b) for a, b in zip(solved.answers, exact.answers, strict=True)) / count,
        "same_texts": sum(a == b for a, b in zip(solved.tokens, exact.tokens, strict=True)) / count,
    }


def evaluate(args: Args, target: Target, draft: nn.Module, problems: list[Problem], planned: list[Way]) -> Iterator[dict]:
    """A row for each way, as it is decoded; a bar on a terminal."""
    exact = None
    for way in tqdm(planned, desc="ways", unit="way", disable=not sys.stderr.isatty()):
        generations = decode(target.model, draft, problems, way.options, args.batch_size)
        solved = solve(target, problems, generations)
        exact = exact or solved
        yield make_row(way, [generation.stats for generation in generations], solved, exact, args.seed)


def summary(rows: list[dict]) -> str:
    """The figures that matter, a line per way."""
    shown = {"method": "method", "reads": "judge_features", "threshold": "threshold", "own": "own_threshold", "rank": "rank", "τ": "tokens_per_call",
             "low": "tokens_per_call_ci_low", "high": "tokens_per_call_ci_high", "kept": "judge_accept_rate", "fallback": "target_fallback_rate",
             "accuracy": "accuracy", "lost": "lost", "gained": "gained", "p": "mcnemar_p"}
    table = pd.DataFrame([{title: row.get(column) for title, column in shown.items()} for row in rows])
    return table.dropna(axis="columns", how="all").to_string(index=False, float_format="%.3f", na_rep="")


def main() -> None:
    args = parse_args(Args)
    args.check()
    folder: Path = new_output_dir(args.out_dir, RESULTS_NAME, "an evaluation of judges")
    target = load_target(args.model_path, args)
    draft = load_draft(target, args).model
    problems, data = read_problems(args, target)
    planned = list(ways(args, target, draft))
    record_run(folder, args, {**text_facts(target), "data": data, "judge_hashes": [file_hash(path) for path in args.judges]})
    rows: list[dict] = []
    for row in evaluate(args, target, draft, problems, planned):
        rows.append(row)
        write_csv(folder / RESULTS_NAME, rows)
    print(summary(rows))
    print(folder / RESULTS_NAME)


if __name__ == "__main__":
    run(main)

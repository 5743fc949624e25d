"""From generations to the records of the benchmarks: keys, the figures of a run, and summaries over all runs that a file holds."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from decoding.state import DecodeStats
from harness.schema import SCHEMA_VERSION
from measuring.metrics import mcnemar_p, pace, speculation_metrics, speedup_interval, wilson_interval, with_interval
from running.run_files import display_active, environment, now
from speculative import METHODS, DecodeOptions

MEDIANS = {
    "tokens_per_sec_median": "tokens_per_sec", "acceptance_rate_median": "acceptance_rate", "avg_tokens_per_step_median": "avg_tokens_per_step",
    "tokens_per_call_median": "tokens_per_call", "target_calls_per_token_median": "target_calls_per_token", "judge_accept_rate_median": "judge_accept_rate", "target_fallback_rate_median": "target_fallback_rate",
    "cache_hit_rate_median": "cache_hit_rate", "spec_overlap_median": "spec_overlap",
}
BASELINES = ("vanilla", "hf_generate")
UNJUDGED = ("self_speculative", "speculative", "vanilla")  # what a judged method's accuracy is compared with; that of others with the last
OF_TREES = ("branches_total", "branches_kept", "branches_pruned", "branch_prune_rate", "effective_parallelism", "max_active_branches", "cache_hits", "cache_misses",
            "cache_hit_rate")

SETTINGS = ("lossless", "k", "verification", "tree_budget", "parallel_branches", "branch_prune_threshold", "commonsense", "judge_rule", "autojudge_threshold",
            "autojudge_checkpoint")


# ---- what identifies a record ----

@dataclass(frozen=True)
class MethodRun:
    """One run of a method with what its own figures depend on."""

    method: str
    inputs: dict
    run: int

    def fields(self, shared: dict, status: str) -> dict:
        """What every record of a run says of itself."""
        seed = shared["seed"] + self.run - 1
        return {"timestamp": now(), "status": status, "summary": False, "method": self.method, "run": self.run, "seed": seed,
                "resume_key": key_of(shared, self), "inputs": {"shared": shared, "method": self.inputs}}


def key_of(shared: dict, finished: MethodRun) -> str:
    """The key of a run: the same inputs make the same key."""
    return _hash({"shared": shared, "method": finished.method, "inputs": finished.inputs, "run": finished.run})


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps({"schema_version": SCHEMA_VERSION, **content}, sort_keys=True).encode()).hexdigest()


def system_fields() -> dict:
    """The machine and the libraries."""
    found = environment()
    return {
        "schema_version": SCHEMA_VERSION, "git_sha": found["git_sha"], "hostname": platform.node() or None, "gpu_name": found.get("gpu"),
        "gpu_driver": found.get("driver"), "cuda_runtime": found.get("cuda"), "torch_version": found["versions"]["torch"],
        "transformers_version": found["versions"]["transformers"], "display_active": display_active(), "num_threads": torch.get_num_threads(),
    }


# ---- one run ----

def run_fields(runs: list[DecodeStats], correct: list[bool], options: DecodeOptions) -> dict:
    """The figures of one run over all prompts; `correct` of those whose answer can be checked. Raises ValueError where nothing was decoded behind the prefill."""
    tokens, seconds = pace([[run] for run in runs])
    if not tokens.any():
        raise ValueError("every text ended with its prefill: there is no decoding to time; raise --max_new_tokens, or choose other prompts")
    emitted, steps, calls = (sum(counts) for counts in zip(*((run.emitted, len(run.rounds), run.target_calls) for run in runs), strict=True))
    prefill = sum(run.seconds["prefill"] for run in runs)
    row = {
        "prompts": len(runs), "total_prompt_tokens": sum(run.prompt_tokens for run in runs), "total_generated_tokens": emitted,
        "duration_sec": prefill + seconds.sum(), "prefill_sec": prefill, "decode_sec": seconds.sum(), "tokens_per_sec": tokens.sum() / seconds.sum(),
        "tokens_by_prompt": tokens.tolist(), "decode_sec_by_prompt": seconds.tolist(), "target_calls_by_prompt": [run.target_calls for run in runs],
        "steps": steps, "avg_tokens_per_step": tokens.sum() / steps, "tokens_per_call": tokens.sum() / calls, "target_calls": calls,
        "target_calls_per_token": calls / tokens.sum(),
    }
    if correct:
        row |= {"correct_by_prompt": correct, "exact_match": sum(correct) / len(correct)}
    if METHODS[options.method].whole is None:
        row |= {"draft_sec": sum(run.seconds["draft"] for run in runs), "verify_sec": sum(run.seconds["verify"] for run in runs)}
        row |= drafting_fields(runs, options) if METHODS[options.method].draft != "none" else {}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}


def drafting_fields(runs: list[DecodeStats], options: DecodeOptions) -> dict:
    """Acceptance, calls, and what judges and trees counted."""
    figures = speculation_metrics(runs, options.ahead, options.seed)
    rounds = [one for run in runs for one in run.rounds]
    proposed, accepted, judged, overridden = (sum(getattr(one, name) for one in rounds) for name in ("proposed", "accepted", "judged", "overridden"))
    rejections = sum(one.accepted < one.tested for one in rounds)
    emitted, draft_calls = sum(run.emitted for run in runs), sum(run.draft_calls for run in runs)
    row = {"proposed": proposed, "accepted": accepted, "rejections": rejections, "draft_calls": draft_calls, "draft_calls_per_token": draft_calls / emitted}
    rate = figures.get("acceptance_rate", figures.get("spec_accept_rate"))
    row |= {} if rate is None else {"acceptance_rate": rate}
    row |= {"spec_overlap": figures["spec_overlap"]} if "spec_overlap" in figures else {}
    row |= {name: figures[name] for name in OF_TREES if name in figures}
    if judged:
        row |= {"judge_total": judged, "judge_accepted": overridden, "judge_rejected": judged - overridden, "judge_accept_rate": overridden / judged}
    if options.judge is not None:
        row |= {"target_fallbacks": rejections, "target_fallback_rate": rejections / proposed}
    return row


# ---- summaries ----

def needed_summaries(records: list[dict], shared: dict, seed: int) -> list[dict]:
    """A summary of each method and setting over the file's runs with the `shared` inputs, unless the latest one says the same already."""
    own = [record for record in records if belongs(record, shared)]
    latest = {record["resume_key"]: record for record in records if record["summary"]}
    groups: dict[str, list[dict]] = {}
    for record in own:
        groups.setdefault(summary_key(record), []).append(record)
    made = [{**_summary(group, own, seed), "inputs": group[0]["inputs"], "resume_key": key} for key, group in groups.items()]
    return [one for one in made if any(latest.get(one["resume_key"], {}).get(name) != value for name, value in one.items() if name != "timestamp")]


def belongs(record: dict, shared: dict) -> bool:
    """Whether a record is a run with the `shared` inputs."""
    return not record["summary"] and record["inputs"]["shared"] == shared


def summary_key(record: dict) -> str:
    """The key of the summary that a run belongs to: the same method with the same inputs."""
    return _hash({"shared": record["inputs"]["shared"], "method": record["method"], "inputs": record["inputs"]["method"]})


def _summary(records: list[dict], own: list[dict], seed: int) -> dict:
    """Of the runs `records` of one method and setting; `own` are all runs that they can be compared with."""
    method, runs = records[0]["method"], _by_run(records)
    good = {number: record for number, record in runs.items() if record["status"] == "ok"}
    counts = {status: sum(record["status"] == status for record in runs.values()) for status in ("ok", "error", "skipped")}
    last = list(runs.values())[-1]
    made = {
        "timestamp": now(), "status": "ok" if good else last["status"], "summary": True, "method": method,
        "runs": len(runs), "runs_successful": counts["ok"], "runs_failed": counts["error"], "runs_skipped": counts["skipped"],
    }
    if not good:
        kept = ("error_type", "error_message", "traceback", "info_message", "lossless")
        return made | {name: last[name] for name in kept if last.get(name) is not None}
    first = next(iter(good.values()))
    made |= {name: first[name] for name in SETTINGS if name in first}
    for name, of in MEDIANS.items():
        values = [record[of] for record in good.values() if record.get(of) is not None]
        made |= {name: median(values)} if values else {}
    made |= with_interval("tokens_per_call_mean", _summed(good, "tokens_by_prompt"), _summed(good, "target_calls_by_prompt"), seed)
    return made | _speedups(good, own, seed) | _accuracy(good, own)


def _by_run(records: list[dict]) -> dict[int, dict]:
    """The record of each run that counts: the last that went well, or else the last."""
    found: dict[int, dict] = {}
    for record in records:
        if record["status"] == "ok" or found.get(record["run"], record)["status"] != "ok":
            found[record["run"]] = record
    return dict(sorted(found.items()))


def _good_runs(method: str, own: list[dict]) -> dict[int, dict]:
    """The runs of `method` that went well, in its latest settings."""
    records = [record for record in own if record["method"] == method and record["status"] == "ok"]
    return {record["run"]: record for record in records if record["inputs"]["method"] == records[-1]["inputs"]["method"]}


def _summed(runs: dict[int, dict], name: str) -> np.ndarray:
    """A field by prompt, summed over runs."""
    return np.sum([record[name] for record in runs.values()], 0)


def _speedups(good: dict[int, dict], own: list[dict], seed: int) -> dict:
    """Tokens per second over those of the baselines, over the runs that both have."""
    found, pairs = {}, {}
    for base in BASELINES:
        common = sorted(good.keys() & (other := _good_runs(base, own)).keys())
        if common:
            pairs[base] = tuple(tuple(_summed({number: runs[number] for number in common}, name) for name in ("tokens_by_prompt", "decode_sec_by_prompt"))
                                for runs in (other, good))
    if "hf_generate" in pairs:
        found |= speedup_interval("speedup_over_hf_generate", *pairs["hf_generate"], seed)
    if pairs:
        fastest = max(pairs, key=lambda base: pairs[base][0][0].sum() / pairs[base][0][1].sum())
        found |= {**speedup_interval("speedup", *pairs[fastest], seed), "speedup_baseline": fastest}
    return found


def _accuracy(good: dict[int, dict], own: list[dict]) -> dict:
    """Accuracy, and how it compares with that of exact decoding on the same questions."""
    checked = [record["correct_by_prompt"] for record in good.values() if "correct_by_prompt" in record]
    if not checked:
        return {}
    prompts, share = len(checked[0]), sum(map(sum, checked)) / sum(map(len, checked))
    low, high = wilson_interval(share * prompts, prompts)  # runs of the same questions are no further trials
    found = {"exact_match_mean": share, "exact_match_mean_ci_low": low, "exact_match_mean_ci_high": high}
    for base in _compared_with(next(iter(good.values()))):
        others = _good_runs(base, own)
        if good.keys() & others.keys():
            number = min(good.keys() & others.keys())
            return found | {"exact_match_baseline": base, "mcnemar_p": mcnemar_p(others[number]["correct_by_prompt"], good[number]["correct_by_prompt"])}
    return found


def _compared_with(record: dict) -> tuple[str, ...]:
    """The methods that accuracy is compared with: the first that was measured."""
    if record["method"] in BASELINES:
        return ()
    return UNJUDGED if "judge_rule" in record else UNJUDGED[-1:]

"""The records of benchmark.py: what a line of its JSONL says, checked from the one dataclass that declares every field.

A file holds a record per (method, run), and per method a summary over the runs that were made with the same inputs. A field that does not apply
is absent or null, never 0.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

SCHEMA_VERSION = 1
INTERVALS = ("_ci_low", "_ci_high")


def _said(help_: str, in_: str = "", interval: bool = False) -> Field:
    """A field, absent unless given. `in_`: kinds of records that must have it, of "all run ok error skipped summary measured" (a summary of at least one
    run that went well); `interval`: the fields <name>_ci_low and <name>_ci_high, a 95 % interval, go with it."""
    return field(default=None, metadata={"help": help_, "in": frozenset(in_.split()), "interval": interval})


@dataclass(kw_only=True)
class Record:
    """One line. Types are JSON's; counts and seconds are sums over prompts unless they end in `_by_prompt`."""

    schema_version: int = _said("version of this schema", "all")
    timestamp: str = _said("when the record was written, ISO 8601, UTC", "all")
    status: Literal["ok", "error", "skipped"] = _said("error: the method raised; skipped: it cannot run with what was given", "all")
    summary: bool = _said("true: over all runs with the same inputs; false: one run", "all")
    run: int | None = _said("number of the run, from 1", "run")
    resume_key: str = _said("sha256 of `inputs`, method and, but for a summary, run: a record with the same key is the same measurement", "all")
    inputs: dict = _said("everything that the figures depend on, beside machine and code: `shared` by all methods, and the `method`'s own", "all")
    command: str | None = _said("the command that made the record")
    error_type: str | None = _said("class of the exception", "error")
    error_message: str | None = _said("its message; of a summary: the last run's", "error")
    traceback: str | None = _said("where it was raised", "error")
    info_message: str | None = _said("why the method was skipped", "skipped")

    # what was measured
    method: str = _said("a method of benchmark.py", "all")
    lossless: bool | None = _said("whether the output has the target's law", "ok measured")
    backend: Literal["hf", "toy"] = _said("hf: real models; toy: random weights", "all")
    target_model: str = _said("the target, as it was named: a Hugging Face id or a folder", "all")
    draft_model: str | None = _said("the draft, as it was named: an exit's file or an independent model")
    tokenizer: str = _said("the tokenizer, as the target", "all")
    draft_tokenizer: str | None = _said("the draft's")
    device: str = _said("the target's", "all")
    dtype: str = _said("the target's number format", "all")
    quant: str | None = _said("8bit or 4bit: how the target's weights are stored")
    bnb_compute_dtype: str | None = _said("number format of products with quantised weights")
    draft_device: str | None = _said("the draft's device")
    draft_dtype: str | None = _said("the draft's number format")
    draft_quant: str | None = _said("how the draft's weights are stored")
    draft_bnb_compute_dtype: str | None = _said("number format of its products")
    num_threads: int | None = _said("CPU threads of torch")
    use_chat_template: bool = _said("whether prompts went through the chat template", "all")
    system_prompt: str | None = _said("the system's turn before each prompt")
    dataset: str = _said("data set or file of the prompts", "all")
    dataset_sha256: str = _said("of the prompts' token ids and reference answers", "all")
    max_samples: int = _said("prompts, at most", "all")
    turn_index: int = _said("0: first questions; 1: follow-ups behind the target's own greedy answers", "all")
    max_new_tokens: int = _said("new tokens per prompt, at most", "all")
    temperature: float = _said("0: greedy", "all")
    top_p: float = _said("1: off", "all")
    top_k: int = _said("0: off", "all")
    seed: int | None = _said("of this run: --seed + run - 1", "run")
    k: int | str | None = _said("γ, tokens that a chain drafts in a round; auto: as many as pay")
    verification: str | None = _said("how drafts are accepted")
    tree_budget: int | None = _said("nodes of a tree, the root included")
    parallel_branches: int | None = _said("trees that grow: children of a node, and nodes of a draft pass")
    branch_prune_threshold: float | None = _said("specexec: share of its best sibling's probability that a child needs")
    commonsense: str | None = _said("common_sense: exact, or overwrite (lossy)")
    judge_rule: str | None = _said("autojudge: how score and threshold decide; topk: the rank")
    autojudge_threshold: float | None = _said("autojudge: the threshold in the mode's own sense")
    autojudge_checkpoint: str | None = _said("the judge's file")

    # system
    git_sha: str | None = _said("of the suite's checkout")
    hostname: str | None = _said("of the machine")
    gpu_name: str | None = _said("the first GPU")
    gpu_driver: str | None = _said("NVIDIA driver")
    cuda_runtime: str | None = _said("CUDA version that torch was built with")
    torch_version: str | None = _said("")
    transformers_version: str | None = _said("")
    display_active: str | None = _said("enabled or disabled: whether a GPU drives a display; null without nvidia-smi")

    # one run
    prompts: int | None = _said("prompts that were decoded", "ok")
    total_prompt_tokens: int | None = _said("tokens of all prompts", "ok")
    total_generated_tokens: int | None = _said("new tokens, end-of-text tokens included", "ok")
    duration_sec: float | None = _said("prefill_sec + decode_sec", "ok")
    prefill_sec: float | None = _said("seconds up to the first round (transformers' decoders: up to the first token)", "ok")
    decode_sec: float | None = _said("seconds of all rounds; tokenisation, warm-up and bookkeeping are outside", "ok")
    draft_sec: float | None = _said("of these: drafting")
    verify_sec: float | None = _said("of these: target passes, verification included")
    tokens_per_sec: float | None = _said("new tokens / decode_sec (of transformers' decoders without the tokens that came with the prefill)", "ok")
    tokens_by_prompt: list[int] | None = _said("new tokens that decode_sec covers", "ok")
    decode_sec_by_prompt: list[float] | None = _said("the seconds that they took", "ok")
    target_calls_by_prompt: list[int] | None = _said("target passes after the prefill", "ok")
    correct_by_prompt: list[bool] | None = _said("whether the final number is the reference answer's")
    proposed: int | None = _said("drafted tokens that were verified (trees: nodes but the root)")
    accepted: int | None = _said("those of them that were kept")
    rejections: int | None = _said("rounds in which one was not")
    steps: int | None = _said("rounds", "ok")
    acceptance_rate: float | None = _said("accepted / proposed (trees: accepted nodes / levels offered)")
    avg_tokens_per_step: float | None = _said("new tokens / rounds", "ok")
    tokens_per_call: float | None = _said("τ: new tokens / target passes after the prefill", "ok")
    target_calls: int | None = _said("target passes after the prefill", "ok")
    target_calls_per_token: float | None = _said("1 / tokens_per_call", "ok")
    draft_calls: int | None = _said("draft passes")
    draft_calls_per_token: float | None = _said("draft passes / new tokens")
    spec_overlap: float | None = _said("mean Σ min(p, q) over the drafted positions that verification reached (chains)")
    branches_total: int | None = _said("trees: nodes fed to the draft")
    branches_kept: int | None = _said("trees: nodes that were verified")
    branches_pruned: int | None = _said("trees: candidates that were not")
    branch_prune_rate: float | None = _said("their share")
    effective_parallelism: float | None = _said("trees: nodes fed to the draft per round")
    max_active_branches: int | None = _said("trees: most of them in one pass")
    cache_hits: int | None = _said("trees: tokens found in the tree")
    cache_misses: int | None = _said("trees: rounds")
    cache_hit_rate: float | None = _said("1 - rounds / new tokens")
    judge_total: int | None = _said("lossy chains: mismatches that were judged")
    judge_accepted: int | None = _said("of these: drafted tokens that were kept")
    judge_rejected: int | None = _said("of these: drafted tokens that were not")
    judge_accept_rate: float | None = _said("judge_accepted / judge_total")
    target_fallbacks: int | None = _said("corrections by the target")
    target_fallback_rate: float | None = _said("target_fallbacks / proposed")
    exact_match: float | None = _said("share of prompts with the right final number")
    peak_memory_bytes: int | None = _said("most bytes that torch held on the GPU while the method decoded, the others' caches included")

    # summary
    runs: int | None = _said("runs that are summed up", "summary")
    runs_successful: int | None = _said("", "summary")
    runs_failed: int | None = _said("", "summary")
    runs_skipped: int | None = _said("", "summary")
    tokens_per_sec_median: float | None = _said("median over runs", "measured")
    acceptance_rate_median: float | None = _said("median over runs")
    avg_tokens_per_step_median: float | None = _said("median over runs", "measured")
    tokens_per_call_median: float | None = _said("median over runs", "measured")
    target_calls_per_token_median: float | None = _said("median over runs")
    judge_accept_rate_median: float | None = _said("median over runs")
    target_fallback_rate_median: float | None = _said("median over runs")
    cache_hit_rate_median: float | None = _said("median over runs")
    spec_overlap_median: float | None = _said("median over runs")
    tokens_per_call_mean: float | None = _said("over all runs; interval over prompts", interval=True)
    speedup: float | None = _said("tokens per second / those of speedup_baseline, over the same prompts, all runs; paired bootstrap over prompts", interval=True)
    speedup_baseline: str | None = _said("the faster of vanilla and hf_generate")
    speedup_over_hf_generate: float | None = _said("tokens per second / those of transformers' generate", interval=True)
    exact_match_mean: float | None = _said("accuracy over all runs; Wilson interval, of as many trials as prompts", interval=True)
    exact_match_baseline: str | None = _said("what mcnemar_p compares with: of judged methods the same decoding without a judge, of others vanilla")
    mcnemar_p: float | None = _said("exact two-sided McNemar test of the same questions, in the first run that both have")


FIELDS: dict[str, Field] = {found.name: found for found in fields(Record)}
_HINTS = get_type_hints(Record)
TYPES = {**_HINTS, **{f"{name}{end}": float | None for name, found in FIELDS.items() if found.metadata["interval"] for end in INTERVALS}}


NO_LIMIT, SHOWN_LETTERS = math.inf, 80
LARGEST_INT = 2**63 - 1
ROUNDING = 1e-6  # of sums of probabilities
BOUNDS = {  # of numbers, those in lists included; of all others 0 and no limit
    **dict.fromkeys((
        "top_p", "branch_prune_threshold", "autojudge_threshold", "acceptance_rate", "acceptance_rate_median", "spec_overlap", "spec_overlap_median", "branch_prune_rate",
        "cache_hit_rate", "cache_hit_rate_median", "judge_accept_rate", "judge_accept_rate_median", "target_fallback_rate", "target_fallback_rate_median", "exact_match",
        "exact_match_mean", "exact_match_mean_ci_low", "exact_match_mean_ci_high", "mcnemar_p", "turn_index"), (0, 1)),
    **dict.fromkeys(("run", "k", "tree_budget", "parallel_branches", "max_samples", "max_new_tokens", "num_threads", "prompts", "steps", "runs"), (1, NO_LIMIT)),
}
NOT_MORE_THAN = {  # a part, and what it is of
    "accepted": "proposed", "judge_accepted": "judge_total", "judge_rejected": "judge_total", "runs_successful": "runs", "runs_failed": "runs", "runs_skipped": "runs",
    **{f"{name}_ci_low": f"{name}_ci_high" for name, found in FIELDS.items() if found.metadata["interval"]},
}
BY_PROMPT = ("tokens_by_prompt", "decode_sec_by_prompt", "target_calls_by_prompt")  # a number for each prompt


def kinds_of(record: dict) -> set[str]:
    """Which of the kinds that Record's fields name a record is."""
    if record.get("summary"):
        return {"all", "summary", *(["measured"] if record.get("status") == "ok" else [])}
    return {"all", "run", str(record.get("status"))}


def complaints(record: object, strict: bool = True) -> list[str]:
    """What is wrong with one record; unknown fields only if `strict`."""
    if not isinstance(record, dict):
        return [f"is a {type(record).__name__}, not an object"]
    kinds = kinds_of(record)
    missing = [name for name, found in FIELDS.items() if kinds & found.metadata["in"] and record.get(name) is None]
    found = [f"lacks {name}" for name in missing]
    for name, value in record.items():
        if name in TYPES and name not in missing and not _fits(value, TYPES[name]):
            found.append(f"{name} is {_shown(value)}, not {_named(TYPES[name])}")
    found = found or _impossible(record)
    found += [f"has an unknown field {name}" for name in unknown_fields(record)] if strict else []
    if record.get("schema_version") not in (None, SCHEMA_VERSION):
        found.append(f"schema_version {record['schema_version']} is not {SCHEMA_VERSION}")
    return found


def _impossible(record: dict) -> list[str]:
    """What is wrong with the values of a record whose fields are there and of the right types."""
    found = [f"{name} is {_shown(value)}, not {_said_bounds(name)}" for name, value in record.items()
             if name in TYPES and not all(_within(name, one) for one in (value if isinstance(value, list) else [value]))]
    given = {name for name, value in record.items() if value is not None}
    found += [f"{part} is {record[part]}, more than {whole}, {record[whole]}" for part, whole in NOT_MORE_THAN.items()
              if {part, whole} <= given and record[part] > record[whole]]
    found += [f"{name} has {len(record[name])} values for {record['prompts']} prompts" for name in BY_PROMPT
              if {name, "prompts"} <= given and len(record[name]) != record["prompts"]]
    return found + [f"inputs lacks {part}" for part in ("shared", "method") if not isinstance(record["inputs"].get(part), dict)]


def _within(name: str, value: object) -> bool:
    """Whether a value is a number within the field's bounds, or none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    low, high = BOUNDS.get(name, (0, NO_LIMIT))
    return low <= value <= high + ROUNDING


def _said_bounds(name: str) -> str:
    low, high = BOUNDS.get(name, (0, NO_LIMIT))
    return f"at least {low}" if high == NO_LIMIT else f"from {low} to {high}"


def _shown(value: object) -> str:
    """A value as messages quote it."""
    text = repr(value)
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]} …"


def first_complaint(records: list) -> str | None:
    """The first thing that is wrong with the lines of a file, None where nothing is; unknown fields are not."""
    found = ((number, what) for number, record in enumerate(records, start=1) for what in complaints(record, strict=False))
    return next((f"line {number}: {what}, so it is no record of this version" for number, what in found), None)


def unknown_fields(record: dict) -> list[str]:
    """Its fields that the schema does not have."""
    return [name for name in record if name not in TYPES]


def _fits(value: object, hint: object) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        return False
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _named(hint: object) -> str:
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_named(part) for part in parts)
    if get_origin(hint) is Literal:
        return " or ".join(parts)
    return "null" if hint is type(None) else str(hint) if parts else hint.__name__


def schema_table() -> Iterable[tuple[str, str, str]]:
    """Name, type and meaning of every field."""
    for name, found in FIELDS.items():
        yield name, _named(TYPES[name]), found.metadata["help"]
        if found.metadata["interval"]:
            yield f"{name}_ci_low, {name}_ci_high", "number or null", "95 % interval"

"""Every decoding method on the same prompts, side by side: JSONL that can be checked, resumed and plotted.

    python benchmark.py --method all --max_samples 10 --out results.jsonl
    python benchmark.py --experiment llama3_draft_k4 --dataset question.jsonl --runs 3 --out runs/mt_bench
    python benchmark.py --hf_model meta-llama/Llama-3.2-1B-Instruct --checkpoint runs/chat/model_002000.safetensors --method self_speculative \\
        hf_generate --dataset gsm8k --max_new_tokens 512 --temperature 0 --out runs/gsm8k
    python benchmark.py --toy --method all --max_samples 3 --max_new_tokens 16 --out runs/toy
    python benchmark.py --list_presets

Without a model it takes the embedded target and its exit. A record per (method, run) is appended as soon as it is known, then a summary per method;
`records.py` says what every field means, `validate_results.py` checks a file, `plot_results.py` draws it. The same command goes on
where it stopped: what is finished is skipped, what failed is tried again. A method that cannot run is skipped with the reason, one that raises leaves
the others alone.

Every method first decodes a few prompts that do not count, the longest among them; then they take turns, prompt by prompt, in an order drawn anew each time.
Run r draws with seed + r - 1. Tokenisation is outside all times, prefill and decoding are apart. Static trees and coupled values are fitted to prompts
behind the measured ones, where the data set has more.
"""

from __future__ import annotations

import gc
import random
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from textwrap import shorten

from command_line import UserError, first_line, parse_args, run

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from answers import final_answer, same_answer
from bench_args import Args
from bench_methods import Subject, Unavailable, Way, ways_of
from bench_prompts import Prompt, Question, encode, hash_of, read_questions, turn_prompts
from bench_records import MethodRun, key_of, needed_summaries, run_fields, system_fields
from decoding.sampling import SamplingPolicy
from decoding.static_llama import REACH_STEP
from evaluation import Draft, load_draft, model_draft
from judges import draft_hash
from planted import planted_pair
from presets import listing, with_presets
from record_file import RecordFile
from records import first_complaint
from results import display_active
from speculative import DecodeOptions, Generation, context_length, generate
from target_model import EMBEDDED_TARGET, Target, eos_token_ids, load_target, load_tokenizer, named_config, weights_hash
from tree_args import Fitted

TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOY_ALPHA = 0.8
NOTE_LETTERS = 60
SHARED_FLAGS = ("temperature", "top_p", "top_k", "max_new_tokens", "turn_index", "use_chat_template", "system_prompt", "num_threads", "tf32", "attn_implementation",
                "quant", "bnb_compute_dtype", "draft_dtype", "draft_quant", "draft_bnb_compute_dtype", "toy")


# ---- what decodes, and what it decodes ----

def load_pair(args: Args) -> tuple[Target, Draft | None]:
    """The target and its draft, if there is one."""
    if args.toy:
        return toy_pair(args)
    target = load_target(args.model_path, args, quant=args.quant, compute_dtype=args.bnb_compute_dtype, families=args.families)
    if args.draft_model_path is not None:
        own = replace(args, torch_dtype=args.draft_dtype or args.torch_dtype)
        model = load_target(args.draft_model_path, own, quant=args.draft_quant, compute_dtype=args.draft_compute_dtype, families=None).model
        return target, model_draft(target, model, args.draft_model_path)
    return target, load_draft(target, args) if args.checkpoint is not None else None


def toy_pair(args: Args) -> tuple[Target, Draft]:
    """A tiny random Llama with the embedded tokenizer, and an exit of planted acceptance."""
    device, dtype, _ = args.resolve()
    config = named_config(str(EMBEDDED_TARGET))
    for name, value in TOY.items():
        setattr(config, name, value)
    pair = planted_pair(config, 1, TOY_ALPHA, SamplingPolicy(1.0), dtype=dtype, device=device, seed=args.seed)
    target = Target(pair.model, load_tokenizer(str(EMBEDDED_TARGET)), "toy")
    return target, Draft(pair.draft, {"checkpoint": "toy"})


@dataclass(frozen=True)
class Data:
    """The measured prompts, and those that trees are fitted to, with a word on which these are."""

    prompts: list[Prompt]
    fit: Callable[[], list[list[int]]]
    fitted_to: str


def load_data(target: Target, draft: Draft | None, args: Args, questions: list[Question]) -> Data:
    """The first `max_samples` questions as prompts; the next ones are fitted to, or, where there are none, the measured ones."""
    context = min(context_length(model.config) for model in (target.model, *([] if draft is None else [draft.model])))
    longest = context - args.max_new_tokens - args.settings().longest

    def as_prompts(chosen: list[Question]) -> list[Prompt]:
        return turn_prompts(chosen, args.turn_index, lambda question: encode(question, target.tokenizer, args.system_prompt, args.use_chat_template),
                            lambda prompt: greedy_answer(target, prompt, args), longest)

    measured, more = questions[: args.max_samples], questions[args.max_samples : args.max_samples + args.fit_prompts]
    prompts = as_prompts(measured)
    fit = cache(lambda: [prompt.input_ids for prompt in (as_prompts(more) if more else prompts[: args.fit_prompts])])
    fitted_to = f"{len(more)} prompts {hash_of(more)[:16]} behind" if more else f"{args.fit_prompts} of"
    return Data(prompts, fit, f"{fitted_to} the measured prompts {hash_of(prompts)[:16]}, seed {args.seed}, {args.max_new_tokens} new tokens")


def greedy_answer(target: Target, prompt: Prompt, args: Args) -> str:
    """The target's own answer to a first turn."""
    options = DecodeOptions(policy=SamplingPolicy(0.0), max_new_tokens=args.max_new_tokens, eos_ids=eos_token_ids(target))
    return target.tokenizer.decode(generate(target.model, prompt.input_ids, options).tokens, skip_special_tokens=True).strip()


# ---- measurement ----

class Benchmark:
    """One start of the command: the ways to decode, and the records that they leave."""

    def __init__(self, args: Args, file: RecordFile, target: Target, draft: Draft | None, data: Data) -> None:
        self.args, self.file, self.data, self.target = args, file, data, target
        path = None if draft is None or args.toy else draft.columns["checkpoint"]
        self.subject = Subject(target, draft, eos_token_ids(target), Fitted(data.fit, data.fitted_to, path))
        self.shared = shared_inputs(args, target, draft, data)
        self.fields = {**base_fields(args, target, draft, self.shared), **system_fields(), "command": shlex.join([Path(sys.executable).name, *sys.argv])}
        self.options: dict[str, DecodeOptions] = {}  # of the ways that are ready: fitted, and warm
        self.peaks: dict[str, int] = {}  # most bytes on the GPU, by way
        self.incomplete = False  # something failed, or was asked for by name and skipped

    def measure(self, methods: list[str], named: set[str]) -> None:
        """All runs of all methods, then the summaries; those `named` themselves are missed where they cannot run."""
        ways: list[Way] = []
        for method in methods:
            try:
                ways += ways_of(method, self.subject, self.args.settings())
            except Unavailable as reason:
                self._skip(method, str(reason))
                self.incomplete |= method in named
        for number in range(1, self.args.runs + 1):
            todo = {way.name: way for way in ways if not self._finished(way, number)}
            self._make_ready(number, todo)
            self._measure_run(number, todo)
        for record in needed_summaries(self.file.records, self.shared, self.args.seed):
            self.file.append({**self.fields, **record})

    def _measure_run(self, number: int, todo: dict[str, Way]) -> None:
        """Decode all prompts by the ways `todo`; those that fail leave it."""
        found: dict[str, list[Generation]] = {name: [] for name in todo}
        orders = random.Random(self.args.seed + number)
        bar = tqdm(self.data.prompts if todo else (), desc=f"run {number}", unit="prompt", disable=not todo or None)
        for index, prompt in enumerate(bar):
            for name in orders.sample(list(todo), len(todo)):
                found[name].append(self._attempt(number, todo, name, self._decode, name, prompt, index, number))
            bar.set_postfix_str(" ".join(f"{name} {progress(found[name])}" for name in todo))
        for name, way in list(todo.items()):
            figures = self._attempt(number, todo, name, self._figures, name, found[name])
            if name in todo:
                self._append(MethodRun(way.method, way.inputs, number), "ok", {**way.columns, **figures})

    def _finished(self, way: Way, number: int) -> bool:
        key = key_of(self.shared, MethodRun(way.method, way.inputs, number))
        return any(record["resume_key"] == key and record["status"] == "ok" for record in self.file.records)

    def _make_ready(self, number: int, todo: dict[str, Way]) -> None:
        """Fit the ways `todo` and let them decode what does not count, once; those that fail leave it."""
        new = [name for name in todo if name not in self.options]
        for name in new:
            options = self._attempt(number, todo, name, todo[name].make, self.data.prompts[0].input_ids)
            self.options |= {name: options} if name in todo else {}
        for prompt in warming(self.data.prompts):
            for name in filter(todo.__contains__, new):
                self._attempt(number, todo, name, self._decode, name, prompt, 0, number)
        self.options = {name: options for name, options in self.options.items() if name in todo or name not in new}
        self.peaks.clear()

    def _attempt(self, number: int, todo: dict[str, Way], name: str, work: Callable, *arguments: object) -> object:
        """What work(*arguments) returns; where it raises, the way leaves `todo` and a record says why, and the others go on."""
        try:
            return work(*arguments)
        except Exception as error:  # noqa: BLE001
            self._fail(todo.pop(name), number, error)
            return None

    def _decode(self, name: str, prompt: Prompt, index: int, number: int) -> Generation:
        options, device = replace(self.options[name], seed=self.args.seed + number - 1), self.target.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        generation = generate(self.target.model, prompt.input_ids, options, self.subject.draft_model, prompt_id=index)
        if device.type == "cuda":
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
        return generation

    def _figures(self, name: str, found: list[Generation]) -> dict:
        correct = [same_answer(final_answer(self.target.tokenizer.decode(generation.tokens, skip_special_tokens=True)), prompt.answer)
                   for prompt, generation in zip(self.data.prompts, found, strict=True) if prompt.answer is not None]
        options, peak = self.options[name], {"peak_memory_bytes": self.peaks[name]} if name in self.peaks else {}
        return {"lossless": options.lossless, **peak, **run_fields([generation.stats for generation in found], correct, options)}

    def _skip(self, method: str, reason: str) -> None:
        """A record for each run, where the file has none yet."""
        for number in range(1, self.args.runs + 1):
            finished = MethodRun(method, {}, number)
            key = key_of(self.shared, finished)
            if not any(record["resume_key"] == key and record.get("info_message") == reason for record in self.file.records):
                self._append(finished, "skipped", {"info_message": reason})
        print(f"{method} is skipped: {reason}", file=sys.stderr)

    def _fail(self, way: Way, number: int, error: Exception) -> None:
        self.incomplete = True
        tqdm.write(f"{way.name} failed in run {number}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        told = {"error_type": type(error).__name__, "error_message": str(error) or type(error).__name__, "traceback": "".join(traceback.format_exception(error))}
        error.__traceback__ = None  # which keeps the tensors of its frames
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._append(MethodRun(way.method, way.inputs, number), "error", {**way.columns, **told})

    def _append(self, finished: MethodRun, status: str, figures: dict) -> None:
        self.file.append({**self.fields, **finished.fields(self.shared, status), **figures})


def warming(prompts: list[Prompt]) -> list[Prompt]:
    """What every method decodes before it is measured: the longest prompt, for which caches get their size, then one for each reach of attention, for which
    GPUs capture programs of their own."""
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))
    return [ordered[0], *{len(prompt.input_ids) // REACH_STEP: prompt for prompt in ordered}.values()]


def progress(found: list[Generation]) -> str:
    """Tokens per second so far, and the share of drafted tokens that were kept."""
    runs = [generation.stats for generation in found]
    proposed, accepted = (sum(getattr(one, name) for stats in runs for one in stats.rounds) for name in ("proposed", "accepted"))
    pace = f"{sum(stats.timed for stats in runs) / sum(stats.decode_s for stats in runs):.0f}/s"
    return f"{pace} {accepted / proposed:.0%}" if proposed else pace


def shared_inputs(args: Args, target: Target, draft: Draft | None, data: Data) -> dict:
    """Everything that the figures of all methods depend on, beside the code and, its GPU apart, the machine."""
    device = target.model.device
    return {
        "target": weights_hash(target.model), "draft": None if draft is None else draft_hash(draft.model),
        "prompts": hash_of(data.prompts), "seed": args.seed,
        **{name: getattr(args, name) for name in SHARED_FLAGS}, "device": str(device), "dtype": named_dtype(target.model),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def named_dtype(model: nn.Module) -> str:
    """A model's number format, as records name it."""
    return str(model.dtype).removeprefix("torch.")


def base_fields(args: Args, target: Target, draft: Draft | None, shared: dict) -> dict:
    """What every record says of models and prompts."""
    quantised = {"quant": args.quant, "bnb_compute_dtype": args.bnb_compute_dtype} if args.quant else {}
    drafting = {}
    if draft is not None:
        drafting = {"draft_model": draft.columns["checkpoint"], "draft_tokenizer": args.draft_model_path or target.name,
                    "draft_device": str(draft.model.device), "draft_dtype": named_dtype(draft.model)}
    if args.draft_quant:
        drafting |= {"draft_quant": args.draft_quant, "draft_bnb_compute_dtype": args.draft_compute_dtype}
    named = {name: getattr(args, name) for name in ("use_chat_template", "system_prompt", "max_samples", "turn_index", "max_new_tokens", "temperature", "top_p", "top_k")}
    return {"backend": "toy" if args.toy else "hf", "target_model": target.name, "tokenizer": target.name, **drafting, "device": shared["device"],
            "dtype": shared["dtype"], **quantised, **named, "dataset": args.dataset, "dataset_sha256": shared["prompts"]}


def table(records: list[dict], shared: dict, methods: list[str]) -> str:
    """The latest summaries of `methods` with the `shared` inputs, as they are printed; of a method that was measured no word that it was skipped before."""
    latest = {record["resume_key"]: record for record in records if record["summary"] and record["inputs"]["shared"] == shared}
    measured = {record["method"] for record in latest.values() if record["status"] == "ok"}
    rows = [record for method in methods for record in latest.values() if record["method"] == method and (record["status"] != "skipped" or method not in measured)]
    shown = {
        "method": "method", "lossless": "lossless", "γ": "k", "nodes": "tree_budget", "judged": "judge_rule", "runs": "runs_successful", "tokens/s": "tokens_per_sec_median",
        "speedup": "speedup", "low": "speedup_ci_low", "high": "speedup_ci_high", "over hf": "speedup_over_hf_generate", "accepted": "acceptance_rate_median",
        "τ": "tokens_per_call_median", "overlap": "spec_overlap_median", "accuracy": "exact_match_mean", "p": "mcnemar_p", "note": "note",
    }
    rows = [{**row, "note": shorten(row.get("info_message") or row.get("error_message") or "", NOTE_LETTERS, placeholder=" …")} for row in rows]
    frame = pd.DataFrame([{title: _cell(row.get(column)) for title, column in shown.items()} for row in rows])
    return frame.loc[:, (frame != "").any()].to_string(index=False)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> int:
    args = parse_args(Args, with_presets(sys.argv[1:]))
    if args.list_presets:
        print(listing())
        return 0
    if args.require_headless and display_active() == "enabled":
        raise UserError("--require_headless: a GPU drives a display, which disturbs timing; stop the display server, or leave the flag out")
    args.check()
    questions = read_questions(args.dataset, args.turn_index, args.max_samples + args.fit_prompts)
    methods, named = args.methods()
    with RecordFile(args.file) as file:
        wrong = first_complaint(file.records)
        if wrong is not None:
            raise UserError(f"{args.file}, {wrong}; choose another --out")
        if file.torn:
            print(f"{args.file}: the last line was cut off and is left out", file=sys.stderr)
        before = len(file.records)
        target, draft = load_pair(args)
        benchmark = Benchmark(args, file, target, draft, load_data(target, draft, args, questions))
        benchmark.measure(methods, named)
        records = file.records
    print(table(records, benchmark.shared, methods))
    added = sum(not record["summary"] for record in records[before:])
    print(f"{args.file}: {f'{added} runs added' if added else 'nothing left to do'}")
    return int(benchmark.incomplete)


if __name__ == "__main__":
    run(main)

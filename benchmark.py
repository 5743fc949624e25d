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

Every method decodes one prompt, uncounted, before the first; then they take turns, prompt by prompt, in an order drawn anew each time. Run r draws with
seed + r - 1. Tokenisation is outside all times, prefill and decoding are apart. Static trees and coupled values are fitted to prompts behind the
measured ones, where the data set has more.
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

from command_line import UserError, first_line, parse_args, run

import pandas as pd
import torch
from tqdm import tqdm

from answers import final_answer, same_answer
from bench_args import Args
from bench_methods import Subject, Unavailable, Way, ways_of
from bench_prompts import Prompt, Question, encode, fitting, follow_ups, prompts_hash, read_questions
from bench_records import Finished, belongs, key_of, needed_summaries, run_fields, summary_key, system_fields
from decoding.sampling import SamplingPolicy
from evaluation import Draft, load_draft, model_draft
from judges import draft_hash
from planted import planted_pair
from presets import listing, with_presets
from record_file import RecordFile
from results import display_active
from speculative import DecodeOptions, Generation, context_length, generate
from target_model import EMBEDDED_TARGET, Target, eos_token_ids, load_target, load_tokenizer, named_config, weights_hash
from tree_args import Fitted

TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOY_ALPHA = 0.8
NOTE_LETTERS = 60


# ---- what decodes, and what it decodes ----

def load_pair(args: Args) -> tuple[Target, Draft | None]:
    """The target and its draft, if there is one."""
    if args.toy:
        return toy_pair(args)
    families = ("llama",) if args.checkpoint is not None else None
    target = load_target(args.model_path, args, quant=args.quant, compute_dtype=args.bnb_compute_dtype, families=families)
    if args.draft_model_path is not None:
        own = replace(args, torch_dtype=args.draft_dtype or args.torch_dtype)
        model = load_target(args.draft_model_path, own, quant=args.draft_quant, compute_dtype=args.draft_bnb_compute_dtype or args.bnb_compute_dtype, families=None).model
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


def load_data(target: Target, args: Args, questions: list[Question]) -> Data:
    """The first `max_samples` questions as prompts; the next ones are fitted to, or, where there are none, the measured ones."""
    longest = context_length(target.model.config) - args.max_new_tokens - args.settings().longest
    def as_prompts(chosen: list[Question]) -> list[Prompt]:
        asked = follow_ups(chosen, args.turn_index, lambda question: greedy_answer(target, question, args))
        return fitting([encode(question, target.tokenizer, args.system_prompt, args.use_chat_template) for question in asked], longest)

    measured, more = questions[: args.max_samples], questions[args.max_samples : args.max_samples + args.fit_prompts]
    prompts = as_prompts(measured)
    fit = cache(lambda: [prompt.input_ids for prompt in (as_prompts(more) if more else prompts[: args.fit_prompts])])
    return Data(prompts, fit, f"{len(more)} further prompts" if more else "the measured prompts")


def greedy_answer(target: Target, question: Question, args: Args) -> str:
    """The target's own answer to a first turn."""
    prompt = encode(question, target.tokenizer, args.system_prompt, args.use_chat_template)
    options = DecodeOptions(policy=SamplingPolicy(0.0), max_new_tokens=args.max_new_tokens, eos_ids=eos_token_ids(target))
    return target.tokenizer.decode(generate(target.model, prompt.input_ids, options).tokens, skip_special_tokens=True).strip()


# ---- measurement ----

class Benchmark:
    """One start of the command: the ways to decode, and the records that they leave."""

    def __init__(self, args: Args, file: RecordFile, target: Target, draft: Draft | None, data: Data) -> None:
        self.args, self.file, self.data, self.target = args, file, data, target
        path = None if draft is None or not Path(draft.columns["checkpoint"]).exists() else draft.columns["checkpoint"]
        self.subject = Subject(target, draft, eos_token_ids(target), Fitted(data.fit, f"{data.fitted_to}: {prompts_hash(data.prompts)[:16]}", path))
        self.shared = shared_inputs(args, target, draft, data)
        self.fields = {**base_fields(args, target, draft, self.shared), **system_fields(), "command": shlex.join([Path(sys.executable).name, *sys.argv])}
        self.options: dict[str, DecodeOptions] = {}  # of the ways that are ready: fitted, and warm

    def measure(self, methods: list[str]) -> None:
        """All runs of all methods, then the summaries."""
        ways: list[Way] = []
        for method in methods:
            try:
                ways += ways_of(method, self.subject, self.args.settings())
            except Unavailable as reason:
                self._skip(method, str(reason))
        for number in range(1, self.args.runs + 1):
            self._measure_run(number, {way.name: way for way in ways if not self._finished(way, number) and self._ready(way, number)})
        for record in needed_summaries(self.file.records, self.shared, methods, self.args.seed):
            self.file.append({**self.fields, **record})

    def _measure_run(self, number: int, todo: dict[str, Way]) -> None:
        found: dict[str, list[Generation]] = {name: [] for name in todo}
        orders = random.Random(self.args.seed + number)
        bar = tqdm(self.data.prompts if todo else (), desc=f"run {number}", unit="prompt", disable=not todo or None)
        for index, prompt in enumerate(bar):
            for name in orders.sample(list(todo), len(todo)):
                try:
                    found[name].append(self._decode(name, prompt, index, number))
                except Exception as error:  # noqa: BLE001  whatever a method raises, the others go on
                    self._fail(todo.pop(name), number, error)
            bar.set_postfix_str(" ".join(f"{name} {progress(found[name])}" for name in todo))
        for name, way in todo.items():
            self._append(Finished(way.method, way.inputs, number), "ok", {**way.columns, **self._figures(name, found[name])})

    def _finished(self, way: Way, number: int) -> bool:
        key = key_of(self.shared, Finished(way.method, way.inputs, number))
        return any(record["resume_key"] == key and record["status"] == "ok" for record in self.file.records)

    def _ready(self, way: Way, number: int) -> bool:
        """Whether it could be fitted and decode a first prompt, which nothing counts; done once."""
        try:
            if way.name not in self.options:
                self.options[way.name] = way.make(self.data.prompts[0].input_ids)
                self._decode(way.name, self.data.prompts[0], 0, number)
        except Exception as error:  # noqa: BLE001  as above
            self.options.pop(way.name, None)
            self._fail(way, number, error)
            return False
        return True

    def _decode(self, name: str, prompt: Prompt, index: int, number: int) -> Generation:
        options = replace(self.options[name], seed=self.args.seed + number - 1)
        return generate(self.target.model, prompt.input_ids, options, self.subject.draft_model, prompt_id=index)

    def _figures(self, name: str, found: list[Generation]) -> dict:
        correct = [same_answer(final_answer(self.target.tokenizer.decode(generation.tokens, skip_special_tokens=True)), prompt.answer)
                   for prompt, generation in zip(self.data.prompts, found, strict=True) if prompt.answer is not None]
        options = self.options[name]
        return {"lossless": options.lossless, **run_fields([generation.stats for generation in found], correct, options)}

    def _skip(self, method: str, reason: str) -> None:
        """A record for each run, where the file has none yet."""
        for number in range(1, self.args.runs + 1):
            finished = Finished(method, {}, number)
            key = key_of(self.shared, finished)
            if not any(record["resume_key"] == key and record.get("info_message") == reason for record in self.file.records):
                self._append(finished, "skipped", {"info_message": reason})
        print(f"{method} is skipped: {reason}", file=sys.stderr)

    def _fail(self, way: Way, number: int, error: Exception) -> None:
        tqdm.write(f"{way.name} failed in run {number}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        told = {"error_type": type(error).__name__, "error_message": str(error) or type(error).__name__, "traceback": "".join(traceback.format_exception(error))}
        error.__traceback__ = None  # which keeps the tensors of its frames
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._append(Finished(way.method, way.inputs, number), "error", {**way.columns, **told})

    def _append(self, finished: Finished, status: str, figures: dict) -> None:
        self.file.append({**self.fields, **finished.fields(self.shared, status), **figures})


def progress(found: list[Generation]) -> str:
    """Tokens per second so far, and the share of drafted tokens that were kept."""
    runs = [generation.stats for generation in found]
    proposed, accepted = (sum(getattr(one, name) for stats in runs for one in stats.rounds) for name in ("proposed", "accepted"))
    pace = f"{sum(stats.timed for stats in runs) / sum(stats.decode_s for stats in runs):.0f}/s"
    return f"{pace} {accepted / proposed:.0%}" if proposed else pace


def shared_inputs(args: Args, target: Target, draft: Draft | None, data: Data) -> dict:
    """Everything that the figures of all methods depend on, beside the machine and the code."""
    return {
        "target": weights_hash(target.model), "draft": None if draft is None else draft_hash(draft.model),
        "prompts": prompts_hash(data.prompts), "seed": args.seed,
        **{name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens", "turn_index", "use_chat_template", "system_prompt", "num_threads",
                                                  "quant", "draft_dtype", "draft_quant")},
        "device": str(target.model.device), "dtype": str(target.model.dtype).removeprefix("torch."), "toy": args.toy,
    }


def base_fields(args: Args, target: Target, draft: Draft | None, shared: dict) -> dict:
    """What every record says of models and prompts."""
    quantised = {"quant": args.quant, "bnb_compute_dtype": args.bnb_compute_dtype} if args.quant else {}
    drafting = {}
    if draft is not None:
        own = draft.model
        drafting = {"draft_model": draft.columns["checkpoint"], "draft_tokenizer": args.draft_model_path or target.name, "draft_device": str(own.device), "draft_dtype": str(own.dtype).removeprefix("torch."), "draft_quant": args.draft_quant}
    named = {name: getattr(args, name) for name in ("use_chat_template", "system_prompt", "max_samples", "turn_index", "max_new_tokens", "temperature", "top_p", "top_k")}
    return {"backend": "toy" if args.toy else "hf", "target_model": target.name, "tokenizer": target.name, **drafting, "device": shared["device"], "dtype": shared["dtype"], **quantised,
            **named, "dataset": args.dataset, "dataset_sha256": shared["prompts"]}


def table(records: list[dict], shared: dict, methods: list[str]) -> str:
    """The latest summaries with the `shared` inputs, as they are printed."""
    keys = [key for method in methods for key in dict.fromkeys(summary_key(shared, record) for record in records if record["method"] == method and belongs(record, shared))]
    latest = {record["resume_key"]: record for record in records if record["summary"]}
    shown = {
        "method": "method", "lossless": "lossless", "γ": "k", "nodes": "tree_budget", "judged": "judge_rule", "runs": "runs_successful", "tokens/s": "tokens_per_sec_median",
        "speedup": "speedup", "low": "speedup_ci_low", "high": "speedup_ci_high", "over hf": "speedup_over_hf_generate", "accepted": "acceptance_rate_median",
        "τ": "tokens_per_call_median", "overlap": "spec_overlap_median", "accuracy": "exact_match_mean", "p": "mcnemar_p", "note": "note",
    }
    rows = [{**latest[key], "note": (latest[key].get("info_message") or latest[key].get("error_message") or "")[:NOTE_LETTERS] or None} for key in keys]
    frame = pd.DataFrame([{title: row.get(column) for title, column in shown.items()} for row in rows])
    return frame.dropna(axis="columns", how="all").to_string(index=False, float_format="%.2f", na_rep="")


def main() -> int:
    args = parse_args(Args, with_presets(sys.argv[1:]))
    if args.list_presets:
        print(listing())
        return 0
    args.check()
    if args.require_headless and display_active() == "enabled":
        raise UserError("--require_headless: a GPU drives a display, which disturbs timing; stop the display server, or leave the flag out")
    questions = read_questions(args.dataset, args.turn_index, args.max_samples + args.fit_prompts)
    methods, named = args.methods()
    with RecordFile(args.file) as file:
        if file.torn:
            print(f"{args.file}: the last line was cut off and is left out", file=sys.stderr)
        before = len(file.records)
        target, draft = load_pair(args)
        benchmark = Benchmark(args, file, target, draft, load_data(target, args, questions))
        benchmark.measure(methods)
        records = file.records
    print(table(records, benchmark.shared, methods))
    added = [record for record in records[before:] if not record["summary"]]
    print(f"{args.file}: {f'{len(added)} runs added' if added else 'nothing left to do'}")
    if any(record["status"] == "error" or (record["status"] == "skipped" and record["method"] in named) for record in added):
        return 1
    return 0


if __name__ == "__main__":
    run(main)

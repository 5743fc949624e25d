"""The runs of a benchmark: every way to decode on the same prompts, in turn, and the records that they leave.

`benchmark.py` gives it text, `commands/benchmark_llava.py` images; both get their figures here.
"""

from __future__ import annotations

import gc
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from textwrap import shorten

from running.command_line import UserError, first_line

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from engine import views
from engine.static_llama import REACH_STEP
from harness.figures import MethodRun, key_of, needed_summaries, run_fields, system_fields
from harness.flags import MethodArgs
from harness.methods import Settings, Subject, Unavailable, Way, ways_of
from harness.prompts import Prompt, hash_of
from harness.schema import first_complaint
from models.target_model import text_facts
from running.record_file import RecordFile
from running.run_files import typed_command
from speculative import DecodeOptions, Generation, generate
from training.judges import draft_hash

NOTE_LETTERS = 60


@dataclass(frozen=True)
class Data:
    """The measured prompts, and those that trees are fitted to, with a word on which these are."""

    prompts: list[Prompt]
    fit: Callable[[], list[views.AnyPrompt]]
    fitted_to: str

    @classmethod
    def of(cls, prompts: list[Prompt], behind: list, as_prompts: Callable[[list], list[Prompt]], args: MethodArgs) -> Data:
        """Trees are fitted to what `as_prompts` makes of the questions `behind` the measured ones, or, where there are none, to the first measured ones."""
        fit = cache(lambda: [prompt.given() for prompt in (as_prompts(behind) if behind else prompts[: args.fit_prompts])])
        named = f"{len(behind)} prompts {hash_of(behind)[:16]} behind" if behind else f"{args.fit_prompts} of"
        return cls(prompts, fit, f"{named} the measured prompts {hash_of(prompts)[:16]}, seed {args.seed}, {args.max_new_tokens} new tokens")


class Benchmark:
    """One start of the command: the ways to decode, and the records that they leave.

    `shared` are the inputs that the figures of all methods depend on, beside the code and, its GPU apart, the machine; `fields` what every record says.
    """

    def __init__(self, file: RecordFile, subject: Subject, data: Data, settings: Settings, shared: dict, fields: dict) -> None:
        self.file, self.subject, self.data, self.settings, self.shared = file, subject, data, settings, shared
        self.target = subject.target
        self.fields = {**fields, **system_fields(), "command": typed_command()}
        self.options: dict[str, DecodeOptions] = {}  # of the ways that are ready: fitted, and warm
        self.peaks: dict[str, int] = {}  # most bytes on the GPU, by way
        self.incomplete = False  # something failed, or was asked for by name and skipped

    def measure(self, methods: list[str], named: set[str], runs: int) -> None:
        """All runs of all methods, then the summaries; those `named` themselves are missed where they cannot run."""
        ways: list[Way] = []
        for method in methods:
            try:
                ways += ways_of(method, self.subject, self.settings)
            except Unavailable as reason:
                self._skip(method, str(reason), runs)
                self.incomplete |= method in named
        for number in range(1, runs + 1):
            todo = {way.name: way for way in ways if not self._finished(way, number)}
            self._make_ready(number, todo)
            self._measure_run(number, todo)
        for record in needed_summaries(self.file.records, self.shared, self.settings.seed):
            self.file.append({**self.fields, **record})

    def _measure_run(self, number: int, todo: dict[str, Way]) -> None:
        """Decode all prompts by the ways `todo`; those that fail leave it."""
        found: dict[str, list[Generation]] = {name: [] for name in todo}
        orders = random.Random(self.settings.seed + number)
        bar = tqdm(self.data.prompts if todo else (), desc=f"run {number}", unit="prompt", disable=not todo or None)
        for index, prompt in enumerate(bar):
            given = prompt.given()
            for name in orders.sample(list(todo), len(todo)):
                found[name].append(self._attempt(number, todo, name, self._decode, name, given, index, number))
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
            options = self._attempt(number, todo, name, todo[name].make, self.data.prompts[0].given())
            self.options |= {name: options} if name in todo else {}
        for prompt in warming(self.data.prompts) if new else []:
            given = prompt.given()
            for name in filter(todo.__contains__, new):
                self._attempt(number, todo, name, self._decode, name, given, 0, number)
        self.options = {name: options for name, options in self.options.items() if name in todo or name not in new}
        self.peaks.clear()

    def _attempt(self, number: int, todo: dict[str, Way], name: str, work: Callable, *arguments: object) -> object:
        """What work(*arguments) returns; where it raises, the way leaves `todo` and a record says why, and the others go on."""
        try:
            return work(*arguments)
        except Exception as error:  # noqa: BLE001
            self._fail(todo.pop(name), number, error)
            return None

    def _decode(self, name: str, given: views.AnyPrompt, index: int, number: int) -> Generation:
        options, device = replace(self.options[name], seed=self.settings.seed + number - 1), self.target.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        generation = generate(self.target.model, given, options, self.subject.draft_model, prompt_id=index)
        if device.type == "cuda":
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
        return generation

    def _figures(self, name: str, found: list[Generation]) -> dict:
        correct = [prompt.is_right(self.target.tokenizer.decode(generation.tokens, skip_special_tokens=True))
                   for prompt, generation in zip(self.data.prompts, found, strict=True) if prompt.answer is not None]
        options, peak = self.options[name], {"peak_memory_bytes": self.peaks[name]} if name in self.peaks else {}
        return {"lossless": options.lossless, **peak, **run_fields([generation.stats for generation in found], correct, options)}

    def _skip(self, method: str, reason: str, runs: int) -> None:
        """A record for each run, where the file has none yet."""
        for number in range(1, runs + 1):
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
    return [ordered[0], *{tuple(length // REACH_STEP for length in prompt.lengths()): prompt for prompt in ordered}.values()]


def progress(found: list[Generation]) -> str:
    """Tokens per second so far, and the share of drafted tokens that were kept."""
    runs = [generation.stats for generation in found]
    proposed, accepted = sum(stats.proposed for stats in runs), sum(stats.accepted for stats in runs)
    pace = f"{sum(stats.timed for stats in runs) / sum(stats.decode_s for stats in runs):.0f}/s"
    return f"{pace} {accepted / proposed:.0%}" if proposed else pace


def named_dtype(model: nn.Module) -> str:
    """A model's number format, as records name it."""
    return str(model.dtype).removeprefix("torch.")


def shared_inputs(subject: Subject, data: Data, args: MethodArgs, flags: Sequence[str], **more: object) -> dict:
    """Everything that the figures of all methods depend on, beside the code and, its GPU apart, the machine: models, prompts, the values of `flags`, and `more`."""
    device, text = subject.target.model.device, text_facts(subject.target)
    return {
        "target": text["target_hash"], "tokenizer": text["encoding_hash"], "eos_ids": sorted(subject.eos_ids), "draft": None if subject.draft is None else draft_hash(subject.draft.model), "prompts": hash_of(data.prompts),
        "seed": args.seed, **{name: getattr(args, name) for name in flags}, "device": str(device), "dtype": named_dtype(subject.target.model),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, **more,
    }


def named_models(subject: Subject, draft_tokenizer: str | None) -> dict:
    """What every record says of the models; an exit has the target's tokenizer."""
    target, draft = subject.target, subject.draft
    found = {"target_model": target.name, "tokenizer": target.name, "device": str(target.model.device), "dtype": named_dtype(target.model)}
    if draft is not None:
        found |= {"draft_model": draft.columns["checkpoint"], "draft_tokenizer": draft_tokenizer or target.name, "draft_device": str(draft.model.device),
                  "draft_dtype": named_dtype(draft.model)}
    return found


def check_records(file: RecordFile) -> None:
    """Raise UserError where `file` holds records that are none of this version."""
    wrong = first_complaint(file.records)
    if wrong is not None:
        raise UserError(f"{file.path}, {wrong}; choose another --out")
    if file.torn:
        print(f"{file.path}: the last line was cut off and is left out", file=sys.stderr)


def what_was_added(file: RecordFile, before: int) -> str:
    """A line on the runs that `file` has behind its first `before` records."""
    added = sum(not record["summary"] for record in file.records[before:])
    return f"{file.path}: {f'{added} runs added' if added else 'nothing left to do'}"


def table(records: list[dict], shared: dict, methods: list[str]) -> str:
    """The latest summaries of `methods` with the `shared` inputs, as they are printed; of a method that was measured no word that it was skipped before."""
    latest = {record["resume_key"]: record for record in records if record["summary"] and record["inputs"]["shared"] == shared}
    measured = {record["method"] for record in latest.values() if record["status"] == "ok"}
    rows = [record for method in methods for record in latest.values() if record["method"] == method and (record["status"] != "skipped" or method not in measured)]
    shown = {
        "method": "method", "lossless": "lossless", "γ": "k", "nodes": "tree_budget", "judged": "judge_rule", "runs": "runs_successful", "tokens/s": "tokens_per_sec_median",
        "speedup": "speedup", "low": "speedup_ci_low", "high": "speedup_ci_high", "over hf": "speedup_over_hf_generate", "accepted": "acceptance_rate_median",
        "τ": "tokens_per_call_median", "calls/token": "target_calls_per_token_median", "overlap": "spec_overlap_median", "accuracy": "exact_match_mean", "p": "mcnemar_p", "note": "note",
    }
    rows = [{**row, "note": shorten(row.get("info_message") or row.get("error_message") or "", NOTE_LETTERS, placeholder=" …")} for row in rows]
    frame = pd.DataFrame([{title: _cell(row.get(column)) for title, column in shown.items()} for row in rows])
    return frame.loc[:, (frame != "").any()].to_string(index=False)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

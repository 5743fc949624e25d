"""Texts whose answers the target itself wrote: what exits are then distilled on ("on-policy" text).

    python generate_dataset.py --model_path assets/pydoc-llama-7m --dataset arithmetic --num_examples 2000 \\
        --temperature 0.7 --top_p 0.95 --out_dir runs/own
    torchrun --nproc_per_node 4 generate_dataset.py --model_path meta-llama/Llama-3.2-1B-Instruct --dataset ultrachat \\
        --num_examples 50000 --max_new_tokens 512 --batch_size 64 --out_dir runs/own-chats

A chat is asked again up to its last answer, which the target's answer replaces; of a plain text the first
`--prompt_length` tokens are given. The last line printed is the flags that `train.py` reads the result with.

`<out_dir>/<split>-<rank>-of-<world>.jsonl` holds the rows of one process, in the form of UltraChat or of plain text, and
with each: `index` (of the example, in the order of --seed), `tokens` (new ones, the end token included), `ended` (false:
cut by --max_new_tokens) and `same_tokens` (whether training reads the very tokens that were generated). Beside it,
`shard-<rank>-of-<world>/` says how they were made, what was skipped, and in summary.json how many of each there are.
Example i belongs to the process of RANK i mod WORLD_SIZE, and its text depends on --seed and i only (up to rounding).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from running.command_line import UserError, parse_args, run

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.registry import find_dataset, fingerprint, open_stream
from data.row_files import ExampleStream, SkipRow, check_learnable, describe_skipped, read_rows
from data_utils import BUCKET_BATCHES, encode_example, encode_prompt
from decoding.sampling import SamplingPolicy
from engine.static_llama import why_unsupported
from models.target_model import EMBEDDED_TARGET, DeviceArgs, Target, eos_token_ids, load_config, load_target, text_facts
from running.run_files import make_output_dir, naming, read_config, record_run, write_json
from speculative import DecodeOptions, context_length, generate_batch
from training.training_loop import StopRequest

FREE_ON_RESUME = {"resume", "out_dir", "num_threads"}
SKIPPED_NAME, SUMMARY_NAME = "skipped.jsonl", "summary.json"
ROW_FACTS = ("index", "tokens", "ended", "same_tokens")  # what a row says beside its text
PROGRESS_EVERY_S = 30


@dataclass(kw_only=True)
class Args(DeviceArgs):
    """Let the target answer the prompts of a data set."""

    model_path: str = field(metadata={"help": f"the target: a Hugging Face id or folder ({EMBEDDED_TARGET.name} lies in assets/)"})
    out_dir: str = field(metadata={"help": "folder for the rows; made where missing"})
    dataset: str = field(default="ultrachat", metadata={"help": "data set of the prompts"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the data set's form"})
    split: Literal["train", "validation", "test"] = field(default="train", metadata={"help": "split of the prompts, and of the rows when they are read"})
    num_examples: int = field(default=2000, metadata={"help": "examples to answer, drawn at random"})
    prompt_length: int = field(default=64, metadata={"help": "tokens given of a plain text; a chat gives all up to its last answer"})
    max_new_tokens: int = field(default=256, metadata={"help": "new tokens per example"})
    temperature: float = field(default=0.7, metadata={"help": "0: greedy"})
    top_p: float = field(default=1.0, metadata={"help": "1: off"})
    top_k: int = field(default=0, metadata={"help": "0: off"})
    batch_size: int = field(default=16, metadata={"help": "examples decoded together"})
    seed: int = field(default=0, metadata={"help": "seed of data order and noise"})
    resume: bool = field(default=False, metadata={"help": "continue what out_dir holds, or start where there is nothing"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        self.check_device()
        for name in ("num_examples", "prompt_length", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")
        self.policy()
        if self.split == "train":
            check_learnable(find_dataset(self.dataset))
        context = context_length(load_config(self.model_path))
        if self.max_new_tokens >= context:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: the context of {self.model_path} is {context}, prompt included; lower it")

    def policy(self) -> SamplingPolicy:
        """The sampling policy. Raises UserError for values that no policy has."""
        try:
            return SamplingPolicy(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(f"--{error}") from error


# ---- one process of several ----

@dataclass(frozen=True)
class Shard:
    """The examples of one process: those whose index is `rank` modulo `world`."""

    rank: int
    world: int

    @classmethod
    def of_process(cls) -> Shard:
        """As torchrun and accelerate say it in RANK and WORLD_SIZE; all examples where they do not. Raises UserError."""
        rank, world = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise UserError(f"RANK={rank} WORLD_SIZE={world}: must be numbers, the rank from 0 and below the world size; set or unset both")
        return cls(int(rank), int(world))

    @property
    def name(self) -> str:
        return f"{self.rank}-of-{self.world}"

    def folder(self, args: Args) -> Path:
        """Where it is recorded how the rows were made: a folder, so that --dataset_path out_dir reads nothing but rows."""
        return Path(args.out_dir) / f"shard-{self.name}"

    def rows_path(self, args: Args) -> Path:
        """The file of the rows. Its name begins with the split, which is how --dataset_path tells splits apart."""
        return Path(args.out_dir) / f"{args.split}-{self.name}.jsonl"


def check_settings(args: Args, shard: Shard, facts: dict) -> None:
    """Raise UserError where this shard was begun and --resume is not given, or any shard with other flags or `facts`."""
    begun = read_config(shard.folder(args)) is not None
    if begun and not args.resume:
        raise UserError(f"{args.out_dir} holds shard {shard.name} already; choose another --out_dir, or continue it with --resume")
    if not begun and shard.rows_path(args).exists():
        raise UserError(f"{shard.rows_path(args)} exists, but {shard.folder(args)} does not say how it was made; choose another --out_dir")
    settings = {**{f"--{name}": value for name, value in vars(args).items() if name not in FREE_ON_RESUME}, "WORLD_SIZE": shard.world, **facts}
    for folder in sorted(Path(args.out_dir).glob("shard-*")):
        previous = read_config(folder)
        changed = [f"{name} {previous.get(name.lstrip('-'))} -> {value}" for name, value in settings.items()
                   if previous is not None and previous.get(name.lstrip("-")) != value]
        if changed:
            raise UserError(f"{folder} was started with other settings ({', '.join(changed)}); use those, or another --out_dir")


def facts_of(target: Target, stream: ExampleStream) -> dict:
    """What the rows depend on beside the flags."""
    return {**text_facts(target), "data": fingerprint(stream)}


def open_prompts(args: Args) -> ExampleStream:
    """The examples to answer. Raises UserError where there are too few."""
    stream = open_stream(args.dataset, args.split, args.dataset_path, args.seed)
    if stream.num_rows is not None and stream.num_rows < args.num_examples:
        raise UserError(f"--num_examples {args.num_examples}: the {args.split} split of {args.dataset} has {stream.num_rows} rows; lower it")
    return stream


def open_target(args: Args) -> Target:
    """The target, on the GPU of this process (LOCAL_RANK). Raises UserError where it cannot decode in batches."""
    if args.resolve()[0].type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    target = load_target(args.model_path, args)
    reason = why_unsupported(target.model)
    if reason is not None and args.batch_size > 1:
        raise UserError(f"--batch_size {args.batch_size}: only one text at a time can be decoded with {reason}; use --batch_size 1")
    return target


# ---- from examples to rows ----

@dataclass(frozen=True)
class Prompt:
    """Example `index` and the token ids that the target continues."""

    index: int
    example: dict
    ids: list[int]


def given_tokens(target: Target, example: dict, args: Args) -> list[int]:
    """Token ids of a chat up to its last answer, or of the beginning of a plain text. Raises SkipRow where they are too few or too many."""
    ids = encode_prompt(target.tokenizer, example)
    if "text" in example and len(ids) < args.prompt_length:
        raise SkipRow(f"with fewer than {args.prompt_length} tokens")
    given = ids[: args.prompt_length] if "text" in example else ids
    longest = context_length(target.model.config) - args.max_new_tokens
    if len(given) > longest:
        raise SkipRow(f"with a prompt of more than {longest} tokens")
    return given


def make_row(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tokens: list[int], eos_ids: frozenset[int]) -> dict:
    """The row of a prompt and the `tokens` that the target wrote. Raises SkipRow for an answer that no row can hold."""
    ended = tokens[-1] in eos_ids
    answer = tokens[:-1] if ended else tokens
    content = tokenizer.decode(answer, skip_special_tokens=True)
    if content != tokenizer.decode(answer):
        raise SkipRow("with a special token inside the answer")
    if not content.strip():
        raise SkipRow("with an empty answer")
    if "text" in prompt.example:
        row, expected = {"text": tokenizer.decode([*prompt.ids, *answer], skip_special_tokens=True)}, [*prompt.ids, *answer]
    else:
        messages = [*asked(prompt.example), {"role": "assistant", "content": content}]
        question = next(message["content"] for message in messages if message["role"] == "user")
        row, expected = {"prompt": question, "prompt_id": str(prompt.index), "messages": messages}, [*prompt.ids, *tokens]
    again = encode_example(tokenizer, find_dataset(reader_of(prompt.example)).parse(row)).input_ids
    return {**row, "index": prompt.index, "tokens": len(tokens), "ended": ended, "same_tokens": again[: len(expected)] == expected}


def asked(example: dict) -> list[dict]:
    """The messages up to the last answer, as `encode_prompt` renders them."""
    messages = example["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def reader_of(example: dict) -> str:
    """The data set whose form the rows of such examples have."""
    return "slim_pj" if "text" in example else "ultrachat"


def reading_flags(example: dict, out_dir: str) -> str:
    """The flags that read the rows: what an example says of its loss is not in them."""
    flags = ["--dataset", reader_of(example), "--dataset_path", out_dir]
    return shlex.join([*flags, "--loss_on", example["loss_on"]] if "loss_on" in example else flags)


# ---- the work ----

class Answering:
    """One shard: prompts in batches of similar length, each answered once and appended, and the counts of it all.

    A run that was killed continues: batches are the same as before, and one that was not written whole is decoded again.
    """

    def __init__(self, args: Args, target: Target, stream: ExampleStream, shard: Shard) -> None:
        self.args, self.target, self.stream, self.shard = args, target, stream, shard
        self.rows_path, self.skipped_path = shard.rows_path(args), shard.folder(args) / SKIPPED_NAME
        self.rows, self.reasons = whole_rows(self.rows_path, ROW_FACTS), whole_rows(self.skipped_path, ("index", "reason"))
        self.counted, self.skipped = Counter(examples=0, tokens=0, cut_by_length=0, same_tokens=0), Counter()
        self.options = DecodeOptions(policy=args.policy(), max_new_tokens=args.max_new_tokens, eos_ids=eos_token_ids(target), seed=args.seed)
        self.form: dict = {}  # an example, which shows the data set's form

    def prompts(self) -> Iterator[Prompt]:
        """This shard's prompts that can be continued; the others are counted."""
        for index, example in enumerate(islice(self.stream.rest_of_epoch(), self.args.num_examples)):
            self.form = example
            if index % self.shard.world == self.shard.rank:
                try:
                    yield Prompt(index, example, given_tokens(self.target, example, self.args))
                except SkipRow as reason:
                    self.skipped[str(reason)] += 1

    def batches(self) -> Iterator[list[Prompt]]:
        """Prompts of similar length, the longest of BUCKET_BATCHES batches first: a cache that fits them fits the others."""
        prompts, size = self.prompts(), self.args.batch_size
        while bucket := list(islice(prompts, size * BUCKET_BATCHES)):
            bucket.sort(key=lambda prompt: -len(prompt.ids))
            yield from (bucket[i : i + size] for i in range(0, len(bucket), size))

    def run(self, stop: StopRequest) -> None:
        """Answer all batches, or those up to a `stop`."""
        progress = Progress(self.args.num_examples, self.shard)
        for batch in self.batches():
            if stop.signal is not None:
                break
            new_tokens = 0 if all(prompt.index in self.rows or prompt.index in self.reasons for prompt in batch) else self.answer(batch)
            for prompt in batch:
                self.count(prompt.index)
            progress.add(len(batch), new_tokens)
        progress.close()

    def answer(self, batch: list[Prompt]) -> int:
        """Decode a batch and append what the files lack of it, the skipped first; returns the number of new tokens."""
        generations = generate_batch(self.target.model, [p.ids for p in batch], self.options, prompt_ids=[p.index for p in batch])
        rows, reasons = {}, {}
        for prompt, generation in zip(batch, generations, strict=True):
            try:
                rows[prompt.index] = make_row(self.target.tokenizer, prompt, generation.tokens, self.options.eos_ids)
            except SkipRow as reason:
                reasons[prompt.index] = {"index": prompt.index, "reason": str(reason)}
        append_new(self.skipped_path, reasons, self.reasons)
        append_new(self.rows_path, rows, self.rows)
        return sum(len(generation.tokens) for generation in generations)

    def count(self, index: int) -> None:
        """Count an answered example; its row is not needed again."""
        if index in self.reasons:
            self.skipped[self.reasons[index]["reason"]] += 1
        else:
            row = self.rows.pop(index)
            self.counted.update(examples=1, tokens=row["tokens"], cut_by_length=not row["ended"], same_tokens=row["same_tokens"])

    def finish(self) -> None:
        """Write summary.json and print it. Raises UserError where there is not one row."""
        if self.counted["examples"] == 0:
            raise UserError(f"--dataset {self.args.dataset}: no row to write; {describe_skipped(self.skipped + self.stream.skipped)}")
        share = self.counted["same_tokens"] / self.counted["examples"]
        write_json(self.shard.folder(self.args) / SUMMARY_NAME, {**self.counted, "same_tokens_share": share, "skipped": self.skipped})
        print(f"{self.counted['examples']:,} examples of {self.counted['tokens']:,} new tokens, {self.counted['cut_by_length']:,} cut by length; "
              f"read again, {share:.1%} give the tokens that were generated; {describe_skipped(self.skipped)}")
        print(reading_flags(self.form, self.args.out_dir))


def whole_rows(path: Path, needed: tuple[str, ...]) -> dict[int, dict]:
    """Rows of a JSONL file by `index`; a torn last line (a killed process) is cut off, as more will be appended. Raises UserError
    for a row without the `needed`."""
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{path}: row {number} has no {missing[0]}; mend it, or delete it: its example is then answered again")
    return {row["index"]: row for row in rows}


def append_new(path: Path, rows: dict[int, dict], known: dict[int, dict]) -> None:
    """Append the rows that are not `known` to hold already, and make them known."""
    new = {index: row for index, row in rows.items() if index not in known}
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in new.values()))
    known |= new


class Progress:
    """A bar on a terminal, else a line every PROGRESS_EVERY_S seconds, with the rate of new tokens."""

    def __init__(self, num_examples: int, shard: Shard) -> None:
        self.total = len(range(shard.rank, num_examples, shard.world))
        self.bar = tqdm(total=self.total, desc=f"shard {shard.name}", unit="example", disable=not sys.stderr.isatty())
        self.start = self.printed = time.perf_counter()
        self.examples = self.tokens = 0

    def add(self, examples: int, tokens: int) -> None:
        """Count examples that are written and the tokens that were generated for them now."""
        self.examples, self.tokens, now = self.examples + examples, self.tokens + tokens, time.perf_counter()
        rate = f"{self.tokens / (now - self.start):.0f} tokens/s"
        self.bar.set_postfix_str(rate)
        self.bar.update(examples)
        if self.bar.disable and now - self.printed >= PROGRESS_EVERY_S:
            self.printed = now
            print(f"example {self.examples}/{self.total}, {rate}", flush=True)

    def close(self) -> None:
        self.bar.close()


def main() -> int:
    args = parse_args(Args)
    args.check()
    shard = Shard.of_process()
    stream = open_prompts(args)
    make_output_dir(args.out_dir)
    check_settings(args, shard, {})
    target = open_target(args)
    facts = facts_of(target, stream)
    check_settings(args, shard, facts)
    record_run(make_output_dir(str(shard.folder(args))), args, {"RANK": shard.rank, "WORLD_SIZE": shard.world, **facts})
    answering = Answering(args, target, stream, shard)
    with StopRequest() as stop:
        answering.run(stop)
    if stop.signal is not None:
        print("stopped; continue with the same command and --resume", file=sys.stderr)
        return 128 + stop.signal
    print(f"{args.dataset}: {stream.account()}", file=sys.stderr)
    answering.finish()
    return 0


if __name__ == "__main__":
    run(main)

"""From examples to tokens: chat template, loss masks, packing and padded batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from command_line import UserError

import torch
from transformers import PreTrainedTokenizerBase

from row_files import ExampleStream, describe_skipped

# Llama-3 templates print today's date; a fixed one keeps token sequences equal from run to run.
DATE_STRING = "26 Jul 2024"
LossOn = Literal["all", "assistant"]
BUCKET_BATCHES = 16
MAX_FRUITLESS = 2_000


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and, for each, whether it is learned (the first never is: nothing predicts it)."""

    input_ids: list[int]
    loss_mask: list[bool]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """`messages` through the tokenizer's chat template, as text that already holds its BOS."""
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no chat template; use an instruct model or a plain-text data set")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=DATE_STRING)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: dict) -> list[int]:
    """Token ids of an example up to where the model speaks: a chat up to its last answer, plain text whole."""
    if "text" in example:
        return tokenizer(example["text"])["input_ids"]
    messages = example["messages"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return tokenizer(render_chat(tokenizer, asked, add_generation_prompt=True), add_special_tokens=False)["input_ids"]


def encode_example(tokenizer: PreTrainedTokenizerBase, example: dict, loss_on: LossOn = "all") -> Encoded:
    """Token ids and loss mask of a chat or a text.

    With `loss_on="assistant"` (or where the example asks for it) only the assistants' answers are learned, their
    end-of-turn token included.
    """
    if "text" in example:
        ids = tokenizer(example["text"])["input_ids"]
        return Encoded(ids, [False, *[True] * (len(ids) - 1)])
    text = render_chat(tokenizer, example["messages"])
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if example.get("loss_on", loss_on) == "all":
        return Encoded(ids, [False, *[True] * (len(ids) - 1)])
    spans = answer_spans(tokenizer, example["messages"], text)
    mask = [any(start <= begin and end <= stop for start, stop in spans) for begin, end in offsets]
    return Encoded(ids, [False, *mask[1:]])


def answer_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict], text: str) -> list[tuple[int, int]]:
    """Character spans in the rendered `text` that the assistant speaks, from rendering growing prefixes of the chat."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        through = render_chat(tokenizer, messages[: i + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise UserError("this chat template rewrites earlier turns, so answers cannot be located; use --loss_on all")
        spans.append((len(before), len(through)))
    return spans


def collate(examples: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids` (B, T) int64, `attention_mask` (B, T) int64 and `loss_mask` (B, T) bool."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    attention_mask = torch.zeros(len(examples), width, dtype=torch.int64)
    loss_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, example in enumerate(examples):
        count = len(example.input_ids)
        input_ids[i, :count] = torch.tensor(example.input_ids)
        attention_mask[i, :count] = 1
        loss_mask[i, :count] = torch.tensor(example.loss_mask)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded places. They are masked everywhere, so any id serves where none is declared."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@dataclass(frozen=True)
class EncodeOptions:
    """How examples become tokens: tokenizer, learned part, longest kept length and examples per batch."""

    tokenizer: PreTrainedTokenizerBase
    loss_on: LossOn = "all"
    max_length: int = 512
    batch_size: int = 8

    def encode(self, example: dict) -> Encoded:
        """The example's first `max_length` tokens."""
        encoded = encode_example(self.tokenizer, example, self.loss_on)
        return Encoded(encoded.input_ids[: self.max_length], encoded.loss_mask[: self.max_length])

    def collate(self, examples: list[Encoded]) -> dict[str, torch.Tensor]:
        """See `collate`."""
        return collate(examples, pad_token_id(self.tokenizer))


class PaddedBatches:
    """Endless padded batches; BUCKET_BATCHES at a time are cut from examples sorted by length, which saves padding.

    `state_dict` / `load_state_dict` continue at the very next batch.
    """

    def __init__(self, stream: ExampleStream, options: EncodeOptions) -> None:
        self.stream, self.options = stream, options
        self.bucket_start, self.emitted = dict(stream.position), 0
        self.bucket: list[list[Encoded]] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        examples = iter(self.stream)
        while True:
            if not self.bucket:
                self.bucket_start = dict(self.stream.position)
                self.bucket = self._fill_bucket(examples)
            while self.emitted < len(self.bucket):
                self.emitted += 1
                yield self.options.collate(self.bucket[self.emitted - 1])
            self.bucket, self.emitted = [], 0

    def _fill_bucket(self, examples: Iterator[dict]) -> list[list[Encoded]]:
        size, wanted = self.options.batch_size, self.options.batch_size * BUCKET_BATCHES
        encoded: list[Encoded] = []
        fruitless = 0
        while len(encoded) < wanted:
            candidate = self.options.encode(next(examples))
            if any(candidate.loss_mask):
                encoded.append(candidate)
                fruitless = 0
            else:
                self.stream.skipped["with nothing to learn in the first tokens"] += 1
                fruitless += 1
                if fruitless == MAX_FRUITLESS:
                    raise UserError(f"{MAX_FRUITLESS} examples in a row have nothing to learn; raise --max_length or use --loss_on all")
        encoded.sort(key=lambda example: len(example.input_ids))
        batches = [encoded[i : i + size] for i in range(0, wanted, size)]
        generator = torch.Generator().manual_seed(self.stream.seed + self.bucket_start["row"])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def state_dict(self) -> dict:
        return {"position": self.bucket_start, "emitted": self.emitted}

    def load_state_dict(self, state: dict) -> None:
        self.bucket_start, self.emitted, self.bucket = dict(state["position"]), state["emitted"], []
        self.stream.position = dict(self.bucket_start)


def held_out_batches(stream: ExampleStream, options: EncodeOptions, limit: int) -> list[dict[str, torch.Tensor]]:
    """Up to `limit` padded batches from one epoch of `stream`, no example twice, sorted by length.

    Raises UserError where not one example has anything to learn.
    """
    encoded = (options.encode(example) for example in stream.rest_of_epoch())
    kept = list(islice((e for e in encoded if any(e.loss_mask)), limit * options.batch_size))
    if not kept:
        raise UserError(f"--dataset {stream.dataset.name}: no usable example in the held-out split; {describe_skipped(stream.skipped)}")
    kept.sort(key=lambda e: len(e.input_ids))
    return [options.collate(kept[i : i + options.batch_size]) for i in range(0, len(kept), options.batch_size)]


class PackedBatches:
    """Endless batches of exactly `max_length` tokens a row: examples joined end to end with EOS between, no padding.

    Several streams are mixed so that their epochs end together; raises UserError where one's length is not known.
    """

    def __init__(self, streams: list[ExampleStream], options: EncodeOptions) -> None:
        endless = [stream.dataset.name for stream in streams if stream.num_rows is None]
        if endless and len(streams) > 1:
            raise UserError(f"--dataset {endless[0]}: a hub stream has no known length, so it cannot be mixed with others; give it alone")
        self.streams, self.options = streams, options
        self.buffer: list[int] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sources = [iter(stream) for stream in self.streams]
        size = (self.options.batch_size, self.options.max_length)
        while True:
            while len(self.buffer) < size[0] * size[1]:
                self.buffer += self._next_tokens(sources)
            tokens, self.buffer = self.buffer[: size[0] * size[1]], self.buffer[size[0] * size[1] :]
            yield {"input_ids": torch.tensor(tokens).view(size)}

    def _next_tokens(self, sources: list[Iterator[dict]]) -> list[int]:
        """The next example of the data set that is least far through its epoch, so that all end together."""
        # (a single stream needs no length)
        progress = [stream.position["epoch"] + stream.position["row"] / (stream.num_rows or 1) for stream in self.streams]
        example = next(sources[progress.index(min(progress))])
        return [*encode_example(self.options.tokenizer, example).input_ids, self.options.tokenizer.eos_token_id]

    def state_dict(self) -> dict:
        return {"positions": [dict(stream.position) for stream in self.streams], "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict) -> None:
        self.buffer = list(state["buffer"])
        for stream, position in zip(self.streams, state["positions"], strict=True):
            stream.position = dict(position)

"""From examples to tokens: chat template, loss masks, packing, padded batches, and making them ahead of time."""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from running.command_line import UserError, first_line

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data.images import IMAGE_TOKEN, ImageInputs, ImageSource, open_image, with_images
from data.row_files import ExampleStream, MixedStream, SkipRow, describe_skipped

# Llama-3 templates print today's date; a fixed one keeps token sequences equal from run to run.
DATE_STRING = "26 Jul 2024"
LossOn = Literal["all", "assistant"]
BUCKET_BATCHES = 16
MAX_FRUITLESS = 2_000
NOTHING_TO_LEARN = "with nothing to learn in the first tokens"
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError)  # what rendering raises: jinja2's own, and Python's


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and, for each, whether it is learned (the first never is: nothing predicts it).

    `source` is the index of the stream that the example came from; `images` stand where the tokens have placeholders.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    source: int = 0
    images: tuple[ImageSource, ...] = ()


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """`messages` through the tokenizer's chat template, as text that already holds its BOS.

    Raises SkipRow for a chat that the template refuses, as many do with a system prompt; UserError where there is no
    template, or it fails on any chat.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no chat template; use an instruct model or a plain-text data set")
    try:
        return _rendered(tokenizer, messages, add_generation_prompt)
    except TEMPLATE_ERRORS as error:
        _check_template(tokenizer, with_parts=isinstance(messages[0]["content"], list))
        raise SkipRow(f"whose chat the template refuses ({first_line(error)[:80]})") from error


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=DATE_STRING)


def _check_template(tokenizer: PreTrainedTokenizerBase, with_parts: bool) -> None:
    """Raise UserError where not even a question can be asked through the chat template; `with_parts`: in the form of LLaVA's."""
    question = [{"role": "user", "content": "?"}]
    try:
        _rendered(tokenizer, with_images(question, 0) if with_parts else question, add_generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        trouble, remedy = ("takes no images", "give a LLaVA with its own template") if with_parts else ("is broken", "mend it, or use another model")
        raise UserError(f"the chat template of {tokenizer.name_or_path} {trouble} ({first_line(error)}); {remedy}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: dict, num_images: int | None = None) -> list[int]:
    """Token ids of an example up to where the model speaks: a chat up to its last answer, plain text whole.

    `num_images`: of a chat with a LLaVA, whose first question begins with so many image tokens (None: with a text model).
    """
    if "text" in example:
        return tokenizer(example["text"])["input_ids"]
    messages = example["messages"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = render_chat(tokenizer, asked if num_images is None else with_images(asked, num_images), add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=num_images is not None and _lacks_bos(tokenizer, text))["input_ids"]


def _lacks_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer has to add the BOS to a rendered chat, which LLaVA's templates leave out."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: dict, loss_on: LossOn = "all", num_images: int | None = None) -> Encoded:
    """Token ids and loss mask of a chat or a text; `num_images` as in `encode_prompt`.

    With `loss_on="assistant"` (or where the example asks for it) only the assistants' answers are learned, their
    end-of-turn token included.
    """
    if "text" in example:
        ids = tokenizer(example["text"])["input_ids"]
        return Encoded(ids, [False, *[True] * (len(ids) - 1)])
    messages = example["messages"] if num_images is None else with_images(_with_ends(tokenizer, example["messages"]), num_images)
    text = render_chat(tokenizer, messages)
    encoding = tokenizer(text, add_special_tokens=num_images is not None and _lacks_bos(tokenizer, text), return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if example.get("loss_on", loss_on) == "all":
        return Encoded(ids, [False, *[True] * (len(ids) - 1)])
    spans = answer_spans(tokenizer, messages, text)
    mask = [any(start <= begin and end <= stop for start, stop in spans) for begin, end in offsets]
    return Encoded(ids, [False, *mask[1:]])


def _with_ends(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[dict]:
    """`messages` whose answers end in EOS, where a LLaVA's template leaves that to who trains, too."""
    one_answer = with_images([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], 0)
    if tokenizer.eos_token is None or tokenizer.eos_token in render_chat(tokenizer, one_answer):
        return messages
    return [{**message, "content": message["content"] + tokenizer.eos_token} if message["role"] == "assistant" else message for message in messages]


def encode_with_images(tokenizer: PreTrainedTokenizerBase, example: dict, inputs: ImageInputs, loss_on: LossOn = "all") -> Encoded:
    """`encode_example` for a LLaVA: placeholders in the place of "images", which are never learned. Raises SkipRow for image tokens in the text."""
    images = example.get("images", [])
    short = encode_example(tokenizer, example, loss_on, num_images=len(images))
    if short.input_ids.count(inputs.image_token_id) != len(images):
        raise SkipRow(f"whose text has {IMAGE_TOKEN} beside its images")
    ids = inputs.with_placeholders(short.input_ids)
    learned = iter(learn for token, learn in zip(short.input_ids, short.loss_mask, strict=True) if token != inputs.image_token_id)
    mask = [token != inputs.image_token_id and next(learned) for token in ids]
    behind_an_end = [False, *(token == tokenizer.eos_token_id for token in ids[:-1])]  # the space of a template
    never = {tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    mask = [learn and token not in never and not behind for token, learn, behind in zip(ids, mask, behind_an_end, strict=True)]
    return Encoded(ids, mask, images=tuple(images))


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


def collate(examples: list[Encoded]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids` (B, T) int64, `attention_mask` (B, T) int64, `loss_mask` (B, T) bool; `source` (B,) int64.

    Padded places are masked everywhere, so any id serves: 0, which every embedding has; a padding token may lie beyond it.
    """
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    attention_mask = torch.zeros(len(examples), width, dtype=torch.int64)
    loss_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, example in enumerate(examples):
        count = len(example.input_ids)
        input_ids[i, :count] = torch.tensor(example.input_ids)
        attention_mask[i, :count] = 1
        loss_mask[i, :count] = torch.tensor(example.loss_mask)
    source = torch.tensor([example.source for example in examples])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask, "source": source}


@dataclass(frozen=True)
class EncodeOptions:
    """How examples become tokens: tokenizer, learned part, longest kept length and examples per batch; `images` says how a LLaVA takes them."""

    tokenizer: PreTrainedTokenizerBase
    loss_on: LossOn = "all"
    max_length: int = 512
    batch_size: int = 8
    images: ImageInputs | None = None

    def encode(self, example: dict) -> Encoded:
        """The example's first `max_length` tokens. Raises SkipRow for images that cannot be read, or do not fit."""
        if self.images is None:
            encoded = encode_example(self.tokenizer, example, self.loss_on)
        else:
            encoded = encode_with_images(self.tokenizer, example, self.images, self.loss_on)
            if self.images.image_token_id in encoded.input_ids[self.max_length :]:
                raise SkipRow("whose images take more than --max_length tokens")
            for image in encoded.images:  # it is kept closed: a bucket of pixels would fill the memory
                open_image(image, self.images.image_dir)
        return Encoded(encoded.input_ids[: self.max_length], encoded.loss_mask[: self.max_length], example.get("source", 0), encoded.images)

    def collate(self, examples: list[Encoded]) -> dict[str, torch.Tensor]:
        """See `collate`; with the `pixel_values` (n, 3, height, width) of all images, in the texts' order, where there are some."""
        images = [image for example in examples for image in example.images]
        return {**collate(examples), **({"pixel_values": self.images.pixels(images)} if images else {})}


def _usable(options: EncodeOptions, example: dict, origin: ExampleStream) -> Encoded | None:
    """The example's tokens; None where nothing of it can be learned, which `origin` counts."""
    try:
        candidate = options.encode(example)
    except SkipRow as reason:
        origin.skipped[str(reason)] += 1
        return None
    if any(candidate.loss_mask):
        return candidate
    origin.skipped[NOTHING_TO_LEARN] += 1
    return None


class PaddedBatches:
    """Endless padded batches; BUCKET_BATCHES at a time are cut from examples sorted by length, which saves padding.

    A batch is what `collate` makes of B examples, and `global_tokens`, an int. With `shard` (rank, world) it is this
    process's part of a global batch: world processes see together what one with world·B examples per batch would see,
    without a word between them, so each encodes the examples of all. `global_tokens` counts the learned tokens of the
    whole global batch, to divide the loss by.

    `state_dict` / `load_state_dict` continue at the very next batch. The state is the same for every rank.
    """

    def __init__(self, stream: ExampleStream | MixedStream, options: EncodeOptions, shard: tuple[int, int] = (0, 1)) -> None:
        self.stream, self.options = stream, options
        self.rank, self.world = shard
        self.bucket_start, self.emitted = copy.deepcopy(stream.position), 0
        self.bucket: list[list[Encoded]] = []
        self.fruitless: Counter[int] = Counter()  # by source: examples in a row with nothing to learn

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int]]:
        examples = iter(self.stream)
        while True:
            if not self.bucket:
                self.bucket_start = copy.deepcopy(self.stream.position)
                self.bucket = self._fill_bucket(examples)
            while self.emitted < len(self.bucket):
                self.emitted += 1
                yield self._own_part(self.bucket[self.emitted - 1])
            self.bucket, self.emitted = [], 0

    def _own_part(self, examples: list[Encoded]) -> dict[str, torch.Tensor | int]:
        size = self.options.batch_size
        own = examples[self.rank * size : (self.rank + 1) * size]
        return {**self.options.collate(own), "global_tokens": sum(sum(example.loss_mask[1:]) for example in examples)}

    def _fill_bucket(self, examples: Iterator[dict]) -> list[list[Encoded]]:
        for origin in self.stream.streams:  # one process tells of an epoch's end, and not again when a resumed run reads a bucket again
            origin.quiet = self.rank > 0 or self.emitted > 0
        size = self.options.batch_size * self.world
        encoded = [self._next_usable(examples) for _ in range(size * BUCKET_BATCHES)]
        encoded.sort(key=lambda example: len(example.input_ids))
        batches = [encoded[i : i + size] for i in range(0, len(encoded), size)]
        generator = torch.Generator().manual_seed(self.stream.seed + self.bucket_start["row"])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _next_usable(self, examples: Iterator[dict]) -> Encoded:
        """The next example that has something to learn. Raises UserError where a source has none for long."""
        while True:
            example = next(examples)
            source = example.get("source", 0)
            candidate = _usable(self.options, example, self.stream.streams[source])
            if candidate is not None:
                self.fruitless[source] = 0
                return candidate
            self.fruitless[source] += 1
            if self.fruitless[source] == MAX_FRUITLESS:
                origin = self.stream.streams[source]
                remedy = "raise --max_length or use --loss_on all" if origin.skipped[NOTHING_TO_LEARN] else "choose other data, or another model"
                raise UserError(f"{MAX_FRUITLESS} examples of {origin.dataset.name} in a row have nothing to learn; {remedy} "
                                f"({describe_skipped(origin.skipped)})")

    def state_dict(self) -> dict:
        return {"position": self.bucket_start, "emitted": self.emitted}

    def load_state_dict(self, state: dict) -> None:
        self.bucket_start, self.emitted, self.bucket = copy.deepcopy(state["position"]), state["emitted"], []
        self.stream.position = copy.deepcopy(self.bucket_start)


def held_out_batches(stream: ExampleStream, options: EncodeOptions, limit: int) -> list[dict[str, torch.Tensor]]:
    """Up to `limit` padded batches from one epoch of `stream`, no example twice, sorted by length.

    Raises UserError where not one example has anything to learn.
    """
    encoded = (_usable(options, example, stream) for example in stream.rest_of_epoch())
    kept = list(islice((e for e in encoded if e is not None), limit * options.batch_size))
    if not kept:
        raise UserError(f"--dataset {stream.dataset.name}: no usable example in the held-out split; {describe_skipped(stream.skipped)}")
    kept.sort(key=lambda e: len(e.input_ids))
    return [options.collate(kept[i : i + options.batch_size]) for i in range(0, len(kept), options.batch_size)]


def held_out_by_source(streams: list[ExampleStream], options: EncodeOptions, limit: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Data set's name -> its `held_out_batches`, up to `limit` for each of `streams` (a MixedStream's `streams`)."""
    return {stream.dataset.name: held_out_batches(stream, options, limit) for stream in streams}


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


class Prefetched:
    """The batches of an endless source, made up to `depth` ahead by a thread, so that training never waits for them.

    PaddedBatches reads the examples of BUCKET_BATCHES batches in one go: with a smaller `depth` the batches in hand run
    out before the next ones are there. `state_dict` is that of the next batch which was not yet taken, however far the
    thread is. Tensors are pinned where CUDA is available. What the thread raises is raised in its place among the
    batches. The thread ends with `close()`, with this object, or with the program. Iterate it once only; the wrapped
    batches and their streams belong to the thread from the first batch to `close()`.
    """

    def __init__(self, batches: PaddedBatches | PackedBatches, depth: int = BUCKET_BATCHES) -> None:
        self.batches = batches
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._free, self._stop = threading.Semaphore(depth), threading.Event()
        self._thread: threading.Thread | None = None
        self._state: dict = {}
        self._finish = weakref.finalize(self, _end_thread, self._free, self._stop)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int]]:
        self._start()
        while not self._stop.is_set():
            made = self._ready.get()
            if made is None:
                return
            if isinstance(made, BaseException):
                raise made
            self._free.release()
            batch, self._state = made
            yield batch

    def _start(self) -> None:
        if self._thread is not None:
            raise RuntimeError("these batches are read already; make another Prefetched")
        self._state = self.batches.state_dict()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        # The thread must not know `self`, or this object would live as long as the thread.
        self._thread = threading.Thread(target=_read_ahead, args=(self.batches, self._ready, self._free, self._stop, device), daemon=True)
        self._thread.start()

    def state_dict(self) -> dict:
        return self.batches.state_dict() if self._thread is None else self._state

    def load_state_dict(self, state: dict) -> None:
        if self._thread is not None:
            raise RuntimeError("these batches are read already; load the state before the first one")
        self.batches.load_state_dict(state)

    def close(self) -> None:
        """End the thread, and the iteration; `state_dict` stays what it is."""
        self._finish()
        if self._thread is not None:
            self._thread.join()


def _end_thread(free: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    free.release()  # wakes the thread where it waits for a free place


def _read_ahead(
    batches: PaddedBatches | PackedBatches, ready: queue.SimpleQueue, free: threading.Semaphore, stop: threading.Event, device: int | None
) -> None:
    """Puts (batch, the state after it) into `ready` for each batch, one for each free place; last, None or what was raised."""
    last = None
    try:
        if device is not None:
            torch.cuda.set_device(device)  # a thread starts at GPU 0, and pinning there would open a context on it
        free.acquire()
        for batch in batches:
            if device is not None:
                batch = {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            ready.put((batch, batches.state_dict()))
            free.acquire()
            if stop.is_set():
                break
    except BaseException as error:  # of any kind: it is the consumer's
        last = error
    ready.put(last)

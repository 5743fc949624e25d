"""Where rows of text come from: the hub, local JSON/JSONL/Parquet/Arrow files, or the suite itself.

A data set is a `TextDataset` record: how its rows are found and how one row becomes an *example*. An example is
`{"messages": [{"role", "content"}, ...]}` (a chat), `{"text": ...}` (plain text), and may carry `"loss_on":
"assistant"` where the data set itself says which part is learned. A chat about images carries `"images"`, file names or functions that draw them, and maybe
`"scene"`, what is really there. Examples of a mixture carry `"source"`, the index of the stream that they came from.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from running.command_line import UserError, first_line, import_optional

import huggingface_hub
import torch
from tqdm import tqdm

from running.hub import check_reachable, hub_errors

SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant")
UNREAD = {  # what rows of chats carry that no example holds: the reason that is counted → its columns, and its keys in a turn
    "their tool definitions": ("tools", "functions"), "their tool calls": ("tool_calls", "function_call"),
    "their system prompt": ("system", "system_prompt"),
}
EMPTY = (None, "", "[]", "{}", [], {})
TURN_COLUMNS = ("messages", "conversations", "conversation")
HELD_OUT_PERCENT = {"test": 2, "validation": 2}  # where a hash decides the split
FILE_SHARE = {"train": 0.9, "validation": 0.05, "test": 0.05}  # where local files are cut
FILE_PREFIXES = {"train": ("train",), "validation": ("val", "dev"), "test": ("test",)}
KEPT_IN = ("test", "validation", "train")  # what stands in several splits stays in the first of these
NOT_DATA = {"dataset_info.json", "state.json"}  # beside the Arrow files of `Dataset.save_to_disk`
MAPPED = "cache-"  # begins the names of the Arrow files in which `Dataset.map` keeps its results, beside the data
NO_TEXT = {  # how a file begins that is no JSON, whatever its name says: (what it is, what makes text of it)
    b"\x1f\x8b": ("gzip", "unpack it with: gunzip"), b"\x28\xb5\x2f\xfd": ("zstd", "unpack it with: zstd -d"), b"PK\x03\x04": ("zip", "unpack it with: unzip"),
    b"\xff\xfe": ("UTF-16", "convert it with: iconv -f utf-16 -t utf-8"), b"\xfe\xff": ("UTF-16", "convert it with: iconv -f utf-16 -t utf-8"),
}
SHUFFLE_BUFFER = 2_000  # rows of a hub stream, drawn from up to ten of its files at a time

Item, Used = TypeVar("Item"), TypeVar("Used")


class SkipRow(ValueError):
    """A row that cannot be used; its message is the reason that is counted and shown ("3 without a text")."""


@dataclass(frozen=True)
class TextDataset:
    """One data set: `parse(row) -> example` (raises SkipRow), and the place that its rows come from.

    The place is `make_rows(split)`, or the hub: `hub_splits` gives the hub's split expression for each of SPLITS.
    Where the hub has nothing but a train split and streams it, the hash of the column `split_key` decides a row's
    split. A set that is not `cut` has the same rows in every split: prompts that are never trained on.

    Where one example is spread over several rows, `assemble(rows)` makes one row of them. It sees all rows of a place
    at once, so such a set is not streamed, and it comes before rows are cut into splits, so that no example is torn:
    splits that name the same hub split share it by FILE_SHARE.

    `path_flag` is the flag that names local files of this form, for messages.
    """

    name: str
    parse: Callable[[dict], dict]
    hub_id: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_splits: dict[str, str] = field(default_factory=lambda: {split: split for split in SPLITS})
    streaming: bool = False
    split_key: str | None = None
    make_rows: Callable[[str], Sequence[dict]] | None = None
    assemble: Callable[[Iterable], list[dict]] | None = None
    cut: bool = True
    path_flag: str = "--dataset_path"


def split_of(key: str) -> str:
    """The split that holds everything called `key`: fixed by its hash, HELD_OUT_PERCENT of the keys are held out."""
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    for split, share in HELD_OUT_PERCENT.items():
        if percent < share:
            return split
        percent -= share
    return "train"


class ExampleStream:
    """An endless, resumable stream of the examples of one data set, reshuffled each epoch by `seed`.

    `rows` is a sequence, or a hub stream (a `datasets.IterableDataset`), which is shuffled through a buffer only.
    `position` counts the raw rows that were consumed; a stream that starts at a saved position continues exactly (a
    hub stream reads again what it passes over). Unusable rows are counted by reason in `skipped`, and in `unread` those
    that are used without a part of theirs (UNREAD). The end of an epoch is told on stderr, unless `quiet`.
    """

    def __init__(self, dataset: TextDataset, rows: Sequence[dict], seed: int, shuffle: bool = True) -> None:
        self.dataset, self.rows, self.seed, self.shuffle = dataset, rows, seed, shuffle
        self.position = {"epoch": 0, "row": 0}
        self.skipped: Counter[str] = Counter(getattr(rows, "left_out", None))
        self.unread: Counter[str] = Counter()
        self.quiet = False

    @property
    def streams(self) -> list[ExampleStream]:
        """The streams that an example's source counts through: this one alone (see MixedStream)."""
        return [self]

    @property
    def num_rows(self) -> int | None:
        """Raw rows of one epoch; None for a hub stream, whose length is not known."""
        return len(self.rows) if hasattr(self.rows, "__len__") else None

    def __iter__(self) -> Iterator[dict]:
        while True:
            found_any = self.position["row"] > 0  # an epoch that was resumed may have nothing left
            for example in self.rest_of_epoch():
                found_any = True
                yield example
            if not found_any:
                raise UserError(f"--dataset {self.dataset.name}: no usable example; {describe_skipped(self.skipped)}")
            if not self.quiet:
                self._tell_end_of_epoch()
            self.position = {"epoch": self.position["epoch"] + 1, "row": 0}

    def _tell_end_of_epoch(self) -> None:
        # Rows, not examples: a stream that was resumed cannot know how many rows were skipped before.
        epoch, rows = self.position["epoch"] + 1, self.position["row"]
        tqdm.write(f"{self.dataset.name}: epoch {epoch} ends after {rows:,} rows; the data begin anew", file=sys.stderr)

    def rest_of_epoch(self) -> Iterator[dict]:
        """The usable examples from the current position to the end of the epoch."""
        for row in self._ordered_rows():
            self.position["row"] += 1
            try:
                example = _parse(self.dataset, row)
            except SkipRow as reason:
                self.skipped[str(reason)] += 1
            else:
                self.unread.update(_unread(row) if "messages" in example else ())
                yield example

    def usable(self, use: Callable[[dict], Used]) -> Iterator[Used]:
        """What `use` makes of the examples of `rest_of_epoch`; one that it raises SkipRow for is counted as an unusable row."""
        return (made for _, made in used(self.rest_of_epoch(), use, self.skipped))

    def account(self) -> str:
        """What was skipped, and what was used without a part of it, to show beside the data set's name."""
        return describe_skipped(self.skipped) + describe_unread(self.unread)

    def tell_losses(self, name: str | None = None) -> None:
        """Say on stderr what `account` says, if there is something; of the data set, or of `name`."""
        if self.skipped or self.unread:
            print(f"{name or self.dataset.name}: {self.account()}", file=sys.stderr)

    def _ordered_rows(self) -> Iterator[dict]:
        epoch, start = self.position["epoch"], self.position["row"]
        if self.num_rows is None:
            rows = self.rows.shuffle(seed=self.seed + epoch, buffer_size=SHUFFLE_BUFFER) if self.shuffle else self.rows
            with _hub_errors(self.dataset):
                yield from rows.skip(start)
            return
        order = range(self.num_rows)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.num_rows, generator=generator).tolist()
        for index in order[start:]:
            yield self.rows[index]


@dataclass(frozen=True)
class Mixture:
    """What a MixedStream draws from: its sources' names, joined by "+", and their shares, which sum to 1."""

    name: str
    shares: tuple[float, ...]


class MixedStream:
    """An endless, resumable stream that draws each example from one of several streams, at random by `weights`.

    Example number n comes from a source that a hash of (seed, n) decides, so the choice needs no state and is the same
    in every run. Each source keeps its own position and epochs, and its length need not be known. Every example
    carries `"source"`, the index of its stream. The shares are of examples, not of tokens. `position` counts the drawn
    examples as `row`; a stream that starts at a saved position continues exactly.
    """

    def __init__(self, streams: list[ExampleStream], weights: Sequence[float], seed: int) -> None:
        shares = tuple(weight / sum(weights) for weight in weights)
        self.dataset = Mixture("+".join(stream.dataset.name for stream in streams), shares)
        self.streams, self.seed, self.drawn = streams, seed, 0
        self._ends = list(accumulate(shares))[:-1]  # of each source's part of [0, 1); the last one ends at 1

    @property
    def position(self) -> dict:
        return {"row": self.drawn, "sources": [dict(stream.position) for stream in self.streams]}

    @position.setter
    def position(self, position: dict) -> None:
        self.drawn = position["row"]
        for stream, saved in zip(self.streams, position["sources"], strict=True):
            stream.position = dict(saved)

    @property
    def skipped(self) -> Counter[str]:
        """Unusable rows of all sources, by source and reason."""
        return Counter({f"of {s.dataset.name} {reason}": count for s in self.streams for reason, count in s.skipped.items()})

    def account(self) -> str:
        """As of an ExampleStream, by source."""
        unread = Counter({f"{part} (of {s.dataset.name})": count for s in self.streams for part, count in s.unread.items()})
        return describe_skipped(self.skipped) + describe_unread(unread)

    def source_of(self, number: int) -> int:
        """Index of the stream that example `number` (0-based) comes from."""
        digest = hashlib.sha256(f"{self.seed}/{number}".encode()).digest()
        return bisect(self._ends, int.from_bytes(digest[:8], "big") / 2**64)

    def __iter__(self) -> Iterator[dict]:
        sources = [iter(stream) for stream in self.streams]
        while True:
            source = self.source_of(self.drawn)
            example = next(sources[source])
            self.drawn += 1
            yield {**example, "source": source}


def _parse(dataset: TextDataset, row: object) -> dict:
    if not isinstance(row, dict):
        raise SkipRow("that are not objects")
    example = dataset.parse(row)
    try:
        "".join(_texts_of(example)).encode()
    except UnicodeEncodeError:
        raise SkipRow("with half a character (a lone surrogate)") from None
    return example


def _texts_of(example: dict) -> Iterator[str]:
    """The texts of an example, which a tokenizer will get."""
    yield example.get("text", "")
    yield from (message["content"] for message in example.get("messages", ()))


def used(items: Iterable[Item], use: Callable[[Item], Used], skipped: Counter[str]) -> Iterator[tuple[Item, Used]]:
    """Each of `items` with what `use` makes of it; one that it raises SkipRow for is left out, and counted in `skipped`."""
    for item in items:
        try:
            made = use(item)
        except SkipRow as reason:
            skipped[str(reason)] += 1
        else:
            yield item, made


def describe_skipped(skipped: Counter[str]) -> str:
    """"3 rows skipped (2 without a text, 1 ...)", or "no rows skipped"."""
    if not skipped:
        return "no rows skipped"
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return f"{sum(skipped.values())} rows skipped ({reasons})"


def describe_unread(unread: Counter[str]) -> str:
    """"; 3 rows used without their tool calls", or nothing."""
    return "".join(f"; {count} rows used without {part}" for part, count in unread.most_common())


def _unread(row: dict) -> Iterator[str]:
    """The parts of UNREAD that a row of a chat, or one of its turns, holds."""
    columns = [row[name] for name in TURN_COLUMNS if isinstance(row.get(name), list)]
    holders = [row, *(turn for column in columns for turn in column if isinstance(turn, dict))]
    for part, keys in UNREAD.items():
        if any(holder.get(key) not in EMPTY for holder in holders for key in keys):
            yield part


# ---- forms that several data sets share ----

def parse_text(row: dict) -> dict:
    """A row with `text` as plain text."""
    return {"text": text_in(row, "text")}


def parse_question(row: dict) -> dict:
    """A row with `question` and `answer` (GSM8K's form) as a chat of one turn."""
    return one_turn(text_in(row, "question"), text_in(row, "answer"))


def parse_messages(row: dict) -> dict:
    """A row with `messages` of `role` and `content` (UltraChat's form) as a chat."""
    return {"messages": clean_messages(row.get("messages"), "role", "content", {role: role for role in ROLES})}


def one_turn(question: str, answer: str) -> dict:
    """The example of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def text_in(row: dict, name: str) -> str:
    """The text in the column `name`; SkipRow where there is none."""
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise SkipRow(f"without {name}")
    return row[name]


def clean_messages(turns: object, role_key: str, content_key: str, roles: dict[str, str]) -> list[dict]:
    """The turns of a chat as `role`/`content` messages that start with the user and alternate; else SkipRow.

    `roles` maps the data set's names of the roles to ROLES. A content may be a list of parts, whose texts are joined.
    Leading turns before the first user turn (a system prompt excepted) and a trailing unanswered user turn are cut, as
    templates want a user first and an answer is what is learned from.
    """
    messages = []
    for turn in _turn_list(turns, role_key, content_key):
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
            raise SkipRow("with a broken turn")
        if turn[role_key] not in roles:
            raise SkipRow(f"with a turn of role {turn[role_key][:20]!r}")
        messages.append({"role": roles[turn[role_key]], "content": content_of(turn, content_key).strip()})
    return _user_first(messages)


def content_of(turn: dict, key: str) -> str:
    """The text under `key`: a string, or a list of OpenAI's parts `{"type": "text", "text": ...}`, joined. Raises SkipRow."""
    content = turn.get(key)
    if content is None and any(turn.get(call) not in EMPTY for call in UNREAD["their tool calls"]):
        raise SkipRow("with a turn that only calls a tool")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise SkipRow(f"with a part of type {str(part['type'])[:20]!r}")
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise SkipRow("with a broken turn")
    return "".join(part["text"] for part in parts)


def _turn_list(turns: object, role_key: str, content_key: str) -> list:
    """A list of turns, also where a Parquet file stores it by column: {role_key: [...], content_key: [...]}."""
    if isinstance(turns, dict):
        columns = [turns.get(key) for key in (role_key, content_key)]
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            raise SkipRow("with a broken turn")
        turns = [{role_key: role, content_key: content} for role, content in zip(*columns, strict=True)]
    if not isinstance(turns, list) or not turns:
        raise SkipRow("without a list of turns")
    return turns


def _user_first(messages: list[dict]) -> list[dict]:
    system = messages[:1] if messages[0]["role"] == "system" and messages[0]["content"] else []
    chat = messages
    while chat and chat[0]["role"] != "user":
        chat = chat[1:]
    while chat and chat[-1]["role"] != "assistant":
        chat = chat[:-1]
    if not chat:
        raise SkipRow("without a question and its answer")
    if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(chat)):
        raise SkipRow("whose turns do not alternate")
    if any(not message["content"] for message in chat):
        raise SkipRow("with an empty turn")
    return system + chat


# ---- where rows are found ----

def open_rows(dataset: TextDataset, split: str, path: str | None = None) -> Sequence[dict]:
    """Rows of `split`: from the files at `path` (a file, folder or glob) where given, else from the data set's own place.

    A local file whose name begins with a split (`train*`, `val*` or `dev*`, `test*`) is that split, and so is a split of a saved
    `DatasetDict`. The splits that have no file of their own are cut from the train files, or from files without such names, by
    FILE_SHARE. What stands in several splits, as where a file was copied, stays in the first of KEPT_IN; so training rows are never
    held-out rows. Raises UserError with the remedy, also for a train split of what is only measured with.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if split == "train":
        check_learnable(dataset)
    if path is not None:
        return _split_of_files(dataset, split, path)
    if dataset.make_rows is not None:
        return dataset.make_rows(split)
    return _hub_rows(dataset, split)


def check_learnable(dataset: TextDataset) -> None:
    """Raise UserError for prompts that are measured with: nothing is learned from them, nor fitted to them."""
    if not dataset.cut:
        raise UserError(f"--dataset {dataset.name}: its prompts are measured with, and nothing is learned from them; choose another data set")


def _hub_rows(dataset: TextDataset, split: str) -> Sequence[dict]:
    datasets = import_optional("datasets", "datasets", f"--dataset {dataset.name}")
    with _hub_errors(dataset):
        _check_cache_or_hub(dataset)
        rows = datasets.load_dataset(
            dataset.hub_id, dataset.hub_config, revision=dataset.hub_revision, split=dataset.hub_splits[split], streaming=dataset.streaming
        )
    if dataset.assemble is not None:
        rows = dataset.assemble(rows)
        sharing = [name for name in SPLITS if dataset.hub_splits[name] == dataset.hub_splits[split]]
        return rows[_share_slice(split, sharing, len(rows))]
    if dataset.split_key is None:
        return rows
    return rows.filter(lambda key: split_of(str(key)) == split, input_columns=[dataset.split_key])


def _check_cache_or_hub(dataset: TextDataset) -> None:
    """Ask the hub once, where the data set is not in the cache."""
    if huggingface_hub.try_to_load_from_cache(dataset.hub_id, "README.md", repo_type="dataset", revision=dataset.hub_revision) is None:
        check_reachable(dataset.hub_id, "dataset", dataset.hub_revision)


@contextmanager
def _hub_errors(dataset: TextDataset) -> Iterator[None]:
    """Turns what `datasets` raises for an unreachable, closed, missing or changed data set into a UserError."""
    from datasets.exceptions import DatasetsError

    with hub_errors(f"--dataset {dataset.name}: {dataset.hub_id}", dataset.hub_id, f"give local files of the same form with {dataset.path_flag}", "dataset"):
        try:
            yield
        except DatasetsError as error:
            raise OSError(first_line(error)) from error


class LocalRows(list):
    """Rows of local files, without those `left_out`, which are counted by reason."""

    def __init__(self, rows: Iterable[dict], left_out: Mapping[str, int] = MappingProxyType({})) -> None:
        super().__init__(rows)
        self.left_out: Counter[str] = Counter(left_out)


def _split_of_files(dataset: TextDataset, split: str, path: str) -> LocalRows:
    flag = f"{dataset.path_flag} {path}"
    files = _data_files(path, flag)
    if not dataset.cut:
        rows = LocalRows(_read_all(dataset, files))
    else:
        rows = _without_held_out(dataset, split, _rows_by_split(dataset, files, flag))
    if not rows:
        others = tuple(prefix for name in SPLITS if name != split for prefix in FILE_PREFIXES[name])
        elsewhere = all(file.name.startswith(others) for file in files)
        remedy = f"its files are named as another split's; rename them, or put {split}.jsonl beside them" if elsewhere else f"give more rows, or put {split}.jsonl beside them"
        dropped = f" ({describe_skipped(rows.left_out)})" if rows.left_out else ""
        raise UserError(f"{flag}: no rows for the {split} split{dropped}; {remedy}")
    return rows


def _rows_by_split(dataset: TextDataset, files: list[DataFile], flag: str) -> Callable[[str], list]:
    """split → its rows, which may stand in other splits, too. A file is read once."""
    named = {name: [file for file in files if file.name.startswith(FILE_PREFIXES[name])] for name in SPLITS}
    unnamed = [file for file in files if not any(file in group for group in named.values())]
    if unnamed and len(unnamed) < len(files):
        raise UserError(f"{flag}: some files are named by split, but {unnamed[0].path.name} is not; rename it, or give a glob without it")
    whole = cache(lambda: _read_all(dataset, unnamed or named["train"]))
    cut = [name for name in SPLITS if name == "train" or not named[name]]

    def rows_of(split: str) -> list:
        if split not in cut:
            return _read_all(dataset, named[split])
        return whole()[_share_slice(split, cut, len(whole()))]

    return rows_of


def _without_held_out(dataset: TextDataset, split: str, rows_of: Callable[[str], list]) -> LocalRows:
    """The rows of `split` that stand in no split before it in KEPT_IN."""
    earlier = KEPT_IN[: KEPT_IN.index(split)]
    held_out = {_identity(dataset, row) for name in earlier for row in rows_of(name)} - {None}
    rows = rows_of(split)
    kept = [row for row in rows if not held_out or _identity(dataset, row) not in held_out]
    return LocalRows(kept, +Counter({f"that stand in the {' or '.join(earlier)} split, too": len(rows) - len(kept)}))


def _identity(dataset: TextDataset, row: object) -> bytes | None:
    """A hash of what is learned from a row, whatever else stands in it; None where nothing is."""
    try:
        example = _parse(dataset, row)
    except SkipRow:
        return None
    return hashlib.sha256(json.dumps(example, sort_keys=True, default=str).encode()).digest()


def _share_slice(split: str, cut: list[str], count: int) -> slice:
    """The slice of `split` when `count` rows are cut into the splits `cut`, in order, in proportion to FILE_SHARE."""
    ends = list(accumulate((FILE_SHARE[name] for name in cut), initial=0.0))
    begin, end = (round(ends[cut.index(split) + i] / ends[-1] * count) for i in (0, 1))
    return slice(begin, end)


class DataFile(NamedTuple):
    """A local file, and the name that says which split it is: its own, or, in a saved `DatasetDict`, the split's."""

    name: str
    path: Path


def _data_files(path: str, flag: str) -> list[DataFile]:
    """The data files that `path` (a file, a folder or a glob, given by `flag`) names, sorted."""
    places = [Path(path)] if Path(path).exists() else [Path(match) for match in sorted(glob.glob(path))]
    found = [file for place in places for file in (_files_in(place) if place.is_dir() else [DataFile(place.stem, place)])]
    files = [file for file in found if file.path.suffix in READERS and file.path.name not in NOT_DATA]
    if not files:
        raise UserError(f"{flag}: no data there; give a file, folder or glob of {', '.join(READERS)} files")
    return files


def _files_in(folder: Path) -> list[DataFile]:
    """The files of a folder, or of the data set that `datasets` saved there, as its own list names them."""
    splits, state = _listed(folder / "dataset_dict.json", "splits"), _listed(folder / "state.json", "_data_files")
    if splits:
        return [DataFile(split, file.path) for split in splits for file in _files_in(folder / split)]
    if state:
        return [DataFile(Path(entry["filename"]).stem, folder / entry["filename"]) for entry in state]
    paths = [path for path in sorted(folder.iterdir()) if not path.is_dir() and not (path.suffix == ".arrow" and path.name.startswith(MAPPED))]
    return [DataFile(path.stem, path) for path in paths]


def _listed(file: Path, key: str) -> list | None:
    """The list that `datasets` wrote under `key` of `file`, or None where the file is not there or another's."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get(key) if isinstance(content, dict) else None


def _read_all(dataset: TextDataset, files: list[DataFile]) -> list:
    rows = [row for file in files for row in read_rows(file.path)]
    return rows if dataset.assemble is None else dataset.assemble(rows)


def read_rows(path: Path) -> list:
    """All rows of one JSON, JSONL, Parquet or Arrow file. Raises UserError for a file that is not what its name says, or cannot be read."""
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


def _decoded(raw: bytes, path: Path, number: int) -> str:
    """The text of line `number` of a file, or of a whole file that begins there."""
    for start, (what, remedy) in NO_TEXT.items():
        if number == 1 and raw.startswith(start):
            raise UserError(f"{path}: holds {what}; {remedy} {path}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = number + raw[: error.start].count(b"\n")
        raise UserError(f"{path}: not UTF-8 at line {line} ({error.reason}); convert it, e.g. from Latin-1 with: iconv -f latin1 -t utf-8 {path}") from error


def _read_jsonl(path: Path) -> list:
    rows, broken = [], []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decoded(raw, path, number)
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                broken.append((number, error.msg))
    if broken:
        number, reason = broken[0]
        remedy = f"mend it, or delete it with: sed -i '{number}d' {path}"
        raise UserError(f"{path}: {len(broken)} lines are not JSON, the first is line {number} ({reason}); {remedy}")
    return rows


def _read_json(path: Path) -> list:
    try:
        content = json.loads(_decoded(path.read_bytes(), path, 1))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno} ({error.msg}); a file with one object per line must be named .jsonl") from error
    if isinstance(content, dict):
        content = content.get("data", [content])
    if not isinstance(content, list):
        raise UserError(f"{path}: holds a {type(content).__name__}; it must hold a list of objects, one per row")
    return content


def _read_parquet(path: Path) -> list[dict]:
    parquet = import_optional("pyarrow.parquet", "datasets", str(path))
    return _read_arrow_table(path, lambda: parquet.ParquetFile(path).read())


def _read_arrow(path: Path) -> list[dict]:
    ipc = import_optional("pyarrow.ipc", "datasets", str(path))
    with path.open("rb") as file:
        is_stream = file.read(6) != b"ARROW1"  # `datasets` writes the stream format, pandas and others the file format
    return _read_arrow_table(path, lambda: (ipc.open_stream if is_stream else ipc.open_file)(str(path)).read_all())


def _read_arrow_table(path: Path, read: Callable) -> list[dict]:
    import pyarrow

    try:
        return read().to_pylist()
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a {path.suffix[1:]} file ({first_line(error)})") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}

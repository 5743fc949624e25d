"""Where rows of text come from: the hub, local JSON/JSONL/Parquet/Arrow files, or the suite itself.

A data set is a `TextDataset` record: how its rows are found and how one row becomes an *example*. An example is
`{"messages": [{"role", "content"}, ...]}` (a chat), `{"text": ...}` (plain text), and may carry `"loss_on":
"assistant"` where the data set itself says which part is learned.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from command_line import UserError

SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant")
SHUFFLE_BUFFER = 10_000


class SkipRow(ValueError):
    """A row that cannot be used; its message is the reason that is counted and shown."""


@dataclass(frozen=True)
class TextDataset:
    """One data set: `parse(row) -> example` (raises SkipRow) and one of the three places that its rows come from."""

    name: str
    parse: Callable[[dict], dict]
    hub_id: str | None = None
    hub_config: str | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    make_rows: Callable[[str], list[dict]] | None = None
    file_share: dict[str, float] = field(default_factory=lambda: {"train": 0.9, "validation": 0.05, "test": 0.05})


class ExampleStream:
    """An endless, resumable stream of the examples of one data set, reshuffled each epoch by `seed`.

    `position` counts the raw rows that were consumed; a stream that starts at a saved position continues exactly.
    Unusable rows are counted by reason in `skipped`.
    """

    def __init__(self, dataset: TextDataset, rows: Sequence[dict], seed: int, shuffle: bool = True) -> None:
        self.dataset, self.rows, self.seed, self.shuffle = dataset, rows, seed, shuffle
        self.position = {"epoch": 0, "row": 0}
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield from self.rest_of_epoch()
            if self.position["row"] == sum(self.skipped.values()) and self.position["epoch"] == 0:
                raise UserError(f"--dataset {self.dataset.name}: no usable example; {describe_skipped(self.skipped)}")
            self.position = {"epoch": self.position["epoch"] + 1, "row": 0}

    def rest_of_epoch(self) -> Iterator[dict]:
        """The usable examples from the current position to the end of the epoch."""
        for row in self._ordered_rows():
            self.position["row"] += 1
            try:
                example = self.dataset.parse(row)
            except SkipRow as reason:
                self.skipped[str(reason)] += 1
            else:
                yield example

    def _ordered_rows(self) -> Iterator[dict]:
        epoch, start = self.position["epoch"], self.position["row"]
        if not isinstance(self.rows, Sequence) and not hasattr(self.rows, "__len__"):
            rows = self.rows.shuffle(seed=self.seed + epoch, buffer_size=SHUFFLE_BUFFER) if self.shuffle else self.rows
            yield from rows.skip(start)
            return
        order = range(len(self.rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.rows), generator=generator).tolist()
        for index in order[start:]:
            yield self.rows[index]


def describe_skipped(skipped: Counter[str]) -> str:
    """"3 rows skipped (2 no answer, 1 ...)", or "no rows skipped"."""
    if not skipped:
        return "no rows skipped"
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return f"{sum(skipped.values())} rows skipped ({reasons})"


def parse_messages(row: dict) -> dict:
    """A row with `messages` of `role` and `content` (UltraChat's form) as a chat."""
    return {"messages": clean_messages(row.get("messages"), "role", "content", {role: role for role in ROLES})}


def clean_messages(turns: object, role_key: str, content_key: str, roles: dict[str, str]) -> list[dict]:
    """The turns of a chat as `role`/`content` messages that start with the user and alternate; else SkipRow.

    Leading turns before the first user turn (a system prompt excepted) and a trailing unanswered user turn are cut,
    as templates want a user first and an answer is what is learned from.
    """
    if not isinstance(turns, list) or not turns:
        raise SkipRow("without a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(content_key), str):
            raise SkipRow("with a broken turn")
        role = roles.get(turn.get(role_key))
        if role is None:
            raise SkipRow(f"with a turn of role {turn.get(role_key)!r}")
        messages.append({"role": role, "content": turn[content_key].strip()})
    return _user_first(messages)


def _user_first(messages: list[dict]) -> list[dict]:
    system = messages[:1] if messages[0]["role"] == "system" else []
    chat = messages[len(system):]
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


def open_rows(dataset: TextDataset, split: str, path: str | None = None) -> Sequence[dict]:
    """Rows of `split`: from the files at `path` where given, else from the data set's own place.

    Local files are cut into the three splits by `file_share`, unless their names carry the split
    (`train*.jsonl`, `validation*.jsonl`, `test*.jsonl`). Raises UserError with the remedy.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if path is not None:
        return _split_of_files(dataset, split, path)
    if dataset.make_rows is not None:
        return dataset.make_rows(split)
    return _hub_rows(dataset, split)


def _hub_rows(dataset: TextDataset, split: str) -> Sequence[dict]:
    import datasets  # heavy, and not needed for local files

    try:
        return datasets.load_dataset(dataset.hub_id, dataset.hub_config, split=dataset.hub_splits[split], streaming=dataset.streaming)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--dataset {dataset.name}: {dataset.hub_id} could not be read from the hub ({str(error).splitlines()[0]}); "
            f"check the network, or give local files of the same form with --dataset_path"
        ) from error


def _split_of_files(dataset: TextDataset, split: str, path: str) -> list[dict]:
    files = _data_files(path)
    named = [file for file in files if file.stem.startswith(split)]
    if named or any(file.stem.startswith(SPLITS) for file in files):
        rows = [row for file in named for row in read_rows(file)]
    else:
        rows = [row for file in files for row in read_rows(file)]
        rows = rows[_share_slice(dataset, split, len(rows))]
    if not rows:
        raise UserError(f"--dataset_path {path}: no rows for the {split} split; give a larger file, or one named {split}.jsonl beside it")
    return rows


def _share_slice(dataset: TextDataset, split: str, count: int) -> slice:
    """The slice of `split` when `count` rows are cut in the order train, validation, test."""
    before = sum(dataset.file_share[name] for name in SPLITS[: SPLITS.index(split)])
    return slice(round(before * count), round((before + dataset.file_share[split]) * count))


def _data_files(path: str) -> list[Path]:
    """The data files that `path` (a file, a folder or a glob) names, sorted."""
    candidates = [Path(match) for match in sorted(glob.glob(path))]
    if len(candidates) == 1 and candidates[0].is_dir():
        candidates = sorted(candidates[0].iterdir())
    files = [file for file in candidates if file.suffix in READERS]
    if not files:
        raise UserError(f"--dataset_path {path}: no such data; give a file, folder or glob of {', '.join(READERS)} files")
    return files


def read_rows(path: Path) -> list[dict]:
    """All rows of one JSON, JSONL, Parquet or Arrow file. Raises UserError for a file that is not what its name says."""
    rows = READERS[path.suffix](path)
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: every row must be a JSON object; found a {type(next(r for r in rows if not isinstance(r, dict))).__name__}")
    return rows


def _read_jsonl(path: Path) -> list[dict]:
    rows, broken = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                broken.append((number, error.msg))
    if broken:
        number, reason = broken[0]
        raise UserError(f"{path}: {len(broken)} lines are not JSON, the first is line {number} ({reason}); mend or delete them: sed -i '{number}d' {path}")
    return rows


def _read_json(path: Path) -> list[dict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno} ({error.msg}); a file with one object per line must be named .jsonl") from error
    if isinstance(content, dict):
        content = content.get("data", [content])
    return content


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet  # comes with `datasets`

    return _read_arrow_table(path, pyarrow.parquet.read_table)


def _read_arrow(path: Path) -> list[dict]:
    import datasets

    return _read_arrow_table(path, lambda name: datasets.Dataset.from_file(name).data.table)


def _read_arrow_table(path: Path, read: Callable) -> list[dict]:
    import pyarrow

    try:
        return read(str(path)).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a {path.suffix[1:]} file ({str(error).splitlines()[0]})") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}

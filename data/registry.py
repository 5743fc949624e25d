"""Every data set by name: what `--dataset` accepts, and how a command opens one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import islice

from running.command_line import UserError

import share_gpt_dataset
import slim_pj_dataset
import ultrachat_dataset
import xsum_dataset
from data import arithmetic, c4, cnn, fineweb, gsm8k, llava, lmsys, mt_bench, oasst, openwebtext, pydoc_texts, shapes
from data.row_files import ExampleStream, MixedStream, TextDataset, check_learnable, open_rows

_MODULES = (
    ultrachat_dataset, share_gpt_dataset, oasst, lmsys, slim_pj_dataset, fineweb, c4, openwebtext,
    cnn, xsum_dataset, gsm8k, mt_bench, pydoc_texts, arithmetic, shapes, llava,
)
DATASETS: dict[str, TextDataset] = {module.DATASET.name: module.DATASET for module in _MODULES}
ALIASES = {"oasst1": "oasst", "lmsys-chat-1m": "lmsys"}  # as the hub calls them
FINGERPRINT_ROWS = 100


def find_dataset(name: str) -> TextDataset:
    """The data set called `name`. Raises UserError naming the known ones."""
    name = ALIASES.get(name, name)
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def open_stream(name: str, split: str, path: str | None = None, seed: int = 0, shuffle: bool = True) -> ExampleStream:
    """An endless stream of examples of `name` (see ExampleStream). Raises UserError for unknown names and bad files."""
    dataset = find_dataset(name)
    return ExampleStream(dataset, open_rows(dataset, split, path), seed, shuffle)


def check_mixture(names: Sequence[str], weights: Sequence[float] | None, path: str | None) -> None:
    """Raise UserError where `open_mixture` would for its arguments, to learn from; nothing is read."""
    for name in names:
        check_learnable(find_dataset(name))
    found = [find_dataset(name).name for name in names]
    twice = [name for i, name in enumerate(found) if name in found[:i]]
    if twice:
        raise UserError(f"--dataset names {twice[0]} twice; name it once, with a larger weight in --mix")
    if path is not None and len(names) > 1:
        raise UserError(f"--dataset_path {path}: holds the files of one data set, --dataset names {len(names)}; name one, or leave the path out")
    if weights and len(weights) != len(names):
        raise UserError(f"--mix has {len(weights)} weights for {len(names)} data sets; give one for each: --mix {' '.join('1' * len(names))}")
    if weights and not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"--mix {' '.join(f'{weight:g}' for weight in weights)}: must be positive numbers; leave out a data set that is not wanted")


def open_mixture(
    names: Sequence[str], weights: Sequence[float] | None, split: str, path: str | None = None, seed: int = 0
) -> ExampleStream | MixedStream:
    """A stream of the examples of one data set, or of several mixed in proportion to `weights` (none: in equal parts).

    Raises UserError for weights that do not fit, a data set named twice, files for several, and as `open_stream` does.
    """
    check_mixture(names, weights, path)
    streams = [open_stream(name, split, path, seed) for name in names]
    return streams[0] if len(streams) == 1 else MixedStream(streams, weights or [1.0] * len(streams), seed)


def fingerprint(stream: ExampleStream | MixedStream) -> dict:
    """What identifies the data: name, number of rows (None for a hub stream), and a hash.

    The hash is of all rows that are in memory, and of the first FINGERPRINT_ROWS of others (the hub's, and drawn ones).
    A mixture is its name, its shares and its sources.
    """
    if isinstance(stream, MixedStream):
        return {"dataset": stream.dataset.name, "shares": list(stream.dataset.shares), "sources": [fingerprint(source) for source in stream.streams]}
    rows = stream.rows if isinstance(stream.rows, list) else islice(iter(stream.rows), FINGERPRINT_ROWS)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return {"dataset": stream.dataset.name, "rows": stream.num_rows, "sha256": digest.hexdigest()[:16]}

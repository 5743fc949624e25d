"""Every data set by name: what `--dataset` accepts, and how a command opens one."""

from __future__ import annotations

import hashlib
import json
from itertools import islice

from command_line import UserError

import arithmetic_dataset
import c4_dataset
import cnn_dataset
import fineweb_dataset
import gsm8k_dataset
import mt_bench_dataset
import openwebtext_dataset
import pydoc_dataset
import share_gpt_dataset
import slim_pj_dataset
import ultrachat_dataset
import xsum_dataset
from row_files import ExampleStream, TextDataset, open_rows

_MODULES = (
    ultrachat_dataset, share_gpt_dataset, slim_pj_dataset, fineweb_dataset, c4_dataset, openwebtext_dataset, cnn_dataset,
    xsum_dataset, gsm8k_dataset, mt_bench_dataset, pydoc_dataset, arithmetic_dataset,
)
DATASETS: dict[str, TextDataset] = {module.DATASET.name: module.DATASET for module in _MODULES}
FINGERPRINT_ROWS = 100


def find_dataset(name: str) -> TextDataset:
    """The data set called `name`. Raises UserError naming the known ones."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def open_stream(name: str, split: str, path: str | None = None, seed: int = 0, shuffle: bool = True) -> ExampleStream:
    """An endless stream of examples of `name` (see ExampleStream). Raises UserError for unknown names and bad files."""
    dataset = find_dataset(name)
    return ExampleStream(dataset, open_rows(dataset, split, path), seed, shuffle)


def fingerprint(stream: ExampleStream) -> dict:
    """What identifies the data: name, number of rows (None for a hub stream), and a hash.

    The hash is of all rows that are in memory (made by the suite, local files), of the hub's first FINGERPRINT_ROWS.
    """
    rows = stream.rows if isinstance(stream.rows, list) else islice(iter(stream.rows), FINGERPRINT_ROWS)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return {"dataset": stream.dataset.name, "rows": stream.num_rows, "sha256": digest.hexdigest()[:16]}

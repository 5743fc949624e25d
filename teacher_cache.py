"""What a frozen target makes of a text, on disk: later epochs and runs over the same texts need only the blocks that their exits read.

Logits are V numbers a token, the normed last hidden state that they are a product of only D: 4 kB a token for Llama-3.2-1B in bf16, 4 GB for a million.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from itertools import count
from pathlib import Path

from command_line import UserError

import numpy as np
import torch

from results import make_output_dir, read_config, write_json

CONFIG_NAME = "config.json"
KEY_BYTES = 16
ENTRY = np.dtype([("key", f"V{KEY_BYTES}"), ("start", "<i8"), ("tokens", "<i8")])  # of an index: where in the .states of the same name a text's rows are


class TeacherCache:
    """States (T, `width`) of `dtype` by text, in `folder`. `target_hash` says whose they are.

    Each process appends to a pair of files that no other has in hand, <number>.states and <number>.index, and reads what was in all of them when it began.
    Raises UserError for a folder that holds something else, or another target's states.
    """

    def __init__(self, folder: str, target_hash: str, width: int, dtype: torch.dtype) -> None:
        self.folder, self.width, self.dtype = make_output_dir(folder), width, dtype
        self._check_owner({"target_hash": target_hash, "width": width, "dtype": str(dtype)})
        self._index, self._states = self._own_files()
        self._places: dict[bytes, tuple[int, int, int]] = {}  # key -> descriptor, first row, rows
        for index in sorted(self.folder.glob("*.index")):
            self._read(index)

    def find(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """States (B, T, D) of all rows, zero where they are padded; None where one is missing."""
        places = [self._places.get(key) for key in _keys(input_ids, attention_mask)]
        if None in places:
            return None
        found = torch.zeros(*input_ids.shape, self.width, dtype=self.dtype)
        row_bytes = self.width * self.dtype.itemsize
        for row, (file, start, tokens) in zip(found, places, strict=True):
            row[:tokens] = torch.frombuffer(bytearray(os.pread(file, tokens * row_bytes, start * row_bytes)), dtype=self.dtype).view(tokens, self.width)
        return found.to(input_ids.device)

    def keep(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, states: torch.Tensor) -> None:
        """Append the rows of `states` (B, T, D) that are not there yet; a killed process loses at most the last of them. Raises UserError on a full disk."""
        try:
            self._append(_keys(input_ids, attention_mask), states.to("cpu", self.dtype), attention_mask.sum(-1).tolist())
        except OSError as error:
            raise UserError(f"cannot write to --teacher_cache {self.folder} ({error.strerror}); make room, and continue with the same command and --resume") from error

    def _append(self, keys: list[bytes], states: torch.Tensor, counts: list[int]) -> None:
        for key, row, tokens in zip(keys, states, counts, strict=True):
            if key not in self._places:
                start = os.fstat(self._states).st_size // (self.width * self.dtype.itemsize)
                _write(self._states, row[:tokens].contiguous().view(torch.uint8).numpy().tobytes())
                _write(self._index, np.array([(key, start, tokens)], ENTRY).tobytes())
                self._places[key] = (self._states, start, tokens)

    def _check_owner(self, facts: dict) -> None:
        known = read_config(self.folder)
        if known is None and any(self.folder.iterdir()):
            raise UserError(f"--teacher_cache {self.folder}: holds other files; choose a new folder")
        if known is None:
            write_json(self.folder / CONFIG_NAME, facts)
        elif known != facts:
            raise UserError(f"--teacher_cache {self.folder}: holds states of another target or dtype; choose another folder")

    def _read(self, index: Path) -> None:
        """Take over the entries of `index` whose rows are there."""
        file = os.open(index.with_suffix(".states"), os.O_RDONLY)
        rows = os.fstat(file).st_size // (self.width * self.dtype.itemsize)
        content = index.read_bytes()
        for entry in np.frombuffer(content[: len(content) // ENTRY.itemsize * ENTRY.itemsize], ENTRY):
            if entry["start"] + entry["tokens"] <= rows:
                self._places[entry["key"].tobytes()] = (file, int(entry["start"]), int(entry["tokens"]))

    def _own_files(self) -> tuple[int, int]:
        """Descriptors of the first index that no other process has locked, and of its states, cut behind their last whole records."""
        for number in count():
            index, states = (os.open(self.folder / f"{number}.{suffix}", os.O_RDWR | os.O_CREAT | os.O_APPEND) for suffix in ("index", "states"))
            try:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(index)
                os.close(states)
                continue
            for file, size in ((index, ENTRY.itemsize), (states, self.width * self.dtype.itemsize)):
                os.ftruncate(file, os.fstat(file).st_size // size * size)
            return index, states


def _keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[bytes]:
    """What tells the text of each row from others."""
    texts = (row[mask.bool()].numpy().tobytes() for row, mask in zip(input_ids.cpu(), attention_mask.cpu(), strict=True))
    return [hashlib.blake2b(text, digest_size=KEY_BYTES).digest() for text in texts]


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]

"""What a frozen target makes of a text, on disk: later epochs and runs over the same texts need only the blocks that their exits read.

States are those of the batch in which a text came first: in a batch of another width they would differ by rounding.
Logits are V numbers a token, the normed last hidden state that they are a product of only D: 4 kB a token for Llama-3.2-1B in bf16, 4 GB for a million.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from io import FileIO
from itertools import count
from pathlib import Path

from running.command_line import UserError

import numpy as np
import torch

from running.run_files import make_output_dir, read_config, write_json

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
        self._places: dict[bytes, tuple[FileIO, int, int]] = {}  # key -> file, first row, rows
        for index in sorted(self.folder.glob("*.index")):
            self._read(index)

    def find(self, keys: list[bytes], length: int) -> torch.Tensor | None:
        """States (B, `length`, D), on the CPU, of the texts with these B keys, zero behind their ends; None where one is missing."""
        places = [self._places.get(key) for key in keys]
        if None in places:
            return None
        found = torch.zeros(len(keys), length, self.width, dtype=self.dtype)
        row_bytes = self.width * self.dtype.itemsize
        for row, (file, start, tokens) in zip(found, places, strict=True):
            row[:tokens] = torch.frombuffer(bytearray(os.pread(file.fileno(), tokens * row_bytes, start * row_bytes)), dtype=self.dtype).view(tokens, self.width)
        return found

    def keep(self, keys: list[bytes], states: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Append the rows of `states` (B, T, D) that are not there yet; a killed process loses at most the last of them. Raises UserError on a full disk."""
        try:
            self._append(keys, states.to("cpu", self.dtype), attention_mask.sum(-1).tolist())
        except OSError as error:
            raise UserError(f"cannot write to --teacher_cache {self.folder} ({error.strerror}); make room, and continue with the same command and --resume") from error

    def _append(self, keys: list[bytes], states: torch.Tensor, counts: list[int]) -> None:
        for key, row, tokens in zip(keys, states, counts, strict=True):
            if key not in self._places:
                start = _size(self._states) // (self.width * self.dtype.itemsize)
                _write(self._states, row[:tokens].contiguous().view(torch.uint8).numpy().tobytes())
                _write(self._index, np.array([(key, start, tokens)], ENTRY).tobytes())
                self._places[key] = (self._states, start, tokens)

    def _check_owner(self, facts: dict) -> None:
        foreign = [path.name for path in self.folder.iterdir() if not path.name.startswith((".writable.", CONFIG_NAME)) and path.suffix not in (".index", ".states")]
        if foreign:
            raise UserError(f"--teacher_cache {self.folder}: holds other files, such as {foreign[0]}; choose a new folder")
        if read_config(self.folder) is None:
            write_json(self.folder / CONFIG_NAME, facts)
        if read_config(self.folder) != facts:
            raise UserError(f"--teacher_cache {self.folder}: holds states of another target or dtype; choose another folder")

    def _read(self, index: Path) -> None:
        """Take over the entries of `index` whose rows are there."""
        file = index.with_suffix(".states").open("rb", buffering=0)
        for entry in self._entries(index.read_bytes(), file):
            self._places[entry["key"].tobytes()] = (file, int(entry["start"]), int(entry["tokens"]))

    def _entries(self, content: bytes, states: FileIO) -> np.ndarray:
        """The whole entries of an index, up to the first one whose rows are not all there."""
        entries = np.frombuffer(content[: len(content) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        torn = entries["start"] + entries["tokens"] > _size(states) // (self.width * self.dtype.itemsize)
        return entries[: torn.argmax() if torn.any() else len(entries)]

    def _own_files(self) -> tuple[FileIO, FileIO]:
        """The first index that no other process has locked, and its states, without what a killed one left torn."""
        for number in count():
            states, index = ((self.folder / f"{number}.{suffix}").open("ab+", buffering=0) for suffix in ("states", "index"))
            try:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            row_bytes = self.width * self.dtype.itemsize
            states.truncate(_size(states) // row_bytes * row_bytes)
            index.truncate(self._entries(os.pread(index.fileno(), _size(index), 0), states).nbytes)  # else they would point at what is appended now
            return index, states


def text_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[bytes]:
    """What tells the text of each row of (B, T) from others."""
    texts = (row[mask.bool()].numpy().tobytes() for row, mask in zip(input_ids.cpu(), attention_mask.cpu(), strict=True))
    return [hashlib.blake2b(text, digest_size=KEY_BYTES).digest() for text in texts]


def _size(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _write(file: FileIO, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]

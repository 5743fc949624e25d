"""A JSONL file that one process at a time appends records to: every line that was written stays, whatever kills the process."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType

from running.command_line import UserError


class RecordFile:
    """The records in `path`, made where missing, locked until closed. `torn`: whether it ends in half a line, which the first new record replaces.

    Raises UserError where another process has the file, it cannot be written to, or a whole line is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write to {path} ({error.strerror}); choose another --out") from error
        try:
            self._lock()
            self._file.seek(0)
            content = self._file.read()
            self._end = content.rfind(b"\n") + 1
            self.torn = self._end < len(content)
            self.records = parse_lines(content[: self._end], path)
        except UserError:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path} is being written by another process; wait for it, or choose another --out") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be locked ({error.strerror}); choose an --out on another file system") from error

    def append(self, record: dict) -> None:
        """Add one record; it is on the disk when this returns. Raises UserError on a full disk, the file as it was."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            self._file.truncate(self._end)
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._end)
            raise UserError(f"cannot write to {self.path} ({error.strerror}); make room and start the same command again: it goes on where it stopped") from error
        self._end += len(line)
        self.records.append(record)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def parse_lines(content: bytes, path: Path) -> list[dict]:
    """The objects of whole lines. Raises UserError naming the first line that is none."""
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line, parse_constant=_no_number)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); delete the line, or choose another file") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not an object; delete the line, or choose another file")
        found.append(record)
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def read_records(path: Path) -> list[dict]:
    """The records of a file, without half a last line. Raises UserError where it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that benchmark.py wrote") from error
    return parse_lines(content[: content.rfind(b"\n") + 1], path)

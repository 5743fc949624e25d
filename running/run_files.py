"""Files that runs leave behind: CSV rows, and the record of how a run was made.

Whole files are replaced atomically; rows are appended and flushed, and a torn last line (a killed process) is
dropped when read.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from running.command_line import UserError, first_line

import pandas as pd
from safetensors import SafetensorError

MANIFEST_NAME = "manifest.json"
MANIFEST_LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "numpy", "pandas", "pillow")


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A new name beside `path`, to write a file or folder to that takes its place at the end: others see the old one or the new one, never half of it. Where
    writing fails it is gone again, and an OSError names `path`."""
    partial = path.with_name(f"{path.name}.{uuid4().hex[:12]}.partial")  # nobody else's
    try:
        with naming(path):
            yield partial
            partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors in writing `path` name it: those of a full disk name no file, and those of safetensors are no OSErrors."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(path)) from error
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(path)):  # or is it a name of `in_one_step`
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with in_one_step(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """`content` as JSON proper, which knows no NaN and no infinity: see `finite`."""
    write_text(path, json.dumps(finite(content), indent=2, default=str, allow_nan=False) + "\n")


def finite(content: object) -> object:
    """`content` without the entries of its dictionaries that are NaN or infinite, as no number is absent, and null for those of its lists."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items() if _is_finite(value)}
    if isinstance(content, list | tuple):
        return [finite(value) if _is_finite(value) else None for value in content]
    return content


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def append_csv(path: Path, row: dict, columns: list[str]) -> None:
    """Append `row` to the table of `columns` at `path`, which begins with their names; a number that the row lacks stays empty."""
    new = not path.exists()
    with naming(path), path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(finite(row))


def read_csv_log(path: Path) -> pd.DataFrame:
    """The rows of a table that `append_csv` made; a last line that is cut off is left out."""
    text = path.read_text(encoding="utf-8")
    try:
        return pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]))
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is no table of a training run ({first_line(error)}); mend or delete it") from error


def drop_later_rows(path: Path, step: int) -> None:
    """Cut a log back to `step` (0: nothing stays): what a killed run logged after its last save will be logged again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if step == 0 or not lines:
        path.unlink()
        return
    try:
        kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= step]
    except ValueError as error:
        raise UserError(f"{path} is no table of a training run ({first_line(error)}); mend or delete it") from error
    write_text(path, "".join([lines[0], *kept]))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Replace `path` by a table of `rows`; a number that a row lacks stays empty."""
    write_text(path, pd.DataFrame(rows).to_csv(index=False))


def new_output_dir(path: str, result: str, kind: str) -> Path:
    """The folder `path`, made where missing. Raises UserError when it has the file `result` already (`kind` says what that is) or cannot be written to."""
    folder = make_output_dir(path)
    if (folder / result).exists():
        raise UserError(f"{folder} holds {kind} already; choose another --out_dir")
    return folder


def make_output_dir(path: str) -> Path:
    """The folder `path`, made where missing. Raises UserError when it cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}); choose another output directory") from error
    return folder


def record_run(folder: Path, args: object, facts: dict | None = None) -> None:
    """Write how this run was made into `folder`: `cmd.txt`, `config.json` and `manifest.json`.

    `facts` identify the inputs beside the flags (hashes, a data set's fingerprint). cmd.txt and manifest.json get an
    entry for every start of a run that is resumed.
    """
    starts = read_manifest(folder)
    commands = folder / "cmd.txt"
    with naming(commands), commands.open("a", encoding="utf-8") as file:
        file.write(typed_command() + "\n")
    flags = {**dataclasses.asdict(args), **(facts or {})}
    write_json(folder / "config.json", flags)
    write_json(folder / MANIFEST_NAME, [*starts, {**environment(), "seed": flags.get("seed"), **(facts or {})}])


def file_hash(path: str | Path) -> str:
    """Identifies a file by its bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def typed_command() -> str:
    """The command line of this process, as it would be typed at the root of the suite."""
    return shlex.join([Path(sys.executable).name, *command_words()])


def command_words() -> list[str]:
    """What stands behind `python` there: started with -m, sys.argv names the module's file instead, by its whole path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started = ["-m", spec.name] if spec is not None and spec.origin == sys.argv[0] else [sys.argv[0]]
    return [*started, *sys.argv[1:]]


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def environment() -> dict:
    """Date, git revision, library versions and the machine of this process."""
    import torch  # not needed by those who only read results

    status = _git("status", "--porcelain")
    manifest = {
        "date": now(),
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in MANIFEST_LIBRARIES},
    }
    if torch.cuda.is_available():
        manifest |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": _driver_version()}
    return manifest


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the suite's folder, or None outside a checkout. Whoever owns it: in a container root works in a user's folder."""
    return _output_of(["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent), *arguments])


def _driver_version() -> str | None:
    return _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def display_active() -> str | None:
    """"enabled" where a GPU drives a display, "disabled" where none does, None where nvidia-smi cannot tell."""
    answer = _output_of(["nvidia-smi", "--query-gpu=display_active", "--format=csv,noheader"])
    if not answer:
        return None
    return "enabled" if any(line.strip().lower() in ("enabled", "on", "active") for line in answer.splitlines()) else "disabled"


def _output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_config(folder: Path) -> dict | None:
    """The flags of the run recorded in `folder`, or None. Raises UserError for a file that was written by halves."""
    return _read_record(folder / "config.json", dict, "restore it, or choose another output directory: without it nobody knows how the rest was made")


def read_manifest(folder: Path) -> list[dict]:
    """What is recorded of each start of the run in `folder`. Raises UserError for a file that was written by halves."""
    return _read_record(folder / MANIFEST_NAME, list, "delete it: it lists earlier starts, and nothing else is lost") or []


def _read_record(path: Path, kind: type, remedy: str) -> dict | list | None:
    """The content of a JSON file, or None where there is none. Raises UserError where it is no `kind`."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); {remedy}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: holds a {type(content).__name__}; {remedy}")
    return content

"""What every command does before its work: check versions, parse flags, and turn a user's mistake into one line.

Import it before anything that needs a particular version of transformers: it checks the versions at import.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

# Lowest admitted version and first excluded one; the same ranges stand in requirements/. A pre-release counts as its release: NVIDIA's 2.6.0a0 as 2.6.
SUPPORTED = {"python": ("3.10", "3.14"), "torch": ("2.6", "2.16"), "transformers": ("5.17", "6")}
NO_IMPORT = ("5.18", "5.19")  # of transformers: beside torch 2.6 they fail at import where no GPU is seen; refused beside every torch, to keep it simple

MAY_REPEAT = ("mix",)  # lists whose values go with those of another flag, one by one
MAY_BE_EMPTY = ("notes", "system_prompt", "prompt")  # texts
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what no command can help: a disk that is full, or takes nothing more
LARGEST_INT = 2**62  # what is added to a seed must fit beside it

Args = TypeVar("Args")


class UserError(Exception):
    """A mistake that the user can mend: the message says what is wrong, the value, and what to type."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is none, to quote in a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_optional(module: str, package: str, needed_by: str) -> ModuleType:
    """`module`, imported where it is used. Raises UserError with the `package` to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{needed_by} needs {error.name}, which is not installed; run: pip install {package}") from error


def version_complaint(package: str, version: str) -> str | None:
    """Why `version` of `package` is outside SUPPORTED, or None."""
    lowest, excluded = SUPPORTED[package]
    if not _release(lowest) <= _release(version) < _release(excluded):
        needs = f">= {lowest} and < {excluded}"
    elif package == "transformers" and _release(version) in map(_release, NO_IMPORT):
        needs = f"a version other than {' and '.join(NO_IMPORT)}"
    else:
        return None
    return f"{package} {version} is not supported: needs {needs}; run: pip install -r requirements.txt"


def _release(version: str) -> list[int]:
    """The first two numbers of a version."""
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:2]]


def pair_complaint(torch: str, transformers: str, requirements: Sequence[str]) -> str | None:
    """Why the `transformers` that has these `requirements` in its metadata doesn't take `torch`, or None. Such a transformers switches PyTorch off and says so late or not at all."""
    from packaging.requirements import Requirement

    for needed in map(Requirement, filter(re.compile(r"torch(?![\w.-])").match, requirements)):
        if (needed.marker is None or needed.marker.evaluate({"extra": "torch"})) and not needed.specifier.contains(torch, prereleases=True):
            return f"transformers {transformers} needs torch{needed.specifier} and finds {torch}; run: pip install -r requirements.txt"
    return None


def check_versions() -> None:
    """Exit with one line if Python, torch or transformers lies outside the supported range, or the two do not go together."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            _exit(f"{package} is not installed; run: pip install -r requirements.txt")
    complaints = [version_complaint(package, version) for package, version in versions.items()]
    complaints.append(pair_complaint(versions["torch"], versions["transformers"], importlib.metadata.requires("transformers") or ()))
    for complaint in filter(None, complaints):
        _exit(complaint)


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(args_class: type[Args], argv: list[str] | None = None) -> Args:
    """An `args_class` (a dataclass whose fields carry their help) from `argv`; unknown flags are errors."""
    from transformers import HfArgumentParser

    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the flags")

    parser = HfArgumentParser(args_class, allow_abbrev=False)
    parser.error = refuse
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=3, cutoff=0.5)
        suggestion = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown argument {unknown[0]}: {suggestion}known flags: {' '.join(sorted(set(known)))}")
    for name, value in vars(args).items():
        check_value(name, value)
    return args_class(**vars(args))


def check_value(name: str, value: object) -> None:
    """Raise UserError for what no flag can be: an empty name, nan or an infinity, a number that int64 does not hold with what is
    added to it, and a list that names something twice."""
    values = value if isinstance(value, list) else [value]
    if "" in values and name not in MAY_BE_EMPTY:
        raise UserError(f'--{name} "": is empty; give a value, or leave the flag out')
    for one in values:
        if isinstance(one, float) and not math.isfinite(one):
            raise UserError(f"--{name} {one}: must be a finite number")
        if isinstance(one, int) and not -LARGEST_INT <= one <= LARGEST_INT:
            raise UserError(f"--{name} {one}: is too large a number; give one between -2^62 and 2^62")
    if name in MAY_REPEAT:
        return
    same = [_as_compared(one) for one in values]
    if any(one in same[:i] for i, one in enumerate(same)):
        raise UserError(f"--{name} {' '.join(map(str, values))}: one stands twice; give each once")


def _as_compared(value: object) -> object:
    """What two spellings of one number, or of one path, have in common."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return os.path.normpath(value) if isinstance(value, str) else value


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its status. A UserError, logits that are not finite (decoding/state.py) and a disk with no room become one line on stderr and exit code 2."""
    try:
        status = main()
    except (UserError, FloatingPointError) as error:
        _exit(str(error))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _exit(f"cannot write{f' to {error.filename}' if error.filename else ''} ({error.strerror}); make room, and start the same command again: "
              "what was written before stays")
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


check_versions()

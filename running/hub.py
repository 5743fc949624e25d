"""What the Hugging Face hub gives: a model's files, all of them or none, and one line with the remedy for what it does not give."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from running.command_line import UserError, first_line

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # settings and tokenizers
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first of these that a model has
LOG_IN = "run hf auth login (or set HF_TOKEN)"
OFFLINE = ("is not downloaded, and HF_HUB_OFFLINE is set", "unset it")
GATED = re.compile("is a gated dataset|Cannot access gated repo")  # `datasets` does not always keep the hub's own error
CACHE_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@cache
def model_folder(name: str, weights: bool = False) -> str:
    """The folder `name`, or the one in which the hub's model of that name lies: its small files, or with its `weights`. Raises UserError.

    transformers takes a small file that could not be read for one that is not there, and goes on without a chat template or with other end tokens.
    So all files are fetched first, the weights last: a copy that has its weights is whole, and is used where the hub does not give the model.
    """
    if Path(name).exists():
        return name
    with hub_errors(f"no model at {name}: it", name, "give a folder with config.json"):
        try:
            check_reachable(name)
            return _downloaded(name, weights)
        except (OSError, HTTPError):
            kept = _kept(name, weights)
            if kept is None:
                raise
            return kept


def check_reachable(name: str, repo_type: str = "model", revision: str | None = None) -> None:
    """Ask the hub once, with a limit of time; the libraries wait minutes for a silent one, or for ever. Raises what the hub's client does."""
    HfApi().repo_info(name, repo_type=repo_type, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _downloaded(name: str, weights: bool) -> str:
    folder = snapshot_download(name, allow_patterns=SMALL_FILES)
    for pattern in WEIGHTS if weights else ():
        folder = snapshot_download(name, allow_patterns=[*SMALL_FILES, pattern])
        if any(Path(folder).glob(pattern)):
            break
    return folder


def _kept(name: str, weights: bool) -> str | None:
    """The copy that was downloaded before, if it is whole."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=SMALL_FILES, local_files_only=True))
    except OSError:
        return None
    return str(folder) if (folder / "config.json").exists() and (not weights or _has_weights(folder)) else None


def _has_weights(folder: Path) -> bool:
    """Whether every file of the weights is there."""
    indices = [json.loads(path.read_text())["weight_map"] for path in folder.glob("*.index.json")]
    if indices:
        return any(all((folder / name).exists() for name in index.values()) for index in indices)
    return any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))


@contextmanager
def hub_errors(subject: str, name: str, instead: str, repo_type: str = "model") -> Iterator[None]:
    """Turns what the hub's libraries raise into a UserError: `subject` and what happened to it; the remedy, or `instead`."""
    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        what, remedy = _diagnosis(error, name, repo_type)
        raise UserError(f"{subject} {what}; {remedy}, or {instead}") from error


def _diagnosis(error: BaseException, name: str, repo_type: str) -> tuple[str, str]:
    """What the hub did, and the remedy, from the first cause that tells."""
    causes = list(_causes(error))
    told = next(filter(None, (_told_by(cause, name, repo_type) for cause in causes)), None)
    if told is None and constants.HF_HUB_OFFLINE and isinstance(error, OSError):
        return OFFLINE
    return told or (f"could not be read from the hub ({first_line(causes[-1])})", "check the network and try again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _told_by(error: BaseException, name: str, repo_type: str) -> tuple[str, str] | None:
    """What one error says of the hub, and the remedy; None where it says nothing."""
    if isinstance(error, GatedRepoError) or GATED.search(str(error)):
        page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{name}"
        return "is gated on the hub", f"ask for access at {page}, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the hub, or is private", f"check the name; for a private one {LOG_IN}"
    if isinstance(error, HFValidationError):
        return "is neither here nor a name on the hub", "check the path"
    if isinstance(error, OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(error, HfHubHTTPError):
        return _status(error.response.status_code)
    return _connection(error)


def _status(status: int) -> tuple[str, str] | None:
    """What the hub answered, and the remedy."""
    if status >= 500:
        return f"could not be read from the hub (it is out of order: {status})", "try again later"
    told = {
        401: ("the token is not valid", LOG_IN), 403: ("forbidden", f"for an account that may read it {LOG_IN}"),
        429: ("too many requests", f"wait some minutes and try again, or for a higher limit {LOG_IN}"),
    }
    if status not in told:
        return None
    reason, remedy = told[status]
    return f"could not be read from the hub ({status}, {reason})", remedy


def _connection(error: BaseException) -> tuple[str, str] | None:
    """What became of a connection, or of the file that was to be kept, and the remedy."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"TimeoutException", "TimeoutError"}:
        return "could not be read from the hub (no answer in time)", "try again, or wait longer with HF_HUB_ETAG_TIMEOUT=60 HF_HUB_DOWNLOAD_TIMEOUT=60"
    if "ConnectError" in kinds:
        return "could not be read from the hub (it cannot be reached)", "check the network"
    if kinds & {"RemoteProtocolError", "ReadError", "IncompleteRead"} or "Consistency check failed" in str(error):
        return "could not be read from the hub (the connection broke)", "try again: files that are whole are kept"
    if isinstance(error, OSError) and error.errno in CACHE_FULL:
        return f"could not be kept ({error.strerror}: {error.filename or constants.HF_HOME})", "make room there, or set HF_HOME to another folder"
    return None

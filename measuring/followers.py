"""Which tokens most often follow which in a corpus: the table of common-sense token verification, and its file.

`commands/build_followers.py` makes one. Token ids mean nothing without their tokenizer, so a table carries its tokenizer's hash
and is refused for any other.
"""

from __future__ import annotations

import json
import shlex
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from running.command_line import UserError, first_line

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from models.target_model import tokenizer_hash
from running.run_files import in_one_step

FORMAT = "followers-1"
CHUNK_TOKENS = 1 << 22  # counted at a time: some 300 MB beside the distinct pairs
NO_FOLLOWER = -1


@dataclass(frozen=True)
class Followers:
    """`table` (V, F) int64: row t holds the ids that most often follow token t, most frequent first, padded with NO_FOLLOWER.

    `provenance` says what was counted: data set, split, tokens, least count, the data's fingerprint.
    """

    table: torch.Tensor
    tokenizer_hash: str
    provenance: dict


# ---- counting ----

def count_followers(texts: Iterable[Sequence[int]], vocab_size: int, width: int, least: int) -> torch.Tensor:
    """A `Followers.table` (vocab_size, width): the most frequent followers of each token that were seen `least` times or more.

    Of equally frequent ones the lower id comes first. Pairs lie within one text. Memory grows with the distinct pairs.
    """
    codes, counts = torch.zeros(2, 0, dtype=torch.int64)  # of the distinct pairs (t, u), by code t·V + u
    for chunk in _chunks(texts):
        pairs = _pair_codes(chunk, vocab_size)
        codes, places = torch.unique(torch.cat([codes, pairs]), return_inverse=True)
        counts = torch.zeros_like(codes).index_add_(0, places, torch.cat([counts, torch.ones_like(pairs)]))
    frequent = counts >= least
    return _most_frequent(codes[frequent], counts[frequent], vocab_size, width)


def _chunks(texts: Iterable[Sequence[int]]) -> Iterator[list[torch.Tensor]]:
    """`texts` as tensors, in lists of CHUNK_TOKENS tokens and the rest of the last text."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(torch.as_tensor(text, dtype=torch.int64))
        size += len(text)
        if size >= CHUNK_TOKENS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _pair_codes(chunk: list[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """t·V + u (N,) of every token t and its follower u in `chunk`. Raises ValueError for ids outside the vocabulary."""
    tokens = torch.cat(chunk)
    if bool(((tokens < 0) | (tokens >= vocab_size)).any()):
        raise ValueError(f"token ids from {tokens.min()} to {tokens.max()} in a vocabulary of {vocab_size}")
    return torch.cat([text[:-1] * vocab_size + text[1:] for text in chunk])


def _most_frequent(codes: torch.Tensor, counts: torch.Tensor, vocab_size: int, width: int) -> torch.Tensor:
    """The table (vocab_size, width) of pairs with ascending `codes` (N,) that occur `counts` (N,) times."""
    order = counts.argsort(descending=True, stable=True)
    order = order[(codes[order] // vocab_size).argsort(stable=True)]  # by token, then by count, then by follower
    tokens, found = codes[order] // vocab_size, codes[order] % vocab_size
    rank = torch.arange(len(tokens)) - torch.searchsorted(tokens, tokens)  # among the followers of its token
    kept = rank < width
    table = torch.full((vocab_size, width), NO_FOLLOWER)
    table[tokens[kept], rank[kept]] = found[kept]
    return table


# ---- the file: the table, with what identifies it in the header ----

def save_followers(path: Path, followers: Followers) -> None:
    """Write a .safetensors file, complete or not at all."""
    info = {"tokenizer_hash": followers.tokenizer_hash, "provenance": followers.provenance}
    with in_one_step(path) as partial:
        save_file({"table": followers.table.contiguous()}, partial, metadata={"format": FORMAT, "info": json.dumps(info)})


def load_followers(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> Followers:
    """The table at `path`. Raises UserError for a file that is missing, broken, no such table, or of another tokenizer."""
    path, own = Path(path), tokenizer_hash(tokenizer)
    remedy = f"give a table's path, or build one: {_build_command(tokenizer, path.with_name(f'followers-{own}.safetensors'))}"
    try:
        metadata, tensors = _read(path)
    except FileNotFoundError as error:
        raise UserError(f"no follower table at {path}; build it: {_build_command(tokenizer, path.with_suffix('.safetensors'))}") from error
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is broken or no .safetensors file ({first_line(error)}); {remedy}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a follower table (format {metadata.get('format')!r}, expected {FORMAT!r}); {remedy}")
    try:
        followers = Followers(tensors["table"], **json.loads(metadata["info"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is broken: its header cannot be read ({first_line(error)}); {remedy}") from error
    if followers.tokenizer_hash != own:
        owner = f"of {followers.provenance.get('model_path')}; hash {followers.tokenizer_hash}, {tokenizer.name_or_path} has {own}"
        raise UserError(f"{path} belongs to another tokenizer ({owner}); {remedy}")
    return followers


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _build_command(tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    return shlex.join(["python", "-m", "commands.build_followers", "--model_path", tokenizer.name_or_path, "--dataset", "ultrachat", "--out", str(path)])

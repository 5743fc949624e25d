"""The follower table of common-sense token verification: the tokens that most often follow each token in a data set's train split.

    python -m commands.build_followers --model_path assets/pydoc-llama-7m --dataset pydoc --out runs/followers-pydoc.safetensors
    python -m commands.build_followers --model_path meta-llama/Llama-3.2-1B-Instruct --dataset ultrachat --max_examples 100000 \\
        --followers 12 --min_count 2 --out runs/followers-ultrachat.safetensors

Of the model only its configuration and tokenizer are read; the table fits every target with that tokenizer. The last
line printed is the table's path.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from running.command_line import UserError, parse_args, run

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.registry import find_dataset, fingerprint, open_stream
from data.row_files import ExampleStream, check_learnable, describe_skipped
from data_utils import encode_example
from measuring.followers import NO_FOLLOWER, Followers, count_followers, save_followers
from models.target_model import EMBEDDED_TARGET, load_config, load_tokenizer, tokenizer_hash
from running.run_files import make_output_dir

SPLIT = "train"


@dataclass(kw_only=True)
class Args:
    """Build a follower table."""

    model_path: str = field(metadata={"help": f"the target: a Hugging Face id or folder ({EMBEDDED_TARGET.name} lies in assets/)"})
    out: str = field(metadata={"help": "the table's file, .safetensors; must not exist"})
    dataset: str = field(metadata={"help": "data set whose train split is counted"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the data set's form"})
    max_examples: int = field(default=20_000, metadata={"help": "examples to count, drawn at random"})
    followers: int = field(default=12, metadata={"help": "followers kept of each token"})
    min_count: int = field(default=2, metadata={"help": "times that a follower must have been seen"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        for name in ("max_examples", "followers", "min_count"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if Path(self.out).suffix != ".safetensors":
            raise UserError(f"--out {self.out}: must end in .safetensors")
        if Path(self.out).exists():
            raise UserError(f"{self.out} exists already and is not written over; choose another --out")
        check_learnable(find_dataset(self.dataset))
        load_config(self.model_path)


def encoded(stream: ExampleStream, tokenizer: PreTrainedTokenizerBase, max_examples: int, counted: Counter[str]) -> Iterator[list[int]]:
    """Token ids of up to `max_examples` examples of one epoch, summed up in `counted`; a bar on a terminal."""
    total = max_examples if stream.num_rows is None else min(max_examples, stream.num_rows)
    texts = islice(stream.usable(lambda example: encode_example(tokenizer, example).input_ids), max_examples)
    for ids in tqdm(texts, total=total, desc="counting followers", unit="example", disable=not sys.stderr.isatty()):
        counted.update(examples=1, tokens=len(ids))
        yield ids


def build(args: Args, tokenizer: PreTrainedTokenizerBase, stream: ExampleStream) -> Followers:
    """The table of the stream's first examples. Raises UserError where no pair of tokens is frequent enough."""
    vocab_size = max(load_config(args.model_path).vocab_size, max(tokenizer.get_vocab().values()) + 1)
    counted: Counter[str] = Counter(examples=0, tokens=0)
    table = count_followers(encoded(stream, tokenizer, args.max_examples, counted), vocab_size, args.followers, args.min_count)
    if counted["examples"] == 0:
        raise UserError(f"--dataset {args.dataset}: no usable example; {describe_skipped(stream.skipped)}")
    if bool((table == NO_FOLLOWER).all()):
        raise UserError(f"--min_count {args.min_count}: no pair of tokens occurs that often in {counted['examples']} examples; "
                        "lower it or raise --max_examples")
    provenance = {"model_path": args.model_path, **fingerprint(stream), "split": SPLIT, **counted, "min_count": args.min_count}
    return Followers(table, tokenizer_hash(tokenizer), provenance)


def summary(followers: Followers) -> str:
    """What was counted, and how much of the table it fills."""
    found, counted = followers.table != NO_FOLLOWER, followers.provenance
    shares = [f"{rows.to(torch.float64).mean():.1%}" for rows in (found.any(dim=-1), found.all(dim=-1))]
    return (f"{counted['tokens']:,} tokens of {counted['examples']:,} examples; of {len(found):,} rows {shares[0]} hold a follower, "
            f"{shares[1]} all {found.shape[-1]}")


def main() -> None:
    args = parse_args(Args)
    args.check()
    tokenizer = load_tokenizer(args.model_path)
    make_output_dir(str(Path(args.out).parent))
    stream = open_stream(args.dataset, SPLIT, args.dataset_path)
    followers = build(args, tokenizer, stream)
    print(f"{args.dataset}: {stream.account()}", file=sys.stderr)
    save_followers(Path(args.out), followers)
    print(summary(followers))
    print(args.out)


if __name__ == "__main__":
    run(main)

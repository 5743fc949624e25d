"""The potential test: what a draft promises on a data set, before anything is decoded.

Target and draft read the same texts once, side by side. From both distributions at every position follow their KL divergence,
their overlap and top-1 agreement, and how many tokens a target call would give. A text shorter than the window counts with the
positions that it has; the potential score of earlier work drops such texts. metrics.POTENTIAL_COLUMNS says what each name means.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

from running.command_line import UserError

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence

from data.registry import find_dataset
from data.row_files import ExampleStream, describe_skipped, used
from data_utils import EncodeOptions
from decoding.sampling import SamplingPolicy, policy_probs
from decoding.state import NO_DRAFT_LAW, NO_TARGET_LAW, check_logits
from decoding.verify import VERIFICATIONS, Verification, expected_acceptance
from measuring.metrics import POTENTIAL_COLUMNS, add_sums, with_interval
from measuring.round_costs import tokens_per_round
from models.target_model import Target, load_config

CHUNK_ROWS = 256  # rows of V at a time: coupled verification's chance holds some ten fp64 tensors of them, 3 GB at V = 128k
SHORTEST = 2  # tokens: nothing predicts the first


@dataclass(kw_only=True)
class PotentialArgs:
    """Flags of the potential test."""

    potential: bool = field(default=False, metadata={"help": "only measure what the draft promises on the first quality data set, without decoding; KL at "
                                                             "--kl_temperature (here by default 1)"})
    start: int = field(default=0, metadata={"help": "with --potential: the first sample of the test split, counted from 0"})
    end: int = field(default=100, metadata={"help": "with --potential: the sample behind the last"})
    potential_length: int = field(default=256, metadata={"help": "with --potential: tokens kept of each sample"})

    def check_potential(self, gamma: str, models: list[str]) -> None:
        """Raise UserError for flags that cannot work together; `models` are the paths whose context the samples must fit."""
        if not self.potential:
            changed = [name for name, value in asdict(PotentialArgs()).items() if getattr(self, name) != value]
            if changed:
                raise UserError(f"--{changed[0]} {getattr(self, changed[0])} belongs to the potential test; add --potential, or leave it out")
            return
        if not 0 <= self.start < self.end:
            raise UserError(f"--start {self.start} --end {self.end}: must be 0 <= start < end; the sample of number end is left out")
        if gamma == "auto":
            raise UserError("--gamma auto: the potential test predicts for chains of one length; give a number")
        shortest, longest = int(gamma) + 1, min(load_config(path).max_position_embeddings for path in models)
        if not shortest <= self.potential_length <= longest:
            raise UserError(f"--potential_length {self.potential_length}: must lie between --gamma + 1 = {shortest} and the models' context, {longest}")

    def chosen_examples(self, name: str, data: Mapping[str, Sequence[dict]]) -> list[dict]:
        """The usable examples `start` … `end` − 1 of the data set `name`, in its own order. Raises UserError where it has too few."""
        stream = ExampleStream(find_dataset(name), data[name], seed=0, shuffle=False)
        found = list(islice(stream.rest_of_epoch(), self.start, self.end))
        if len(found) < self.end - self.start:
            usable = stream.position["row"] - sum(stream.skipped.values())
            raise UserError(f"--start {self.start} --end {self.end}: only {usable} samples in the test split of {name}; lower --end")
        return found


@dataclass(frozen=True)
class PotentialOptions:
    """How the draft would decode (policy, γ), the temperature of the KL alone, texts per forward pass, seed of the bootstrap."""

    policy: SamplingPolicy
    gamma: int
    kl_temperature: float = 1.0
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class TextPotential:
    """One text: sums over its positions by name, and the chance (T − 1,) that each verification keeps a token drafted there."""

    sums: dict[str, float]
    chances: dict[Verification, torch.Tensor]


def evaluate_examples(target: Target, draft: nn.Module, examples: list[dict], args: PotentialArgs, options: PotentialOptions) -> dict:
    """`measure_potential` of the first tokens of `examples`, with the settings. Raises UserError where all are too short."""
    encode = EncodeOptions(target.tokenizer, max_length=args.potential_length).encode
    skipped: Counter[str] = Counter()
    texts = [text.input_ids for _, text in used(examples, encode, skipped) if len(text.input_ids) >= SHORTEST]
    if skipped:
        print(f"samples: {describe_skipped(skipped)}", file=sys.stderr)
    if not texts:
        raise UserError(f"--start {args.start} --end {args.end}: none of these samples has {SHORTEST} tokens; choose others")
    figures = {**measure_potential(target.model, draft, texts, options), "potential_skipped": len(examples) - len(texts)}
    settings = {"start": args.start, "end": args.end, "potential_length": args.potential_length, "gamma": options.gamma, **asdict(options.policy)}
    return {**settings, **figures}


def measure_potential(target: nn.Module, draft: nn.Module, texts: list[list[int]], options: PotentialOptions) -> dict[str, float]:
    """POTENTIAL_COLUMNS of `draft` over `texts`, token sequences of SHORTEST and more, with intervals over texts."""
    found = read_texts(target, draft, texts, options)
    names = found[0].sums.keys()
    sums = {name: np.array([text.sums[name] for text in found]) for name in names}
    row: dict[str, float] = {"potential_samples": len(found), "potential_tokens": int(sums["tokens"].sum()), "potential_kl_temperature": options.kl_temperature}
    for name in ("kl", "overlap", "tv", "agreement"):
        if math.isfinite(sums[name].sum()):  # KL is infinite for a draft that lacks some of the tokens
            row |= with_interval(f"potential_{name}", sums[name], sums["tokens"], options.seed)
    for verification in VERIFICATIONS:
        chances = [text.chances[verification] for text in found]
        row |= predicted_tau(f"potential_tau_{verification}", chances, options.gamma, options.seed)
    return row


def predicted_tau(name: str, chances: list[torch.Tensor], gamma: int, seed: int = 0) -> dict[str, float]:
    """{name, name_ci_low, name_ci_high}: tokens per target call of chains of `gamma`, over all places of the texts where one fits.

    Nothing where none fits anywhere. The value is round_costs.tokens_per_round of all texts together.
    """
    starts = np.array([max(len(along) - gamma + 1, 0) for along in chances])
    if not starts.any():
        return {}
    tokens = np.array([tokens_per_round([along], gamma) if count else 0.0 for along, count in zip(chances, starts, strict=True)])
    return with_interval(name, tokens * starts, starts, seed)


@torch.inference_mode()
def read_texts(target: nn.Module, draft: nn.Module, texts: list[list[int]], options: PotentialOptions) -> list[TextPotential]:
    """What `measure_potential` needs of each text, from right-padded batches."""
    found = []
    for first in range(0, len(texts), options.batch_size):
        batch = [torch.tensor(text) for text in texts[first : first + options.batch_size]]
        mask = pad_sequence([torch.ones_like(text) for text in batch], batch_first=True)
        inputs = {"input_ids": pad_sequence(batch, batch_first=True), "attention_mask": mask}  # (B, T); what a pad is does not matter
        inputs = {name: tensor.to(target.device) for name, tensor in inputs.items()}
        teacher, drafted = (model(**inputs, use_cache=False).logits for model in (target, draft))  # (B, T, V)
        for text, p_logits, q_logits in zip(batch, teacher, drafted, strict=True):
            last = len(text) - 1  # what stands behind the last token is not known
            found.append(text_potential(p_logits[:last], q_logits[:last], options))
    return found


def text_potential(teacher: torch.Tensor, draft: torch.Tensor, options: PotentialOptions) -> TextPotential:
    """One text's figures from the logits (T − 1, V) of target and draft that predict its tokens but the first."""
    check_logits(teacher, NO_TARGET_LAW)
    check_logits(draft, NO_DRAFT_LAW)
    sums: dict[str, float] = {}
    chances: dict[Verification, list[torch.Tensor]] = {verification: [] for verification in VERIFICATIONS}
    for p_logits, q_logits in zip(teacher.split(CHUNK_ROWS), draft.split(CHUNK_ROWS), strict=True):
        log_p, log_q = (log_softmax(logits.float() / options.kl_temperature, -1) for logits in (p_logits, q_logits))
        p, q = (policy_probs(logits, options.policy) for logits in (p_logits, q_logits))
        for verification, parts in chances.items():
            parts.append(expected_acceptance(p, q, verification).cpu())
        overlap = float(chances["rejection"][-1].sum())
        sums = add_sums(sums, {
            "kl": float(kl_div(log_q, log_p, reduction="sum", log_target=True)), "overlap": overlap, "tv": len(p) - overlap,
            "agreement": int((p_logits.argmax(-1) == q_logits.argmax(-1)).sum()), "tokens": len(p),
        })
    return TextPotential(sums, {verification: torch.cat(parts) for verification, parts in chances.items()})


def potential_table(row: dict) -> str:
    """A line for each of POTENTIAL_COLUMNS that `row` has: name, value and interval."""
    def shown(name: str) -> str:
        value = row.get(name, "")
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    places = {"value": "", "low": "_ci_low", "high": "_ci_high"}
    lines = [{"name": name, **{title: shown(name + suffix) for title, suffix in places.items()}} for name in POTENTIAL_COLUMNS if name in row]
    return pd.DataFrame(lines).to_string(index=False)

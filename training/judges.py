"""Fitting the judges of decoding/autojudge.py to labelled drafted tokens, and their files.

Paper mode (AutoJudge 2504.20039, section 3): standardised hidden states, L2 logistic regression, C chosen on prompts that were held out, the threshold the largest that
still finds `recall_target` of the important tokens. Draft mode: an MLP on seven features of the draft's distribution, for whether verification would accept.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from running.command_line import UserError, first_line

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, softplus

from decoding.autojudge import LAW_FEATURES, Judge
from models.target_model import Target, tokenizer_hash, weights_hash
from running.run_files import in_one_step, now
from truncated_llama import TruncatedLlama

FORMAT = "judge-1"
C_GRID = tuple(10.0**-power for power in range(8))
HELD_OUT = 0.1  # of the prompts
MAX_ITERATIONS = 500
MLP_WIDTHS, MLP_STEPS, MLP_BATCH, MLP_LEARNING_RATE = (LAW_FEATURES, 32, 32, 1), 400, 128, 1e-3
DRAFT_THRESHOLD = 0.5  # of P(accept), as published


@dataclass(frozen=True)
class Labelled:
    """Drafted tokens: `features` (N, F), whether each is `important` (in draft mode: was rejected), bool (N,), and the prompt that it belongs to, int64 (N,)."""

    features: torch.Tensor
    important: torch.Tensor
    prompts: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Labelled:
        return Labelled(self.features[rows], self.important[rows], self.prompts[rows])

    def split(self, seed: int) -> tuple[Labelled, Labelled]:
        """Training and held-out tokens: HELD_OUT of the prompts, all tokens of a prompt together. Raises UserError where a part lacks a kind of token."""
        prompts = self.prompts.unique()
        shuffled = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))]
        held_out = torch.isin(self.prompts, shuffled[: max(1, round(HELD_OUT * len(prompts)))])
        parts = self[~held_out], self[held_out]
        if any(len(part.important.unique()) < 2 for part in parts):
            raise UserError(f"{len(self.important)} tokens of {len(prompts)} prompts, {int(self.important.sum())} of them important: too few to fit and to test "
                            "with; raise --num_prompts")
        return parts


@dataclass(frozen=True)
class Fitted:
    """A judge fitted to all tokens, and the figures of the one that was fitted without those held out."""

    judge: Judge
    c: float | None
    val_auc: float
    val_recall: float
    n_train: int
    n_important: int


# ---- figures ----

def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Chance that a positive's score (N,) exceeds a negative's, ties counting half (the area under the ROC curve)."""
    values, places, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[places]  # from 1, the mean of equal ones
    above, below = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - above * (above + 1) / 2) / (above * below))


def recall(scores: torch.Tensor, important: torch.Tensor, theta: float) -> float:
    """Share of the important tokens whose score (N,) is not below `theta`."""
    return float((scores[important] >= theta).double().mean())


def calibrate(scores: torch.Tensor, important: torch.Tensor, recall_target: float) -> float:
    """The largest threshold whose recall is `recall_target` or more."""
    needed = -(-recall_target * int(important.sum()) // 1)
    return float(scores[important].sort(descending=True).values[max(int(needed), 1) - 1])


# ---- fitting ----

def standardisation(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (F,) of features (N, F); 1 where nothing varies."""
    scale = features.std(0, correction=0)
    return features.mean(0), torch.where(scale > 0, scale, 1.0)


def fit_logistic(features: torch.Tensor, positive: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (1, F) and bias (1,) that minimise ½‖w‖² + C·Σ log(1 + exp(∓z)), the bias free of charge, for features (N, F); fp64, by L-BFGS."""
    features, signs = features.double(), 1 - 2 * positive.double()
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, features.shape[1]), (1,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = linear(features, weight, bias)[:, 0]
        value = softplus(signs * logits).mean() + weight.square().sum() / (2 * c * len(features))
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def logistic_judge(rows: Labelled, features: str, c: float, threshold: float) -> Judge:
    """The paper's judge of these tokens, fp32."""
    mean, scale = standardisation(rows.features.double())
    weight, bias = fit_logistic((rows.features.double() - mean) / scale, rows.important, c)
    return Judge(mean.float(), scale.float(), ((weight.float(), bias.float()),), threshold, features)


def fit_paper_judge(rows: Labelled, features: str, c_grid: Sequence[float], recall_target: float, seed: int) -> Fitted:
    """C by held-out AUC, the threshold by held-out recall, then a fit to all. Raises UserError for too few tokens."""
    training, held_out = rows.split(seed)
    scores = {c: logistic_judge(training, features, c, 0.0).predict(held_out.features) for c in c_grid}
    aucs = {c: auc(found, held_out.important) for c, found in scores.items()}
    best = max(c_grid, key=lambda c: aucs[c])
    threshold = calibrate(scores[best], held_out.important, recall_target)
    judge = logistic_judge(rows, features, best, threshold)
    return Fitted(judge, best, aucs[best], recall(scores[best], held_out.important, threshold), len(rows.important), int(rows.important.sum()))


def mlp_judge(rows: Labelled, seed: int) -> Judge:
    """The draft-only judge of these tokens: MLP_STEPS of Adam on the cross-entropy of `not important`."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = standardisation(rows.features)
    features, accepted = (rows.features - mean) / scale, (~rows.important).float()
    layers = []
    for into, out in zip(MLP_WIDTHS, MLP_WIDTHS[1:], strict=False):
        layers.append(tuple(((2 * torch.rand(shape, generator=generator) - 1) / into**0.5).requires_grad_() for shape in ((out, into), (out,))))
    judge = Judge(torch.zeros(LAW_FEATURES), torch.ones(LAW_FEATURES), tuple(layers), DRAFT_THRESHOLD, "law")
    optimizer = torch.optim.Adam([tensor for layer in layers for tensor in layer], lr=MLP_LEARNING_RATE)
    for _ in range(MLP_STEPS):
        batch = torch.randint(0, len(features), (MLP_BATCH,), generator=generator)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(judge.logits(features[batch]), accepted[batch]).backward()
        optimizer.step()
    return replace(judge, mean=mean, scale=scale, layers=tuple((weight.detach(), bias.detach()) for weight, bias in layers))


def fit_draft_judge(rows: Labelled, seed: int) -> Fitted:
    """The draft-only judge, fitted to all tokens; figures of P(important) from one that was fitted without those held out."""
    training, held_out = rows.split(seed)
    tested, judge = mlp_judge(training, seed), mlp_judge(rows, seed)
    scores = tested.predict(held_out.features)
    return Fitted(judge, None, auc(scores, held_out.important), recall(scores, held_out.important, judge.theta), len(rows.important), int(rows.important.sum()))


# ---- the file: the judge's tensors, with what identifies it in the header ----

@dataclass(frozen=True)
class JudgeInfo:
    """The header of a judge's file. `settings`: what it was mined and fitted with; `c` is absent in draft mode."""

    mode: str
    features: str
    threshold: float
    c: float | None
    val_auc: float
    val_recall: float
    n_train: int
    n_important: int
    target_name: str
    target_hash: str
    draft_name: str
    draft_hash: str
    tokenizer_hash: str
    date: str = field(default_factory=now)
    settings: dict = field(default_factory=dict)

    @classmethod
    def of(cls, fitted: Fitted, target: Target, draft: nn.Module, draft_name: str, settings: dict) -> JudgeInfo:
        """The header of a judge that was just fitted."""
        judge, figures = fitted.judge, {name: getattr(fitted, name) for name in ("c", "val_auc", "val_recall", "n_train", "n_important")}
        names = {"target_name": target.name, "draft_name": draft_name}
        return cls(judge.mode, judge.features, judge.threshold, **figures, **names, **cls.models(target, draft), settings=settings)

    @staticmethod
    def models(target: Target, draft: nn.Module) -> dict[str, str]:
        """The hashes of what a judge belongs to."""
        return {"target_hash": weights_hash(target.model), "draft_hash": draft_hash(draft), "tokenizer_hash": tokenizer_hash(target.tokenizer)}


def draft_hash(draft: nn.Module) -> str:
    """Identifies a draft, a model or an exit on its target, by its weights and its place."""
    place = [draft.exit.prefix, draft.exit.target_layer] if isinstance(draft, TruncatedLlama) else []
    return hashlib.sha256(json.dumps([weights_hash(draft), *place]).encode()).hexdigest()[:16]


def save_judge(path: Path, judge: Judge, info: JudgeInfo) -> None:
    """Write a .safetensors file, complete or not at all."""
    tensors = {"mean": judge.mean, "scale": judge.scale}
    for number, (weight, bias) in enumerate(judge.layers):
        tensors |= {f"weight{number}": weight, f"bias{number}": bias}
    with in_one_step(path) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": FORMAT, "info": json.dumps(asdict(info))})


def read_judge_info(path: str | Path) -> JudgeInfo:
    """The header of a judge's file. Raises UserError for one that is missing, broken, or no judge's."""
    return _read(path)[0]


def _read(path: str | Path) -> tuple[JudgeInfo, dict[str, torch.Tensor]]:
    remedy = "give the path that commands/train_judge.py printed last"
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"no judge at {path}; {remedy}") from error
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is broken or no .safetensors file ({first_line(error)}); {remedy}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no judge (format {metadata.get('format')!r}, expected {FORMAT!r}); {remedy}")
    try:
        return JudgeInfo(**json.loads(metadata["info"])), tensors
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is broken: its header cannot be read ({first_line(error)}); {remedy}") from error


def load_judge(path: str | Path, target: Target, draft: nn.Module) -> tuple[Judge, JudgeInfo]:
    """The judge at `path` on the target's device, and its header. Raises UserError for a broken file, and for another target, draft or tokenizer than its own."""
    info, tensors = _read(path)
    found = JudgeInfo.models(target, draft)
    for what, name in (("tokenizer", info.target_name), ("target", info.target_name), ("draft", info.draft_name)):
        stored, own = getattr(info, f"{what}_hash"), found[f"{what}_hash"]
        if stored != own:
            raise UserError(f"{path} belongs to another {what} (that of {name}; hash {stored}, not {own}); use that one, or make a judge for this with commands/train_judge.py")
    try:
        layers = tuple((tensors[f"weight{number}"], tensors[f"bias{number}"]) for number in range(len(tensors) // 2 - 1))
        return Judge(tensors["mean"], tensors["scale"], layers, info.threshold, info.features).to(target.model.device), info
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is broken ({first_line(error)}); train it again") from error

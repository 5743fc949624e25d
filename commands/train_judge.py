"""A judge for lossy decoding (decoding/autojudge.py): which drafted tokens matter is mined without annotation, and a classifier is fitted to it.

    python -m commands.train_judge --model_path assets/pydoc-llama-7m --checkpoint runs/demo/ftlast/layer1/model_000300.safetensors \\
        --dataset arithmetic --num_prompts 1000 --out runs/judge/judge.safetensors
    python -m commands.train_judge --model_path meta-llama/Llama-3.1-8B-Instruct --draft_model_path meta-llama/Llama-3.2-1B-Instruct \\
        --dataset gsm8k --num_prompts 4000 --max_new_tokens 512 --features both --out runs/judge/8b-1b.safetensors

Mode "paper" (AutoJudge 2504.20039): a token is important if the target's final answer changes with it; a threshold bounds P(important). Mode "draft": an MLP on the
draft's distribution alone, for whether verification would accept; the threshold bounds P(accept).

Mined prompts are appended to a file, with the states of both models: a run that was killed continues, and a judge of other --features or --recall_target that is
given the file as --mined needs no further mining. A judge that exists is reused if it was made with the same settings, and never written over. The last line
printed is its path.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from running.command_line import UserError, parse_args, run

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.registry import find_dataset, fingerprint, open_stream
from data.row_files import describe_skipped, read_rows
from data_utils import encode_prompt
from engine.static_llama import KEPT_WIDTHS
from measuring.evaluation import DraftArgs, load_draft
from models.target_model import EMBEDDED_TARGET, DeviceArgs, Target, eos_token_ids, load_config, load_target, text_facts
from running.run_files import make_output_dir, naming
from training.judge_mining import TOO_LONG, Drafted, Miner, Question, Reader, Search, draft_labels, longest_prompt
from training.judges import C_GRID, Fitted, JudgeInfo, Labelled, fit_draft_judge, fit_paper_judge, load_judge, save_judge
from training.training_loop import StopRequest

NOT_MINED = ("features", "recall_target", "c_grid")  # what a judge depends on and its mined prompts do not
STATES_DTYPE = np.float16
LONGEST_PROMPT = 1024  # tokens; longer ones are skipped, which bounds the caches


@dataclass(kw_only=True)
class Args(DraftArgs, DeviceArgs):
    """Mine and fit a judge."""

    model_path: str = field(metadata={"help": f"the target: a Hugging Face id or folder ({EMBEDDED_TARGET.name} lies in assets/)"})
    out: str = field(metadata={"help": "the judge's file, .safetensors"})
    mined: str | None = field(default=None, metadata={"help": "file of mined prompts, which judges of other features may share (default: --out with .jsonl)"})
    autojudge_mode: Literal["paper", "draft"] = field(default="paper", metadata={"help": "paper: P(important) is predicted; draft: P(accept), from the draft alone"})
    dataset: Literal["gsm8k", "arithmetic"] = field(default="arithmetic", metadata={"help": "data set of the prompts, whose answers end in a number: its train split"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the data set's form"})
    num_prompts: int = field(default=1000, metadata={"help": "prompts to mine, drawn at random"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest answer, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "mode paper: prompts mined together"})
    gamma: int = field(default=4, metadata={"help": "mode draft: drafted tokens per round, of which a token's place is a share"})
    features: Literal["target", "both"] = field(default="target", metadata={"help": "mode paper: hidden states of the target, or of draft and target"})
    recall_target: float = field(default=0.9, metadata={
        "help": "mode paper: share of the important tokens that the threshold finds, on held-out prompts; an answer with n of them stands with a chance of about recall^n"})
    c_grid: list[float] = field(default_factory=lambda: list(C_GRID), metadata={"help": "mode paper: inverse strengths of the L2 penalty to try"})
    seed: int = field(default=0, metadata={"help": "seed of data order, split and drawn tokens"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        self.check_device()
        for name in ("num_prompts", "max_new_tokens", "batch_size", "gamma"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")
        if not 0 < self.recall_target <= 1:
            raise UserError(f"--recall_target {self.recall_target}: must lie above 0 and not above 1")
        if not self.c_grid or min(self.c_grid) <= 0:
            raise UserError(f"--c_grid {' '.join(map(str, self.c_grid))}: must be positive numbers")
        if Path(self.out).suffix != ".safetensors":
            raise UserError(f"--out {self.out}: must end in .safetensors")
        context = load_config(self.model_path).max_position_embeddings
        if self.max_new_tokens + KEPT_WIDTHS >= context:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: the context of {self.model_path} is {context}, prompt included; lower it")
        self.check_draft(self.model_path, self.max_new_tokens + KEPT_WIDTHS)

    @property
    def mined_path(self) -> Path:
        """The file of mined prompts."""
        return Path(self.out).with_suffix(".jsonl") if self.mined is None else Path(self.mined)

    def settings(self, target: Target, data: dict) -> dict:
        """All that the judge depends on beside target, draft and tokenizer; flags of the other mode are left out."""
        text = {name: value for name, value in text_facts(target).items() if name != "target_hash"}
        settings = {"mode": self.autojudge_mode, "data": data, **text, "num_prompts": self.num_prompts, "max_new_tokens": self.max_new_tokens,
                    "seed": self.seed}
        return settings | ({name: getattr(self, name) for name in NOT_MINED} if self.autojudge_mode == "paper" else {"gamma": self.gamma})


# ---- a judge that is there ----

def reuse(args: Args, target: Target, draft: nn.Module, settings: dict) -> bool:
    """Whether the judge at --out is there. Raises UserError where it was made with other settings, or is of other models."""
    if not Path(args.out).exists():
        return False
    _, info = load_judge(args.out, target, draft)
    changed = [f"{name} {info.settings.get(name)} -> {value}" for name, value in settings.items() if info.settings.get(name) != value]
    if changed:
        raise UserError(f"{args.out} was made with other settings ({', '.join(changed)}); use those, or another --out")
    return True


# ---- mined prompts, a line each ----

def open_mined(path: Path, settings: dict) -> list[dict]:
    """The prompts mined so far; a torn last line (a killed process) is cut off, as more will be appended. Raises UserError for a file of other settings."""
    settings = {name: value for name, value in settings.items() if name not in NOT_MINED and name != "num_prompts"}
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    if not path.exists() or path.stat().st_size == 0:
        append(path, [{"settings": settings}])
    head, *rows = read_rows(path)
    if not isinstance(head, dict) or not isinstance(head.get("settings"), dict):
        raise UserError(f"{path}: its first line has no settings, so it is no file of mined prompts; mend it, or choose another --mined")
    broken = [number for number, row in enumerate(rows) if not isinstance(row, dict) or row.get("index") != number]
    if broken:
        raise UserError(f"{path}: line {broken[0] + 2} is not that of prompt {broken[0]}; mend it, or delete it and the lines below, "
                        "which are then mined again")
    changed = [f"{name} {head['settings'].get(name)} -> {value}" for name, value in settings.items() if head["settings"].get(name) != value]
    if changed:
        raise UserError(f"{path} was mined with other settings ({', '.join(changed)}); use those, or another --out")
    return rows


def append(path: Path, rows: Iterable[dict]) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def packed(states: list[torch.Tensor]) -> str:
    """Rows of numbers as text."""
    return base64.b64encode(np.stack([row.numpy().astype(STATES_DTYPE) for row in states]).tobytes()).decode() if states else ""


def unpacked(text: str, count: int) -> torch.Tensor:
    """Numbers (count, F), fp32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), STATES_DTYPE).reshape(count, -1).astype(np.float32))


def row_of_search(search: Search) -> dict:
    """A prompt of mode paper. `swaps`: position, target's and draft's token, important."""
    if search.skipped is not None:
        return {"index": search.question.index, "skipped": search.skipped}
    swaps = [[swap.position, swap.target_token, swap.draft_token, swap.important] for swap in search.swaps]
    states = {f"{name}_states": packed([getattr(swap, f"{name}_state") for swap in search.swaps]) for name in ("draft", "target")}
    return {"index": search.question.index, "answer": search.answer, "swaps": swaps, **states}


def row_of_drafted(drafted: Drafted) -> dict:
    """A prompt of mode draft."""
    return {"index": drafted.question.index, "accepted": drafted.accepted.tolist(), "features": drafted.features.tolist()}


def labelled(rows: list[dict], args: Args) -> Labelled:
    """The tokens of mined prompts. Raises UserError where there are none."""
    features, important, prompts = [], [], []
    for row in rows:
        labels = [not kept for kept in row.get("accepted", [])] if args.autojudge_mode == "draft" else [swap[3] for swap in row.get("swaps", [])]
        if labels:
            features.append(features_of(row, len(labels), args))
            important += labels
            prompts += [row["index"]] * len(labels)
    if not features:
        raise UserError(f"--num_prompts {args.num_prompts}: draft and target agree on every token, or no prompt is usable; raise it, or take another draft")
    return Labelled(torch.cat(features), torch.tensor(important), torch.tensor(prompts))


def features_of(row: dict, count: int, args: Args) -> torch.Tensor:
    """Features (count, F) of a mined prompt's tokens."""
    if args.autojudge_mode == "draft":
        return torch.tensor(row["features"])
    names = ("draft_states", "target_states") if args.features == "both" else ("target_states",)
    return torch.cat([unpacked(row[name], count) for name in names], -1)


# ---- the work ----

def questions(args: Args, target: Target) -> Iterator[Question]:
    """The data set's first prompts in the order of --seed."""
    stream = open_stream(args.dataset, "train", args.dataset_path, args.seed)
    prompts = stream.usable(lambda example: encode_prompt(target.tokenizer, example))
    for index, ids in enumerate(islice(prompts, args.num_prompts)):
        yield Question(index, ids)


def mined_rows(args: Args, target: Target, draft: nn.Module, asked: Iterator[Question]) -> Iterator[dict]:
    """The rows of further prompts, in order."""
    longest = min(LONGEST_PROMPT, longest_prompt(target, draft, args.max_new_tokens))
    if args.autojudge_mode == "paper":
        yield from map(row_of_search, Miner(target, draft, args.max_new_tokens, longest, args.batch_size).run(asked))
        return
    readers = [Reader(model, longest + args.max_new_tokens, 1) for model in (target.model, draft)]
    for question in asked:
        if len(question.ids) > longest:
            yield {"index": question.index, "skipped": TOO_LONG}
        else:
            yield row_of_drafted(draft_labels(*readers, question, args.max_new_tokens, args.gamma, args.seed, eos_token_ids(target)))


def mine(args: Args, target: Target, draft: nn.Module, rows: list[dict], stop: StopRequest) -> None:
    """Mine what `rows` and the file lack, or up to a `stop`."""
    asked = islice(questions(args, target), rows[-1]["index"] + 1 if rows else 0, None)
    bar = tqdm(total=args.num_prompts, initial=len(rows), desc="mining", unit="prompt", disable=not sys.stderr.isatty())
    counted = Counter(tokens=0, important=0)
    for row in mined_rows(args, target, draft, asked):
        append(args.mined_path, [row])
        rows.append(row)
        labels = row.get("swaps", row.get("accepted", []))
        counted.update(tokens=len(labels), important=sum(label[3] if isinstance(label, list) else not label for label in labels))
        bar.set_postfix(counted)
        bar.update()
        if stop.signal is not None:
            break
    bar.close()


def fit(args: Args, rows: list[dict]) -> Fitted:
    """The judge of the first --num_prompts prompts."""
    tokens = labelled([row for row in rows if row["index"] < args.num_prompts], args)
    if args.autojudge_mode == "draft":
        return fit_draft_judge(tokens, args.seed)
    return fit_paper_judge(tokens, args.features, args.c_grid, args.recall_target, args.seed)


def summary(info: JudgeInfo, rows: list[dict]) -> str:
    """What was learned from what."""
    skipped = Counter(row["skipped"] for row in rows if row.get("skipped"))
    what = "important" if info.mode == "paper" else "rejected"
    rule = f"kept below {info.threshold:.4g}" if info.mode == "paper" else f"kept from P(accept) {info.threshold:.4g}"
    chosen = "" if info.c is None else f", C = {info.c:g}"
    return (f"{info.n_train:,} tokens of {len(rows):,} prompts, {info.n_important / info.n_train:.1%} {what} ({describe_skipped(skipped)}); held out: "
            f"AUC {info.val_auc:.3f}{chosen}, recall {info.val_recall:.3f}; {rule}")


def main() -> int:
    args = parse_args(Args)
    args.check()
    stream = open_stream(find_dataset(args.dataset).name, "train", args.dataset_path, args.seed)
    if stream.num_rows is not None and stream.num_rows < args.num_prompts:
        raise UserError(f"--num_prompts {args.num_prompts}: the train split of {args.dataset} has {stream.num_rows} rows; lower it")
    for path in (Path(args.out), args.mined_path):
        make_output_dir(str(path.parent))
    target = load_target(args.model_path, args)
    draft = load_draft(target, args)
    settings = args.settings(target, fingerprint(stream))
    if reuse(args, target, draft.model, settings):
        print(f"{args.out} was made with these settings and is reused", file=sys.stderr)
        print(args.out)
        return 0
    rows = open_mined(args.mined_path, {**settings, **JudgeInfo.models(target, draft.model)})
    with StopRequest() as stop:
        mine(args, target, draft.model, rows, stop)
    if stop.signal is not None:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + stop.signal
    fitted = fit(args, rows)
    info = JudgeInfo.of(fitted, target, draft.model, draft.columns["checkpoint"], settings)
    save_judge(Path(args.out), fitted.judge, info)
    print(summary(info, rows))
    print(args.out)
    return 0


if __name__ == "__main__":
    run(main)

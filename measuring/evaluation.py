"""Measuring one draft against its target: quality on held-out text, and speculation side by side with vanilla decoding.

`evaluate.py` measures one draft, `evaluate_checkpoints.py` many; both get their flags and their figures here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Literal

from running.command_line import UserError

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig

from data.registry import find_dataset, fingerprint
from data.row_files import ExampleStream, open_rows
from data_utils import EncodeOptions, encode_example, encode_prompt, held_out_batches
from decoding.draft_length import AdaptiveLength
from decoding.dynamic_tree import DynamicTree
from decoding.sampling import SamplingPolicy
from decoding.state import DecodeStats
from decoding.verify import VERIFICATIONS, Verification
from engine.static_llama import KEPT_WIDTHS, why_unsupported
from measuring.followers import load_followers
from measuring.metrics import add_sums, predicted_speedup, quality_means, quality_sums, speculation_metrics, speed_metrics, with_interval
from measuring.round_costs import LONGEST, round_costs, step_seconds
from measuring.tree_fitting import tree_costs
from measuring.tree_plans import TREE_METHODS, Fitted, TreeArgs, fitted_plan
from models.target_model import (
    EMBEDDED_TARGET,
    DeviceArgs,
    Target,
    eos_token_ids,
    load_config,
    load_target,
    load_tokenizer,
    text_facts,
    tokenizer_hash,
)
from running.run_files import file_hash
from speculative import DecodeOptions, Generation, context_length, generate
from training.losses import learned_rows, learned_tokens
from truncated_llama import ExitInfo, TruncatedLlama, load_exit, module_bytes, read_exit_info, step_bytes

FREQUENCY_TEXTS = 500
TRAINED_WITH = ("loss_type", "learning_rate")  # flags of train.py that tell exits of one layer and kind apart
NOT_SETTINGS = {"out_dir", "checkpoint_glob", "checkpoint", "draft_model_path", "model_path", "dataset_path", "growmap", "followers"}


EvaluationData = dict[str, Sequence[dict]]


@dataclass(kw_only=True)
class PromptArgs(DeviceArgs):
    """Flags of every command that decodes prompts with a target."""

    model_path: str = field(metadata={"help": f"the target: a Hugging Face id or folder ({EMBEDDED_TARGET.name} lies in assets/)"})
    out_dir: str = field(metadata={"help": "folder for results; made where missing"})
    spec_prompt_dataset: str | None = field(default=None, metadata={"help": "data set of the prompts (default: the first quality data set, or ultrachat)"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files; then only one data set may be named"})
    spec_num_prompts: int = field(default=32, metadata={"help": "prompts, from the test split"})
    spec_prompt_length: int = field(default=64, metadata={"help": "tokens kept of each prompt; 0: all, up to where the assistant speaks"})
    spec_max_new_tokens: int = field(default=128, metadata={"help": "new tokens per prompt"})
    fit_prompts: int = field(default=64, metadata={"help": "prompts behind the measured ones that trees are fitted to"})
    seed: int = field(default=0, metadata={"help": "seed of data order, noise and bootstrap"})

    def dataset_names(self) -> list[str]:
        """The data sets that are read; the first is the prompts' own."""
        return [self.spec_prompt_dataset or "ultrachat"]

    @property
    def longest(self) -> int:
        """Most tokens that a round drafts."""
        return 0

    def config(self) -> PretrainedConfig:
        """The target's configuration. Raises UserError."""
        return load_config(self.model_path)

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        self.check_device()
        for name in ("spec_prompt_length", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        for name in ("spec_num_prompts", "spec_max_new_tokens", "fit_prompts"):
            self.check_positive(name)
        names = {find_dataset(name).name for name in self.dataset_names()}
        if self.dataset_path is not None and len(names) > 1:
            raise UserError(f"--dataset_path holds one data set, but {', '.join(sorted(names))} are named")
        context = self.config().max_position_embeddings
        if self.spec_prompt_length + self.spec_max_new_tokens + self.longest > context:
            raise UserError(f"the context of the target is {context} tokens: lower --spec_prompt_length, --spec_max_new_tokens or --gamma")

    def check_positive(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")

    def open_data(self) -> EvaluationData:
        """The test split of every named data set. Raises UserError; needs no model, so mistakes show early."""
        return {name: open_rows(find_dataset(name), "test", self.dataset_path) for name in sorted(set(self.dataset_names()))}

    def stream(self, data: EvaluationData, name: str) -> ExampleStream:
        """The examples of `name`, from the start."""
        return ExampleStream(find_dataset(name), data[name], self.seed)

    def facts(self, target: Target, data: EvaluationData) -> dict:
        """What identifies the inputs beside the flags, and the machine, by its kind."""
        device = target.model.device
        gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        return {**text_facts(target), "device_type": device.type, **gpu, "data": [fingerprint(self.stream(data, name)) for name in data]}


def drafted_at_most(gamma: str) -> int:
    """Most tokens that a round drafts with `gamma`, a number or "auto". Raises UserError for anything else."""
    if gamma != "auto" and not (gamma.isdecimal() and 1 <= int(gamma) < KEPT_WIDTHS):
        raise UserError(f"--gamma {gamma}: must be auto, or a number from 1 to {KEPT_WIDTHS - 1}")
    return LONGEST if gamma == "auto" else int(gamma)


@dataclass(kw_only=True)
class SpeculationArgs(PromptArgs):
    """Flags of commands that decode by chains of drafted tokens."""

    gamma: str = field(default="4", metadata={"help": "drafted tokens per round, or auto: as many as pay", "aliases": ["--speculate_len", "--k"]})
    method: Literal["auto", "self_speculative", "speculative"] = field(
        default="auto", metadata={"help": "self_speculative: an exit shares blocks and cache with the target (auto: where it can); speculative: any draft"})
    engine: Literal["static", "transformers"] = field(default="static", metadata={"help": "the suite's own forward pass, or transformers'"})

    @property
    def longest(self) -> int:
        return drafted_at_most(self.gamma)

    def method_for(self, target: Target, draft: nn.Module) -> str:
        """The method to decode with, given the draft."""
        if self.method != "auto":
            return self.method
        return chain_method(target, draft) if self.engine == "static" else "speculative"


def chain_method(target: Target, draft: nn.Module) -> Literal["self_speculative", "speculative"]:
    """self_speculative for an exit that can share blocks and cache with the target."""
    shares = isinstance(draft, TruncatedLlama) and why_unsupported(target.model, draft.parts()) is None
    return "self_speculative" if shares else "speculative"


@dataclass(kw_only=True)
class PolicyArgs:
    """Flags that choose the sampling policy."""

    spec_temperature: float = field(default=0.7, metadata={"help": "0: greedy"})
    spec_top_p: float = field(default=1.0, metadata={"help": "1: off"})
    spec_top_k: int = field(default=0, metadata={"help": "0: off"})

    def policy(self) -> SamplingPolicy:
        """The policy. Raises UserError for values that no policy has."""
        try:
            return SamplingPolicy(self.spec_temperature, self.spec_top_k, self.spec_top_p)
        except ValueError as error:
            raise UserError(f"--spec_{error}") from error


@dataclass(kw_only=True)
class EvaluationArgs(TreeArgs, PolicyArgs, SpeculationArgs):
    """Flags that both evaluators have."""

    method: Literal["auto", "self_speculative", "speculative", "static_tree", "dynamic_tree", "specexec"] = field(
        default="auto", metadata={"help": "self_speculative: an exit shares blocks and cache with the target (auto: where it can); speculative: any draft; "
                                          "the others: trees, with either"})
    verification: Literal["rejection", "coupled", "match", "swor"] | None = field(
        default=None, metadata={"help": "chains: rejection (default) or coupled; trees: coupled (default), match (default of specexec) or swor. coupled and "
                                        "match return vanilla's own tokens for the seed"})
    quality_datasets: list[str] = field(default_factory=lambda: ["ultrachat"], metadata={"help": "data sets for KL, perplexity, agreement"})
    quality_max_batches: int = field(default=50, metadata={"help": "batches per data set, taken from its test split"})
    quality_batch_size: int = field(default=8, metadata={"help": "examples per batch"})
    max_length: int = field(default=512, metadata={"help": "longest sequence of the quality batches, in tokens"})
    kl_temperature: float | None = field(default=None, metadata={"help": "for <dataset>_kl_at_train_temperature (default: the exit's own)"})

    def dataset_names(self) -> list[str]:
        return [self.spec_prompt_dataset or self.quality_datasets[0], *self.quality_datasets]

    @property
    def longest(self) -> int:
        if self.method in TREE_METHODS:
            return self.plan(self.method, self.verification).depth
        return super().longest

    @property
    def chain_verification(self) -> Verification:
        """--verification where chains are drafted."""
        return self.verification or VERIFICATIONS[0]

    def facts(self, target: Target, data: EvaluationData) -> dict:
        files = {name: file_hash(path) for name, path in (("growmap_hash", self.growmap), ("followers_hash", self.followers)) if path is not None}
        return {**super().facts(target, data), **files}

    def check(self) -> None:
        self.check_tree(self.method, self.verification)
        if self.followers is not None:
            load_followers(self.followers, load_tokenizer(self.model_path))
        if self.method not in TREE_METHODS and self.chain_verification not in VERIFICATIONS:
            raise UserError(f"--verification {self.verification}: chains are verified by {' or '.join(VERIFICATIONS)}; choose a tree method, or one of these")
        super().check()
        for name in ("quality_max_batches", "quality_batch_size"):
            self.check_positive(name)
        if self.kl_temperature is not None and self.kl_temperature <= 0:
            raise UserError(f"--kl_temperature {self.kl_temperature}: must be positive")
        self.policy()
        context = load_config(self.model_path).max_position_embeddings
        if not 2 <= self.max_length <= context:
            raise UserError(f"--max_length {self.max_length}: must lie between 2 and the context of {self.model_path}, {context}")

    def settings_hash(self, facts: dict) -> str:
        """Identifies all that figures depend on, the draft apart; a results file holds rows of one such hash."""
        settings = {name: value for name, value in asdict(self).items() if name not in NOT_SETTINGS}
        return hashlib.sha256(json.dumps({**settings, **facts}, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draft:
    """A draft model, the columns that say what it is, and the KL temperature that it was trained with."""

    model: nn.Module
    columns: dict
    train_temperature: float = 1.0


@dataclass(kw_only=True)
class DraftArgs:
    """Flags that name one draft."""

    checkpoint: str | None = field(default=None, metadata={"help": "an exit made by train.py"})
    draft_model_path: str | None = field(default=None, metadata={"help": "an independent model with the target's tokenizer"})

    def check_draft(self, model_path: str, longest: int, families: tuple[str, ...] | None = ("llama",)) -> None:
        """Raise UserError unless one draft is named that exists and, if a model (of `families`), fits the target at `model_path` and texts of `longest` tokens."""
        if (self.checkpoint is None) == (self.draft_model_path is None):
            raise UserError("give either --checkpoint EXIT or --draft_model_path MODEL")
        if self.checkpoint is not None:
            read_exit_info(self.checkpoint)
            return
        config = load_config(self.draft_model_path, families)
        hashes = {tokenizer_hash(load_tokenizer(path)) for path in (model_path, self.draft_model_path)}
        if len(hashes) > 1 or config.vocab_size != load_config(model_path, families).vocab_size:
            raise UserError(f"{self.draft_model_path} and {model_path} have different tokenizers; a draft needs the target's own")
        if longest > context_length(config):
            raise UserError(f"the context of {self.draft_model_path} is {context_length(config)} tokens: lower --spec_prompt_length, "
                            f"--spec_max_new_tokens or --max_length")


def load_draft(target: Target, args: DraftArgs) -> Draft:
    """The draft that the flags name."""
    if args.checkpoint is None:
        return model_draft(target, load_target(args.draft_model_path, args).model, args.draft_model_path)
    exit_, info = load_exit(args.checkpoint, target)
    return exit_draft(target, TruncatedLlama(target.model, exit_), info, args.checkpoint, str(info.kind))


def exit_draft(target: Target, draft: TruncatedLlama, info: ExitInfo | None, checkpoint: str, kind: str) -> Draft:
    """An exit as a Draft: its place, size, cost ratio by bytes and training step."""
    exit_ = draft.exit
    columns = {
        "checkpoint": checkpoint, "kind": kind, "target_layer": exit_.target_layer, "blocks": exit_.target_layer + 1,
        "step": info.step if info else 0, **{name: info.flags[name] for name in TRAINED_WITH if info and name in info.flags}, "exit_bytes": exit_.own_bytes(), "cost_ratio_bytes": exit_.cost_ratio(target.model),
    }
    return Draft(draft, columns, info.flags.get("kl_temperature", 1.0) if info else 1.0)


def model_draft(target: Target, model: nn.Module, path: str) -> Draft:
    """An independent model as a Draft."""
    ratio = step_bytes(model) / step_bytes(target.model)
    return Draft(model, {"checkpoint": path, "kind": "model", "exit_bytes": module_bytes(model), "cost_ratio_bytes": ratio})


def evaluate_draft(target: Target, draft: Draft, args: EvaluationArgs, data: EvaluationData) -> tuple[dict, list[Generation]]:
    """One row of results: what the draft is, the settings, its quality per data set, and its speculation figures; and the drafted texts that were measured.

    `data` is what `args.open_data()` returned.
    """
    row = {**draft.columns}
    for name in args.quality_datasets:
        quality = measure_quality(target, draft, args.stream(data, name), args)
        row |= {f"{name}_{metric}": value for metric, value in quality.items()}
    figures, drafted = measure_speculation(target, draft, args, data)
    return {**row, **figures, "temperature": args.spec_temperature, "top_p": args.spec_top_p, "top_k": args.spec_top_k}, drafted


# ---- quality ----

@torch.inference_mode()
def measure_quality(target: Target, draft: Draft, stream: ExampleStream, args: EvaluationArgs) -> dict[str, float]:
    """metrics.QUALITY_COLUMNS of `draft` on the first examples of `stream`."""
    temperature = args.kl_temperature or draft.train_temperature
    options = EncodeOptions(target.tokenizer, max_length=args.max_length, batch_size=args.quality_batch_size)
    sums: dict[str, float] = {}
    batches = held_out_batches(stream, options, args.quality_max_batches)
    stream.tell_losses()
    for batch in batches:
        batch = {name: tensor.to(target.model.device) for name, tensor in batch.items()}
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        teacher, drafted = (learned_rows(model(**inputs).logits, batch["loss_mask"]) for model in (target.model, draft.model))
        tokens = learned_tokens(batch["input_ids"], batch["loss_mask"])
        sums = add_sums(sums, quality_sums(teacher, drafted, tokens, temperature))
    return quality_means(sums)


# ---- speculation ----

def shortest_context(target: Target, args: object) -> int:
    """Positions that the target has, and the independent draft, if `args` name one."""
    own, draft = context_length(target.model.config), args.draft_model_path if isinstance(args, DraftArgs) else None
    return own if draft is None else min(own, context_length(load_config(draft)))


def prompts_of(target: Target, args: PromptArgs, stream: ExampleStream) -> Iterator[list[int]]:
    """From `stream`, prompts of `spec_prompt_length` tokens, the beginnings of held-out examples that are longer; with length 0
    whole prompts, up to where the assistant speaks."""
    longest = shortest_context(target, args) - args.spec_max_new_tokens - args.longest
    if args.spec_prompt_length == 0:
        whole = stream.usable(lambda example: encode_prompt(target.tokenizer, example))
        return (ids for ids in whole if len(ids) <= longest)
    texts = stream.usable(lambda example: encode_example(target.tokenizer, example).input_ids)
    return (ids[: args.spec_prompt_length] for ids in texts if len(ids) > args.spec_prompt_length)


def choose_prompts(target: Target, args: PromptArgs, data: EvaluationData) -> list[list[int]]:
    """The first `spec_num_prompts` of `prompts_of`. Raises UserError where there are too few."""
    stream = args.stream(data, args.dataset_names()[0])
    found = list(islice(prompts_of(target, args, stream), args.spec_num_prompts))
    stream.tell_losses()
    if len(found) < args.spec_num_prompts:
        what = (f"of {args.spec_prompt_length} tokens in {args.dataset_names()[0]}: lower --spec_num_prompts or --spec_prompt_length" if args.spec_prompt_length else
                f"in {args.dataset_names()[0]} leave room for {args.spec_max_new_tokens} new tokens: lower --spec_num_prompts or --spec_max_new_tokens")
        raise UserError(f"only {len(found)} prompts {what}")
    return found


def fitting_prompts(target: Target, args: PromptArgs, data: EvaluationData) -> list[list[int]]:
    """Up to `fit_prompts` prompts behind those that are measured: of the same kind, and held out like them. Raises UserError where there are none."""
    stream = args.stream(data, args.dataset_names()[0])
    found = list(islice(prompts_of(target, args, stream), args.spec_num_prompts, args.spec_num_prompts + args.fit_prompts))
    if not found:
        raise UserError(f"no prompts in {args.dataset_names()[0]} behind the first {args.spec_num_prompts} to fit trees to: lower --spec_num_prompts")
    return found


def training_texts(target: Target, args: PromptArgs) -> list[list[int]]:
    """Tokens of the first FREQUENCY_TEXTS training examples of the prompts' data set: their frequent ones make a draft vocabulary."""
    dataset = find_dataset(args.dataset_names()[0])
    stream = ExampleStream(dataset, open_rows(dataset, "train", args.dataset_path), args.seed)
    return list(islice(stream.usable(lambda example: encode_example(target.tokenizer, example).input_ids), FREQUENCY_TEXTS))


def fitted_to(target: Target, args: PromptArgs, data: EvaluationData, path: str | None) -> Fitted:
    """What trees of the draft at `path` are fitted to; its name says which prompts."""
    name = args.dataset_names()[0]
    named = (f"{name} {fingerprint(args.stream(data, name))['sha256']}, seed {args.seed}, {args.fit_prompts} behind {args.spec_num_prompts} prompts of "
             f"{args.spec_prompt_length} tokens with room for {args.spec_max_new_tokens} + {args.longest}")
    return Fitted(cache(lambda: fitting_prompts(target, args, data)), named, path)


def drafting_options(target: Target, draft: Draft, args: EvaluationArgs, data: EvaluationData) -> DecodeOptions:
    """How `args` decode with `draft`; a tree is fitted to it."""
    options = DecodeOptions(policy=args.policy(), max_new_tokens=args.spec_max_new_tokens, eos_ids=eos_token_ids(target), seed=args.seed, engine=args.engine)
    method = args.method_for(target, draft.model)
    if method not in TREE_METHODS:
        return replace(options, method=method, gamma=args.longest, verification=args.chain_verification, record_overlap=True)
    plan = fitted_plan(
        args.plan(method, args.verification), target, draft.model, options,
        fitted_to(target, args, data, draft.columns["checkpoint"]), args.fixed_level_cost())
    try:
        return replace(options, method=method, tree=plan, common_sense=args.common_sense(target))
    except ValueError as error:
        raise UserError(str(error)) from error


def measure_speculation(target: Target, draft: Draft, args: EvaluationArgs, data: EvaluationData) -> tuple[dict[str, float], list[Generation]]:
    """How it was decoded, and metrics.SPECULATION_COLUMNS: vanilla and speculative decoding of the same prompts, in turn; and the latter's texts.

    One pair is decoded and discarded first; the order within a pair alternates.
    """
    prompts = choose_prompts(target, args, data)
    drafting = drafting_options(target, draft, args, data)
    adaptive = drafting.plan is None and args.gamma == "auto"
    costs = round_costs(target.model, draft.model, prompts[0], drafting) if adaptive else None
    methods = {
        "vanilla": replace(drafting, method="vanilla", tree=None, common_sense=None, record_overlap=False),
        "speculative": replace(drafting, gamma=AdaptiveLength(costs)) if costs else drafting,
    }
    found: dict[str, list[Generation]] = {name: [] for name in methods}
    device = target.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for index, prompt in enumerate([prompts[0], *prompts]):
        for name in sorted(methods, reverse=index % 2 == 0):
            generation = generate(target.model, prompt, methods[name], draft.model, prompt_id=index)
            found[name] += [generation] if index > 0 else []
    runs = {name: [generation.stats for generation in generations] for name, generations in found.items()}
    row = {**speculation_metrics(runs["speculative"], drafting.ahead, args.seed), **speed_metrics(runs["vanilla"], runs["speculative"], args.seed)}
    if device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    if not drafting.lossless:
        row |= lossy_distance(target, prompts, found["vanilla"], found["speculative"], args)
    if costs:
        row |= predict_by_costs(runs["speculative"], costs)
    elif drafting.plan is None:
        row |= predict_by_steps(target, draft.model, prompts[0], drafting, row)
    elif "tree_expected_tokens" in row:
        row |= predict_by_tree(target, draft.model, prompts[0], drafting, row)
    return {**method_columns(drafting, args), **row}, found["speculative"]


@torch.inference_mode()
def lossy_distance(target: Target, prompts: list[list[int]], vanilla: list[Generation], lossy: list[Generation], args: EvaluationArgs) -> dict[str, float]:
    """How far a lossy method's texts are from the target's own: see metrics.LOSSY_COLUMNS."""
    def surprise(generations: list[Generation]) -> tuple[np.ndarray, np.ndarray]:
        sums, counts = [], []
        for prompt, generation in zip(prompts, generations, strict=True):
            ids = torch.tensor([[*prompt, *generation.tokens]], device=target.model.device)
            logits = target.model(ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
            sums.append(float(cross_entropy(logits / (args.spec_temperature or 1), ids[0, len(prompt) :], reduction="sum")))
            counts.append(len(generation.tokens))
        return np.array(sums), np.array(counts)

    same = np.array([one.tokens == other.tokens for one, other in zip(vanilla, lossy, strict=True)], dtype=float)
    row = with_interval("lossy_same_text", same, np.ones(len(same)), args.seed)
    for name, generations in (("lossy_text_nll", lossy), ("vanilla_text_nll", vanilla)):
        row |= with_interval(name, *surprise(generations), args.seed)
    return row


def method_columns(drafting: DecodeOptions, args: EvaluationArgs) -> dict:
    """What was decoded with."""
    row = {"method": drafting.method, "lossless": drafting.lossless}
    if drafting.plan is None:
        return {**row, "gamma": args.gamma, "verification": drafting.verification}
    level_cost = {"tree_level_cost": drafting.plan.level_cost} if isinstance(drafting.plan, DynamicTree) else {}
    return {**row, "verification": drafting.plan.verification, "tree_budget": drafting.plan.budget, **level_cost, "commonsense": args.commonsense}


def predict_by_tree(target: Target, draft: nn.Module, prompt: list[int], drafting: DecodeOptions, row: dict[str, float]) -> dict[str, float]:
    """The speedup that the tokens which trees promise and separately measured round times predict."""
    costs = tree_costs(target.model, draft, prompt, drafting, [drafting.plan])
    (target_s,) = costs.target_s.values()
    predicted = row["tree_expected_tokens"] * costs.vanilla_s / (row["tree_passes"] * costs.draft_s + target_s)
    return {"spec_cost_ratio": costs.draft_s / costs.vanilla_s, "spec_verify_ratio": target_s / costs.vanilla_s, "spec_predicted_speedup": predicted}


def predict_by_costs(runs: list[DecodeStats], costs: list[float]) -> dict[str, float]:
    """The speedup that measured round costs predict for rounds of different lengths."""
    emitted = sum(run.emitted for run in runs)
    return {"spec_predicted_speedup": emitted * costs[0] / sum(costs[r.proposed] for run in runs for r in run.rounds)}


def predict_by_steps(target: Target, draft: nn.Module, prompt: list[int], drafting: DecodeOptions, row: dict[str, float]) -> dict[str, float]:
    """The speedup that α and measured step times predict, with the ratios c and v of these."""
    seconds = step_seconds(target.model, draft, prompt, drafting)
    cost, verify = seconds["draft"] / seconds["target"], seconds["verify"] / seconds["target"]
    predicted = predicted_speedup(row["spec_token_accept_rate"], drafting.length().longest, cost, verify)
    return {"spec_cost_ratio": cost, "spec_verify_ratio": verify, "spec_predicted_speedup": predicted}


# ---- the printed table ----

def summary_table(rows: list[dict], dataset: str) -> str:
    """The figures that answer the suite's question, a line per row: quality, α, τ, predicted and measured speedup."""
    shown = {
        "layer": "target_layer", "stage": "kind", "KL": f"{dataset}_kl", "ppl": f"{dataset}_ppl", "top-1": f"{dataset}_top1",
        "method": "method", "verified": "verification", "lossless": "lossless", "nodes": "tree_nodes",
        "α": "spec_token_accept_rate", "overlap": "spec_overlap", "τ": "spec_tokens_per_call", "promised": "tree_expected_tokens", "c": "spec_cost_ratio",
        "predicted": "spec_predicted_speedup", "speedup": "spec_speedup", "low": "spec_speedup_ci_low", "high": "spec_speedup_ci_high",
    }
    table = pd.DataFrame([{title: row.get(column) for title, column in shown.items()} for row in rows])
    return table.dropna(axis="columns", how="all").to_string(index=False, float_format="%.3f", na_rep="")

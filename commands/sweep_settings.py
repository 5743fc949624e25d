"""Every way to decode side by side on the same prompts: tokens per second, acceptance, prediction, share of the roofline.

    python -m commands.sweep_settings --model_path assets/pydoc-llama-7m --checkpoint runs/demo/ftlast/layer1/model_000100.safetensors \\
        --spec_prompt_dataset arithmetic --spec_prompt_length 0 --gammas 1 2 4 6 auto --num_threads 2 --out_dir runs/speed
    python -m commands.sweep_settings --model_path assets/pydoc-llama-7m --checkpoint runs/demo/ftlast/layer1/model_000300.safetensors \\
        --methods self_speculative static_tree dynamic_tree specexec --verifications rejection coupled match swor --tree_budgets 8 16 32 64 \\
        --spec_prompt_dataset pydoc --out_dir runs/trees
    python -m commands.sweep_settings --random_init llama-3.2-1b --planted_alpha 0.8 --planted_layer 1 --draft_vocab_size 32768 --torch_dtype bf16 \\
        --gammas 2 4 auto --spec_num_prompts 8 --spec_max_new_tokens 32 --out_dir runs/speed-1b

All entries decode a prompt before the next prompt begins, in an order drawn anew for each prompt, and all prompts `repeats` times; the
first prompt is decoded once more before, uncounted. Predictions rest on what rounds cost just before and just after. Speedups are ratios of tokens per second over the same prompts, with a paired
bootstrap interval. Static trees get, for every size, the shape that is best for the acceptance measured behind prompts that are not measured. With --random_init the weights are random and the exit's acceptance is planted (models/planted.py): speeds
are those of the true shape, texts mean nothing, and every row says `planted`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

from running.command_line import UserError, parse_args, run

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PretrainedConfig

from data.registry import find_dataset
from data.row_files import check_learnable
from decoding.draft_length import AdaptiveLength
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import LARGEST, most_nodes
from decoding.specexec import SpecExec
from decoding.state import DecodeStats
from decoding.verify import TREE_RULES, VERIFICATIONS, Verification
from measuring.evaluation import DraftArgs, PolicyArgs, PromptArgs, choose_prompts, drafted_at_most, fitted_to, load_draft, training_texts
from measuring.machine_speed import counts_memory, held_memory, memory_bandwidth, peak_memory, restart_peak
from measuring.metrics import pace, speculation_metrics, speedup_interval, with_interval
from measuring.round_costs import frequent_tokens, round_costs
from measuring.tree_plans import TREE_METHODS, Fitted, best_static_trees, fitted_plan
from models.planted import planted_pair
from models.target_model import Target, eos_token_ids, load_target, named_config
from running.run_files import new_output_dir, record_run, write_csv
from speculative import METHODS, DecodeOptions, TreePlan, generate_batch
from truncated_llama import TruncatedLlama, step_bytes

RESULTS_NAME = "results.csv"
TIMED = (  # columns that a busy machine falsifies
    "tokens_per_s", "speedup", "over_hf_generate", "ms_per_round", "draft_ms", "verify_ms", "host_ms", "roofline_share", "predicted", "round_costs",
    "measured_over_predicted",
)


@dataclass(kw_only=True)
class Args(DraftArgs, PolicyArgs, PromptArgs):
    """Compare ways to decode."""

    model_path: str | None = field(default=None, metadata={"help": "the target: a Hugging Face id or folder"})
    random_init: str | None = field(default=None, metadata={"help": "random weights in this shape: a name in assets/configs, a folder or a config.json"})
    planted_alpha: float = field(default=0.8, metadata={"help": "with --random_init: the acceptance that the exit is made to have"})
    planted_layer: int = field(default=1, metadata={"help": "with --random_init: the exit's layer"})
    draft_vocab_size: int | None = field(default=None, metadata={"help": "the exit's head knows only so many tokens, the most frequent"})
    methods: list[str] = field(
        default_factory=lambda: ["vanilla", "hf_generate", "hf_assisted", "speculative", "self_speculative"],
        metadata={"help": f"of {', '.join(METHODS)}; vanilla is always measured"})
    gammas: list[str] = field(default_factory=lambda: ["1", "2", "4", "auto"], metadata={"help": "drafted tokens per round; auto: as many as pay"})
    verifications: list[str] = field(default_factory=lambda: ["rejection"], metadata={"help": "chains take rejection and coupled of these, trees coupled, match and swor"})
    tree_budgets: list[int] = field(default_factory=lambda: [8, 32], metadata={"help": "nodes of trees, the root included"})
    tree_depth: int = field(default=8, metadata={"help": "levels of static and dynamic trees; specexec: twice as many"})
    tree_topk: int = field(default=8, metadata={"help": "children of a node and nodes of a draft pass: dynamic_tree, specexec"})
    repeats: int = field(default=1, metadata={"help": "times that all prompts are decoded; a prompt's tokens and seconds are summed"})
    counts_only: bool = field(default=False, metadata={"help": "leave times and speeds out of the results: for a machine that does other work as well"})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "prompts decoded together by the suite's methods"})

    @property
    def longest(self) -> int:
        return max(*map(drafted_at_most, self.gammas), 2 * self.tree_depth if any(name in TREE_METHODS for name in self.methods) else 0)

    @property
    def longest_chain(self) -> int:
        """Most tokens that a chain drafts."""
        return max(map(drafted_at_most, self.gammas))

    def config(self) -> PretrainedConfig:
        return super().config() if self.random_init is None else named_config(self.random_init)

    def check(self) -> None:
        for name, known in (("methods", METHODS), ("verifications", {**dict.fromkeys(VERIFICATIONS), **TREE_RULES})):
            unknown = set(getattr(self, name)) - set(known)
            if unknown:
                raise UserError(f"--{name} {' '.join(sorted(unknown))}: choose from {', '.join(known)}")
        if (self.model_path is None) == (self.random_init is None):
            raise UserError("give either --model_path MODEL with --checkpoint EXIT, or --random_init SHAPE")
        if self.model_path is not None and any(METHODS[name].draft != "none" for name in self.methods):
            self.check_draft(self.model_path, self.spec_prompt_length + self.spec_max_new_tokens + self.longest)
        if self.model_path is not None and self.draft_vocab_size is not None:
            check_learnable(find_dataset(self.dataset_names()[0]))
        for name in ("tree_depth", "tree_topk"):
            self.check_positive(name)
        self.check_trees()
        if not self.chain_verifications and any(METHODS[name].draft != "none" and METHODS[name].round and not METHODS[name].plan for name in self.methods):
            raise UserError(f"--verifications {' '.join(self.verifications)}: chains take {' and '.join(VERIFICATIONS)}; add one, or leave chains out of --methods")
        self.check_batches()
        if self.random_init is not None and self.spec_prompt_length == 0:
            raise UserError("--spec_prompt_length 0: random prompts need a length; give one or more")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: must be at least 1")
        self.policy()
        super().check()

    @property
    def chain_verifications(self) -> list[Verification]:
        """Those of --verifications that chains take."""
        return [name for name in self.verifications if name in VERIFICATIONS]

    def check_trees(self) -> None:
        """Raise UserError for trees that cannot be."""
        if not 2 <= min(self.tree_budgets) <= max(self.tree_budgets) <= LARGEST:
            raise UserError(f"--tree_budgets {' '.join(map(str, self.tree_budgets))}: must lie between 2 and {LARGEST} nodes")
        if "static_tree" in self.methods and max(self.tree_budgets) > most_nodes(self.tree_topk, self.tree_depth):
            raise UserError(f"no tree of --tree_topk {self.tree_topk} and --tree_depth {self.tree_depth} has {max(self.tree_budgets)} nodes: raise these, or ask for fewer")
        for name in (name for name in self.methods if METHODS[name].plan is not None):
            known = ("match",) if name == "specexec" else tuple(TREE_RULES)
            if not set(known) & set(self.verifications):
                raise UserError(f"--verifications {' '.join(self.verifications)}: {name} takes {', '.join(known)}; add one, or leave it out of --methods")

    def check_batches(self) -> None:
        """Raise UserError for sizes that cannot be compared."""
        if not 1 <= min(self.batch_sizes) <= max(self.batch_sizes) <= self.spec_num_prompts:
            raise UserError(f"--batch_sizes {' '.join(map(str, self.batch_sizes))}: must lie between 1 and --spec_num_prompts {self.spec_num_prompts}")
        if any(max(self.batch_sizes) % size for size in self.batch_sizes):
            raise UserError(f"--batch_sizes {' '.join(map(str, self.batch_sizes))}: each must divide the largest, so that all decode the same prompts")
        if 1 not in self.batch_sizes and any(METHODS[name].whole is not None or METHODS[name].plan is not None for name in self.methods):
            raise UserError("trees and transformers' decoders take one prompt at a time: add 1 to --batch_sizes, or leave them out of --methods")


@dataclass(frozen=True)
class Subject:
    """What is decoded: target, exit, prompts, and the tokens that end a text. `facts` identify them.

    transformers drafts with `untrimmed`, as it knows no part of a vocabulary. `fitted` is what trees are fitted to.
    """

    target: Target
    draft: nn.Module | None
    untrimmed: nn.Module | None
    prompts: list[list[int]]
    fitted: Fitted
    eos_ids: frozenset[int]
    facts: dict

    @property
    def model(self) -> nn.Module:
        """The target's."""
        return self.target.model

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of target and draft."""
        own = self.draft.exit if isinstance(self.draft, TruncatedLlama) else self.draft
        return chain(self.model.parameters(), [] if own is None else own.parameters())

    @property
    def cost_ratio(self) -> float:
        """Bytes that a draft pass reads, over those of a target pass."""
        return self.draft.exit.cost_ratio(self.model) if isinstance(self.draft, TruncatedLlama) else step_bytes(self.draft) / step_bytes(self.model)


def load_subject(args: Args) -> Subject:
    """Trained weights with prompts of a data set, or random ones with planted acceptance and random prompts."""
    if args.random_init is None:
        data = args.open_data()
        target = load_target(args.model_path, args)
        path = args.checkpoint or args.draft_model_path
        draft = None if path is None else load_draft(target, args).model
        return Subject(
            target, trimmed(draft, target, args), draft, choose_prompts(target, args, data),
            fitted_to(target, args, data, None if args.draft_vocab_size else path),
            eos_token_ids(target), {**args.facts(target, data), "draft": path})
    device, dtype, _ = args.resolve()
    pair = planted_pair(
        args.config(), args.planted_layer, args.planted_alpha, args.policy(), (args.chain_verifications or VERIFICATIONS)[0], dtype, device, args.seed,
        draft_vocab_size=args.draft_vocab_size,
    )
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.spec_num_prompts, args.spec_prompt_length)
    prompts = torch.randint(0, pair.model.config.vocab_size, shape, generator=generator).tolist()
    target = Target(pair.model, None, args.random_init)
    facts = {"planted": True, "planted_alpha_reached": pair.alpha}
    return Subject(target, pair.draft, None if args.draft_vocab_size else pair.draft, prompts, Fitted(lambda: prompts, "random"), frozenset(), facts)


def trimmed(draft: nn.Module | None, target: Target, args: Args) -> nn.Module | None:
    """The draft with its head cut to the training text's most frequent tokens, where that is asked for of an exit."""
    if args.draft_vocab_size is None or not isinstance(draft, TruncatedLlama):
        return draft
    tokens = frequent_tokens(training_texts(target, args), args.draft_vocab_size, target.model.config.vocab_size)
    return TruncatedLlama(target.model, draft.exit.trimmed(tokens.to(target.model.device)))


# ---- what is measured ----

@dataclass(frozen=True)
class Entry:
    """One way to decode; `costs` are the seconds of rounds that draft 0, 1, … tokens, where it drafts."""

    options: DecodeOptions
    batch: int
    gamma: str | None = None
    costs: tuple[float, ...] = ()

    def columns(self) -> dict:
        """What the entry is."""
        own = {"method": self.options.method, "lossless": self.options.lossless, "batch": self.batch}
        if self.options.plan is not None:
            return {**own, "verification": self.options.plan.verification, "tree_budget": self.options.plan.budget}
        return own if self.gamma is None else {**own, "gamma": self.gamma, "verification": self.options.verification}


def entries(subject: Subject, args: Args) -> list[Entry]:
    """Every combination that the flags ask for; transformers' decoders draft their own way and only by fixed numbers."""
    base = DecodeOptions(policy=args.policy(), max_new_tokens=args.spec_max_new_tokens, eos_ids=subject.eos_ids, seed=args.seed)
    found = [Entry(replace(base, method=name), batch) for batch in args.batch_sizes for name in dict.fromkeys(["vanilla", *args.methods])
             if METHODS[name].draft == "none" and (batch == 1 or METHODS[name].whole is None)]
    for name in args.methods:
        if METHODS[name].whole is not None and METHODS[name].draft != "none":
            if subject.untrimmed is None:
                print(f"{name} is left out: transformers cannot draft with a part of the vocabulary", flush=True)
                continue
            found += [Entry(replace(base, method=name, gamma=int(gamma)), 1, gamma) for gamma in args.gammas if gamma != "auto"]
        elif METHODS[name].plan is not None:
            found += [Entry(replace(base, method=name, tree=plan), 1) for plan in tree_plans(name, base, subject, args)]
        elif METHODS[name].draft != "none":
            found += [entry for verification in args.chain_verifications for entry in drafting_entries(replace(base, method=name, verification=verification), subject, args)]
    return found


def tree_plans(method: str, options: DecodeOptions, subject: Subject, args: Args) -> list[TreePlan]:
    """Every verification and size of one tree method, fitted to the draft; they never stop early, so that sizes can be compared."""
    found: list[TreePlan] = []
    for verification in (name for name in args.verifications if name in TREE_RULES):
        if method == "static_tree":
            found += best_static_trees(
                verification, args.tree_budgets, args.tree_depth, args.tree_topk, subject.target, subject.draft, options, subject.fitted)
            continue
        kind, depth = (SpecExec, 2 * args.tree_depth) if method == "specexec" else (DynamicTree, args.tree_depth)
        if kind is SpecExec and verification != "match":
            continue  # coupled, it is a dynamic tree
        wide = {"branches": args.tree_topk} if kind is SpecExec else {"top_k": args.tree_topk}
        plan = fitted_plan(kind(depth=depth, verification=verification, **wide), subject.target, subject.draft, options, subject.fitted)
        found += [replace(plan, budget=size) for size in args.tree_budgets]
    return found


def drafting_entries(options: DecodeOptions, subject: Subject, args: Args) -> list[Entry]:
    """The entries of one drafting method and verification: γ by γ and batch by batch."""
    costs = tuple(measured_costs(subject, options, args))
    found = []
    for batch in args.batch_sizes:
        for gamma in args.gammas:
            if gamma == "auto" and batch > 1:
                continue  # its costs are those of a batch of one
            rule = AdaptiveLength(costs) if gamma == "auto" else int(gamma)
            found.append(Entry(replace(options, gamma=rule), batch, gamma, costs if batch == 1 else ()))
    return found


def measured_costs(subject: Subject, options: DecodeOptions, args: Args) -> list[float]:
    """tuning.round_costs behind the first prompt."""
    return round_costs(subject.model, subject.draft, subject.prompts[0], options, args.longest_chain)


@dataclass
class Measured:
    """Of an entry: counts and seconds, batch by batch of the prompts, and the most bytes that the process held meanwhile."""

    batches: list[list[DecodeStats]] = field(default_factory=list)
    peak_bytes: int = 0


def decode_all(subject: Subject, todo: list[Entry], args: Args) -> dict[Entry, Measured]:
    """Every entry on all prompts; entries take turns in an order that is drawn anew for each turn, as one leaves its data in the caches of the next."""
    orders = random.Random(args.seed)
    largest = max(entry.batch for entry in todo)
    usable = len(subject.prompts) // largest * largest
    device, found = subject.model.device, {entry: Measured() for entry in todo}
    firsts = [0, *list(range(0, usable, largest)) * args.repeats]
    for turn, first in enumerate(firsts):
        for entry in orders.sample(todo, len(todo)):
            draft = subject.draft if METHODS[entry.options.method].whole is None else subject.untrimmed
            for start in range(first, first + largest, entry.batch):
                keys = list(range(start, start + entry.batch))
                if counts_memory(device):
                    restart_peak(device)
                generations = generate_batch(subject.model, [subject.prompts[key] for key in keys], entry.options, draft, prompt_ids=keys)
                if turn > 0:
                    found[entry].batches.append([generation.stats for generation in generations])
                    found[entry].peak_bytes = max(found[entry].peak_bytes, peak_memory(device) if counts_memory(device) else 0)
        print(f"[{turn}/{len(firsts) - 1}] {'warm-up' if turn == 0 else 'prompts'} done", flush=True)
    return found


# ---- rows ----

def result_rows(found: dict[Entry, Measured], subject: Subject, bandwidth: float, held_before: int, args: Args) -> list[dict]:
    """A row per entry, in the order of measurement; `held_before` are the bytes that the process held before it had a model."""
    vanilla = {entry.batch: measured.batches for entry, measured in found.items() if entry.options.method == "vanilla"}
    peer = next((measured.batches for entry, measured in found.items() if entry.options.method == "hf_generate"), None)
    weights = sum({parameter.data_ptr(): parameter.nbytes for parameter in subject.parameters()}.values())
    drafting_options = {drafting(entry): entry.options for entry in found if entry.costs}
    after = {key: measured_costs(subject, options, args) for key, options in drafting_options.items()}
    rows = []
    for entry, measured in found.items():
        batches = measured.batches
        own = paces(batches, args)
        row = {**entry.columns(), **(with_interval("tokens_per_s", *own, args.seed) if own[0].any() else {})}  # transformers' first tokens come with the prefill
        row |= speedup_interval("speedup", paces(vanilla[entry.batch], args), own, args.seed)
        if peer is not None and entry.batch == 1:
            row |= speedup_interval("over_hf_generate", paces(peer, args), own, args.seed)
        rounds = sum(len(batch[0].rounds) for batch in batches)
        row |= {"weights_bytes": weights, **({"ms_per_round": 1000 * own[1].sum() / rounds} if rounds else {})}
        row |= {"peak_bytes": measured.peak_bytes - held_before} if counts_memory(subject.model.device) else {}
        if METHODS[entry.options.method].whole is None:
            row |= {**phase_columns(batches, rounds), "roofline_share": bytes_read(entry, batches, subject) / bandwidth / own[1].sum()}
        if entry.costs:
            costs = [(one + other) / 2 for one, other in zip(entry.costs, after[drafting(entry)], strict=True)]
            row |= drafting_columns(costs, [run for batch in batches for run in batch], args)
            row["measured_over_predicted"] = row["speedup"] / row["predicted"]
        elif entry.options.plan is not None:
            row |= tree_columns([run for batch in batches for run in batch], args)
        if METHODS[entry.options.method].whole is None and METHODS[entry.options.method].draft != "none":
            row["weight_bound_speedup"] = weight_bound_speedup([run for batch in batches for run in batch], subject)
        rows.append({**row, "temperature": args.spec_temperature, "top_p": args.spec_top_p, "top_k": args.spec_top_k, "planted": args.random_init is not None})
    return [untimed(row) for row in rows] if args.counts_only else rows


def untimed(row: dict) -> dict:
    """The columns of a row that hold on a busy machine."""
    return {name: value for name, value in row.items() if name.split("_ci_")[0] not in TIMED}


def paces(batches: list[list[DecodeStats]], args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds of each batch of prompts, summed over the repeats."""
    tokens, seconds = pace(batches)
    return tokens.reshape(args.repeats, -1).sum(0), seconds.reshape(args.repeats, -1).sum(0)


def phase_columns(batches: list[list[DecodeStats]], rounds: int) -> dict:
    """Where a round's time goes, in milliseconds: drafting, verification or a vanilla step, and Python outside of both."""
    phases = [{**batch[0].seconds, "host": batch[0].host_s} for batch in batches]
    return {f"{name}_ms": 1000 * sum(phase[name] for phase in phases) / rounds for name in ("draft", "verify", "host")}


def drafting(entry: Entry) -> tuple[str, str]:
    """Method and verification, which rounds cost the same with."""
    return entry.options.method, entry.options.verification


def drafting_columns(costs: list[float], runs: list[DecodeStats], args: Args) -> dict:
    """Acceptance, tokens per call, round costs in vanilla steps, and the speedup that these predict."""
    figures = speculation_metrics(runs, args.longest_chain, args.seed)
    kept = ("spec_token_accept_rate", "spec_tokens_per_call", "spec_tokens_per_call_ci_low", "spec_tokens_per_call_ci_high", "spec_mean_proposed")
    rounds = [r for run in runs for r in run.rounds]
    predicted = sum(r.accepted + 1 for r in rounds) * costs[0] / sum(costs[r.proposed] for r in rounds)
    return {
        **{name: figures[name] for name in kept if name in figures}, "predicted": predicted,
        "round_costs": " ".join(f"{cost / costs[0]:.2f}" for cost in costs),
    }


def tree_columns(runs: list[DecodeStats], args: Args) -> dict:
    """Acceptance, tokens per call, what the trees promised, calls and sizes."""
    figures = speculation_metrics(runs, 0, args.seed)
    kept = ("spec_token_accept_rate", "spec_tokens_per_call", "tree_expected_tokens", "tree_found_tokens", "tree_nodes", "tree_passes", "draft_calls_per_token", "spec_target_calls_per_token")
    intervals = [f"{name}_ci_{end}" for name in kept for end in ("low", "high")]
    return {name: figures[name] for name in (*kept, *intervals) if name in figures}


def weight_bound_speedup(runs: list[DecodeStats], subject: Subject) -> float:
    """The speedup where a pass takes the time that reading its weights takes, whatever its width: a forecast for a GPU at batch 1."""
    emitted, target_calls, draft_calls = (sum(getattr(run, name) for run in runs) for name in ("emitted", "target_calls", "draft_calls"))
    return emitted / (target_calls + draft_calls * subject.cost_ratio)


def bytes_read(entry: Entry, batches: list[list[DecodeStats]], subject: Subject) -> float:
    """Bytes of weights that all rounds read: the target's once a round, a draft's once a draft pass."""
    target_calls, draft_calls = (sum(getattr(batch[0], name) for batch in batches) for name in ("target_calls", "draft_calls"))
    whole = step_bytes(subject.model)
    return whole * (target_calls + (draft_calls * subject.cost_ratio if draft_calls else 0))


def table(rows: list[dict]) -> str:
    """The rows as they are printed."""
    shown = {
        "method": "method", "γ": "gamma", "nodes": "tree_budget", "verification": "verification", "batch": "batch", "tokens/s": "tokens_per_s", "speedup": "speedup",
        "low": "speedup_ci_low", "high": "speedup_ci_high", "predicted": "predicted", "of it": "measured_over_predicted", "over hf": "over_hf_generate",
        "α": "spec_token_accept_rate", "τ": "spec_tokens_per_call", "promised": "tree_expected_tokens", "found": "tree_found_tokens", "weight-bound": "weight_bound_speedup", "ms/round": "ms_per_round", "draft": "draft_ms", "verify": "verify_ms",
        "Python": "host_ms", "roofline": "roofline_share",
    }
    frame = pd.DataFrame([{title: row.get(column) for title, column in shown.items()} for row in rows])
    return frame.dropna(axis="columns", how="all").to_string(index=False, float_format="%.2f", na_rep="")


def main() -> None:
    args = parse_args(Args)
    args.check()
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "a benchmark")
    device = args.resolve()[0]
    held_before = held_memory(device) if counts_memory(device) else 0
    subject = load_subject(args)
    bandwidth = memory_bandwidth(subject.model.device)
    record_run(folder, args, {**subject.facts, "bandwidth_bytes_per_s": bandwidth, "threads": torch.get_num_threads()})
    rows = result_rows(decode_all(subject, entries(subject, args), args), subject, bandwidth, held_before, args)
    write_csv(folder / RESULTS_NAME, rows)
    if any("tree_budget" in row for row in rows):
        from plotting.trees import plot_trees  # matplotlib is slow to load

        plot_trees(folder)
    print(table(rows))
    print(f"memory: {bandwidth / 1e9:.1f} GB/s; {folder / RESULTS_NAME}")


if __name__ == "__main__":
    run(main)

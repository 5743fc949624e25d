"""The shape of a static draft tree, from measured acceptance and measured times (Sequoia 2402.12374).

    python -m commands.build_growmap --model_path assets/pydoc-llama-7m --checkpoint runs/demo/ftlast/layer3/model_000300.safetensors \\
        --spec_prompt_dataset arithmetic --spec_prompt_length 0 --spec_temperature 0.7 --spec_top_p 0.95 --out_dir runs/growmap
    python evaluate.py --method static_tree --growmap runs/growmap/growmap.json ... (the same target, draft and policy)

Measures, on texts that the target decodes under the policy, how often the k-th child of a node is the accepted one; times draft passes and
target passes over trees of every size in --tree_budgets; finds the best tree of each size and depth by dynamic programming; and writes the one that
emits most tokens per second here, with what it is expected to bring, to growmap.json, and a picture of it. With --tree_size it is the best tree of
that many nodes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from running.command_line import UserError, parse_args, run

import pandas as pd
import torch
from torch import nn

from decoding.children import Chooser, Coupling
from decoding.growmap import LARGEST, BestTrees, Growmap, best_size, most_nodes, save_growmap
from decoding.static_tree import StaticTree
from decoding.verify import TREE_RULES
from measuring.evaluation import DraftArgs, PolicyArgs, PromptArgs, fitted_to, load_draft
from measuring.tree_fitting import TreeCosts, acceptance_by_rank, acceptance_in_rounds, mean_acceptance, own_texts, replayed, tree_costs
from measuring.tree_plans import Fitted, coupling_for, fitting_options
from models.target_model import Target, eos_token_ids, load_target
from running.run_files import new_output_dir, record_run
from speculative import DecodeOptions

RESULTS_NAME = "growmap.json"


@dataclass(kw_only=True)
class Args(DraftArgs, PolicyArgs, PromptArgs):
    """Build a growmap."""

    verification: Literal["coupled", "match", "swor"] = field(default="coupled", metadata={"help": "the verification that the tree is for"})
    tree_width: int = field(default=16, metadata={"help": "most children of a node"})
    tree_depth: int = field(default=10, metadata={"help": "most levels"})
    tree_budgets: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64], metadata={"help": "tree sizes, root included, that are timed and chosen from"})
    tree_size: int | None = field(default=None, metadata={"help": "write the best tree of this size, whatever is fastest here"})

    @property
    def longest(self) -> int:
        return self.tree_depth

    def check(self) -> None:
        for name in ("tree_width", "tree_depth"):
            self.check_positive(name)
        sizes = [*self.tree_budgets, *([] if self.tree_size is None else [self.tree_size])]
        if not 2 <= min(sizes) <= max(sizes) <= LARGEST:
            raise UserError(f"--tree_budgets and --tree_size {' '.join(map(str, sizes))}: must lie between 2 and {LARGEST} nodes")
        if max(sizes) > most_nodes(self.tree_width, self.tree_depth):
            raise UserError(f"no tree of --tree_width {self.tree_width} and --tree_depth {self.tree_depth} has {max(sizes)} nodes: raise these, or ask for fewer")
        self.policy()
        super().check()
        self.check_draft(self.model_path, self.spec_prompt_length + self.spec_max_new_tokens + self.longest)


@dataclass(frozen=True)
class Measurement:
    """Acceptance by rank along the target's own texts, text by text, and in rounds; the weights of coupled values; and times."""

    by_text: list[torch.Tensor]
    in_rounds: list[float]
    coupling: Coupling
    costs: TreeCosts


def measure(target: Target, draft: nn.Module, options: DecodeOptions, fitted: Fitted, args: Args) -> Measurement:
    """What a growmap rests on."""
    prompts = fitted.prompts()
    coupling = coupling_for(target, draft, options, fitted) if args.verification == "coupled" else Coupling()
    chooser = Chooser(TREE_RULES[args.verification], options.policy, target.model.config.vocab_size, coupling)
    fitting = fitting_options(options)
    by_text = acceptance_by_rank(target.model, draft, own_texts(target.model, prompts, fitting), chooser, args.tree_width)
    acceptance = mean_acceptance(by_text)
    star = StaticTree(Growmap((-1, *[0] * args.tree_width)), args.verification, coupling)
    in_rounds = acceptance_in_rounds(target.model, draft, prompts, fitting, star)
    print(f"accepted by rank, along texts: {shown(acceptance)}; in rounds: {shown(in_rounds)}", flush=True)
    trees = BestTrees(acceptance, max(args.tree_budgets), args.tree_depth)
    plans = [StaticTree(trees.growmap(size, args.tree_depth, {}), args.verification, coupling) for size in args.tree_budgets]
    return Measurement(by_text, in_rounds, coupling, tree_costs(target.model, draft, prompts[0], options, plans))


def shown(vector: list[float]) -> str:
    """The beginning of an acceptance vector."""
    return " ".join(f"{chance:.3f}" for chance in vector[:6])


def choose(found: Measurement, args: Args) -> tuple[Growmap, pd.DataFrame]:
    """The growmap, and the best tree of every size with what is expected of it."""
    trees = BestTrees(mean_acceptance(found.by_text), max(*args.tree_budgets, args.tree_size or 1), args.tree_depth)
    costs = found.costs
    rows = []
    for size, seconds in costs.target_s.items():
        _, depth, _ = best_size(trees, costs.draft_s, {size: seconds})
        tokens = replayed(trees.growmap(size, depth, {}), found.by_text).tokens_per_call
        rows.append({
            "nodes": size, "levels": depth, "tokens_per_call": tokens, "if_independent": trees.tokens(size, depth),
            "speedup": tokens * costs.vanilla_s / (depth * costs.draft_s + seconds)})
    table = pd.DataFrame(rows)
    if args.tree_size is None:
        best = table.loc[table["speedup"].idxmax()]
        size, depth, expected = int(best["nodes"]), int(best["levels"]), {"speedup": float(best["speedup"])}
    else:
        size, depth, expected = args.tree_size, args.tree_depth, {}
    growmap = replayed(trees.growmap(size, depth, {}), found.by_text)
    expected |= {"tokens_per_call": growmap.tokens_per_call, "tokens_per_call_if_independent": trees.tokens(size, depth)}
    facts = {
        "model": args.model_path, "draft": args.checkpoint or args.draft_model_path, "dataset": args.dataset_names()[0], "policy": asdict(args.policy()),
        "verification": args.verification, "coupling": asdict(found.coupling), "acceptance_in_rounds": found.in_rounds,
        "seconds": {"vanilla": costs.vanilla_s, "draft": costs.draft_s, "target": {str(n): s for n, s in costs.target_s.items()}}, "expected": expected,
    }
    return replace(growmap, provenance=facts), table


def main() -> None:
    args = parse_args(Args)
    args.check()
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "a growmap")
    data = args.open_data()
    target = load_target(args.model_path, args)
    draft = load_draft(target, args)
    record_run(folder, args, args.facts(target, data))
    fitted = fitted_to(target, args, data, draft.columns["checkpoint"])
    options = DecodeOptions(policy=args.policy(), max_new_tokens=args.spec_max_new_tokens, eos_ids=eos_token_ids(target), seed=args.seed)
    growmap, table = choose(measure(target, draft.model, options, fitted, args), args)
    save_growmap(folder / RESULTS_NAME, growmap)
    from plotting.trees import plot_growmap  # matplotlib is slow to load

    plot_growmap(folder / RESULTS_NAME)
    print(table.to_string(index=False, float_format="%.3f"))
    print(f"{growmap.size} nodes on {growmap.depth} levels: {growmap.tokens_per_call:.2f} tokens per call expected; {folder / RESULTS_NAME}")


if __name__ == "__main__":
    run(main)

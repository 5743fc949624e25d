"""Flags of tree methods, and what they make: the tree plan, fitted to the draft and to this machine.

The weights of coupled values are kept beside the exit (or in the draft's folder), one pair for each target, data set and policy: fitted once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from running.command_line import UserError

import torch
from torch import nn

from decoding.children import Chooser, Coupling
from decoding.common_sense import CommonSense
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import BestTrees, Growmap, load_growmap
from decoding.specexec import SpecExec
from decoding.static_tree import StaticTree
from decoding.verify import TREE_RULES, TreeVerification
from engine.views import AnyPrompt
from measuring.followers import load_followers
from measuring.tree_fitting import acceptance_by_rank, fit_coupling, fit_trust, mean_acceptance, own_texts, replayed, tree_costs
from models.target_model import Target, text_facts, weights_hash
from running.run_files import file_hash, write_json
from speculative import METHODS, DecodeOptions, TreePlan

TREE_METHODS = tuple(name for name, method in METHODS.items() if method.plan is not None)
FIT_SEED = 1  # of the texts that are fitted to: not the noise of the texts that are measured
FIT = "draft, noise, trust"  # what is fitted: weights of another fit are not taken
FIT_TOKENS = 64  # new tokens of each of them, at most
GROWING = ("dynamic_tree", "specexec")
METHODS_OF = {  # flags that not every tree method has
    "growmap": ("static_tree",), "tree_budget": GROWING, "tree_depth": GROWING, "tree_topk": ("dynamic_tree",), "tree_level_cost": ("dynamic_tree",),
    "parallel_branches": ("specexec",), "branch_prune_threshold": ("specexec",),
}


@dataclass(kw_only=True)
class TreeArgs:
    """Flags of tree methods."""

    growmap: str | None = field(default=None, metadata={"help": "static_tree: the shape, made by commands/build_growmap.py, or a reference .pt file"})
    tree_budget: int = field(default=32, metadata={"help": "dynamic_tree, specexec: nodes of a tree, the root included"})
    tree_depth: int | None = field(default=None, metadata={"help": "levels of a tree (default: 8; specexec: 16)"})
    tree_topk: int = field(default=8, metadata={"help": "dynamic_tree: children of a node, and nodes of a draft pass"})
    tree_level_cost: str = field(default="auto", metadata={"help": "dynamic_tree: a round stops where a draft pass brings less than its cost: that in "
                                                                   "target passes, or auto (measured here); 0: never. swor never stops"})
    parallel_branches: int = field(default=8, metadata={"help": "specexec: children of a node, and nodes of a draft pass"})
    branch_prune_threshold: float = field(default=0.0, metadata={"help": "specexec: a child needs this share of its best sibling's probability"})
    commonsense: Literal["off", "exact", "overwrite"] = field(default="off", metadata={"help": "exact (lossless): frequent followers as further leaves; "
                                                                                               "overwrite (LOSSY): the published form"})
    followers: str | None = field(default=None, metadata={"help": "with --commonsense: the table, made by commands/build_followers.py"})
    commonsense_nodes: int = field(default=8, metadata={"help": "with --commonsense exact: nodes that are followers, of the budget of trees that grow and beside a growmap's"})
    commonsense_repair: bool = field(default=False, metadata={"help": "with --commonsense overwrite: feed overwritten tokens again"})

    def check_tree(self, method: str, verification: str | None) -> None:
        """Raise UserError for flags that cannot work together, before anything is loaded; a growmap is read."""
        for name, default in asdict(TreeArgs()).items():
            takers = METHODS_OF.get(name, TREE_METHODS)
            if getattr(self, name) != default and method not in takers:
                raise UserError(f"--{name} {getattr(self, name)} belongs to --method {' or '.join(takers)}: choose that, or leave it out")
        if method not in TREE_METHODS:
            return
        if method == "static_tree" and self.growmap is None:
            raise UserError("--method static_tree needs --growmap; commands/build_growmap.py makes one")
        self._check_numbers()
        if (self.commonsense == "off") != (self.followers is None):
            raise UserError("--commonsense exact or overwrite and --followers TABLE go together; commands/build_followers.py makes a table")
        if self.commonsense_repair and self.commonsense != "overwrite":
            raise UserError("--commonsense_repair goes with --commonsense overwrite")
        try:
            DecodeOptions(method=method, tree=self.plan(method, verification), common_sense=self._sense(torch.empty(0, 0, dtype=torch.int64)))
        except ValueError as error:
            raise UserError(str(error)) from error

    def _check_numbers(self) -> None:
        if self.branch_prune_threshold < 0 or self.branch_prune_threshold > 1:
            raise UserError(f"--branch_prune_threshold {self.branch_prune_threshold}: must lie between 0 and 1")
        for name in ("tree_budget", "tree_topk", "parallel_branches", "commonsense_nodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.tree_depth is not None and self.tree_depth < 1:
            raise UserError(f"--tree_depth {self.tree_depth}: must be at least 1")
        self.fixed_level_cost()

    def fixed_level_cost(self) -> float | None:
        """--tree_level_cost as a number, None for auto. Raises UserError."""
        if self.tree_level_cost == "auto":
            return None
        try:
            cost = float(self.tree_level_cost)
        except ValueError as error:
            raise UserError(f"--tree_level_cost {self.tree_level_cost}: must be auto or a number") from error
        if not 0 <= cost < math.inf:
            raise UserError(f"--tree_level_cost {self.tree_level_cost}: must be a finite number, and not negative")
        return cost

    def plan(self, method: str, verification: str | None) -> TreePlan:
        """The plan before it is fitted. Raises UserError or ValueError for one that cannot be."""
        own = {} if self.tree_depth is None else {"depth": self.tree_depth}
        if verification is not None:
            if verification not in TREE_RULES:
                raise UserError(f"--verification {verification}: trees are verified by {', '.join(TREE_RULES)}")
            own["verification"] = verification
        if method == "static_tree":
            return static_plan(read_growmap(self.growmap), verification)
        if method == "specexec":
            return SpecExec(budget=self.tree_budget, branches=self.parallel_branches, prune_threshold=self.branch_prune_threshold, **own)
        return DynamicTree(budget=self.tree_budget, top_k=self.tree_topk, **own)

    def common_sense(self, target: Target) -> CommonSense | None:
        """What --commonsense asks for. Raises UserError for a table that does not fit the target."""
        if self.commonsense == "off":
            return None
        table = load_followers(self.followers, target.tokenizer).table
        if len(table) < target.model.config.vocab_size:
            raise UserError(f"{self.followers} knows {len(table)} tokens, the target {target.model.config.vocab_size}; build it again with --model_path {target.name}")
        return self._sense(table.to(target.model.device))

    def _sense(self, table: torch.Tensor) -> CommonSense | None:
        return None if self.commonsense == "off" else CommonSense(table, self.commonsense, self.commonsense_nodes, self.commonsense_repair)


def read_growmap(path: str) -> Growmap:
    """The growmap at `path`. Raises UserError."""
    try:
        return load_growmap(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def static_plan(growmap: Growmap, verification: str | None = None) -> StaticTree:
    """A tree in the shape of `growmap`, verified as its file says that it was made for, unless told otherwise."""
    return StaticTree(growmap, verification or growmap.provenance.get("verification", "coupled"))


def made_for_another(plan: StaticTree, options: DecodeOptions, fitted: Fitted) -> list[str]:
    """In what the file of the plan's growmap says that it was made for something else: its acceptance, and what it promises, are that's."""
    made_for = plan.growmap.provenance
    wanted = {"policy": asdict(options.policy), "verification": plan.verification, "draft": fitted.path}
    return [f"{name} {made_for[name]}" for name, value in wanted.items() if name in made_for and value is not None and made_for[name] != value]


@dataclass(frozen=True)
class Fitted:
    """What trees are fitted to: `prompts()` of the data set `data`; `path` is where the draft lies, if it does."""

    prompts: Callable[[], list[AnyPrompt]]
    data: str
    path: str | None = None


def fitted_plan(
    plan: TreePlan, target: Target, draft: nn.Module, options: DecodeOptions, fitted: Fitted, level_cost: float | None = 0.0,
) -> TreePlan:
    """`plan` with the weights of coupled values and, for dynamic trees, the cost of a draft pass (measured where `level_cost` is None)."""
    if isinstance(plan, StaticTree) and made_for_another(plan, options, fitted):
        print(f"the growmap was made for {' and '.join(made_for_another(plan, options, fitted))}: what it promises may not come true", flush=True)
    if plan.verification == "coupled":
        plan = replace(plan, coupling=coupling_for(target, draft, options, fitted))
    if isinstance(plan, DynamicTree) and plan.verification != "swor" and plan.budget > 1:
        if level_cost is None:
            level_cost = tree_costs(target.model, draft, fitted.prompts()[0], options, [plan]).level_cost
        plan = replace(plan, level_cost=level_cost)
    return plan


def best_static_trees(
    verification: TreeVerification, budgets: Sequence[int], depth: int, width: int, target: Target, draft: nn.Module, options: DecodeOptions, fitted: Fitted,
) -> list[StaticTree]:
    """The best shape of every size, of at most `depth` levels and `width` children."""
    coupling = coupling_for(target, draft, options, fitted) if verification == "coupled" else Coupling()
    chooser = Chooser(TREE_RULES[verification], options.policy, target.model.config.vocab_size, coupling)
    texts = own_texts(target.model, fitted.prompts(), fitting_options(options))
    by_text = acceptance_by_rank(target.model, draft, texts, chooser, width)
    trees = BestTrees(mean_acceptance(by_text), max(budgets), depth)
    return [StaticTree(replayed(trees.growmap(size, depth, {}), by_text), verification, coupling) for size in budgets]


def fitting_options(options: DecodeOptions) -> DecodeOptions:
    """How the texts are decoded that are fitted to."""
    return replace(options, seed=options.seed + FIT_SEED, max_new_tokens=min(FIT_TOKENS, options.max_new_tokens), stop=None)


def coupling_for(target: Target, draft: nn.Module, options: DecodeOptions, fitted: Fitted) -> Coupling:
    """The weights kept beside the draft for this target, data set and policy, or fitted now and kept there."""
    path = None if fitted.path is None or not Path(fitted.path).exists() else Path(fitted.path)
    kept = None if path is None else _beside(path)
    fitting = fitting_options(options)
    identity = coupling_identity(target, draft, fitting, fitted)
    for entry in [] if kept is None else kept_entries(kept):
        if entry["made_for"] == identity:
            return Coupling(**entry["coupling"])
    coupling = fit_coupling(draft, own_texts(target.model, fitted.prompts(), fitting), options.policy.temperature)
    coupling = fit_trust(target.model, draft, fitted.prompts(), fitting, coupling)
    print(f"weights of coupled values: draft {coupling.draft:.3f}, noise {coupling.noise:.3f}, trust {coupling.trust:.3f}", flush=True)
    if kept is not None:
        _keep(kept, [*kept_entries(kept), {"made_for": identity, "coupling": asdict(coupling)}])
    return coupling


def coupling_identity(target: Target, draft: nn.Module, fitting: DecodeOptions, fitted: Fitted) -> dict:
    """All that the weights depend on, of texts decoded with `fitting` behind the prompts of `fitted`."""
    is_file = fitted.path is not None and Path(fitted.path).is_file()
    return {"fit": FIT, **text_facts(target), "eos_ids": sorted(fitting.eos_ids), "max_new_tokens": fitting.max_new_tokens, "seed": fitting.seed, "data": fitted.data,
            **asdict(fitting.policy), "draft": file_hash(fitted.path) if is_file else weights_hash(draft)}


def _beside(path: Path) -> Path:
    """Where the weights of the draft at `path` are kept."""
    return path / "coupling.json" if path.is_dir() else path.with_name(f"{path.name}.coupling.json")


def kept_entries(path: Path) -> list[dict]:
    """What is kept at `path`; nothing where there is no readable file, or one of another form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in found if _is_entry(entry)] if isinstance(found, list) else []


def _is_entry(entry: object) -> bool:
    """Whether it has the form that `coupling_for` writes."""
    weights = entry.get("coupling") if isinstance(entry, dict) else None
    named = {one.name for one in fields(Coupling)}
    return isinstance(weights, dict) and weights.keys() == named and all(isinstance(value, float) for value in weights.values()) and "made_for" in entry


def _keep(path: Path, entries: list[dict]) -> None:
    try:
        write_json(path, entries)
    except OSError as error:
        print(f"cannot keep the weights in {path} ({error.strerror}); they will be fitted again", flush=True)

"""The methods of the benchmarks: for each of them how it decodes, fitted to the draft, and what its figures depend on.

All run on `speculative.generate` with one sampling policy. common_sense is a dynamic tree whose further leaves are frequent followers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from running.command_line import UserError

from torch import nn

from decoding.autojudge import AnyJudge, TopK
from decoding.common_sense import CommonSense
from decoding.draft_length import AdaptiveLength
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import LARGEST
from decoding.sampling import SamplingPolicy
from decoding.specexec import SpecExec
from engine import views
from engine.exactness import why_no_trees
from engine.static_llama import why_unsupported
from measuring.evaluation import Draft, drafted_at_most
from measuring.followers import load_followers
from measuring.round_costs import round_costs
from measuring.tree_plans import Fitted, best_static_trees, fitted_plan, read_growmap, static_plan
from models.plain_llama import why_not_a_llama
from models.target_model import Target
from running.run_files import file_hash
from speculative import DecodeOptions
from training.judges import load_judge
from truncated_llama import TruncatedLlama

NAMES = ("vanilla", "speculative", "self_speculative", "static_tree", "dynamic_tree", "specexec", "autojudge", "topk", "common_sense", "hf_generate", "hf_assisted")
LOSSY = ("autojudge", "topk")
TREES = ("static_tree", "dynamic_tree", "specexec", "common_sense")
FOLLOWERS_SHARE = 4  # one node of so many is a follower in common_sense
GROUPS = ("all", "all_lossless")


class Unavailable(Exception):
    """A method that cannot run with what was given; the message says what to give."""


@dataclass(frozen=True)
class Settings:
    """What methods are set to, beside the draft: the benchmarks' flags."""

    policy: SamplingPolicy
    max_new_tokens: int
    seed: int
    gamma: str
    verification: Literal["rejection", "coupled"]
    tree_verification: Literal["coupled", "match", "swor"]
    tree_budget: int
    tree_depth: int
    parallel_branches: int
    growmap: str | None
    branch_prune_threshold: float = 0.0
    commonsense: Literal["exact", "overwrite"] = "exact"
    followers: str | None = None
    topk_rank: tuple[str, ...] = ()
    autojudge_checkpoint: str | None = None
    autojudge_threshold: list[float] | None = None

    def __post_init__(self) -> None:
        drafted_at_most(self.gamma)
        for rank in self.topk_rank:
            if rank != "all" and not (rank.isdecimal() and int(rank) >= 1):
                raise UserError(f"--topk_rank {rank}: must be all, or a number of at least 1")
        for threshold in self.autojudge_threshold or []:
            if not 0 <= threshold <= 1:
                raise UserError(f"--autojudge_threshold {threshold}: must lie between 0 and 1")
        if not 2 <= self.tree_budget <= LARGEST:
            raise UserError(f"--tree_budget {self.tree_budget}: must lie between 2 and {LARGEST} nodes")
        for name in ("tree_depth", "parallel_branches"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.branch_prune_threshold <= 1:
            raise UserError(f"--branch_prune_threshold {self.branch_prune_threshold}: must lie between 0 and 1")

    @property
    def longest(self) -> int:
        """Positions behind the committed tokens that a method may draft."""
        levels = 2 * self.tree_depth + 1  # specexec's, and more than common_sense's
        if self.growmap is not None:
            levels = max(levels, read_growmap(self.growmap).depth)
        return max(drafted_at_most(self.gamma), levels)


@dataclass(frozen=True)
class Subject:
    """What decodes: target, draft if there is one, and what trees are fitted to."""

    target: Target
    draft: Draft | None
    eos_ids: frozenset[int]
    fitted: Fitted

    @property
    def draft_model(self) -> nn.Module | None:
        """The draft's own, None where there is none."""
        return None if self.draft is None else self.draft.model


@dataclass(frozen=True)
class Way:
    """How a method will decode: `columns` of its records say so, `inputs` are what its figures depend on; `make(calibration)` fits it to the draft and to this
    machine, where something has to be measured behind the prompt `calibration`."""

    method: str
    columns: dict
    inputs: dict
    make: Callable[[views.AnyPrompt], DecodeOptions]
    label: str = ""

    @property
    def name(self) -> str:
        """What tells it from the other ways of one start."""
        return f"{self.method} {self.label}".strip()


def chosen_methods(words: list[str], commonsense: Literal["exact", "overwrite"] = "exact", names: tuple[str, ...] = NAMES) -> tuple[list[str], set[str]]:
    """The methods that --method names, in the order of `names`, and those of them that were named themselves. Raises UserError for unknown words."""
    unknown = [word for word in words if word not in names and word not in GROUPS]
    if unknown:
        raise UserError(f"--method {' '.join(unknown)}: choose from {', '.join((*names, *GROUPS))}")
    named, lossy = set(words) - set(GROUPS), {*LOSSY, *(["common_sense"] if commonsense == "overwrite" else [])}
    grouped = names if "all" in words else [name for name in names if name not in lossy] if "all_lossless" in words else []
    return [name for name in names if name in named or name in grouped], named


def ways_of(method: str, subject: Subject, settings: Settings) -> list[Way]:
    """How `method` will decode: one way, but for a method of which several thresholds or ranks were asked for. Raises Unavailable."""
    options = DecodeOptions(policy=settings.policy, max_new_tokens=settings.max_new_tokens, eos_ids=subject.eos_ids, seed=settings.seed)
    if method in ("vanilla", "hf_generate"):
        return [Way(method, {}, {}, lambda calibration: replace(options, method=method))]
    if subject.draft is None:
        raise Unavailable("needs a draft: give --checkpoint EXIT or --draft_model_path MODEL")
    if method in TREES:
        _check_trees(subject)
    if method in JUDGED:
        return JUDGED[method](subject, settings, options)
    return [MAKERS[method](method, subject, settings, options)]


# ---- chains ----

def _chain(method: str, subject: Subject, settings: Settings, options: DecodeOptions) -> Way:
    if method == "self_speculative":
        _check_shares(subject)
    options = replace(options, method=method, verification=settings.verification, gamma=drafted_at_most(settings.gamma), record_overlap=True)

    def make(calibration: views.AnyPrompt) -> DecodeOptions:
        if settings.gamma != "auto":
            return options
        return replace(options, gamma=AdaptiveLength(round_costs(subject.target.model, subject.draft_model, calibration, options)))

    columns = {"k": _number(settings.gamma), "verification": settings.verification}
    return Way(method, columns, columns, make)


def _number(gamma: str) -> int | str:
    return gamma if gamma == "auto" else int(gamma)


def _check_shares(subject: Subject) -> None:
    """Raise Unavailable unless the draft is an exit that shares blocks and cache with the target."""
    draft, target = subject.draft_model, subject.target.model
    if not isinstance(draft, TruncatedLlama):
        raise Unavailable("drafts with an exit of the target: give --checkpoint EXIT")
    reason = why_unsupported(target, draft.parts())
    if reason is not None:
        raise Unavailable(f"cannot share blocks of {reason}")


def _hf_assisted(method: str, subject: Subject, settings: Settings, options: DecodeOptions) -> Way:
    draft = subject.draft_model
    reason = why_not_a_llama(draft.exit, subject.target.model.config) if isinstance(draft, TruncatedLlama) else None
    if reason is not None:
        raise Unavailable(f"transformers cannot draft with this exit: {reason}")
    if settings.gamma == "auto":
        raise Unavailable("drafts a fixed number of tokens: give --k")
    columns = {"k": int(settings.gamma)}
    return Way(method, columns, columns, lambda calibration: replace(options, method=method, gamma=int(settings.gamma)))


# ---- lossy chains ----

def _judged(method: str, judge: AnyJudge, label: str, own: dict, settings: Settings, options: DecodeOptions, **identity: str) -> Way:
    options = replace(options, method=method, judge=judge, verification=settings.verification, gamma=drafted_at_most(settings.gamma))
    columns = {"k": options.gamma, "verification": settings.verification, **own}
    return Way(method, columns, {**columns, **identity}, lambda calibration: options, label)


def _autojudge(subject: Subject, settings: Settings, options: DecodeOptions) -> list[Way]:
    if settings.autojudge_checkpoint is None:
        raise Unavailable("needs --autojudge_checkpoint JUDGE, which commands/train_judge.py makes")
    try:
        judge, _ = load_judge(settings.autojudge_checkpoint, subject.target, subject.draft_model)
    except UserError as error:  # a preset's judge, and a draft that was typed
        raise Unavailable(str(error)) from error
    rule = "P(important) < {:g}" if judge.mode == "paper" else "P(accept) >= {:g}"
    found = []
    for threshold in settings.autojudge_threshold or [judge.threshold]:
        own = {"judge_rule": rule.format(threshold), "autojudge_threshold": threshold, "autojudge_checkpoint": settings.autojudge_checkpoint}
        found.append(_judged("autojudge", replace(judge, threshold=threshold), f"at {threshold:g}", own, settings, options, judge_hash=file_hash(settings.autojudge_checkpoint)))
    return found


def _topk(subject: Subject, settings: Settings, options: DecodeOptions) -> list[Way]:
    return [_judged("topk", TopK(None if rank == "all" else int(rank)), f"of {rank}", {"judge_rule": f"among the target's top {rank}"}, settings, options)
            for rank in settings.topk_rank]


JUDGED = {"autojudge": _autojudge, "topk": _topk}


# ---- trees ----

def _check_trees(subject: Subject) -> None:
    """Raise Unavailable where a model that transformers runs cannot be told who sees whom in a tree."""
    for model in (subject.target.model, subject.draft_model):
        own = model.target if isinstance(model, TruncatedLlama) else model
        reason = None if why_unsupported(own) is None else why_no_trees(own)
        if reason is not None:
            raise Unavailable(f"drafts trees, but {reason}")



def _static_tree(method: str, subject: Subject, settings: Settings, options: DecodeOptions) -> Way:
    target, draft, fitted = subject.target, subject.draft_model, subject.fitted
    columns = {"verification": settings.tree_verification, "tree_budget": settings.tree_budget}
    if settings.growmap is not None:
        plan = static_plan(read_growmap(settings.growmap), settings.tree_verification)
        columns |= {"tree_budget": plan.budget}
        inputs = {**columns, "growmap": file_hash(settings.growmap), "fitted_to": fitted.data}
        return Way(method, columns, inputs, lambda calibration: replace(options, method=method, tree=fitted_plan(plan, target, draft, options, fitted)))

    def make(calibration: views.AnyPrompt) -> DecodeOptions:
        plan, = best_static_trees(
            settings.tree_verification, [settings.tree_budget], settings.tree_depth, settings.parallel_branches, target, draft, options, fitted)
        return replace(options, method=method, tree=plan)

    return Way(method, columns, {**columns, **_shape(settings), "fitted_to": fitted.data}, make)


def _growing_tree(method: str, subject: Subject, settings: Settings, options: DecodeOptions) -> Way:
    width, depth = settings.parallel_branches, settings.tree_depth
    plan: DynamicTree | SpecExec = DynamicTree(settings.tree_budget, depth, width, verification=settings.tree_verification)
    if method == "specexec":
        plan = SpecExec(settings.tree_budget, 2 * depth, width, settings.branch_prune_threshold)
    own = {"branch_prune_threshold": settings.branch_prune_threshold} if method == "specexec" else {}
    columns = {"verification": plan.verification, "tree_budget": plan.budget, "parallel_branches": width, **own}

    def make(calibration: views.AnyPrompt) -> DecodeOptions:
        fitted = fitted_plan(plan, subject.target, subject.draft_model, options, subject.fitted, None)
        return replace(options, method=method, tree=fitted)

    return Way(method, columns, {**columns, **_shape(settings), "fitted_to": subject.fitted.data}, make)


def _shape(settings: Settings) -> dict:
    return {name: getattr(settings, name) for name in ("tree_depth", "parallel_branches")}


def _common_sense(method: str, subject: Subject, settings: Settings, options: DecodeOptions) -> Way:
    if settings.followers is None:
        raise Unavailable("needs --followers TABLE, which commands/build_followers.py makes")
    if settings.tree_verification == "swor":
        raise Unavailable("goes with --tree_verification coupled or match")
    table, vocab_size = load_followers(settings.followers, subject.target.tokenizer).table, subject.target.model.config.vocab_size
    if len(table) < vocab_size:
        raise UserError(f"{settings.followers} knows {len(table)} tokens, the target {vocab_size}; build it again with --model_path {subject.target.name}")
    table = table.to(subject.target.model.device)
    tree = _growing_tree("dynamic_tree", subject, settings, options)
    own = {"commonsense": settings.commonsense}

    def make(calibration: views.AnyPrompt) -> DecodeOptions:
        return replace(tree.make(calibration), common_sense=CommonSense(table, settings.commonsense, nodes=max(1, settings.tree_budget // FOLLOWERS_SHARE)))

    return Way(method, {**tree.columns, **own}, {**tree.inputs, **own, "followers": file_hash(settings.followers)}, make)


MAKERS: dict[str, Callable[[str, Subject, Settings, DecodeOptions], Way]] = {
    "speculative": _chain, "self_speculative": _chain, "hf_assisted": _hf_assisted,
    "static_tree": _static_tree, "dynamic_tree": _growing_tree, "specexec": _growing_tree, "common_sense": _common_sense,
}

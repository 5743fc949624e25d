"""The one public door to decoding: `generate(target, prompt, options, draft)` with any method of METHODS.

    from speculative import DecodeOptions, generate
    options = DecodeOptions(method="self_speculative", policy=SamplingPolicy(0.7, top_p=0.95), gamma=4, verification="coupled")
    generation = generate(target, prompt_ids, options, draft)

Symbols: p target distribution, q draft distribution (Leviathan et al.; Chen et al. swap them), γ = `gamma` drafted
tokens per round. Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral
from threading import Lock
from typing import Literal
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from decoding.autojudge import AnyJudge, Judge, TopK
from decoding.chain import chain_round
from decoding.common_sense import CommonSense
from decoding.draft_length import DraftLength, FixedLength
from decoding.dynamic_tree import DynamicTree, dynamic_tree_round
from decoding.hf_peers import generation_config, hf_decode
from decoding.sampling import Noise, SamplingPolicy
from decoding.self_speculation import self_speculation_round
from decoding.specexec import SpecExec, specexec_round
from decoding.state import DecodeState, DecodeStats, Model, RoundResult, synchronize
from decoding.static_tree import StaticTree, static_tree_round
from decoding.vanilla import vanilla_round
from decoding.verify import TREE_RULES, VERIFICATIONS, TreeRule, Verification
from engine.exactness import changes_within, sees_later_tokens, why_no_cache, why_no_trees
from engine.kv_cache import CachedModel
from engine.shared_exit import SharedExit
from engine.static_llama import KEPT_WIDTHS, Parts, StaticLlama, why_unsupported
from engine.views import AnyPrompt, ImageEmbeddings, ImagePrompt, Shifted, View, view_of
from models.generation_settings import note_unapplied
from models.plain_llama import as_llama, constant_drafting
from truncated_llama import TruncatedLlama

Stop = Callable[[list[int]], bool]
TreePlan = StaticTree | DynamicTree | SpecExec


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode. `stop(tokens)` may end it: asked with the new tokens so far, true leaves the last of them out.

    `gamma`, of chains, is a number or a rule (decoding/draft_length.py), `verification` theirs; `tree`, of tree methods, is a StaticTree, a DynamicTree or a
    SpecExec (the latter two have defaults), and `common_sense` helps them. `judge` is the Judge or TopK of the methods that have one. `engine` "static" is the
    suite's own forward pass, where it can run the models; "transformers" is theirs.
    """

    method: str = "vanilla"
    policy: SamplingPolicy = field(default_factory=SamplingPolicy)
    gamma: int | DraftLength = 4
    tree: TreePlan | None = None
    common_sense: CommonSense | None = None
    judge: AnyJudge | None = None
    verification: Verification = "rejection"
    max_new_tokens: int = 128
    eos_ids: frozenset[int] = frozenset()
    stop: Stop | None = None
    seed: int = 0
    record_overlap: bool = False
    engine: Literal["static", "transformers"] = "static"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.verification not in VERIFICATIONS:
            raise ValueError(f"unknown verification {self.verification!r}: choose one of {', '.join(VERIFICATIONS)}")
        self._check_kinds()
        if not 1 <= self.length().longest < KEPT_WIDTHS:
            raise ValueError(f"gamma {self.gamma} must lie between 1 and {KEPT_WIDTHS - 1}")
        self._check_tree()
        judge = METHODS[self.method].judge
        if (None if self.judge is None else type(self.judge)) is not judge:
            raise ValueError(f"method {self.method!r} {'has no judge: leave out judge=' if judge is None else f'needs a {judge.__name__} as judge='}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")

    def _check_kinds(self) -> None:
        """Raise ValueError for numbers and tokens that are none."""
        if not isinstance(self.gamma, int) and not callable(getattr(self.gamma, "goes_on", None)):
            raise ValueError(f"gamma {self.gamma!r} must be a whole number, or a rule such as AdaptiveLength")
        for name in ("max_new_tokens", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} {getattr(self, name)!r} must be a whole number")
        if not isinstance(self.eos_ids, Collection) or not all(isinstance(token, Integral) for token in self.eos_ids):
            raise ValueError(f"eos_ids {self.eos_ids!r} must be a set of token ids, such as frozenset({{2}})")

    def _check_tree(self) -> None:
        plan = METHODS[self.method].plan
        if plan is None and self.tree is not None:
            raise ValueError(f"method {self.method!r} drafts no trees: leave out tree=")
        if plan is StaticTree and self.tree is None:
            raise ValueError("method 'static_tree' needs tree=StaticTree(growmap)")
        if plan is not None and not isinstance(self.plan, plan):
            raise ValueError(f"method {self.method!r} takes a {plan.__name__} as tree=, not a {type(self.tree).__name__}")
        if self.common_sense is None:
            return
        if plan is None or self.rule.accept == "swor":
            raise ValueError("common_sense goes with tree methods whose verification is 'coupled' or 'match'")
        if plan is not StaticTree and self.common_sense.reserved >= self.plan.budget:
            raise ValueError(f"{self.common_sense.reserved} nodes for followers leave nothing of a tree of {self.plan.budget}: give fewer")

    @property
    def plan(self) -> TreePlan | None:
        """What the trees of a tree method look like."""
        kind = METHODS[self.method].plan
        return self.tree if kind is None or self.tree is not None else kind()

    @property
    def ahead(self) -> int:
        """Positions behind the committed tokens that a round may draft."""
        if METHODS[self.method].draft == "none":
            return 0
        if self.plan is None:
            return self.length().longest
        return self.plan.depth + (self.common_sense is not None and self.common_sense.mode == "exact")

    @property
    def slots_ahead(self) -> int:
        """Slots behind the committed tokens that a round may fill."""
        if self.plan is None:
            return self.length().longest
        return self.plan.slots + (0 if self.common_sense is None else self.common_sense.nodes + self.plan.depth)

    @property
    def rule(self) -> TreeRule | None:
        """How a tree method chooses and accepts children."""
        if self.plan is None:
            return None
        rule = TREE_RULES[self.plan.verification]
        return replace(rule, accept="overwrite") if self.common_sense is not None and self.common_sense.mode == "overwrite" else rule

    @property
    def lossless(self) -> bool:
        """Whether the output has the target's law."""
        return METHODS[self.method].lossless and (self.rule is None or self.rule.lossless)

    def length(self) -> DraftLength:
        """The rule that `gamma` stands for."""
        return FixedLength(self.gamma) if isinstance(self.gamma, int) else self.gamma


@dataclass(frozen=True)
class Method:
    """How a decoding method decodes, whether its output has the target's law, and what it drafts with.

    It has a `round`, or, as transformers' own decoders, decodes a `whole` text (target, prompt, options, draft, seed).
    `draft`: "none", "model" (any with the target's vocabulary), "exit" (a TruncatedLlama of this very target) or "any" (an exit that shares the target's
    blocks where it can, else a model). `plan`, `judge`: what DecodeOptions.tree and DecodeOptions.judge have to be.
    """

    lossless: bool
    draft: Literal["none", "model", "exit", "any"]
    round: Callable[[DecodeState, DecodeOptions], list[RoundResult]] | None = None
    whole: Callable[[nn.Module, View, DecodeOptions, nn.Module | None, int], tuple[list[int], DecodeStats]] | None = None
    plan: type | None = None
    judge: type | None = None


def _judged_round(state: DecodeState, options: DecodeOptions) -> list[RoundResult]:
    """A chain's round, whichever its draft needs, with a judge."""
    round_ = self_speculation_round if isinstance(state.draft, SharedExit) else chain_round
    return round_(state, options.length(), options.verification, options.judge)


def _hf_generate(target: nn.Module, prompt: View, options: DecodeOptions, draft: nn.Module | None, seed: int) -> tuple[list[int], DecodeStats]:
    return hf_decode(target, prompt, generation_config(options.policy, options.max_new_tokens, options.eos_ids), seed)


def _hf_assisted(target: nn.Module, prompt: View, options: DecodeOptions, draft: nn.Module | None, seed: int) -> tuple[list[int], DecodeStats]:
    config = generation_config(options.policy, options.max_new_tokens, options.eos_ids)
    return hf_decode(target, prompt, config, seed, _drafting(options, config), _as_assistant(draft))


def _hf_early_exit(target: nn.Module, prompt: View, options: DecodeOptions, draft: nn.Module | None, seed: int) -> tuple[list[int], DecodeStats]:
    if not isinstance(draft, TruncatedLlama):
        raise ValueError("method 'hf_early_exit' drafts with the target's first blocks: pass a TruncatedLlama that says how many")
    config = generation_config(options.policy, options.max_new_tokens, options.eos_ids)
    config.assistant_early_exit = draft.exit.target_layer + 1
    return hf_decode(target, prompt, config, seed, _drafting(options, config))


def _drafting(options: DecodeOptions, config: GenerationConfig) -> GenerationConfig:
    """γ drafted tokens in every round, which end where the text that `config` describes ends."""
    return constant_drafting(options.length().longest, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)


METHODS = {
    "vanilla": Method(True, "none", lambda state, options: vanilla_round(state)),
    "speculative": Method(True, "model", lambda state, options: chain_round(state, options.length(), options.verification)),
    "self_speculative": Method(True, "exit", lambda state, options: self_speculation_round(state, options.length(), options.verification)),
    "autojudge": Method(False, "any", _judged_round, judge=Judge),
    "topk": Method(False, "any", _judged_round, judge=TopK),
    "static_tree": Method(True, "any", lambda state, options: static_tree_round(state, options.plan), plan=StaticTree),
    "dynamic_tree": Method(True, "any", lambda state, options: dynamic_tree_round(state, options.plan), plan=DynamicTree),
    "specexec": Method(True, "any", lambda state, options: specexec_round(state, options.plan), plan=SpecExec),
    "hf_generate": Method(True, "none", whole=_hf_generate),
    "hf_assisted": Method(True, "model", whole=_hf_assisted),
    "hf_early_exit": Method(True, "exit", whole=_hf_early_exit),
}
_assistants: WeakKeyDictionary[nn.Module, tuple[list, PreTrainedModel]] = WeakKeyDictionary()


def _as_assistant(draft: nn.Module) -> PreTrainedModel:
    """`draft` as transformers takes it: an exit as a plain Llama, made anew when its weights have changed. Raises UserError where there is no such Llama."""
    if not isinstance(draft, TruncatedLlama):
        return draft
    parameters = chain(draft.exit.parameters(), draft.target.parameters())
    weights = [(parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version) for parameter in parameters]
    if draft not in _assistants or _assistants[draft][0] != weights:
        _assistants[draft] = weights, as_llama(draft.target, draft.exit)
    return _assistants[draft][1]


@dataclass(frozen=True)
class Generation:
    """The new tokens (the end-of-text token included, the prompt not) and what producing them took."""

    tokens: list[int]
    stats: DecodeStats


def generate(
    target: nn.Module,
    prompt: AnyPrompt,
    options: DecodeOptions,
    draft: nn.Module | None = None,
    *,
    prompt_id: int = 0,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continue `prompt` (token ids, at least one, or an ImagePrompt; see engine/views.py) with `options`.

    `target` and `draft` are called as transformers' causal models are (a TruncatedLlama is too) and must share their
    token ids; `prompt_id` keys the noise beside `options.seed`. `on_tokens` gets each round's tokens as they are
    committed. Raises ValueError for a prompt that is no list of the models' token ids, is empty or does not fit the context, and for a missing or unfit draft.
    """
    report = None if on_tokens is None else lambda row, tokens: on_tokens(tokens)
    return generate_batch(target, [prompt], options, draft, prompt_ids=[prompt_id], on_tokens=report)[0]


@torch.inference_mode()
def generate_batch(
    target: nn.Module,
    prompts: list[AnyPrompt],
    options: DecodeOptions,
    draft: nn.Module | None = None,
    *,
    prompt_ids: list[int] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[Generation]:
    """Continue several prompts together: each text is what `generate` makes of its prompt alone (up to rounding).

    Texts may be of any length, accept different numbers of drafted tokens and end at different times; one that has
    ended takes part in the passes, unused, until the last ends. `on_tokens(row, tokens)` gets what is committed.
    """
    note_unapplied(target)
    method = METHODS[options.method]
    drafting = target if method.draft == "none" else draft
    asked = [Views.of(prompt, target, drafting) for prompt in prompts]
    for views in asked:
        _check(target, views, options, drafting)
    if method.plan is not None and len(prompts) > 1:
        raise ValueError(f"method {options.method!r} decodes one text at a time, not {len(prompts)}")
    prompt_ids = list(range(len(prompts))) if prompt_ids is None else prompt_ids
    if len(prompt_ids) != len(prompts):
        raise ValueError(f"{len(prompt_ids)} prompt_ids for {len(prompts)} prompts")
    if method.whole is not None:
        if options.stop is not None or on_tokens is not None:
            raise ValueError(f"method {options.method!r} is transformers' own: it knows neither stop nor on_tokens")
        return [Generation(*method.whole(target, views.target, options, draft, options.seed + key)) for views, key in zip(asked, prompt_ids, strict=True)]
    with _on(target.device), _lent_engines(target, _slots([views.target for views in asked], options), len(asked), options.engine) as engines:
        return _decode(engines, asked, options, draft, prompt_ids, on_tokens)


def _on(device: torch.device) -> AbstractContextManager:
    """Streams, events and graphs belong to torch's current GPU: this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Views:
    """A prompt as target and draft are given it; the same object where they are given the same."""

    target: View
    draft: View

    @classmethod
    def of(cls, prompt: AnyPrompt, target: nn.Module, draft: nn.Module | None) -> Views:
        if not isinstance(prompt, ImagePrompt):
            _check_ids(prompt)
        own = view_of(prompt, target)
        return cls(own, view_of(prompt, draft) if isinstance(prompt, ImagePrompt) and draft is not None else own)

    @property
    def shift(self) -> int:
        """By how many tokens the draft's is shorter."""
        return len(self.target.ids) - len(self.draft.ids)


def _decode(
    engines: Engines, asked: list[Views], options: DecodeOptions, draft: nn.Module | None, prompt_ids: list[int],
    on_tokens: Callable[[int, list[int]], None] | None,
) -> list[Generation]:
    """Rounds until every text has ended."""
    synchronize(engines.target.device)
    start = time.perf_counter()
    state = _prepare(engines, asked, options, draft, prompt_ids)
    state.clock.add("prefill", time.perf_counter() - start)
    with state.clock("prefill"):
        _prefill(state, asked)
    stats = [DecodeStats(prompt_tokens=len(views.target.ids)) for views in asked]
    while state.running:
        results = METHODS[options.method].round(state, options)
        for row in list(state.running):
            stats[row].rounds.append(results[row])
            kept, finished = _cut(state.committed[row][stats[row].prompt_tokens :], results[row].tokens, options)
            state.committed[row] += kept
            if finished:
                state.running.remove(row)
            if on_tokens is not None:
                on_tokens(row, kept)
        state.roll_back()
    synchronize(engines.target.device)
    wall_s = time.perf_counter() - start
    return [_finish(state, row, stats[row], wall_s) for row in range(len(asked))]


def _cut(generated: list[int], new: list[int], options: DecodeOptions) -> tuple[list[int], bool]:
    """The part of `new` to commit behind `generated`, and whether generation ends: at end-of-text, stop or length."""
    kept = new[: options.max_new_tokens - len(generated)]
    for i, token in enumerate(kept):
        if token in options.eos_ids:
            return kept[: i + 1], True
        if options.stop is not None and options.stop([*generated, *kept[: i + 1]]):
            return kept[:i], True
    return kept, len(generated) + len(kept) >= options.max_new_tokens


def _finish(state: DecodeState, row: int, stats: DecodeStats, wall_s: float) -> Generation:
    """The generation of text `row`, with the counts of the models and clocks that all texts share."""
    tokens = state.committed[row][stats.prompt_tokens :]
    stats.emitted, stats.wall_s, stats.seconds = len(tokens), wall_s, state.clock.seconds()
    stats.target_calls, stats.target_tokens = state.target.calls, state.target.tokens
    if state.draft is not None:
        stats.draft_calls, stats.draft_tokens = state.draft.calls, state.draft.tokens
    return Generation(tokens, stats)


def _check_ids(prompt: object) -> None:
    """Raise ValueError for a prompt that is no list of whole numbers."""
    if isinstance(prompt, list | tuple) and all(isinstance(token, Integral) for token in prompt):
        return
    shape = f" of shape {tuple(prompt.shape)}" if isinstance(prompt, torch.Tensor | np.ndarray) else ""
    kind = f"{type(prompt).__name__}{shape}" if not isinstance(prompt, list | tuple) else f"{type(prompt).__name__} of {type(prompt[0]).__name__}s"
    raise ValueError(f"a prompt is a list of token ids, not a {kind}: give one text's ids, of a tokenizer's output encoding['input_ids'], of a tensor ids[0].tolist()")


def _check_known(model: nn.Module, view: View) -> None:
    """Raise ValueError for tokens that the model has no embedding of; those of images get theirs otherwise."""
    size = model.get_input_embeddings().num_embeddings if isinstance(model, PreTrainedModel | TruncatedLlama) else model.config.vocab_size
    unknown = [token for token in view.ids if not 0 <= token < size and (view.encode_images is None or token != view.placeholder)]
    if unknown:
        raise ValueError(f"the prompt has token {unknown[0]}, but {type(model).__name__} knows tokens 0 to {size - 1}: encode it with the model's own tokenizer")


def _check(target: nn.Module, asked: Views, options: DecodeOptions, draft: nn.Module | None) -> None:
    if not asked.target.ids:
        raise ValueError("the prompt is empty; give at least the BOS token")
    if draft is None:
        raise ValueError(f"method {options.method!r} drafts with a model: pass draft=")
    if draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"draft and target have different vocabularies ({draft.config.vocab_size} and {target.config.vocab_size} tokens)")
    if options.method == "self_speculative":
        _check_exit(target, draft, options)
    for model, view in ((target, asked.target), (draft, asked.draft)):
        _check_known(model, view)
        _check_room(context_length(model.config), len(view.ids), options)
    _check_rotary(target, len(asked.target.ids), options)


def _check_rotary(target: nn.Module, prompt: int, options: DecodeOptions) -> None:
    """Raise ValueError where transformers' forward pass would give another text in passes of other widths. StaticLlama has a table of its own."""
    reason = changes_within(target.config, prompt, prompt + options.max_new_tokens + options.ahead)
    if reason is None or options.method == "hf_generate":
        return
    if METHODS[options.method].whole is not None or options.engine == "transformers" or why_unsupported(target) is not None:
        raise ValueError(f"{reason}, within this text, so that what transformers makes of it depends on how it is cut into passes: end it before, or begin it behind")


def _check_room(context: int, prompt: int, options: DecodeOptions) -> None:
    if prompt + options.max_new_tokens + options.ahead > context:
        raise ValueError(
            f"prompt ({prompt}), new tokens ({options.max_new_tokens}) and gamma or tree depth ({options.ahead}) exceed the context of {context}")


def room_behind(target: nn.Module, draft: nn.Module, prompt: AnyPrompt, options: DecodeOptions) -> int:
    """Most new tokens that the contexts of both models have room for behind `prompt`, beside what a round drafts ahead."""
    views = Views.of(prompt, target, draft)
    return min(context_length(model.config) - len(view.ids) for model, view in ((target, views.target), (draft, views.draft))) - options.ahead


def _check_exit(target: nn.Module, draft: nn.Module, options: DecodeOptions) -> None:
    if not isinstance(draft, TruncatedLlama) or draft.target is not target:
        raise ValueError(f"method {options.method!r} drafts with an exit of the target itself: pass a TruncatedLlama of it, or use method 'speculative'")
    reason = why_unsupported(target, draft.parts()) if options.engine == "static" else "with transformers' forward pass (engine='transformers')"
    if reason is not None:
        raise ValueError(f"method {options.method!r} cannot share blocks {reason if options.engine != 'static' else 'of ' + reason}; use method 'speculative'")


def _check_states(judge: Judge, target: Model, draft: Model | SharedExit) -> None:
    """Raise ValueError where the hidden states that a judge reads are not there, or not its own."""
    read = (target, draft) if judge.features == "both" else (target,)
    if any(isinstance(model, CachedModel) for model in read):
        raise ValueError("a judge of hidden states needs models that StaticLlama can run, and engine='static'; use a Judge of the draft's law, or method 'topk'")
    sizes = [model.head.size for model in read]
    if judge.mean.shape != (sum(sizes),) or judge.mean.device != target.device:
        raise ValueError(f"the judge reads {len(judge.mean)} features on {judge.mean.device}, the models have {' + '.join(map(str, sizes))} on {target.device}")


def context_length(config: object) -> int:
    """Positions that a model can have: without a limit where dynamic NTK scaling stretches them, or where there are none (ALiBi)."""
    rope = getattr(config, "rope_parameters", None) or {}
    limit = None if rope.get("rope_type") == "dynamic" else getattr(config, "max_position_embeddings", None)
    return sys.maxsize if limit is None else limit


# ---- the models in the form that decoding runs them: made once, kept with the target ----

@dataclass
class Engines:
    """A target's forward pass with its cache, and those of the drafts that were used with it; one generation at a time has them."""

    target: Model
    drafts: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)
    in_use: Lock = field(default_factory=Lock)


_engines: WeakKeyDictionary[nn.Module, Engines] = WeakKeyDictionary()
_noted: WeakSet[nn.Module] = WeakSet()
_causal: WeakSet[nn.Module] = WeakSet()
_making = Lock()  # weights are joined by one thread at a time


def _slots(views: list[View], options: DecodeOptions) -> int:
    """Capacity of a cache for these texts."""
    return max(len(view.ids) for view in views) + options.max_new_tokens + options.slots_ahead + 1


def _prepare(engines: Engines, asked: list[Views], options: DecodeOptions, draft: nn.Module | None, prompt_ids: list[int]) -> DecodeState:
    """Empty caches of sufficient capacity for target and draft, and all else that a generation starts with."""
    kind = _draft_kind(engines.target, draft, options)
    drafter = None if kind == "none" else _draft_for(engines, draft, kind, _slots([views.draft for views in asked], options), options.engine)
    if options.judge is not None and options.judge.reads_states:
        _check_states(options.judge, engines.target, drafter)
    if options.plan is not None:
        _check_trees(engines.target, drafter)
    engines.target.start([len(views.target.ids) for views in asked], options.slots_ahead)
    if drafter is not None:
        drafter.start([len(views.draft.ids) for views in asked], options.slots_ahead)
    return DecodeState(
        target=engines.target, draft=_shifted(drafter, asked), policy=options.policy, noise=Noise.of(options.seed, prompt_ids, engines.target.device),
        committed=[list(views.target.ids) for views in asked], eos_ids=options.eos_ids, record_overlap=options.record_overlap,
        common_sense=options.common_sense,
    )


@contextmanager
def _lent_engines(target: nn.Module, capacity: int, batch: int, engine: str) -> Iterator[Engines]:
    """The target's engines, or, where another generation has them (in another thread, or in its own on_tokens), new ones."""
    with _making:
        engines = _engines_for(target, capacity, batch, engine)
        if not engines.in_use.acquire(blocking=False):
            engines = Engines(_new_engine(target, capacity, batch, engine))
            engines.in_use.acquire()
    try:
        yield engines
    finally:
        engines.in_use.release()


def _engines_for(target: nn.Module, capacity: int, batch: int, engine: str) -> Engines:
    """The target's engines, made anew where they are too small, for another batch or engine, or the weights have changed place."""
    known = _engines.get(target)
    if known is None or not known.target.serves(target, capacity, batch, engine):
        known = Engines(_new_engine(target, capacity, batch, engine))
        if isinstance(known.target, StaticLlama):  # a CachedModel holds the model, and would keep it alive here
            _engines[target] = known
    return known


def _draft_kind(target: Model, draft: nn.Module | None, options: DecodeOptions) -> str:
    """Method.draft, of which "any" is "exit" or "model"."""
    kind = METHODS[options.method].draft
    if kind != "any":
        return kind
    shares = isinstance(draft, TruncatedLlama) and isinstance(target, StaticLlama) and why_unsupported(draft.target, draft.parts()) is None
    return "exit" if shares and target.serves(draft.target, 0, target.batch, options.engine) else "model"


def _draft_for(engines: Engines, draft: nn.Module, kind: str, capacity: int, engine: str) -> Model | SharedExit:
    known = engines.drafts.get(draft)
    if kind == "exit":
        fits = isinstance(known, SharedExit) and known.serves(engines.target, draft.exit)
    else:
        model, parts = _parts(draft)
        fits = isinstance(known, StaticLlama) and known.serves(model, capacity, engines.target.batch, engine, parts)
    if not fits:
        known = SharedExit(engines.target, draft.exit) if kind == "exit" else _new_engine(draft, capacity, engines.target.batch, engine)
        if not isinstance(known, CachedModel):
            engines.drafts[draft] = known
    return known


def _parts(model: nn.Module) -> tuple[nn.Module, Parts | None]:
    """The Llama that `model` is, or is cut from, and its parts where they are others than that Llama's."""
    return (model.target, model.parts()) if isinstance(model, TruncatedLlama) else (model, None)


def _new_engine(model: nn.Module, capacity: int, batch: int, engine: str) -> Model:
    """StaticLlama where it can run `model` and is wanted; else transformers' own forward pass, said once."""
    target, parts = _parts(model)
    reason = why_unsupported(target, parts)
    if engine == "static" and reason is None:
        return StaticLlama(target, capacity, batch, parts)
    _check_cached(target)
    if batch > 1:
        raise ValueError(f"only StaticLlama decodes several texts together, and it cannot run {reason or 'engine=transformers'}")
    if engine == "static" and isinstance(target, PreTrainedModel) and target not in _noted:
        _noted.add(target)
        print(f"decoding with transformers' own forward pass, which is slower: StaticLlama cannot run {reason}", file=sys.stderr)
    return CachedModel(model)


def _check_trees(*models: Model | SharedExit | None) -> None:
    """Raise ValueError where transformers' forward pass cannot run the nodes of a tree."""
    for model in models:
        reason = why_no_trees(_parts(model.model)[0]) if isinstance(model, CachedModel) else None
        if reason is not None:
            raise ValueError(f"no trees can be drafted or verified: {reason}; choose a chain method, such as 'speculative'")


def _check_cached(model: nn.Module) -> None:
    """Raise ValueError where CachedModel cannot run `model`."""
    if model in _causal or not isinstance(model, PreTrainedModel):
        return
    reason = why_no_cache(type(model), model.config) or ("attention to later tokens" if sees_later_tokens(model) else None)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be decoded here: it has {reason}")
    _causal.add(model)


def _shifted(drafter: Model | SharedExit | None, asked: list[Views]) -> Model | SharedExit | Shifted | None:
    """The draft's engine, in the target's places where its prompts are shorter. Raises ValueError where they are shorter by different numbers of tokens."""
    shifts = {views.shift for views in asked} if drafter is not None else {0}
    if len(shifts) > 1:
        raise ValueError(f"the draft's prompts are {', '.join(map(str, sorted(shifts)))} tokens shorter than the target's: decode them one by one")
    shift, = shifts
    return Shifted(drafter, shift) if shift else drafter


def _prefill(state: DecodeState, asked: list[Views]) -> None:
    """Fill all caches; every model looks at the images once. An exit fills the target's cache too, as it shares blocks with it."""
    given = _texts([views.target for views in asked])
    if not isinstance(state.draft, SharedExit):
        state.target.prefill(*given)
    if state.draft is not None:
        same = all(views.draft is views.target for views in asked)
        state.draft.prefill(*(given if same else _texts([views.draft for views in asked])))


def _texts(views: list[View]) -> tuple[list[list[int]], list[ImageEmbeddings | None]]:
    """All tokens but the last, and what is seen of the images, now."""
    return [view.ids[:-1] for view in views], [view.image_embeddings() for view in views]

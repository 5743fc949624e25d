"""The one public door to decoding: `generate(target, prompt, options, draft)` with any method of METHODS.

    from speculative import DecodeOptions, generate
    options = DecodeOptions(method="speculative", policy=SamplingPolicy(0.7, top_p=0.95), gamma=4, verification="coupled")
    generation = generate(target, prompt_ids, options, draft)

Symbols: p target distribution, q draft distribution (Leviathan et al.; Chen et al. swap them), γ = `gamma` drafted
tokens per round. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from decoding.chain import chain_round
from decoding.kv_cache import CachedModel
from decoding.sampling import Noise, SamplingPolicy
from decoding.state import DecodeState, DecodeStats, RoundResult, synchronize
from decoding.vanilla import vanilla_round
from decoding.verify import VERIFICATIONS, Verification

Stop = Callable[[list[int]], bool]


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode. `stop(tokens)` may end it: asked with the new tokens so far, true leaves the last of them out."""

    method: str = "vanilla"
    policy: SamplingPolicy = field(default_factory=SamplingPolicy)
    gamma: int = 4
    verification: Verification = "rejection"
    max_new_tokens: int = 128
    eos_ids: frozenset[int] = frozenset()
    stop: Stop | None = None
    seed: int = 0
    record_overlap: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.verification not in VERIFICATIONS:
            raise ValueError(f"unknown verification {self.verification!r}: choose one of {', '.join(VERIFICATIONS)}")
        if self.gamma < 1:
            raise ValueError(f"gamma {self.gamma} must be at least 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")


@dataclass(frozen=True)
class Method:
    """One round of a decoding method, whether its output has the target's law, and whether it drafts with a model."""

    round: Callable[[DecodeState, DecodeOptions], RoundResult]
    lossless: bool
    needs_draft: bool


METHODS = {
    "vanilla": Method(lambda state, options: vanilla_round(state), lossless=True, needs_draft=False),
    "speculative": Method(lambda state, options: chain_round(state, options.gamma, options.verification), lossless=True, needs_draft=True),
}


@dataclass(frozen=True)
class Generation:
    """The new tokens (the end-of-text token included, the prompt not) and what producing them took."""

    tokens: list[int]
    stats: DecodeStats


@torch.inference_mode()
def generate(
    target: nn.Module,
    prompt: list[int],
    options: DecodeOptions,
    draft: nn.Module | None = None,
    *,
    prompt_id: int = 0,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continue `prompt` (token ids, at least one) with `options`.

    `target` and `draft` are called as transformers' causal models are (a TruncatedLlama is too) and must share their
    token ids; `prompt_id` keys the noise beside `options.seed`. `on_tokens` gets each round's tokens as they are
    committed. Raises ValueError for an empty prompt, a missing draft, or a prompt that does not fit the context.
    """
    method = METHODS[options.method]
    _check(target, prompt, options, draft if method.needs_draft else target)
    start = time.perf_counter()
    state = DecodeState(
        target=CachedModel(target), draft=CachedModel(draft) if method.needs_draft else None, policy=options.policy,
        noise=Noise(options.seed, prompt_id, target.device), committed=list(prompt), eos_ids=options.eos_ids,
        record_overlap=options.record_overlap,
    )
    with state.clock("prefill"):
        for model in filter(None, (state.target, state.draft)):
            model.prefill(torch.tensor(prompt[:-1], dtype=torch.int64))
    calls_of_prefill = {id(model): model.calls for model in filter(None, (state.target, state.draft))}
    finished = False
    while not finished:
        result = method.round(state, options)
        state.stats.rounds.append(result)
        kept, finished = _cut(state.committed[len(prompt) :], result.tokens, options)
        state.committed += kept
        if on_tokens is not None:
            on_tokens(kept)
    synchronize(target.device)
    state.stats.wall_s = time.perf_counter() - start
    state.stats.prompt_tokens, state.stats.emitted = len(prompt), len(state.committed) - len(prompt)
    state.stats.target_calls = state.target.calls - calls_of_prefill[id(state.target)]
    if state.draft is not None:
        state.stats.draft_calls = state.draft.calls - calls_of_prefill[id(state.draft)]
    return Generation(state.committed[len(prompt) :], state.stats)


def _cut(generated: list[int], new: list[int], options: DecodeOptions) -> tuple[list[int], bool]:
    """The part of `new` to commit behind `generated`, and whether generation ends: at end-of-text, stop or length."""
    kept = new[: options.max_new_tokens - len(generated)]
    for i, token in enumerate(kept):
        if token in options.eos_ids:
            return kept[: i + 1], True
        if options.stop is not None and options.stop([*generated, *kept[: i + 1]]):
            return kept[:i], True
    return kept, len(generated) + len(kept) >= options.max_new_tokens


def _check(target: nn.Module, prompt: list[int], options: DecodeOptions, draft: nn.Module | None) -> None:
    if not prompt:
        raise ValueError("the prompt is empty; give at least the BOS token")
    if draft is None:
        raise ValueError(f"method {options.method!r} drafts with a model: pass draft=")
    if draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"draft and target have different vocabularies ({draft.config.vocab_size} and {target.config.vocab_size} tokens)")
    ahead = options.gamma if METHODS[options.method].needs_draft else 0
    context = min(model.config.max_position_embeddings for model in (target, draft))
    if len(prompt) + options.max_new_tokens + ahead > context:
        raise ValueError(f"prompt ({len(prompt)}), new tokens ({options.max_new_tokens}) and gamma ({ahead}) exceed the context of {context}")

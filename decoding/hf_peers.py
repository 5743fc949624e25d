"""transformers' own decoders on the same weights: the peers that the suite's speeds are compared with.

`hf_generate` is `model.generate`; `hf_assisted` is the same with an assistant model, or, without one, with the target's
own first blocks (`assistant_early_exit`). Both draw from the target's law, by their own noise. Their first tokens come with
the prefill: these, and the time up to them, do not count as decoding.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from decoding.sampling import SamplingPolicy
from decoding.state import NO_DRAFT_LAW, NO_TARGET_LAW, DecodeStats, RoundResult, check_logits, synchronize
from engine.views import View


class Marks(BaseStreamer):
    """When the tokens of each round arrived, and how many: transformers hands over the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass


def generation_config(policy: SamplingPolicy, max_new_tokens: int, eos_ids: frozenset[int]) -> GenerationConfig:
    """`policy` in transformers' words: every filter is set, as some have defaults that change the law (top_k 50)."""
    sampling = {"do_sample": False}
    if policy.temperature > 0:
        sampling = {"do_sample": True, "temperature": policy.temperature, "top_k": policy.top_k, "top_p": policy.top_p}
    ends = sorted(eos_ids)
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else None, **sampling)


@contextmanager
def _lent(target: PreTrainedModel, drafting: GenerationConfig | None, assistant: PreTrainedModel | None) -> Iterator[None]:
    """The models with a generation config of no choice of its own, and afterwards as they were.

    transformers takes from a model's own what a given config leaves open, and from the drafting model's, which is the target itself where there
    is no assistant, how to draft. Early-exit drafting shortens the target for as long as it runs.
    """
    models = [target] if assistant is None else [target, assistant]
    before = [(model, model.generation_config, model.config.num_hidden_layers) for model in models]
    try:
        target.generation_config = GenerationConfig()
        if drafting is not None:
            models[-1].generation_config = drafting
        yield
    finally:
        for model, config, layers in before:
            model.generation_config, model.config.num_hidden_layers = config, layers


def _inputs(target: PreTrainedModel, prompt: View, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `generate` is given: tokens, or embeddings where there are images."""
    images = prompt.image_embeddings()
    given = {"input_ids": ids} if images is None else {"inputs_embeds": images.embedded(target, ids)}
    return {**given, "attention_mask": torch.ones_like(ids)}


def _check_laws(text: torch.Tensor, target: PreTrainedModel, assistant: PreTrainedModel | None) -> None:
    """Raise FloatingPointError where a model's logits behind `text` (1, T) are not finite: transformers would choose some token, or fail in torch."""
    for model, fault in ((target, NO_TARGET_LAW), (assistant, NO_DRAFT_LAW)):
        if model is not None:
            check_logits(model(input_ids=text, use_cache=False, logits_to_keep=1).logits, fault)


def hf_decode(
    target: PreTrainedModel, prompt: View, config: GenerationConfig, seed: int,
    drafting: GenerationConfig | None = None, assistant: PreTrainedModel | None = None,
) -> tuple[list[int], DecodeStats]:
    """New tokens and counts of `target.generate` behind `prompt`; `drafting` says how much the assistant, or the early exit, drafts, which see no images.

    The first and the last pass, outside of the measured time, see that the logits are finite.
    """
    if prompt.encode_images is not None and drafting is not None:
        raise ValueError("transformers' assisted generation drafts behind text only: use method 'speculative'")
    ids, marks = torch.tensor([prompt.ids], device=target.device), Marks()
    _check_laws(ids, target, assistant)
    synchronize(target.device)
    start = time.perf_counter()
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings(), _lent(target, drafting, assistant):
        warnings.simplefilter("ignore")  # transformers warns about its own use of its own arguments
        torch.manual_seed(seed)
        out = target.generate(**_inputs(target, prompt, ids), generation_config=config, assistant_model=assistant, streamer=marks)
    synchronize(target.device)
    wall_s = time.perf_counter() - start
    _check_laws(out, target, None)
    tokens = out[0, 0 if prompt.encode_images is not None else len(prompt.ids) :].tolist()  # behind embeddings it returns the new ones only
    with_prefill, *counts = marks.counts[1:]
    rounds = [RoundResult([0] * count) for count in counts]
    stats = DecodeStats(
        prompt_tokens=len(prompt.ids), emitted=len(tokens), with_prefill=with_prefill, target_calls=len(rounds), rounds=rounds, wall_s=wall_s)
    stats.seconds["prefill"] = marks.times[1] - start
    return tokens, stats

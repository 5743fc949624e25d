"""transformers' own decoders on the same weights: the peers that the suite's speeds are compared with.

`hf_generate` is `model.generate`; `hf_assisted` is the same with an assistant model, or, without one, with the target's
own first blocks (`assistant_early_exit`). Both draw from the target's law, by their own noise. Their first tokens come with
the prefill: these, and the time up to them, do not count as decoding.
"""

from __future__ import annotations

import time
import warnings

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from decoding.sampling import SamplingPolicy
from decoding.state import DecodeStats, RoundResult, synchronize


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
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **sampling)


def hf_decode(
    target: PreTrainedModel, prompt: list[int], config: GenerationConfig, seed: int, assistant: PreTrainedModel | None = None
) -> tuple[list[int], DecodeStats]:
    """New tokens and counts of `target.generate` behind `prompt`.

    An `assistant`'s own generation config says how much it drafts; transformers reads it there and nowhere else.
    """
    ids, marks = torch.tensor([prompt], device=target.device), Marks()
    synchronize(target.device)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about its own use of its own arguments
        torch.manual_seed(seed)
        out = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, assistant_model=assistant, streamer=marks)
    synchronize(target.device)
    wall_s = time.perf_counter() - start
    tokens = out[0, len(prompt) :].tolist()
    rounds = [RoundResult([0] * count) for count in marks.counts[1:]]
    stats = DecodeStats(
        prompt_tokens=len(prompt), emitted=len(tokens), with_prefill=marks.counts[1], target_calls=len(rounds), rounds=rounds, wall_s=wall_s)
    stats.seconds["prefill"] = marks.times[1] - start
    return tokens, stats

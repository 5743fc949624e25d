"""Which of transformers' models CachedModel decodes exactly, and by which methods.

A draft changes no output only where a pass over several tokens says of each what a pass over it alone would have said, and where rejected tokens leave no trace.
Keys and values have that property, the states of a Mamba or of a convolution have not; masks have it as far as they can be told what a
tree looks like; rotary frequencies have it unless they depend on how long the text is that a pass has seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")  # kinds of layers that keep nothing but keys and values
TAKES_MASKS = ("eager", "sdpa")  # implementations of attention to which a mask (1, 1, T, S) can be given


def why_no_cache(model: type[nn.Module], config: PretrainedConfig) -> str | None:
    """Why models of this class and configuration cannot be decoded with a cache that forgets single tokens, or None where they can."""
    if not issubclass(model, PreTrainedModel):
        return None
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION))
    if others or model._is_stateful:
        return f"{' and '.join(others) or 'recurrent'} layers, whose state cannot be rolled back to an earlier token"
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return "no cache of keys and values"
    return None


@torch.inference_mode()
def sees_later_tokens(model: nn.Module) -> bool:
    """Whether what `model` says of a token depends on those behind it, as encoders' does: tried on two texts that end differently."""
    first, second = model(input_ids=torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device), use_cache=False).logits[:, 1].float()
    return bool((first - second).norm() > 0.05 * first.norm())


def why_no_trees(model: nn.Module) -> str | None:
    """Why `model`, run by transformers, cannot be told who sees whom in a tree, or None where it can."""
    if not isinstance(model, PreTrainedModel):
        return None
    if not model._supports_attention_backend or "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} makes masks and positions of its own"
    attention = model.config._attn_implementation
    return None if attention in TAKES_MASKS else f"attention by {attention} takes no mask; choose sdpa"


def changes_within(config: PretrainedConfig, prompt: int, longest: int) -> str | None:
    """Which of a model's rotary frequencies depend on how a text of `prompt` tokens, up to `longest`, is cut into passes, or None.

    transformers computes those of type longrope from one length on differently ("original_max_position_embeddings"), and those of type dynamic from there on
    for each length: for all tokens of a pass alike, and for those in the cache no more.
    """
    for rope in ropes(config):
        kind, limit = rope.get("rope_type"), rotary_limit(config, rope)
        if limit is not None and longest > limit and (kind == "dynamic" or prompt - 1 <= limit):
            return f"rotary embeddings of type {kind!r} change at {limit} tokens"
    return None


def rotary_limit(config: PretrainedConfig, rope: dict) -> int | None:
    """The longest text with the frequencies that the rotary embeddings `rope` begin with; None where these never change."""
    limits = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": config.max_position_embeddings}
    return limits.get(rope.get("rope_type"))


def ropes(config: PretrainedConfig) -> Iterator[dict]:
    """The settings of a model's rotary embeddings, of which there may be one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    yield from [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, dict)]

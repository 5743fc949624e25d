"""A language model with its key-value cache behind one small interface.

The only file that touches transformers' cache API (5.x: `DynamicCache.crop` wants a negative count and changes the
cache in place; an object kept as a "snapshot" changes with it).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache


class CachedModel:
    """Batch-1 decoding with a model called as `model(input_ids=, past_key_values=, use_cache=True).logits`.

    `length` tokens are in the cache, `calls` passes were made; `forward` appends, `crop` rolls back. After any sequence of both, the cache
    equals that of a fresh pass over the same tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.length = 0
        self.calls = 0
        self._cache = DynamicCache()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` (T,) int64 and return the logits (T, V) that follow each of them."""
        return self._pass(tokens)

    def prefill(self, tokens: torch.Tensor) -> None:
        """Append `tokens` (T,) without returning logits; none is no change."""
        if len(tokens):
            self._pass(tokens, logits_to_keep=1)

    def _pass(self, tokens: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        output = self.model(
            input_ids=tokens[None].to(self.device), past_key_values=self._cache, use_cache=True, logits_to_keep=logits_to_keep
        )
        self.length += len(tokens)
        self.calls += 1
        return output.logits[0]

    def crop(self, length: int) -> None:
        """Forget everything behind the first `length` tokens; more than are held is no change."""
        surplus = self.length - length
        if surplus > 0:
            self._cache.crop(-surplus)
            self.length = length

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of each block, (1, heads, length, head dimension): for tests that compare caches."""
        return [(layer.keys, layer.values) for layer in self._cache.layers]

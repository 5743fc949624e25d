"""Any causal language model of transformers, with its key-value cache, behind the interface of StaticLlama.

The only file that touches transformers' cache API (5.x: `DynamicCache.crop` wants a negative count and changes the
cache in place; an object kept as a "snapshot" changes with it).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache

from decoding.programs import Programs


class CachedModel:
    """One text, decoded with a model called as `model(input_ids=, past_key_values=, use_cache=True).logits`.

    `lengths`, `calls`, `tokens`, `forward`, `advance`, `prefill`, `crop` and `layers` are those of StaticLlama.
    """

    batch, on_host, reach, token_ids = 1, True, 0, None

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, model.device
        self.programs = Programs(torch.device("cpu"))  # a growing cache cannot be captured
        self.start()

    def start(self, prompt_lengths: list[int] | None = None) -> None:
        """Forget all tokens and counts."""
        self.lengths, self.calls, self.tokens = [0], 0, 0
        self._cache = DynamicCache()

    def starts(self) -> torch.Tensor:
        """Where the next pass begins, int64 (1,)."""
        return torch.tensor(self.lengths, device=self.device)

    def forward(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Logits (1, T, V) that follow each of `tokens` (1, T), appended to the cache."""
        return self._pass(tokens)

    def _pass(self, tokens: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        return self.model(
            input_ids=tokens.to(self.device), past_key_values=self._cache, use_cache=True, logits_to_keep=logits_to_keep
        ).logits

    def advance(self, count: int) -> None:
        """Count the `count` tokens of a pass as appended."""
        self.lengths = [self.lengths[0] + count]
        self.calls += 1
        self.tokens += count

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """`forward` and `advance`."""
        logits = self.forward(tokens, self.starts())
        self.advance(tokens.shape[1])
        return logits

    def prefill(self, prompts: list[list[int]]) -> None:
        """Fill the cache with the text, without logits; an empty one is no change."""
        if prompts[0]:
            self._pass(torch.tensor(prompts), logits_to_keep=1)
            self.lengths = [len(prompts[0])]

    def crop(self, lengths: list[int]) -> None:
        """Forget everything behind the first `lengths[0]` tokens; more than are held is no change."""
        surplus = self.lengths[0] - lengths[0]
        if surplus > 0:
            self._cache.crop(-surplus)
            self.lengths = list(lengths)

    def layers(self, row: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of each block, (1, heads, length, head dimension): for tests that compare caches."""
        return [(layer.keys, layer.values) for layer in self._cache.layers]

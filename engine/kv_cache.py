"""Any causal language model of transformers, with its key-value cache, behind the interface of StaticLlama.

The only file that touches transformers' cache API (5.x: `DynamicCache.crop` wants a negative count and changes the
cache in place; an object kept as a "snapshot" changes with it).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig

from engine.programs import Programs
from engine.views import ImageEmbeddings


class CachedModel:
    """One text, decoded with a model called as `model(input_ids=, past_key_values=, use_cache=True).logits`.

    `lengths`, `calls`, `tokens`, `forward`, `forward_tree`, `advance`, `note`, `prefill`, `crop`, `keep` and `layers` are those of
    StaticLlama. `_filled` tokens are in the library's cache: those of `lengths`, and what passes have appended behind.
    """

    batch, on_host, reach, token_ids = 1, True, 0, None

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device, self.config = model, model.device, model.config
        self.programs = Programs(torch.device("cpu"))  # a growing cache cannot be captured
        self.start()

    def start(self, prompt_lengths: list[int] | None = None, ahead: int = 0) -> None:
        """Forget all tokens and counts."""
        self.lengths, self.calls, self.tokens, self._filled = [0], 0, 0, 0
        self._cache, self._depths = DynamicCache(), self._no_nodes()

    def _no_nodes(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64, device=self.device)

    def starts(self) -> torch.Tensor:
        """Where the next pass begins, int64 (1,)."""
        return torch.tensor(self.lengths, device=self.device)

    def forward(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Logits (1, T, V) that follow each of `tokens` (1, T), appended to the cache."""
        return self._pass(tokens.shape[1], input_ids=tokens.to(self.device))

    def forward_tree(self, tokens: torch.Tensor, starts: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) that follow the nodes `tokens` (T,), appended to the cache; places as StaticLlama's. For models of which `why_no_trees` is None."""
        count, window = visible.shape
        start, chain = int(starts), window - count - len(self._depths)  # nodes that came before as plain text, such as the root
        self._depths = torch.cat([torch.arange(chain, device=self.device), self._depths, depths])
        keys = torch.cat([torch.arange(start, device=self.device), start + self._depths])
        seen = torch.cat([torch.ones(count, start, dtype=torch.bool, device=self.device), visible], 1)
        masks = tree_masks(self.config, seen, start + depths, keys, self.model.dtype)
        return self._call(count, input_ids=tokens[None].to(self.device), attention_mask=masks, position_ids=(start + depths)[None])[0]

    def _pass(self, count: int, **inputs: object) -> torch.Tensor:
        """Logits of a pass that appends `count` tokens of text."""
        self._depths = self._no_nodes()
        return self._call(count, **inputs)

    def _call(self, count: int, **inputs: object) -> torch.Tensor:
        self._filled += count
        return self.model(**inputs, past_key_values=self._cache, use_cache=True).logits

    def advance(self, count: int) -> None:
        """Count the `count` tokens of a pass as appended."""
        self.lengths = [self.lengths[0] + count]
        self.note(count)

    def note(self, count: int) -> None:
        """Count a pass over `count` tokens that the cache does not keep."""
        self.calls += 1
        self.tokens += count

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """`forward` and `advance`."""
        logits = self.forward(tokens, self.starts())
        self.advance(tokens.shape[1])
        return logits

    def prefill(self, prompts: list[list[int]], images: list[ImageEmbeddings | None] | None = None) -> None:
        """Fill the cache with the text, without logits; an empty one is no change. `images` as StaticLlama's."""
        if not prompts[0]:
            return
        tokens, own = torch.tensor(prompts, device=self.device), images and images[0]
        inputs = {"input_ids": tokens} if own is None else {"inputs_embeds": own.embedded(self.model, tokens)}
        self._pass(tokens.shape[1], **inputs, logits_to_keep=1)
        self.lengths = [len(prompts[0])]

    def crop(self, lengths: list[int]) -> None:
        """Forget everything behind the first `lengths[0]` tokens; more than are held is no change."""
        self.lengths, self._depths = [min(self.lengths[0], lengths[0])], self._no_nodes()
        surplus, self._filled = self._filled - self.lengths[0], self.lengths[0]
        if surplus > 0:
            self._cache.crop(-surplus)

    def keep(self, start: int, nodes: torch.Tensor) -> None:
        """Behind the first `start` tokens keep of a tree that was run there the `nodes` (N,), ascending."""
        for layer in self._cache.layers:
            layer.keys, layer.values = (torch.cat([half[..., :start, :], half[..., start + nodes, :]], -2) for half in (layer.keys, layer.values))
        self._filled, self._depths = start + len(nodes), self._no_nodes()
        self.lengths = [self._filled]

    def layers(self, row: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of each block, (1, heads, length, head dimension): for tests that compare caches."""
        return [(layer.keys, layer.values) for layer in self._cache.layers]


def tree_masks(
    config: PretrainedConfig, seen: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What is added to the scores of nodes at `positions` (T,), (1, 1, T, S), if they see `seen`, bool (T, S), of the tokens at positions `keys` (S,).

    As transformers' own masks: one for each kind of layer where there are several, and none reaches farther than a layer's window.
    """
    def mask(kind: str) -> torch.Tensor:
        near = seen
        if kind == "sliding_attention":
            near = seen & (keys > positions[:, None] - config.sliding_window)
        elif kind == "chunked_attention":
            near = seen & (keys // config.attention_chunk_size == positions[:, None] // config.attention_chunk_size)
        return torch.zeros(near.shape, dtype=dtype, device=near.device).masked_fill_(~near, torch.finfo(dtype).min)[None, None]

    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) != {"full_attention"}:
        return {kind: mask(kind) for kind in set(kinds)}
    slides = kinds is None and hasattr(type(config), "sliding_window") and config.sliding_window is not None
    return mask("sliding_attention" if slides else "full_attention")

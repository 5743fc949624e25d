"""An exit on the target's own blocks: what it shares with the target, and what it keeps for itself.

Embeddings, the first blocks' keys and values and their hidden states h_E are the target's: nothing is computed twice. An exit with a block of its own
keeps that block's keys and values itself.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.static_llama import KEPT_WIDTHS, Head, Kept, KeyValues, Scatter, Span, Stack, StaticLlama, weights_at
from engine.views import ImageEmbeddings


class SharedExit:
    """An exit on the blocks of a StaticLlama. `exit_` has `prefix`, `block` (or None), `norm`, `head` and `token_ids` (or None).

    `lengths[b]` tokens of text b are in the cache of the exit's own block, if it has one; `block_tokens` counts the
    tokens that went through each block, exit's and target's together.
    """

    def __init__(self, target: StaticLlama, exit_: nn.Module) -> None:
        """Raises ValueError for an exit that is not where the target is, or of another dtype."""
        like = target.embedding
        if any((parameter.dtype, parameter.device) != (like.dtype, like.device) for parameter in exit_.parameters()):
            raise ValueError(f"the exit must be {like.dtype} on {like.device}, as the target is: make the TruncatedLlama anew")
        self.target, self.prefix, self.token_ids = target, exit_.prefix, exit_.token_ids
        self.programs = target.programs.another()
        with torch.inference_mode(False), torch.no_grad():
            self.head = Head(exit_.norm, exit_.head, target.config.rms_norm_eps)
            self.kept = Kept(self.prefix, target.embedding.new_zeros(target.batch, target.capacity, target.embedding.shape[-1]))  # h_E by position
            self.own = None if exit_.block is None else self._own_stack(exit_.block)
        self._weights = weights_at(exit_)
        self.start()

    def start(self, prompt_lengths: list[int] | None = None, ahead: int = 0) -> None:
        """Forget all tokens and counts."""
        self.lengths, self.calls, self.tokens, self.block_tokens = [0] * self.target.batch, 0, 0, 0

    def prefill(self, prompts: list[list[int]], images: list[ImageEmbeddings | None] | None = None) -> None:
        """Fill the target's cache and the own block's with a text each; see StaticLlama."""
        for row, prompt in enumerate(prompts):
            for x, place in self.target.prefill_passes(row, prompt, images and images[row]):
                self.target.stack.run(x, place, kept=self.kept)
                if self.own is not None:
                    self.own.run(place.load(self.kept.store), place)
        self.lengths = [len(prompt) for prompt in prompts]

    def draft(self, tokens: torch.Tensor, starts: torch.Tensor, index: int, behind: int) -> torch.Tensor:
        """Logits (B, 1, V_d) that follow `tokens` (B, 1), the `index`-th behind the cached ones.

        The exit's own block first takes the hidden states of the `behind` tokens that it has not seen.
        """
        place = self.target.place(starts, 1, index)
        x = self._prefix(tokens, place)
        if self.own is not None:
            if behind > 0:
                place = self.target.place(starts, 1 + behind, index - behind)
                x = place.load(self.kept.store)
            x = self.own.run(x, place).view(len(tokens), 1 + behind, -1)[:, -1]
        return self.head(x)[:, None]

    def draft_tree(self, tokens: torch.Tensor, starts: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Logits (T, V_d) that follow the nodes `tokens` (T,) of a tree, placed as StaticLlama.place_tree says."""
        place = self.target.place_tree(starts, depths, visible)
        x = self._prefix(tokens, place)
        return self.head(x if self.own is None else self.own.run(x, place))

    def verify_tree(self, tokens: torch.Tensor, starts: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """The target's logits (N, V) that follow the nodes `tokens` (N,); hidden states are kept for the own block to catch up with."""
        place = self.target.place_tree(starts, depths, visible)
        return self.target.head(self.target.stack.run(self.target.embed(tokens), place, kept=self.kept))

    def keep(self, start: int, nodes: torch.Tensor) -> None:
        """As StaticLlama.keep, for the hidden states that `verify_tree` has kept."""
        self.kept.store[0, start : start + len(nodes)] = self.kept.store[0, start + nodes]

    def catch_up(self) -> None:
        """Let the own block see all cached tokens, behind rounds that did not draft: in passes of their own, which no program has to be captured for."""
        starts, behind = self.target.starts(), self.behind
        for offset in range(-behind, 0, KEPT_WIDTHS):
            place = self.target.place(starts, min(KEPT_WIDTHS, -offset), offset)
            self.own.run(place.load(self.kept.store), place)
        self.lengths = list(self.target.lengths)
        self.block_tokens += behind * self.target.batch

    def verify(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The target's logits (B, T, V) that follow each of `tokens` (B, T), of which all but the last were drafted behind."""
        count = tokens.shape[1]
        place = self.target.place(starts, count)
        if count == 1:
            x = self.target.stack.run(self.target.embed(tokens), place, kept=self.kept)
        else:
            self._prefix(tokens[:, -1:], self.target.place(starts, 1, count - 1))
            x = self.target.stack.run(place.load(self.kept.store), place, first=self.prefix)
        return self.target.head(x).view(*tokens.shape, -1)

    def _prefix(self, tokens: torch.Tensor, place: Span | Scatter) -> torch.Tensor:
        """h_E (B, D) of `tokens` (B, 1), kept at their place."""
        return self.target.stack.run(self.target.embed(tokens), place, last=self.prefix, kept=self.kept)

    def _own_stack(self, block: nn.Module) -> Stack:
        cache = KeyValues(1, self.target.batch, self.target.capacity, self.target.config, self.target.embedding)
        return Stack([block], cache, self.target.config, self.target.embedding)

    def serves(self, target: StaticLlama, exit_: nn.Module) -> bool:
        """Whether this is still that exit on that target."""
        return target is self.target and self._weights == weights_at(exit_)

    @property
    def reach(self) -> int:
        """See StaticLlama."""
        return self.target.reach

    def crop(self, lengths: list[int]) -> None:
        """Forget what the own block holds behind the first `lengths[b]` tokens of text b."""
        self.lengths = [min(held, length) for held, length in zip(self.lengths, lengths, strict=True)]

    @property
    def behind(self) -> int:
        """Tokens in the target's cache that the own block has not seen; without one it is as if it had."""
        return 0 if self.own is None else max(fed - seen for fed, seen in zip(self.target.lengths, self.lengths, strict=True))

    def advance(self, behind: int, batch: int) -> None:
        """Count a drafted token."""
        self.note(batch)
        self.block_tokens += 0 if self.own is None else batch * behind

    def note(self, count: int) -> None:
        """Count a pass over `count` tokens."""
        self.calls += 1
        self.tokens += count
        self.block_tokens += count * (self.prefix + (self.own is not None))

"""Vision-language targets: a LLaVA decodes as the Llama inside it, behind a prompt of which some embeddings are images' (2304.08485; Spec-LLaVA 2509.11961).

There is no round of its own here. An image becomes embeddings, once, by each model's own vision encoder; the prompt is prefilled, once; what follows is text, and every
method, cache and tree is that of text, at the positions behind the whole prompt. Each model has its own `View` of a prompt: a draft with another vision encoder has other
placeholders, a draft of text alone (2404.08856) none; its positions are then its own, and `Shifted` keeps them so.
Lossless with any draft: q may see whatever it likes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """Embeddings that stand in the place of tokens: `values` (R, D) at `positions`, R ascending indices."""

    positions: list[int]
    values: torch.Tensor

    def write_into(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """`x` (T, D), the embeddings of the tokens from `start` on, with those of images among them; changed in place."""
        first, end = bisect_left(self.positions, start), bisect_left(self.positions, start + len(x))
        if first < end:
            x[torch.tensor(self.positions[first:end], device=x.device) - start] = self.values[first:end].to(x.dtype)
        return x

    def embedded(self, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (1, T, D) that `model` has for `input_ids` (1, T), with those of images."""
        x = model.get_input_embeddings()(input_ids)
        self.write_into(x[0])
        return x


@dataclass(frozen=True, eq=False)
class View:
    """A prompt as one model is given it: `ids`, of which every `placeholder` stands for a row of what `encode_images` returns (R, D); without it there are no images."""

    ids: list[int]
    placeholder: int = -1
    encode_images: Callable[[], torch.Tensor] | None = None

    def image_embeddings(self) -> ImageEmbeddings | None:
        """The images', computed now. Raises ValueError where they are not as many as the placeholders."""
        if self.encode_images is None:
            return None
        positions = [index for index, token in enumerate(self.ids) if token == self.placeholder]
        values = self.encode_images()
        if len(values) != len(positions):
            raise ValueError(f"{len(positions)} placeholders for {len(values)} embeddings of images")
        return ImageEmbeddings(positions, values)


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A prompt with images: the view of each model that takes part. All must end in the same token, which is text."""

    views: Mapping[nn.Module, View]

    def __post_init__(self) -> None:
        ends = {view.ids[-1] for view in self.views.values()}
        if len(ends) > 1 or any(view.ids[-1] == view.placeholder for view in self.views.values()):
            raise ValueError("the views of a prompt must end in the same text token")


AnyPrompt = list[int] | ImagePrompt


def view_of(prompt: AnyPrompt, model: nn.Module) -> View:
    """How `model`, or an exit of it, is given `prompt`. Raises ValueError for a model that the prompt has no view for."""
    if not isinstance(prompt, ImagePrompt):
        return View(prompt)
    whole = getattr(model, "target", model)  # an exit sees what its target sees
    if whole not in prompt.views:
        raise ValueError(f"the prompt has no view for this {type(whole).__name__}: make it for target and draft")
    return prompt.views[whole]


def forced_logits(model: nn.Module, prompt: AnyPrompt, tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of `model`, teacher-forced, that predict each of `tokens` (T) behind `prompt`."""
    view = view_of(prompt, model)
    input_ids, images = torch.tensor([[*view.ids, *tokens[:-1]]], device=model.device), view.image_embeddings()
    inputs = {"input_ids": input_ids} if images is None else {"inputs_embeds": images.embedded(model, input_ids)}
    return model(**inputs, use_cache=False).logits[0, len(view.ids) - 1 :]


class Shifted:
    """A draft's engine as rounds see it, whose prompt is `shift` tokens shorter than the target's: they speak of the target's places, it is fed at its own."""

    def __init__(self, engine: object, shift: int) -> None:
        self._engine, self._shift = engine, shift

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text in the draft's cache, in the target's count."""
        return [length + self._shift for length in self._engine.lengths]

    @property
    def reach(self) -> tuple:
        """What a captured pass depends on: the engine's own reach, and the shift that it was captured with."""
        return self._engine.reach, self._shift

    def forward(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """See StaticLlama; `starts` are the target's."""
        return self._engine.forward(tokens, starts - self._shift)

    def forward_tree(self, tokens: torch.Tensor, starts: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """See StaticLlama; `starts` are the target's."""
        return self._engine.forward_tree(tokens, starts - self._shift, depths, visible)

    def crop(self, lengths: list[int]) -> None:
        """See StaticLlama; `lengths` are the target's."""
        self._engine.crop([max(length - self._shift, 0) for length in lengths])

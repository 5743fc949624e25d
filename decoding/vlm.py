"""Vision-language models: a LLaVA decodes as the Llama that it holds, behind a prompt of which some rows are made of pictures (2304.08485; Spec-LLaVA 2509.11961).

There is no round of its own here. A picture becomes rows of embeddings, once, by each model's own tower and projector; the prompt is prefilled, once; what follows is
text, and every method, cache and tree is that of text, at the positions behind the whole prompt. Each model has its own `View` of a prompt: a draft with another tower
has other placeholders, one that sees no pictures (2404.08856) none; its positions are then its own, and `Shifted` keeps them so.
Lossless with any draft: q may see whatever it likes.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, LlavaForConditionalGeneration

# ---- models ----

def as_text_model(language_model: LlamaModel, lm_head: nn.Linear, vocab_size: int) -> LlamaForCausalLM:
    """The Llama of these parts, of which it has no copies, that knows the first `vocab_size` tokens only: a token behind them, such as a picture's placeholder or
    what pads the matrices, has no logit, so that no policy can draw it. They may still be fed."""
    config = copy.deepcopy(language_model.config)
    config.num_hidden_layers = 0
    with torch.device("meta"):
        shell = LlamaForCausalLM(config)
    config.num_hidden_layers, config.vocab_size = language_model.config.num_hidden_layers, vocab_size
    head = nn.Linear(lm_head.in_features, vocab_size, bias=lm_head.bias is not None, device="meta")
    for name, parameter in lm_head.named_parameters():
        setattr(head, name, nn.Parameter(parameter.detach()[:vocab_size], requires_grad=False))
    shell.model, shell.lm_head = language_model, head
    return shell.eval()


class Eyes:
    """What makes rows of embeddings of pictures: a LLaVA's tower and projector."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self._model = model
        side = model.config.vision_config.image_size
        self.shape = (model.config.vision_config.num_channels, side, side)
        self.rows = len(self(torch.zeros(1, *self.shape)))  # of one picture

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Tower and projector."""
        return self._model.model.vision_tower, self._model.model.multi_modal_projector

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rows (n·rows, D) of `pixels` (n, 3, height, width)."""
        config, like = self._model.config, self._model.lm_head.weight
        found = self._model.model.get_image_features(
            pixel_values=pixels.to(like.device, like.dtype), vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy, return_dict=True)
        return torch.cat(list(found.pooler_output)).to(like.dtype)


# ---- prompts ----

@dataclass(frozen=True, eq=False)
class Rows:
    """Embeddings that stand in the place of tokens: `values` (R, D) at `places`, R ascending indices."""

    places: list[int]
    values: torch.Tensor

    def put(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """`x` (T, D), the embeddings of the tokens from `start` on, with the rows that stand there; changed in place."""
        first, end = bisect_left(self.places, start), bisect_left(self.places, start + len(x))
        if first < end:
            x[torch.tensor(self.places[first:end], device=x.device) - start] = self.values[first:end].to(x.dtype)
        return x


@dataclass(frozen=True, eq=False)
class View:
    """A prompt as one model is given it: tokens, of which every `placeholder` stands for a row that `look` makes; without `look` there are no pictures."""

    ids: list[int]
    placeholder: int = -1
    look: Callable[[], torch.Tensor] | None = None

    def rows(self) -> Rows | None:
        """The pictures' rows, computed now. Raises ValueError where they are not as many as the placeholders."""
        if self.look is None:
            return None
        places = [index for index, token in enumerate(self.ids) if token == self.placeholder]
        values = self.look()
        if len(values) != len(places):
            raise ValueError(f"{len(places)} placeholders for {len(values)} rows of pictures")
        return Rows(places, values)


@dataclass(frozen=True, eq=False)
class PicturePrompt:
    """A prompt with pictures: the view of each model that takes part. All must end in the same token, which is text."""

    views: Mapping[nn.Module, View]

    def __post_init__(self) -> None:
        ends = {view.ids[-1] for view in self.views.values()}
        if len(ends) > 1 or any(view.ids[-1] == view.placeholder for view in self.views.values()):
            raise ValueError("the views of a prompt must end in the same text token")


Prompt = list[int] | PicturePrompt


def view_of(prompt: Prompt, model: nn.Module) -> View:
    """How `model`, or an exit of it, is given `prompt`. Raises ValueError for a model that the prompt has no view for."""
    if not isinstance(prompt, PicturePrompt):
        return View(prompt)
    whole = getattr(model, "target", model)  # an exit sees what its target sees
    if whole not in prompt.views:
        raise ValueError(f"the prompt has no view for this {type(whole).__name__}: make it for target and draft")
    return prompt.views[whole]


def forced_logits(model: nn.Module, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of `model`, teacher-forced, that predict each of `tokens` (T) behind `prompt`."""
    view = view_of(prompt, model)
    ids = torch.tensor([[*view.ids, *tokens[:-1]]], device=model.device)
    if view.look is None:
        logits = model(ids, use_cache=False).logits
    else:
        x = model.get_input_embeddings()(ids)
        view.rows().put(x[0])
        logits = model(inputs_embeds=x, use_cache=False).logits
    return logits[0, len(view.ids) - 1 :]


# ---- a draft whose prompt has another length ----

class Shifted:
    """A draft's engine as rounds see it, whose prompt is `shift` tokens shorter than the target's: they speak of the target's places, it is fed at its own."""

    def __init__(self, engine: object, shift: int) -> None:
        self._engine, self._shift = engine, shift

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text that its cache is ahead to, counted as the target counts."""
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

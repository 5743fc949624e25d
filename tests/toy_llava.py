"""Random LLaVAs that are small enough to know exactly, drafts for them that see differently, and prompts with images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from engine.views import ImagePrompt, View
from models.llava_target import VisionEncoder, as_text_model
from toy_models import near_copy, noisy_exit, tiny_llama

SIDE, WRITTEN, PLACEHOLDER, PAD, ROWS = 28, 60, 60, 61, 64  # pixels; tokens that may be written, and rows of the embedding


def tiny_llava(seed: int = 0, patch: int = 14, **overrides: object) -> LlavaForConditionalGeneration:
    """A random LLaVA, fp64, whose images matter: 4 rows of an image of 28 pixels with patches of 14, 16 with patches of 7."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=patch, projection_dim=16)
    shape = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 512, "initializer_range": 0.3}
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**{**shape, **overrides}), image_token_index=PLACEHOLDER, pad_token_id=PAD)
    model = LlavaForConditionalGeneration(config)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model.double().eval().requires_grad_(False)


@dataclass
class Seer:
    """A LLaVA with the Llama that it decodes as, and its vision."""

    llava: LlavaForConditionalGeneration

    def __post_init__(self) -> None:
        self.text = as_text_model(self.llava.model.language_model, self.llava.lm_head, WRITTEN)
        self.vision = VisionEncoder(self.llava)

    def view(self, words: list[list[int]], pixels: torch.Tensor) -> View:
        """`words`, an image between each two of them."""
        between = [PLACEHOLDER] * self.vision.image_seq_length
        ids = [token for number, part in enumerate(words) for token in [*(between if number else []), *part]]
        return View(ids, PLACEHOLDER, (lambda: self.vision(pixels)) if len(pixels) else None)


@dataclass
class Blind:
    """A Llama that is given the words alone."""

    text: nn.Module

    def view(self, words: list[list[int]], pixels: torch.Tensor) -> View:
        return View([token for part in words for token in part])


def near_llava(seer: Seer) -> Seer:
    """A LLaVA of its own that nearly says what `seer` says, with its vision."""
    return Seer(near_copy(seer.llava))


DRAFTS: dict[str, Callable[[Seer], tuple[nn.Module, object | None]]] = {  # the draft, and who looks for it where that is not the target
    "llava": lambda seer: _own(near_llava(seer)),
    "other vision": lambda seer: _own(Seer(tiny_llava(3, patch=7))),
    "text only": lambda seer: _own(Blind(tiny_llama(5, vocab_size=WRITTEN, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}).to(seer.text.dtype))),
    "exit": lambda seer: (noisy_exit(seer.text, 1, scale=0.02), None),
    "exit with a block": lambda seer: (noisy_exit(seer.text, 2, own_block=True, scale=0.02), None),
}


def _own(one: Seer | Blind) -> tuple[nn.Module, object]:
    return one.text, one


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Random pixels (count, 3, SIDE, SIDE), fp64."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_words(count: int, seed: int = 0) -> list[list[int]]:
    """Random words around so many images; the last are at least one token."""
    generator = torch.Generator().manual_seed(100 + seed)
    lengths = torch.randint(1, 6, (count + 1,), generator=generator).tolist()
    return [torch.randint(0, WRITTEN, (length,), generator=generator).tolist() for length in lengths]


def asked(seer: Seer, other: object | None, words: list[list[int]], pixels: torch.Tensor) -> ImagePrompt:
    """The prompt as target and draft are given it."""
    views = {seer.text: seer.view(words, pixels)}
    return ImagePrompt(views if other is None else {**views, other.text: other.view(words, pixels)})

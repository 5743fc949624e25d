"""A LLaVA of any shape with random weights and an exit of chosen acceptance: to measure decoding speed behind images where weights can't be had (see planted.py).

Shapes, bytes and acceptance are true, so seconds are; what is seen and written means nothing. Without a tokenizer, prompts are random tokens around random pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

from running.command_line import UserError

import torch
from torch import nn
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from harness.prompts import Prompt
from decoding.sampling import SamplingPolicy
from decoding.verify import Verification
from engine.views import ImagePrompt, View
from models.llava_target import VisionEncoder, as_text_model
from models.planted import planted_pair
from truncated_llama import TruncatedLlama

QUESTION_TOKENS = 20


@dataclass(frozen=True)
class PlantedLlava:
    """The Llama that a random LLaVA decodes as, its vision encoder, its exit with the acceptance that was measured, and its image token."""

    model: nn.Module
    vision: VisionEncoder
    draft: TruncatedLlama
    alpha: float
    placeholder: int


@torch.no_grad()
def planted_llava(
    config: LlavaConfig, target_layer: int, alpha: float, policy: SamplingPolicy, verification: Verification = "rejection", dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", seed: int = 0,
) -> PlantedLlava:
    """A random LLaVA of shape `config`; the tokens before its placeholder may be written. Raises UserError for a tower that is not CLIP's, and as planted_pair does."""
    if config.vision_config.model_type != "clip_vision_model":
        raise UserError(f"random weights are made for CLIP towers, not for a {config.vision_config.model_type}")
    written = copy.deepcopy(config.text_config)
    written.vocab_size, written.pad_token_id = config.image_token_id, None
    pair = planted_pair(written, target_layer, alpha, policy, verification, dtype, device, seed)
    embedding = pair.model.model.embed_tokens
    unwritten = torch.zeros(config.text_config.vocab_size - written.vocab_size, config.text_config.hidden_size, dtype=dtype, device=device)
    embedding.weight = nn.Parameter(torch.cat([embedding.weight.detach(), unwritten]), requires_grad=False)
    with torch.device("meta"):
        whole = LlavaForConditionalGeneration(config)
    torch.manual_seed(seed)
    whole.model.vision_tower = CLIPVisionModel(config.vision_config).to(device, dtype)
    whole.model.multi_modal_projector = LlavaMultiModalProjector(config).to(device, dtype)
    whole.model.language_model, whole.lm_head = pair.model.model, pair.model.lm_head
    whole.eval().requires_grad_(False)
    text = as_text_model(pair.model.model, pair.model.lm_head, written.vocab_size)
    return PlantedLlava(text, VisionEncoder(whole), TruncatedLlama(text, pair.draft.exit), pair.alpha, config.image_token_id)


@dataclass(frozen=True, kw_only=True)
class RandomPrompt(Prompt):
    """A question of random tokens about one image of random pixels, the same for each `seed`."""

    planted: PlantedLlava
    seed: int

    @classmethod
    def of(cls, planted: PlantedLlava, seed: int) -> RandomPrompt:
        words = torch.randint(0, planted.model.config.vocab_size, (QUESTION_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
        return cls([*words[:2], *[planted.placeholder] * planted.vision.image_seq_length, *words[2:]], planted=planted, seed=seed)

    @property
    def identity(self) -> object:
        return {"input_ids": self.input_ids, "pixels": self.seed}

    def given(self) -> ImagePrompt:
        """The one view, of the target and its exit."""
        pixels = torch.randn(1, *self.planted.vision.shape, generator=torch.Generator().manual_seed(self.seed))
        return ImagePrompt({self.planted.model: View(self.input_ids, self.planted.placeholder, partial(self.planted.vision, pixels))})

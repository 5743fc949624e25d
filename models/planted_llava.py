"""A LLaVA of any shape with random weights and an exit of chosen acceptance: to measure decoding speed behind images where weights can't be had (see models/planted.py).

Shapes, bytes and acceptance are true, so seconds are; what is seen and written means nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from running.command_line import UserError

import torch
from torch import nn
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from decoding.sampling import SamplingPolicy
from decoding.verify import Verification
from models.llava_target import VisionEncoder, as_text_model
from models.planted import planted_pair
from truncated_llama import TruncatedLlama


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

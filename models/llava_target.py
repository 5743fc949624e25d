"""A LLaVA as a target, or a draft: the Llama that it decodes as, its tokenizer, and its vision encoder.

Read: LLaVA 1.5 as transformers stores it (`model_type` llava) with a Llama inside: llava-hf/llava-1.5-7b-hf, -13b-hf, and small ones in that form. Its processor's settings for
counting placeholders are not needed, so old checkpoints without them work.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from running.command_line import UserError, first_line

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoProcessor,
    BaseImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 has it at the top only beside torchvision

from data.images import IMAGE_TOKEN, ImageInputs
from models.generation_settings import check_generation_config
from models.target_model import DeviceArgs, Target, load_config, load_target, load_tokenizer, read_weights, values_hash
from running.hub import model_folder

CHAT_TEMPLATE = (  # of LLaVA 1.5, for checkpoints that come without one
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MROPE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")  # whose positions have several dimensions, whatever a file says of them


# ---- the two parts of a LLaVA ----

def as_text_model(language_model: LlamaModel, lm_head: nn.Linear, vocab_size: int) -> LlamaForCausalLM:
    """A LlamaForCausalLM over `language_model` and `lm_head` (shared, not copied) with logits for the first `vocab_size` tokens only: image tokens and padding may be
    fed, never drawn."""
    config = copy.deepcopy(language_model.config)
    config.num_hidden_layers = 0
    with torch.device("meta"):
        shell = LlamaForCausalLM(config)
        head = nn.Linear(lm_head.in_features, vocab_size, bias=lm_head.bias is not None)
    config.num_hidden_layers, config.vocab_size = language_model.config.num_hidden_layers, vocab_size
    for name, parameter in lm_head.named_parameters():
        setattr(head, name, nn.Parameter(parameter.detach()[:vocab_size], requires_grad=False))
    shell.model, shell.lm_head = language_model, head
    return shell.eval()


class VisionEncoder:
    """A LLaVA's vision tower and projector: pixels to image embeddings, `image_seq_length` of one image; `shape` is that of its pixels."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self._model = model
        side = model.config.vision_config.image_size
        self.shape = (model.config.vision_config.num_channels, side, side)
        self.image_seq_length = len(self(torch.zeros(1, *self.shape)))

    @property
    def identity(self) -> str:
        """Identifies what is seen of pixels."""
        config = self._model.config
        return values_hash(f"{self.shape} {config.vision_feature_layer} {config.vision_feature_select_strategy}", self._model.model.vision_tower,
                           self._model.model.multi_modal_projector)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (n · image_seq_length, D) of `pixels` (n, 3, height, width)."""
        config, like = self._model.config, self._model.lm_head.weight
        found = self._model.model.get_image_features(
            pixel_values=pixels.to(like.device, like.dtype), vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy, return_dict=True)
        return torch.cat(list(found.pooler_output)).to(like.dtype)


@dataclass(frozen=True)
class LlavaTarget(Target):
    """A LLaVA: `model` is the Llama that it decodes as."""

    vision: VisionEncoder
    images: ImageInputs

    @property
    def sees_as(self) -> str:
        """Identifies what is seen of a file: vision encoder and processor."""
        return f"{self.vision.identity} {json.dumps(self.images.processor.to_dict(), sort_keys=True, default=str)}"

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, T, D) of `input_ids` (B, T) with those of `pixels` (n, 3, height, width), the images of all texts in order, in the place of image tokens."""
        x = self.model.get_input_embeddings()(input_ids)
        x[input_ids == self.images.image_token_id] = self.vision(pixels)
        return x


# ---- what can be read ----

def load_llava_config(path: str) -> LlavaConfig:
    """The configuration of the LLaVA at `path`. Raises UserError for models of other kinds."""
    config = load_config(path, None)
    text = getattr(config, "text_config", None)
    made_for = getattr(config, "architectures", None) or [LlavaForConditionalGeneration.__name__]
    if config.model_type == "llava" and made_for != [LlavaForConditionalGeneration.__name__]:
        raise UserError(f"{path} was saved for {made_for[0]}, the form of the original code; convert it with transformers' convert_llava_weights_to_hf.py")
    if config.model_type == "llava" and text.model_type == "llama":
        return config
    if config.model_type.startswith(MROPE_FAMILIES) or _uses_mrope(config) or _uses_mrope(text):
        raise UserError(f"{path} is a {config.model_type} model, whose images have positions of several dimensions (M-RoPE); "
                        "this suite decodes LLaVA 1.5 models: give one such as llava-hf/llava-1.5-7b-hf")
    kind = f"llava model around a {text.model_type} model" if config.model_type == "llava" else f"{config.model_type} model"
    raise UserError(f"{path} is a {kind}; here a LLaVA 1.5 model around a Llama is needed: give one such as llava-hf/llava-1.5-7b-hf")


def _uses_mrope(config: PretrainedConfig | None) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return any("mrope" in name for name in rope) or "mrope" in (rope.get("type"), rope.get("rope_type"))


def is_llava(path: str) -> bool:
    """Whether the model at `path` is a LLaVA. Raises UserError where there is none."""
    return load_config(path, None).model_type == "llava"


def text_config(path: str) -> LlamaConfig:
    """The configuration of the Llama at `path`, or of that inside the LLaVA there. Raises UserError."""
    return load_llava_config(path).text_config if is_llava(path) else load_config(path)


def text_vocab_size(path: str, tokenizer: PreTrainedTokenizerBase, config: LlavaConfig) -> int:
    """How many tokens a LLaVA may write: those before the image token, the padding token, and what pads its matrices. Raises UserError where these lie elsewhere."""
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token != config.image_token_id:
        raise UserError(f"{path}: {IMAGE_TOKEN} is token {token} of its tokenizer, but image_token_index is {config.image_token_id}; make them equal in config.json")
    pads = {tokenizer.pad_token_id, *(getattr(one, "pad_token_id", None) for one in (config, config.text_config))}
    never = {token} | pads - {None, -1, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    size = min(len(tokenizer), config.text_config.vocab_size)
    if token >= config.text_config.vocab_size:
        raise UserError(f"{path}: {IMAGE_TOKEN} is token {token}, but vocab_size is {config.text_config.vocab_size}; mend its config.json")
    while size - 1 in never:
        size -= 1
    inside = sorted(one for one in never if one < size)
    if inside:
        raise UserError(f"{path}: token {inside[0]} ({tokenizer.convert_ids_to_tokens(inside[0])}) must never be written, but lies among the {size} that may; "
                        "move it behind them")
    return size


# ---- loading ----

def load_llava(path: str, args: DeviceArgs, image_dir: Path | None = None) -> LlavaTarget:
    """The LLaVA at `path`, in evaluation mode with frozen weights; images are looked up in `image_dir`. Raises UserError."""
    device, dtype, attention = args.resolve()
    config, tokenizer = load_llava_config(path), load_chat_tokenizer(path)
    check_generation_config(path)
    vocab_size = text_vocab_size(path, tokenizer, config)
    model = read_weights(LlavaForConditionalGeneration, path, dtype=dtype, attn_implementation=attention)
    model = model.to(device).eval().requires_grad_(False)
    text, vision = as_text_model(model.model.language_model, model.lm_head, vocab_size), VisionEncoder(model)
    text.generation_config = model.generation_config
    images = ImageInputs(config.image_token_id, vision.image_seq_length, load_image_processor(path, vision.shape), image_dir)
    return LlavaTarget(text, tokenizer, path, vision, images)


def load_chat_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the LLaVA at `path` with its chat template, which older checkpoints keep with the processor, or lack. Raises UserError."""
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None:
        try:
            tokenizer.chat_template = getattr(AutoProcessor.from_pretrained(model_folder(path)), "chat_template", None)
        except (OSError, ValueError, TypeError, ImportError):  # there is no processor, or none that can be made here
            pass
    if tokenizer.chat_template is None:
        print(f"note: {path} has no chat template; prompts have LLaVA 1.5's", file=sys.stderr)
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_image_processor(path: str, shape: tuple[int, int, int]) -> BaseImageProcessor:
    """What makes pixels of `shape`, by Pillow, so that they do not depend on what else is installed. Raises UserError for a processor that does not."""
    try:
        processor = AutoImageProcessor.from_pretrained(model_folder(path), backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{path} has no settings for its images ({first_line(error)}); add the preprocessor_config.json of its vision tower") from error
    made = tuple(processor([Image.new("RGB", (3, 5))], return_tensors="pt")["pixel_values"].shape[1:])
    if made != shape:
        raise UserError(f"{path}: its processor makes images of {' x '.join(map(str, made))}, its vision tower takes {' x '.join(map(str, shape))}; "
                        "make size and crop_size in its preprocessor_config.json fit")
    return processor


def load_llama_or_llava(path: str, args: DeviceArgs, image_dir: Path | None = None) -> Target:
    """The model at `path`. Raises UserError."""
    return load_llava(path, args, image_dir) if is_llava(path) else load_target(path, args)


def load_llava_draft(path: str, args: DeviceArgs, target: LlavaTarget) -> Target:
    """The draft at `path` for a LLaVA: another LLaVA, or a Llama that sees no images; its vocabulary is cut to the target's. Raises UserError for tokens that differ."""
    draft = load_llama_or_llava(path, args, target.images.image_dir)
    size = target.model.config.vocab_size
    own, others = ({token: index for token, index in one.tokenizer.get_vocab().items() if index < size} for one in (target, draft))
    if own != others:
        raise UserError(f"{path} and {target.name} have different tokenizers; a draft needs the target's own")
    known = draft.model.config.vocab_size
    if known < size:
        raise UserError(f"{path} knows {known} of the {size} tokens that {target.name} may write; choose another draft")
    if known == size:
        return draft
    text = as_text_model(draft.model.model, draft.model.lm_head, size)
    text.generation_config = draft.model.generation_config
    return replace(draft, model=text)

"""A LLaVA as a target, or a draft: the Llama that it decodes as, its tokenizer, and its eyes.

Read: LLaVA 1.5 as transformers stores it (`model_type` llava) with a Llama inside: llava-hf/llava-1.5-7b-hf, -13b-hf, and small ones in that form. Its processor's settings for
counting placeholders are not needed, so old checkpoints without them work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from command_line import UserError, first_line

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    BaseImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from decoding.vlm import Eyes, as_text_model
from pictures import MARKER, Sight
from target_model import DeviceArgs, Target, load_config, load_target, load_tokenizer

CHAT_TEMPLATE = (  # of LLaVA 1.5, for checkpoints that come without one
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

MANY_DIMENSIONAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")  # families whose positions have several dimensions, whatever a file says of them


@dataclass(frozen=True)
class SightedTarget(Target):
    """A LLaVA: `model` is the Llama that it decodes as."""

    eyes: Eyes
    sight: Sight

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, T, D) of `input_ids` (B, T) with what is seen of `pixels` (n, 3, height, width), the pictures of all texts in order, in the place of placeholders."""
        x = self.model.get_input_embeddings()(input_ids)
        x[input_ids == self.sight.token] = self.eyes(pixels)
        return x


# ---- what can be read ----

def load_llava_config(path: str) -> LlavaConfig:
    """The configuration of the LLaVA at `path`. Raises UserError for models of other kinds."""
    config = load_config(path, None)
    text = getattr(config, "text_config", None)
    if config.model_type == "llava" and text.model_type == "llama":
        return config
    if config.model_type.startswith(MANY_DIMENSIONAL) or _has_many_dimensional_positions(config) or _has_many_dimensional_positions(text):
        raise UserError(f"{path} is a {config.model_type} model, whose pictures have positions of several dimensions (M-RoPE); "
                        "this suite decodes LLaVA 1.5 models: give one such as llava-hf/llava-1.5-7b-hf")
    kind = f"llava model around a {text.model_type} model" if config.model_type == "llava" else f"{config.model_type} model"
    raise UserError(f"{path} is a {kind}; this suite looks with LLaVA 1.5 models around a Llama: give one such as llava-hf/llava-1.5-7b-hf")


def _has_many_dimensional_positions(config: PretrainedConfig | None) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return any("mrope" in name for name in rope) or "mrope" in (rope.get("type"), rope.get("rope_type"))


def is_llava(path: str) -> bool:
    """Whether the model at `path` has eyes. Raises UserError where there is none."""
    return load_config(path, None).model_type == "llava"


def text_config(path: str) -> LlamaConfig:
    """The configuration of the Llama at `path`, or of that inside the LLaVA there. Raises UserError."""
    return load_llava_config(path).text_config if is_llava(path) else load_config(path)


def text_vocab_size(path: str, tokenizer: PreTrainedTokenizerBase, config: LlavaConfig) -> int:
    """How many tokens a LLaVA may write: those before the placeholder, the padding token, and what pads its matrices. Raises UserError where these lie elsewhere."""
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    if marker is None or marker == tokenizer.unk_token_id:
        raise UserError(f"the tokenizer of {path} has no {MARKER}; add it as transformers' conversion of LLaVA does")
    pads = {tokenizer.pad_token_id, *(getattr(one, "pad_token_id", None) for one in (config, config.text_config))}
    never = {marker, config.image_token_id} | pads - {None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    size = min(len(tokenizer), config.text_config.vocab_size)
    while size - 1 in never:
        size -= 1
    inside = sorted(token for token in never if token < size)
    if inside:
        raise UserError(f"{path}: token {inside[0]} ({tokenizer.convert_ids_to_tokens(inside[0])}) must never be written, but lies among the {size} that may; "
                        "move it behind them")
    return size


# ---- loading ----

def load_llava(path: str, args: DeviceArgs, image_dir: Path | None = None) -> SightedTarget:
    """The LLaVA at `path`, in evaluation mode with frozen weights; pictures are looked up in `image_dir`. Raises UserError."""
    device, dtype, attention = args.resolve()
    config, tokenizer = load_llava_config(path), load_chat_tokenizer(path)
    vocab_size = text_vocab_size(path, tokenizer, config)
    try:
        model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights of {path} cannot be read ({first_line(error)}); fetch or train the model again") from error
    model = model.to(device).eval().requires_grad_(False)
    text, eyes = as_text_model(model.model.language_model, model.lm_head, vocab_size), Eyes(model)
    text.generation_config = model.generation_config
    sight = Sight(config.image_token_id, eyes.rows, _fitting_processor(path, eyes), image_dir)
    return SightedTarget(text, tokenizer, path, eyes, sight)


def load_chat_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the LLaVA at `path` with its chat template, which older checkpoints keep with the processor. Raises UserError."""
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None:
        try:
            tokenizer.chat_template = getattr(AutoProcessor.from_pretrained(path), "chat_template", None)
        except (OSError, ValueError, TypeError):  # there is no processor, or none that this version of transformers reads
            pass
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


def load_image_processor(path: str) -> BaseImageProcessor:
    """What makes pixels of pictures, by Pillow, so that they do not depend on what else is installed. Raises UserError."""
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no settings for its pictures ({first_line(error)}); add the preprocessor_config.json of its vision tower") from error


def _fitting_processor(path: str, eyes: Eyes) -> BaseImageProcessor:
    """The processor of the LLaVA at `path`. Raises UserError for pixels that its tower cannot take."""
    processor = load_image_processor(path)
    made = tuple(processor([Image.new("RGB", (3, 5))], return_tensors="pt")["pixel_values"].shape[1:])
    if made != eyes.shape:
        raise UserError(f"{path}: its processor makes pictures of {' x '.join(map(str, made))}, its vision tower takes {' x '.join(map(str, eyes.shape))}; "
                        "mend size and crop_size in preprocessor_config.json")
    return processor


def load_target_of_any_kind(path: str, args: DeviceArgs, image_dir: Path | None = None) -> Target:
    """The Llama or LLaVA at `path`. Raises UserError."""
    return load_llava(path, args, image_dir) if is_llava(path) else load_target(path, args)


def load_picture_draft(path: str, args: DeviceArgs, target: SightedTarget) -> Target:
    """The draft at `path` for a LLaVA: another LLaVA, or a Llama that sees no pictures; its vocabulary is cut to the target's. Raises UserError for tokens that differ."""
    draft = load_target_of_any_kind(path, args, target.sight.folder)
    size = target.model.config.vocab_size
    own, others = ({token: index for token, index in one.tokenizer.get_vocab().items() if index < size} for one in (target, draft))
    if own != others:
        raise UserError(f"{path} and {target.name} have different tokenizers; a draft needs the target's own")
    known = draft.model.config.vocab_size
    if known < size:
        raise UserError(f"{path} knows {known} of the {size} tokens that {target.name} may write; choose another draft")
    if known == size:
        return draft
    model: LlamaForCausalLM = draft.model
    text = as_text_model(model.model, model.lm_head, size)
    text.generation_config = model.generation_config
    return SightedTarget(text, draft.tokenizer, path, draft.eyes, draft.sight) if isinstance(draft, SightedTarget) else Target(text, draft.tokenizer, path)

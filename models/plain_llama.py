"""An exit and the blocks below it as a plain Llama: what transformers and serving engines can run as a draft model."""

from __future__ import annotations

import copy

from running.command_line import UserError

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from truncated_llama import Exit

# ---- what a plain Llama can express ----

def why_not_a_llama(exit_: Exit, config: LlamaConfig) -> str | None:
    """What keeps `exit_` from being the end of a plain Llama of `config`'s shapes, or None where nothing does."""
    others = {name.split(".")[0] for name in exit_.state_dict()} - {"block", "norm", "head"}
    if others:
        return f"it has parts that a Llama lacks: {', '.join(sorted(others))}"
    if type(exit_).forward is not Exit.forward:
        return f"a {type(exit_).__name__} makes its logits in another way"
    return _head_complaint(exit_.head, config) or _norm_complaint(exit_.norm, config) or _block_complaint(exit_.block, config)


def _head_complaint(head: nn.Module, config: LlamaConfig) -> str | None:
    full = (config.vocab_size, config.hidden_size)
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a single matrix"
    if head.bias is not None:
        return "its head has a bias"
    return None if head.weight.shape == full else f"its head is {tuple(head.weight.shape)}, not the full vocabulary's {full}"


def _norm_complaint(norm: nn.Module, config: LlamaConfig) -> str | None:
    if type(norm) is not LlamaRMSNorm:
        return f"its norm is a {type(norm).__name__}, not a LlamaRMSNorm"
    found, plain = (tuple(norm.weight.shape), norm.variance_epsilon), ((config.hidden_size,), config.rms_norm_eps)
    return None if found == plain else f"its norm has (shape, epsilon) {found}, the target's blocks have {plain}"


def _block_complaint(block: nn.Module | None, config: LlamaConfig) -> str | None:
    if block is None:
        return None
    if type(block) is not LlamaDecoderLayer:
        return f"its block is a {type(block).__name__}, not a LlamaDecoderLayer"
    with torch.device("meta"):
        plain = LlamaDecoderLayer(config, layer_idx=0)
    found, wanted = _block_shapes(block), _block_shapes(plain)
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"its block differs from the target's in {', '.join(differing)}" if differing else None


def _block_shapes(block: LlamaDecoderLayer) -> dict:
    """Shapes by tensor name, and the width of an attention head, which they leave open."""
    return {**{name: tensor.shape for name, tensor in block.state_dict().items()}, "head_dim": block.self_attn.head_dim}


# ---- the model ----

def as_llama(target: LlamaForCausalLM, exit_: Exit) -> LlamaForCausalLM:
    """The exit and the blocks below it as a model of its own, frozen, in the target's dtype and place.

    Every tensor is a copy, so in-memory changes of the target (tensors that share storage) do not matter. Raises
    UserError for an exit that a plain Llama cannot express.
    """
    complaint = why_not_a_llama(exit_, target.config)
    if complaint is not None:
        raise UserError(f"this exit cannot be exported as a plain Llama: {complaint}")
    blocks = [*target.model.layers[: exit_.prefix], *([] if exit_.block is None else [exit_.block])]
    config = copy.deepcopy(target.config)
    config.num_hidden_layers, config.tie_word_embeddings = len(blocks), False
    with torch.device("meta"):  # real weights would only be replaced
        draft = LlamaForCausalLM(config)
    draft.load_state_dict(_copied_tensors(target, exit_, blocks), assign=True)
    draft.model.rotary_emb = LlamaRotaryEmbedding(config).to(target.device)  # computed, not loaded
    return draft.eval().requires_grad_(False)


def _copied_tensors(target: LlamaForCausalLM, exit_: Exit, blocks: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Copies of all that the exported model holds, by their names there, in the target's dtype."""
    parts = {"model.embed_tokens": target.model.embed_tokens, "model.norm": exit_.norm, "lm_head": exit_.head}
    parts |= {f"model.layers.{i}": block for i, block in enumerate(blocks)}
    return {
        f"{place}.{name}": tensor.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
        for place, part in parts.items() for name, tensor in part.state_dict().items()
    }


def drafting_config(target: LlamaForCausalLM, gamma: int) -> GenerationConfig:
    """The target's special tokens, and `gamma` drafted tokens in every round."""
    own = target.generation_config
    return constant_drafting(gamma, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)


def constant_drafting(gamma: int, **special_tokens: int | list[int] | None) -> GenerationConfig:
    """`gamma` drafted tokens in every round of transformers' assisted generation, however sure the draft is of them."""
    return GenerationConfig(
        **special_tokens, num_assistant_tokens=gamma, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)

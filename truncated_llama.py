"""The draft inside the target: its first blocks under an exit of their own.

An `Exit` turns the hidden state h_E behind the first E blocks into logits. Those blocks, the embeddings and the
rotary tables stay the target's own tensors; only the exit's are new, and only they are saved.
"""

from __future__ import annotations

import copy
import glob
import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from command_line import UserError, first_line

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Cache, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from decoding.static_llama import Parts
from target_model import Target, tokenizer_hash, weights_hash

FORMAT = "early-exit-1"


def prepare_pass(
    target: LlamaForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Cache | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict]:
    """Embeddings (B, T, D) of `input_ids` (B, T), and what every block of this pass gets beside the hidden state."""
    hidden = target.model.embed_tokens(input_ids)
    start = cache.get_seq_length() if cache is not None else 0
    if position_ids is None:
        position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
    mask = None  # a single token sees everything before it
    if attention_mask is not None or input_ids.shape[1] > 1:
        mask = create_causal_mask(
            config=target.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=cache, position_ids=position_ids
        )
    rotary = target.model.rotary_emb(hidden, position_ids=position_ids)
    return hidden, {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": rotary, "past_key_values": cache,
                    "use_cache": cache is not None}


def run_blocks(blocks: Iterable[nn.Module], hidden: torch.Tensor, pass_inputs: dict) -> torch.Tensor:
    """`hidden` (B, T, D) through `blocks`, with the second result of `prepare_pass`."""
    for block in blocks:
        hidden = block(hidden, **pass_inputs)
    return hidden


class Exit(nn.Module):
    """What turns the hidden state behind `prefix` blocks into logits: an optional block of its own, norm and head.

    Head only at target layer ℓ: prefix ℓ+1, no block. Tuned last block at ℓ: prefix ℓ, `block` a copy of block ℓ with
    its own keys and values. All tensors are the exit's own, the head too where the target ties it to its embeddings.
    """

    def __init__(self, target: LlamaForCausalLM, target_layer: int, own_block: bool = False) -> None:
        """An untuned exit: copies of the target's tensors. Raises UserError for a layer that the target lacks."""
        super().__init__()
        num_blocks = target.config.num_hidden_layers
        if not 0 <= target_layer < num_blocks:
            raise UserError(f"target layer {target_layer}: this target has {num_blocks} blocks, so choose 0 to {num_blocks - 1}")
        self.target_layer = target_layer
        self.prefix = target_layer if own_block else target_layer + 1
        self.block: LlamaDecoderLayer | None = copy.deepcopy(target.model.layers[target_layer]) if own_block else None
        self.norm = copy.deepcopy(target.model.norm)
        self.head = copy.deepcopy(target.lm_head)  # untied by the copy
        self.vocab_size = len(self.head.weight)
        self.register_buffer("token_ids", None, persistent=False)

    def forward(self, hidden: torch.Tensor, pass_inputs: dict, logits_to_keep: int = 0) -> torch.Tensor:
        """Logits (B, T, V) from `hidden` (B, T, D) behind the prefix; with `logits_to_keep`, of the last positions only."""
        hidden = hidden.to(self.norm.weight.dtype)
        if self.block is not None:
            hidden = self.block(hidden, **pass_inputs)
        logits = self.head(self.norm(hidden[:, -logits_to_keep:]))
        if self.token_ids is None:
            return logits
        whole = torch.full((*logits.shape[:-1], self.vocab_size), -torch.inf, dtype=logits.dtype, device=logits.device)
        return whole.index_copy_(-1, self.token_ids, logits)

    def trimmed(self, token_ids: torch.Tensor) -> Exit:
        """This exit with the head's rows of `token_ids` (N,) only: q is 0 for all other tokens, which changes no output.

        A smaller head is a cheaper draft step (FR-Spec 2502.14856). Raises UserError for ids that are not distinct and sorted.
        """
        if len(token_ids) == 0 or not bool((token_ids.diff() > 0).all()):
            raise UserError("a trimmed draft vocabulary needs distinct token ids in ascending order")
        head, self.head = self.head, None
        smaller = copy.deepcopy(self)
        self.head = head
        smaller.head = nn.Linear(head.in_features, len(token_ids), bias=head.bias is not None, device=head.weight.device, dtype=head.weight.dtype)
        smaller.head.load_state_dict({name: tensor[token_ids] for name, tensor in head.state_dict().items()})
        smaller.token_ids = token_ids
        return smaller.requires_grad_(False)

    def own_bytes(self) -> int:
        """Bytes of the exit's own tensors."""
        return module_bytes(self)

    def cost_ratio(self, target: LlamaForCausalLM) -> float:
        """c = (E·l + h_d) / (L·l + h): bytes that a draft step reads, over those of a target step."""
        itemsize = target.lm_head.weight.element_size() / self.head.weight.element_size()
        draft = sum(module_bytes(block) for block in target.model.layers[: self.prefix]) + self.own_bytes() * itemsize
        return draft / step_bytes(target)


def step_bytes(model: LlamaForCausalLM) -> int:
    """Bytes that a decoding step reads: blocks, norm and head, but of the embeddings one row only."""
    return sum(module_bytes(module) for module in (model.model.layers, model.model.norm, model.lm_head))


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


class TruncatedLlama(nn.Module):
    """The target's blocks 0..prefix−1 with an exit on top, called as transformers' causal models are.

    An exit in another dtype or place than the target's is copied there and stays as it is.
    """

    def __init__(self, target: LlamaForCausalLM, exit_: Exit) -> None:
        super().__init__()
        fits = all(parameter.dtype == target.dtype and parameter.device == target.device for parameter in exit_.parameters())
        self.target, self.exit = target, exit_ if fits else copy.deepcopy(exit_).to(target.device, target.dtype)
        self.config = target.config

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    def parts(self) -> Parts:
        """What this model is made of, beside the target's embeddings."""
        blocks = *self.target.model.layers[: self.exit.prefix], *filter(None, [self.exit.block])
        return Parts(blocks, self.exit.norm, self.exit.head, self.exit.token_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        position_ids: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or (B, logits_to_keep, V); `past_key_values` is appended to in place. The mask is (B, T), or 4-D and added to the scores."""
        cache = past_key_values if use_cache else None
        hidden, pass_inputs = prepare_pass(self.target, input_ids, attention_mask, cache, position_ids)
        hidden = run_blocks(self.target.model.layers[: self.exit.prefix], hidden, pass_inputs)
        return CausalLMOutputWithPast(logits=self.exit(hidden, pass_inputs, logits_to_keep), past_key_values=cache)


# ---- checkpoints: the exit's tensors, with everything that identifies them in the header ----

@dataclass(frozen=True)
class ExitInfo:
    """The header of an exit's checkpoint. `tuned` names the trained parts, a subset of ("head", "last_block")."""

    target_layer: int
    own_block: bool
    tuned: tuple[str, ...]
    target_name: str
    target_hash: str
    tokenizer_hash: str
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    flags: dict = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """"untuned", "head", "last_block" or "head+last_block"."""
        return "+".join(self.tuned) or "untuned"


def save_exit(path: Path, exit_: Exit, info: ExitInfo) -> None:
    """Write the exit's tensors (fp32 as trained) and `info` to a .safetensors file, complete or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in exit_.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": FORMAT, "info": json.dumps(asdict(info))})
    partial.replace(path)


def find_checkpoints(patterns: list[str]) -> list[str]:
    """The paths that match globs, sorted. Raises UserError for none."""
    paths = sorted({path for pattern in patterns for path in glob.glob(pattern)})
    if not paths:
        raise UserError(f"no checkpoint matches {' '.join(patterns)}; train.py prints each checkpoint's path")
    return paths


def read_exit_info(path: str | Path) -> ExitInfo:
    """The header of a checkpoint. Raises UserError for a file that is missing, broken, or no exit's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}; give the path that train.py printed last") from error
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is broken or no .safetensors file ({error}); train it again, or give an earlier checkpoint") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not an exit's checkpoint of this suite (format {metadata.get('format')!r}, expected {FORMAT!r})")
    try:
        info = json.loads(metadata["info"])
        return ExitInfo(**{**info, "tuned": tuple(info["tuned"])})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is broken: its header cannot be read ({first_line(error)}); train it again, or give an earlier checkpoint") from error


def check_exit_fits(path: str | Path, info: ExitInfo, target: Target) -> None:
    """Raise UserError when the checkpoint was trained for another target or tokenizer."""
    for what, stored, found in (
        ("tokenizer", info.tokenizer_hash, tokenizer_hash(target.tokenizer)),
        ("target", info.target_hash, weights_hash(target.model)),
    ):
        if stored != found:
            raise UserError(f"{path} belongs to another {what} (of {info.target_name}; hash {stored}, {target.name} has {found}); use --model_path {info.target_name}")


def load_exit(path: str | Path, target: Target) -> tuple[Exit, ExitInfo]:
    """The exit stored at `path`, fp32, on the target's device. Raises UserError when it does not fit `target`."""
    info = read_exit_info(path)
    check_exit_fits(path, info, target)
    exit_ = Exit(target.model, info.target_layer, info.own_block).float()
    try:
        with safe_open(path, framework="pt") as file:
            exit_.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} is broken ({first_line(error)}); train it again, or give an earlier checkpoint") from error
    return exit_.to(target.model.device), info

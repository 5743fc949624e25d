"""The draft inside the target: its first blocks under an exit of their own.

An `Exit` turns the hidden state h_E behind the first E blocks into logits. Those blocks, the embeddings and the
rotary tables stay the target's own tensors; only the exit's are new, and only they are saved.
"""

from __future__ import annotations

import copy
import glob
import json
import os
import re
import struct
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from running.command_line import UserError, first_line

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from engine.static_llama import Parts
from models.target_model import Target, tokenizer_hash, weights_hash
from running.run_files import finite, in_one_step

FORMAT, FIRST_FORMAT = "early-exit-2", "early-exit-1"
BLOCK_PARTS = {"last_block": "last", "full_block": "full", "attention_block": "attention"}  # a kind's word for a block -> ExitForm's


def prepare_pass(
    target: LlamaForCausalLM, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None, cache: Cache | None = None,
    position_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict]:
    """Embeddings (B, T, D) of `input_ids` (B, T), or those given, and what every block of this pass gets beside the hidden state."""
    hidden = target.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    start = cache.get_seq_length() if cache is not None else 0
    if position_ids is None:
        position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
    mask = None  # a single token sees everything before it
    if attention_mask is not None or hidden.shape[1] > 1:
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


@dataclass(frozen=True)
class ExitForm:
    """What an exit at layer ℓ is made of, beside the target's norm.

    `block`: "none"; "last", a copy of block ℓ in its place (so that only ℓ blocks are shared); "full" or "attention", one more block behind it, whole or without
    its feed-forward half (Kangaroo 2404.18911), which begins as the identity. Head: the target's matrix; with `head_rank` r its best approximation
    of rank r, which a step reads r·(D + V) instead of D·V numbers of; with `translator` an affine map behind the norm, which begins as the identity, and the
    target's matrix (the tuned lens, 2303.08112, has it before the norm: behind it, it can also set how sure the draft is).
    """

    block: Literal["none", "last", "full", "attention"] = "none"
    head_rank: int | None = None
    translator: bool = False

    def new_block(self, target: LlamaForCausalLM, target_layer: int) -> LlamaDecoderLayer | None:
        """The exit's own block, untrained."""
        if self.block == "none":
            return None
        block = copy.deepcopy(target.model.layers[target_layer])
        if self.block == "attention":
            config = copy.deepcopy(target.config)
            config.intermediate_size, config.mlp_bias = 0, False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that there is nothing to initialise
                block.mlp = LlamaMLP(config).to(target.device, target.dtype)
        if self.block != "last":
            block.self_attn.layer_idx = target_layer + 1  # its place in a cache
            for last in (block.self_attn.o_proj, block.mlp.down_proj):
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
        return block

    def new_head(self, head: nn.Linear) -> nn.Linear | nn.Sequential:
        """The exit's own head, untrained, from the target's `head`."""
        whole = copy.deepcopy(head)  # untied by the copy
        if self.translator:
            affine = nn.Linear(head.in_features, head.in_features, device=head.weight.device, dtype=head.weight.dtype)
            nn.init.eye_(affine.weight)
            nn.init.zeros_(affine.bias)
            return nn.Sequential(affine, whole)
        if self.head_rank is not None:
            return _low_rank(whole, self.head_rank)
        return whole


def _low_rank(head: nn.Linear, rank: int) -> nn.Sequential:
    """D → rank → V with the product nearest to `head`'s weight in the least-squares sense (Eckart and Young)."""
    # The right singular vectors are the eigenvectors of WᵀW (D, D): V is too large for a decomposition of W itself.
    weight = head.weight.detach().double()
    directions = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -rank:]  # (D, rank)
    into, out = (nn.Linear(*shape, bias=bias, device=weight.device, dtype=head.weight.dtype)
                 for *shape, bias in ((head.in_features, rank, False), (rank, head.out_features, head.bias is not None)))
    with torch.no_grad():
        into.weight.copy_(directions.T)
        out.weight.copy_(weight @ directions)
        if head.bias is not None:
            out.bias.copy_(head.bias)
    return nn.Sequential(into, out)


@dataclass(frozen=True)
class ExitKind:
    """An exit's form, which of its parts are tuned, and how many tokens its head knows (None: all).

    `tuned`: "head" (norm and output matrix), "rank<r>" (norm and both factors), "translator" or none of these, which leave the target's norm and output matrix as
    they are; and "last_block", "full_block" or "attention_block".
    """

    form: ExitForm = ExitForm()
    tuned: tuple[str, ...] = ()
    draft_vocab: int | None = None

    def __str__(self) -> str:
        """The parts in one word, such as "head+last_block" or "rank64+vocab4096"; "untuned" where there are none."""
        return "+".join([*self.tuned, *([] if self.draft_vocab is None else [f"vocab{self.draft_vocab}"])]) or "untuned"

    @classmethod
    def parse(cls, name: str) -> ExitKind:
        """The kind that `str` gives this name. Raises UserError for parts that are unknown or do not go together."""
        parts = name.split("+")
        numbers = {word: int(digits) for part in parts for word, digits in re.findall(r"^(rank|vocab)(\d+)$", part)}
        blocks, heads = ([part for part in parts if part in known] for known in (BLOCK_PARTS, ("head", "translator", f"rank{numbers.get('rank')}")))
        unknown = set(parts) - {*blocks, *heads, f"vocab{numbers.get('vocab')}"}
        if unknown or len(parts) > len(set(parts)):
            raise UserError(f"exit kind {name}: {'+'.join(sorted(unknown)) or 'a part stands twice'}; its parts are head, rank<r>, translator, {', '.join(BLOCK_PARTS)} and vocab<N>")
        for those in (blocks, heads):
            if len(those) > 1:
                raise UserError(f"exit kind {name}: {' and '.join(those)} exclude each other; give one of them")
        if not blocks and not heads:
            raise UserError(f"exit kind {name}: nothing to train; add head, rank<r>, translator or a block")
        form = ExitForm(BLOCK_PARTS[blocks[0]] if blocks else "none", numbers.get("rank"), "translator" in heads)
        return cls(form, (*heads, *blocks), numbers.get("vocab"))

    def check(self, target: LlamaConfig) -> None:
        """Raise UserError for a kind that no exit of `target` can have."""
        for size, most, what in ((self.form.head_rank, target.hidden_size - 1, "rank"), (self.draft_vocab, target.vocab_size, "vocabulary")):
            if size is not None and not 1 <= size <= most:
                raise UserError(f"exit kind {self}: its head's {what} must lie between 1 and {most} for this target")

    @property
    def shares_output(self) -> bool:
        """Whether norm and output matrix stay the target's."""
        return set(self.tuned) <= {"translator", *BLOCK_PARTS}

    def choose_trained(self, exit_: Exit) -> None:
        """Let those of the exit's own tensors require gradients that a run of this kind trains, and no others."""
        chosen = ("block.",) + (() if self.shares_output else ("norm.", "head.")) + (("head.0.",) if self.form.translator else ())
        exit_.requires_grad_(False)
        for name, parameter in exit_.own_parameters().items():
            parameter.requires_grad_(name.startswith(chosen))


class Exit(nn.Module):
    """What turns the hidden state behind `prefix` blocks into logits: an optional block of its own, norm and head.

    A block in place of block ℓ (ExitForm.block "last") has prefix ℓ, all others ℓ+1. All tensors are the exit's own, the head too where the target
    ties it to its embeddings, until `share_output`.
    """

    def __init__(self, target: LlamaForCausalLM, target_layer: int, form: ExitForm = ExitForm()) -> None:  # noqa: B008
        """An untuned exit: copies of the target's tensors. Raises UserError for a layer that the target lacks."""
        super().__init__()
        num_blocks = target.config.num_hidden_layers
        if not 0 <= target_layer < num_blocks:
            raise UserError(f"target layer {target_layer}: this target has {num_blocks} blocks, so choose 0 to {num_blocks - 1}")
        self.target_layer, self.form = target_layer, form
        self.prefix = target_layer if form.block == "last" else target_layer + 1
        self.block = form.new_block(target, target_layer)
        self.norm = copy.deepcopy(target.model.norm)
        self.head = form.new_head(target.lm_head)
        self.vocab_size = target.lm_head.out_features
        self.shared: tuple[str, ...] = ()  # parts that are the target's own
        self.register_buffer("token_ids", None, persistent=False)

    def forward(self, hidden: torch.Tensor, pass_inputs: dict, logits_to_keep: int = 0) -> torch.Tensor:
        """Logits (B, T, V) from `hidden` (B, T, D) behind the prefix; with `logits_to_keep`, of the last positions only."""
        return self.over_vocabulary(self.logits(self.through_block(hidden, pass_inputs)[:, -logits_to_keep:]))

    def over_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) from those of the known tokens (..., V_d): −inf where the head knows nothing."""
        if self.token_ids is None:
            return logits
        whole = torch.full((*logits.shape[:-1], self.vocab_size), -torch.inf, dtype=logits.dtype, device=logits.device)
        return whole.index_copy_(-1, self.token_ids, logits)

    def through_block(self, hidden: torch.Tensor, pass_inputs: dict) -> torch.Tensor:
        """`hidden` (B, T, D) behind the exit's own block, if it has one, in the dtype of its tensors."""
        hidden = hidden.to(next(self.parameters()).dtype)
        return hidden if self.block is None else self.block(hidden, **pass_inputs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V_d) of the tokens that the head knows, from `hidden` (..., D) behind the own block."""
        return self.head(self.norm(hidden))

    @property
    def output(self) -> nn.Linear:
        """The last matrix of the head: a row per token."""
        return self.head[-1] if isinstance(self.head, nn.Sequential) else self.head

    def _set_output(self, linear: nn.Linear) -> None:
        if isinstance(self.head, nn.Sequential):
            self.head[-1] = linear
        else:
            self.head = linear

    def trimmed(self, token_ids: torch.Tensor) -> Exit:
        """This exit with the head's rows of `token_ids` (N,) only: q is 0 for all other tokens, which changes no output.

        A smaller head is a cheaper draft step (FR-Spec 2502.14856). Raises UserError for ids that are not distinct and sorted, or that the head lacks.
        """
        if len(token_ids) == 0 or not bool((token_ids.diff() > 0).all()):
            raise UserError("a trimmed draft vocabulary needs distinct token ids in ascending order")
        rows = token_ids
        if self.token_ids is not None:
            rows = torch.searchsorted(self.token_ids, token_ids)
            if not torch.equal(self.token_ids[rows.clamp(max=len(self.token_ids) - 1)], token_ids):
                raise UserError(f"the exit knows {len(self.token_ids)} tokens already, and not all of those asked for; trim an exit with the full head")
        whole = self.output
        smaller = copy.deepcopy(self, {id(whole): None})
        linear = nn.Linear(whole.in_features, len(rows), bias=whole.bias is not None, device=whole.weight.device, dtype=whole.weight.dtype)
        linear.load_state_dict({name: tensor[rows] for name, tensor in whole.state_dict().items()})
        smaller._set_output(linear)
        smaller.token_ids = token_ids
        return smaller.requires_grad_(False)

    def share_output(self, target: LlamaForCausalLM) -> Exit:
        """This exit with the target's own norm and, if all its rows are known, output matrix instead of copies."""
        self.norm, self.shared = target.model.norm, ("norm.",)
        if self.token_ids is None:
            self._set_output(target.lm_head)
            self.shared += ("head.1." if self.form.translator else "head.",)
        return self

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Tensors that are not the target's, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith(self.shared)}

    def own_bytes(self) -> int:
        """Bytes of the exit's own tensors."""
        return sum(parameter.nbytes for parameter in self.own_parameters().values())

    def cost_ratio(self, target: LlamaForCausalLM) -> float:
        """c = (E·l + h_d) / (L·l + h): bytes that a draft step reads, over those of a target step, all in the target's dtype."""
        itemsize = target.lm_head.weight.element_size()
        draft = sum(module_bytes(block) for block in target.model.layers[: self.prefix]) + itemsize * sum(p.numel() for p in self.parameters())
        return draft / step_bytes(target)


def exit_to_train(target: LlamaForCausalLM, target_layer: int, kind: ExitKind, token_ids: torch.Tensor | None = None) -> Exit:
    """A new exit of `kind`, whose head knows `token_ids` if kind.draft_vocab is given: its own tensors in fp32, and those that it tunes requiring gradients."""
    exit_ = Exit(target, target_layer, kind.form)
    if kind.draft_vocab is not None:
        exit_ = exit_.trimmed(token_ids)
    if kind.shares_output and target.dtype != torch.float16:  # an fp16 matrix cannot follow an fp32 exit
        exit_.share_output(target)
    for parameter in exit_.own_parameters().values():
        parameter.data = parameter.data.float()
    kind.choose_trained(exit_)
    return exit_


def step_bytes(model: PreTrainedModel) -> int:
    """Bytes that a decoding step reads: all weights, but of the embeddings one row only, where they are not the head's, too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return module_bytes(model) - (0 if embedding is head else embedding.numel() * embedding.element_size())


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
        shared = {id(module): module for module in (target.model.norm, target.lm_head)}  # is not copied
        self.target, self.exit = target, exit_ if fits else copy.deepcopy(exit_, shared).to(target.device, target.dtype)
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

    def get_input_embeddings(self) -> nn.Module:
        """The target's."""
        return self.target.model.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or (B, logits_to_keep, V), of tokens or embeddings; `past_key_values` is appended to in place. The mask is (B, T), or 4-D and added to the
        scores."""
        cache = past_key_values if use_cache else None
        hidden, pass_inputs = prepare_pass(self.target, input_ids, attention_mask, cache, position_ids, inputs_embeds)
        hidden = run_blocks(self.target.model.layers[: self.exit.prefix], hidden, pass_inputs)
        return CausalLMOutputWithPast(logits=self.exit(hidden, pass_inputs, logits_to_keep), past_key_values=cache)


# ---- checkpoints: the exit's tensors, with everything that identifies them in the header ----

@dataclass(frozen=True)
class ExitInfo:
    """The header of an exit's checkpoint."""

    target_layer: int
    kind: ExitKind
    target_name: str
    target_hash: str
    tokenizer_hash: str
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    flags: dict = field(default_factory=dict)


def save_exit(path: Path, exit_: Exit, info: ExitInfo) -> None:
    """Write the exit's own tensors (fp32 as trained), the tokens that its head knows and `info` to a .safetensors file, complete or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in exit_.own_parameters().items()}
    if exit_.token_ids is not None:
        tensors["token_ids"] = exit_.token_ids.cpu()
    with in_one_step(path) as partial:
        save_file(tensors, partial, metadata={"format": FORMAT, "info": json.dumps(finite(asdict(info)), allow_nan=False)})


def find_checkpoints(patterns: list[str]) -> list[str]:
    """The paths that are named, as they are or by globs: each file once, sorted. Raises UserError for none."""
    named = sorted({path for pattern in patterns for path in ([pattern] if Path(pattern).exists() else glob.glob(pattern))})
    if not named:
        raise UserError(f"no checkpoint matches {' '.join(patterns)}; train.py prints each checkpoint's path")
    found: dict[str, str] = {}
    for path in named:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def read_exit_info(path: str | Path) -> ExitInfo:
    """The header of a checkpoint. Raises UserError for a file that is missing, broken, or no exit's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}; give the path that train.py printed last") from error
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is broken or no .safetensors file ({error}); train it again, or give an earlier checkpoint") from error
    if metadata.get("format") not in (FORMAT, FIRST_FORMAT):
        raise UserError(f"{path} is not an exit's checkpoint of this suite (format {metadata.get('format')!r}, expected {FORMAT!r})")
    try:
        info = json.loads(metadata["info"])
        if metadata["format"] == FIRST_FORMAT:
            info["kind"] = {"form": {"block": "last" if info.pop("own_block") else "none"}, "tuned": info.pop("tuned"), "draft_vocab": None}
        kind = info["kind"]
        return ExitInfo(**{**info, "kind": ExitKind(ExitForm(**kind["form"]), tuple(kind["tuned"]), kind["draft_vocab"])})
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
    exit_ = Exit(target.model, info.target_layer, info.kind.form)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if info.kind.draft_vocab is not None:
            exit_ = exit_.trimmed(tensors.pop("token_ids").to(target.model.device))
        return restored(exit_, target, tensors), info
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} is broken ({first_line(error)}); train it again, or give an earlier checkpoint") from error


def restored(exit_: Exit, target: Target, tensors: dict[str, torch.Tensor]) -> Exit:
    """`exit_` with its own `tensors` in fp32, sharing the target's where there are none. Raises RuntimeError for tensors that do not fit."""
    if "norm.weight" not in tensors:
        exit_.share_output(target.model)
    for parameter in exit_.own_parameters().values():
        parameter.data = parameter.data.float()
    missing, unexpected = exit_.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) & set(exit_.own_parameters()):
        raise RuntimeError(f"tensors {sorted(unexpected)} too many, {sorted(set(missing) & set(exit_.own_parameters()))} missing")
    return exit_

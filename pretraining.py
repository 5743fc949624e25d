"""What training a model from scratch takes, whether it sees or not: tokenizer, initial scale, optimizer, checkpoints as folders."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from command_line import UserError

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from processes import Processes

ADAM_BETAS = (0.9, 0.95)


def byte_level_bpe(texts: Iterable[str], size: int, special_tokens: Sequence[str], single_digits: bool = False) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens; `special_tokens` come first, and the first of them, the BOS, begins every text."""
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes]) if single_digits else by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special_tokens), initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    bos = special_tokens[0]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def damp_residual_writes(blocks: Sequence[nn.Module]) -> None:
    """GPT-2's rule for new decoder blocks: each writes twice into the residual stream."""
    for block in blocks:
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.data /= (2 * len(blocks)) ** 0.5


def make_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (.9, .95) with weight decay on matrices only."""
    matrices, vectors = [], []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=ADAM_BETAS, fused=True)


def save_bf16(folder: Path, step: int, model: PreTrainedModel, beside: PreTrainedTokenizerBase | ProcessorMixin) -> Path:
    """Write `model_<step>` in bf16, with its tokenizer or processor, complete or not at all."""
    final = folder / f"model_{step:06d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
    beside.save_pretrained(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def only_process(device: torch.device) -> Processes:
    """This process. Raises UserError where it is one of several."""
    processes = Processes(device)
    if processes.count > 1:
        raise UserError("pretraining runs in one process; start it without accelerate launch")
    return processes

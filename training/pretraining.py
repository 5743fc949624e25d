"""What training a model from scratch takes, whether it sees or not: tokenizer, initial scale, optimizer, checkpoints as folders, and the run."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from running.command_line import UserError

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from data.registry import fingerprint
from data.row_files import ExampleStream
from models.target_model import tokenizer_hash
from running.processes import Processes
from running.run_files import in_one_step, make_output_dir, record_run
from training.training_loop import TrainingArgs, TrainingTask, check_same_run, only_writer, print_if_finished, run_training

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
    with in_one_step(final) as partial:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
        beside.save_pretrained(partial)
        shutil.rmtree(final, ignore_errors=True)  # this run's: check_same_run has seen that there was none before
    return final


class Run(Protocol):
    """What a command pretrains: `model`, its `tokenizer`, the `streams` that it reads, and the `task` of them; `close` ends what reads ahead."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    streams: list[ExampleStream]

    def task(self) -> TrainingTask: ...
    def close(self) -> None: ...


def pretrain(args: TrainingArgs, make: Callable[[TrainingArgs, Path], Run]) -> int:
    """The run in --output_dir, which `make` prepares: begun, continued, or finished already. Returns the exit status."""
    folder = make_output_dir(args.output_dir)
    with only_writer(folder):
        check_same_run(folder, args, {})
        if print_if_finished(folder):
            return 0
        processes = Processes(args.resolve()[0])
        if processes.count > 1:
            raise UserError("pretraining runs in one process; start it without accelerate launch")
        run = make(args, folder)
        facts = {"data": [fingerprint(stream) for stream in run.streams], "tokenizer_hash": tokenizer_hash(run.tokenizer)}
        check_same_run(folder, args, facts)
        record_run(folder, args, {**facts, "parameters": sum(p.numel() for p in run.model.parameters())})
        status = run_training(run.task(), args, folder, processes)
        run.close()
        for stream in run.streams:
            print(f"{stream.dataset.name}: epoch {stream.position['epoch']}, {stream.account()}", file=sys.stderr)
        return status

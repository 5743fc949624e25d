"""Distil one early exit from the frozen full model: token-mean KL(p‖q) on chat data.

    # stage 1: the head
    python train.py --model_path meta-llama/Llama-3.2-1B-Instruct --dataset ultrachat --target_layer 7 --ft_head \\
        --max_steps 5000 --learning_rate 5e-5 --output_dir runs/head/layer7
    # stage 2: head and last block, starting from stage 1's head
    python train.py --model_path meta-llama/Llama-3.2-1B-Instruct --dataset ultrachat --target_layer 7 --ft_head \\
        --ft_last_transformer --checkpoint_path runs/head/layer7/model_005000.safetensors \\
        --max_steps 5000 --learning_rate 2e-5 --output_dir runs/ftlast/layer7
    # on the embedded target, offline, in a minute
    python train.py --model_path assets/pydoc-llama-7m --dataset pydoc --target_layer 3 --ft_head \\
        --max_steps 100 --learning_rate 1e-3 --output_dir runs/try

The last line printed is the checkpoint's path. With --resume an interrupted run continues exactly where it was saved.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from command_line import UserError, parse_args, run

import torch

from data_utils import EncodeOptions, LossOn, PaddedBatches, held_out_batches
from losses import LossType, learned_rows, learned_tokens, training_loss
from metrics import add_sums, quality_means, quality_sums
from results import file_hash, make_output_dir, record_run
from row_files import ExampleStream, describe_skipped
from target_model import EMBEDDED_TARGET, DeviceArgs, Target, load_config, load_target, tokenizer_hash, weights_hash
from text_datasets import find_dataset, fingerprint, open_stream
from training_loop import TrainingArgs, TrainingTask, check_same_run, print_if_finished, run_training
from truncated_llama import Exit, ExitInfo, load_exit, read_exit_info, save_exit
from tuned_llama import TunedLlama

VALIDATION_BATCHES = 16
ADAM_BETAS = (0.9, 0.999)


@dataclass(kw_only=True)
class Args(TrainingArgs, DeviceArgs):
    """Distil one early exit."""

    model_path: str = field(metadata={"help": f"the target: a Hugging Face id or folder ({EMBEDDED_TARGET.name} lies in assets/)"})
    target_layer: int = field(metadata={"help": "0-based, inclusive: the draft keeps blocks 0..target_layer"})
    dataset: str = field(default="ultrachat", metadata={"help": "data set to distil on"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the data set's form"})
    loss_on: LossOn = field(default="all", metadata={"help": "learn all tokens, or the assistant's only"})
    ft_head: bool = field(default=False, metadata={"help": "train the exit's norm and head"})
    ft_last_transformer: bool = field(default=False, metadata={"help": "train an own copy of block target_layer"})
    checkpoint_path: str | None = field(default=None, metadata={"help": "exit to start from (stage 2 starts from stage 1's)"})
    loss_type: LossType = field(default="kl_divergence", metadata={"help": "objective; combined = KL + cross-entropy"})
    kl_temperature: float = field(default=1.0, metadata={"help": "softens teacher and draft in the KL"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        super().check()
        self.check_device()
        if not (self.ft_head or self.ft_last_transformer):
            raise UserError("nothing to train: give --ft_head, --ft_last_transformer, or both")
        if self.kl_temperature <= 0:
            raise UserError(f"--kl_temperature {self.kl_temperature}: must be positive")
        find_dataset(self.dataset)
        config = load_config(self.model_path)
        if not 0 <= self.target_layer < config.num_hidden_layers:
            raise UserError(f"--target_layer {self.target_layer}: {self.model_path} has {config.num_hidden_layers} blocks; choose 0 to {config.num_hidden_layers - 1}")
        if self.max_length > config.max_position_embeddings:
            raise UserError(f"--max_length {self.max_length}: the context of {self.model_path} is {config.max_position_embeddings}")
        if self.checkpoint_path is not None:
            self._check_start(read_exit_info(self.checkpoint_path))

    def _check_start(self, info: ExitInfo) -> None:
        if info.target_layer != self.target_layer:
            raise UserError(f"--checkpoint_path is an exit at layer {info.target_layer}, --target_layer is {self.target_layer}")
        if info.own_block and not self.ft_last_transformer:
            raise UserError("--checkpoint_path has a tuned block: add --ft_last_transformer to go on from it")


def starting_exit(args: Args, target: Target) -> tuple[Exit, tuple[str, ...]]:
    """The exit to train, fp32, with only the chosen parts requiring gradients; and the parts that will be tuned."""
    exit_ = Exit(target.model, args.target_layer, own_block=args.ft_last_transformer).float()
    tuned = {name for name, chosen in (("head", args.ft_head), ("last_block", args.ft_last_transformer)) if chosen}
    if args.checkpoint_path is not None:
        start, info = load_exit(args.checkpoint_path, target)
        exit_.load_state_dict({**exit_.state_dict(), **start.state_dict()})
        tuned |= set(info.tuned)
    exit_.requires_grad_(False)
    exit_.head.requires_grad_(args.ft_head)
    exit_.norm.requires_grad_(args.ft_head)
    if exit_.block is not None:
        exit_.block.requires_grad_(args.ft_last_transformer)
    return exit_.to(target.model.device), tuple(sorted(tuned))


class Distillation:
    """The callbacks of one run: loss, validation and saving of one exit under the frozen target."""

    def __init__(self, args: Args, target: Target, streams: dict[str, ExampleStream], folder: Path) -> None:
        self.args, self.target, self.folder = args, target, folder
        options = EncodeOptions(target.tokenizer, args.loss_on, args.max_length, args.batch_size)
        self.batches = PaddedBatches(streams["train"], options)
        self.validation = held_out_batches(streams["validation"], options, VALIDATION_BATCHES)
        self.exit, self.tuned = starting_exit(args, target)
        self.model = TunedLlama(target.model, [self.exit])
        self.batch_loss = torch.compile(self._batch_loss) if args.torch_compile else self._batch_loss

    def info(self, step: int, losses: dict[str, float]) -> ExitInfo:
        return ExitInfo(
            self.args.target_layer, self.args.ft_last_transformer, self.tuned, self.target.name, weights_hash(self.target.model),
            tokenizer_hash(self.target.tokenizer), step, losses, asdict(self.args),
        )

    def count(self, batch: dict) -> int:
        return int(batch["loss_mask"][:, 1:].sum())

    def _rows(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Teacher and draft logits (N, V) and tokens (N,) of the batch's N learned positions."""
        batch = {name: tensor.to(self.target.model.device) for name, tensor in batch.items()}
        in_bf16 = self.target.model.dtype == torch.bfloat16  # under fp16, gradients would underflow: the exit stays in fp32
        with torch.autocast(self.target.model.device.type, torch.bfloat16, enabled=in_bf16):
            teacher, (draft,) = self.model(batch["input_ids"], batch["attention_mask"])
        mask = batch["loss_mask"]
        return learned_rows(teacher, mask), learned_rows(draft, mask), learned_tokens(batch["input_ids"], mask)

    def _batch_loss(self, batch: dict) -> torch.Tensor:
        teacher, draft, tokens = self._rows(batch)
        return training_loss(self.args.loss_type, teacher, draft, tokens, self.args.kl_temperature)

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict]:
        return self.batch_loss(batch), {}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Token-weighted quality on held-out batches, keys as metrics.QUALITY_COLUMNS with `validation_` in front."""
        sums: dict[str, float] = {}
        for batch in self.validation:
            sums = add_sums(sums, quality_sums(*self._rows(batch), self.args.kl_temperature))
        means = quality_means(sums)
        return {f"validation_{name}": means[name] for name in ("kl", "ce", "ppl", "top1", "agreement", "overlap")}

    def save(self, step: int, losses: dict[str, float]) -> Path:
        path = self.folder / f"model_{step:06d}.safetensors"
        save_exit(path, self.exit, self.info(step, losses))
        return path

    def task(self) -> TrainingTask:
        trained = [p for p in self.exit.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.args.learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True)
        return TrainingTask(self.exit, optimizer, self.batches, self.count, self.loss, self.validate, self.save)


def main() -> int:
    args = parse_args(Args)
    args.check()
    folder = make_output_dir(args.output_dir)
    start = {"checkpoint_hash": file_hash(args.checkpoint_path) if args.checkpoint_path else None}
    check_same_run(folder, args, start)
    if print_if_finished(folder):
        return 0
    streams = {split: open_stream(args.dataset, split, args.dataset_path, args.seed) for split in ("train", "validation")}
    target = load_target(args.model_path, args)
    facts = {**start, "data": fingerprint(streams["train"]), "target_hash": weights_hash(target.model)}
    check_same_run(folder, args, facts)
    distillation = Distillation(args, target, streams, folder)
    record_run(folder, args, facts)
    status = run_training(distillation.task(), args, folder)
    print(f"{args.dataset}: {describe_skipped(streams['train'].skipped)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    run(main)

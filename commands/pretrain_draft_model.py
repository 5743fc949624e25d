"""Pretrain a small Llama: a draft model for a larger target, or the suite's own embedded target.

    # a llama-68m on UltraChat with the target's tokenizer
    python -m commands.pretrain_draft_model --tokenizer_path meta-llama/Llama-3.2-1B-Instruct --dataset ultrachat \\
        --output_dir runs/llama-68m --max_steps 20000
    # from the first 4 blocks of a target
    python -m commands.pretrain_draft_model --init first_blocks --init_from meta-llama/Llama-3.2-1B-Instruct \\
        --num_hidden_layers 4 --dataset ultrachat --output_dir runs/first4
    # the embedded target: see assets/pydoc-llama-7m/README.md

The result is a folder `model_<step>` that `from_pretrained` loads, tokenizer included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from running.command_line import UserError, parse_args, run

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.registry import find_dataset, open_stream
from data.row_files import check_learnable
from data_utils import EncodeOptions, PackedBatches, encode_prompt
from models.target_model import DeviceArgs, load_config, load_tokenizer, read_weights
from running.run_files import in_one_step, read_config
from training.pretraining import byte_level_bpe, damp_residual_writes, make_optimizer, pretrain, save_bf16
from training.training_loop import Learner, TrainingArgs, TrainingTask

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VALIDATION_BATCHES = 40
MAX_TOKENIZER_EXAMPLES = 200_000  # of each data set; hub streams have no end
NUM_SAMPLES, SAMPLE_TOKENS = 3, 64


@dataclass(kw_only=True)
class Args(TrainingArgs, DeviceArgs):
    """Pretrain a small Llama."""

    init: Literal["scratch", "checkpoint", "first_blocks"] = field(default="scratch", metadata={"help": "where the weights start"})
    init_from: str | None = field(default=None, metadata={"help": "model of --init checkpoint or first_blocks"})
    tokenizer_path: str | None = field(default=None, metadata={"help": "tokenizer to use (default: that of --init_from)"})
    train_tokenizer_size: int | None = field(default=None, metadata={"help": "train a byte-level BPE of this size on the data instead"})
    dataset: list[str] = field(default_factory=lambda: ["ultrachat"], metadata={"help": "data sets; their epochs are spread to end together"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the (one) data set's form"})
    hidden_size: int = field(default=768, metadata={"help": "D"})
    intermediate_size: int = field(default=3072, metadata={"help": "width of the feed-forward layers"})
    num_hidden_layers: int = field(default=2, metadata={"help": "blocks"})
    num_attention_heads: int = field(default=12, metadata={"help": "attention heads"})
    num_key_value_heads: int = field(default=12, metadata={"help": "key and value heads"})
    max_position_embeddings: int = field(default=2048, metadata={"help": "longest context"})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "one tensor for embeddings and head"})
    rope_scaling_factor: float | None = field(default=None, metadata={"help": "Llama-3 RoPE scaling by this factor (default: none)"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.1, metadata={"help": "of AdamW, on matrices only"})

    def check(self) -> None:
        super().check()
        self.check_device()
        if self.learning_rate <= 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be positive")
        if (self.init == "scratch") != (self.init_from is None):
            raise UserError(f"--init {self.init} {'takes no' if self.init_from else 'needs'} --init_from")
        if (self.tokenizer_path or self.init_from) is None and self.train_tokenizer_size is None:
            raise UserError("no tokenizer: give --tokenizer_path, or --train_tokenizer_size 4096 to train one")
        if self.dataset_path is not None and len(self.dataset) > 1:
            raise UserError("--dataset_path goes with one --dataset")
        for name in self.dataset:
            check_learnable(find_dataset(name))
        if self.init == "scratch":
            self._check_shape()

    def _check_shape(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"--hidden_size {self.hidden_size} is no multiple of --num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"--num_attention_heads {self.num_attention_heads} is no multiple of --num_key_value_heads {self.num_key_value_heads}")
        if self.max_length > self.max_position_embeddings:
            raise UserError(f"--max_length {self.max_length} exceeds --max_position_embeddings {self.max_position_embeddings}")


def train_tokenizer(args: Args) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits and a chat template, trained on the chats of the training split."""
    streams = [open_stream(name, "train", args.dataset_path, shuffle=False) for name in args.dataset]
    examples = (example for stream in streams for example in islice(stream.rest_of_epoch(), MAX_TOKENIZER_EXAMPLES))
    tokenizer = byte_level_bpe((text for example in examples for text in _texts(example)), args.train_tokenizer_size, SPECIAL_TOKENS, single_digits=True)
    bos, eos, pad, end = (SPECIAL_TOKENS[i] for i in (0, 1, 2, 6))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, additional_special_tokens=[*SPECIAL_TOKENS[3:6], end],
        model_max_length=args.max_position_embeddings, clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _texts(example: dict) -> list[str]:
    return [example["text"]] if "text" in example else [message["content"] for message in example["messages"]]


def make_tokenizer(args: Args, folder: Path) -> PreTrainedTokenizerBase:
    """The run's tokenizer: given, or trained once and kept in the run's folder."""
    kept = folder / "tokenizer"
    if args.train_tokenizer_size is None:
        tokenizer = load_tokenizer(args.tokenizer_path or args.init_from)
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path} has no EOS token, which separates packed texts; choose another")
        return tokenizer
    if not kept.exists():
        with in_one_step(kept) as partial:
            train_tokenizer(args).save_pretrained(partial)
    return load_tokenizer(str(kept))


def make_model(args: Args, tokenizer: PreTrainedTokenizerBase, attention: str) -> LlamaForCausalLM:
    """The model to train, fp32: new, a checkpoint, or a target's first blocks under its own norm and head."""
    torch.manual_seed(args.seed)
    if args.init == "scratch":
        return _new_model(args, tokenizer, attention)
    config = load_config(args.init_from)
    if args.init == "first_blocks":
        if not 1 <= args.num_hidden_layers <= config.num_hidden_layers:
            raise UserError(f"--num_hidden_layers {args.num_hidden_layers}: {args.init_from} has {config.num_hidden_layers} blocks")
        config.num_hidden_layers = args.num_hidden_layers
    if config.vocab_size < len(tokenizer):
        raise UserError(f"{args.init_from} knows {config.vocab_size} tokens, the tokenizer has {len(tokenizer)}; use the model's own tokenizer")
    whole = args.init != "first_blocks"
    return read_weights(AutoModelForCausalLM, args.init_from, all_blocks=whole, config=config, dtype=torch.float32, attn_implementation=attention)


def _new_model(args: Args, tokenizer: PreTrainedTokenizerBase, attention: str) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if args.rope_scaling_factor is not None:
        rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": args.rope_scaling_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": int(args.max_position_embeddings / args.rope_scaling_factor)}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers, num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads, max_position_embeddings=args.max_position_embeddings,
        tie_word_embeddings=args.tie_word_embeddings, rope_parameters=rope, rms_norm_eps=1e-5, attn_implementation=attention,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    damp_residual_writes(model.model.layers)
    return model


class Pretraining:
    """The callbacks of one pretraining run: loss, validation, samples and saving."""

    def __init__(self, args: Args, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.args, self.folder, self.tokenizer = args, folder, tokenizer
        self.device, self.dtype, attention = args.resolve()
        self.model = make_model(args, tokenizer, attention).to(self.device)
        options = EncodeOptions(tokenizer, max_length=args.max_length, batch_size=args.batch_size)
        self.streams = [open_stream(name, "train", args.dataset_path, args.seed) for name in args.dataset]
        self.held_out = [open_stream(name, "validation", args.dataset_path, args.seed) for name in args.dataset]
        self.batches = PackedBatches(self.streams, options)
        self.validation = list(islice(PackedBatches(self.held_out, options), VALIDATION_BATCHES))
        self.batch_loss = torch.compile(self._batch_loss) if args.torch_compile else self._batch_loss
        optimizer = make_optimizer(self.model.parameters(), args.learning_rate, args.weight_decay)
        self.learner = Learner("", folder, list(self.model.parameters()), optimizer, args.learning_rate, self.save)

    def count(self, batch: dict) -> int:
        return batch["input_ids"][:, 1:].numel()

    def _batch_loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Next-token cross-entropy summed over `input_ids` (B, T), nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="sum")

    def learn(self, batch: dict, scale: float) -> list[dict[str, torch.Tensor]]:
        loss = self.batch_loss(batch["input_ids"].to(self.device))
        (scale * loss).backward()
        return [{"loss": loss}]

    @torch.no_grad()
    def validate(self) -> None:
        """Token-mean loss on held-out text; prints greedy samples."""
        self.model.eval()
        total = sum(float(self._batch_loss(batch["input_ids"].to(self.device))) for batch in self.validation)
        self._print_samples()
        self.model.train()
        self.learner.validation = {"validation_loss": total / sum(self.count(batch) for batch in self.validation)}

    def _print_samples(self) -> None:
        for example in islice(self.held_out[0].rest_of_epoch(), NUM_SAMPLES):
            prompt = torch.tensor([encode_prompt(self.tokenizer, example)[: self.args.max_length]], device=self.device)
            output = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=SAMPLE_TOKENS, do_sample=False)
            print(f"--- {self.tokenizer.decode(output[0, -SAMPLE_TOKENS - 24 :])}")

    def save(self, step: int, losses: dict[str, float]) -> Path:
        """Write `model_<step>`."""
        ends = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[6])}
        self.model.generation_config.eos_token_id = sorted(ends - {None, self.tokenizer.unk_token_id})
        return save_bf16(self.folder, step, self.model, self.tokenizer)

    def task(self) -> TrainingTask:
        return TrainingTask([self.learner], self.batches, self.count, self.learn, self.validate, ("validation_loss",))

    def close(self) -> None:
        """Nothing reads ahead."""


def prepare(args: Args, folder: Path) -> Pretraining:
    """The run's tokenizer, model and data. Raises UserError for a tokenizer that is no run's."""
    if read_config(folder) is None and (folder / "tokenizer").exists():
        raise UserError(f"{folder} holds a tokenizer but no run; choose another --output_dir, or delete it")
    return Pretraining(args, folder, make_tokenizer(args, folder))


def main() -> int:
    args = parse_args(Args)
    args.check()
    return pretrain(args, prepare)


if __name__ == "__main__":
    run(main)

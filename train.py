"""Distil early exits from the frozen full model: token-mean KL(p‖q) on chat data.

    # stage 1: the heads of four exits, in one pass
    python train.py --model_path meta-llama/Llama-3.2-1B-Instruct --dataset ultrachat --target_layers 1 3 7 11 --ft_head \\
        --max_steps 5000 --learning_rate 5e-5 --output_dir runs/head
    # stage 2: head and last block of one of them, at three rates, starting from stage 1's head
    python train.py --model_path meta-llama/Llama-3.2-1B-Instruct --dataset ultrachat --target_layers 7 --ft_head --ft_last_transformer \\
        --checkpoint_path runs/head/layer7/model_005000.safetensors --max_steps 5000 --learning_rate 1e-5 2e-5 5e-5 --output_dir runs/ftlast
    # several kinds of exit at once
    python train.py --model_path assets/pydoc-llama-7m --dataset pydoc --target_layers 3 --kinds head rank64 translator head+attention_block \\
        --max_steps 100 --learning_rate 1e-3 --output_dir runs/try
    # an exit of a LLaVA, on chats about images
    python train.py --model_path llava-hf/llava-1.5-7b-hf --dataset llava_instruct --dataset_path llava_instruct_150k.json --image_dir train2017 \\
        --max_length 1024 --target_layers 3 --ft_head --ft_last_transformer --output_dir runs/llava-exit

Every combination of layer, kind and rate is an exit of its own, with its own optimizer, log and checkpoints in a folder of its own (in output_dir itself where
there is one exit only); it becomes what it would become alone. The last lines printed are the checkpoints' paths. With --resume an
interrupted run continues exactly where it was saved. Over several GPUs or machines: accelerate launch --num_processes N train.py …;
--batch_size is that of each process.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import Literal

from running.command_line import UserError, parse_args, run

import pandas as pd
import torch
from transformers import LlamaConfig

from data.registry import check_mixture, fingerprint, open_mixture, open_stream
from data.row_files import ExampleStream, MixedStream
from data_utils import EncodeOptions, LossOn, PaddedBatches, Prefetched, encode_example, held_out_by_source
from measuring.metrics import QUALITY_SUMS, add_sums, predicted_speedup, quality_means, quality_sums
from measuring.round_costs import frequent_tokens
from models.llava_target import LlavaTarget, is_llava, load_llama_or_llava, text_config
from models.target_model import DTYPES, EMBEDDED_TARGET, DeviceArgs, Target, text_facts, tokenizer_hash, weights_hash
from running.processes import SHARDS_ON_CPU, Processes, shards_target
from running.run_files import file_hash, make_output_dir, read_config, record_run
from training.losses import LOSS_TYPES
from training.teacher_cache import TeacherCache
from training.training_loop import Learner, TrainingArgs, TrainingTask, check_same_run, only_writer, print_if_finished, run_training
from truncated_llama import Exit, ExitInfo, ExitKind, exit_to_train, load_exit, read_exit_info, save_exit
from tuned_llama import Objective, TunedLlama

VALIDATION_BATCHES = 16
LONGEST_FORECAST = 16  # drafted tokens
ADAM_BETAS = (0.9, 0.999)
FREQUENCY_EXAMPLES = 2_000  # of the training text, whose frequent tokens make a draft vocabulary
VALIDATED = ("kl", "ce", "ppl", "top1", "agreement", "overlap")


@dataclass(kw_only=True)
class Args(TrainingArgs, DeviceArgs):
    """Distil early exits."""

    model_path: str = field(metadata={"help": f"the target: a Hugging Face id or folder ({EMBEDDED_TARGET.name} lies in assets/)"})
    target_layers: list[int] = field(metadata={"help": "0-based, inclusive: a draft keeps blocks 0..layer", "aliases": ["--target_layer"]})
    dataset: list[str] = field(default_factory=lambda: ["ultrachat"], metadata={"help": "data set to distil on, or several, mixed example by example"})
    mix: list[float] = field(default_factory=list, metadata={"help": "shares of several data sets (default: equal)"})
    dataset_path: str | None = field(default=None, metadata={"help": "local files of the data set's form"})
    image_dir: str | None = field(default=None, metadata={"help": "folder of the images that llava_instruct names, for a LLaVA"})
    loss_on: LossOn = field(default="all", metadata={"help": "learn all tokens, or the assistant's only"})
    ft_head: bool = field(default=False, metadata={"help": "train the exit's norm and head"})
    head_rank: int | None = field(default=None, metadata={"help": "train norm and a head of this rank, from the best approximation of the target's"})
    translator: bool = field(default=False, metadata={"help": "train an affine map before the frozen head"})
    ft_last_transformer: bool = field(default=False, metadata={"help": "train an own copy of block target_layer"})
    exit_block: Literal["full", "attention"] | None = field(default=None, metadata={"help": "train one more block behind target_layer, which begins as the identity"})
    draft_vocab_size: int | None = field(default=None, metadata={"help": "the head knows only so many tokens, the most frequent of the training text"})
    kinds: list[str] = field(default_factory=list, metadata={"help": (
        "several kinds of exit instead of the flags above, each some parts joined by +: head, rank<r>, translator, last_block, full_block, attention_block, vocab<N>")})
    learning_rate: list[float] = field(default_factory=lambda: [1e-4], metadata={"help": "peak learning rates of AdamW; several make an exit each"})
    checkpoint_path: list[str] = field(default_factory=list, metadata={"help": "exits to start from, one for each of target_layers (stage 2 starts from stage 1's)"})
    loss_type: list[str] = field(default_factory=lambda: ["kl_divergence"], metadata={"help": f"objectives: {', '.join(LOSS_TYPES)}; several make an exit each"})
    teacher_cache: str | None = field(default=None, metadata={"help": "folder for the target's last hidden states: texts seen before run through the exits' blocks only"})
    kl_temperature: float = field(default=1.0, metadata={"help": "softens teacher and draft in the KL"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        super().check()
        self.check_device()
        if min(self.learning_rate) <= 0:
            raise UserError(f"--learning_rate {min(self.learning_rate)}: must be positive")
        if self.kl_temperature <= 0:
            raise UserError(f"--kl_temperature {self.kl_temperature}: must be positive")
        unknown = set(self.loss_type) - set(LOSS_TYPES)
        if unknown:
            raise UserError(f"--loss_type {' '.join(sorted(unknown))}: choose from {', '.join(LOSS_TYPES)}")
        check_mixture(self.dataset, self.mix, self.dataset_path)
        self._check_against(text_config(self.model_path))
        self._check_images()
        if self.checkpoint_path:
            self._check_start([read_exit_info(path) for path in self.checkpoint_path])

    def _check_against(self, config: LlamaConfig) -> None:
        """Raise UserError for exits that the target cannot have, or that stand twice."""
        for name in ("target_layers", "kinds", "learning_rate", "loss_type"):
            values = self.exit_kinds() if name == "kinds" else getattr(self, name)
            if len(set(map("{:g}".format if name == "learning_rate" else str, values))) < len(values):  # as their folders are named
                raise UserError(f"--{name} {' '.join(map(str, values))}: one stands twice; give each once")
        for layer in self.target_layers:
            if not 0 <= layer < config.num_hidden_layers:
                raise UserError(f"--target_layers {layer}: {self.model_path} has {config.num_hidden_layers} blocks; choose 0 to {config.num_hidden_layers - 1}")
        if self.max_length > config.max_position_embeddings:
            raise UserError(f"--max_length {self.max_length}: the context of {self.model_path} is {config.max_position_embeddings}")
        for kind in self.exit_kinds():
            kind.check(config)

    def _check_images(self) -> None:
        """Raise UserError for what goes with LLaVAs only, or does not go with them."""
        if self.image_dir is not None and not Path(self.image_dir).is_dir():
            raise UserError(f"--image_dir {self.image_dir}: no such folder; give the one with the images")
        if not is_llava(self.model_path):
            if self.image_dir is not None:
                raise UserError(f"--image_dir {self.image_dir}: {self.model_path} sees no images; leave it out, or give a LLaVA")
            return
        if self.teacher_cache is not None:
            raise UserError(f"--teacher_cache {self.teacher_cache}: tells texts apart, not their images; leave it out with a LLaVA")
        if "llava_instruct" in self.dataset and self.image_dir is None:
            raise UserError("--dataset llava_instruct names images: give their folder as --image_dir")

    def exit_kinds(self) -> list[ExitKind]:
        """What --kinds or the flags of one kind ask for. Raises UserError."""
        own_block = None if self.exit_block is None else f"{self.exit_block}_block"
        flags = {
            "--ft_head": "head" if self.ft_head else None, "--head_rank": None if self.head_rank is None else f"rank{self.head_rank}",
            "--translator": "translator" if self.translator else None, "--ft_last_transformer": "last_block" if self.ft_last_transformer else None,
            "--exit_block": own_block, "--draft_vocab_size": None if self.draft_vocab_size is None else f"vocab{self.draft_vocab_size}"}
        given = {flag: part for flag, part in flags.items() if part}
        if self.kinds and given:
            raise UserError(f"--kinds and {' '.join(given)}: name the parts in --kinds alone")
        if not self.kinds and not given:
            raise UserError("nothing to train: give --ft_head, --ft_last_transformer, both, or another part of the exit; --help lists them")
        return [ExitKind.parse(kind) for kind in self.kinds or ["+".join(given.values())]]

    def _check_start(self, infos: list[ExitInfo]) -> None:
        layers = [info.target_layer for info in infos]
        if sorted(layers) != sorted(self.target_layers):
            raise UserError(f"--checkpoint_path: exits at layers {' '.join(map(str, layers))}, --target_layers {' '.join(map(str, self.target_layers))}; give one for each")
        for info, kind in product(infos, self.exit_kinds()):
            started = replace(info.kind.form, block=kind.form.block) if info.kind.form.block == "none" else info.kind.form
            if (started, info.kind.draft_vocab) != (kind.form, kind.draft_vocab):
                raise UserError(f"--checkpoint_path: an exit of kind {info.kind}, which {kind} does not go on from; keep its parts, or add a block")

    def start_of(self, layer: int) -> str | None:
        """The checkpoint that exits at `layer` start from."""
        return next((path for path in self.checkpoint_path if read_exit_info(path).target_layer == layer), None)


@dataclass(frozen=True)
class Variant:
    """One exit of a run."""

    layer: int
    kind: ExitKind
    objective: Objective
    learning_rate: float


def variants_of(args: Args) -> dict[str, Variant]:
    """Every combination of the flags that name several, by what tells it from the others ("" if it is alone)."""
    axes = (args.target_layers, args.exit_kinds(), args.loss_type, args.learning_rate)
    words = ("layer{}", "{}", "{}", "lr{:g}")
    found = {}
    for choice in product(*axes):
        name = "-".join(word.format(value) for word, value, axis in zip(words, choice, axes, strict=True) if len(axis) > 1)
        layer, kind, loss_type, learning_rate = choice
        found[name] = Variant(layer, kind, Objective(loss_type, args.kl_temperature), learning_rate)
    return found


def starting_exit(variant: Variant, args: Args, target: Target, token_ids: torch.Tensor | None) -> tuple[Exit, ExitKind]:
    """The exit to train, its own tensors in fp32 and only the chosen ones requiring gradients; and the kind that it will be, which counts earlier training."""
    kind, learned = variant.kind, {}
    path = args.start_of(variant.layer)
    if path is not None:
        start, info = load_exit(path, target)
        token_ids, learned = start.token_ids, start.state_dict()
        kind = replace(kind, tuned=(*info.kind.tuned, *(part for part in kind.tuned if part not in info.kind.tuned)))
    exit_ = exit_to_train(target.model, variant.layer, kind, token_ids)
    own = exit_.own_parameters()
    exit_.load_state_dict({name: tensor for name, tensor in learned.items() if name in own}, strict=False)
    variant.kind.choose_trained(exit_)
    return exit_, kind


class Distillation:
    """The callbacks of one run: gradients, validation and saving of its exits under the frozen target."""

    def __init__(self, args: Args, target: Target, streams: dict[str, ExampleStream | MixedStream], folder: Path, processes: Processes) -> None:
        self.args, self.target, self.processes = args, target, processes
        images = target.images if isinstance(target, LlavaTarget) else None
        options = EncodeOptions(target.tokenizer, args.loss_on, args.max_length, args.batch_size, images)
        self.batches = Prefetched(PaddedBatches(streams["train"], options, (processes.rank, processes.count)))
        self.validation = held_out_by_source(streams["validation"].streams, options, VALIDATION_BATCHES * processes.count)
        self.sources = list(self.validation) if len(self.validation) > 1 else []
        self.variants = variants_of(args)
        self.target_hash = weights_hash(target.model)
        vocabularies = {} if args.checkpoint_path else {size: self._frequent_tokens(size) for size in {kind.draft_vocab for kind in args.exit_kinds()} - {None}}
        started = [starting_exit(variant, args, target, vocabularies.get(variant.kind.draft_vocab)) for variant in self.variants.values()]
        exits = [exit_ for exit_, _ in started]
        if shards_target():
            processes.place(target.model, exits)
        self.learners = [self._learner(name, variant, *start, folder) for (name, variant), start in zip(self.variants.items(), started, strict=True)]
        self.model = TunedLlama(target.model, exits, args.torch_compile, self._teacher_cache())

    def _teacher_cache(self) -> TeacherCache | None:
        config, dtype = self.target.model.config, self.target.model.dtype
        return None if self.args.teacher_cache is None else TeacherCache(self.args.teacher_cache, self.target_hash, config.hidden_size, dtype)

    def _frequent_tokens(self, count: int) -> torch.Tensor:
        """The tokens that a trimmed head will know."""
        streams = [open_stream(name, "train", self.args.dataset_path, self.args.seed) for name in self.args.dataset]
        num_images = 0 if isinstance(self.target, LlavaTarget) else None  # their placeholders are never drafted

        def ids_of(example: dict) -> list[int]:
            return encode_example(self.target.tokenizer, example, num_images=num_images).input_ids

        texts = (ids for stream in streams for ids in islice(stream.usable(ids_of), FREQUENCY_EXAMPLES))
        return frequent_tokens(texts, count, self.target.model.config.vocab_size).to(self.target.model.device)

    def _learner(self, name: str, variant: Variant, exit_: Exit, kind: ExitKind, folder: Path) -> Learner:
        parameters = [parameter for parameter in exit_.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=variant.learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True)
        own_folder = make_output_dir(str(folder / name))
        if name and read_config(own_folder) is not None:
            raise UserError(f"{own_folder} holds a run of its own; choose another --output_dir")
        if name and read_config(folder) is None:
            check_same_run(own_folder, self.args, {})
        flags = {**asdict(self.args), "target_layers": [variant.layer], "kinds": [str(variant.kind)], "loss_type": variant.objective.loss_type,
                 "learning_rate": variant.learning_rate}

        def write(step: int, losses: dict[str, float]) -> Path:
            path = own_folder / f"model_{step:06d}.safetensors"
            save_exit(path, exit_, ExitInfo(
                variant.layer, kind, self.target.name, self.target_hash, tokenizer_hash(self.target.tokenizer), step, losses, flags))
            return path

        return Learner(name, own_folder, parameters, optimizer, variant.learning_rate, write)

    def count(self, batch: dict) -> int:
        return batch["global_tokens"]

    def learn(self, batch: dict, scale: float) -> list[dict[str, torch.Tensor]]:
        found = self.model.learn(self._on_device(batch), [variant.objective for variant in self.variants.values()], scale)
        source = batch["source"].repeat_interleave(batch["loss_mask"][:, 1:].sum(-1)).to(self.target.model.device)  # of each learned token
        sums = [{name: values.sum() for name, values in rows.items()} for rows in found]
        for number, name in enumerate(self.sources):
            own = source == number
            tokens = own.sum()
            for rows, total in zip(found, sums, strict=True):
                total |= {f"loss_{name}": (rows["loss"] * own).sum(), f"share_{name}": tokens}
        return sums

    def _on_device(self, batch: dict) -> dict[str, torch.Tensor]:
        found = {name: batch[name].to(self.target.model.device, non_blocking=True) for name in ("input_ids", "attention_mask", "loss_mask")}
        if "pixel_values" in batch:
            found["inputs_embeds"] = self.target.embed(found["input_ids"], batch["pixel_values"])
        return found

    def validate(self) -> None:
        """Token-weighted quality on held-out batches, keys as metrics.QUALITY_COLUMNS with `validation_` in front; of several data sets also each one's."""
        by_source = {name: self._held_out_sums(batches) for name, batches in self.validation.items()}
        for number, learner in enumerate(self.learners):
            total: dict[str, float] = {}
            learner.validation = {}
            for source, sums in by_source.items():
                total = add_sums(total, sums[number])
                if source in self.sources:
                    learner.validation |= _validated(sums[number], f"{source}_")
            learner.validation |= _validated(total)

    def _held_out_sums(self, batches: list[dict]) -> list[dict[str, float]]:
        """Each exit's quality_sums over `batches`, which the processes share out."""
        sums: list[dict[str, float]] = [dict.fromkeys(QUALITY_SUMS, 0.0) for _ in self.learners]

        def add(number: int, teacher: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor) -> None:
            whole = self.model.exits[number].over_vocabulary(draft)
            sums[number] = add_sums(sums[number], quality_sums(teacher, whole, tokens, self.args.kl_temperature))

        for batch in self.processes.share(batches):
            self.model.compare(self._on_device(batch), add)
        totals = iter(self.processes.totals([torch.tensor(value, dtype=torch.float64) for each in sums for value in each.values()]).tolist())
        return [{name: next(totals) for name in each} for each in sums]

    def forecast(self) -> str:
        """What each exit promises where reading weights takes the time: overlap on held-out text as α, c by bytes, the best γ and its speedup."""
        rows = []
        for learner, exit_ in zip(self.learners, self.model.exits, strict=True):
            if "validation_overlap" not in learner.validation:  # its last step made weights that are no numbers
                continue
            alpha, cost = learner.validation["validation_overlap"], exit_.cost_ratio(self.target.model)
            best = max(range(1, LONGEST_FORECAST + 1), key=lambda gamma: predicted_speedup(alpha, gamma, cost))
            rows.append({"exit": learner.name or str(next(iter(self.variants.values())).kind), "overlap": alpha, "c": cost, "best γ": best,
                         "predicted speedup": predicted_speedup(alpha, best, cost)})
        return pd.DataFrame(rows).to_string(index=False, float_format="%.3f")

    def task(self) -> TrainingTask:
        by_source = [f"{what}_{name}" for name in self.sources for what in ("loss", "share")]
        validated = [f"validation_{source}{name}" for source in ("", *(f"{source}_" for source in self.sources)) for name in VALIDATED]
        return TrainingTask(self.learners, self.batches, self.count, self.learn, self.validate, ("overlap", "lost_mass", *by_source, *validated), self.sources)


def _validated(sums: dict[str, float], source: str = "") -> dict[str, float]:
    """The VALIDATED means of one data set."""
    means = quality_means(sums)
    return {f"validation_{source}{name}": means[name] for name in VALIDATED if name in means}


def on_the_cpu(args: Args) -> Args:
    """These flags, but for where the target is loaded."""
    dtype = args.resolve()[1]
    return replace(args, device="cpu", torch_dtype=next(name for name, known in DTYPES.items() if known == dtype))


def check_sharing(args: Args, device: torch.device) -> None:
    """Raise UserError where processes cannot share the target; before the processes connect: if one exited later, the others would end in a traceback."""
    if args.teacher_cache is not None:
        raise UserError(f"--teacher_cache {args.teacher_cache}: the processes that share a target must all run all of its blocks; leave it out with --use_fsdp")
    if device.type == "cpu" and not SHARDS_ON_CPU:
        raise UserError(f"--use_fsdp: torch {torch.__version__} cannot shard a model on the CPU; take torch 2.7 or later, or a GPU, or launch without it")
    if is_llava(args.model_path):
        raise UserError(f"--use_fsdp: {args.model_path} is a LLaVA, which is trained whole on each GPU; launch without it")


def main() -> int:
    args = parse_args(Args)
    args.check()
    folder = make_output_dir(args.output_dir)
    device, _, _ = args.resolve()
    if shards_target():
        check_sharing(args, device)
    processes = Processes(device)
    with only_writer(folder) if processes.is_main else nullcontext():
        return train(args, folder, processes)


def facts_of(target: Target, streams: dict[str, ExampleStream | MixedStream]) -> dict:
    """What the exits depend on beside the flags and the checkpoints that they start from."""
    seen = {"sees_as": target.sees_as} if isinstance(target, LlavaTarget) else {}
    return {"data": fingerprint(streams["train"]), "validation_data": fingerprint(streams["validation"]), **text_facts(target), **seen}


def train(args: Args, folder: Path, processes: Processes) -> int:
    """The run in `folder`: begun, continued, or finished already."""
    start = {"checkpoint_hashes": [file_hash(path) for path in args.checkpoint_path]}
    check_same_run(folder, args, start)
    if print_if_finished(folder):
        return 0
    streams = {split: open_mixture(args.dataset, args.mix, split, args.dataset_path, args.seed) for split in ("train", "validation")}
    target = load_llama_or_llava(args.model_path, on_the_cpu(args) if shards_target() else args, args.image_dir and Path(args.image_dir))
    facts = {**start, **facts_of(target, streams)}
    check_same_run(folder, args, facts)
    distillation = Distillation(args, target, streams, folder, processes)
    processes.wait()  # all have checked what the folder holds
    if processes.is_main:
        record_run(folder, args, facts)
    status = run_training(distillation.task(), args, folder, processes)
    distillation.batches.close()
    if processes.is_main and status == 0:
        print(f"forecast, if a pass takes what reading its weights takes:\n{distillation.forecast()}", file=sys.stderr)
    if processes.is_main:
        print(f"{streams['train'].dataset.name}: {streams['train'].account()}", file=sys.stderr)
    processes.leave()
    return status


if __name__ == "__main__":
    run(main)

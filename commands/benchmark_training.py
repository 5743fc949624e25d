"""What training an exit costs: tokens per second and memory, beside a plain trainer with a second model.

    python -m commands.benchmark_training --model_path assets/pydoc-llama-7m --num_threads 2 --out_dir runs/training-speed
    python -m commands.benchmark_training --model_path assets/pydoc-llama-7m --num_threads 2 --torch_compile --out_dir runs/training-speed-compiled
    python -m commands.benchmark_training --random_init llama-3.2-1b --torch_dtype bf16 --batch_size 1 --length 512 --steps 3 --only_ours --out_dir runs/training-1b

The plain trainer is what one writes first: the teacher's forward pass and that of a second, truncated model, logits of all positions at once, KL, backward.
`cached` is ours where every text's last states are in a --teacher_cache, as in a second epoch.
Every trainer lives in a process of its own, as in real runs, and takes one step in turn, on the same batches of random tokens, in an order drawn anew each
time; the first two steps of each are not counted. Its memory is the most that its process (on a GPU: torch) held during the steps, over what it held with the
frozen model alone.
"""

from __future__ import annotations

import atexit
import copy
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from running.command_line import UserError, parse_args, run

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from measuring.machine_speed import counts_memory, held_memory, peak_memory, restart_peak
from measuring.metrics import speedup_interval, with_interval
from models.target_model import DeviceArgs, load_config, load_target, named_config
from running.run_files import command_words, new_output_dir, record_run, write_csv
from training.teacher_cache import TeacherCache, text_keys
from truncated_llama import ExitKind, exit_to_train
from tuned_llama import Objective, TunedLlama

RESULTS_NAME = "training_speed.csv"
LEARNING_RATE = 1e-5
WARM_UP_STEPS = 2


@dataclass(kw_only=True)
class Args(DeviceArgs):
    """Time training steps."""

    out_dir: str = field(metadata={"help": "folder for results; made where missing"})
    model_path: str | None = field(default=None, metadata={"help": "the target: a Hugging Face id or folder"})
    random_init: str | None = field(default=None, metadata={"help": "random weights in this shape: a name in assets/configs, a folder or a config.json"})
    target_layers: list[int] = field(default_factory=lambda: [1, 3, 7, 11], metadata={"help": "exits, each trained alone and all in one run"})
    kinds: list[str] = field(default_factory=lambda: ["head", "head+last_block"], metadata={"help": "kinds of exit, as in train.py"})
    batch_size: int = field(default=8, metadata={"help": "rows of a batch"})
    length: int = field(default=256, metadata={"help": "tokens of a row"})
    steps: int = field(default=15, metadata={"help": "measured steps of each trainer"})
    torch_compile: bool = field(default=False, metadata={"help": "time this suite's trainer with its --torch_compile"})
    only_ours: bool = field(default=False, metadata={"help": "leave the plain trainer out, where a second model and all logits do not fit"})
    seed: int = field(default=0, metadata={"help": "seed of weights, tokens, order and bootstrap"})
    trainer: str | None = field(default=None, metadata={"help": "be this trainer: a step for each line that is read (for the command's own use)"})

    def config(self) -> LlamaConfig:
        """The target's configuration. Raises UserError."""
        return load_config(self.model_path) if self.random_init is None else named_config(self.random_init)

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before anything is loaded."""
        self.check_device()
        if (self.model_path is None) == (self.random_init is None):
            raise UserError("give either --model_path MODEL or --random_init SHAPE")
        for name in ("batch_size", "length", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        config = self.config()
        if not 0 <= min(self.target_layers) <= max(self.target_layers) < config.num_hidden_layers:
            raise UserError(f"--target_layers {' '.join(map(str, self.target_layers))}: the model has {config.num_hidden_layers} blocks; choose 0 to {config.num_hidden_layers - 1}")
        for kind in self.kinds:
            ExitKind.parse(kind).check(config)


Step = Callable[[dict[str, torch.Tensor]], None]  # one optimizer step on a batch


# ---- the trainers ----

def ours(target: LlamaForCausalLM, layers: tuple[int, ...], kind: ExitKind, compiled: bool, cache: TeacherCache | None = None) -> Step:
    """All `layers` in one pass, as train.py does it."""
    token_ids = None if kind.draft_vocab is None else torch.arange(kind.draft_vocab, device=target.device)  # any will do
    exits = [exit_to_train(target, layer, kind, token_ids) for layer in layers]
    model = TunedLlama(target, exits, compiled, cache)
    optimizers = [_optimizer(exit_) for exit_ in exits]

    def step(batch: dict[str, torch.Tensor]) -> None:
        model.learn(batch, [Objective()] * len(exits), 1 / batch["loss_mask"][:, 1:].sum().item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


class SecondModel(nn.Module):
    """A full copy of the target, cut behind `layer`: what a plain trainer trains."""

    def __init__(self, target: LlamaForCausalLM, layer: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(target)
        self.model.lm_head = copy.deepcopy(self.model.lm_head)  # the tied head is untied, or training it would move the embeddings
        self.model.model.layers = self.model.model.layers[: layer + 1]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V)."""
        return self.model(input_ids, use_cache=False).logits


def plain(target: LlamaForCausalLM, layer: int, kind: ExitKind) -> Step:
    """Teacher, second model, all logits, KL over all positions, backward."""
    student = SecondModel(target, layer).float().requires_grad_(False)
    if "head" in kind.tuned:
        student.model.lm_head.requires_grad_(True)
        student.model.model.norm.requires_grad_(True)
    if kind.form.block == "last":
        student.model.model.layers[-1].requires_grad_(True)
    optimizer = _optimizer(student)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16):
            with torch.no_grad():
                teacher = target(batch["input_ids"], use_cache=False).logits
            draft = student(batch["input_ids"])
        log_p, log_q = (logits[:, :-1].float().log_softmax(-1) for logits in (teacher, draft))
        loss = kl_div(log_q, log_p, reduction="sum", log_target=True) / log_q[..., 0].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0, fused=True)


class Trainer(NamedTuple):
    """What is measured: whose steps, for exits of one kind at `layers`."""

    name: Literal["ours", "cached", "plain"]
    kind: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.kind} {' '.join(map(str, self.layers))}"

    def make(self, target: LlamaForCausalLM, args: Args) -> Step:
        kind = ExitKind.parse(self.kind)
        if self.name == "plain":
            return plain(target, *self.layers, kind)
        return ours(target, self.layers, kind, args.torch_compile, filled_cache(target, args) if self.name == "cached" else None)


def trainers(args: Args) -> list[Trainer]:
    """For each kind: every layer alone, by us and (where it can) by the plain trainer, and all layers in one run."""
    found = []
    for name in args.kinds:
        kind = ExitKind.parse(name)
        alone = [(layer,) for layer in args.target_layers]
        together = [tuple(args.target_layers)] if len(alone) > 1 else []
        found += [Trainer("ours", name, layers) for layers in alone + together]
        found += [Trainer("cached", name, layers) for layers in alone]
        if not args.only_ours and set(kind.tuned) <= {"head", "last_block"} and kind.draft_vocab is None:
            found += [Trainer("plain", name, layers) for layers in alone]
    return found


# ---- measurement ----

def load_model(args: Args) -> LlamaForCausalLM:
    """The frozen target."""
    if args.random_init is None:
        return load_target(args.model_path, args).model
    device, dtype, attention = args.resolve()
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(args.config(), dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def some_batches(model: LlamaForCausalLM, args: Args) -> Iterator[dict[str, torch.Tensor]]:
    """A batch of random tokens for each step, all of them learned."""
    generator = torch.Generator().manual_seed(args.seed)
    size = (args.batch_size, args.length)
    ones = torch.ones(size, dtype=torch.int64, device=model.device)
    for _ in range(WARM_UP_STEPS + args.steps):
        tokens = torch.randint(0, model.config.vocab_size, size, generator=generator)
        yield {"input_ids": tokens.to(model.device), "attention_mask": ones, "loss_mask": ones.bool()}


def take_steps(trainer: Trainer, model: LlamaForCausalLM, args: Args) -> None:
    """A step for each line on standard input; answers with a line of JSON: its seconds, and the bytes held so far beside the model (None: unknown)."""
    counted = counts_memory(model.device)
    before = held_memory(model.device) if counted else 0
    step = trainer.make(model, args)
    if counted:
        restart_peak(model.device)
    for batch in some_batches(model, args):
        sys.stdin.readline()
        _synchronise(model.device)
        start = time.perf_counter()
        step(batch)
        _synchronise(model.device)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory": peak_memory(model.device) - before if counted else None}), flush=True)


def filled_cache(model: LlamaForCausalLM, args: Args) -> TeacherCache:
    """The last states of all batches, in a folder that goes with this process."""
    folder = tempfile.mkdtemp(dir=args.out_dir, prefix="cache")
    atexit.register(shutil.rmtree, folder)
    cache = TeacherCache(folder, "the target", model.config.hidden_size, model.dtype)
    frozen = TunedLlama(model, [])
    for batch in some_batches(model, args):
        text = batch["input_ids"], batch["attention_mask"]
        cache.keep(text_keys(*text), frozen.frozen_pass(*text).teacher, batch["attention_mask"])
    return cache


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def in_processes(wanted: list[Trainer]) -> Iterator[dict[Trainer, subprocess.Popen]]:
    """A process for each trainer, with this one's flags."""
    with ExitStack() as stack:
        yield {trainer: stack.enter_context(subprocess.Popen([sys.executable, *command_words(), "--trainer", str(trainer)],
                                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)) for trainer in wanted}


def one_step(process: subprocess.Popen) -> dict:
    """What `take_steps` says of its next step. Raises UserError where the process has ended."""
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        while not (line := process.stdout.readline()).startswith("{"):
            if not line:
                raise BrokenPipeError
        return json.loads(line)
    except BrokenPipeError:
        raise UserError(f"a trainer ended: {' '.join(process.args[-1:])}; see the lines above") from None


def measure(wanted: list[Trainer], args: Args) -> tuple[dict[Trainer, np.ndarray], dict[Trainer, int]]:
    """Seconds (steps,) of every trainer's steps behind the warm-up, and the most bytes that it held."""
    seconds: dict[Trainer, list[float]] = {trainer: [] for trainer in wanted}
    memory: dict[Trainer, int] = {}
    orders = random.Random(args.seed)
    with in_processes(wanted) as processes:
        for number in range(WARM_UP_STEPS + args.steps):
            for trainer in orders.sample(wanted, len(wanted)):
                found = one_step(processes[trainer])
                seconds[trainer].append(found["seconds"])
                if found["memory"] is not None:
                    memory[trainer] = found["memory"]
            print(f"[{max(0, number + 1 - WARM_UP_STEPS)}/{args.steps}] {'warm-up' if number < WARM_UP_STEPS else 'steps'} done", flush=True)
    return {trainer: np.array(found[WARM_UP_STEPS:]) for trainer, found in seconds.items()}, memory


def row_of(trainer: Trainer, seconds: dict[Trainer, np.ndarray], memory: dict[Trainer, int], args: Args) -> dict:
    """Tokens per second and memory of one trainer, and how they compare: alone with the plain trainer, several exits with as many runs."""
    tokens = np.full(args.steps, args.batch_size * args.length)
    own = seconds[trainer]
    row = {"kind": trainer.kind, "trainer": trainer.name, "layers": " ".join(map(str, trainer.layers)), "ms_per_step": 1000 * float(np.median(own))}
    row |= with_interval("tokens_per_s", tokens, own, args.seed)
    if trainer in memory:
        row["memory_bytes"] = memory[trainer]
    same = trainer._replace(name="plain")
    if trainer != same and same in seconds:
        row |= speedup_interval("speedup_over_plain", (tokens, seconds[same]), (tokens, own), args.seed)
        if same in memory:
            row["memory_of_plain"] = memory[trainer] / memory[same]
    if len(trainer.layers) > 1:
        for name, column in (("ours", "time_of_single_runs"), ("plain", "time_of_plain_runs")):
            single = [Trainer(name, trainer.kind, (layer,)) for layer in trainer.layers]
            if all(run in seconds for run in single):
                row[column] = float(np.median(own) / sum(np.median(seconds[run]) for run in single))
    return row


def main() -> None:
    args = parse_args(Args)
    args.check()
    wanted = trainers(args)
    if args.trainer is not None:
        take_steps(next(trainer for trainer in wanted if str(trainer) == args.trainer), load_model(args), args)
        return
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "a benchmark")
    record_run(folder, args, {"threads": torch.get_num_threads()})
    seconds, memory = measure(wanted, args)
    rows = [row_of(trainer, seconds, memory, args) for trainer in wanted]
    write_csv(folder / RESULTS_NAME, rows)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f", na_rep=""))
    print(Path(folder) / RESULTS_NAME)


if __name__ == "__main__":
    run(main)

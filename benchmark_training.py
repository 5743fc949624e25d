"""What training an exit costs: tokens per second and memory, beside a plain trainer with a second model.

    python benchmark_training.py --model_path assets/pydoc-llama-7m --num_threads 2 --out_dir runs/training-speed
    python benchmark_training.py --model_path assets/pydoc-llama-7m --num_threads 2 --torch_compile --out_dir runs/training-speed-compiled
    python benchmark_training.py --random_init llama-3.2-1b --torch_dtype bf16 --batch_size 1 --length 512 --steps 3 --only_ours --out_dir runs/training-1b

The plain trainer is what one writes first: the teacher's forward pass and that of a second, truncated model, logits of all positions at once, KL, backward.
Every measured trainer takes one step in turn, on the same batches of random tokens, in an order drawn anew each time; the first step of each is not counted.
Memory is the most that the process (on a GPU: torch) held during a trainer's own steps, over what the frozen model's process held before any trainer was made;
each trainer is measured in a process of its own.
"""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from command_line import UserError, parse_args, run

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from machine_speed import counts_memory, held_memory, peak_memory, restart_peak
from metrics import speedup_interval, with_interval
from results import new_output_dir, record_run, write_csv
from target_model import DeviceArgs, load_config, load_target, named_config
from truncated_llama import ExitKind, exit_to_train
from tuned_llama import Objective, TunedLlama

RESULTS_NAME = "training_speed.csv"
LEARNING_RATE = 1e-5


@dataclass(kw_only=True)
class Args(DeviceArgs):
    """Time training steps."""

    out_dir: str = field(metadata={"help": "folder for results; made where missing"})
    model_path: str | None = field(default=None, metadata={"help": "the target: a Hugging Face id or folder"})
    random_init: str | None = field(default=None, metadata={"help": "random weights in this shape: a name in assets/configs, a folder or a config.json"})
    target_layers: list[int] = field(default_factory=lambda: [1, 3, 7, 11], metadata={"help": "exits of the run with several; those with one take the second of these"})
    kinds: list[str] = field(default_factory=lambda: ["head", "head+last_block"], metadata={"help": "kinds of exit, as in train.py"})
    batch_size: int = field(default=8, metadata={"help": "rows of a batch"})
    length: int = field(default=256, metadata={"help": "tokens of a row"})
    steps: int = field(default=15, metadata={"help": "measured steps of each trainer"})
    torch_compile: bool = field(default=False, metadata={"help": "time this suite's trainer with its --torch_compile"})
    only_ours: bool = field(default=False, metadata={"help": "leave the plain trainer out, where a second model and all logits do not fit"})
    seed: int = field(default=0, metadata={"help": "seed of weights, tokens, order and bootstrap"})
    memory_of: str | None = field(default=None, metadata={"help": "print the memory of this trainer alone, in JSON (for the command's own use)"})

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

    @property
    def single_layer(self) -> int:
        """Where exits sit that are trained alone."""
        return self.target_layers[min(1, len(self.target_layers) - 1)]


Step = Callable[[dict[str, torch.Tensor]], None]  # one optimizer step on a batch


# ---- the trainers ----

def ours(target: LlamaForCausalLM, layers: list[int], kind: ExitKind, compiled: bool) -> Step:
    """All `layers` in one pass, as train.py does it."""
    token_ids = None if kind.draft_vocab is None else torch.arange(kind.draft_vocab, device=target.device)  # any will do
    exits = [exit_to_train(target, layer, kind, token_ids) for layer in layers]
    model = TunedLlama(target, exits, compiled)
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


def trainers(target: LlamaForCausalLM, args: Args) -> dict[str, Callable[[], Step]]:
    """Name -> how to make that trainer."""
    found: dict[str, Callable[[], Step]] = {}
    for name in args.kinds:
        kind = ExitKind.parse(name)
        found[f"{name}, one exit"] = lambda kind=kind: ours(target, [args.single_layer], kind, args.torch_compile)
        if len(args.target_layers) > 1:
            found[f"{name}, {len(args.target_layers)} exits"] = lambda kind=kind: ours(target, args.target_layers, kind, args.torch_compile)
        if not args.only_ours and set(kind.tuned) <= {"head", "last_block"} and kind.draft_vocab is None:
            found[f"{name}, plain"] = lambda kind=kind: plain(target, args.single_layer, kind)
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


def some_batches(model: LlamaForCausalLM, args: Args) -> list[dict[str, torch.Tensor]]:
    """A batch of random tokens for each step, all of them learned."""
    generator = torch.Generator().manual_seed(args.seed)
    size = (args.batch_size, args.length)
    ones = torch.ones(size, dtype=torch.int64, device=model.device)
    return [{"input_ids": torch.randint(0, model.config.vocab_size, size, generator=generator).to(model.device), "attention_mask": ones, "loss_mask": ones.bool()}
            for _ in range(args.steps + 1)]


def step_seconds(model: LlamaForCausalLM, args: Args) -> dict[str, np.ndarray]:
    """Seconds (steps,) of every trainer's steps, the first left out."""
    steps = {name: make() for name, make in trainers(model, args).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(args.seed)
    for number, batch in enumerate(some_batches(model, args)):
        for name in orders.sample(list(steps), len(steps)):
            _synchronise(model.device)
            start = time.perf_counter()
            steps[name](batch)
            _synchronise(model.device)
            seconds[name].append(time.perf_counter() - start)
        print(f"[{number}/{args.steps}] {'warm-up' if number == 0 else 'steps'} done", flush=True)
    return {name: np.array(found[1:]) for name, found in seconds.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_memory(model: LlamaForCausalLM, args: Args) -> int:
    """The most bytes that one trainer holds beside the model, over two steps."""
    before = held_memory(model.device)
    step = trainers(model, args)[args.memory_of]()
    restart_peak(model.device)
    for batch in some_batches(model, args)[:2]:
        step(batch)
    _synchronise(model.device)
    return peak_memory(model.device) - before


def memory_in_a_process(name: str) -> int:
    """own_memory of one trainer, measured by another process with this one's flags."""
    command = [sys.executable, *sys.argv, "--memory_of", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def rows_of(seconds: dict[str, np.ndarray], memory: dict[str, int], args: Args) -> list[dict]:
    """A row per trainer: tokens per second, times the plain trainer's, and memory."""
    tokens = np.full(args.steps, args.batch_size * args.length)
    rows = []
    for name, own in seconds.items():
        kind, what = name.split(", ")
        row = {"kind": kind, "trainer": what, "exits": int(what.split()[0]) if what.endswith("exits") else 1, "ms_per_step": 1000 * float(np.median(own))}
        row |= with_interval("tokens_per_s", tokens, own, args.seed)
        for base, column in ((f"{kind}, plain", "speedup_over_plain"), (f"{kind}, one exit", "speed_of_one_exit")):
            if base in seconds and base != name:
                row |= speedup_interval(column, (tokens, seconds[base]), (tokens, own), args.seed)
        if row["exits"] > 1:
            for base, column in (("one exit", "time_of_single_runs"), ("plain", "time_of_plain_runs")):
                if f"{kind}, {base}" in seconds:
                    row[column] = float(np.median(own) / (row["exits"] * np.median(seconds[f"{kind}, {base}"])))
        if name in memory:
            row["memory_bytes"] = memory[name]
            if f"{kind}, plain" in memory:
                row["memory_of_plain"] = memory[name] / memory[f"{kind}, plain"]
        rows.append(row)
    return rows


def main() -> None:
    args = parse_args(Args)
    args.check()
    if args.memory_of is not None:
        print(own_memory(load_model(args), args))
        return
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "a benchmark")
    model = load_model(args)
    record_run(folder, args, {"threads": torch.get_num_threads()})
    memory = {name: memory_in_a_process(name) for name in trainers(model, args)} if counts_memory(model.device) else {}
    rows = rows_of(step_seconds(model, args), memory, args)
    write_csv(folder / RESULTS_NAME, rows)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f", na_rep=""))
    print(Path(folder) / RESULTS_NAME)


if __name__ == "__main__":
    run(main)

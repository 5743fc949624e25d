"""The one training loop: accumulation, schedule, clipping, logging, validation, saving, stopping and exact resuming.

A command describes what it trains as a `TrainingTask`; `run_training` does the rest. Losses are sums over tokens,
divided by the number of learned tokens of the whole accumulated batch, so a step does not depend on how the batch
was cut into micro-batches.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from command_line import UserError, first_line, import_optional

import torch
from torch import nn
from tqdm import tqdm

from results import append_jsonl, read_config, read_jsonl, write_json, write_text

LOG_NAME, STATE_NAME, FINAL_NAME = "train_log.jsonl", "state.pt", "final_checkpoint.txt"
FREE_ON_RESUME = {"resume", "output_dir", "run_name", "notes", "eval_every_steps", "save_every_steps", "tracker", "num_threads"}
LOG_EVERY_STEPS = 10
MAX_GRAD_NORM = 1.0


@dataclass(kw_only=True)
class TrainingArgs:
    """Flags that every training command has."""

    output_dir: str = field(metadata={"help": "folder of the run; made where missing"})
    run_name: str | None = field(default=None, metadata={"help": "name in trackers and logs (default: the output folder's)"})
    notes: str = field(default="", metadata={"help": "free text, kept in config.json"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=8, metadata={"help": "examples per micro-batch"})
    grad_accumulate_steps: int = field(default=1, metadata={"help": "micro-batches per optimizer step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of AdamW"})
    lr_schedule: Literal["linear", "constant", "cosine"] = field(default="cosine", metadata={"help": "after the warm-up"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of max_steps with a rising learning rate"})
    max_length: int = field(default=512, metadata={"help": "longest kept sequence, in tokens"})
    eval_every_steps: int = field(default=0, metadata={"help": "steps between validations; 0: only at step 0 and the end"})
    save_every_steps: int = field(default=0, metadata={"help": "steps between checkpoints; 0: only at the end or when stopped"})
    seed: int = field(default=0, metadata={"help": "seed of initial weights and data order"})
    resume: bool = field(default=False, metadata={"help": "continue the run in output_dir, or start it where there is none"})
    torch_compile: bool = field(default=False, metadata={"help": "compile the loss with torch.compile"})
    tracker: Literal["none", "tensorboard", "wandb"] = field(default="none", metadata={"help": "also log there, through accelerate"})

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        for name in ("max_steps", "batch_size", "grad_accumulate_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.max_length < 2:
            raise UserError(f"--max_length {self.max_length}: must be at least 2")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio}: must lie between 0 and 1")
        if self.learning_rate <= 0:
            raise UserError(f"--learning_rate {self.learning_rate}: must be positive")
        if self.tracker != "none":
            import_optional(self.tracker, self.tracker, f"--tracker {self.tracker}")


class Batches(Protocol):
    """An endless, resumable source of batches (see data_utils)."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


@dataclass
class TrainingTask:
    """What one command trains.

    `count(batch)` is the batch's number of learned tokens; `loss(batch)` its loss summed over them, with further
    sums to log; `validate()` a dictionary of validation figures; `save(step, losses)` writes a checkpoint and
    returns its path.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    count: Callable[[dict], int]
    loss: Callable[[dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]
    validate: Callable[[], dict[str, float]]
    save: Callable[[int, dict[str, float]], Path]


def lr_factor(step: int, args: TrainingArgs) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then the schedule down to 0 at max_steps."""
    warmup = round(args.warmup_ratio * args.max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, args.max_steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[args.lr_schedule]


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `signal` and lets the step finish; a second one interrupts."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(f"\n{signal.Signals(number).name}: finishing this step and saving; send it again to stop at once", file=sys.stderr)


# ---- the run's folder: new, continued or finished ----

def check_same_run(folder: Path, args: TrainingArgs, facts: dict) -> None:
    """Raise UserError when `folder` holds a run and --resume is not given, or one with other flags or recorded `facts`."""
    previous = read_config(folder)
    if previous is None:
        return
    if not args.resume:
        raise UserError(f"{folder} holds a run already; choose another --output_dir, or continue it with --resume")
    changed = [f"{'--' if hasattr(args, name) else ''}{name} {previous.get(name)} -> {value}" for name, value in {**vars(args), **facts}.items()
               if name not in FREE_ON_RESUME and previous.get(name) != value]
    if changed:
        raise UserError(f"{folder} was started with other settings ({', '.join(changed)}); use those, or another --output_dir")


def print_if_finished(folder: Path) -> bool:
    """Whether the run in `folder` needs no more work; then its final checkpoint is printed, as a fresh run would."""
    marker = folder / FINAL_NAME
    if marker.exists():
        print(f"finished already\n{folder / marker.read_text().strip()}")
    return marker.exists()


def save_state(folder: Path, step: int, losses: dict[str, float], task: TrainingTask) -> None:
    """Everything that resuming after `step` needs, `losses` being the last validation's; replaced atomically."""
    partial = folder / f"{STATE_NAME}.{os.getpid()}.partial"
    state = {"step": step, "losses": losses, "module": task.module.state_dict(), "optimizer": task.optimizer.state_dict(), "batches": task.batches.state_dict()}
    torch.save(state, partial)
    partial.replace(folder / STATE_NAME)


def load_state(folder: Path, task: TrainingTask) -> tuple[int, dict[str, float]]:
    """Restore the last saved state into `task`; returns its step and last validation, (0, {}) where nothing was saved."""
    path = folder / STATE_NAME
    if not path.exists():
        return 0, {}
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is broken ({first_line(error)}); start the run again in another --output_dir") from error
    task.module.load_state_dict(state["module"])
    task.optimizer.load_state_dict(state["optimizer"])
    task.batches.load_state_dict(state["batches"])
    return state["step"], state["losses"]


def drop_later_rows(folder: Path, step: int) -> None:
    """Cut the log back to `step`: what a killed run logged after its last save will be logged again."""
    rows = [row for row in read_jsonl(folder / LOG_NAME) if 0 < step and row["step"] <= step]
    write_text(folder / LOG_NAME, "".join(json.dumps(row) + "\n" for row in rows))


# ---- the loop ----

def train_step(task: TrainingTask, batches: list[dict], learning_rate: float) -> dict[str, float]:
    """One optimizer step over `batches`; returns the token-mean loss and further token means."""
    tokens = sum(task.count(batch) for batch in batches)
    sums: dict[str, float] = {}
    for batch in batches:
        loss, further = task.loss(batch)
        (loss / tokens).backward()
        for name, value in {"loss": loss, **further}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    for group in task.optimizer.param_groups:
        group["lr"] = learning_rate
    task.optimizer.step()
    task.optimizer.zero_grad(set_to_none=True)
    return {**{name: float(value) / tokens for name, value in sums.items()}, "tokens": tokens, "grad_norm": float(grad_norm)}


class RunLog:
    """train_log.jsonl, the progress bar (on a terminal) or a line per interval, and the tracker if one was asked for."""

    def __init__(self, folder: Path, args: TrainingArgs, start: int) -> None:
        self.folder, self.args = folder, args
        self.bar = tqdm(total=args.max_steps, initial=start, desc=args.run_name or folder.name, disable=not sys.stderr.isatty())
        self.clock, self.tokens_since, self.steps_since = time.perf_counter(), 0, 0
        self.tracker = self._open_tracker()

    def _open_tracker(self) -> object | None:
        if self.args.tracker == "none":
            return None
        from accelerate import Accelerator

        accelerator = Accelerator(log_with=self.args.tracker, project_dir=str(self.folder))
        flat = {name: value for name, value in vars(self.args).items() if isinstance(value, int | float | str | bool)}
        accelerator.init_trackers(self.args.run_name or self.folder.name, config=flat)
        return accelerator

    def write(self, row: dict) -> None:
        append_jsonl(self.folder / LOG_NAME, row)
        if self.tracker is not None:
            self.tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def step(self, step: int, learning_rate: float, figures: dict[str, float]) -> None:
        """Log one optimizer step; the rate is written at every LOG_EVERY_STEPS-th."""
        self.tokens_since += figures["tokens"]
        self.steps_since += 1
        row = {"step": step, "learning_rate": learning_rate, **figures}
        if step % LOG_EVERY_STEPS == 0 or step == self.args.max_steps:
            elapsed = time.perf_counter() - self.clock
            row["tokens_per_s"] = self.tokens_since / elapsed
            if self.bar.disable:
                eta = (self.args.max_steps - step) * elapsed / self.steps_since
                print(f"step {step}/{self.args.max_steps} loss {row['loss']:.4f} {row['tokens_per_s']:.0f} tokens/s, {eta:.0f} s left", flush=True)
            self.restart_clock()
        self.write(row)
        self.bar.set_postfix(loss=f"{figures['loss']:.4f}")
        self.bar.update()

    def validation(self, step: int, figures: dict[str, float]) -> None:
        self.write({"step": step, **figures})
        described = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.bar.write(f"step {step} validation: {described}", file=sys.stdout)
        sys.stdout.flush()
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock, self.tokens_since, self.steps_since = time.perf_counter(), 0, 0

    def close(self) -> None:
        self.bar.close()
        if self.tracker is not None:
            self.tracker.end_training()


def run_training(task: TrainingTask, args: TrainingArgs, folder: Path) -> int:
    """Train from the last saved step to max_steps. Returns the exit status: 0 done, 128 + signal when stopped.

    The last line printed on success is the path of the final checkpoint, which `final_checkpoint.txt` names too.
    """
    step, losses = load_state(folder, task)
    drop_later_rows(folder, step)
    log = RunLog(folder, args, step)
    if step == 0:
        losses = task.validate()
        log.validation(0, losses)
    batches, checkpoint = iter(task.batches), None
    with StopRequest() as stop:
        while step < args.max_steps and stop.signal is None:
            learning_rate = args.learning_rate * lr_factor(step, args)
            figures = train_step(task, [next(batches) for _ in range(args.grad_accumulate_steps)], learning_rate)
            step += 1
            log.step(step, learning_rate, figures)
            if _is_due(step, args.eval_every_steps) or step == args.max_steps:
                losses = task.validate()
                log.validation(step, losses)
            if _is_due(step, args.save_every_steps) or step == args.max_steps or stop.signal is not None:
                checkpoint = task.save(step, losses)
                save_state(folder, step, losses, task)
        log.close()
        if step < args.max_steps:
            print(f"stopped at step {step}; continue with the same command and --resume", file=sys.stderr)
            return 128 + stop.signal
    checkpoint = checkpoint or task.save(step, losses)
    write_json(folder / "final_metrics.json", {"step": step, **losses})
    write_text(folder / FINAL_NAME, checkpoint.name + "\n")
    print(checkpoint)
    return 0


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

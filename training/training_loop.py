"""The one training loop: accumulation, schedule, clipping, logging, validation, saving, stopping and exact resuming.

A command describes what it trains as a `TrainingTask` of one or several learners, which share the data and nothing else; `run_training` does the
rest. Losses are sums over tokens, divided by the number of learned tokens of the whole accumulated batch of all processes, so a step does
not depend on how the batch was cut.
"""

from __future__ import annotations

import fcntl
import math
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, Protocol

from running.command_line import UserError, first_line, import_optional

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from running.processes import Processes
from running.run_files import append_csv, drop_later_rows, in_one_step, read_config, write_json, write_text

LOG_NAME, STATE_NAME, FINAL_NAME, LOCK_NAME = "train_log.csv", "state.pt", "final_checkpoint.txt", ".lock"
CHECKPOINTS = "model_*"
LOG_COLUMNS = ("step", "learning_rate", "loss", "tokens", "grad_norm", "tokens_per_s")  # and those of the task
FREE_ON_RESUME = {"resume", "output_dir", "run_name", "notes", "eval_every_steps", "save_every_steps", "tracker", "num_threads", "teacher_cache"}
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
    lr_schedule: Literal["linear", "constant", "cosine"] = field(default="cosine", metadata={"help": "after the warm-up"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of max_steps with a rising learning rate"})
    max_length: int = field(default=512, metadata={"help": "longest kept sequence, in tokens"})
    eval_every_steps: int = field(default=0, metadata={"help": "steps between validations; 0: only at step 0 and the end"})
    save_every_steps: int = field(default=0, metadata={"help": "steps between checkpoints; 0: only at the end or when stopped"})
    seed: int = field(default=0, metadata={"help": "seed of initial weights and data order"})
    resume: bool = field(default=False, metadata={"help": "continue the run in output_dir, or start it where there is none"})
    torch_compile: bool = field(default=False, metadata={"help": "run the frozen blocks and the loss through torch.compile; pays off after some hundred steps"})
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
        if self.torch_compile and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UserError("--torch_compile needs a C++ compiler; install g++, or leave it out")
        if self.tracker != "none":
            import_optional(self.tracker, self.tracker, f"--tracker {self.tracker}")


class Batches(Protocol):
    """An endless, resumable source of batches (see data_utils)."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


@dataclass
class Learner:
    """What is trained as one: `parameters` under an `optimizer` whose peak rate is `learning_rate`, logged and saved in `folder`.

    `write(step, validation)` writes a checkpoint and returns its path. `name` tells it from the others ("" if it is alone).
    """

    name: str
    folder: Path
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: float
    write: Callable[[int, dict[str, float]], Path]
    validation: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    @property
    def current_rate(self) -> float:
        """The rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, factor: float) -> None:
        """Update the parameters at `factor` of the peak rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def save(self, step: int) -> Path:
        """Write a checkpoint."""
        return self.write(step, self.validation)

    def state_dict(self) -> dict:
        """Parameters, optimizer and last validation."""
        return {"parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict(), "validation": self.validation, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict`."""
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.validation, self.steps = state["validation"], state["steps"]


@dataclass
class TrainingTask:
    """What one command trains.

    `count(batch)` is the number of learned tokens of the batch, those of other processes included. `learn(batch, scale)` adds the gradients of scale × loss and
    returns, for each learner, its "loss" and further sums over the batch's tokens. `validate()` fills in every learner's `validation`. `columns` are what the log
    has beside LOG_COLUMNS: the further sums, as token means, and the validation figures. Of each of the `sources` that the data come from, there is the sum
    "loss_<source>" over its own tokens and their number, "share_<source>".
    """

    learners: list[Learner]
    batches: Batches
    count: Callable[[dict], int]
    learn: Callable[[dict, float], list[dict[str, torch.Tensor]]]
    validate: Callable[[], None]
    columns: tuple[str, ...]
    sources: list[str] = field(default_factory=list)


def lr_factor(step: int, args: TrainingArgs) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then the schedule down to 0 at max_steps."""
    warmup = round(args.warmup_ratio * args.max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, args.max_steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[args.lr_schedule]


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `signal` and lets the step finish; a second one interrupts.

    `launched` processes pass over the second one, as theirs is the first once more: a scheduler signals the launcher and
    them, and the launcher hands its own on. They are killed by the launcher if they take too long.
    """

    def __init__(self, launched: bool = False) -> None:
        self.launched = launched
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            if self.launched:
                return
            raise KeyboardInterrupt
        self.signal = number
        at_once = "" if self.launched else "; send it again to stop at once"
        print(f"\n{signal.Signals(number).name}: finishing this step and saving{at_once}", file=sys.stderr)


# ---- the run's folder: new, continued or finished ----

@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from training into `folder` meanwhile. Raises UserError where one does already."""
    with (folder / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process trains into {folder}; wait for it, or choose another --output_dir") from error
        yield


def check_same_run(folder: Path, args: TrainingArgs, facts: dict) -> None:
    """Raise UserError when `folder` holds a run and --resume is not given, or one with other flags or recorded `facts`."""
    previous = read_config(folder)
    if previous is None:
        if (folder / LOG_NAME).exists():
            raise UserError(f"{folder} holds an exit of the run in {folder.parent}; choose another --output_dir")
        others = sorted(path.name for path in folder.glob(CHECKPOINTS))
        if others:
            raise UserError(f"{folder} holds {others[0]}, and does not say which run made it; choose another --output_dir, which a run may write to as it likes")
        return
    if not args.resume:
        raise UserError(f"{folder} holds a run already; choose another --output_dir, or continue it with --resume")
    changed = [f"{'--' if hasattr(args, name) else ''}{name} {previous.get(name)} -> {value}" for name, value in {**vars(args), **facts}.items()
               if name not in FREE_ON_RESUME and previous.get(name) != value]
    if changed:
        raise UserError(f"{folder} was started with other settings ({', '.join(changed)}); use those, or another --output_dir")


def print_if_finished(folder: Path) -> bool:
    """Whether the run in `folder` needs no more work; then its final checkpoints are printed, as a fresh run would.

    Checkpoints that are gone are written again by the run, from its last saved state. Raises UserError where that is gone, too.
    """
    marker = folder / FINAL_NAME
    if not marker.exists():
        return False
    paths = [folder / line for line in marker.read_text(encoding="utf-8").splitlines()]
    gone = [path for path in paths if not path.is_file() and not (path / "config.json").is_file()]  # an exit, or the folder of a model
    if paths and not gone:
        print("\n".join(["finished already", *map(str, paths)]))
        return True
    if not (folder / STATE_NAME).exists():
        named = f"{gone[0]}, which is not there" if gone else "no checkpoint"
        raise UserError(f"{marker} names {named}, and {STATE_NAME} is gone, too; delete {folder} to train it again")
    return False


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what a full disk raises into a UserError: what was saved before stays as it is, so that the run can go on from there."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        known = isinstance(error, OSError) and error.strerror
        reason = OSError(error.errno, error.strerror) if known else error  # without its file's name, which stands before it
        raise UserError(f"cannot save {path} ({first_line(reason)}); make room, and continue from the last save with the same command and --resume") from error


def save_state(folder: Path, progress: dict, task: TrainingTask) -> None:
    """Everything that resuming needs: `progress`, which is "step", "batches" (their state) and "processes" (how many), and the learners; replaced atomically."""
    state = {**progress, "rng": torch.get_rng_state(), "learners": {learner.name: learner.state_dict() for learner in task.learners}}
    with saving(folder / STATE_NAME), in_one_step(folder / STATE_NAME) as partial:
        torch.save(state, partial)


def load_state(folder: Path, task: TrainingTask, num_processes: int) -> int:
    """Restore the last saved state into `task`; returns its step, 0 where nothing was saved. Raises UserError for a state of more or fewer processes."""
    path = folder / STATE_NAME
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is broken ({first_line(error)}); start the run again in another --output_dir") from error
    if state["processes"] != num_processes:  # a step would have more or fewer examples
        raise UserError(f"{folder} was started with other settings (processes {state['processes']} -> {num_processes}); use those, or another --output_dir")
    for learner in task.learners:
        learner.load_state_dict(state["learners"][learner.name])
    task.batches.load_state_dict(state["batches"])
    torch.set_rng_state(state["rng"])
    return state["step"]


# ---- the loop ----

def train_step(task: TrainingTask, batches: list[dict], args: TrainingArgs, step: int, processes: Processes) -> list[dict[str, float]]:
    """One optimizer step of every learner over `batches`; returns the token means of each. Raises Diverged, before any weight has changed."""
    tokens = sum(task.count(batch) for batch in batches)
    sums = [dict[str, torch.Tensor]() for _ in task.learners]
    for batch in batches:
        for total, further in zip(sums, task.learn(batch, 1 / tokens), strict=True):
            total |= {name: total.get(name, 0.0) + value.detach() for name, value in further.items()}
    processes.add_up([p.grad for learner in task.learners for p in learner.parameters])
    norms = [nn.utils.clip_grad_norm_(learner.parameters, MAX_GRAD_NORM) for learner in task.learners]
    totals = processes.totals([value for total in sums for value in total.values()])
    means = iter((totals / tokens).tolist())
    figures = [{**{name: next(means) for name in total}, "tokens": tokens, "grad_norm": norm}
               for total, norm in zip(sums, torch.stack(norms).tolist(), strict=True)]
    for figure, source in product(figures, task.sources):
        if figure[f"share_{source}"] > 0:
            figure[f"loss_{source}"] /= figure[f"share_{source}"]
        else:
            del figure[f"loss_{source}"]
    for learner, figure in zip(task.learners, figures, strict=True):
        if not math.isfinite(figure["loss"] + figure["grad_norm"]):
            raise Diverged(f"{learner.name or 'the run'} at step {step + 1}: loss {figure['loss']}, gradient norm {figure['grad_norm']}")
    for learner in task.learners:
        learner.step(lr_factor(step, args))
    return figures


class Diverged(ArithmeticError):
    """A loss or gradient that is no number."""


class RunLog:
    """Each learner's train_log.csv, the progress bar (on a terminal) or a line per interval, and the tracker if one was asked for."""

    def __init__(self, folder: Path, args: TrainingArgs, task: TrainingTask, start: int) -> None:
        self.args, self.learners = args, task.learners
        self.columns = [*LOG_COLUMNS, *task.columns]
        for learner in task.learners:
            drop_later_rows(learner.folder / LOG_NAME, start)
        self.bar = tqdm(total=args.max_steps, initial=start, desc=args.run_name or folder.name, disable=not sys.stderr.isatty())
        self.clock, self.tokens_since, self.steps_since = time.perf_counter(), 0, 0
        self.tracker = self._open_tracker(folder)

    def _open_tracker(self, folder: Path) -> object | None:
        if self.args.tracker == "none":
            return None
        from accelerate import Accelerator

        accelerator = Accelerator(log_with=self.args.tracker, project_dir=str(folder))
        flat = {name: value for name, value in vars(self.args).items() if isinstance(value, int | float | str | bool)}
        accelerator.init_trackers(self.args.run_name or folder.name, config=flat)
        return accelerator

    def write(self, learner: Learner, row: dict) -> None:
        with saving(learner.folder / LOG_NAME):
            append_csv(learner.folder / LOG_NAME, row, self.columns)
        if self.tracker is not None:
            self.tracker.log({f"{learner.name}/{name}".lstrip("/"): value for name, value in row.items() if name != "step"}, step=row["step"])

    def step(self, step: int, figures: list[dict[str, float]]) -> None:
        """Log one optimizer step; the rate is written at every LOG_EVERY_STEPS-th."""
        self.tokens_since += figures[0]["tokens"]
        self.steps_since += 1
        pace = {}
        if step % LOG_EVERY_STEPS == 0 or step == self.args.max_steps:
            elapsed = time.perf_counter() - self.clock
            pace["tokens_per_s"] = self.tokens_since / elapsed
            if self.bar.disable:
                eta = (self.args.max_steps - step) * elapsed / self.steps_since
                print(f"step {step}/{self.args.max_steps} {self._described(figures)} {pace['tokens_per_s']:.0f} tokens/s, {eta:.0f} s left", flush=True)
            self.restart_clock()
        for learner, figure in zip(self.learners, figures, strict=True):
            self.write(learner, {"step": step, "learning_rate": learner.current_rate, **figure, **pace})
        self.bar.set_postfix_str(self._described(figures))
        self.bar.update()

    def _described(self, figures: list[dict[str, float]]) -> str:
        """The losses, and overlaps where there are some, of all learners."""
        shown = [name for name in ("loss", "overlap") if name in figures[0]]
        return ", ".join(f"{name} " + " ".join(f"{figure[name]:.4f}" for figure in figures) for name in shown)

    def validation(self, step: int) -> None:
        """Log every learner's last validation."""
        for learner in self.learners:
            self.write(learner, {"step": step, **learner.validation})
            described = ", ".join(f"{name.removeprefix('validation_')} {value:.4f}" for name, value in learner.validation.items())
            self.bar.write(f"step {step} validation{f' of {learner.name}' if learner.name else ''}: {described}", file=sys.stdout)
        sys.stdout.flush()
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock, self.tokens_since, self.steps_since = time.perf_counter(), 0, 0

    def close(self) -> None:
        self.bar.close()
        if self.tracker is not None:
            for tracker in self.tracker.trackers:  # Accelerator.end_training would part this process from the others, too
                tracker.finish()


class NoLog:
    """What processes log that are not the main one: nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def run_training(task: TrainingTask, args: TrainingArgs, folder: Path, processes: Processes) -> int:
    """Train from the last saved step to max_steps. Returns the exit status: 0 done, 1 diverged, 128 + signal when stopped.

    The last lines printed on success are the paths of the final checkpoints, which `final_checkpoint.txt` names too. Only the main process writes.
    """
    step = load_state(folder, task, processes.count)
    if not processes.agree(step):
        raise UserError(f"not all processes find the run in {folder}: --output_dir must be a folder that all machines share")
    log = RunLog(folder, args, task, step) if processes.is_main else NoLog()
    if step == 0:
        task.validate()
        log.validation(0)
    batches, position, paths, trouble = iter(task.batches), task.batches.state_dict(), [], None
    with StopRequest(launched=processes.count > 1) as stop:
        while step < args.max_steps and not (stopped := processes.any(stop.signal)):
            try:
                figures = train_step(task, [next(batches) for _ in range(args.grad_accumulate_steps)], args, step, processes)
            except Diverged as error:
                trouble = error
                break
            step, position = step + 1, task.batches.state_dict()
            log.step(step, figures)
            if _is_due(step, args.eval_every_steps) or step == args.max_steps:
                task.validate()
                log.validation(step)
            if _is_due(step, args.save_every_steps) and step < args.max_steps:
                save_all(task, folder, step, position, processes)
        paths = save_all(task, folder, step, position, processes)
        log.close()
        processes.wait()  # a launcher ends all soon after one has left with an error
    if trouble is not None:
        print(f"stopped, as training diverged: {trouble}; the weights of step {step} are saved. Lower --learning_rate, in another --output_dir", file=sys.stderr)
        return 1
    if step < args.max_steps:
        print(f"stopped at step {step}; continue with the same command and --resume", file=sys.stderr)
        return 128 + stopped
    if processes.is_main:
        finish(task, folder, paths)
    return 0


def save_all(task: TrainingTask, folder: Path, step: int, position: dict, processes: Processes) -> list[Path]:
    """Every learner's checkpoint, then the state to resume from, the batches at `position`; the checkpoints' paths ([] but in the main process)."""
    if not processes.is_main:
        return []
    paths = []
    for learner in task.learners:
        with saving(learner.folder):
            paths.append(learner.save(step))
    save_state(folder, {"step": step, "batches": position, "processes": processes.count}, task)
    return paths


def finish(task: TrainingTask, folder: Path, paths: list[Path]) -> None:
    """Mark the run, and each learner's folder, as finished, and print the checkpoints."""
    for learner, path in zip(task.learners, paths, strict=True):
        with saving(learner.folder / FINAL_NAME):
            write_json(learner.folder / "final_metrics.json", {"step": learner.steps, **learner.validation})
            write_text(learner.folder / FINAL_NAME, path.name + "\n")
    with saving(folder / FINAL_NAME):
        write_text(folder / FINAL_NAME, "".join(f"{path.relative_to(folder)}\n" for path in paths))
    print("\n".join(map(str, paths)))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

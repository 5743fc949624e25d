"""One step is one step however the batch is cut; an interrupted run continues to the last bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from running.processes import Processes
from running.run_files import read_csv_log
from training import training_loop
from training.training_loop import Learner, RunLog, StopRequest, TrainingArgs, TrainingTask, lr_factor, run_training, train_step
from truncated_llama import read_exit_info

ROOT = Path(__file__).parent.parent
MAX_STEPS = 120


def train_command(model: Path, output: Path) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--model_path", str(model), "--dataset", "arithmetic", "--target_layer", "1", "--ft_head",
            "--ft_last_transformer", "--max_steps", str(MAX_STEPS), "--batch_size", "2", "--grad_accumulate_steps", "2", "--max_length", "64",
            "--learning_rate", "1e-3", "--save_every_steps", "7", "--num_threads", "1", "--output_dir", str(output), "--resume"]


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_logged(folder: Path) -> list[dict]:
    log = folder / "train_log.csv"
    rows = read_csv_log(log) if log.exists() and log.stat().st_size else pd.DataFrame({"loss": []})
    return rows.dropna(subset="loss").to_dict("records")


def wait_for_step(folder: Path, step: int, ended: Callable[[], object]) -> None:
    """Until the run in `folder` has logged `step`; fails where it has `ended` before."""
    while max((row["step"] for row in steps_logged(folder)), default=0) < step:
        if ended():
            pytest.fail(f"ended before step {step}: {ended()}")
        time.sleep(0.005)


def interrupt(command: list[str], folder: Path, after_step: int, number: int) -> int:
    """Start `command`, send it the signal once it has logged `after_step`, and return its exit status."""
    process = start(command)
    wait_for_step(folder, after_step, lambda: process.poll() is not None and process.stdout.read())
    process.send_signal(number)
    process.communicate()
    return process.returncode


def test_killed_and_resumed_run_has_the_losses_of_an_uninterrupted_one(tiny_target_path, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = start(train_command(tiny_target_path, whole))
    command = train_command(tiny_target_path, broken)
    assert interrupt(command, broken, 10, signal.SIGKILL) == -signal.SIGKILL
    assert interrupt(command, broken, 40, signal.SIGTERM) == 128 + signal.SIGTERM
    assert not (broken / "final_checkpoint.txt").exists()
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert uninterrupted.wait() == 0
    assert [row["step"] for row in steps_logged(broken)] == list(range(1, MAX_STEPS + 1))
    assert [row["loss"] for row in steps_logged(broken)] == [row["loss"] for row in steps_logged(whole)]
    final = Path(finished.stdout.splitlines()[-1])
    assert final == broken / (broken / "final_checkpoint.txt").read_text().strip()
    tensors, wanted = load_file(final), load_file(whole / final.name)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    assert read_exit_info(final).losses == read_exit_info(whole / final.name).losses


class OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))


def learner_of(module: OneWeight, rate: float = 0.01) -> Learner:
    return Learner("", Path(), [module.weight], torch.optim.SGD([module.weight], lr=1.0), rate, write=None)


def squares(module: OneWeight) -> TrainingTask:
    """The sum of squares, a row x of a batch being a token."""

    def learn(batch: dict, scale: float) -> list[dict]:
        loss = (batch["x"] @ module.weight).square().sum()
        (scale * loss).backward()
        return [{"loss": loss}]

    return TrainingTask([learner_of(module)], batches=None, count=lambda b: len(b["x"]), learn=learn, validate=None, columns=())


def step_on(batches: list[torch.Tensor]) -> tuple[dict, torch.Tensor]:
    module, args = OneWeight(), TrainingArgs(output_dir="unused", warmup_ratio=0.0)
    figures, = train_step(squares(module), [{"x": x} for x in batches], args, 0, Processes(torch.device("cpu")))
    return figures, module.weight.detach()


def test_step_does_not_depend_on_how_the_batch_is_cut():
    """Means of micro-batch means weigh tokens of short batches more; sums over the whole batch do not."""
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    whole, weight = step_on([x])
    cut, weight_cut = step_on([x[:1], x[1:3], x[3:]])
    assert whole["loss"] == pytest.approx(cut["loss"]) and torch.allclose(weight, weight_cut)


def test_loss_of_a_source_is_the_mean_over_its_own_tokens():
    """Of two sources with 1 and 3 of 4 tokens; one that is not in the step has none, not 0."""
    task, module = squares(OneWeight()), OneWeight()
    losses = {"loss": 8.0, "loss_a": 5.0, "share_a": 1.0, "loss_b": 3.0, "share_b": 3.0, "loss_c": 0.0, "share_c": 0.0}
    task.sources, task.learn = ["a", "b", "c"], lambda batch, scale: [{name: torch.tensor(value) for name, value in losses.items()}]
    task.learners = [learner_of(module)]
    module.weight.grad = torch.zeros(2)
    figures, = train_step(task, [{"x": torch.ones(4, 2)}], TrainingArgs(output_dir="unused"), 0, Processes(torch.device("cpu")))
    assert (figures["loss"], figures["loss_a"], figures["loss_b"], figures["share_a"], figures["share_b"]) == (2.0, 5.0, 1.0, 0.25, 0.75)
    assert "loss_c" not in figures and figures["share_c"] == 0


def test_pace_is_that_of_training_alone(tmp_path, monkeypatch, capsys):
    """Two seconds a step, of 100 tokens, half a minute of validation between them, and a run that was resumed in the middle of an interval."""
    now = [0.0]
    monkeypatch.setattr(training_loop.time, "perf_counter", lambda: now[0])
    learner = learner_of(OneWeight())
    learner.folder, learner.validation = tmp_path, {"validation_kl": 0.5}
    task = TrainingTask([learner], None, None, None, None, ("validation_kl",))
    log = RunLog(tmp_path, TrainingArgs(output_dir="unused", max_steps=30), task, 6)
    for step in range(7, 21):
        now[0] += 2.0
        log.step(step, [{"loss": 1.0, "tokens": 100, "grad_norm": 1.0}])
        if step == 13:
            now[0] += 30.0
            log.validation(step)
    log.close()
    told = [line.split("tokens/s")[0].split()[-1] + line.split("tokens/s")[1] for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert told == ["50, 40 s left", "50, 20 s left"]
    assert read_csv_log(tmp_path / "train_log.csv")["tokens_per_s"].dropna().tolist() == [50.0, 50.0]


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.0003)])
def test_schedules(schedule, middle, end):
    args = TrainingArgs(output_dir="unused", max_steps=110, warmup_ratio=10 / 110, lr_schedule=schedule)
    assert [lr_factor(step, args) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr_factor(60, args) == pytest.approx(middle) and lr_factor(109, args) == pytest.approx(end, abs=1e-3)


def test_steps_are_made_at_the_rates_of_the_schedule():
    """The first at the schedule's first, so that the last is not at 0."""
    task, args = squares(OneWeight()), TrainingArgs(output_dir="unused", max_steps=4, warmup_ratio=0.5, lr_schedule="linear")
    rates = []
    for step in range(4):
        train_step(task, [{"x": torch.ones(1, 2)}], args, step, Processes(torch.device("cpu")))
        rates.append(task.learners[0].current_rate)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_second_signal_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)


def test_launched_processes_save_before_they_leave(tmp_path, monkeypatch):
    """A scheduler signals the launcher and its processes, which so get the signal twice: the second one used to cut off the saving. And a launcher ends the
    others when one leaves with an error, as all do that were stopped: so they wait for the one that writes."""
    module, events = OneWeight(), []

    def write(step: int, _: dict) -> Path:
        events.append("saved")
        return tmp_path / f"model_{step}"

    def signalled_twice(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return signal.SIGTERM

    processes = Processes(torch.device("cpu"))
    processes.count = 2
    monkeypatch.setattr(processes, "agree", lambda _: True)
    monkeypatch.setattr(processes, "any", signalled_twice)
    monkeypatch.setattr(processes, "wait", lambda: events.append("waited"))
    learner = Learner("", tmp_path, [module.weight], torch.optim.SGD([module.weight], lr=1.0), 0.01, write)
    task = TrainingTask([learner], NoBatches(), count=len, learn=None, validate=lambda: None, columns=())
    assert run_training(task, TrainingArgs(output_dir="unused"), tmp_path, processes) == 128 + signal.SIGTERM
    assert events == ["saved", "waited"]


class NoBatches:
    def __iter__(self) -> Iterator[dict]:
        yield from ()

    def state_dict(self) -> dict:
        return {}

"""The training benchmark: every trainer in a process of its own, and what its table compares."""

from __future__ import annotations

import subprocess
import sys

from running.command_line import UserError

import numpy as np
import pandas as pd
import pytest
import torch

from commands.benchmark_training import Args, Trainer, one_step, plain, row_of, trainers
from toy_models import some_batch, tiny_llama
from truncated_llama import ExitKind, exit_to_train
from tuned_llama import Objective, TunedLlama


def test_the_plain_trainer_learns_what_ours_learns():
    """From the same batch, all of whose tokens count, the same gradients: else their times could not be compared."""
    model, batch = tiny_llama().float(), some_batch()
    batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"]), "loss_mask": torch.ones_like(batch["input_ids"]).bool()}
    kind = ExitKind.parse("head")
    exit_ = exit_to_train(model, 1, kind, None)
    TunedLlama(model, [exit_]).learn(batch, [Objective()], 1 / batch["loss_mask"][:, 1:].sum().item())
    held: list[torch.nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("commands.benchmark_training._optimizer", lambda module: held.append(module) or torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
        plain(model, 1, kind)(batch)
    student = held[0].model
    torch.testing.assert_close(student.lm_head.weight.grad, exit_.head.weight.grad)
    torch.testing.assert_close(student.model.norm.weight.grad, exit_.norm.weight.grad)


def test_rows_compare_with_the_plain_trainer_and_with_single_runs():
    args = Args(out_dir="", random_init="x", steps=4)
    seconds = {Trainer("ours", "head", (1,)): 1.0, Trainer("ours", "head", (2,)): 2.0, Trainer("ours", "head", (1, 2)): 1.5, Trainer("cached", "head", (1,)): 0.5,
               Trainer("plain", "head", (1,)): 3.0, Trainer("plain", "head", (2,)): 4.5}
    steps = {trainer: np.full(4, value) for trainer, value in seconds.items()}
    memory = {trainer: int(100 * value) for trainer, value in seconds.items()}
    rows = {str(trainer): row_of(trainer, steps, memory, args) for trainer in seconds}
    assert [rows[name]["speedup_over_plain"] for name in ("ours head 1", "ours head 2", "cached head 1")] == [3.0, 2.25, 6.0]
    assert rows["ours head 1 2"]["time_of_single_runs"] == 0.5 and rows["ours head 1 2"]["time_of_plain_runs"] == 0.2
    assert rows["ours head 1"]["memory_of_plain"] == pytest.approx(1 / 3)
    assert rows["plain head 1"]["ms_per_step"] == 3000 and "speedup_over_plain" not in rows["plain head 1"]


def test_a_kind_without_a_plain_form_is_timed_alone():
    args = Args(out_dir="", random_init="x", target_layers=[1, 2], kinds=["head", "rank8"])
    assert [str(trainer) for trainer in trainers(args) if trainer.name == "plain"] == ["plain head 1", "plain head 2"]


def test_the_command_times_each_trainer(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "commands.benchmark_training", "--random_init", str(tmp_path / "model"), "--target_layers", "1", "--kinds", "head", "--batch_size", "1",
               "--length", "8", "--steps", "2", "--num_threads", "1", "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out" / "training_speed.csv", dtype={"layers": str})
    assert table[["trainer", "layers"]].values.tolist() == [["ours", "1"], ["cached", "1"], ["plain", "1"]]
    assert (table["ms_per_step"] > 0).all() and not list((tmp_path / "out").glob("cache*"))
    assert "[2/2] steps done" in done.stdout


def test_a_trainer_that_ends_early_is_told():
    ended = subprocess.Popen([sys.executable, "-c", "", "plain head 1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with ended, pytest.raises(UserError, match="a trainer ended: plain head 1"):
        one_step(ended)

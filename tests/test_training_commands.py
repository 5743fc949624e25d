"""train.py as a command: several exits at once, several processes, and everything that may end a run or keep it from beginning."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import evaluate
import prove
import train
import truncated_llama
from data.arithmetic import make_problem
from data.registry import open_stream
from data.row_files import MixedStream
from measuring import evaluation
from models.target_model import load_tokenizer
from running import command_line
from running.processes import SHARDS_ON_CPU
from running.run_files import read_csv_log
from speculative import Generation
from test_commands import check_one_line, run_main
from test_training import wait_for_step
from training import training_loop
from truncated_llama import read_exit_info
from tuned_llama import TunedLlama

ROOT = Path(__file__).parent.parent
EXITS = {"target_layers": [1, 2], "kinds": ["head", "rank8+vocab100"]}
PATIENCE_SEC = 180  # with processes that wait for each other


@pytest.fixture(scope="module")
def inputs(tiny_target_path, tmp_path_factory) -> dict[str, object]:
    """Flags that name a target and data: of what is held out, 5 batches of 2, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("problems")
    for name, count in (("train", 300), ("validation", 10)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make_problem(name, index)) + "\n" for index in range(count)))
    return {"model_path": tiny_target_path, "dataset": "arithmetic", "dataset_path": folder}


def arguments(inputs: dict[str, object], output: Path, **changes: object) -> list[str]:
    """Flags of a short run on the CPU; a list gives a flag several values, None takes it away."""
    flags = {**inputs, "device": "cpu", "max_steps": 4, "batch_size": 2, "max_length": 64, "warmup_ratio": 0,
             "learning_rate": 3e-3, "num_threads": 1, "output_dir": output, **changes}
    values = {name: value if isinstance(value, list) else [value] for name, value in flags.items() if value is not None}
    return [word for name, several in values.items() for word in (f"--{name}", *map(str, several))]


@pytest.fixture
def train_here(inputs, monkeypatch):
    """train.py in this process: `train_here(output, **flags)` returns its exit status."""
    return lambda output, **flags: run_main(train, arguments(inputs, output, **flags), monkeypatch)


def log_of(folder: Path) -> pd.DataFrame:
    """What a run logged, but for how fast it was."""
    return read_csv_log(folder / "train_log.csv").drop(columns="tokens_per_s")


def final_of(folder: Path) -> Path:
    """The final checkpoint."""
    return folder / (folder / "final_checkpoint.txt").read_text().strip()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The final checkpoint's."""
    return load_file(final_of(folder))


def check_same(found: Path, wanted: Path, tolerance: float = 0.0) -> None:
    """Two finished exits are of one kind and target, and have equal logs and tensors, up to `tolerance` relative to the largest number of each tensor."""
    infos = [read_exit_info(final_of(folder)) for folder in (found, wanted)]
    assert len({(info.target_layer, info.kind, info.target_hash, info.tokenizer_hash, info.step) for info in infos}) == 1
    pd.testing.assert_frame_equal(log_of(found), log_of(wanted), check_exact=tolerance == 0, rtol=tolerance, atol=0)
    tensors = tensors_of(wanted)
    assert tensors_of(found).keys() == tensors.keys()
    for name, tensor in tensors_of(found).items():
        assert tensor.numel() == 0 or (tensor - tensors[name]).abs().max() <= tolerance * tensors[name].abs().max(), name


# ---- several exits at once ----

def test_several_exits_become_what_they_become_alone(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "MAX_GRAD_NORM", 0.1)  # so that each exit's gradients are clipped, by their own norm
    flags = {"grad_accumulate_steps": 2, "warmup_ratio": 0.5, "eval_every_steps": 2}
    axes = {"target_layers": [1, 2], "kinds": ["head+last_block", "rank8+vocab100"], "learning_rate": [1e-3, 4e-3]}
    assert train_here(tmp_path / "all", **axes, **flags) == 0
    assert len(list((tmp_path / "all").glob("*/final_checkpoint.txt"))) == 8
    for layer, kind, rate in ((1, "head+last_block", 4e-3), (2, "rank8+vocab100", 1e-3), (2, "head+last_block", 1e-3)):
        alone = tmp_path / f"{layer}{kind}{rate}"
        assert train_here(alone, target_layers=layer, kinds=kind, learning_rate=rate, **flags) == 0
        assert log_of(alone)["grad_norm"].min() > 0.1 and log_of(alone)["learning_rate"].max() == rate
        check_same(tmp_path / "all" / f"layer{layer}-{kind}-lr{rate:g}", alone, 1e-5)


@pytest.mark.parametrize(("dtype", "block"), [
    ("fp32", "last_block"), ("fp32", "attention_block"),
    ("bf16", "full_block")])
def test_stage_2_begins_where_stage_1_ended(train_here, tmp_path, dtype, block):
    """Of two layers at once, named in the other order. The new block begins as the target's, or as the identity.

    In bf16, too: were the exit's fp32 tensors rounded on the way, stage 2 would begin worse than stage 1 had ended.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here(first, target_layers=[1, 2], kinds="head", max_steps=20, learning_rate=3e-4, torch_dtype=dtype) == 0
    starts = [first / f"layer{layer}" / "model_000020.safetensors" for layer in (2, 1)]
    assert train_here(second, target_layers=[1, 2], kinds=f"head+{block}", checkpoint_path=starts, max_steps=2, torch_dtype=dtype) == 0
    for layer in ("layer1", "layer2"):
        last, begun = (log_of(stage / layer).filter(like="validation_").dropna() for stage in (first, second))
        assert last.iloc[-1].tolist() == pytest.approx(begun.iloc[0].tolist(), rel=1e-6)
        assert not torch.equal(tensors_of(first / layer)["head.weight"], tensors_of(second / layer)["head.weight"])
        assert str(read_exit_info(second / layer / "model_000002.safetensors").kind) == f"head+{block}"


def test_a_part_that_stage_2_adds_is_trained(train_here, tmp_path):
    """Head and block from a stage 1 that trained the block alone: the head must not stay the target's."""
    assert train_here(tmp_path / "block", target_layers=1, kinds="last_block") == 0
    start = tmp_path / "block" / "model_000004.safetensors"
    assert train_here(tmp_path / "both", target_layers=1, kinds="head+last_block", checkpoint_path=start) == 0
    assert {"head.weight", "norm.weight"} <= tensors_of(tmp_path / "both").keys()


@pytest.fixture(scope="module")
def trimmed_and_low_rank(inputs, tmp_path_factory) -> list[Path]:
    """Checkpoints of an exit with a trimmed vocabulary and of one of low rank."""
    folder = tmp_path_factory.mktemp("forms") / "run"
    flags = {"target_layers": 2, "kinds": ["head+vocab100", "rank16"], "max_steps": 10, "max_length": 128}
    with pytest.MonkeyPatch.context() as patch:
        assert run_main(train, arguments(inputs, folder, **flags), patch) == 0
    return [folder / line for line in (folder / "final_checkpoint.txt").read_text().splitlines()]


DECODING = ["--spec_num_prompts", "2", "--spec_prompt_length", "8", "--spec_max_new_tokens", "12", "--fit_prompts", "4", "--gamma", "3", "--num_threads", "1", "--device", "cpu"]


@pytest.mark.parametrize(("method", "temperature"), [("self_speculative", 0.7), ("dynamic_tree", 0.7), ("self_speculative", 0), ("dynamic_tree", 0)])
def test_trained_forms_of_the_head_evaluate_to_vanillas_text(tiny_target_path, trimmed_and_low_rank, tmp_path, monkeypatch, method, temperature):
    texts: dict[str, list[list[int]]] = {}
    exact = evaluation.generate

    def noted(model: LlamaForCausalLM, prompt: list[int], options: object, *rest: object, **named: object) -> Generation:
        found = exact(model, prompt, options, *rest, **named)
        texts.setdefault(options.method, []).append(found.tokens)
        return found

    monkeypatch.setattr(evaluation, "generate", noted)
    for checkpoint in trimmed_and_low_rank:
        command = ["--model_path", tiny_target_path, "--checkpoint", checkpoint, "--out_dir", tmp_path / checkpoint.parent.name, "--method", method,
                   "--verification", "coupled", "--spec_temperature", temperature, "--quality_datasets", "arithmetic", "--quality_max_batches", 1, *DECODING]
        assert run_main(evaluate, command, monkeypatch) == 0
        row = json.loads((tmp_path / checkpoint.parent.name / "metrics.json").read_text())
        assert row["method"] == method and row["spec_accepted"] > 0
    assert texts.keys() == {"vanilla", method} and len(texts["vanilla"]) >= 4
    assert texts[method] == texts["vanilla"]


def test_trained_forms_of_the_head_are_proved(tiny_target_path, trimmed_and_low_rank, tmp_path, monkeypatch):
    command = ["--model_path", tiny_target_path, "--checkpoint_glob", *trimmed_and_low_rank, "--spec_prompt_dataset", "arithmetic", "--out_dir", tmp_path, *DECODING]
    assert run_main(prove, command, monkeypatch) == 0


# ---- where the data come from, and the teacher's states ----

def test_a_mixture_logs_the_losses_of_its_sources(train_here, inputs, tmp_path, monkeypatch):
    """Their means, weighted by their shares of the learned tokens, are the whole batch's loss; a source that a batch lacks has none."""
    def two_sources(_names: list[str], weights: list[float], split: str, _path: None, seed: int) -> MixedStream:
        streams = [open_stream(name, split, inputs["dataset_path"], seed) for name in ("arithmetic", "gsm8k")]
        return MixedStream(streams, weights, seed)

    monkeypatch.setattr(train, "open_mixture", two_sources)
    assert train_here(tmp_path / "run", dataset=["arithmetic", "gsm8k"], dataset_path=None, mix=[0.6, 0.4], target_layers=1, kinds="head", max_steps=12) == 0
    log = log_of(tmp_path / "run").dropna(subset="loss")
    names = ("arithmetic", "gsm8k")
    assert log[[f"share_{name}" for name in names]].sum(axis=1).tolist() == pytest.approx([1.0] * 12)
    weighted = sum((log[f"share_{name}"] * log[f"loss_{name}"]).fillna(0) for name in names)
    assert weighted.tolist() == pytest.approx(log["loss"].tolist(), rel=1e-5)
    for name in names:
        assert (log[f"loss_{name}"].isna() == (log[f"share_{name}"] == 0)).all() and log[f"loss_{name}"].notna().any()


def test_with_the_teachers_states_on_disk_a_run_is_the_same(train_here, tmp_path, monkeypatch):
    flags = {"target_layers": [0, 1], "kinds": "head", "max_steps": 6}
    runs: list[int] = []
    whole = TunedLlama.frozen_pass
    monkeypatch.setattr(TunedLlama, "frozen_pass", lambda self, ids, mask, teacher=None, **images: runs.append(teacher is None) or whole(self, ids, mask, teacher, **images))
    for name, cache in (("plain", None), ("filling", tmp_path / "states"), ("reading", tmp_path / "states")):
        runs.clear()
        assert train_here(tmp_path / name, teacher_cache=cache, **flags) == 0
        assert name == "filling" or set(runs) == {name == "plain"}
    for layer in ("layer0", "layer1"):
        check_same(tmp_path / "filling" / layer, tmp_path / "plain" / layer)
        check_same(tmp_path / "reading" / layer, tmp_path / "plain" / layer)


# ---- several processes ----

def train_there(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """train.py in a process of its own that prints into `log`. Only process 0 may write into the run's folder."""
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    if environment.get("RANK", "0") != "0":
        sys.addaudithook(refuse_writing)
        if "OWN_FOLDERS" in environment:  # of each machine: this one finds no run in its own
            training_loop.load_state = lambda *_: 0
    training_loop.RunLog._open_tracker = lambda *_: Accelerator()  # as --tracker does; it reports to nobody
    if "ACCELERATE_USE_FSDP" in environment:
        train.Distillation.validate = validated_in_parts
    sys.argv = ["train.py", *words]
    command_line.run(train.main)


def validated_in_parts(self: train.Distillation, exact: Callable = train.Distillation.validate) -> None:
    """Validation, behind which no block of the target is whole here."""
    exact(self)
    assert all(isinstance(parameter, DTensor) for parameter in self.target.model.model.layers.parameters())


def refuse_writing(event: str, details: tuple) -> None:
    writes = event in ("os.rename", "os.remove") or (event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and "/run-" in str(details[0]) and ".writable." not in str(details[0]):
        raise AssertionError(f"{event} {details[0]} in a process that must not write")


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    """Where processes are forked from that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def start_there(server, inputs, tmp_path) -> Iterator:
    """`start_there(count, output, **flags)` starts train.py in `count` processes that train together, under further variables of `environment`.

    `output` is run-…, beside which they print into <output>.<rank>.
    """
    started = []

    def start(count: int, output: Path, environment: dict[str, str] | None = None, **flags: object) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(count):
            launched = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
            log = output.with_name(f"{output.name}.{rank}")
            processes.append(server.Process(target=train_there, args=(arguments(inputs, output, **flags), log, launched | (environment or {}))))
        for process in processes:
            process.start()
        started.extend(processes)
        return processes

    yield start
    for process in started:
        if process.is_alive():
            process.kill()


def statuses(processes: list) -> list[int | None]:
    """Exit statuses, None of a process that never ended."""
    until = time.monotonic() + PATIENCE_SEC
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    return [process.exitcode for process in processes]


def test_two_processes_are_one_with_twice_the_batch(train_here, start_there, tmp_path):
    """With learned answers alone, of which the two processes never have equally many; every gradient is clipped. A target in parts changes nothing at all."""
    flags = {"target_layers": [1, 2], "kinds": ["head", "rank8+vocab100", "attention_block"], "loss_on": "assistant", "max_length": 128, "loss_type": "combined",
             "grad_accumulate_steps": 2, "eval_every_steps": 3}
    pair = [*start_there(2, tmp_path / "run-pair", **flags), *start_there(2, tmp_path / "run-parts", {"ACCELERATE_USE_FSDP": "true"}, **flags)]
    assert train_here(tmp_path / "one", batch_size=4, **flags) == 0
    assert statuses(pair) == [0, 0, *([0, 0] if SHARDS_ON_CPU else [2, 2])]
    folders = [path.parent for path in tmp_path.glob("one/*/final_checkpoint.txt")]
    assert len(folders) == 6
    for folder in folders:
        assert log_of(folder)["tokens"].dropna().nunique() > 1
        check_same(tmp_path / "run-pair" / folder.name, folder, 1e-4)
        if SHARDS_ON_CPU:
            check_same(tmp_path / "run-parts" / folder.name, tmp_path / "run-pair" / folder.name)
    assert SHARDS_ON_CPU or "cannot shard a model on the CPU; take torch 2.7 or later" in (tmp_path / "run-parts.0").read_text()
    assert ".safetensors" in (tmp_path / "run-pair.0").read_text() and ".safetensors" not in (tmp_path / "run-pair.1").read_text()


def test_processes_that_find_different_runs_stop_at_once(start_there, tmp_path):
    """As on two machines without a shared folder: one goes on where the other one begins, and their sums would mix."""
    pair = start_there(2, tmp_path / "run-whole", **EXITS)
    assert statuses(pair) == [0, 0]
    for path in tmp_path.glob("run-whole/**/final_checkpoint.txt"):
        path.unlink()
    first, _ = start_there(2, tmp_path / "run-whole", {"OWN_FOLDERS": "yes"}, **EXITS, resume="true")
    assert statuses([first]) == [2]
    assert "not all processes find the run in" in (tmp_path / "run-whole.0").read_text()


def test_killed_processes_continue_exactly(inputs, start_there, tmp_path):
    """Two processes under torch's launcher are stopped; they go on without it, and stop when one of them is asked to; go on, and are killed; go on to the end:
    to the last bit as if nothing had happened."""
    flags = {**EXITS, "max_steps": 60, "save_every_steps": 7, "eval_every_steps": 10, "resume": "true"}
    whole, broken = tmp_path / "run-whole", tmp_path / "run-broken"
    uninterrupted = start_there(2, whole, **flags)
    stop_launched(arguments(inputs, broken, **flags), broken)
    for status, signals in ((128 + signal.SIGTERM, {1: signal.SIGTERM}), (-signal.SIGKILL, {0: signal.SIGKILL, 1: signal.SIGKILL})):
        stopped = log_of(broken / "layer1-head")["step"].max()
        assert torch.load(broken / "state.pt")["step"] == stopped < 50  # nothing was lost
        pair = start_there(2, broken, **flags)
        wait_for_step(broken / "layer1-head", stopped + 9, lambda pair=pair: not all(process.is_alive() for process in pair))
        for rank, number in signals.items():
            os.kill(pair[rank].pid, number)
        assert statuses(pair) == [status] * 2 and not (broken / "final_checkpoint.txt").exists()
    assert statuses(start_there(2, broken, **flags)) == statuses(uninterrupted) == [0, 0]
    for name in ("layer1-head", "layer1-rank8+vocab100", "layer2-head", "layer2-rank8+vocab100"):
        check_same(broken / name, whole / name)


def stop_launched(words: list[str], folder: Path) -> None:
    """Two processes of train.py under torch's launcher; SIGTERM to all three at some step, as schedulers do it, so that the launcher's reach the others as a second one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"), *words]
    with folder.with_name("launcher").open("w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for_step(folder / "layer1-head", 10, lambda: launcher.poll() is not None)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(workers) == 2
    for number in (launcher.pid, *map(int, workers)):
        os.kill(number, signal.SIGTERM)
    assert launcher.wait(PATIENCE_SEC) != 0
    assert "stopped at step" in folder.with_name("launcher").read_text()


def test_a_folder_has_one_run_at_a_time(train_here, start_there, tmp_path, capsys):
    running, = start_there(1, tmp_path / "run-a", **EXITS, max_steps=3_000)
    wait_for_step(tmp_path / "run-a" / "layer1-head", 1, lambda: not running.is_alive())
    assert train_here(tmp_path / "run-a", **EXITS, max_steps=3_000, resume="true") == 2
    check_one_line(capsys, "another process trains into .*run-a; wait for it, or choose another --output_dir")
    assert running.is_alive()


# ---- what ends a run ----

def all_tensors(content: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from all_tensors(value)


@pytest.mark.parametrize("every", [0, 1])
def test_a_diverging_exit_ends_the_run_at_its_last_good_step(train_here, tmp_path, capsys, every):
    run = tmp_path / "run"
    assert train_here(run, target_layers=1, kinds="head", learning_rate=[1e-3, 1e30], max_steps=9, eval_every_steps=every) == 1
    assert capsys.readouterr().err.count("stopped, as training diverged: lr1e+30 at step 2: loss nan") == 1
    assert sorted(path.name for path in run.glob("*/*.safetensors")) == ["model_000001.safetensors"] * 2
    state = torch.load(run / "state.pt")
    saved = [*all_tensors(state), *(tensor for path in run.glob("*/*.safetensors") for tensor in load_file(path).values())]
    assert state["step"] == 1 and len(saved) > 10 and all(tensor.isfinite().all() for tensor in saved)
    assert log_of(run / "lr1e+30")["loss"].dropna().size == 1 and not (run / "final_checkpoint.txt").exists()


def test_what_diverged_by_accident_continues_exactly(train_here, tmp_path, monkeypatch, capsys):
    """A loss that is no number for once (a fault of the machine): resuming takes the same batch again. It used to skip it."""
    flags = {**EXITS, "max_steps": 5, "grad_accumulate_steps": 2}
    assert train_here(tmp_path / "whole", **flags) == 0
    exact, calls = TunedLlama.learn, []

    def faulty(self: TunedLlama, *inputs: object) -> list[dict]:
        sums = exact(self, *inputs)
        calls.append(1)
        return [{**each, "loss": each["loss"] * math.nan} if len(calls) == 6 and number == 2 else each for number, each in enumerate(sums)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TunedLlama, "learn", faulty)
        assert train_here(tmp_path / "broken", **flags) == 1
    assert "diverged: layer2-head at step 3: loss nan" in capsys.readouterr().err
    assert train_here(tmp_path / "broken", **flags, resume="true") == 0
    for name in ("layer1-head", "layer2-rank8+vocab100"):
        check_same(tmp_path / "broken" / name, tmp_path / "whole" / name)


def fill_disk(monkeypatch: pytest.MonkeyPatch, what: str, good: int) -> None:
    """From the `good`+1-th time on, saving a "checkpoint" or the "state" writes half of the file and fails."""
    place, name = {"checkpoint": (truncated_llama, "save_file"), "state": (torch, "save")}[what]
    exact, calls = getattr(place, name), []

    def full(content: object, path: Path, **named: object) -> None:
        exact(content, path, **named)
        calls.append(path)
        if len(calls) > good:
            os.truncate(path, Path(path).stat().st_size // 2)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, name, full)


@pytest.mark.parametrize(("what", "good"), [("checkpoint", 4), ("checkpoint", 6), ("state", 1)])
def test_a_full_disk_leaves_the_last_save_intact(train_here, tmp_path, capsys, what, good):
    """Of four exits that are saved at steps 2, 4 and 5, the second save fails: at its first file, in the middle, at the state."""
    flags = {**EXITS, "max_steps": 5, "save_every_steps": 2}
    assert train_here(tmp_path / "whole", **flags) == 0
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, what, good)
        assert train_here(run, **flags) == 2
    check_one_line(capsys, r"cannot save .*run.* \(\[Errno 28\] No space left on device\); make room, and continue .* --resume")
    left = {path.relative_to(run): path for path in run.rglob("*") if path.is_file()}
    assert torch.load(run / "state.pt")["step"] == 2
    for name in (name for name in left if name.name == "model_000002.safetensors"):
        assert all(torch.equal(tensor, load_file(tmp_path / "whole" / name)[key]) for key, tensor in load_file(left[name]).items())
    assert train_here(run, **flags, resume="true") == 0
    for folder in run.glob("layer*"):
        check_same(folder, tmp_path / "whole" / folder.name)


@pytest.mark.parametrize("what", ["checkpoint", "state"])
def test_a_full_disk_is_left_without_half_a_file(train_here, tmp_path, monkeypatch, what):
    fill_disk(monkeypatch, what, good=0)
    assert train_here(tmp_path / "run", **EXITS) == 2
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_disk_that_is_too_full_for_the_log(train_here, tmp_path, monkeypatch, capsys):
    exact, rows = training_loop.append_csv, []

    def full(path: Path, row: dict, columns: list[str]) -> None:
        exact(path, row, columns)
        rows.append(row)
        if len(rows) == 12:  # four exits: the first validation, a step, and the last row of the second step
            os.truncate(path, path.stat().st_size - 9)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_loop, "append_csv", full)
    flags = {**EXITS, "save_every_steps": 1}
    assert train_here(tmp_path / "run", **flags) == 2
    check_one_line(capsys, r"cannot save .*train_log.csv \(\[Errno 28\] No space left on device\)")
    assert train_here(tmp_path / "run", **flags, resume="true") == 0
    assert train_here(tmp_path / "whole", **flags) == 0
    for folder in (tmp_path / "run").glob("layer*"):
        check_same(folder, tmp_path / "whole" / folder.name)


# ---- what keeps a run from beginning ----

@pytest.fixture(scope="module")
def short_run(inputs, tmp_path_factory) -> Path:
    """The folder of a finished run of a head at layer 1."""
    folder = tmp_path_factory.mktemp("short") / "head"
    with pytest.MonkeyPatch.context() as patch:
        assert run_main(train, arguments(inputs, folder, target_layers=1, kinds="head"), patch) == 0
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layers": [1, 2, 1]}, "--target_layers 1 2 1: one stands twice; give each once"),
        ({"target_layers": [1, 4]}, "--target_layers 4: .* has 4 blocks; choose 0 to 3"),
        ({"kinds": ["head", "head"]}, "--kinds head head: one stands twice"),
        ({"kinds": "head+rank8"}, r"head\+rank8: head and rank8 exclude each other"),
        ({"kinds": "head+last_block+attention_block"}, "last_block and attention_block exclude each other"),
        ({"kinds": "head+head"}, "a part stands twice"),
        ({"kinds": ["head+last_block", "last_block+head"]}, "one stands twice"),
        ({"kinds": None, "ft_head": "true", "draft_vocab_size": 0}, "vocab0: its head's vocabulary must lie between 1 and 320"),
        ({"kinds": None, "head_rank": 0}, "rank0: its head's rank must lie between 1 and 31"),
        ({"learning_rate": [1e-3, 1.0000001e-3]}, "--learning_rate 0.001 0.0010000001: one stands twice"),
        ({"kinds": "rank8+rank9"}, "rank8.*; its parts are head, rank<r>"),
        ({"kinds": "heads"}, "exit kind heads: heads; its parts are head, rank<r>"),
        ({"kinds": "rank32"}, "rank32: its head's rank must lie between 1 and 31 for this target"),
        ({"kinds": "head+vocab321"}, "vocabulary must lie between 1 and 320 for this target"),
        ({"kinds": None, "head_rank": 33}, "rank33: its head's rank must lie between 1 and 31"),
        ({"kinds": "vocab40"}, "exit kind vocab40: nothing to train; add head"),
        ({"kinds": None, "draft_vocab_size": 40}, "exit kind vocab40: nothing to train; add head"),
        ({"kinds": None}, "nothing to train: give --ft_head"),
        ({"ft_head": "true", "exit_block": "full"}, "--kinds and --ft_head --exit_block: name the parts in --kinds alone"),
        ({"kinds": None, "ft_head": "true", "translator": "true"}, "head and translator exclude each other"),
        ({"dataset": ["arithmetic", "pydoc"], "dataset_path": None, "mix": [1]}, "--mix has 1 weights for 2 data sets; give one for each: --mix 1 1"),
        ({"dataset": ["arithmetic", "pydoc"], "dataset_path": None, "mix": [1, -1]}, "--mix 1 -1: must be positive"),
        ({"dataset": ["arithmetic", "pydoc"], "dataset_path": None, "mix": [1, "nan"]}, "--mix nan: must be a finite number"),
        ({"dataset": ["oasst", "oasst1"], "dataset_path": None}, "--dataset names oasst twice"),
        ({"learning_rate": [1e-3, 0]}, "--learning_rate 0.0: must be positive"),
        ({"learning_rate": [1e-3, 1e-3]}, "--learning_rate 0.001 0.001: one stands twice"),
        ({"loss_type": ["lk", "kl"]}, "--loss_type kl: choose from kl_divergence"),
        ({"loss_type": ["lk", "lk"]}, "--loss_type lk lk: one stands twice"),
    ],
)
def test_mistakes_get_one_line(train_here, tmp_path, capsys, changes, message):
    assert train_here(tmp_path / "run", **{"target_layers": 1, "kinds": "head", **changes}) == 2
    check_one_line(capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layers": 2}, "--checkpoint_path: exits at layers 1, --target_layers 2; give one for each"),
        ({"target_layers": [1, 2]}, "exits at layers 1, --target_layers 1 2; give one for each"),
        ({"kinds": "rank8"}, "an exit of kind head, which rank8 does not go on from; keep its parts, or add a block"),
        ({"kinds": ["head", "head+vocab100"]}, r"of kind head, which head\+vocab100 does not go on from"),
        ({"kinds": "translator+last_block"}, r"of kind head, which translator\+last_block does not go on from"),
    ],
)
def test_starts_that_cannot_go_on_get_one_line(train_here, short_run, tmp_path, capsys, changes, message):
    start = short_run / "model_000004.safetensors"
    assert train_here(tmp_path / "run", **{"target_layers": 1, "kinds": "head", "checkpoint_path": start, **changes}) == 2
    check_one_line(capsys, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": [3e-3, 1e-3], "resume": "true"}, r"other settings \(--learning_rate \[0.003\] -> \[0.003, 0.001\]\); use those"),
        ({"kinds": "rank8", "seed": 1, "resume": "true"}, r"\(--seed 0 -> 1, --kinds \['head'\] -> \['rank8'\]\)|\(--kinds \['head'\] -> \['rank8'\], --seed 0 -> 1\)"),
        ({}, "holds a run already; .* --resume"),
    ],
)
def test_a_run_is_continued_as_it_was_begun(train_here, short_run, tmp_path, capsys, changes, message):
    copied = shutil.copytree(short_run, tmp_path / "run")
    assert train_here(copied, **{"target_layers": 1, "kinds": "head", **changes}) == 2
    check_one_line(capsys, message)


def test_an_exit_of_a_run_is_no_run(train_here, tmp_path, capsys):
    """A run into the folder of one of its exits used to say that it was finished, whatever it was to train."""
    assert train_here(tmp_path / "run", **EXITS, max_steps=1) == 0
    assert train_here(tmp_path / "run" / "layer1-head", target_layers=1, kinds="rank8", resume="true") == 2
    check_one_line(capsys, "layer1-head holds an exit of the run in .*run; choose another --output_dir")


def test_a_run_of_two_processes_is_not_continued_by_one(train_here, short_run, tmp_path, capsys):
    """It used to be, with half the examples in every step from there on."""
    copied = shutil.copytree(short_run, tmp_path / "run")
    (copied / "final_checkpoint.txt").unlink()
    torch.save({**torch.load(copied / "state.pt"), "processes": 2}, copied / "state.pt")
    assert train_here(copied, target_layers=1, kinds="head", resume="true") == 2
    check_one_line(capsys, r"other settings \(processes 2 -> 1\); use those")


def test_data_that_changed_are_named(train_here, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    rows = ['{"question": "What is %d + 1?", "answer": "It is %d."}\n' % (number, number + 1) for number in range(300)]
    path.write_text("".join(rows))
    flags = {"target_layers": 1, "kinds": "head", "dataset_path": path, "max_steps": 1}
    assert train_here(tmp_path / "run", **flags) == 0
    (tmp_path / "run" / "final_checkpoint.txt").unlink()
    path.write_text("".join(rows[1:]))
    assert train_here(tmp_path / "run", **flags, resume="true") == 2
    check_one_line(capsys, r"other settings \(data \{.*\} -> \{.*\}\)")


def test_the_tiny_target_is_what_the_messages_say(tiny_target_path):
    assert len(load_tokenizer(str(tiny_target_path))) == 320

"""The shell around training, run with a stub in Python's place that leaves what train.py and evaluate_checkpoints.py leave."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TWO_STAGE, CHAT_LAYERS, LR_SWEEP = "run_sweep_ultrachat_two_stage.sh", "run_sweep_chat_layers.sh", "run_lr_sweep_ultrachat_layer11.sh"
TREE_STUDY = "run_tree_study.sh"
# Appends its arguments to $CALLS; refuses a run whose flags have changed, as train.py does; $FAIL and $HANG name a
# part of the arguments at which to fail, or to wait for a signal.
STUB = r"""#!/usr/bin/env bash
args="$*"
printf '%s\n' "$args" >>"$CALLS"
echo "output of $args"
if [[ -n ${FAIL:-} && $args == *"$FAIL"* ]]; then exit 7; fi
if [[ -n ${HANG:-} && $args == *"$HANG"* ]]; then
  trap 'echo "TERM received" >>"$CALLS"; exit 143' TERM
  sleep 20 & wait
fi
[[ $args =~ --(output|out)_dir\ ([^ ]+) ]]
folder=${BASH_REMATCH[2]}
mkdir -p "$folder"
if [[ $1 == evaluate_checkpoints.py || $1 == benchmark.py ]]; then touch "$folder/results.csv"; exit; fi
if [[ -f $folder/flags && $(<"$folder/flags") != "$args" ]]; then echo "error: other settings" >&2; exit 2; fi
echo "$args" >"$folder/flags"
touch "$folder/model_000005.safetensors"
echo model_000005.safetensors >"$folder/final_checkpoint.txt"
"""


class Shell:
    """Runs the suite's scripts with the stub, everything written into one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.calls_file = folder, folder / "out", folder / "calls"
        stub = folder / "python_stub"
        stub.write_text(STUB)
        stub.chmod(0o755)
        self.base = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": str(stub), "CALLS": str(self.calls_file),
                     "OUTPUT_DIR": str(self.out), "LOG_DIR": str(folder / "logs"), "LAUNCHER": "nohup"}

    def start(self, script: str, *arguments: str, cwd: Path = ROOT, **settings: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / script), *arguments]
        return subprocess.Popen(command, cwd=cwd, env=self.base | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, script: str, *arguments: str, cwd: Path = ROOT, **settings: str) -> tuple[int, str]:
        """(exit status, output) of the script."""
        process = self.start(script, *arguments, cwd=cwd, **settings)
        output = process.communicate(timeout=30)[0]
        return process.returncode, output

    def calls(self) -> list[list[str]]:
        """The stub's arguments since the last look, one list per call."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [line.split() for line in lines]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def flag(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


def wait_until(path: Path, text: str) -> None:
    deadline = time.monotonic() + 10
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{text!r} did not appear in {path}"
        time.sleep(0.02)


def test_two_stages_chain_their_checkpoints_and_end_in_one_evaluation(shell: Shell):
    status, output = shell.run(TWO_STAGE, LAYERS="3 7")
    calls = shell.calls()
    assert status == 0, output
    assert [call[0] for call in calls] == ["train.py"] * 4 + ["evaluate_checkpoints.py"]
    head, ftlast = calls[2:4]
    checkpoint = shell.out / "head/layer7/model_000005.safetensors"
    assert "--ft_head" in head and "--ft_last_transformer" not in head and "--checkpoint_path" not in head
    assert "--ft_head" in ftlast and "--ft_last_transformer" in ftlast and flag(ftlast, "--checkpoint_path") == str(checkpoint)
    assert flag(ftlast, "--output_dir") == str(shell.out / "ftlast/layer7")
    assert (flag(head, "--learning_rate"), flag(ftlast, "--learning_rate")) == ("5e-5", "2e-5")
    evaluated = calls[-1][2:calls[-1].index("--quality_datasets")]
    runs = ("head/layer3", "ftlast/layer3", "head/layer7", "ftlast/layer7")
    assert evaluated == [str(shell.out / run / "model_000005.safetensors") for run in runs]
    assert "output of train.py" in (shell.out / "logs/ftlast_layer7.log").read_text()


def test_one_stage_sweeps_cover_their_grid(shell: Shell):
    assert shell.run(CHAT_LAYERS)[0] == 0
    calls = shell.calls()
    assert [flag(call, "--target_layer") for call in calls[:-1]] == ["3", "7", "11", "15"]
    assert {flag(call, "--dataset") for call in calls[:-1]} == {"share_gpt"} and flag(calls[-1], "--quality_datasets") == "share_gpt"
    assert shell.run(LR_SWEEP, LEARNING_RATES="1e-4 2e-5", LR_SCHEDULES="linear cosine", OUTPUT_DIR=f"{shell.out}2")[0] == 0
    calls = shell.calls()
    assert [(flag(call, "--learning_rate"), flag(call, "--lr_schedule")) for call in calls[:-1]] == [
        ("1e-4", "linear"), ("1e-4", "cosine"), ("2e-5", "linear"), ("2e-5", "cosine")]
    assert len({flag(call, "--output_dir") for call in calls[:-1]}) == 4 and len(calls) == 5


def test_dry_run_prints_every_command_and_writes_nothing(shell: Shell):
    status, output = shell.run(TWO_STAGE, DRY_RUN="1", LAYERS="3 7")
    assert status == 0
    commands = [shlex.split(line.split("] ", 1)[1]) for line in output.splitlines()]
    assert [command[1] for command in commands] == ["train.py"] * 4 + ["evaluate_checkpoints.py"]
    assert flag(commands[1], "--checkpoint_path") == f"{shell.out}/head/layer3/<final checkpoint>"
    assert not shell.out.exists() and shell.calls() == []


def test_failing_step_stops_the_sweep_and_names_its_log(shell: Shell):
    status, output = shell.run(TWO_STAGE, LAYERS="3 7", FAIL="--ft_last_transformer")
    assert status == 7 and len(shell.calls()) == 2
    log = shell.out / "logs/ftlast_layer3.log"
    assert str(log) in output.splitlines()[-1] and log.exists()
    assert shell.run(TWO_STAGE, LAYERS="3 7")[0] == 0
    remaining = [str(shell.out / run) for run in ("ftlast/layer3", "head/layer7", "ftlast/layer7")]
    assert [flag(call, "--output_dir") for call in shell.calls()[:-1]] == remaining


def test_second_start_skips_what_is_finished(shell: Shell):
    shell.run(TWO_STAGE, LAYERS="3")
    shell.calls()
    status, output = shell.run(TWO_STAGE, LAYERS="3")
    assert status == 0 and shell.calls() == []
    assert output.count("finished already") == 3


def test_changed_setting_is_never_skipped_silently(shell: Shell):
    shell.run(TWO_STAGE, LAYERS="3")
    shell.calls()
    status, output = shell.run(TWO_STAGE, LAYERS="3", LR_HEAD="1e-3")
    assert status == 2 and "other settings" in output and len(shell.calls()) == 1
    status, _ = shell.run(TWO_STAGE, LAYERS="3", SPEC_GAMMA="8")
    assert status == 0 and [call[0] for call in shell.calls()] == ["evaluate_checkpoints.py"]


def test_new_checkpoint_is_evaluated_though_the_command_is_the_same(shell: Shell):
    shell.run(CHAT_LAYERS, LAYERS="3")
    shell.calls()
    later = time.time() + 5
    os.utime(shell.out / "head/layer3/model_000005.safetensors", (later, later))
    shell.run(CHAT_LAYERS, LAYERS="3")
    assert [call[0] for call in shell.calls()] == ["evaluate_checkpoints.py"]


def test_environment_overrides_arrive_as_flags(shell: Shell):
    training = {"MODEL_PATH": "--model_path", "DATASET_PATH": "--dataset_path", "MAX_STEPS_HEAD": "--max_steps", "BATCH_SIZE_HEAD": "--batch_size",
                "GRAD_ACCUM_HEAD": "--grad_accumulate_steps", "LR_HEAD": "--learning_rate", "LR_SCHEDULE_HEAD": "--lr_schedule",
                "WARMUP_RATIO": "--warmup_ratio", "MAX_LENGTH": "--max_length", "KL_TEMP": "--kl_temperature", "LOSS_TYPE": "--loss_type",
                "LOSS_ON": "--loss_on", "SEED": "--seed", "SAVE_EVERY": "--save_every_steps", "EVAL_EVERY": "--eval_every_steps",
                "TORCH_DTYPE": "--torch_dtype", "ATTN_IMPL": "--attn_implementation", "DEVICE": "--device", "NUM_THREADS": "--num_threads"}
    evaluation = {"MODEL_PATH": "--model_path", "DATASET_PATH": "--dataset_path", "QUALITY_MAX_BATCHES": "--quality_max_batches",
                  "SPEC_PROMPT_DATASET": "--spec_prompt_dataset", "SPEC_NUM_PROMPTS": "--spec_num_prompts", "SPEC_PROMPT_LEN": "--spec_prompt_length",
                  "SPEC_MAX_NEW": "--spec_max_new_tokens", "SPEC_T": "--spec_temperature", "SPEC_TOP_P": "--spec_top_p", "SPEC_TOP_K": "--spec_top_k",
                  "SPEC_GAMMA": "--gamma", "SPEC_METHOD": "--method", "SPEC_VERIFICATION": "--verification", "GROWMAP": "--growmap", "TREE_BUDGET": "--tree_budget", "MAX_LENGTH": "--max_length", "KL_TEMP": "--kl_temperature",
                  "SEED": "--seed", "TORCH_DTYPE": "--torch_dtype", "DEVICE": "--device", "NUM_THREADS": "--num_threads", "EVAL_DIR": "--out_dir"}
    values = {name: f"value_of_{name}" for name in {*training, *evaluation}} | {"EVAL_DIR": str(shell.folder / "elsewhere")}
    status, output = shell.run(CHAT_LAYERS, LAYERS="3", TORCH_COMPILE="1", QUALITY_DATASETS="one two", **values)
    assert status == 0, output
    train, evaluate = shell.calls()
    assert {name: flag(train, option) for name, option in training.items()} == {name: values[name] for name in training}
    assert {name: flag(evaluate, option) for name, option in evaluation.items()} == {name: values[name] for name in evaluation}
    assert "--torch_compile" in train and "--resume" in train
    assert evaluate[evaluate.index("--quality_datasets") + 1:][:2] == ["one", "two"]


def test_tree_study_measures_every_draft_at_every_temperature(shell: Shell):
    drafts = f"{shell.folder}/a/exit.safetensors {shell.folder}/b/model"
    settings = {"DRAFTS": drafts, "TEMPERATURES": "0 0.7", "GAMMAS": "2 5", "TREE_BUDGETS": "8 16"}
    assert shell.run(TREE_STUDY, **settings)[0] == 0
    calls = shell.calls()
    assert [(flag(call, "--spec_temperature"), flag(call, "--spec_top_p"), Path(flag(call, "--out_dir")).name) for call in calls] == [
        (t, p, f"{shell.folder.name}-{draft}-t{t}") for draft in ("a-exit", "b-model") for t, p in (("0", "1.0"), ("0.7", "0.95"))]
    assert "--checkpoint" in calls[0] and "self_speculative" in calls[0] and "--draft_model_path" in calls[2] and "speculative" in calls[2]
    assert calls[0][calls[0].index("--gammas") + 1:][:2] == ["2", "5"] and calls[0][calls[0].index("--tree_budgets") + 1:][:2] == ["8", "16"]
    assert shell.run(TREE_STUDY, **settings)[0] == 0 and shell.calls() == []
    status, output = shell.run(TREE_STUDY)
    assert status == 2 and "DRAFTS is empty" in output


def test_unset_settings_are_left_to_python(shell: Shell):
    _, output = shell.run(TWO_STAGE, DRY_RUN="1", SPEC_T="")
    assert not re.search(r"--(spec_\w+|gamma|verification|seed|loss_\w+|device|num_threads|dataset_path|quality_max_batches|torch_compile) ", output)


@pytest.mark.parametrize(("settings", "complaint"), [
    ({"SPEC_GAMA": "4"}, "unknown setting SPEC_GAMA"), ({"MAX_STEPS": "9"}, "unknown setting MAX_STEPS"), ({"LAYER": "3"}, "unknown setting LAYER"),
    ({"TORCH_COMPILE": "yes"}, "TORCH_COMPILE=yes"), ({"PYTHON": "no_such_python"}, "PYTHON=no_such_python")])
def test_mistakes_are_refused_before_anything_runs(shell: Shell, settings: dict, complaint: str):
    status, output = shell.run(TWO_STAGE, **settings)
    assert status == 2 and complaint in output and shell.calls() == []


@pytest.mark.parametrize("script", [TWO_STAGE, CHAT_LAYERS, LR_SWEEP, TREE_STUDY])
def test_header_lists_every_setting_with_its_default(shell: Shell, script: str):
    del shell.base["OUTPUT_DIR"], shell.base["PYTHON"]
    table = re.findall(r"^  ([A-Z_]+) {2,}(.+?) {2,}\S", shell.run(script, "--help")[1].split("\nSettings")[1], flags=re.MULTILINE)
    header = (ROOT / script).read_text().split("# Settings")[1].split("\nset -euo")[0]
    with_default = {name: value.strip('"') for name, value in re.findall(r'\b([A-Z_]+)=("[^"]*"|\S+)', header)}
    without = dict.fromkeys(re.findall(r"\b[A-Z_]{4,}\b(?!=)", header.split("left to the Python scripts")[1]), "(not passed)")
    assert len(table) > 15 and dict(table) == with_default | without


def test_sweep_starts_from_any_folder(shell: Shell):
    status, output = shell.run(CHAT_LAYERS, cwd=shell.folder, LAYERS="3")
    assert status == 0, output


@pytest.fixture
def hanging(shell: Shell) -> Iterator[subprocess.Popen]:
    process = shell.start(CHAT_LAYERS, LAYERS="3 7", HANG="--target_layer 3")
    wait_until(shell.out / "logs/head_layer3.log", "output of")
    yield process
    process.kill()
    process.communicate()


def test_signal_reaches_the_step_once_and_stops_the_sweep(shell: Shell, hanging: subprocess.Popen):
    """A training run that is told twice to stop does not save; a sweep that is told to stop must not start the next one."""
    hanging.send_signal(signal.SIGTERM)
    output = hanging.communicate(timeout=10)[0]
    assert hanging.returncode == 143 and "exit status 143" in output
    assert [" ".join(call) for call in shell.calls()][1:] == ["TERM received"]


def test_second_sweep_keeps_out_of_a_folder_in_use(shell: Shell, hanging: subprocess.Popen):
    status, output = shell.run(CHAT_LAYERS, LAYERS="3 7")
    assert status == 2 and "another sweep is at work" in output
    hanging.send_signal(signal.SIGTERM)
    hanging.communicate(timeout=10)


def test_launch_logs_output_and_exit_status_and_refuses_a_name_in_use(shell: Shell):
    command = ["bash", "-c", 'echo "$GREETING from $PWD"; until [[ -e go ]]; do sleep 0.02; done; exit 3']
    status, output = shell.run("launch_train_bg.sh", "job", *command, cwd=shell.folder, GREETING="two words")
    assert status == 0 and "follow: tail -f" in output and "stop:   kill -TERM" in output
    log, = (shell.folder / "logs").glob("job-*.log")
    wait_until(log, f"two words from {shell.folder}")
    status, output = shell.run("launch_train_bg.sh", "job", "true")
    assert status == 2 and "at work already" in output
    (shell.folder / "go").touch()
    wait_until(log, "exit status 3 at")


def test_launch_refuses_bad_names_and_commands(shell: Shell):
    for arguments in (["job"], ["a.b", "true"], ["job", "no_such_command"]):
        status, output = shell.run("launch_train_bg.sh", *arguments)
        assert status == 2 and output.startswith("error: "), output

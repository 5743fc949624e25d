"""The shell around training, mostly run with a stub in Python's place that leaves what train.py and evaluate_checkpoints.py leave."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from running.run_files import read_csv_log

ROOT = Path(__file__).parent.parent
TWO_STAGE, CHAT_LAYERS, LR_SWEEP = "run_sweep_ultrachat_two_stage.sh", "run_sweep_chat_layers.sh", "sweeps/run_lr_sweep_ultrachat_layer11.sh"
LAYER_SWEEP, KL_SWEEP, CAPACITY, TREE_STUDY = "sweeps/run_layer_sweep.sh", "sweeps/run_kl_temperature_sweep.sh", "sweeps/run_capacity_study.sh", "sweeps/run_tree_study.sh"
# Appends its arguments to $CALLS; refuses a run whose flags have changed, and makes a checkpoint for every combination, as
# train.py does; $FAIL and $HANG name a part of the arguments at which to fail, or to wait for a signal.
STUB = r"""#!/usr/bin/env bash
[[ $1 != -c ]] || exec "$REAL_PYTHON" "$@"
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
if [[ $1 == evaluate_checkpoints.py || $2 == commands.sweep_settings ]]; then touch "$folder/results.csv"; exit; fi
if [[ -f $folder/flags && $(<"$folder/flags") != "$args" ]]; then echo "error: other settings" >&2; exit 2; fi
echo "$args" >"$folder/flags"
names=('')
for flag in target_layers:layer kinds: loss_type: learning_rate:lr; do
  read -ra values < <(sed -nE "s/.* --${flag%:*} (([^- ][^ ]* ?)+).*/\1/p" <<<"$args ")
  ((${#values[@]} > 1)) || continue
  longer=()
  for name in "${names[@]}"; do for value in "${values[@]}"; do longer+=("$name${name:+-}${flag#*:}$value"); done; done
  names=("${longer[@]}")
done
for name in "${names[@]}"; do
  mkdir -p "$folder/$name"
  touch "$folder/$name/model_000005.safetensors"
  echo "${name:+$name/}model_000005.safetensors"
done >"$folder/final_checkpoint.txt"
"""
TINY = {"DATASET": "arithmetic", "MAX_LENGTH": "64", "BATCH_SIZE": "2", "GRAD_ACCUM": "1", "WARMUP_RATIO": "0", "LR": "1e-3", "NUM_THREADS": "1",
        "QUALITY_MAX_BATCHES": "2", "SPEC_NUM_PROMPTS": "2", "SPEC_PROMPT_LEN": "8", "SPEC_MAX_NEW": "12", "SPEC_GAMMA": "2"}


class Shell:
    """Runs the suite's scripts with the stub, everything written into one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.calls_file = folder, folder / "out", folder / "calls"
        stub = folder / "python_stub"
        stub.write_text(STUB)
        stub.chmod(0o755)
        self.base = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": str(stub), "REAL_PYTHON": sys.executable, "CALLS": str(self.calls_file),
                     "OUTPUT_DIR": str(self.out), "LOG_DIR": str(folder / "logs"), "LAUNCHER": "nohup"}

    def start(self, script: str, *arguments: str, cwd: Path = ROOT, **settings: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / script), *arguments]
        return subprocess.Popen(command, cwd=cwd, env=self.base | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, script: str, *arguments: str, cwd: Path = ROOT, **settings: str) -> tuple[int, str]:
        """(exit status, output) of the script."""
        process = self.start(script, *arguments, cwd=cwd, **settings)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    def train_for_real(self, model: Path) -> None:
        """From now on run train.py and evaluate_checkpoints.py themselves, on the target in `model`."""
        self.base |= {**TINY, "PYTHON": sys.executable, "MODEL_PATH": str(model), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

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


def values(call: list[str], name: str) -> list[str]:
    """All values of a flag that takes several."""
    found = []
    for value in call[call.index(name) + 1:]:
        if value.startswith("--"):
            break
        found.append(value)
    return found


def wait_until(path: Path, text: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{text!r} did not appear in {path}"
        time.sleep(0.02)


def test_two_stages_chain_their_checkpoints_and_end_in_one_evaluation(shell: Shell):
    status, output = shell.run(TWO_STAGE, LAYERS="3 7")
    calls = shell.calls()
    assert status == 0, output
    assert [call[0] for call in calls] == ["train.py", "train.py", "evaluate_checkpoints.py"]
    head, ftlast, evaluation = calls
    assert values(head, "--target_layers") == values(ftlast, "--target_layers") == ["3", "7"]
    assert "--ft_head" in head and "--ft_last_transformer" not in head and "--checkpoint_path" not in head
    assert "--ft_head" in ftlast and "--ft_last_transformer" in ftlast and flag(ftlast, "--output_dir") == str(shell.out / "ftlast")
    assert (flag(head, "--learning_rate"), flag(ftlast, "--learning_rate")) == ("5e-5", "2e-5")
    heads, blocks = ([str(shell.out / stage / layer / "model_000005.safetensors") for layer in ("layer3", "layer7")] for stage in ("head", "ftlast"))
    assert values(ftlast, "--checkpoint_path") == heads and values(evaluation, "--checkpoint_glob") == heads + blocks
    assert "output of train.py" in (shell.out / "logs/ftlast.log").read_text()


def test_both_stages_trim_the_vocabulary_where_asked(shell: Shell):
    status, output = shell.run(TWO_STAGE, DRAFT_VOCAB="1024")
    assert status == 0, output
    *stages, _ = shell.calls()
    assert [flag(call, "--draft_vocab_size") for call in stages] == ["1024", "1024"]
    assert "unknown setting DRAFT_VOCAB" in shell.run(CHAT_LAYERS, DRAFT_VOCAB="1024")[1]


def test_one_stage_sweeps_cover_their_grid(shell: Shell):
    assert shell.run(CHAT_LAYERS)[0] == 0
    train, evaluation = shell.calls()
    assert values(train, "--target_layers") == ["3", "7", "11", "15"] and len(values(evaluation, "--checkpoint_glob")) == 4
    assert flag(train, "--dataset") == "share_gpt" and flag(evaluation, "--quality_datasets") == "share_gpt"
    assert shell.run(LR_SWEEP, LEARNING_RATES="1e-4 2e-5", LR_SCHEDULES="linear cosine", OUTPUT_DIR=f"{shell.out}2")[0] == 0
    *calls, evaluation = shell.calls()
    assert [(values(call, "--learning_rate"), flag(call, "--lr_schedule")) for call in calls] == [(["1e-4", "2e-5"], "linear"), (["1e-4", "2e-5"], "cosine")]
    assert [flag(call, "--output_dir") for call in calls] == [f"{shell.out}2/head/layer11_linear", f"{shell.out}2/head/layer11_cosine"]
    assert len(set(values(evaluation, "--checkpoint_glob"))) == 4


def test_layer_sweep_trains_all_kinds_some_layers_at_a_time(shell: Shell):
    assert shell.run(LAYER_SWEEP, LAYERS="0 1 2 3 4")[0] == 0
    *calls, evaluation = shell.calls()
    assert [values(call, "--target_layers") for call in calls] == [["0", "1", "2", "3"], ["4"]]
    assert all(values(call, "--kinds") == ["head", "head+last_block"] for call in calls)
    assert [flag(call, "--output_dir") for call in calls] == [f"{shell.out}/exits/layers0_1_2_3", f"{shell.out}/exits/layers4"]
    evaluated = values(evaluation, "--checkpoint_glob")
    assert len(set(evaluated)) == 10 and f"{shell.out}/exits/layers4/head+last_block/model_000005.safetensors" in evaluated
    assert shell.run(LAYER_SWEEP, LAYERS="0 1 2", OUTPUT_DIR=f"{shell.out}2")[0] == 0
    assert [flag(call, "--output_dir") for call in shell.calls()[:-1]] == [f"{shell.out}2/exits"]


def test_kl_temperatures_get_a_pass_each_and_one_table(shell: Shell):
    assert shell.run(KL_SWEEP, KL_TEMPS="1 2", LAYERS="3 7")[0] == 0
    *calls, evaluation = shell.calls()
    assert [(flag(call, "--kl_temperature"), flag(call, "--output_dir")) for call in calls] == [("1", f"{shell.out}/kl_temp1"), ("2", f"{shell.out}/kl_temp2")]
    assert len(values(evaluation, "--checkpoint_glob")) == 4
    assert "--kl_temperature" not in evaluation  # so that every exit is measured at its own
    assert shell.run(KL_SWEEP, KL_TEMPS="1 2 4", LAYERS="3 7")[0] == 0
    assert [call[0] for call in shell.calls()] == ["train.py", "evaluate_checkpoints.py"]


def test_capacity_study_trains_the_best_exit_for_every_objective(shell: Shell):
    evaluation_dir = shell.out / "evaluation"
    evaluation_dir.mkdir(parents=True)
    (evaluation_dir / "results.csv").write_text(
        "checkpoint,kind,target_layer,spec_predicted_speedup\na,target,15,9\nb,untuned,1,8\nc,head,1,1.5\nd,rank64,3,1.75\ne,translator,3,\n")
    settings = {"KINDS": "head rank64", "LAYERS": "1 3", "OBJECTIVES": "kl_divergence lk"}
    status, output = shell.run(CAPACITY, **settings, LOSS_TYPE="cross_entropy")
    assert status == 0 and "[best] 3:rank64" in output
    kinds, first, best, second = shell.calls()
    assert values(kinds, "--target_layers") == ["1", "3"] and values(kinds, "--kinds") == ["head", "rank64"] and values(kinds, "--loss_type") == ["cross_entropy"]
    assert len(values(first, "--checkpoint_glob")) == 4 and flag(first, "--out_dir") == str(evaluation_dir)
    assert values(best, "--target_layers") == ["3"] and values(best, "--kinds") == ["rank64"] and values(best, "--loss_type") == ["kl_divergence", "lk"]
    run = shell.out / "objectives/layer3-rank64"
    assert values(second, "--checkpoint_glob") == [str(run / loss / "model_000005.safetensors") for loss in ("kl_divergence", "lk")]
    assert flag(second, "--out_dir") == str(evaluation_dir / "objectives")
    assert shell.run(CAPACITY, **settings, LOSS_TYPE="cross_entropy")[0] == 0 and shell.calls() == []
    assert shell.run(CAPACITY, **settings, LOSS_TYPE="cross_entropy", BEST="1:head")[0] == 0
    assert flag(shell.calls()[0], "--output_dir") == str(shell.out / "objectives/layer1-head")


def test_capacity_study_without_speeds_asks_for_the_best(shell: Shell):
    evaluation_dir = shell.out / "evaluation"
    evaluation_dir.mkdir(parents=True)
    (evaluation_dir / "results.csv").write_text("checkpoint,kind,target_layer\na,target,15\nb,head,1\n")
    status, output = shell.run(CAPACITY)
    assert status != 0 and "give BEST=LAYER:KIND" in output.splitlines()[-1] and len(shell.calls()) == 2


def test_dry_run_prints_every_command_and_writes_nothing(shell: Shell):
    status, output = shell.run(TWO_STAGE, DRY_RUN="1", LAYERS="3 7")
    assert status == 0
    commands = [shlex.split(line.split("] ", 1)[1]) for line in output.splitlines()]
    assert [command[1] for command in commands] == ["train.py", "train.py", "evaluate_checkpoints.py"]
    assert values(commands[1], "--checkpoint_path") == [f"{shell.out}/head/<final checkpoints of layer {layer}>" for layer in (3, 7)]
    assert not shell.out.exists() and shell.calls() == []


@pytest.mark.parametrize(("script", "steps"), [(LAYER_SWEEP, 5), (KL_SWEEP, 4), (CAPACITY, 4)])
def test_dry_run_of_studies_shows_every_step(shell: Shell, script: str, steps: int):
    status, output = shell.run(script, DRY_RUN="1")
    commands = [line for line in output.splitlines() if ".py " in line]
    assert status == 0 and len(commands) == steps, output
    assert not shell.out.exists() and shell.calls() == []
    assert script != CAPACITY or r"--target_layers \<layer\> --kinds \<kind\>" in commands[2]


def test_failing_step_stops_the_sweep_and_names_its_log(shell: Shell):
    status, output = shell.run(TWO_STAGE, LAYERS="3 7", FAIL="--ft_last_transformer")
    assert status == 7 and len(shell.calls()) == 2
    log = shell.out / "logs/ftlast.log"
    assert str(log) in output.splitlines()[-1] and log.exists()
    assert shell.run(TWO_STAGE, LAYERS="3 7")[0] == 0
    assert [flag(call, "--output_dir") for call in shell.calls()[:-1]] == [str(shell.out / "ftlast")]


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
    os.utime(shell.out / "head/model_000005.safetensors", (later, later))
    shell.run(CHAT_LAYERS, LAYERS="3")
    assert [call[0] for call in shell.calls()] == ["evaluate_checkpoints.py"]


@pytest.mark.parametrize(
    ("script", "setting", "text"),
    [(LAYER_SWEEP, "LAYERS", "1 2 3 4 1"), (KL_SWEEP, "KL_TEMPS", "1\n2\n1"), (LR_SWEEP, "LR_SCHEDULES", "cosine linear cosine"),
     (TREE_STUDY, "TEMPERATURES", "0 0.7 0"), (TREE_STUDY, "DRAFTS", "a/b/c.safetensors a/b/c.safetensors")])
def test_a_value_that_stands_twice_gets_one_line(shell: Shell, script: str, setting: str, text: str):
    status, output = shell.run(script, **{"DRAFTS": "a/b/exit.safetensors", setting: text})
    assert status == 2 and shell.calls() == []
    assert output.startswith("error: ") and output.endswith(f"{text.split()[-1]} stands twice; give each once\n")


@pytest.mark.parametrize("setting", ["MODEL_PATH", "DATASET_PATH"])
def test_a_changed_target_or_data_set_is_never_skipped_silently(shell: Shell, setting: str):
    folder = shell.folder / "given"
    folder.mkdir()
    (folder / "generation_config.json").write_text("{}")
    shell.run(CHAT_LAYERS, LAYERS="3", **{setting: str(folder)})
    shell.calls()
    later = time.time() + 5
    os.utime(folder / "generation_config.json", (later, later))
    shell.run(CHAT_LAYERS, LAYERS="3", **{setting: str(folder)})
    assert [call[0] for call in shell.calls()] == ["train.py", "evaluate_checkpoints.py"]


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


@pytest.mark.parametrize(("script", "settings"), [
    (TWO_STAGE, {"LAYERS": "1 3", "DATASET": "ultrachat pydoc", "MIX": "0.7 0.3"}), (CHAT_LAYERS, {"LAYERS": "1 3 5"}),
    (LAYER_SWEEP, {"LAYERS": "0 1 2 3 4", "KINDS": "head rank64", "LR": "1e-3 1e-4"}), (KL_SWEEP, {"KL_TEMPS": "1 2", "LAYERS": "3 7"}),
    (LR_SWEEP, {"LEARNING_RATES": "1e-4 2e-5", "LR_SCHEDULES": "linear cosine"}), (CAPACITY, {"LAYERS": "1 3", "OBJECTIVES": "lk combined", "BEST": "1:head"}),
    (TREE_STUDY, {"DRAFTS": "a/exit.safetensors b/model", "TEMPERATURES": "0 0.7", "GAMMAS": "2 5", "TREE_BUDGETS": "8 16"})])
def test_values_may_stand_on_lines_of_their_own(shell: Shell, script: str, settings: dict):
    """As $(seq 1 2 3) puts them; all but the first used to be lost."""
    printed = [shell.run(script, DRY_RUN="1", **{name: value.replace(" ", space) for name, value in settings.items()}) for space in (" ", "\n", "\t", " \n ")]
    assert printed[0][0] == 0 and all(other == printed[0] for other in printed)
    assert all(value in printed[0][1] for values in settings.values() for value in values.split(":")[-1].split())


@pytest.mark.parametrize(("script", "setting"), [(LR_SWEEP, "LR_SCHEDULES"), (KL_SWEEP, "KL_TEMPS"), (LAYER_SWEEP, "LAYERS"), (TREE_STUDY, "DRAFTS")])
def test_a_star_is_no_pattern_of_file_names(shell: Shell, script: str, setting: str):
    status, output = shell.run(script, DRY_RUN="1", **{setting: "*"})
    assert status == 0 and "README.md" not in output and "*" in output


def test_unset_settings_are_left_to_python(shell: Shell):
    _, output = shell.run(TWO_STAGE, DRY_RUN="1", SPEC_T="")
    assert not re.search(r"--(spec_\w+|gamma|verification|seed|loss_\w+|device|num_threads|dataset_path|quality_max_batches|torch_compile) ", output)


def test_data_sets_are_mixed(shell: Shell):
    assert shell.run(CHAT_LAYERS, DATASET="ultrachat pydoc", MIX="0.7 0.3")[0] == 0
    train, evaluation = shell.calls()
    assert values(train, "--dataset") == values(evaluation, "--quality_datasets") == ["ultrachat", "pydoc"] and values(train, "--mix") == ["0.7", "0.3"]


@pytest.mark.parametrize(("script", "settings", "complaint"), [
    (TWO_STAGE, {"SPEC_GAMA": "4"}, "unknown setting SPEC_GAMA"), (TWO_STAGE, {"MAX_STEPS": "9"}, "unknown setting MAX_STEPS"),
    (TWO_STAGE, {"LAYER": "3"}, "unknown setting LAYER"), (TWO_STAGE, {"KINDS": "head"}, "unknown setting KINDS"),
    (TWO_STAGE, {"TORCH_COMPILE": "yes"}, "TORCH_COMPILE=yes"), (TWO_STAGE, {"PYTHON": "no_such_python"}, "PYTHON=no_such_python"),
    (TWO_STAGE, {"LOSS_TYPE": "lk combined"}, "LOSS_TYPE=lk combined: stage 2 starts from one exit per layer"),
    (TWO_STAGE, {"LR_HEAD": "1e-3\n1e-4"}, "stage 2 starts from one exit per layer"),
    (KL_SWEEP, {"KL_TEMP": "2"}, "unknown setting KL_TEMP"), (LAYER_SWEEP, {"LAYERS_PER_PASS": "0"}, "LAYERS_PER_PASS=0"),
    (LAYER_SWEEP, {"MAX_STEPS_HEAD": "9"}, "unknown setting MAX_STEPS_HEAD"), (CAPACITY, {"BEST": "head"}, "BEST=head: give LAYER:KIND")])
def test_mistakes_are_refused_before_anything_runs(shell: Shell, script: str, settings: dict, complaint: str):
    status, output = shell.run(script, **settings)
    assert status == 2 and complaint in output and shell.calls() == []


@pytest.mark.parametrize("script", [TWO_STAGE, CHAT_LAYERS, LR_SWEEP, LAYER_SWEEP, KL_SWEEP, CAPACITY, TREE_STUDY])
def test_header_lists_every_setting_with_its_default(shell: Shell, script: str):
    del shell.base["OUTPUT_DIR"], shell.base["PYTHON"]
    table = re.findall(r"^  ([A-Z_]+) {2,}(.+?) {2,}\S", shell.run(script, "--help")[1].split("\nSettings")[1], flags=re.MULTILINE)
    header = (ROOT / script).read_text().split("# Settings")[1].split("\nset -euo")[0]
    with_default = {name: value.strip('"') for name, value in re.findall(r'\b([A-Z_]+)=("[^"]*"|\S+)', header)}
    without = dict.fromkeys(re.findall(r"\b[A-Z_]{3,}\b(?!=)", header.split("left to the Python scripts")[1]), "(not passed)")
    assert len(table) > 15 and dict(table) == with_default | without


def test_sweep_starts_from_any_folder(shell: Shell):
    status, output = shell.run(CHAT_LAYERS, cwd=shell.folder, LAYERS="3")
    assert status == 0, output


@pytest.fixture
def hanging(shell: Shell) -> Iterator[subprocess.Popen]:
    process = shell.start(CHAT_LAYERS, LAYERS="3 7", HANG="--target_layers 3")
    wait_until(shell.out / "logs/head.log", "output of")
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


def test_interrupted_layer_sweep_goes_on_where_it_was(shell: Shell, tiny_target_path: Path):
    shell.train_for_real(tiny_target_path)
    settings = {"LAYERS": "1", "MAX_STEPS": "60", "SAVE_EVERY": "0", "EVAL_EVERY": "0"}
    exit_folder = shell.out / "exits/head+last_block"
    process = shell.start(LAYER_SWEEP, **settings)
    wait_until(exit_folder / "train_log.csv", "\n5,", seconds=120)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].endswith(f"Log: {shell.out}/logs/exits.log\n") and process.returncode == 143
    assert not (shell.out / "exits/final_checkpoint.txt").exists()
    status, output = shell.run(LAYER_SWEEP, **settings)
    assert status == 0, output
    assert list(read_csv_log(exit_folder / "train_log.csv").dropna(subset="loss")["step"]) == list(range(1, 61))
    assert list(pd.read_csv(shell.out / "evaluation/results.csv")["kind"]) == ["target", "untuned", "head", "head+last_block"]
    assert list((shell.out / "evaluation/plots").glob("*.png"))


def test_capacity_study_for_real(shell: Shell, tiny_target_path: Path):
    shell.train_for_real(tiny_target_path)
    settings = {"LAYERS": "1", "KINDS": "rank8 translator+attention_block+vocab64", "OBJECTIVES": "kl_divergence lk", "MAX_STEPS": "2"}
    status, output = shell.run(CAPACITY, **settings)
    assert status == 0, output
    kinds, objectives = (pd.read_csv(shell.out / "evaluation" / name) for name in ("results.csv", "objectives/results.csv"))
    assert list(kinds["kind"]) == ["target", "untuned", "rank8", "translator+attention_block+vocab64"]
    assert list(objectives["kind"][2:]) == [kinds["kind"][kinds["spec_predicted_speedup"][2:].idxmax()]] * 2
    assert [Path(path).parent.name for path in objectives["checkpoint"][2:]] == ["kl_divergence", "lk"]
    assert list((shell.out / "evaluation/objectives/plots").glob("*.png"))


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


@pytest.mark.parametrize(("script", "name", "value"), [
    (TWO_STAGE, "LR_FTLAST", "1e-4 nan"), (CHAT_LAYERS, "SPEC_T", "inf"), (KL_SWEEP, "KL_TEMPS", "1 NaN"), (LAYER_SWEEP, "WARMUP_RATIO", "-Infinity"),
    (CAPACITY, "MIX", "nan"), (TREE_STUDY, "TEMPERATURES", "0\ninf")])
def test_numbers_are_finite_before_the_first_step(shell: Shell, script: str, name: str, value: str):
    status, output = shell.run(script, **{"DRAFTS": "a/exit.safetensors", name: value})
    assert (status, shell.calls()) == (2, []) and output == f"error: {name}={value}: must be finite\n"


def test_a_finished_run_whose_checkpoint_is_gone_is_started_again(shell: Shell):
    shell.run(CHAT_LAYERS, LAYERS="3")
    shell.calls()
    (shell.out / "head/model_000005.safetensors").unlink()
    status, output = shell.run(CHAT_LAYERS, LAYERS="3")
    assert status == 0 and [call[0] for call in shell.calls()] == ["train.py", "evaluate_checkpoints.py"], output


TOOLS = ("bash", "cat", "date", "dirname", "flock", "mkdir", "mktemp", "nohup", "rm", "setsid", "sleep", "tee", "true")  # of the launcher, without tmux


@pytest.mark.parametrize(("tmux", "message"), [
    (None, "LAUNCHER=tmux: there is no tmux here; install it, or give LAUNCHER=nohup"),
    ("exit 1", "tmux does not start; see what it says above")])
def test_no_environment_is_left_behind_where_tmux_does_not_start(shell: Shell, tmux: str | None, message: str):
    """The job's file has all of it, secrets included."""
    for name in ("bin", "tmp"):
        (shell.folder / name).mkdir()
    for tool in TOOLS:
        (shell.folder / "bin" / tool).symlink_to(shutil.which(tool))
    if tmux is not None:
        (shell.folder / "bin" / "tmux").write_text(f"#!/bin/bash\n{tmux}\n")
        (shell.folder / "bin" / "tmux").chmod(0o755)
    settings = {"PATH": str(shell.folder / "bin"), "TMPDIR": str(shell.folder / "tmp"), "HF_TOKEN": "secret", "LAUNCHER": "tmux"}
    status, output = shell.run("launch_train_bg.sh", "job", "bash", "-c", "true", **settings)
    assert status == 2 and f"error: {message}" in output
    assert list((shell.folder / "tmp").iterdir()) == []

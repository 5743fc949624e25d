"""Files come whole or not at all, and what somebody else has put beside them stays."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from running.command_line import UserError

import pytest
import torch

from decoding.autojudge import Judge
from measuring.followers import Followers, save_followers
from running import run_files
from running.run_files import in_one_step
from toy_models import noisy_exit, tiny_llama
from training import pretraining
from training.judges import JudgeInfo, save_judge
from training.training_loop import TrainingArgs, check_same_run, save_state
from truncated_llama import ExitInfo, ExitKind, read_exit_info, save_exit


def write_exit(path: Path) -> None:
    save_exit(path, noisy_exit(tiny_llama(), 1).exit, ExitInfo(1, ExitKind.parse("head"), "", "", ""))


def write_judge(path: Path) -> None:
    judge = Judge(torch.zeros(7), torch.ones(7), ((torch.ones(1, 7), torch.zeros(1)),), 0.5, "law")
    save_judge(path, judge, JudgeInfo("draft", "law", 0.5, None, 0.5, 0.5, 1, 1, "", "", "", "", ""))


def write_model(path: Path) -> None:
    beside = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    assert pretraining.save_bf16(path.parent, int(path.name.split("_")[1]), tiny_llama(), beside) == path


WRITERS = {
    "judge.safetensors": write_judge, "model_000001.safetensors": write_exit, "model_000001": write_model,
    "followers.safetensors": lambda path: save_followers(path, Followers(torch.zeros(2, 1, dtype=torch.int64), "", {})),
    "state.pt": lambda path: save_state(path.parent, {"step": 1}, SimpleNamespace(learners=[])), "config.json": lambda path: run_files.write_json(path, {}),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_partial_files_of_others_stay(tmp_path, monkeypatch, name, fails):
    path = tmp_path / name
    folder, file = path.with_name(f"{name}.partial"), path.with_name(f"{path.stem}.partial.mine")
    folder.mkdir()
    (folder / "mine").write_text("mine")
    if path.suffix:
        file = path.with_suffix(".partial")
    file.write_text("mine")
    if fails:
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises((OSError, UserError), match="No space left"):
            WRITERS[name](path)
        assert not path.exists()
    else:
        WRITERS[name](path)
        WRITERS[name](path)  # over the one before
        assert path.exists()
    assert {left for left in tmp_path.iterdir() if left != path} == {folder, file}
    assert file.read_text() == (folder / "mine").read_text() == "mine"


def test_what_is_written_in_one_step_is_seen_at_the_end_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with in_one_step(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["model_000100", "model_000100.safetensors"])
def test_a_run_does_not_begin_among_checkpoints_of_others(tmp_path, name):
    """It would replace what bears the name of one of its own."""
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"holds {name}, and does not say which run made it; choose another --output_dir"):
        check_same_run(tmp_path, TrainingArgs(output_dir=str(tmp_path)), {})
    (tmp_path / "config.json").write_text(json.dumps(vars(TrainingArgs(output_dir=str(tmp_path), resume=True))))
    check_same_run(tmp_path, TrainingArgs(output_dir=str(tmp_path), resume=True), {})


def test_numbers_that_are_none_are_absent_from_what_is_written(tmp_path):
    """JSON knows no NaN and no infinity, and a table none that a reader would not take for a figure."""
    row = {"ce": 1.5, "ppl": float("inf"), "kl": float("nan"), "of": {"low": float("-inf"), "high": 2}, "each": [1.0, float("nan")]}
    run_files.write_json(tmp_path / "row.json", row)
    assert json.loads((tmp_path / "row.json").read_text(), parse_constant=pytest.fail) == {"ce": 1.5, "of": {"high": 2}, "each": [1.0, None]}
    run_files.append_csv(tmp_path / "log.csv", {name: row[name] for name in ("ce", "ppl", "kl")}, ["ce", "ppl", "kl"])
    assert (tmp_path / "log.csv").read_text() == "ce,ppl,kl\n1.5,,\n"
    save_exit(tmp_path / "exit.safetensors", noisy_exit(tiny_llama(), 1).exit, ExitInfo(1, ExitKind.parse("head"), "", "", "", losses={"kl": float("nan"), "ce": 2.0}))
    assert read_exit_info(tmp_path / "exit.safetensors").losses == {"ce": 2.0}

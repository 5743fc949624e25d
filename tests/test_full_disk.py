"""A disk that fills up and files written by halves: one line, nothing left behind, and the same command goes on when there is room."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from running.command_line import UserError, run

import pytest

import evaluate
import evaluate_checkpoints
import export_draft
import generate_dataset
import train
from commands import build_followers
from commands.train_judge import open_mined
from evaluate_checkpoints import finished_rows
from plotting import exits
from plotting.trees import machine
from running.run_files import drop_later_rows, environment, read_config, record_run, write_text
from test_commands import EVALUATION, check_one_line, exit_path, run_main, train_arguments  # noqa: F401 (a fixture)


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes meanwhile; what this does to a write is what a full disk does, but for its number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def commands(tiny_target_path, exit_path, tmp_path, monkeypatch) -> dict[str, tuple]:  # noqa: F811 (a fixture)
    """Commands that write to tmp_path, as (module, arguments)."""
    monkeypatch.setattr(exits, "plot_results", lambda *_: None)
    target, out = ["--model_path", tiny_target_path, "--num_threads", 1], ["--out_dir", tmp_path / "out"]
    answers = ["--dataset", "arithmetic", "--num_examples", 12, "--max_new_tokens", 32, "--batch_size", 4, "--resume"]
    return {
        "evaluate": (evaluate, [*target, *out, "--checkpoint", exit_path, *EVALUATION]),
        "evaluate_checkpoints": (evaluate_checkpoints, [*target, *out, "--checkpoint_glob", exit_path, *EVALUATION]),
        "generate_dataset": (generate_dataset, [*target, *out, *answers]),
        "export_draft": (export_draft, [*target, *out, "--checkpoint", exit_path]),
        "build_followers": (build_followers, ["--model_path", tiny_target_path, "--dataset", "arithmetic", "--max_examples", 20, "--out", tmp_path / "out" / "a.safetensors"]),
        "train": (train, train_arguments(tiny_target_path, tmp_path / "out")),
    }


@pytest.mark.parametrize(("name", "num_bytes"), [
    ("evaluate", 1_500), ("evaluate_checkpoints", 1_500), ("generate_dataset", 60), ("generate_dataset", 1_500), ("export_draft", 3_000), ("build_followers", 100),
    ("train", 60)])
def test_a_full_disk_is_one_line_and_loses_nothing(commands, tmp_path, monkeypatch, capsys, name, num_bytes):
    module, arguments = commands[name]
    with room_for(num_bytes):
        assert run_main(module, arguments, monkeypatch) == 2
    check_one_line(capsys, r"cannot (write|save)( to)? .*out.*; make room, and")
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]
    before = contents(tmp_path)
    assert run_main(module, [*arguments, *(["--resume"] if name == "train" else [])], monkeypatch) == 0
    after = contents(tmp_path)
    assert all(path in after for path in before)
    if name == "generate_dataset":
        rows = [json.loads(line)["index"] for line in after["out/train-0-of-1.jsonl"].splitlines()]
        assert len(rows) == len(set(rows)) > 8


def test_other_errors_of_the_system_keep_their_traceback():
    """They are bugs, or mistakes whose remedy is not room."""
    with pytest.raises(PermissionError):
        run(lambda: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))


def test_a_file_that_could_not_be_replaced_is_what_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with room_for(10), pytest.raises(OSError) as found:
        write_text(path, "new" * 100)
    assert found.value.filename == str(path) and contents(tmp_path) == {"a.txt": b"old"}


# ---- files written by halves ----

HALVES = ["", "{", "[", '"a"', "\x00\x00", "null"]


@pytest.mark.parametrize("content", HALVES)
def test_records_of_runs_that_are_no_json_are_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json: (not JSON|holds a).*; restore it, or choose another output directory"):
        read_config(tmp_path)
    for reader in (lambda: record_run(tmp_path, generate_dataset.Args(model_path="m", out_dir="o")), lambda: machine(tmp_path, {})):
        with pytest.raises(UserError, match=r"manifest.json: (not JSON|holds a).*; delete it: it lists earlier starts"):
            reader()
    assert sorted(contents(tmp_path)) == ["config.json", "manifest.json"] and (tmp_path / "config.json").read_text() == content, "nothing is written before that"


def test_machine_of_a_run_without_starts(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    assert machine(tmp_path, {"threads": 2}) == "CPU, threads: 2" and environment()


@pytest.mark.parametrize(("line", "missing"), [('{"tokens": 3}', "index"), ('{"index": 1, "tokens": 3, "ended": true}', "same_tokens"), ("[1]", "index"), ("null", "index")])
def test_rows_that_lack_what_is_counted_are_named(tmp_path, line, missing):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"index": 0, "tokens": 3, "ended": true, "same_tokens": true}\n' + line + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl: row 2 has no {missing}; mend it, or delete it: its example is then answered again"):
        generate_dataset.whole_rows(path, generate_dataset.ROW_FACTS)


@pytest.mark.parametrize(("lines", "message"), [
    (['{"index": 0}'], "first line has no settings"), (["7"], "first line has no settings"), (['{"settings": {}}', '{"index": 0}', '{"skipped": "a"}'], "line 3 is not that of prompt 1"),
    (['{"settings": {}}', "[]"], "line 2 is not that of prompt 0"), (['{"settings": {}}', '{"index": 0}', '{"index": 2}'], "line 3 is not that of prompt 1")])
def test_mined_prompts_that_lack_their_number_are_named(tmp_path, lines, message):
    path = tmp_path / "mined.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match=message):
        open_mined(path, {})


@pytest.mark.parametrize(("content", "message"), [("checkpoint,settings_hash\na,h\n,h\n", "a row without its checkpoint"), ("settings_hash\nh\n", "a row without its checkpoint"), ("", "is no table")])
def test_results_without_their_checkpoint_are_named(tmp_path, content, message):
    (tmp_path / "results.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        finished_rows(tmp_path / "results.csv", "h")


def test_an_empty_log_is_begun_anew_and_a_broken_one_named(tmp_path):
    log = tmp_path / "train_log.csv"
    log.touch()
    drop_later_rows(log, 5)
    assert not log.exists()
    log.write_text("step,loss\n1,0.5\n?\n")
    with pytest.raises(UserError, match="train_log.csv is no table of a training run"):
        drop_later_rows(log, 5)

"""Presets: what wins, what gives way, what is refused, and that every shipped one is valid."""

from __future__ import annotations

import json
import os
from pathlib import Path

from running.command_line import UserError, parse_args

import pytest

from commands import validate_configs
from harness.flags import Args
from harness.presets import ROOT, PresetArgs, as_draft, as_words, listing, preset_flags, read_presets, with_presets
from test_commands import check_one_line, run_main

MODELS = {
    "big": {"hf_model": "org/big", "dtype": "bf16", "max_new_tokens": 10, "gamma": "2", "quant": None},
    "small": {"hf_model": "org/small", "dtype": "fp16", "quant": "4bit"},
    "exit": {"checkpoint": "exit.safetensors"},
    "toy": {"toy": True},
}
METHODS = {"chain": {"method": ["vanilla", "speculative"], "gamma": "6", "runs": 3}, "all": {"method": ["all"]}}
EXPERIMENTS = {
    "pair": {"description": "two of them", "target_preset": "big", "draft_preset": "small", "method_preset": "chain"},
    "alone": {"target_preset": "big", "draft_preset": None, "method_preset": "all"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_presets(tmp_path)


def write_presets(folder: Path, **changes: dict) -> Path:
    for kind, presets in {"models": MODELS, "methods": METHODS, "experiments": EXPERIMENTS, **changes}.items():
        (folder / f"{kind}.json").write_text(json.dumps({kind: presets}))
    return folder


def parsed(words: str, folder: Path) -> Args:
    return parse_args(Args, with_presets(words.split(), folder))


# ---- what wins ----

def test_an_experiment_names_target_draft_and_method(folder):
    args = parsed("--experiment pair", folder)
    assert (args.model_path, args.torch_dtype, args.draft_model_path, args.draft_dtype, args.draft_quant) == ("org/big", "bf16", "org/small", "fp16", "4bit")
    assert args.method == ["vanilla", "speculative"] and args.quant is None, "null says nothing"


def test_later_presets_win_and_the_command_line_has_the_last_word(folder):
    assert parsed("--model_preset big", folder).gamma == "2" and parsed("--experiment pair", folder).gamma == "6", "the method's own"
    args = parsed("--experiment pair --method_preset all --model_preset toy --draft_preset exit", folder)
    assert args.method == ["all"] and args.toy and args.model_path is None and args.checkpoint == "exit.safetensors" and args.draft_model_path is None
    assert parsed("--method_preset chain --experiment alone", folder).method == ["vanilla", "speculative"], "whatever their order"
    args = parsed("--runs 5 --experiment pair --k 8 --method vanilla --dtype fp32 --max_new_tokens=7", folder)
    assert (args.runs, args.gamma, args.method, args.torch_dtype, args.max_new_tokens, args.draft_quant) == (5, "8", ["vanilla"], "fp32", 7, "4bit")


def test_a_typed_draft_takes_the_place_of_a_presets_with_all_its_flags(folder):
    args = parsed("--experiment pair --checkpoint own.safetensors", folder)
    assert (args.checkpoint, args.draft_model_path, args.draft_dtype, args.draft_quant) == ("own.safetensors", None, None, None)
    args = parsed("--model_preset big --draft_preset exit --draft_model_path org/own", folder)
    assert (args.checkpoint, args.draft_model_path) == (None, "org/own")


def test_a_typed_target_or_toy_takes_the_place_of_a_presets(folder):
    args = parsed("--experiment pair --hf_model org/own", folder)
    assert (args.model_path, args.draft_model_path, args.torch_dtype) == ("org/own", "org/small", "bf16")
    args = parsed("--experiment pair --toy", folder)
    assert args.toy and args.model_path is args.draft_model_path is args.draft_dtype is None and args.gamma == "6"
    args = parsed("--model_preset toy --model-path org/own", folder)
    assert not args.toy and args.model_path == "org/own"


def test_the_embedded_pair_is_what_nobody_names():
    embedded, exit_ = (os.path.relpath(ROOT / "assets" / name) for name in ("pydoc-llama-7m", "pydoc-llama-7m-exit/layer1.safetensors"))
    for words in ("", "--method vanilla", "--method_preset baseline"):
        args = parse_args(Args, with_presets(words.split()))
        assert (args.model_path, args.checkpoint, args.draft_model_path) == (embedded, exit_, None)
    args = parse_args(Args, with_presets(["--checkpoint", "own.safetensors"]))
    assert (args.model_path, args.checkpoint) == (embedded, "own.safetensors")
    for words in ("--hf_model org/own", "--model-path=org/own", "--toy", "--model_preset toy", "--experiment mistral_baseline"):
        assert parse_args(Args, with_presets(words.split())).checkpoint is None


def test_paths_of_assets_hold_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(preset_flags(PresetArgs(model_preset="embedded"))["hf_model"], "config.json").exists()


def test_flags_of_a_draft():
    assert as_draft({"hf_model": "m", "dtype": "bf16", "quant": "8bit", "bnb_compute_dtype": "fp16", "device": "cpu"}, "m") == {
        "hf_draft_model": "m", "draft_dtype": "bf16", "draft_quant": "8bit", "draft_bnb_compute_dtype": "fp16", "draft_device": "cpu"}
    assert as_draft({"checkpoint": "e"}, "e") == {"checkpoint": "e"}
    with pytest.raises(UserError, match="--draft_preset m: gamma, toy cannot be set for a draft; choose another model"):
        as_draft({"hf_model": "m", "toy": True, "gamma": 1}, "m")


def test_words_of_a_command_line():
    assert as_words({"toy": True, "k": 4, "method": ["a", "b"], "use_chat_template": False}) == ["--toy", "--k", "4", "--method", "a", "b", "--use_chat_template", "False"]


# ---- what is refused ----

@pytest.mark.parametrize(
    ("words", "message"),
    [("--experiment none", "unknown preset 'none': choose one of pair, alone"), ("--model_preset none", "choose one of big, small, exit, toy"),
     ("--draft_preset toy --model_preset big", "--draft_preset toy: toy cannot be set for a draft"), ("--method_preset", "--method_preset.*: expected one argument; --list_presets lists them")],
)
def test_mistakes_get_one_line(folder, words, message):
    with pytest.raises(UserError, match=message):
        with_presets(words.split(), folder)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "must be"), ('{"models": []}', "must be"), ('{"models": {"a": 1}}', "must be"), ('{"other": {}}', "must be"), (None, "No such file")],
)
def test_files_of_another_form_are_refused(folder, content, message):
    path = folder / "models.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_presets("models", folder)


# ---- the validator ----

def test_every_shipped_preset_is_valid(monkeypatch, capsys):
    assert run_main(validate_configs, [], monkeypatch) == 0
    assert capsys.readouterr().out.endswith("; valid\n") and all(name in listing() for name in read_presets("experiments"))
    assert all(experiment["description"] for experiment in read_presets("experiments").values())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"models": {**MODELS, "odd": {"hf_modle": "x"}}}, "model odd: unknown argument --hf_modle: did you mean --hf_model"),
        ({"models": {**MODELS, "odd": {"dtype": "fp8"}}}, "model odd: argument --torch_dtype/--torch-dtype/--dtype: invalid choice: 'fp8'"),
        ({"methods": {**METHODS, "odd": {"gamma": 0}}}, "method odd: --gamma 0: must be auto"),
        ({"methods": {**METHODS, "odd": {"method": ["medusa"]}}}, "method odd: --method medusa: choose from"),
        ({"methods": {**METHODS, "odd": {"tree_budget": 1}}}, "method odd: --tree_budget 1: must lie between 2"),
        ({"experiments": {"odd": {**EXPERIMENTS["pair"], "seed": 1}}}, "experiment odd: unknown key seed; known: description, draft_preset"),
        ({"experiments": {"odd": {"target_preset": "big"}}}, "experiment odd: needs a target_preset and a method_preset"),
        ({"experiments": {"odd": {**EXPERIMENTS["pair"], "draft_preset": "big"}}}, "experiment odd: big would draft for itself"),
        ({"experiments": {"odd": {**EXPERIMENTS["pair"], "draft_preset": "toy"}}}, "experiment odd: --draft_preset toy: toy cannot be set for a draft"),
        ({"experiments": {"odd": {**EXPERIMENTS["pair"], "target_preset": "none"}}}, "experiment odd: unknown preset 'none'"),
        ({"experiments": {"odd": {**EXPERIMENTS["pair"], "method_preset": ["chain"]}}}, "experiment odd: unknown preset ['chain']"),
    ],
)
def test_the_validator_complains(tmp_path, monkeypatch, capsys, changes, complaint):
    assert run_main(validate_configs, ["--folder", write_presets(tmp_path)], monkeypatch) == 0
    assert run_main(validate_configs, ["--folder", write_presets(tmp_path, **changes)], monkeypatch) == 1
    printed = capsys.readouterr().out
    assert complaint in printed and "complaints" in printed.splitlines()[-1]


def test_the_validator_cannot_read(tmp_path, monkeypatch, capsys):
    assert run_main(validate_configs, ["--folder", tmp_path / "none"], monkeypatch) == 2
    check_one_line(capsys, "cannot be read")

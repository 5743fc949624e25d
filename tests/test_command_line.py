"""What no flag of any command may be: twice the same in a list, empty, nan, infinite, or a number beyond int64; found before anything is read."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import get_args, get_origin, get_type_hints

from running.command_line import LARGEST_INT, MAY_BE_EMPTY, MAY_REPEAT, UserError, parse_args

import pytest

import benchmark
import benchmark_torch_compile
import evaluate
import evaluate_checkpoints
import export_draft
import generate_dataset
import prove
import train
import tune
from commands import (
    benchmark_llava,
    benchmark_training,
    build_followers,
    build_growmap,
    evaluate_judge,
    pretrain_draft_model,
    pretrain_llava,
    sweep_settings,
    train_judge,
    validate_configs,
    validate_results,
)
from test_commands import run_main

COMMANDS = {
    module.__name__.removeprefix("commands."): module.Args for module in (
        benchmark, benchmark_llava, benchmark_torch_compile, benchmark_training, build_followers, build_growmap, evaluate, evaluate_checkpoints, evaluate_judge,
        export_draft, generate_dataset, pretrain_draft_model, pretrain_llava, prove, sweep_settings, train, train_judge, tune, validate_results)}


LISTS = [(command, name) for command, args in COMMANDS.items() for name, hint in get_type_hints(args).items() if list in map(get_origin, (hint, *get_args(hint)))]


def parse(command: str, *words: str) -> object:
    """The arguments of a command with these words, and something for each flag that it must have."""
    required = [one.name for one in fields(COMMANDS[command]) if one.default is one.default_factory is MISSING]
    given = {"target_layers": "1", "dataset": "gsm8k"}
    return parse_args(COMMANDS[command], [*(word for name in required if f"--{name}" not in words for word in (f"--{name}", given.get(name, "x"))), *words])


def examples(command: str, flag: str) -> tuple[str, str]:
    """Two spellings of one value of a list."""
    hint = str(get_type_hints(COMMANDS[command])[flag])
    return ("2", "02") if "int" in hint else ("0.5", "5e-1") if "float" in hint else ("runs/a", "./runs//a")


@pytest.mark.parametrize(("command", "flag"), LISTS)
def test_a_list_names_nothing_twice(command, flag):
    one, other = examples(command, flag)
    assert getattr(parse(command, f"--{flag}", one), flag)
    if flag in MAY_REPEAT:
        assert len(getattr(parse(command, f"--{flag}", one, other), flag)) == 2
        return
    with pytest.raises(UserError, match=f"--{flag} .*: one stands twice; give each once"):
        parse(command, f"--{flag}", one, other)


def test_numbers_in_words_are_compared_as_numbers():
    assert parse("sweep_settings", "--gammas", "2", "4", "auto").gammas == ["2", "4", "auto"]
    with pytest.raises(UserError, match="--gammas 2 auto 02: one stands twice"):
        parse("sweep_settings", "--gammas", "2", "auto", "02")


@pytest.mark.parametrize(("command", "flag"), [
    (command, name) for command, args in COMMANDS.items() for name in ("out", "out_dir", "output_dir") if name in args.__dataclass_fields__])
def test_a_place_for_results_is_not_empty(command, flag):
    with pytest.raises(UserError, match=f'--{flag} "": is empty'):
        parse(command, f"--{flag}", "")


def test_of_texts_some_may_be_empty():
    for flag in MAY_BE_EMPTY:
        assert getattr(parse({"notes": "train", "system_prompt": "benchmark", "prompt": "benchmark_llava"}[flag], f"--{flag}", ""), flag) == ""
    with pytest.raises(UserError, match='--quality_datasets "": is empty'):
        parse("evaluate", "--quality_datasets", "gsm8k", "")


@pytest.mark.parametrize("number", [LARGEST_INT + 1, -LARGEST_INT - 1, 10**400])
@pytest.mark.parametrize("command", [command for command, args in COMMANDS.items() if "seed" in args.__dataclass_fields__])
def test_a_seed_is_one_that_tensors_hold(command, number):
    assert parse(command, "--seed", str(LARGEST_INT)).seed == LARGEST_INT
    with pytest.raises(UserError, match="--seed -?[0-9]+: is too large a number"):
        parse(command, "--seed", str(number))


def held_as_numbers(args: type) -> list[str]:
    """The flags whose value is a float, alone or in a list."""
    return [name for name, hint in get_type_hints(args).items() if float in (hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part)))]


@pytest.mark.parametrize("number", ["nan", "-1e999"])
@pytest.mark.parametrize(("command", "flag"), [(command, name) for command, args in COMMANDS.items() for name in held_as_numbers(args)])
def test_a_number_is_finite(command, flag, number):
    """nan passes checks of the form `<= 0`: it was measured with, and failed when it was written."""
    with pytest.raises(UserError, match=f"^--{flag} (nan|-?inf): must be a finite number$"):
        parse(command, f"--{flag}={number}")


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_number_in_a_word_or_a_preset_is_finite(number, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=f"--tree_level_cost {number}: must be a finite number, and not negative"):
        parse("evaluate", "--tree_level_cost", number).fixed_level_cost()
    for kind in ("models", "methods", "experiments"):
        (tmp_path / f"{kind}.json").write_text(json.dumps({kind: {"hot": {"temperature": float(number)}} if kind == "methods" else {}}))
    assert run_main(validate_configs, ["--folder", tmp_path], monkeypatch) == 1
    assert f"method hot: --temperature {number}: must be a finite number" in capsys.readouterr().out


def test_a_large_seed_draws(tiny_target_path, tmp_path, monkeypatch):
    command = ["--model_path", tiny_target_path, "--dataset", "arithmetic", "--num_examples", 2, "--max_new_tokens", 4, "--seed", LARGEST_INT, "--out_dir", tmp_path / "out"]
    assert run_main(generate_dataset, command, monkeypatch) == 0

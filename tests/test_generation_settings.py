"""generation_config.json: a broken one is an error, and what it asks for in vain is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import generate_dataset
from models.generation_settings import UNAPPLIED, check_generation_config, unapplied
from models.target_model import DeviceArgs, eos_token_ids, load_target
from speculative import DecodeOptions, generate
from test_commands import check_one_line, run_main
from toy_models import tiny_llama


@pytest.fixture
def model(tiny_target_path, tmp_path) -> Path:
    """A saved target that may be changed."""
    return Path(shutil.copytree(tiny_target_path, tmp_path / "model"))


@pytest.mark.parametrize(
    ("content", "why"),
    [('{"eos_token_id": [1, 6', "cannot be read"), ("", "cannot be read"), ("[1]", "cannot be read"), ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
     ('{"eos_token_id": [1, null]}', "eos_token_id is .1, None."), ('{"max_new_tokens": -1}', "must be greater than 0"), (b"\xff{}", "cannot be read")])
def test_a_broken_file_is_no_missing_one(model, tmp_path, monkeypatch, capsys, content, why):
    (model / "generation_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    command = ["--model_path", model, "--dataset", "arithmetic", "--num_examples", 1, "--max_new_tokens", 4, "--out_dir", tmp_path / "out"]
    assert run_main(generate_dataset, command, monkeypatch) == 2
    check_one_line(capsys, why)


def test_without_a_file_the_ends_are_those_of_the_config(model):
    (model / "generation_config.json").unlink()
    check_generation_config(str(model))
    assert eos_token_ids(load_target(str(model), DeviceArgs())) == {2}


def test_what_is_asked_for_in_vain_is_said_once(capsys):
    model = tiny_llama()
    model.generation_config = GenerationConfig(repetition_penalty=1.3, suppress_tokens=list(range(100)), temperature=0.6, top_p=0.9, do_sample=True)
    for _ in range(2):
        generate(model, [1, 2], DecodeOptions(max_new_tokens=2))
    noted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(noted) == 1 and "repetition_penalty 1.3" in noted[0] and "suppress_tokens [0, 1," in noted[0] and "top_p" not in noted[0]
    generate(tiny_llama(), [1, 2], DecodeOptions(max_new_tokens=2))
    assert "note" not in capsys.readouterr().err


def test_neutral_values_ask_for_nothing():
    assert unapplied(GenerationConfig()) == {}
    for name, neutral in UNAPPLIED.items():
        for value in neutral:
            assert unapplied(GenerationConfig(**{name: value})) == {}, name


@pytest.mark.parametrize("asked", [{"repetition_penalty": 4.0}, {"suppress_tokens": list(range(60))}, {"min_new_tokens": 9}, {"no_repeat_ngram_size": 1}])
def test_transformers_own_decoder_applies_none_of_it_either(asked):
    model, options = tiny_llama(), DecodeOptions(max_new_tokens=8)
    plain = {name: generate(model, [1, 2], DecodeOptions(name, max_new_tokens=8)).tokens for name in ("vanilla", "hf_generate")}
    model.generation_config = GenerationConfig(**asked)
    assert {name: generate(model, [1, 2], DecodeOptions(name, max_new_tokens=8)).tokens for name in plain} == plain
    assert plain["vanilla"] == generate(model, [1, 2], options).tokens and torch.tensor(plain["hf_generate"]).numel() == 8

"""Models that cannot be made or read: one line for each, before or while they are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from command_line import UserError

import pytest
from safetensors.torch import load_file, save_file

from llava_target import load_llava_config
from target_model import ASSETS, DeviceArgs, load_config, load_target


def edit(folder: Path, change: Callable[[dict], object], name: str = "config.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: edit(folder, lambda config: config.pop("intermediate_size")), "do not fit its config.json: .* such as intermediate_size"),
        (lambda folder: edit(folder, lambda config: config.pop("num_key_value_heads")), "do not fit its config.json"),
        (other_shape, "do not fit its config.json"),
        (lambda folder: edit(folder, lambda config: config["rope_parameters"].update(rope_type="zigzag")), "its config.json has rope_type 'zigzag'"),
        (lambda folder: edit(folder, lambda config: config["rope_parameters"].pop("factor")), "no model at .*Missing required keys in `rope_parameters`"),
        (lambda folder: edit(folder, lambda config: config.update(hidden_act="zzz")), "its config.json has hidden_act 'zzz'"),
        (lambda folder: edit(folder, lambda config: config.update(num_key_value_heads=0)), "its config.json has num_key_value_heads 0"),
        (lambda folder: edit(folder, lambda config: config.update(num_hidden_layers=-1)), "its config.json has num_hidden_layers -1"),
    ],
)
def test_a_config_that_does_not_fit_gets_one_line(tiny_target_path, tmp_path, change, message):
    folder = Path(shutil.copytree(tiny_target_path, tmp_path / "model"))
    change(folder)
    with pytest.raises(UserError, match=message):
        load_target(str(folder), DeviceArgs())


def test_every_shape_of_the_suite_is_one(tmp_path):
    for path in (ASSETS / "configs").glob("*.json"):
        load_config(str(path), None)
    edit(Path(shutil.copytree(ASSETS / "shapes-llava", tmp_path / "llava")), lambda config: config["text_config"]["rope_parameters"].update(rope_type="zigzag"))
    with pytest.raises(UserError, match="its config.json has rope_type 'zigzag'"):
        load_llava_config(str(tmp_path / "llava"))

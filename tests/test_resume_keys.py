"""What was measured or made with one thing is never taken for what another would give: every key by which a command recognises its own work."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from running.command_line import UserError

import pytest
import torch

import benchmark
import evaluate_checkpoints
import generate_dataset
import train
from commands import train_judge
from commands.train_judge import open_mined
from data.registry import open_stream
from decoding.growmap import chain, save_growmap
from harness import flags as bench_args
from harness.figures import MethodRun, key_of
from harness.methods import NAMES, Subject, ways_of
from harness.prompts import Prompt
from harness.runs import Data, shared_inputs
from measuring.evaluation import NOT_SETTINGS, Draft
from measuring.tree_plans import Fitted, coupling_identity
from models.target_model import Target, eos_token_ids, load_target, text_facts
from running.run_files import record_run
from speculative import DecodeOptions
from toy_models import noisy_exit
from training.training_loop import FREE_ON_RESUME, check_same_run

FLAGS = {"model_path": "target", "out_dir": "out"}
BENCH_SMALL = {"max_new_tokens": 8, "tree_budget": 6, "tree_depth": 2, "parallel_branches": 3, "num_threads": 1}


@pytest.fixture(scope="module")
def loaded(tiny_target_path) -> Target:
    return load_target(str(tiny_target_path), generate_dataset.Args(**FLAGS))


@pytest.fixture
def target(loaded) -> Target:
    """One that may be changed."""
    return Target(copy.deepcopy(loaded.model), copy.deepcopy(loaded.tokenizer), loaded.name)


@pytest.fixture(scope="module")
def streams() -> dict:
    return {split: open_stream("arithmetic", split) for split in ("train", "validation", "test")}


# ---- the keys ----

def bench_shared(target: Target, draft: Draft | None = None, **flags: object) -> dict:
    """What a benchmark's records of all methods depend on."""
    data = Data([Prompt([1, 2, 3])], lambda: [], "nothing")
    subject = Subject(target, draft, eos_token_ids(target), Fitted(lambda: [], "nothing"))
    return shared_inputs(subject, data, bench_args.Args(**{**BENCH_SMALL, **flags}), benchmark.SHARED_FLAGS)


def evaluation_key(target: Target, streams: dict, **flags: object) -> object:
    args = evaluate_checkpoints.Args(**{**FLAGS, "checkpoint_glob": [], "quality_datasets": ["arithmetic"], "growmap": None, **flags})
    return args.settings_hash(args.facts(target, {"arithmetic": streams["test"].rows}))


def judge_settings(target: Target, streams: dict, **flags: object) -> dict:
    return train_judge.Args(**{"model_path": "target", "out": "judge.safetensors", **flags}).settings(target, {"rows": streams["train"].num_rows})


def coupling_key(target: Target, streams: dict) -> dict:
    return coupling_identity(target, target.model, DecodeOptions(eos_ids=eos_token_ids(target)), Fitted(lambda: [], "data"))


KEYS: dict[str, Callable[[Target, dict], object]] = {
    "benchmark": lambda target, streams: bench_shared(target),
    "evaluate_checkpoints": evaluation_key,
    "generate_dataset": lambda target, streams: generate_dataset.facts_of(target, streams["train"]),
    "train": lambda target, streams: train.facts_of(target, streams),
    "train_judge": lambda target, streams: [judge_settings(target, streams), text_facts(target)["target_hash"]],  # the hash is in JudgeInfo.models
    "coupling": coupling_key,
}


def set_eos(target: Target) -> None:
    target.model.generation_config.eos_token_id = [7]


def set_template(target: Target) -> None:
    target.tokenizer.chat_template += " "


def forget_a_merge(target: Target) -> None:
    """The same ids for the same tokens, of which a text becomes others."""
    content = json.loads(target.tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"].pop()
    target.tokenizer._tokenizer = type(target.tokenizer.backend_tokenizer).from_str(json.dumps(content))


INGREDIENTS: dict[str, Callable[[Target], object]] = {
    "weights": lambda target: target.model.model.layers[0].mlp.up_proj.weight.data.flatten()[0].add_(1),
    "norm": lambda target: setattr(target.model.config, "rms_norm_eps", 1e-2),
    "activation": lambda target: setattr(target.model.config, "hidden_act", "gelu"),
    "rotary": lambda target: target.model.config.rope_parameters.update(factor=2.0),
    "ends": set_eos,
    "chat template": set_template,
    "tokenizer": forget_a_merge,
    "dtype": lambda target: target.model.to(torch.bfloat16),
    "context": lambda target: setattr(target.model.config, "max_position_embeddings", 300),
}


@pytest.mark.parametrize("ingredient", INGREDIENTS)
@pytest.mark.parametrize("key", KEYS)
def test_another_target_is_another_key(target, streams, key, ingredient):
    if (key, ingredient) == ("benchmark", "context"):
        pytest.skip("the prompts that it leaves room for are in the key themselves")
    before = KEYS[key](target, streams)
    assert KEYS[key](target, streams) == before
    INGREDIENTS[ingredient](target)
    assert KEYS[key](target, streams) != before


def test_encoding_a_batch_changes_no_key(target):
    before = text_facts(target)
    target.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert text_facts(target) == before


# ---- every flag ----

def another(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "more"] if isinstance(value, list) else f"{value} more"


def changed_flags(args: object, free: set[str]) -> list[tuple[str, object]]:
    """Every flag of `args` that is not `free`, with another value."""
    return [(flag.name, another(getattr(args, flag.name))) for flag in fields(args) if flag.name not in free]


def test_every_flag_of_an_evaluation_is_in_its_key():
    args = evaluate_checkpoints.Args(**FLAGS, checkpoint_glob=[], quality_datasets=["arithmetic"])
    before = args.settings_hash({})
    for name, value in changed_flags(args, NOT_SETTINGS):
        assert replace(args, **{name: value}).settings_hash({}) != before, name


@pytest.mark.parametrize("command", ["train", "generate_dataset"])
def test_every_flag_of_a_run_is_compared(tmp_path, command):
    if command == "train":
        args, free = train.Args(model_path="target", target_layers=[1], output_dir=str(tmp_path), resume=True), FREE_ON_RESUME
        record_run(tmp_path, args)

        def check(changed: object) -> None:
            check_same_run(tmp_path, changed, {})
    else:
        args, free, shard = generate_dataset.Args(model_path="target", out_dir=str(tmp_path), resume=True), generate_dataset.FREE_ON_RESUME, generate_dataset.Shard(0, 1)
        shard.folder(args).mkdir()
        record_run(shard.folder(args), args, {"WORLD_SIZE": 1})

        def check(changed: object) -> None:
            generate_dataset.check_settings(changed, shard, {})
    check(args)
    for name, value in changed_flags(args, free):
        with pytest.raises(UserError, match=f"--{name} "):
            check(replace(args, **{name: value}))


def test_every_flag_of_a_judge_is_in_its_settings(target, streams, tmp_path):
    named = {"model_path", "out", "mined", "dataset", "dataset_path", "checkpoint", "draft_model_path"}  # are in the key by what they hold
    same_text = {"batch_size", "device", "torch_dtype", "attn_implementation", "tf32", "num_threads"}  # up to rounding; the dtype is in the key
    for mode, other in (("paper", {"gamma"}), ("draft", {"features", "recall_target", "c_grid"})):
        args = train_judge.Args(model_path="target", out="judge.safetensors", autojudge_mode=mode)
        before = judge_settings(target, streams, autojudge_mode=mode)
        for name, value in changed_flags(args, named | same_text | other | {"autojudge_mode"}):
            assert judge_settings(target, streams, **{"autojudge_mode": mode, name: value}) != before, name
    open_mined(tmp_path / "mined.jsonl", before)
    with pytest.raises(UserError, match="eos_ids"):
        open_mined(tmp_path / "mined.jsonl", before | {"eos_ids": [7]})


BENCH_FREE = {  # flags that are in the key by what they name or choose, or that change no figure
    "model_path", "draft_model_path", "checkpoint", "torch_dtype", "draft_device", "device", "dataset", "max_samples", "fit_prompts", "method", "out", "runs", "list_presets",
    "require_headless", "experiment", "model_preset", "draft_preset", "method_preset",
}


def bench_keys(target: Target, draft: Draft, **flags: object) -> dict[str, str]:
    """The key of every way to decode."""
    args = bench_args.Args(**{**BENCH_SMALL, "topk_rank": ["2"], **flags})
    subject = Subject(target, draft, frozenset(), Fitted(lambda: [], "nothing"))
    shared = bench_shared(target, draft, **flags)
    methods = [name for name in NAMES if name not in ("autojudge", "common_sense")]
    ways = [way for method in methods for way in ways_of(method, subject, args.settings())]
    return {way.method: key_of(shared, MethodRun(way.method, way.inputs, 1)) for way in ways}


BENCH_OWN = {  # flags of some methods only, with another value
    "gamma": ("5", {"speculative", "self_speculative", "topk", "hf_assisted"}), "verification": ("coupled", {"speculative", "self_speculative", "topk"}),
    "tree_verification": ("match", {"static_tree", "dynamic_tree"}), "tree_budget": (5, {"static_tree", "dynamic_tree", "specexec"}),
    "tree_depth": (3, {"static_tree", "dynamic_tree", "specexec"}), "parallel_branches": (4, {"static_tree", "dynamic_tree", "specexec"}),
    "growmap": ("growmap.json", {"static_tree"}), "branch_prune_threshold": (0.5, {"specexec"}), "topk_rank": (["3"], {"topk"}),
}
NEED_FILES = {"commonsense", "followers", "autojudge_checkpoint", "autojudge_threshold"}  # see tests/test_benchmark.py


@pytest.mark.parametrize("flag", [one.name for one in fields(bench_args.Args) if one.name not in BENCH_FREE | NEED_FILES])
def test_every_flag_of_a_benchmark_is_in_its_keys(loaded, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    save_growmap(Path("growmap.json"), chain(3))
    draft = Draft(noisy_exit(loaded.model, 1), {"checkpoint": "noisy"})
    before = bench_keys(loaded, draft)
    default = next(one.default for one in fields(bench_args.Args) if one.name == flag)
    value, concerned = BENCH_OWN.get(flag, (another(BENCH_SMALL.get(flag, default)), before.keys()))
    if flag in ("temperature", "top_p"):
        value = 0.5
    after = bench_keys(loaded, draft, **{flag: value})
    assert {method for method in before if before[method] != after[method]} == set(concerned)

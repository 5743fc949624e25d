"""Commands from the command line inwards: a small sweep end to end, and one clear line for every mistake."""

import json
import re
import shutil
import sys
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import benchmark
import decoding.drafting as drafting
import evaluate
import evaluate_checkpoints
import generate_dataset
import prove
import train
from commands import build_followers, build_growmap, evaluate_judge, pretrain_draft_model, sweep_settings
from data.registry import open_stream
from data_utils import encode_prompt
from plotting import exits
from running import command_line
from running.run_files import environment, read_csv_log
from toy_models import tiny_llama

ROOT = Path(__file__).parent.parent
EVALUATION = ["--quality_datasets", "arithmetic", "--quality_max_batches", "2", "--spec_num_prompts", "3", "--spec_prompt_length", "8",
              "--spec_max_new_tokens", "12", "--fit_prompts", "4", "--max_length", "64", "--gamma", "2", "--num_threads", "1"]


def run_main(module, arguments: list, monkeypatch) -> int:
    """Exit status of a command's main, as `python module.py arguments` would have."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        command_line.run(module.main)
    return exit_.value.code or 0


def train_arguments(model, output, **changes) -> list[str]:
    flags = {"model_path": model, "dataset": "arithmetic", "target_layer": 1, "ft_head": "true", "max_steps": 3, "batch_size": 2, "max_length": 64,
             "output_dir": output, "num_threads": 1}
    return [text for name, value in {**flags, **changes}.items() if value is not None for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def exit_path(tiny_target_path, tmp_path_factory):
    """A trained head of layer 1."""
    folder = tmp_path_factory.mktemp("sweep") / "head" / "layer1"
    with pytest.MonkeyPatch.context() as patch:
        assert run_main(train, train_arguments(tiny_target_path, folder), patch) == 0
    return folder / (folder / "final_checkpoint.txt").read_text().strip()


def test_sweep_end_to_end(tiny_target_path, exit_path, tmp_path, monkeypatch, capsys):
    last = tmp_path / "ftlast" / "layer1"
    changes = {"ft_last_transformer": "true", "checkpoint_path": exit_path, "loss_type": "combined", "kl_temperature": 2.0}
    assert run_main(train, train_arguments(tiny_target_path, last, **changes), monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(last / "model_000003.safetensors")
    command = ["--model_path", tiny_target_path, "--checkpoint_glob", exit_path, last / "model_*.safetensors", "--out_dir", tmp_path / "out", *EVALUATION]
    assert run_main(evaluate_checkpoints, command, monkeypatch) == 0
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(table["kind"]) == ["target", "untuned", "head", "head+last_block"]
    assert table["spec_accepted"][0] == table["spec_proposed"][0] and table["arithmetic_kl"][0] == pytest.approx(0, abs=1e-6)
    assert table["arithmetic_kl"][1] > table["arithmetic_kl"][2] > table["arithmetic_kl"][3] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"cmd.txt", "config.json", "manifest.json", "plots"}

    monkeypatch.setattr(evaluate_checkpoints, "evaluate_draft", lambda *_: pytest.fail("a finished row was measured again"))
    assert run_main(evaluate_checkpoints, command, monkeypatch) == 0
    assert run_main(evaluate_checkpoints, [*command, "--seed", "1"], monkeypatch) == 2
    assert "other settings" in capsys.readouterr().err


def test_interrupted_evaluation_measures_only_what_is_missing(tiny_target_path, exit_path, tmp_path, monkeypatch):
    monkeypatch.setattr(exits, "plot_results", lambda *_: None)
    command = ["--model_path", tiny_target_path, "--checkpoint_glob", exit_path, "--out_dir", tmp_path, *EVALUATION]
    assert run_main(evaluate_checkpoints, command, monkeypatch) == 0
    whole = pd.read_csv(tmp_path / "results.csv")
    whole[:1].to_csv(tmp_path / "results.csv", index=False)
    assert run_main(evaluate_checkpoints, command, monkeypatch) == 0
    again = pd.read_csv(tmp_path / "results.csv")
    timing = [name for name in whole if re.search("_s(_ci_.*)?$|speedup|spec_cost_ratio|spec_verify_ratio", name)]
    pd.testing.assert_frame_equal(whole.drop(columns=timing), again.drop(columns=timing))


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_evaluate_an_exit_and_an_independent_draft(tiny_target_path, exit_path, tmp_path, monkeypatch, verification):
    for name, draft in (("exit", ["--checkpoint", exit_path]), ("model", ["--draft_model_path", tiny_target_path])):
        out = tmp_path / name
        command = ["--model_path", tiny_target_path, *draft, "--out_dir", out, "--verification", verification, *EVALUATION]
        assert run_main(evaluate, command, monkeypatch) == 0
        row = json.loads((out / "metrics.json").read_text())
        assert row["verification"] == verification and row["spec_emitted"] > 0
        assert (row["spec_accepted"] == row["spec_proposed"]) == (name == "model")


def test_pretraining_makes_a_loadable_model(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = ["--output_dir", tmp_path / "run", "--dataset", "arithmetic", "--train_tokenizer_size", 300, "--hidden_size", 16, "--intermediate_size", 32,
               "--num_attention_heads", 2, "--num_key_value_heads", 1, "--tie_word_embeddings", "--rope_scaling_factor", 4, "--max_steps", 8,
               "--batch_size", 2, "--max_length", 32, "--learning_rate", "1e-2", "--num_threads", 1]
    assert run_main(pretrain_draft_model, command, monkeypatch) == 0
    validation = read_csv_log(tmp_path / "run" / "train_log.csv")["validation_loss"].dropna()
    assert validation.iloc[-1] < validation.iloc[0] - 0.1
    path = tmp_path / "run" / "model_000008"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.generation_config.eos_token_id) == 2 and AutoTokenizer.from_pretrained(path).chat_template
    shutil.rmtree(path)  # a finished run writes what is gone again
    assert run_main(pretrain_draft_model, [*command, "--resume"], monkeypatch) == 0
    again = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    grown = ["--output_dir", tmp_path / "grown", "--init", "first_blocks", "--init_from", path, "--num_hidden_layers", 1, "--dataset", "arithmetic",
             "--max_steps", 1, "--batch_size", 1, "--max_length", 16]
    assert run_main(pretrain_draft_model, grown, monkeypatch) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown" / "model_000001").config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layer": 4}, "--target_layers 4: .* choose 0 to 3"),
        ({"target_layer": -1}, "choose 0 to 3"),
        ({"dataset": "ultrachatt"}, "unknown data set 'ultrachatt': choose one of arithmetic"),
        ({"dataset_path": "/no/such/file.jsonl"}, "--dataset_path /no/such/file.jsonl"),
        ({"ft_head": None}, "nothing to train: give --ft_head"),
        ({"checkpoint_path": "/no/such/model.safetensors"}, "no checkpoint at /no/such/model.safetensors"),
        ({"model_path": "/no/such/model"}, "no model at /no/such/model"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn package is not installed"),
        ({"max_length": 100_000}, "--max_length 100000: the context of"),
        ({"max_steps": 0}, "--max_steps 0: must be at least 1"),
        ({"learning_rate": -1}, "--learning_rate -1.0: must be positive"),
        ({"kl_temperature": 0}, "--kl_temperature 0.0: must be positive"),
        ({"loss_type": "kl"}, "--loss_type kl: choose from kl_divergence"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"num_threads": 0}, "--num_threads 0: must be at least 1"),
        ({"tracker": "wandb"}, "--tracker wandb needs wandb, which is not installed; run: pip install wandb"),
        ({"learning_rte": 1}, "unknown argument --learning_rte: did you mean --learning_rate"),
    ],
)
def test_training_mistakes_get_one_line(tiny_target_path, tmp_path, monkeypatch, capsys, changes, message):
    assert run_main(train, train_arguments(tiny_target_path, tmp_path / "run", **changes), monkeypatch) == 2
    check_one_line(capsys, message)


def check_one_line(capsys, message: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "a", "answer": "b"}\n{"question": "a", \n', "first is line 2"), ("", "no rows"), ('{"other": 1}\n' * 40, "no usable example")],
)
def test_bad_files_get_one_line(tiny_target_path, tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert run_main(train, train_arguments(tiny_target_path, tmp_path / "run", dataset_path=path), monkeypatch) == 2
    check_one_line(capsys, message)


def test_unwritable_output_gets_one_line(tiny_target_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert run_main(train, train_arguments(tiny_target_path, tmp_path / "file" / "run"), monkeypatch) == 2
    check_one_line(capsys, "cannot write to .* choose another output directory")


def test_a_run_is_never_written_over(tiny_target_path, exit_path, monkeypatch, capsys):
    assert run_main(train, train_arguments(tiny_target_path, exit_path.parent), monkeypatch) == 2
    check_one_line(capsys, "holds a run already; .* --resume")
    assert run_main(train, [*train_arguments(tiny_target_path, exit_path.parent, max_steps=4), "--resume"], monkeypatch) == 2
    check_one_line(capsys, "--max_steps 3 -> 4")
    assert run_main(train, [*train_arguments(tiny_target_path, exit_path.parent), "--resume"], monkeypatch) == 0
    assert capsys.readouterr().out.splitlines() == ["finished already", str(exit_path)]


@pytest.fixture
def finished_run(exit_path, tmp_path):
    """A copy of the finished run of `exit_path`."""
    return shutil.copytree(exit_path.parent, tmp_path / "copy")


def test_a_finished_run_writes_a_checkpoint_that_is_gone_again(tiny_target_path, exit_path, finished_run, monkeypatch, capsys):
    """It used to say that it had finished already."""
    command = [*train_arguments(tiny_target_path, finished_run), "--resume"]
    (finished_run / exit_path.name).unlink()
    assert run_main(train, command, monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(finished_run / exit_path.name)
    rebuilt, exact = (load_file(path) for path in (finished_run / exit_path.name, exit_path))
    assert rebuilt.keys() == exact.keys() and all(torch.equal(rebuilt[name], exact[name]) for name in exact)
    assert read_csv_log(finished_run / "train_log.csv").equals(read_csv_log(exit_path.parent / "train_log.csv"))
    (finished_run / "final_checkpoint.txt").write_text("")
    assert run_main(train, command, monkeypatch) == 0 and (finished_run / "final_checkpoint.txt").read_text() == f"{exit_path.name}\n"


def test_a_finished_run_without_checkpoint_and_state_says_so(tiny_target_path, exit_path, finished_run, monkeypatch, capsys):
    (finished_run / exit_path.name).unlink()
    (finished_run / "state.pt").unlink()
    assert run_main(train, [*train_arguments(tiny_target_path, finished_run), "--resume"], monkeypatch) == 2
    check_one_line(capsys, f"final_checkpoint.txt names .*{exit_path.name}, which is not there, and state.pt is gone, too; delete .* to train it again")
    assert (finished_run / "train_log.csv").exists()


def test_evaluation_mistakes_get_one_line(tiny_target_path, exit_path, tmp_path, monkeypatch, capsys, tokenizer):
    other = tmp_path / "other"
    tiny_llama(seed=5, vocab_size=len(tokenizer)).float().save_pretrained(other)
    tokenizer.save_pretrained(other)
    foreign = tmp_path / "foreign"
    tiny_llama(vocab_size=len(tokenizer)).float().save_pretrained(foreign)
    renamed = tokenizer.from_pretrained(other)
    renamed.add_tokens(["<|new|>"])
    renamed.save_pretrained(foreign)
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(exit_path.read_bytes()[:-40])
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    checkpoint = ["--checkpoint", exit_path]
    for model, arguments, message in (
        (other, checkpoint, "belongs to another target"),
        (tiny_target_path, ["--draft_model_path", foreign], "have different tokenizers"),
        (tiny_target_path, ["--checkpoint", corrupt], "is broken"),
        (tiny_target_path, [*checkpoint, "--draft_model_path", other], "give either --checkpoint"),
        (tiny_target_path, [*checkpoint, "--spec_prompt_length", 510], "context of .* is 512 tokens"),
        (tiny_target_path, [*checkpoint, "--spec_top_p", 0], "--spec_top_p 0.0 must lie between"),
        (tiny_target_path, [*checkpoint, "--spec_num_prompts", 5000], "only .* prompts of 8 tokens"),
        (tiny_target_path, [*checkpoint, "--dataset_path", empty], "no rows"),
        (tiny_target_path, [*checkpoint, "--spec_prompt_length", -5], "--spec_prompt_length -5: must not be negative"),
        (tiny_target_path, [*checkpoint, "--gamma", 0], "--gamma 0: must be auto, or a number from 1 to 63"),
    ):
        assert run_main(evaluate, ["--model_path", model, "--out_dir", tmp_path / "out", *EVALUATION, *arguments], monkeypatch) == 2
        check_one_line(capsys, message)
    command = ["--model_path", tiny_target_path, "--checkpoint_glob", "/no/such/*", "--out_dir", tmp_path / "out", *EVALUATION]
    assert run_main(evaluate_checkpoints, command, monkeypatch) == 2
    check_one_line(capsys, "no checkpoint matches")


@pytest.mark.parametrize("command", [evaluate, evaluate_judge, sweep_settings])
def test_whole_prompts_fit_a_draft_of_shorter_context(tiny_target_path, tokenizer, tmp_path, monkeypatch, command):
    """Only those that leave room in both contexts are decoded; others stand in between."""
    lengths = sorted(len(encode_prompt(tokenizer, example)) for example in islice(open_stream("arithmetic", "test", shuffle=False).rest_of_epoch(), 200))
    draft, context = tmp_path / "draft", lengths[100] + 12 + 2
    tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=context).float().save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    flags = ["--model_path", tiny_target_path, "--draft_model_path", draft, "--num_threads", 1, "--out_dir", tmp_path / "out"]
    if command is evaluate_judge:
        flags += ["--dataset", "arithmetic", "--num_problems", 20, "--max_new_tokens", 12, "--gamma", 2, "--ranks", 2]
    else:
        flags += ["--spec_prompt_dataset", "arithmetic", "--spec_num_prompts", 20, "--spec_prompt_length", 0, "--spec_max_new_tokens", 12]
        flags += ["--methods", "speculative", "--gammas", 2, "--counts_only"] if command is sweep_settings else [
            "--quality_datasets", "arithmetic", "--quality_max_batches", 1, "--max_length", 64, "--gamma", 2]
    assert lengths[100] < lengths[-1] and run_main(command, flags, monkeypatch) == 0


def test_proof_holds_for_real_code_and_fails_on_a_planted_bug(tiny_target_path, exit_path, tmp_path, monkeypatch, capsys):
    command = ["--model_path", tiny_target_path, "--checkpoint_glob", exit_path, "--spec_prompt_dataset", "arithmetic", "--spec_num_prompts", 2,
               "--spec_prompt_length", 8, "--spec_max_new_tokens", 10, "--num_threads", 1]
    assert run_main(prove, [*command, "--out_dir", tmp_path / "real"], monkeypatch) == 0
    assert all(row["passed"] for row in json.loads((tmp_path / "real" / "proof.json").read_text()))
    exact = drafting.verify_chain
    monkeypatch.setattr(drafting, "verify_chain", lambda v, p, q, drafted, noise, positions, ids: exact(v, p, q, drafted, noise, positions + 1, ids))
    assert run_main(prove, [*command, "--out_dir", tmp_path / "bug"], monkeypatch) == 1
    assert "FAIL  coupled" in capsys.readouterr().out


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no checkout")
def broken_copy(path: Path, folder: Path) -> Path:
    """The target at `path` with one weight that is no number."""
    shutil.copytree(path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_target_whose_logits_are_not_finite_gets_one_line_from_every_command(tiny_target_path, exit_path, tmp_path, monkeypatch, capsys):
    """It proved exact, learned with "kl 0.0000", and wrote token 0 for ever."""
    broken = broken_copy(tiny_target_path, tmp_path / "broken")
    prompts = ["--spec_prompt_dataset", "arithmetic", "--spec_num_prompts", 2, "--spec_prompt_length", 8, "--spec_max_new_tokens", 8]
    trees = [*prompts, "--fit_prompts", 2, "--draft_model_path", tiny_target_path]
    for module, arguments in [
        (train, train_arguments(broken, tmp_path / "trained")),
        (prove, ["--model_path", broken, *prompts, "--out_dir", tmp_path / "proof"]),
        (evaluate, ["--model_path", broken, "--draft_model_path", tiny_target_path, *EVALUATION, "--out_dir", tmp_path / "evaluation"]),
        (build_growmap, ["--model_path", broken, *trees, "--out_dir", tmp_path / "growmap"]),
        (generate_dataset, ["--model_path", broken, "--dataset", "arithmetic", "--num_examples", 2, "--max_new_tokens", 8, "--out_dir", tmp_path / "dataset"]),
    ]:
        capsys.readouterr()
        assert run_main(module, arguments, monkeypatch) == 2
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))] == [
            "error: the target's logits are not finite (NaN or infinite): check its weights, or choose a number format of wider range (fp32, bf16)"]


def test_revision_is_found_in_somebody_elses_folder(monkeypatch):
    """As root's container finds a user's: git refuses to look into it unless told."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = environment()
    assert re.fullmatch(r"[0-9a-f]{40}", found["git_sha"]) and found["git_dirty"] in (True, False)


@pytest.mark.parametrize(
    ("package", "version", "good"),
    [("torch", "2.6.0", True), ("torch", "2.6.0a0+ecf3bae40a.nv25.01", True), ("torch", "2.15.0a0+1", True), ("torch", "2.13.0+cpu", True),
     ("torch", "2.5.1", False), ("torch", "2.5.0a0+e000cf0ad9.nv24.10", False), ("torch", "2.16.0a0", False), ("transformers", "5.17.0.dev0", True),
     ("transformers", "5.18.0", False), ("transformers", "5.19.0", False), ("transformers", "5.20.1", True),
     ("transformers", "4.57.3", False), ("transformers", "6.0", False), ("python", "3.9.18", False), ("python", "3.13.1", True), ("python", "3.14.0", False)],
)
def test_versions_outside_the_range_are_named(package, version, good):
    complaint = command_line.version_complaint(package, version)
    assert complaint is None if good else f"{package} {version} is not supported" in complaint


def test_transformers_that_refuses_the_torch_is_named():
    """As 5.20 and later beside the torch 2.6.0a0 of NVIDIA's container 25.01: they switch PyTorch off."""
    ngc, requirements = "2.6.0a0+ecf3bae40a.nv25.1", ["numpy>=1.17", 'torch>=2.6; extra == "torch"', 'torchvision; extra == "torch-vision"']
    assert command_line.pair_complaint(ngc, "5.20.0", requirements) == f"transformers 5.20.0 needs torch>=2.6 and finds {ngc}; run: pip install -r requirements.txt"
    assert command_line.pair_complaint(ngc, "5.20.0", ["torch>=2.6"]) is not None  # without a marker
    for found, taken in ((ngc, ['torch>=2.5; extra == "torch"']), (ngc, ['torch>=2.9; extra == "kernels"']), ("2.9.0a0+1", requirements), ("2.6.0+cu124", requirements)):
        assert command_line.pair_complaint(found, "5.17.0", taken) is None
    command_line.check_versions()  # what is installed here



# ---- chat templates ----

@pytest.fixture
def with_template(tiny_target_path, tmp_path):
    """A copy of the target whose tokenizer has another chat template."""
    def copy(template: str) -> Path:
        path = shutil.copytree(tiny_target_path, tmp_path / "target")
        (path / "chat_template.jinja").write_text(template)
        return path
    return copy


def chat_commands(target: Path, checkpoint: Path, folder: Path) -> dict[str, tuple]:
    """Commands that read 48 chats, every second one with a system prompt, as (module, arguments)."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does the function do?"}, {"role": "assistant", "content": "It adds two numbers."}]
    data = folder / "chats"
    data.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"messages": [*chat[i % 2 : 2], {**chat[2], "content": f"{split} {i}: it adds two numbers."}]} for i in range(16)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, out = ["--dataset_path", data], ["--out_dir", folder / "out", "--num_threads", 1]
    evaluation = ["--quality_datasets", "ultrachat", *EVALUATION[2:], *source]
    return {
        "train": (train, train_arguments(target, folder / "out", dataset="ultrachat", dataset_path=data)),
        "evaluate": (evaluate, ["--model_path", target, "--checkpoint", checkpoint, *evaluation, *out]),
        "prove": (prove, ["--model_path", target, "--spec_prompt_dataset", "ultrachat", "--spec_num_prompts", 1, "--spec_prompt_length", 4, "--spec_max_new_tokens", 2,
                          *source, *out]),
        "generate_dataset": (generate_dataset, ["--model_path", target, "--dataset", "ultrachat", *source, "--num_examples", 8, "--max_new_tokens", 4, *out]),
        "build_followers": (build_followers, ["--model_path", target, "--dataset", "ultrachat", *source, "--max_examples", 8, "--out", folder / "out" / "a.safetensors"]),
        "benchmark": (benchmark, ["--model_path", target, "--dataset", data / "test.jsonl", "--method", "vanilla", "--max_new_tokens", 2, "--max_samples", 4, "--runs", 1,
                                  "--out", folder / "out" / "a.jsonl", "--device", "cpu", "--num_threads", 1]),
    }


REFUSING = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.parametrize("name", ["train", "evaluate", "generate_dataset", "build_followers", "benchmark"])
def test_chats_that_the_template_refuses_are_skipped_and_counted(with_template, exit_path, tmp_path, monkeypatch, capsys, name):
    module, arguments = chat_commands(with_template(REFUSING), exit_path, tmp_path)[name]
    assert run_main(module, arguments, monkeypatch) == 0
    output = capsys.readouterr()
    assert re.search(r"\d+ rows skipped \(\d+ whose chat the template refuses \(System role not supported\)\)", output.out + output.err)


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ today_as_text() }}"])
@pytest.mark.parametrize("name", ["train", "evaluate", "prove", "generate_dataset", "build_followers", "benchmark"])
def test_a_broken_template_is_one_line(with_template, exit_path, tmp_path, monkeypatch, capsys, name, template):
    module, arguments = chat_commands(with_template(template), exit_path, tmp_path)[name]
    assert run_main(module, arguments, monkeypatch) == 2
    check_one_line(capsys, r"the chat template of .*target is broken \(.*\); mend it, or use another model")

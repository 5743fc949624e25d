"""Texts that the target itself wrote: what is generated, that no detour changes it, and one clear line for every mistake."""

import json
import os
import random
import shlex
import shutil
import signal
from pathlib import Path

from running.command_line import UserError

import pytest

import generate_dataset
from data.registry import open_stream
from data.row_files import SkipRow
from data_utils import encode_prompt
from decoding.sampling import SamplingPolicy
from generate_dataset import Prompt, make_row, reading_flags
from models.target_model import DeviceArgs, eos_token_ids, load_target
from speculative import DecodeOptions, generate
from test_commands import check_one_line, run_main
from toy_models import tiny_llama

NUM_EXAMPLES, NEW_TOKENS = 30, 12


@pytest.fixture(scope="module")
def model_path(tiny_target_path, tmp_path_factory) -> Path:
    """The tiny target with many end tokens, so that answers of every kind occur: ended, cut, empty, with special tokens inside."""
    path = tmp_path_factory.mktemp("target") / "ending-llama"
    shutil.copytree(tiny_target_path, path)
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [6, *range(100, 130)]}))
    return path


@pytest.fixture
def command(model_path, tmp_path, monkeypatch):
    """Runs the command into `tmp_path / folder` and returns its exit status; changed or further flags by name, RANK and WORLD_SIZE by `shard`."""
    def run(folder: str, *switches: str, shard: tuple = (), **changes: object) -> int:
        for name, value in zip(("RANK", "WORLD_SIZE"), shard or (None, None), strict=True):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))
        flags = {"model_path": model_path, "dataset": "arithmetic", "num_examples": NUM_EXAMPLES, "max_new_tokens": NEW_TOKENS, "batch_size": 4, "temperature": 1.0,
                 "torch_dtype": "fp32", "device": "cpu", "num_threads": 1, "out_dir": tmp_path / folder, **changes}
        return run_main(generate_dataset, [*switches, *(text for name, value in flags.items() for text in (f"--{name}", value))], monkeypatch)
    return run


def rows_of(folder: Path) -> dict[int, dict]:
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert len({row["index"] for row in rows}) == len(rows)
    return {row["index"]: row for row in rows}


def result(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for name in ("*.jsonl", "shard-*/skipped.jsonl", "shard-*/summary.json") for path in folder.glob(name)}


def test_rows_are_what_vanilla_decoding_answers(command, model_path, tmp_path, capsys):
    assert command("own", seed=3, top_k=40, top_p=0.9) == 0
    rows, target = rows_of(tmp_path / "own"), load_target(str(model_path), DeviceArgs(device="cpu", torch_dtype="fp32"))
    options = DecodeOptions(policy=SamplingPolicy(1.0, 40, 0.9), max_new_tokens=NEW_TOKENS, eos_ids=eos_token_ids(target), seed=3)
    examples = open_stream("arithmetic", "train", seed=3).rest_of_epoch()
    skipped = {row["index"]: row["reason"] for row in map(json.loads, (tmp_path / "own/shard-0-of-1/skipped.jsonl").read_text().splitlines())}
    for index, example in zip(range(NUM_EXAMPLES), examples, strict=False):
        tokens = generate(target.model, encode_prompt(target.tokenizer, example), options, prompt_id=index).tokens
        answer = tokens[:-1] if tokens[-1] in options.eos_ids else tokens
        if index in skipped:
            assert not answer if skipped[index] == "with an empty answer" else any(token < 7 for token in answer)
            continue
        row = rows[index]
        assert row["messages"][:-1] == example["messages"][:-1] and row["prompt"] == example["messages"][0]["content"] and row["prompt_id"] == str(index)
        assert row["messages"][-1] == {"role": "assistant", "content": target.tokenizer.decode(answer)}
        assert row["tokens"] == len(tokens) and row["ended"] == (tokens[-1] in options.eos_ids)
    assert len(rows) + len(skipped) == NUM_EXAMPLES and set(skipped.values()) == {"with an empty answer", "with a special token inside the answer"}
    summary = json.loads((tmp_path / "own/shard-0-of-1/summary.json").read_text())
    assert summary["examples"] == len(rows) and summary["tokens"] == sum(row["tokens"] for row in rows.values())
    assert 0 < summary["cut_by_length"] == sum(not row["ended"] for row in rows.values()) < len(rows)
    assert summary["same_tokens_share"] == sum(row["same_tokens"] for row in rows.values()) / len(rows)
    assert summary["skipped"] == {reason: list(skipped.values()).count(reason) for reason in set(skipped.values())}
    assert {path.name for path in (tmp_path / "own/shard-0-of-1").iterdir()} >= {"cmd.txt", "config.json", "manifest.json"}
    flags = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert flags == ["--dataset", "ultrachat", "--dataset_path", str(tmp_path / "own")]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_read_as_the_split_that_they_came_from(command, tmp_path, split):
    assert command("own", split=split) == 0
    whole, other = ("test", "train") if split == "test" else ("train", "test")
    stream = open_stream("ultrachat", whole, str(tmp_path / "own"))
    read = list(stream.rest_of_epoch())
    rows = rows_of(tmp_path / "own")
    share = round(0.9 * len(rows)) if split == "train" else len(rows)  # of training rows, the loader holds some out
    assert len(read) == share and not stream.skipped  # the records beside the rows are no rows
    answers = {row["messages"][-1]["content"].strip() for row in rows.values()}
    assert {example["messages"][-1]["content"] for example in read} <= answers
    if split == "test":
        with pytest.raises(UserError, match="no rows for the train split"):
            open_stream("ultrachat", other, str(tmp_path / "own"))


def test_texts_do_not_depend_on_batches_or_processes(command, tmp_path):
    for name, changes in {"four": {}, "one": {"batch_size": 1}, "seven": {"batch_size": 7}}.items():
        assert command(name, **changes) == 0
    for rank in range(3):
        assert command("shards", shard=(rank, 3)) == 0
        assert {index % 3 for index in rows_of(tmp_path / "shards")} == set(range(rank + 1))
    expected = rows_of(tmp_path / "four")
    assert len(expected) > NUM_EXAMPLES / 2
    for name in ("one", "seven", "shards"):
        assert rows_of(tmp_path / name) == expected
    assert command("other", seed=1) == 0
    assert [row["messages"] for row in rows_of(tmp_path / "other").values()] != [row["messages"] for row in expected.values()]


def test_a_killed_run_continues_to_the_same_bytes(command, tmp_path):
    assert command("whole") == 0
    expected = result(tmp_path / "whole")
    rows, skipped = expected["train-0-of-1.jsonl"], expected["skipped.jsonl"]
    assert skipped and set(expected) == {"train-0-of-1.jsonl", "skipped.jsonl", "summary.json"}
    draw, first_end = random.Random(0), rows.index(b"\n")
    cuts = [(0, 0), (first_end, len(skipped)), (first_end + 1, 0), (len(rows) - 1, len(skipped)), (len(rows), len(skipped) - 3)]
    cuts += [(draw.randrange(len(rows)), draw.choice((len(skipped), draw.randrange(len(skipped))))) for _ in range(6)]
    for rows_end, skipped_end in cuts:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "killed")
        config = tmp_path / "killed/shard-0-of-1/config.json"
        config.write_text(config.read_text().replace(str(tmp_path / "whole"), str(tmp_path / "killed")))
        (tmp_path / "killed/shard-0-of-1/summary.json").unlink()
        os.truncate(tmp_path / "killed/train-0-of-1.jsonl", rows_end)
        os.truncate(tmp_path / "killed/shard-0-of-1/skipped.jsonl", skipped_end)
        assert command("killed", "--resume") == 0
        found = result(tmp_path / "killed")
        assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole"), f"cut at {rows_end} and {skipped_end}"
        assert (found["train-0-of-1.jsonl"], found["summary.json"]) == (rows, expected["summary.json"]), f"cut at {rows_end} and {skipped_end}"
        assert sorted(found["skipped.jsonl"].splitlines()) == sorted(skipped.splitlines())


def test_only_what_is_missing_is_decoded(command, tmp_path, monkeypatch):
    calls = []

    def decode(target, prompts, options, **keys):
        calls.append(keys["prompt_ids"])
        return GENERATE_BATCH(target, prompts, options, **keys)

    GENERATE_BATCH = generate_dataset.generate_batch
    monkeypatch.setattr(generate_dataset, "generate_batch", decode)
    assert command("own", "--resume") == 0
    batches = list(calls)
    assert len(batches) == -(-NUM_EXAMPLES // 4) and sorted(sum(batches, [])) == list(range(NUM_EXAMPLES))
    calls.clear()
    expected = result(tmp_path / "own")
    assert command("own", "--resume") == 0 and calls == [] and result(tmp_path / "own") == expected
    os.truncate(tmp_path / "own/train-0-of-1.jsonl", len(expected["train-0-of-1.jsonl"]) - 1)
    assert command("own", "--resume") == 0
    assert len(calls) == 1 and calls[0] in batches[-2:] and result(tmp_path / "own") == expected


def test_a_signal_ends_the_run_after_its_batch(command, tmp_path, monkeypatch, capsys):
    GENERATE_BATCH = generate_dataset.generate_batch

    def decode(*arguments, **keys):
        os.kill(os.getpid(), signal.SIGTERM)
        return GENERATE_BATCH(*arguments, **keys)

    assert command("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(generate_dataset, "generate_batch", decode)
        assert command("stopped") == 128 + signal.SIGTERM
    assert "continue with the same command and --resume" in capsys.readouterr().err
    first = (tmp_path / "stopped/train-0-of-1.jsonl").read_bytes()
    assert 0 < len(first.splitlines()) <= 4
    assert command("stopped", "--resume") == 0 and result(tmp_path / "stopped") == result(tmp_path / "whole")


def test_plain_text_is_continued(command, tmp_path, tokenizer, capsys):
    texts = [f"Ada has {number} apples and finds 7 more. The quick brown fox jumps over the lazy dog." for number in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["Hi.", *texts]))
    assert command("own", dataset="c4", dataset_path=tmp_path / "texts.jsonl", num_examples=19, prompt_length=10) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"--dataset slim_pj --dataset_path {tmp_path / 'own'}"
    rows = rows_of(tmp_path / "own")
    starts = {tokenizer.decode(tokenizer(text)["input_ids"][:10], skip_special_tokens=True) for text in texts}
    assert all(any(row["text"].startswith(start) and row["text"] != start for start in starts) for row in rows.values()) and len(rows) > 8
    summary = json.loads((tmp_path / "own/shard-0-of-1/summary.json").read_text())
    assert summary["skipped"]["with fewer than 10 tokens"] == 1
    assert len(list(open_stream("slim_pj", "train", str(tmp_path / "own")).rest_of_epoch())) == round(0.9 * len(rows))


def test_prompts_that_fill_the_context_are_skipped(command, tmp_path, capsys):
    def chats(lengths: list[int]) -> str:
        turns = ([{"role": "user", "content": f"{i} " + "word " * count}, {"role": "assistant", "content": "Yes."}] for i, count in enumerate(lengths))
        return "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)

    (tmp_path / "train.jsonl").write_text(chats([2] * 19 + [400]))
    assert command("own", dataset="ultrachat", dataset_path=tmp_path / "train.jsonl", num_examples=18, max_new_tokens=300) == 0
    stream = open_stream("ultrachat", "train", str(tmp_path / "train.jsonl"))
    too_long = sum(len(example["messages"][0]["content"]) > 100 for example in stream.rest_of_epoch())
    summary = json.loads((tmp_path / "own/shard-0-of-1/summary.json").read_text())
    assert summary["skipped"].get("with a prompt of more than 212 tokens", 0) == too_long
    (tmp_path / "train.jsonl").write_text(chats([400] * 20))
    assert command("none", dataset="ultrachat", dataset_path=tmp_path / "train.jsonl", num_examples=18, max_new_tokens=300) == 2
    check_one_line(capsys, r"no row to write; 18 rows skipped \(18 with a prompt of more than 212 tokens\)")


def test_a_row_says_whether_its_tokens_are_read_again(tokenizer):
    example = {"messages": [{"role": "user", "content": "An example, please."}, {"role": "assistant", "content": "No."}]}
    prompt = Prompt(5, example, encode_prompt(tokenizer, example))
    end, answer = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer("apples", add_special_tokens=False)["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "apples"]
    assert answer != letters

    def kept(tokens, eos_ids=frozenset({1, end}), prompt=prompt):
        row = make_row(tokenizer, prompt, tokens, eos_ids)
        return row.get("messages", [row.get("text")])[-1], row["ended"], row["same_tokens"]

    message = {"role": "assistant", "content": "apples"}
    assert kept([*answer, end]) == (message, True, True)
    assert kept(answer) == (message, False, True)
    assert kept([*letters, end]) == (message, True, False)  # another way to write the same text
    assert kept([*answer, 1]) == (message, True, False)  # ended otherwise than the chat template ends an answer
    spaced = tokenizer(" apples", add_special_tokens=False)["input_ids"]
    assert kept([*spaced, end]) == ({**message, "content": " apples"}, True, False)  # the loader strips it
    text = Prompt(5, {"text": "Ada has apples"}, tokenizer("Ada has")["input_ids"])
    assert kept([*spaced, 1], prompt=text) == ("Ada has apples", True, True)
    assert kept([*tokenizer(" ", add_special_tokens=False)["input_ids"], *letters], prompt=text) == ("Ada has apples", False, False)
    blank = tokenizer(" ", add_special_tokens=False)["input_ids"]
    for tokens, reason in (([end], "empty"), ([*blank, end], "empty"), ([*answer, 4, *answer, end], "special token")):
        with pytest.raises(SkipRow, match=reason):
            kept(tokens)
    waiting = Prompt(5, {"messages": example["messages"][:1]}, prompt.ids)  # MT-Bench's form: nothing to replace
    assert kept([*answer, end], prompt=waiting) == (message, True, True)


def test_reading_flags_keep_what_the_data_set_learns():
    assert reading_flags({"messages": [], "loss_on": "assistant"}, "my runs/own") == "--dataset ultrachat --dataset_path 'my runs/own' --loss_on assistant"


def test_a_folder_holds_one_run(command, tmp_path, capsys):
    assert command("own", shard=(0, 2)) == 0
    for switches, changes, message in (
        ([], {"shard": (0, 2)}, "holds shard 0-of-2 already; .* continue it with --resume"),
        (["--resume"], {"shard": (0, 2), "temperature": 0.5}, r"other settings \(--temperature 1.0 -> 0.5\)"),
        (["--resume"], {"shard": (0, 2), "batch_size": 5}, "--batch_size 4 -> 5"),
        ([], {"shard": (1, 2), "seed": 7}, "--seed 0 -> 7"),
        ([], {}, "WORLD_SIZE 2 -> 1"),
    ):
        assert command("own", *switches, **changes) == 2
        check_one_line(capsys, message)
    assert command("own", shard=(1, 2)) == 0
    shutil.rmtree(tmp_path / "own/shard-0-of-2")
    assert command("own", "--resume", shard=(0, 2)) == 2
    check_one_line(capsys, "does not say how it was made")


def test_another_target_or_other_data_are_other_settings(command, model_path, tiny_target_path, tmp_path, capsys):
    rows = [json.dumps({"question": f"{number} and 1?", "answer": str(number + 1)}) for number in range(20)]
    moving, data = tmp_path / "moving", tmp_path / "train.jsonl"
    shutil.copytree(model_path, moving)
    data.write_text("\n".join(rows))
    changes = {"model_path": moving, "dataset_path": data, "num_examples": 5}
    assert command("own", **changes) == 0
    data.write_text("\n".join(reversed(rows)))
    assert command("own", "--resume", **changes) == 2
    check_one_line(capsys, "data .*sha256.* -> ")
    data.write_text("\n".join(rows))
    tiny_llama(seed=1, vocab_size=json.loads((moving / "config.json").read_text())["vocab_size"]).float().save_pretrained(moving)
    assert command("own", "--resume", **changes) == 2
    check_one_line(capsys, "target_hash .* -> ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 0}, "--num_examples 0: must be at least 1"),
        ({"num_examples": 12_001}, "--num_examples 12001: the train split of arithmetic has 12000 rows"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"max_new_tokens": 512}, "--max_new_tokens 512: the context of .* is 512"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"temperature": -1}, "--temperature -1.0 must be 0 "),
        ({"top_p": 0}, "--top_p 0.0 must lie between"),
        ({"dataset": "arithmetics"}, "unknown data set 'arithmetics': choose one of"),
        ({"dataset": "mt_bench"}, "its prompts are measured with, and nothing is learned from them"),
        ({"dataset_path": "/no/such/file"}, "--dataset_path /no/such/file: no data there"),
        ({"split": "all"}, "invalid choice: 'all'"),
        ({"model_path": "/no/such/model"}, "no model at /no/such/model"),
        ({"shard": (2, 2)}, "RANK=2 WORLD_SIZE=2: must be numbers"),
        ({"shard": (1, None)}, "RANK=1 WORLD_SIZE=1"),
        ({"shard": ("a", 2)}, "RANK=a WORLD_SIZE=2"),
    ],
)
def test_mistakes_get_one_line(command, capsys, changes, message):
    assert command("own", **changes) == 2
    check_one_line(capsys, message)


def test_a_target_that_cannot_decode_in_batches_gets_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr(generate_dataset, "why_unsupported", lambda model: "quantised layers")
    assert command("own") == 2
    check_one_line(capsys, "--batch_size 4: .* quantised layers; use --batch_size 1")
    assert command("alone", batch_size=1, num_examples=2) == 0


def test_a_log_file_gets_a_line_per_interval(command, monkeypatch, capsys):
    monkeypatch.setattr(generate_dataset, "PROGRESS_EVERY_S", 0)
    assert command("own", num_examples=10) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("example ")]
    assert [line.split(",")[0] for line in lines] == ["example 4/10", "example 8/10", "example 10/10"]
    assert all(line.endswith(" tokens/s") for line in lines)

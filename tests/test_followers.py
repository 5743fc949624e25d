"""The follower table against counts made by hand and by a plain loop, its file's refusals, and the command that builds it."""

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

from running.command_line import UserError

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from commands import build_followers
from data.registry import open_stream
from data_utils import encode_example
from measuring import followers
from measuring.followers import FORMAT, Followers, count_followers, load_followers, save_followers
from models.target_model import tokenizer_hash
from test_commands import check_one_line, run_main

TEXTS = [[0, 3, 0, 1, 0, 3], [], [5], [0, 1, 0, 2, 1, 1], [4, 0]]  # after 0: 3 3 1 1 2; after 1: 0 0 1; after 2: 1; after 3: 0; after 4: 0


def plain_table(texts: list[list[int]], vocab_size: int, width: int, least: int) -> list[list[int]]:
    """What `count_followers` returns, by a loop over all tokens."""
    counts = Counter(pair for text in texts for pair in pairwise(text))
    rows = [sorted((-count, u) for (t, u), count in counts.items() if t == token and count >= least) for token in range(vocab_size)]
    return [[u for _, u in row[:width]] + [-1] * (width - len(row)) for row in rows]


def random_texts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    """80 texts of 0 to 59 tokens, low ids often and the highest never."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(60, (80,), generator=generator).tolist()
    return [((vocab_size - 1) * torch.rand(length, generator=generator) ** 3).long().tolist() for length in lengths]


# ---- counting ----

@pytest.mark.parametrize(
    ("width", "least", "expected"),
    [
        (4, 1, [[1, 3, 2, -1], [0, 1, -1, -1], [1, -1, -1, -1], [0, -1, -1, -1], [0, -1, -1, -1], [-1] * 4, [-1] * 4]),
        (1, 1, [[1], [0], [1], [0], [0], [-1], [-1]]),
        (2, 2, [[1, 3], [0, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]),
        (2, 3, [[-1, -1]] * 7),
    ],
)
def test_counts_made_by_hand(width, least, expected):
    table = count_followers(TEXTS, 7, width, least)
    assert table.dtype == torch.int64 and table.tolist() == expected
    assert plain_table(TEXTS, 7, width, least) == expected


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100, followers.CHUNK_TOKENS])
def test_chunks_make_no_difference(monkeypatch, chunk_tokens):
    monkeypatch.setattr(followers, "CHUNK_TOKENS", chunk_tokens)
    texts = random_texts(30)
    assert count_followers(iter(texts), 30, 5, 2).tolist() == plain_table(texts, 30, 5, 2)


def test_a_large_vocabulary_needs_no_square_of_it():
    last = 2**31  # V² is 2^62: the largest pair codes still fit
    codes = followers._pair_codes([torch.tensor([last - 1, last - 2])], last)
    assert codes.tolist() == [(last - 1) * last + last - 2]
    table = count_followers([[127_999, 5, 127_999, 5]], 128_000, 2, 2)
    assert table[127_999].tolist() == [5, -1] and (table >= 0).sum() == 1


def test_nothing_to_count_is_an_empty_table():
    assert count_followers([], 3, 2, 1).tolist() == count_followers([[], [2]], 3, 2, 1).tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(ValueError, match="in a vocabulary of 7"):
        count_followers([*TEXTS, [1, wrong]], 7, 2, 1)


# ---- the file ----

@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A table of the session's tokenizer."""
    path, table = tmp_path / "table.safetensors", count_followers(TEXTS, len(tokenizer), 3, 1)
    save_followers(path, Followers(table, tokenizer_hash(tokenizer), {"model_path": "ada/llama", "tokens": 14}))
    return path


def test_file_holds_all_and_leaves_nothing_beside_it(saved, tokenizer):
    loaded = load_followers(str(saved), tokenizer)
    assert loaded.table.equal(count_followers(TEXTS, len(tokenizer), 3, 1)) and loaded.tokenizer_hash == tokenizer_hash(tokenizer)
    assert loaded.provenance == {"model_path": "ada/llama", "tokens": 14}
    assert list(saved.parent.iterdir()) == [saved]


def test_another_tokenizer_is_refused(saved, tiny_target_path):
    other = PreTrainedTokenizerFast.from_pretrained(tiny_target_path)
    other.add_tokens(["<|new|>"])
    command = f"python -m commands.build_followers --model_path {tiny_target_path} .*{tokenizer_hash(other)}"
    message = rf"belongs to another tokenizer \(of ada/llama; .* build one: {command}"
    with pytest.raises(UserError, match=message):
        load_followers(saved, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no follower table at .*; build it: python -m commands.build_followers"),
        (b"", "is broken or no .safetensors file .*; give a table's path, or build one: python"),
        (b'{"table": [[1, 2]]}', "is broken or no .safetensors file"),
    ],
)
def test_other_content_is_refused(tmp_path, tokenizer, content, message):
    path = tmp_path / "table.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_followers(path, tokenizer)
    assert "\n" not in str(error.value)


def test_a_torn_file_is_refused(saved, tokenizer):
    saved.write_bytes(saved.read_bytes()[:-40])
    with pytest.raises(UserError, match="is broken or no .safetensors file"):
        load_followers(saved, tokenizer)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("table", None, "is not a follower table \\(format None, expected 'followers-1'\\)"),
        ("table", {"format": "early-exit-1"}, "is not a follower table \\(format 'early-exit-1'"),
        ("table", {"format": FORMAT}, "header cannot be read \\('info'\\)"),
        ("table", {"format": FORMAT, "info": "{"}, "header cannot be read"),
        ("table", {"format": FORMAT, "info": '{"hash": 0}'}, "header cannot be read"),
        ("weights", {"format": FORMAT, "info": "{}"}, "header cannot be read \\('table'\\)"),
    ],
)
def test_foreign_files_are_refused(tmp_path, tokenizer, name, metadata, message):
    path = tmp_path / "foreign.safetensors"
    save_file({name: torch.zeros(2, 2)}, path, metadata=metadata)
    with pytest.raises(UserError, match=f"{message}.*; give a table's path, or build one"):
        load_followers(path, tokenizer)


# ---- the command ----

def build_arguments(model: Path, out: Path, **changes: object) -> list[str]:
    flags = {"model_path": model, "dataset": "arithmetic", "max_examples": 20, "followers": 3, "out": out, **changes}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def test_command_counts_the_train_split(tiny_target_path, tmp_path, monkeypatch, capsys, tokenizer):
    out = tmp_path / "new" / "table.safetensors"
    assert run_main(build_followers, build_arguments(tiny_target_path, out), monkeypatch) == 0
    stream = open_stream("arithmetic", "train")
    texts = [encode_example(tokenizer, example).input_ids for example in islice(stream.rest_of_epoch(), 20)]
    expected, tokens = plain_table(texts, len(tokenizer), 3, 2), sum(map(len, texts))
    loaded = load_followers(out, tokenizer)
    assert loaded.table.tolist() == expected
    counted = {"dataset": "arithmetic", "rows": stream.num_rows, "split": "train", "examples": 20, "tokens": tokens, "min_count": 2}
    assert loaded.provenance.items() >= counted.items() and loaded.provenance.keys() - counted.keys() == {"model_path", "sha256"}
    share = sum(max(row) >= 0 for row in expected) / len(expected)
    summary, path = capsys.readouterr().out.splitlines()
    assert path == str(out) and f"{tokens:,} tokens of 20 examples" in summary and f"{share:.1%} hold a follower" in summary


def test_table_has_a_row_for_every_id_that_the_target_can_write(tiny_target_path, tmp_path, monkeypatch):
    """Embeddings are padded to round sizes: the target can write ids that its tokenizer lacks."""
    padded = tmp_path / "padded"
    padded.mkdir()
    for file in tiny_target_path.iterdir():
        (padded / file.name).write_bytes(file.read_bytes())
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    for model in (padded, tiny_target_path):
        assert run_main(build_followers, build_arguments(model, tmp_path / f"{model.name}.safetensors"), monkeypatch) == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(padded)
    small, large = (load_followers(tmp_path / f"{name}.safetensors", tokenizer).table for name in (tiny_target_path.name, "padded"))
    assert len(large) == len(small) + 64 == config["vocab_size"] + 64
    assert large[: len(small)].equal(small) and (large[len(small) :] == -1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"followers": 0}, "--followers 0: must be at least 1"),
        ({"min_count": 0}, "--min_count 0: must be at least 1"),
        ({"max_examples": 0}, "--max_examples 0: must be at least 1"),
        ({"out": "table.json"}, "--out table.json: must end in .safetensors"),
        ({"dataset": "arithmetics"}, "unknown data set 'arithmetics': choose one of arithmetic"),
        ({"dataset": "mt_bench"}, "--dataset mt_bench: .* choose another data set"),
        ({"dataset_path": "/no/such/file.jsonl"}, "--dataset_path /no/such/file.jsonl: no data there"),
        ({"model_path": "/no/such/model"}, "no model at /no/such/model"),
        ({"min_count": 100_000}, "--min_count 100000: no pair of tokens occurs that often in 20 examples; lower it or raise --max_examples"),
        ({"wide": 1}, "unknown argument --wide"),
    ],
)
def test_mistakes_get_one_line_and_leave_no_file(tiny_target_path, tmp_path, monkeypatch, capsys, changes, message):
    flags = {"out": tmp_path / "table.safetensors", **changes}
    assert run_main(build_followers, build_arguments(tiny_target_path, **flags), monkeypatch) == 2
    check_one_line(capsys, message)
    assert not list(tmp_path.iterdir())


def test_unusable_rows_get_one_line(tiny_target_path, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"other": 1}\n' * 40)
    assert run_main(build_followers, build_arguments(tiny_target_path, tmp_path / "out.safetensors", dataset_path=rows), monkeypatch) == 2
    check_one_line(capsys, "--dataset arithmetic: no usable example; 36 rows skipped")


def test_a_table_is_never_written_over(tiny_target_path, tmp_path, monkeypatch, capsys):
    out = tmp_path / "table.safetensors"
    out.write_bytes(b"precious")
    monkeypatch.setattr(build_followers, "open_stream", lambda *_: pytest.fail("data were opened before the output was checked"))
    assert run_main(build_followers, build_arguments(tiny_target_path, out), monkeypatch) == 2
    check_one_line(capsys, "table.safetensors exists already and is not written over; choose another --out")
    assert out.read_bytes() == b"precious"

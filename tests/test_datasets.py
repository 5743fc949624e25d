"""Rows and where they come from: forms, dirty rows, splits, files, hub streams, and the two generated data sets."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

from running.command_line import UserError

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from data import arithmetic, pydoc_texts
from data.registry import DATASETS, fingerprint, open_stream
from data.row_files import SPLITS, ExampleStream, MixedStream, TextDataset, describe_skipped, open_rows, parse_text, split_of
from data_utils import encode_example
from xsum_dataset import MAX_DOCUMENT_CHARS

ULTRACHAT = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
SHARE_GPT = {"id": "a_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
QUESTION = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2.\n#### 2"}
TEXT = {"text": "The quick brown fox.", "id": "<urn:uuid:1>"}
LMSYS = {
    "conversation_id": "33f741fed8fc4ef2a7d6a3ad4ed8e9d0", "model": "vicuna-33b", "turn": 1, "language": "English", "redacted": False,
    "conversation": [{"content": "Hi", "role": "user"}, {"content": "Hello.", "role": "assistant"}],
    "openai_moderation": [{"categories": {"hate": False}, "category_scores": {"hate": 1e-05}, "flagged": False}] * 2,
}


def message(id_: str, parent: str | None, text: str, rank: int | None = None, **changes: object) -> dict:
    """One row of OpenAssistant: a prompter's where `id_` has an odd number of letters ("r", "rab"), else an assistant's."""
    return {
        "message_id": id_, "parent_id": parent, "user_id": "u", "text": text, "role": "prompter" if len(id_) % 2 else "assistant", "lang": "en",
        "review_count": 3, "review_result": True, "deleted": False, "rank": rank, "message_tree_id": id_[0], "tree_state": "ready_for_export",
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]}, **changes,
    }


FORMS = {
    "oasst": message("r", None, "Hi"), "lmsys": LMSYS,
    "ultrachat": ULTRACHAT, "pydoc": ULTRACHAT, "share_gpt": SHARE_GPT, "gsm8k": QUESTION, "arithmetic": QUESTION, "slim_pj": TEXT, "fineweb": TEXT,
    "xsum": {"document": "It rained. It rained more.", "summary": "It rained.", "id": "1"},
    "cnn": {"article": "LONDON, England (CNN) -- It rained. It rained more.", "highlights": "It rained .\nMore rain is due .", "id": "42c027e4"},
    "openwebtext": {"text": "The quick brown fox.\n\nIt jumped."},
    "c4": {"text": "The quick brown fox.\nIt jumped.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://fox.com/quick/"},
    "shapes": {"scene": [{"place": "top left", "size": "large", "colour": "red", "shape": "ring"}], "seed": 3, "turns": [["What do you see?", "A large red ring."]]},
    "llava_instruct": {"id": "1", "image": "x.jpg", "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A bus."}]},
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Now a shorter one."]},
}


def form_rows(name: str, count: int) -> list[dict]:
    """Rows of `count` different examples of the data set's form."""
    if name != "oasst":
        return [numbered(FORMS[name], i) for i in range(count)]
    trees = [[message(f"{i:03}", None, f"Hi {i}"), message(f"{i:03}a", f"{i:03}", "Hello.")] for i in range(count)]
    return [row for tree in trees for row in tree]


def numbered(value: object, number: int) -> object:
    """A row with a number behind each of its sentences, which begin with a capital letter."""
    if isinstance(value, str):
        return f"{value} {number}" if value[:1].isupper() and value != "English" else value
    if isinstance(value, list):
        return [numbered(part, number) for part in value]
    return {key: numbered(part, number) for key, part in value.items()} if isinstance(value, dict) else value


def write_arrow(path: Path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "rows.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "rows.arrow": write_arrow,
}


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts(stream: ExampleStream) -> list[str]:
    return [example["text"] for example in stream.rest_of_epoch()]


# ---- forms ----

def test_every_data_set_has_a_form_here():
    assert FORMS.keys() == DATASETS.keys()
    assert all(dataset.make_rows is not None or dataset.hub_splits.keys() == set(SPLITS) for dataset in DATASETS.values())


@pytest.mark.parametrize("file_name", WRITERS)
@pytest.mark.parametrize("name", FORMS)
def test_form_loads_from_every_file_type(name, file_name, tmp_path, tokenizer):
    WRITERS[file_name](tmp_path / file_name, form_rows(name, 20))
    stream = open_stream(name, "test" if name == "mt_bench" else "train", str(tmp_path / file_name))
    examples = list(stream.rest_of_epoch())
    assert len(examples) == (20 if name == "mt_bench" else 18) and not stream.skipped
    assert len(encode_example(tokenizer, examples[0]).input_ids) > 5
    assert fingerprint(stream)["rows"] == len(examples)


def test_mt_bench_takes_the_first_turn_of_both_forms_and_is_never_cut(tmp_path):
    path = write_jsonl(tmp_path / "question.jsonl", [{"turns": ["One?", "Two?"]}, {"prompt": ["Three?"]}, {"turns": []}, {"prompt": "Four?"}])
    for split in ("validation", "test"):
        stream = open_stream("mt_bench", split, path, shuffle=False)
        assert [example["messages"] for example in stream.rest_of_epoch()] == [[{"role": "user", "content": text}] for text in ("One?", "Three?")]
        assert stream.skipped == {"without turns": 2}


def test_xsum_cuts_the_article_not_the_summary_and_asks_for_loss_on_the_answer(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"document": "word " * 2000, "summary": "Words."}] * 3)
    example = next(iter(open_stream("xsum", "train", path)))
    question, answer = (message["content"] for message in example["messages"])
    assert len(question) < MAX_DOCUMENT_CHARS + 60 and question.endswith(" word") and answer == "Words."
    assert example["loss_on"] == "assistant"


def test_cnn_is_the_whole_article_and_nothing_of_its_highlights(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{**FORMS["cnn"], "article": "word " * 2000}])
    assert list(open_stream("cnn", "train", path).rest_of_epoch()) == [{"text": "word " * 2000}]


@pytest.mark.parametrize(("name", "column"), [("cnn", "article"), ("openwebtext", "text"), ("c4", "text")])
def test_rows_without_their_text_are_counted(name, column):
    good = FORMS[name]
    bad = [{**good, column: value} for value in (None, "", " \n", 7, ["word"])] + [{key: good[key] for key in good if key != column}]
    stream = ExampleStream(DATASETS[name], [*bad, None, good], seed=0)
    assert list(stream.rest_of_epoch()) == [{"text": good[column]}]
    assert stream.skipped == {f"without {column}": 6, "that are not objects": 1}


def test_dirty_share_gpt_rows_are_counted_by_reason(tmp_path):
    human, gpt = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
    usable = [
        [gpt, human, gpt],
        [{"from": "system", "value": "Be kind."}, human, gpt, human],
        [{"from": "system", "value": " "}, human, {"from": "bing", "value": "Hello."}],
        {"from": ["human", "gpt"], "value": ["Hi", "Hello."]},
        [{"from": "human", "value": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, gpt],
    ]
    unusable = {
        "without a list of turns": [None, "human: Hi", [], 7],
        "with a broken turn": [["Hi"], [{"from": "human", "value": None}, gpt], [{"from": ["human"], "value": "Hi"}, gpt],
                               {"from": ["human"], "value": []}, {"from": ["human"]}, [{**human, "value": [{"type": "text", "text": 1}]}, gpt]],
        "with a part of type 'image_url'": [[{**human, "value": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "a.png"}}]}, gpt]],
        "with a turn that only calls a tool": [[human, {"from": "gpt", "value": None, "tool_calls": [{"function": {"name": "add"}}]}]],
        "with a turn of role 'tool'": [[human, {"from": "tool", "value": "{}"}, gpt]],
        "whose turns do not alternate": [[human, human, gpt], [human, gpt, gpt], [human, gpt, {"from": "system", "value": "Be kind."}, gpt]],
        "with an empty turn": [[{"from": "human", "value": " \n"}, gpt], [human, {"from": "gpt", "value": ""}]],
        "without a question and its answer": [[gpt], [human], [{"from": "system", "value": "Be kind."}]],
    }
    rows = [{"conversations": turns} for turns in usable + [turns for group in unusable.values() for turns in group]]
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"items": []}, None, "text", [1]])
    for split in ("validation", "test"):  # with a file of its own, so that none is cut; what is unusable there, too, is counted all the same
        write_jsonl(tmp_path / f"{split}.jsonl", [{"conversations": [{**human, "value": split}, gpt]}, *rows[len(usable) :]])

    stream = open_stream("share_gpt", "train", str(tmp_path), shuffle=False)
    chats = [[(m["role"], m["content"]) for m in example["messages"]] for example in stream.rest_of_epoch()]
    exchange = [("user", "Hi"), ("assistant", "Hello.")]
    assert chats == [exchange, [("system", "Be kind."), *exchange], exchange, exchange, exchange]
    expected = {reason: len(group) for reason, group in unusable.items()}
    expected["without a list of turns"] += 1
    assert stream.skipped == {**expected, "that are not objects": 3}
    assert describe_skipped(stream.skipped).startswith("25 rows skipped (6 ")


def test_parts_of_rows_that_are_not_read_are_told(capsys):
    """Tool definitions, as in glaive's rows, were left out without a word."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    calling = [*turns, {**turns[0]}, {**turns[1], "tool_calls": [{"function": {"name": "add"}}]}]
    rows = [{"conversations": turns, "tools": tools} for tools in ("[]", "", None, [], '[{"name": "add"}]', [{"name": "add"}])]
    rows += [{"conversations": turns, "system": "Be brief.", "messages": 7}, {"conversations": calling, "system": ""}, {"conversations": [], "tools": "[1]"}]
    stream = ExampleStream(DATASETS["share_gpt"], rows, 0)
    assert len(list(stream.rest_of_epoch())) == 8
    assert stream.unread == {"their tool definitions": 2, "their system prompt": 1, "their tool calls": 1}
    stream.tell_losses()
    assert ("share_gpt: 1 rows skipped (1 without a list of turns); 2 rows used without their tool definitions; 1 rows used without"
            in capsys.readouterr().err)
    mixed = MixedStream([stream, ExampleStream(DATASETS["gsm8k"], [], 0)], [1, 1], 0)
    assert "; 2 rows used without their tool definitions (of share_gpt); " in mixed.account()


def test_a_train_split_of_nothing_but_held_out_rows_says_so(tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "What is held out."}])
    with pytest.raises(UserError, match=r"no rows for the train split \(1 rows skipped \(1 that stand in the test or validation split, too\)\); give more rows"):
        open_rows(DATASETS["slim_pj"], "train", str(tmp_path))


def test_lmsys_skips_what_is_flagged_or_redacted_and_keeps_every_language():
    flagged = [{"flagged": False}, {"flagged": True}]
    bad = [{"openai_moderation": flagged}, {"redacted": True}, {"openai_moderation": flagged, "redacted": True}, {"conversation": []},
           {"conversation": [{"role": "tool", "content": "{}"}]}]
    odd = [{"openai_moderation": None}, {"openai_moderation": [None]}, {"language": "German"}]
    stream = ExampleStream(DATASETS["lmsys"], [{**LMSYS, **change} for change in [*bad, *odd]] + [None], seed=0)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert list(stream.rest_of_epoch()) == [{"messages": chat}] * len(odd)
    assert stream.skipped == {
        "flagged by the moderation": 2, "that are redacted": 1, "without a list of turns": 1, "with a turn of role 'tool'": 1, "that are not objects": 1,
    }


# ---- trees of messages ----

TREE = [  # a reply's name is its parent's and one more letter
    message("r", None, "Hi"),
    message("ra", "r", "Second best.", rank=1), message("rb", "r", "Best.", rank=0), message("rc", "r", "Nobody ranked this."),
    message("rax", "ra", "On a branch that is not followed"), message("raxy", "rax", "Nor is this"),
    message("rbx", "rb", "Liked most, but unanswered", rank=0), message("rby", "rb", "And?", rank=2), message("rbz", "rb", "Oh?", rank=1),
    message("rbya", "rby", "Less liked question"), message("rbza", "rbz", "First of equals."), message("rbzb", "rbz", "Second of equals."),
    message("rbzaq", "rbza", "A last word"),
]


def assembled_chats(rows: list) -> tuple[list[list[str]], dict]:
    """The texts of the dialogues in the message rows `rows`, in order, and what was skipped."""
    stream = ExampleStream(DATASETS["oasst"], DATASETS["oasst"].assemble(rows), seed=0, shuffle=False)
    examples = list(stream.rest_of_epoch())
    assert all([m["role"] for m in e["messages"]] == ["user", "assistant"] * (len(e["messages"]) // 2) for e in examples)
    return [[m["content"] for m in example["messages"]] for example in examples], dict(stream.skipped)


def test_tree_gives_its_best_dialogue_in_whatever_order_its_rows_come():
    best = ["Hi", "Best.", "Oh?", "First of equals."]
    assert assembled_chats(TREE) == ([best], {})
    others = [message("s", None, "Hallo", lang="de"), message("sa", "s", "Guten Tag.", lang="de")]
    for rows in ([others[1], *TREE[5:], others[0], *TREE[:5]], [*others, *TREE]):
        chats, skipped = assembled_chats(rows)
        assert sorted(chats) == [["Hallo", "Guten Tag."], best] and not skipped
    equals_first = assembled_chats(sorted(TREE, key=lambda row: row["message_id"], reverse=True))[0]
    assert equals_first == [[*best[:3], "Second of equals."]]  # neither is ranked: the order of the rows decides


def test_rows_without_their_empty_keys_are_whole():
    lean = [{name: value for name, value in row.items() if value is not None and name not in ("deleted", "review_result", "tree_state")} for row in TREE]
    assert assembled_chats(lean) == assembled_chats(TREE)


@pytest.mark.parametrize(("changed", "expected", "skipped"), [
    ({"rb": {"deleted": True}}, ["Hi", "Second best.", "On a branch that is not followed", "Nor is this"],
     {"that are deleted": 1, "whose parent is missing or cut": 3}),
    ({"rb": {"review_result": False}, "ra": {"review_result": False}}, ["Hi", "Nobody ranked this."],
     {"that review rejected": 2, "whose parent is missing or cut": 4}),
    ({"rb": {"review_result": None}}, ["Hi", "Best.", "Oh?", "First of equals."], {}),
    ({"rbza": {"deleted": True}, "rbzb": {"deleted": True}}, ["Hi", "Best.", "And?", "Less liked question"],
     {"that are deleted": 2, "whose parent is missing or cut": 1}),
    ({"r": {"deleted": True}}, None, {"that are deleted": 1, "whose parent is missing or cut": 3}),
    ({row["message_id"]: {"tree_state": "halted_by_moderator"} for row in TREE}, None, {"in a tree that is halted_by_moderator": 13}),
    ({"rb": {"text": None}}, ["Hi", "Second best.", "On a branch that is not followed", "Nor is this"],
     {"without message_id, role and text": 1, "whose parent is missing or cut": 3}),
    ({"rb": {"role": "prompter"}}, None, {"whose turns do not alternate": 1}),
    ({"rb": {"role": "oracle"}}, None, {"with a turn of role 'oracle'": 1}),
])
def test_cut_messages_end_their_branch_and_are_counted_by_reason(changed, expected, skipped):
    chats, found = assembled_chats([{**row, **changed.get(row["message_id"], {})} for row in TREE])
    assert (chats, found) == ([] if expected is None else [expected], skipped)


def test_broken_message_rows_are_counted():
    rows = [None, [1], {"prompt": {}}, TREE[0], *TREE, message("t", "t", "Its own parent"), message("uv", "u", "Without a parent")]
    chats, skipped = assembled_chats(rows)
    assert len(chats) == 1
    assert skipped == {"that are not objects": 2, "without message_id, role and text": 1, "that came before": 1, "whose parent is missing or cut": 1}


def test_trees_are_never_torn_between_splits(tmp_path, monkeypatch):
    rows = form_rows("oasst", 40)
    apart = rows[::2] + rows[1::2]  # all roots, then all answers
    path = write_jsonl(tmp_path / "rows.jsonl", apart)
    served = {"train": apart, "validation": [{**row, "text": "held out"} for row in apart]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, streaming, **__: datasets.Dataset.from_list(served[split]))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "README.md")
    for place, sizes in ((path, (36, 2, 2)), (None, (40, 20, 20))):
        streams = {split: open_stream("oasst1", split, place) for split in SPLITS}
        found = {split: list(stream.rest_of_epoch()) for split, stream in streams.items()}
        assert tuple(map(len, found.values())) == sizes and not any(stream.skipped for stream in streams.values())
        assert all(len(example["messages"]) == 2 for examples in found.values() for example in examples)
    assert {example["messages"][0]["content"] for split in ("validation", "test") for example in found[split]} == {"held out"}
    ids = [row["thread"][0]["message_id"] for split in ("validation", "test") for row in open_rows(DATASETS["oasst"], split)]
    assert len(set(ids)) == 40


# ---- files and splits ----

def test_broken_jsonl_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\nnonsense\n')
    with pytest.raises(UserError, match=r"2 lines are not JSON, the first is line 3 .*sed -i '3d'"):
        open_rows(DATASETS["slim_pj"], "train", str(path))


@pytest.mark.parametrize(("file_name", "content", "message"), [
    ("rows.json", "7", "holds a int"),
    ("rows.json", '"text"', "holds a str"),
    ("rows.json", '{"data": {"text": "a"}}', "holds a dict"),
    ("rows.json", '{"text": "a"}\n{"text": "b"}', "must be named .jsonl"),
    ("rows.json", "[]", "no rows for the train split"),
    ("rows.jsonl", "", "no rows for the train split"),
    ("rows.parquet", "no parquet", "not a parquet file"),
    ("rows.arrow", "no arrow", "not a arrow file"),
    ("rows.txt", "text", "no data there"),
])
def test_file_that_is_not_what_its_name_says(file_name, content, message, tmp_path):
    (tmp_path / file_name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_rows(DATASETS["slim_pj"], "train", str(tmp_path / file_name))


def test_json_may_hold_one_object_a_data_key_or_a_byte_order_mark(tmp_path):
    for content in ('[{"text": "a"}]', '{"data": [{"text": "a"}]}', '\ufeff[{"text": "a"}]', '{"text": "a"}'):
        (tmp_path / "train.json").write_text(content, encoding="utf-8")
        assert open_rows(DATASETS["slim_pj"], "train", str(tmp_path)) == [{"text": "a"}]


def test_saved_data_set_folder_is_read_without_its_json_files(tmp_path):
    rows = form_rows("fineweb", 20)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
    assert open_rows(DATASETS["fineweb"], "train", str(tmp_path)) == rows[:18]


@pytest.mark.parametrize(("files", "sizes"), [
    ({"rows": 40}, (36, 2, 2)),
    ({"train": 40}, (36, 2, 2)),
    ({"train": 40, "test": 7}, (38, 2, 7)),
    ({"train": 40, "val": 3, "test": 7}, (40, 3, 7)),
    ({"train-0": 40, "train-1": 5, "dev": 3, "test": 7}, (45, 3, 7)),
])
def test_local_splits_are_disjoint_and_lose_nothing(files, sizes, tmp_path):
    for name, count in files.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
    found = [texts(open_stream("slim_pj", split, str(tmp_path))) for split in SPLITS]
    assert tuple(map(len, found)) == sizes
    assert len({text for split in found for text in split}) == sum(files.values())


def chats_by_split(path: Path, name: str = "ultrachat") -> dict[str, list[str]]:
    """The first message of every example, by split."""
    return {split: [example["messages"][0]["content"] for example in open_stream(name, split, str(path), shuffle=False).rest_of_epoch()] for split in SPLITS}


def check_disjoint(found: dict[str, list[str]], sizes: tuple[int, ...]) -> None:
    assert tuple(map(len, found.values())) == sizes
    assert not set(found["train"]) & {*found["validation"], *found["test"]} and not set(found["validation"]) & set(found["test"])


def test_what_map_keeps_beside_a_saved_data_set_is_not_read(tmp_path):
    """100 rows used to become 180, of which the test split's 10 stood in train, too."""
    datasets.Dataset.from_list(form_rows("ultrachat", 100)).save_to_disk(tmp_path)
    datasets.load_from_disk(str(tmp_path)).map(lambda row: {"length": len(row["prompt"])})
    assert list(tmp_path.glob("cache-*.arrow"))
    check_disjoint(chats_by_split(tmp_path), (90, 5, 5))
    (tmp_path / "state.json").unlink()  # the same without the list of files
    check_disjoint(chats_by_split(tmp_path), (90, 5, 5))


def test_saved_data_set_is_read_by_its_own_list_of_files(tmp_path):
    datasets.Dataset.from_list(form_rows("ultrachat", 40)).save_to_disk(tmp_path, num_shards=3)
    write_arrow(tmp_path / "stray.arrow", form_rows("ultrachat", 99))
    check_disjoint(chats_by_split(tmp_path), (36, 2, 2))


def test_splits_of_a_saved_dict_are_its_own(tmp_path):
    rows = form_rows("ultrachat", 30)
    splits = {"train_sft": rows[:20], "test_sft": rows[20:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()}).save_to_disk(tmp_path)
    found = chats_by_split(tmp_path)
    check_disjoint(found, (19, 1, 10))
    assert found["test"] == [row["messages"][0]["content"] for row in rows[20:]]


@pytest.mark.parametrize("files", [
    {"data": range(40), "data_copy": range(40)},                     # a copied file
    {"train": range(60), "train_part2": range(20, 60)},              # parts that overlap
    {"train": range(40), "test": range(10, 30)},                     # held-out rows left in train
    {"train": range(40), "val": range(30, 50), "test": range(35, 45)},
])
def test_rows_in_two_splits_stay_held_out_and_are_counted(files, tmp_path):
    rows = [{**row, "id": str(i)} for i, row in enumerate(form_rows("ultrachat", 60))]
    for name, numbers in files.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{**rows[i], "file": name} for i in numbers])  # other columns do not make another chat
    found = chats_by_split(tmp_path)
    check_disjoint(found, tuple(map(len, found.values())))
    assert {chat for chats in found.values() for chat in chats} == {rows[i]["messages"][0]["content"] for numbers in files.values() for i in numbers}
    stream = open_stream("ultrachat", "train", str(tmp_path))
    left_out = stream.skipped["that stand in the test or validation split, too"]
    assert left_out > 0 and describe_skipped(stream.skipped) == f"{left_out} rows skipped ({left_out} that stand in the test or validation split, too)"


def test_half_a_character_is_counted(tmp_path):
    """Some exports cut emoji in two; json reads that, and tokenizers cannot."""
    rows = form_rows("ultrachat", 6)
    rows[1]["messages"][1]["content"] = "Hello \ud83d"
    path = write_jsonl(tmp_path / "train.jsonl", [*rows, {"messages": [{"role": "user", "content": "\udc00?"}, {"role": "assistant", "content": "No."}]}])
    stream = open_stream("ultrachat", "train", path, shuffle=False)
    assert len(list(stream.rest_of_epoch())) == 5 and stream.skipped == {"with half a character (a lone surrogate)": 1}  # the last row is cut away


@pytest.mark.parametrize(("name", "content", "message"), [
    ("rows.jsonl", '{"text": "a"}\n{"text": "d\xe9j\xe0 vu"}\n'.encode("latin1"), r"not UTF-8 at line 2 .*iconv -f latin1"),
    ("rows.json", '[\n{"text": "d\xe9j\xe0 vu"}]'.encode("latin1"), r"not UTF-8 at line 2 .*iconv -f latin1"),
    ("rows.jsonl", b"\x1f\x8b\x08\x00rest", r"holds gzip; unpack it with: gunzip .*rows.jsonl"),
    ("rows.json", b"\x1f\x8b\x08\x00rest", r"holds gzip; unpack it with: gunzip .*rows.json"),
    ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"holds UTF-16; convert it with: iconv -f utf-16"),
])
def test_bytes_that_are_no_text_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_rows(DATASETS["slim_pj"], "train", str(tmp_path / name))


def test_parquet_with_broken_text_is_one_line(tmp_path):
    column = pyarrow.array([b"ok", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet: not a parquet file"):
        open_rows(DATASETS["slim_pj"], "train", str(tmp_path / "rows.parquet"))


def test_what_cannot_be_opened_is_one_line_and_folders_are_no_files(tmp_path):
    (tmp_path / "inner.json").mkdir()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert open_rows(DATASETS["slim_pj"], "train", str(tmp_path)) == [{"text": "a"}]
    Path(path).unlink()
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"rows.jsonl: cannot be read \(No such file"):
        open_rows(DATASETS["slim_pj"], "train", str(tmp_path))


def test_nothing_is_learned_from_what_is_measured_with(tmp_path):
    path = write_jsonl(tmp_path / "question.jsonl", form_rows("mt_bench", 20))
    for place in (path, None):
        with pytest.raises(UserError, match="--dataset mt_bench: its prompts are measured with, and nothing is learned from them"):
            open_rows(DATASETS["mt_bench"], "train", place)


def test_held_out_file_alone_is_never_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", [TEXT] * 40)
    with pytest.raises(UserError, match="no rows for the train split; its files are named as another split's; rename them, or put train.jsonl beside them"):
        open_rows(DATASETS["slim_pj"], "train", path)


def test_file_without_a_split_beside_named_ones_is_an_error(tmp_path):
    for name in ("train", "test", "extra"):
        write_jsonl(tmp_path / f"{name}.jsonl", [TEXT])
    with pytest.raises(UserError, match="extra.jsonl is not"):
        open_rows(DATASETS["slim_pj"], "train", str(tmp_path))


def test_unknown_names_are_named():
    with pytest.raises(UserError, match="choose one of arithmetic, c4, cnn, fineweb, .*, xsum"):
        open_stream("ultrachat2", "train")
    with pytest.raises(UserError, match="choose one of train, validation, test"):
        open_stream("ultrachat", "dev")


# ---- streams ----

def take_and_resume(make_stream, before: int, after: int) -> tuple[list[dict], list[dict]]:
    """`before + after` examples in one go, and the last `after` from a stream that starts at the saved position."""
    whole = list(islice(iter(make_stream()), before + after))
    first, second = make_stream(), make_stream()
    list(islice(iter(first), before))
    second.position = dict(first.position)
    return whole[before:], list(islice(iter(second), after))


def hub_stream(rows: list[dict]) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)


def serve_hub(monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[dict]]) -> None:
    """Lets the hub hold `rows` by its own names of the splits."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: hub_stream(rows[split]))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "README.md")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("hub", [False, True])
def test_stream_resumes_exactly_at_any_position(hub, shuffle):
    rows = [{"text": str(i) if i % 4 else ""} for i in range(12)]

    def make_stream() -> ExampleStream:
        return ExampleStream(DATASETS["slim_pj"], hub_stream(rows) if hub else rows, seed=3, shuffle=shuffle)

    for before in range(0, 20, 1 if not hub else 3):  # 9 usable examples per epoch
        continued, resumed = take_and_resume(make_stream, before, 12)
        assert continued == resumed
    epoch = texts(make_stream())
    assert sorted(epoch) == sorted(row["text"] for row in rows if row["text"])
    assert (epoch == [row["text"] for row in rows if row["text"]]) is not shuffle


def test_finished_epochs_are_told_once_and_not_again_by_a_stream_that_goes_on_after_them(capsys):
    rows = [{"text": str(i) if i % 4 else ""} for i in range(1200)]  # 900 usable

    def make_stream() -> ExampleStream:
        return ExampleStream(DATASETS["slim_pj"], rows, seed=0)

    stream = make_stream()
    list(islice(iter(stream), 900))
    assert not capsys.readouterr().err
    list(islice(iter(stream), 1801))
    told = [f"slim_pj: epoch {epoch} ends after 1,200 rows; the data begin anew" for epoch in (1, 2, 3)]
    assert capsys.readouterr().err.splitlines() == told
    resumed = make_stream()
    resumed.position = dict(stream.position)
    list(islice(iter(resumed), 10))
    assert stream.position["epoch"] == 3 and not capsys.readouterr().err
    resumed.quiet = True
    list(islice(iter(resumed), 1000))
    assert resumed.position["epoch"] == 4 and not capsys.readouterr().err


@pytest.mark.parametrize("hub", [False, True])
def test_epochs_are_shuffled_differently(hub):
    rows = [{"text": str(i)} for i in range(30)]
    examples = [example["text"] for example in islice(ExampleStream(DATASETS["slim_pj"], hub_stream(rows) if hub else rows, seed=0), 60)]
    assert sorted(examples[:30]) == sorted(examples[30:]) and examples[:30] != examples[30:]


@pytest.mark.parametrize("rows", [[], [{"text": ""}] * 3, [None]])
@pytest.mark.parametrize("position", [{"epoch": 0, "row": 0}, {"epoch": 0, "row": 2}, {"epoch": 5, "row": 0}])
def test_nothing_usable_is_an_error_and_no_endless_loop(rows, position):
    stream = ExampleStream(DATASETS["slim_pj"], rows, seed=0)
    stream.position = position
    with pytest.raises(UserError, match="--dataset slim_pj: no usable example"):
        next(iter(stream))


@pytest.mark.parametrize(("name", "key"), [("fineweb", "<urn:uuid:{}>"), ("openwebtext", "{}")])
def test_hash_of_the_key_cuts_a_hub_stream_that_has_no_held_out_split(name, key, monkeypatch):
    rows = [{"text": str(i), "id": f"<urn:uuid:{i}>"} for i in range(400)]
    serve_hub(monkeypatch, {"train": rows})
    found = {split: texts(open_stream(name, split)) for split in SPLITS}
    assert sorted(sum(found.values(), [])) == sorted(row["text"] for row in rows)
    assert all(split_of(key.format(text)) == split for split in SPLITS for text in found[split])
    assert 0 < len(found["validation"]) < 20 and 0 < len(found["test"]) < 20


def test_held_out_rows_of_c4_are_of_the_hubs_validation_split_and_disjoint(monkeypatch):
    serve_hub(monkeypatch, {name: [{**FORMS["c4"], "text": f"{name} {i}", "url": f"https://fox.com/{i}"} for i in range(400)]
                            for name in ("train", "validation")})
    found = {split: set(texts(open_stream("c4", split))) for split in SPLITS}
    assert {text.split()[0] for text in found["train"]} == {"train"} and len(found["train"]) > 360
    assert {text.split()[0] for text in found["validation"] | found["test"]} == {"validation"}
    assert 0 < len(found["validation"]) < 20 and 0 < len(found["test"]) < 20 and not found["validation"] & found["test"]
    assert not {text.split()[1] for text in found["train"]} & {text.split()[1] for text in found["validation"] | found["test"]}


def test_cnn_reads_the_splits_of_the_hub(monkeypatch):
    serve_hub(monkeypatch, {name: [{**FORMS["cnn"], "article": name}] * 3 for name in SPLITS})
    assert {split: texts(open_stream("cnn", split)) for split in SPLITS} == {split: [split] * 3 for split in SPLITS}


def test_unreachable_hub_is_one_error_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("must not be called: it retries for half a minute"))
    dataset = TextDataset(name="mine", parse=parse_text, hub_id="nobody/has-such-data")
    with pytest.raises(UserError, match="--dataset mine: nobody/has-such-data is not downloaded, and HF_HUB_OFFLINE is set; unset it, or .*--dataset_path") as error:
        open_rows(dataset, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [
    ConnectionError("Couldn't reach it"), ValueError("Bad split: dev"), datasets.exceptions.DatasetNotFoundError("gone"),
    datasets.exceptions.DatasetGenerationError("no space"), huggingface_hub.errors.HTTPError(""),
])
def test_what_the_hub_raises_becomes_a_user_error(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "README.md")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="could not be read from the hub"):
        open_rows(DATASETS["ultrachat"], "train")


@pytest.mark.parametrize("seen", ["error", "cause"])
def test_gated_data_set_says_what_to_do(seen, monkeypatch):
    gated = datasets.exceptions.DatasetNotFoundError("Dataset 'lmsys/lmsys-chat-1m' is a gated dataset on the Hub. You must be authenticated.")

    def fail(*_, **__):
        if seen == "error":
            raise gated
        raise ConnectionError("Couldn't reach it") from OSError("403 Client Error.\nCannot access gated repo for url https://huggingface.co/...")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "README.md")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as error:
        open_stream("lmsys-chat-1m", "train")
    assert str(error.value) == (
        "--dataset lmsys: lmsys/lmsys-chat-1m is gated on the hub; ask for access at https://huggingface.co/datasets/lmsys/lmsys-chat-1m, "
        "then run hf auth login (or set HF_TOKEN), or give local files of the same form with --dataset_path"
    )


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="--dataset ultrachat needs datasets, which is not installed; run: pip install datasets"):
        open_rows(DATASETS["ultrachat"], "train")


# ---- arithmetic ----

def test_arithmetic_steps_and_answers_are_right():
    for index in range(300):
        problem = arithmetic.make_problem("train", index)
        known = set(re.findall(r"\d+", problem["question"]))
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem["answer"])
        assert len(steps) == 2
        for left, operator, right, result in steps:
            assert {left, right} <= known and eval(f"{left} {operator} {right}") == int(result)
            known.add(result)
        assert problem["answer"].endswith(f"#### {steps[-1][-1]}")


def test_arithmetic_splits_share_no_question():
    found = [{row["question"] for row in arithmetic.make_rows(split)} for split in SPLITS]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    assert len(found[1]) > 150 and len(found[2]) > 400


# ---- pydoc ----

GOOGLE = '''Adds two numbers and gives their sum back.

Args:
    a: the first of the two numbers.
    b: the second of the two numbers.

Returns:
    The sum of the two numbers.

Raises:
    ValueError: never.
'''
NUMPY = '''Adds two numbers and gives their sum back.

Parameters
----------
a : int
    The first of the two numbers.

Returns
-------
int
    The sum of the two numbers.

See Also
--------
subtract

Examples
--------
>>> add(1, 2)
3
'''


def test_google_sections():
    sections = pydoc_texts.split_sections(GOOGLE)
    assert list(sections) == ["summary", "parameters", "returns"]
    assert sections["parameters"] == "a: the first of the two numbers.\nb: the second of the two numbers."
    assert "never" not in "".join(sections.values())


def test_numpy_sections():
    sections = pydoc_texts.split_sections(NUMPY)
    assert list(sections) == ["summary", "parameters", "returns", "examples"]
    assert sections["returns"].split() == ["int", *"The sum of the two numbers.".split()]
    assert sections["examples"] == ">>> add(1, 2)\n3"
    assert "---" not in "".join(sections.values()) and "subtract" not in "".join(sections.values())


def test_near_duplicates_fold_names():
    duplicates = pydoc_texts.NearDuplicates()
    text = "Returns a new {} whose every element is the sum of the elements of the given pair of arrays."
    assert duplicates.is_new(text.format("FloatTensor"))
    assert not duplicates.is_new(text.format("LongTensor"))
    assert duplicates.is_new("Opens the file for reading, and closes it again when the block is left by an exception.")


def test_split_of_is_fixed_and_holds_out_its_share():
    counts = Counter(split_of(f"module.{i}") for i in range(5000))
    assert 60 < counts["validation"] < 140 and 60 < counts["test"] < 140
    assert split_of("torch.nn.modules.linear") == split_of("torch.nn.modules.linear")


def test_build_rows_from_two_source_files(tmp_path):
    (tmp_path / "sums.py").write_text(f'"""Sums of numbers, and what can be done with them."""\ndef add(a, b):\n    """{GOOGLE}"""\n')
    (tmp_path / "twin.py").write_text(f'class Adder:\n    def plus(self):\n        """{GOOGLE}"""\n    def short(self):\n        """Short."""\n')
    (tmp_path / "broken.py").write_text("def (:")
    rows = pydoc_texts.build_rows([(name, tmp_path / f"{name}.py") for name in ("broken", "sums", "twin")])
    chats = rows[split_of("sums")]
    assert len(chats) == sum(map(len, rows.values())) == 2  # the twin of `add` is a near-duplicate, "Short." says too little
    longest = max(chats, key=lambda chat: len(chat["messages"]))
    assert [message["role"] for message in longest["messages"]] == ["user", "assistant"] * 3
    assert "sums.add" in longest["prompt"] and longest["prompt"] == longest["messages"][0]["content"]

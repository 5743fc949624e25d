"""Prompts of benchmark.py: every form of file, second turns, references, templates, and what cannot be used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

from running.command_line import UserError

import pytest

import benchmark
from data import mt_bench
from data_utils import render_chat
from harness import runs
from harness.prompts import BUILT_IN, Prompt, Question, encode, fitting, hash_of, read_questions, turn_prompts
from running.record_file import read_records
from test_commands import run_main

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Now shorter."], "reference": ["4", "5"]},
    {"question_id": 111, "category": "math", "turns": ["What is 3 * 4? ", " And twice that?"], "reference": ["It is 12.", "Twice 12 is 24."]},
    {"question_id": 112, "category": "math", "turns": ["How much?", "And then?"], "reference": [None, "So 7."]},
]
GSM8K = [{"question": "Ada has 2 apples and finds 3. How many?", "answer": "2 + 3 = 5.\n#### 5"}, {"question": "Ben has 1,000 coins and 1 more.", "answer": "#### 1,001"}]
SHARE_GPT = [{"id": "a", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}, {"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Fine 3"}]}]
ULTRA_CHAT = [{"prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}]


def write(path: Path, rows: list) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps({"data": rows} if "data" in path.name else rows)
    path.write_text(content)
    return str(path)


def asked(question: Question) -> list[str]:
    return [message["content"] for message in question.example["messages"]]


# ---- forms ----

@pytest.mark.parametrize("name", ["question.jsonl", "question.json", "data.json"])
def test_mt_bench(tmp_path, name):
    found = read_questions(write(tmp_path / name, MT_BENCH), 0)
    assert [asked(question) for question in found] == [["Write a poem."], ["What is 3 * 4?"], ["How much?"]]
    assert [question.answers for question in found] == [(), ("12", "24"), (None, "7")], "only mathematical questions have answers to check"
    assert [question.follow_ups for question in found] == [("Now shorter.",), ("And twice that?",), ("And then?",)]


def test_the_hubs_form_of_mt_bench():
    found = mt_bench.parse({"prompt": ["One?", "Two?"], "reference": [], "category": "math", "prompt_id": 1})
    assert found == {"messages": [{"role": "user", "content": "One?"}], "follow_ups": ["Two?"], "references": []}


def test_gsm8k_has_answers(tmp_path):
    found = read_questions(write(tmp_path / "test.jsonl", GSM8K), 0)
    assert [(asked(question), question.answers) for question in found] == [([row["question"]], (answer,)) for row, answer in zip(GSM8K, ("5", "1,001"), strict=True)]


@pytest.mark.parametrize(("rows", "turns"), [(SHARE_GPT, ["Hello", "Hi", "How are you?"]), (ULTRA_CHAT, ["Hello"])])
def test_conversations_are_asked_up_to_their_last_answer(tmp_path, rows, turns):
    found, = read_questions(write(tmp_path / "chats.json", rows), 0)
    assert asked(found) == turns and found.answers == ()


def test_builtin_and_a_data_set_by_name():
    assert [asked(question) for question in read_questions("builtin", 0)] == [[text] for text in BUILT_IN]
    found = read_questions("arithmetic", 0, 3)
    assert len(found) == 3 and all(len(question.answers) == 1 and question.answers[0] for question in found)


def test_no_more_rows_are_read_than_are_asked_for(tmp_path, monkeypatch):
    """A hub's stream may be endless."""
    parsed, exact = [], benchmark.read_questions.__globals__["_question"]
    monkeypatch.setitem(benchmark.read_questions.__globals__, "_question", lambda example, form: (parsed.append(example), exact(example, form))[1])
    assert len(read_questions(write(tmp_path / "a.jsonl", GSM8K * 50), 0, 3)) == len(parsed) == 3


def test_rows_that_cannot_be_used_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"turns": []}, *MT_BENCH, {"turns": [3]}, {"turns": ["One turn."]}])
    assert len(read_questions(path, 0)) == 4
    assert f"--dataset {path}: 2 rows skipped (2 without turns)" in capsys.readouterr().err
    assert len(read_questions(path, 1)) == 3, "one has no second turn"


@pytest.mark.parametrize(
    ("rows", "turn_index", "message"),
    [([{"text": "a"}], 0, "its rows have none of the fields turns, question, conversations, messages; reshape it"), ([{"turns": []}], 0, "no question"),
     (GSM8K, 1, "no question with a second turn; use --turn_index 0"), ([1, 2], 0, "none of the fields")],
)
def test_files_without_questions_are_refused(tmp_path, rows, turn_index, message):
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "a.json", rows), turn_index)


@pytest.mark.parametrize(("dataset", "message"), [("no.jsonl", "no such file; give a JSON, JSONL"), ("some/folder", "no such file"), ("mtbench", "unknown data set 'mtbench': choose one of")])
def test_unknown_files_and_names_are_refused(dataset, message):
    with pytest.raises(UserError, match=message):
        read_questions(dataset, 0)


def test_files_that_are_not_what_their_names_say_are_refused(tmp_path):
    for name, content, message in (("a.jsonl", "{", "1 lines are not JSON"), ("a.json", "{", "not JSON at line 1"), ("a.txt", "a", "no data there")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_questions(str(tmp_path / name), 0)


@pytest.mark.parametrize("content", [{"content": "Hello"}, {"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], "role": "user"}])
def test_turns_may_be_objects(tmp_path, content):
    found, = read_questions(write(tmp_path / "arena.jsonl", [{"question_id": "a", "turns": [content, "Why?"]}]), 1)
    assert asked(found) == ["Hello"] and found.follow_ups == ("Why?",)


def test_messages_about_files_name_the_flag_of_the_command(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=f"^--dataset {tmp_path / 'a.txt'}: no data there"):
        read_questions(str(tmp_path / "a.txt"), 0)


# ---- as the target reads them ----

def test_prompts_go_through_the_chat_template(tokenizer):
    question = Question({"messages": [{"role": "user", "content": "Hello"}]}, answers=("5", "7"))
    found = encode(question, tokenizer, None, True)
    assert tokenizer.decode(found.input_ids) == render_chat(tokenizer, question.example["messages"], add_generation_prompt=True) and found.answer == "5"
    system = encode(question, tokenizer, "Be brief.", True)
    assert "<|system|>" in tokenizer.decode(system.input_ids) and "Be brief." in tokenizer.decode(system.input_ids)
    own = Question({"messages": [{"role": "system", "content": "Be long."}, *question.example["messages"]]})
    assert encode(own, tokenizer, "Be brief.", True).input_ids == system.input_ids, "the given one replaces a conversation's own"


def test_questions_that_the_template_refuses_are_left_out(tokenizer, capsys):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for message in messages %}{{ raise_exception('No system prompts') if message['role'] == 'system' else message['content'] }}{% endfor %}"
    questions = [Question({"messages": [*system, {"role": "user", "content": "Hello"}]}) for system in ([], [{"role": "system", "content": "Be brief."}])]

    def as_prompt(system_prompt: str | None) -> Callable[[Question], Prompt]:
        return lambda question: encode(question, bare, system_prompt, True)

    assert [question for question, _ in fitting(questions, as_prompt(None), 100)] == questions[:1]
    assert "questions: 1 rows skipped (1 whose chat the template refuses (No system prompts))" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no question can be asked: 2 rows skipped \(2 whose chat .*; choose other prompts, another system prompt, or another model"):
        fitting(questions, as_prompt("Be brief."), 100)


def test_plain_text_without_a_template(tokenizer):
    question = Question({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why?"}]})
    assert tokenizer.decode(encode(question, tokenizer, None, False).input_ids, skip_special_tokens=True) == "Hello\n\nHi\n\nWhy?\n"
    assert encode(Question({"text": "Once"}), tokenizer, "ignored", True).input_ids == tokenizer("Once")["input_ids"]
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template; give --use_chat_template false, or an instruct model"):
        encode(question, bare, None, True)


def as_prompt(question: Question) -> Prompt:
    """A token for every word."""
    return Prompt([len(word) for text in asked(question) for word in text.split()], next(iter(question.answers), None))


def test_prompts_that_do_not_fit_are_left_out(capsys):
    questions = [Question({"messages": [{"role": "user", "content": text}]}) for text in ("one two", "one two three four", "", "one")]
    assert fitting(questions, as_prompt, 3) == [(questions[0], as_prompt(questions[0])), (questions[3], as_prompt(questions[3]))]
    assert "2 prompts are left out: more than 3 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="at most 1 tokens, which is what the context leaves: lower --max_new_tokens"):
        fitting(questions[:2], as_prompt, 1)
    for longest in (0, -95921):
        with pytest.raises(UserError, match=f"the context has no room for a prompt: .* are {1 - longest} tokens too many; lower --max_new_tokens"):
            fitting(questions, as_prompt, longest)


def test_second_turns_stand_behind_the_answers_to_the_first(tmp_path):
    questions = read_questions(write(tmp_path / "a.jsonl", [*MT_BENCH, {"turns": ["a very long first turn that does not fit by far", "b"]}]), 1)
    answered = []

    def answer(prompt: Prompt) -> str:
        answered.append(prompt)
        return "an answer"

    found = turn_prompts(questions, 1, as_prompt, answer, 10)
    assert len(answered) == 3, "a first turn that does not fit is not answered"
    assert [prompt.answer for prompt in found] == [None, "24", "7"]
    assert found[1].input_ids == [len(word) for word in "What is 3 * 4? an answer And twice that?".split()]


def test_the_hash_tells_prompts_apart():
    hashes = {hash_of(prompts) for prompts in ([Prompt([1, 2])], [Prompt([1]), Prompt([2])], [Prompt([1, 2], "3")], [])}
    assert len(hashes) == 4 and hash_of([Prompt([1, 2])]) == hash_of([Prompt([1, 2])])


# ---- through the command ----

def test_a_second_turn_follows_the_targets_own_greedy_answer(tiny_target_path, tmp_path, monkeypatch):
    prompts, exact = [], benchmark.generate

    def generate(target, prompt, options, *arguments, **names):
        found = exact(target, prompt, options, *arguments, **names)
        prompts.append((list(prompt), options.policy.temperature, found.tokens))
        return found

    for module in (benchmark, runs):
        monkeypatch.setattr(module, "generate", generate)
    words = ["--hf_model", tiny_target_path, "--method", "vanilla", "--dataset", write(tmp_path / "question.jsonl", MT_BENCH), "--turn_index", 1, "--max_samples", 2,
             "--max_new_tokens", 6, "--out", tmp_path / "out.jsonl", "--num_threads", 1]
    assert run_main(benchmark, words, monkeypatch) == 0
    (first, greedy, answer), (second, _, _), *measured = prompts
    assert greedy == 0 and second != first and [temperature for _, temperature, _ in measured] == [0.7] * len(measured)
    tokenizer = benchmark.load_tokenizer(str(tiny_target_path))
    chat = [{"role": "user", "content": "Write a poem."}, {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True).strip()},
            {"role": "user", "content": "Now shorter."}]
    wanted = tokenizer(render_chat(tokenizer, chat, add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    assert wanted in [prompt for prompt, _, _ in measured]
    run, _ = read_records(tmp_path / "out.jsonl")
    assert run["prompts"] == 2 and run["turn_index"] == 1 and len(run["correct_by_prompt"]) == 1, "one of them is mathematical"


@pytest.mark.parametrize(("said", "right"), [("The final answer is 5.", [True, False]), ("I do not know", [False, False]), ("1001", [False, True])])
def test_answers_are_matched(tiny_target_path, tmp_path, monkeypatch, said, right):
    tokenizer = benchmark.load_tokenizer(str(tiny_target_path))
    exact = runs.generate

    def generate(*arguments, **names):
        found = exact(*arguments, **names)
        return runs.Generation(tokenizer(said, add_special_tokens=False)["input_ids"], found.stats)

    monkeypatch.setattr(runs, "generate", generate)
    words = ["--hf_model", tiny_target_path, "--method", "vanilla", "--dataset", write(tmp_path / "a.jsonl", GSM8K), "--max_new_tokens", 4, "--out", tmp_path, "--num_threads", 1]
    assert run_main(benchmark, words, monkeypatch) == 0
    run, summary = read_records(tmp_path / "results.jsonl")
    assert run["correct_by_prompt"] == right and run["exact_match"] == summary["exact_match_mean"] == sum(right) / 2

"""The prompts of benchmark.py: questions of a data set or a file, first turns or follow-ups, as the target reads them.

A file is read by its form: `turns` (MT-Bench, Spec-Bench), `question` and `answer` (GSM8K), `conversations` (ShareGPT) or `messages` (UltraChat), as
JSON, JSONL, Parquet or Arrow; a .json may hold a list or {"data": list}. A conversation is asked up to its last answer.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from running.command_line import UserError

from transformers import PreTrainedTokenizerBase

import share_gpt_dataset
import ultrachat_dataset
from data import gsm8k, mt_bench
from data.answers import final_answer, same_answer
from data.registry import DATASETS, find_dataset
from data.row_files import ExampleStream, TextDataset, describe_skipped, open_rows, used
from data_utils import encode_prompt
from engine import views

BUILT_IN = (
    "Ada has 14 apples. Ada finds 9 more and then loses 5. How many apples are left?",
    "Ben keeps books in 6 boxes with 7 books in each. Ben buys 4 more. How many books does Ben have?",
    "What does the function json.dumps of the Python standard library do?",
    "Cara buys 8 pens for 3 dollars each and pays with 40 dollars. How much change does Cara get?",
    "How do I use torch.nn.functional.softmax?",
    "Finn has 12 coins. Iris has 3 times as many. How many coins do they have together?",
    "What is pandas.DataFrame.groupby for?",
    "Hugo has 47 shells, keeps 5 and shares the rest equally among 6 friends. How many shells does each friend get?",
    "Explain what numpy.linspace returns.",
    "Mia sorts cards for 4 dollars an hour, 6 hours a day. How much does Mia earn in 3 days?",
)
FORMS = {"turns": mt_bench.DATASET, "question": gsm8k.DATASET, "conversations": share_gpt_dataset.DATASET, "messages": ultrachat_dataset.DATASET}
WITH_ANSWERS = ("gsm8k", "arithmetic")  # data sets whose answers end in a number that can be checked


@dataclass(frozen=True)
class Prompt:
    """What is decoded behind: token ids, and the final number of its reference answer where that can be checked."""

    input_ids: list[int]
    answer: str | None = None

    @property
    def identity(self) -> object:
        """What tells it from others, as JSON."""
        return asdict(self)

    def lengths(self) -> tuple[int, ...]:
        """Tokens of the prompt, as each model is given it."""
        return (len(self.input_ids),)

    def longest(self) -> int:
        """Tokens of the target's context that are needed for every model to have room."""
        return len(self.input_ids)

    def given(self) -> views.AnyPrompt:
        """As `speculative.generate` takes it."""
        return self.input_ids

    def is_right(self, text: str) -> bool:
        """Whether `text` ends in the reference answer, where there is one."""
        return same_answer(final_answer(text), self.answer)


@dataclass(frozen=True)
class Question:
    """What is asked: messages that wait for an answer (or a text to continue), the turns that follow, and the answer to each turn that can be checked."""

    example: dict
    follow_ups: tuple[str, ...] = ()
    answers: tuple[str | None, ...] = ()

    @property
    def identity(self) -> object:
        """What tells it from others, as JSON."""
        return asdict(self)

    def behind(self, answers: list[str]) -> Question:
        """The follow-up, asked behind the answers to the turns before it."""
        messages = list(self.example["messages"])
        for answer, follow_up in zip(answers, self.follow_ups, strict=False):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
        return Question({"messages": messages}, self.follow_ups[len(answers) :], self.answers[len(answers) :])


def read_questions(dataset: str, turn_index: int, count: int | None = None) -> list[Question]:
    """The first `count` usable questions (None: all) of a data set's test split, of all of a file, or BUILT_IN; those of
    `turn_index` 1 have a follow-up. Raises UserError."""
    opened = None if dataset == "builtin" else _open(dataset)
    if opened is None:
        stream = (Question({"messages": [{"role": "user", "content": text}]}) for text in BUILT_IN)
    else:
        stream = (_question(example, opened.dataset.name) for example in opened.rest_of_epoch())
    found = list(islice((question for question in stream if len(question.follow_ups) >= turn_index), count))
    if opened is not None:
        opened.tell_losses(f"--dataset {dataset}")
    if not found:
        raise UserError(f"--dataset {dataset}: no question{' with a second turn; use --turn_index 0' if turn_index else ''}")
    return found


def _open(dataset: str) -> ExampleStream:
    if dataset in DATASETS or not Path(dataset).exists():
        if Path(dataset).suffix or "/" in dataset:
            raise UserError(f"--dataset {dataset}: no such file; give a JSON, JSONL, Parquet or Arrow file, builtin, or one of {', '.join(sorted(DATASETS))}")
        found = replace(find_dataset(dataset), path_flag="--dataset")
        return ExampleStream(found, open_rows(found, "test"), 0, shuffle=False)
    rows = open_rows(replace(mt_bench.DATASET, path_flag="--dataset"), "test", dataset)  # a data set that is not cut: all rows
    return ExampleStream(_form(dataset, rows), rows, 0, shuffle=False)


def _form(path: str, rows: list) -> TextDataset:
    """The data set in whose form most rows are. Raises UserError."""
    seen = Counter(name for row in rows if isinstance(row, dict) for name in FORMS if name in row)
    if not seen:
        raise UserError(f"--dataset {path}: its rows have none of the fields {', '.join(FORMS)}; reshape it to one of these forms")
    return FORMS[seen.most_common(1)[0][0]]


def _question(example: dict, form: str) -> Question:
    if "text" in example:
        return Question(example)
    messages = example["messages"]
    if messages[-1]["role"] == "assistant":
        answers = (final_answer(messages[-1]["content"]),) if form in WITH_ANSWERS else ()
        return Question({"messages": messages[:-1]}, answers=answers)
    references = (None if text is None else final_answer(text) for text in example.get("references", ()))
    return Question({"messages": messages}, tuple(example.get("follow_ups", ())), tuple(references))


def encode(question: Question, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, chat_template: bool) -> Prompt:
    """The prompt of a question; without a chat template the contents of the turns, a blank line between them. Raises UserError where the tokenizer has no template."""
    example = question.example
    if "messages" in example and system_prompt is not None:
        own = [message for message in example["messages"] if message["role"] != "system"]
        example = {"messages": [{"role": "system", "content": system_prompt}, *own]}
    if "messages" in example and not chat_template:
        example = {"text": "\n\n".join(message["content"] for message in example["messages"]) + "\n"}
    elif "messages" in example and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no chat template; give --use_chat_template false, or an instruct model")
    return Prompt(encode_prompt(tokenizer, example), next(iter(question.answers), None))


def turn_prompts(
    questions: list[Question], turn_index: int, as_prompt: Callable[[Question], Prompt], answer: Callable[[Prompt], str], longest: int,
) -> list[Prompt]:
    """The prompts at `turn_index`, behind the answers that `answer` gives to the turns before; those of more than `longest` tokens are left out, see `fitting`."""
    for _ in range(turn_index):
        questions = [question.behind([answer(prompt)]) for question, prompt in fitting(questions, as_prompt, longest)]
    return [prompt for _, prompt in fitting(questions, as_prompt, longest)]


def hash_of(prompts: list[Prompt] | list[Question]) -> str:
    """Identifies prompts by their token ids, answers and images, questions by their words."""
    return hashlib.sha256(json.dumps([prompt.identity for prompt in prompts], sort_keys=True).encode()).hexdigest()


def fitting(questions: list[Question], as_prompt: Callable[[Question], Prompt], longest: int) -> list[tuple[Question, Prompt]]:
    """Questions with their prompts, where these leave room in the context: of at most `longest` tokens. How many do not, or cannot
    be asked, is told on stderr. Raises UserError where none is left."""
    if longest < 1:
        raise UserError(f"the context has no room for a prompt: --max_new_tokens, and what is drafted ahead, are {1 - longest} tokens too many; lower --max_new_tokens")
    pairs = _asked(questions, as_prompt)
    found = [(question, prompt) for question, prompt in pairs if 0 < prompt.longest() <= longest]
    if not found:
        raise UserError(f"no prompt has at least one and at most {longest} tokens, which is what the context leaves: lower --max_new_tokens, or choose other prompts")
    if len(found) < len(pairs):
        print(f"{len(pairs) - len(found)} prompts are left out: more than {longest} tokens, which is what the context leaves, or none", file=sys.stderr)
    return found


def _asked(questions: list[Question], as_prompt: Callable[[Question], Prompt]) -> list[tuple[Question, Prompt]]:
    """Questions with their prompts; those that cannot be asked are counted on stderr. Raises UserError where none can."""
    skipped: Counter[str] = Counter()
    pairs = list(used(questions, as_prompt, skipped))
    if not pairs:
        raise UserError(f"no question can be asked: {describe_skipped(skipped)}; choose other prompts, another system prompt, or another model")
    if skipped:
        print(f"questions: {describe_skipped(skipped)}", file=sys.stderr)
    return pairs

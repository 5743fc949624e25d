"""Templated arithmetic word problems with step-by-step answers that end in `#### N`, the form of GSM8K.

Rows have GSM8K's fields (`question`, `answer`), so a real GSM8K file reads through `--dataset_path` as well. The
problems are a function of (split, index) alone: nothing is downloaded or stored.

    python -m data.arithmetic       # print a few problems
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from data.row_files import TextDataset, parse_question

NUM_PROBLEMS = {"train": 12_000, "validation": 200, "test": 500}
NAMES = ("Ada", "Ben", "Cara", "Dan", "Ella", "Finn", "Grace", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Noah", "Olga",
         "Paul", "Rosa", "Sam", "Tara", "Vera")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stickers", "stones")
BOXES = ("bags", "boxes", "baskets", "drawers", "jars", "packs")

Problem = tuple[str, list[str], int]  # question, solution steps, final number


def _gain_and_loss(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start, more = rng.randint(5, 60), rng.randint(2, 40)
    lost = rng.randint(1, start + more - 1)
    question = f"{name} has {start} {item}. {name} finds {more} more and then loses {lost}. How many {item} are left?"
    steps = [f"{name} has {start} + {more} = {start + more} {item} after finding more.",
             f"After the loss {start + more} - {lost} = {start + more - lost} {item} are left."]
    return question, steps, start + more - lost


def _groups(rng: random.Random) -> Problem:
    name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(BOXES)
    boxes, each, extra = rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 30)
    question = f"{name} keeps {item} in {boxes} {box} with {each} {item} in each. {name} buys {extra} more. How many {item} does {name} have?"
    steps = [f"The {box} hold {boxes} * {each} = {boxes * each} {item}.",
             f"With the new ones there are {boxes * each} + {extra} = {boxes * each + extra} {item}."]
    return question, steps, boxes * each + extra


def _share(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    friends, each, kept = rng.randint(2, 10), rng.randint(2, 12), rng.randint(1, 15)
    total = friends * each + kept
    question = f"{name} has {total} {item}, keeps {kept} and shares the rest equally among {friends} friends. How many {item} does each friend get?"
    steps = [f"{name} shares {total} - {kept} = {friends * each} {item}.",
             f"Each friend gets {friends * each} / {friends} = {each} {item}."]
    return question, steps, each


def _shopping(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    count, price = rng.randint(2, 12), rng.randint(2, 9)
    paid = count * price + rng.randint(1, 50)
    question = f"{name} buys {count} {item} for {price} dollars each and pays with {paid} dollars. How much change does {name} get?"
    steps = [f"The {item} cost {count} * {price} = {count * price} dollars.",
             f"The change is {paid} - {count * price} = {paid - count * price} dollars."]
    return question, steps, paid - count * price


def _comparison(rng: random.Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    item, base, times = rng.choice(ITEMS), rng.randint(2, 20), rng.randint(2, 5)
    question = f"{first} has {base} {item}. {second} has {times} times as many. How many {item} do they have together?"
    steps = [f"{second} has {base} * {times} = {base * times} {item}.",
             f"Together they have {base} + {base * times} = {base + base * times} {item}."]
    return question, steps, base + base * times


def _wages(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    wage, hours, days = rng.randint(2, 9), rng.randint(2, 8), rng.randint(2, 5)
    question = f"{name} sorts {item} for {wage} dollars an hour, {hours} hours a day. How much does {name} earn in {days} days?"
    steps = [f"In a day {name} earns {wage} * {hours} = {wage * hours} dollars.",
             f"In {days} days that is {wage * hours} * {days} = {wage * hours * days} dollars."]
    return question, steps, wage * hours * days


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (_gain_and_loss, _groups, _share, _shopping, _comparison, _wages)


def make_problem(split: str, index: int) -> dict[str, str]:
    """Problem `index` of `split` as a GSM8K row."""
    rng = random.Random(f"{split}/{index}")
    question, steps, answer = rng.choice(TEMPLATES)(rng)
    return {"question": question, "answer": "\n".join([*steps, f"#### {answer}"])}


def make_rows(split: str) -> list[dict]:
    """The problems of "train", "validation" or "test"; a held-out question that training has seen is left out."""
    seen = frozenset() if split == "train" else _training_questions()
    rows = (make_problem(split, index) for index in range(NUM_PROBLEMS[split]))
    return [row for row in rows if row["question"] not in seen]


@cache
def _training_questions() -> frozenset[str]:
    return frozenset(row["question"] for row in make_rows("train"))


DATASET = TextDataset(name="arithmetic", parse=parse_question, make_rows=make_rows)


def main() -> None:
    for index in range(4):
        problem = make_problem("test", index)
        print(problem["question"], problem["answer"], sep="\n", end="\n\n")


if __name__ == "__main__":
    main()

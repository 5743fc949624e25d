"""Pictures of coloured shapes, drawn here, with chats about them: what the embedded LLaVA learned, and what it is tested on.

A scene has a shape in one to four of its quarters; its pictures, captions and short questions are a function of (split, index) alone, and no scene of a held-out split
is one of the training split's. Nothing is downloaded or stored.

    python -m data.shapes --out_dir runs/shapes --count 12       # pictures, and questions.jsonl in LLaVA's form
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from running.command_line import UserError, parse_args, run

from PIL import Image, ImageDraw

from data.row_files import SkipRow, TextDataset, split_of
from running.run_files import make_output_dir, write_text

NUM_ROWS = {"train": 200_000, "validation": 1_000, "test": 1_000}
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 30), "orange": (245, 130, 20), "purple": (140, 50, 170),
           "white": (250, 250, 250), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 0.30, "large": 0.42}  # half a shape's width, as a share of a quarter's
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
NUMBERS = ("no", "one", "two", "three", "four")
JITTER = 0.06  # of a quarter's width
PIXELS = 112
QUESTION = "Can you tell me what is in the image?"
ASK_FOR_ALL = (QUESTION, "Describe the picture.", "What do you see?", "What does this image show?")

Scene = list[dict[str, str]]  # of each shape: place, size, colour, shape; in the order of PLACES


def make_scene(rng: random.Random) -> Scene:
    """One to four shapes, each in a quarter of its own."""
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(1, len(PLACES))))
    names = list(PLACES)
    return [{"place": names[place], "size": rng.choice(list(SIZES)), "colour": rng.choice(list(COLOURS)), "shape": rng.choice(SHAPES)} for place in places]


def scene_key(scene: Scene) -> str:
    """The scene as one string, equal for equal scenes."""
    return "; ".join(" ".join(one.values()) for one in scene)


def is_scene(value: object) -> bool:
    """Whether `value` has the form of a Scene."""
    known = {"place": PLACES, "size": SIZES, "colour": COLOURS, "shape": SHAPES}
    return isinstance(value, list) and all(isinstance(one, dict) and all(one.get(name) in words for name, words in known.items()) for one in value)


# ---- pictures ----

def draw(scene: Scene, seed: int) -> Image.Image:
    """An RGB picture of `scene`; `seed` moves the shapes a little and tints the background."""
    rng = random.Random(seed)
    grey = rng.randint(120, 170)
    picture = Image.new("RGB", (PIXELS, PIXELS), tuple(grey + rng.randint(-8, 8) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    quarter = PIXELS / 2
    for one in scene:
        column, row = PLACES[one["place"]]
        x, y = ((at + 0.5 + rng.uniform(-JITTER, JITTER)) * quarter for at in (column, row))
        _draw_shape(pen, one["shape"], (x, y), SIZES[one["size"]] * quarter, COLOURS[one["colour"]])
    return picture


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]) -> None:
    """`shape` within `radius` of `centre`."""
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    thin = radius * 0.34
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(thin))
    elif shape == "square":
        side = radius * 0.86
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "cross":
        pen.rectangle((x - radius, y - thin, x + radius, y + thin), fill=colour)
        pen.rectangle((x - thin, y - radius, x + thin, y + radius), fill=colour)
    else:
        corners, turn = (3, -90) if shape == "triangle" else (4, 0)
        angles = (math.radians(turn + 360 * corner / corners) for corner in range(corners))
        pen.polygon([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles], fill=colour)


# ---- what is said of them ----

def _name(one: dict[str, str], size: bool = True) -> str:
    words = [*([one["size"]] if size else []), one["colour"], one["shape"]]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _count(number: int) -> str:
    return f"{NUMBERS[number]} shape{'' if number == 1 else 's'}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def caption(scene: Scene, rng: random.Random) -> str:
    """All shapes with size, colour and place, in one of a few wordings."""
    opening = rng.choice((f"The picture shows {_count(len(scene))}.", f"There {'is' if len(scene) == 1 else 'are'} {_count(len(scene))} in this picture.", f"I see {_count(len(scene))}."))
    if rng.random() < 0.5:
        sentences = [f"At the {one['place']} there is {_name(one)}." for one in scene]
    else:
        sentences = [f"{_name(one).capitalize()} is at the {one['place']}." for one in scene]
    large = sum(one["size"] == "large" for one in scene)
    closing = f"Of the {_count(len(scene))}, {NUMBERS[large]} {'is' if large == 1 else 'are'} large."
    return " ".join([opening, *sentences, closing])


def _ask_place(scene: Scene, rng: random.Random) -> tuple[str, str]:
    place = rng.choice(list(PLACES))
    there = next((one for one in scene if one["place"] == place), None)
    return f"What is at the {place}?", f"There is {_name(there)} at the {place}." if there else f"There is nothing at the {place}."


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "How many shapes are there?", f"There {'is' if len(scene) == 1 else 'are'} {_count(len(scene))}: {_listed([_name(one, size=False) for one in scene])}."


def _ask_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    asked = rng.choice(scene) if rng.random() < 0.5 else {"colour": rng.choice(list(COLOURS)), "shape": rng.choice(SHAPES)}
    thing = f"{asked['colour']} {asked['shape']}"
    places = [one["place"] for one in scene if (one["colour"], one["shape"]) == (asked["colour"], asked["shape"])]
    question = f"Is there {_name(asked, size=False)}?"
    return question, f"Yes, there is {_name(asked, size=False)} at the {_listed(places)}." if places else f"No, there is no {thing} in this picture."


def _ask_all(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return rng.choice(ASK_FOR_ALL), caption(scene, rng)


QUESTIONS: tuple[Callable[[Scene, random.Random], tuple[str, str]], ...] = (_ask_all, _ask_all, _ask_all, _ask_place, _ask_count, _ask_presence)
_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", re.IGNORECASE)


def named_shapes(text: str) -> list[tuple[str, str]]:
    """Every (colour, shape) that `text` names, sorted."""
    return sorted((colour.lower(), shape.lower()) for colour, shape in _NAMED.findall(text))


def names_all(text: str, scene: Scene) -> bool:
    """Whether `text` names exactly the scene's shapes, each with its colour."""
    return named_shapes(text) == sorted((one["colour"], one["shape"]) for one in scene)


# ---- the data set ----

def make_row(split: str, index: int) -> dict:
    """Row `index` of `split`: a scene of that split, the seed of its picture, and a chat of one or two questions about it."""
    rng = random.Random(f"{split}/{index}")
    scene = make_scene(rng)
    while split_of(scene_key(scene)) != split:
        scene = make_scene(rng)
    turns = [rng.choice(QUESTIONS)(scene, rng) for _ in range(1 if rng.random() < 0.7 else 2)]
    return {"scene": scene, "seed": rng.randrange(1 << 30), "turns": turns}


class Rows:
    """The rows of one split, made when they are asked for."""

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return NUM_ROWS[self.split]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return make_row(self.split, index)


def parse(row: dict) -> dict:
    """A row as an example: the chat, and its picture to be drawn."""
    if not is_scene(row.get("scene")) or not isinstance(row.get("seed"), int) or not row.get("turns"):
        raise SkipRow("without scene, seed and turns")
    messages = [{"role": role, "content": text} for turn in row["turns"] for role, text in zip(("user", "assistant"), turn, strict=True)]
    return {"messages": messages, "images": [partial(draw, row["scene"], row["seed"])], "scene": row["scene"], "loss_on": "assistant"}


DATASET = TextDataset(name="shapes", parse=parse, make_rows=Rows)


@dataclass(kw_only=True)
class Args:
    """Write pictures, and a question about each."""

    out_dir: str = field(metadata={"help": "folder for the pictures and questions.jsonl"})
    count: int = field(default=12, metadata={"help": "pictures"})
    split: str = field(default="test", metadata={"help": "train, validation or test"})

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        if self.split not in NUM_ROWS:
            raise UserError(f"--split {self.split}: choose one of {', '.join(NUM_ROWS)}")
        if not 1 <= self.count <= NUM_ROWS[self.split]:
            raise UserError(f"--count {self.count}: must lie between 1 and {NUM_ROWS[self.split]}")


def main() -> None:
    args = parse_args(Args)
    args.check()
    folder = make_output_dir(args.out_dir)
    lines = []
    for index in range(args.count):
        row = make_row(args.split, index)
        name = f"shapes_{args.split}_{index:04d}.png"
        draw(row["scene"], row["seed"]).save(folder / name)
        lines.append(json.dumps({"question_id": index, "image": name, "text": QUESTION, "scene": row["scene"]}))
    write_text(folder / "questions.jsonl", "\n".join(lines) + "\n")
    print(folder / "questions.jsonl")


if __name__ == "__main__":
    run(main)

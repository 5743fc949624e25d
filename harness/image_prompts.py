"""Questions about images, as target and draft are given them.

Read: a folder of images (the form of COCO's test2015) with one question for all, or JSONL in LLaVA's form: `question_id`, `image` (a name, several, or none), `text`, and maybe
`scene`, what is really there (data/shapes.py), which makes an answer checkable. Images are opened when they are needed; those that cannot be read are counted and left out.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from running.command_line import UserError, first_line

import torch

from data.images import ImageSource, image_names, open_image
from data.row_files import SkipRow, describe_skipped
from data.shapes import ASK_FOR_ALL, Scene, is_scene, names_all
from data.shapes import DATASET as SHAPES_DATASET
from data_utils import encode_prompt
from engine.views import ImagePrompt, View
from harness.prompts import Prompt
from models.llava_target import LlavaTarget
from models.planted_llava import PlantedLlava
from models.target_model import Target
from speculative import context_length

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
QUESTION_TOKENS = 20  # of a RandomPrompt
LLAVA_FORM = "a JSONL file with question_id, image and text"


@dataclass(frozen=True)
class ImageQuestion:
    """A question `text` about some images, or none; `scene` is what is really there, where that is known."""

    text: str
    images: tuple[ImageSource, ...] = ()
    scene: Scene | None = None
    name: str = ""


# ---- where they come from ----

def folder_questions(folder: Path, text: str) -> list[ImageQuestion]:
    """`text` asked about every image in `folder`, by name. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--image_dir {folder}: no such folder; give one with images, such as COCO's test2015")
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not names:
        raise UserError(f"--image_dir {folder}: holds no images ({', '.join(SUFFIXES)})")
    return [ImageQuestion(text, (name,), name=name) for name in names]


def file_questions(path: Path) -> list[ImageQuestion]:
    """The questions of a JSONL file in LLaVA's form. Raises UserError with the line that is not."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other ends of lines may stand in strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: cannot be read ({first_line(error)}); give {LLAVA_FORM}") from error
    found = [_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"--questions {path}: is empty; give {LLAVA_FORM}")
    return found


def _question(path: Path, number: int, line: str) -> ImageQuestion:
    try:
        row = json.loads(line)
        text, scene = row["text"], row.get("scene")
        if not isinstance(text, str) or not (scene is None or is_scene(scene)):
            raise TypeError("text must be a string, scene a list of shapes")
        return ImageQuestion(text, tuple(image_names(row, text)), scene, str(row.get("question_id", number)))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, SkipRow) as error:
        what = "a row" if isinstance(error, SkipRow) else f"{type(error).__name__}:"
        raise UserError(f"--questions {path}, line {number}: {what} {first_line(error)}; give {LLAVA_FORM}") from error


def drawn_questions(text: str) -> Iterator[ImageQuestion]:
    """`text` asked about the held-out images of data/shapes.py; answers to one of its questions for everything can be checked."""
    for index, row in enumerate(SHAPES_DATASET.make_rows("test")):
        example = SHAPES_DATASET.parse(row)
        yield ImageQuestion(text, tuple(example["images"]), example["scene"] if text in ASK_FOR_ALL else None, f"test/{index}")


def readable(questions: Iterable[ImageQuestion], folder: Path | None) -> list[ImageQuestion]:
    """Those of `questions` whose images can all be read; on stderr how many cannot."""
    skipped: Counter[str] = Counter()
    found = [question for question in questions if _can_be_read(question, folder, skipped)]
    if skipped:
        print(f"images: {describe_skipped(skipped)}", file=sys.stderr)
    return found


def _can_be_read(question: ImageQuestion, folder: Path | None, skipped: Counter[str]) -> bool:
    try:
        for image in question.images:
            open_image(image, folder)
    except SkipRow as reason:
        skipped[str(reason)] += 1
        return False
    return True


# ---- as models are given them ----

@dataclass(frozen=True, kw_only=True)
class AskedPrompt(Prompt):
    """A question in the target's tokens, placeholders included; `short` has one token for each image. `models` have views of their own: the target, first, and a draft that is
    none of its exits."""

    question: ImageQuestion
    short: list[int]
    models: tuple[Target, ...]

    def given(self) -> ImagePrompt:
        """The views of all models; pixels are made now, encoded when it is decoded."""
        return ImagePrompt({one.model: self._view(one) for one in self.models})

    def lengths(self) -> tuple[int, ...]:
        return tuple(len(self._ids(one)) for one in self.models)

    def longest(self) -> int:
        context, *others = (context_length(one.model.config) for one in self.models)
        return max(length + context - own for length, own in zip(self.lengths(), (context, *others), strict=True))

    def is_right(self, text: str) -> bool:
        """Whether `text` names the shapes and colours that are there, and no others."""
        return names_all(text, self.question.scene)

    @property
    def images(self) -> list[ImageSource]:
        """What is asked about."""
        return list(self.question.images)

    @cached_property
    def identity(self) -> object:
        digest = hashlib.sha256()
        for image in self.images:
            opened = open_image(image, self.models[0].images.image_dir)
            digest.update(f"{opened.size}".encode() + opened.tobytes())
        return {"input_ids": self.input_ids, "answer": self.answer, "images": digest.hexdigest()}

    def _view(self, one: Target) -> View:
        if not isinstance(one, LlavaTarget) or not self.images:
            return View(self._ids(one))
        return View(self._ids(one), one.images.image_token_id, partial(one.vision, one.images.pixels(self.images)))

    def _ids(self, one: Target) -> list[int]:
        target = self.models[0].images
        if not isinstance(one, LlavaTarget):
            return target.with_placeholders(self.short, 0)
        own = target.with_placeholders(self.short, one.images.image_seq_length)
        return [one.images.image_token_id if token == target.image_token_id else token for token in own]


def as_prompt(question: ImageQuestion, models: tuple[Target, ...]) -> AskedPrompt:
    """The prompt of a question. Raises UserError for a chat template that does not show all images, SkipRow for a question that it refuses."""
    target: LlavaTarget = models[0]
    short = encode_prompt(target.tokenizer, {"messages": [{"role": "user", "content": question.text}]}, num_images=len(question.images))
    shown = short.count(target.images.image_token_id)
    if shown != len(question.images):
        raise UserError(f"the chat template of {target.name} shows {shown} of {len(question.images)} images; give a LLaVA with its own template")
    answer = None if question.scene is None else json.dumps(question.scene)
    return AskedPrompt(target.images.with_placeholders(short), answer, question=question, short=short, models=models)


# ---- for random weights, which have no tokenizer ----

@dataclass(frozen=True, kw_only=True)
class RandomPrompt(Prompt):
    """A question of random tokens about one image of random pixels, the same for each `seed`."""

    planted: PlantedLlava
    seed: int

    @classmethod
    def of(cls, planted: PlantedLlava, seed: int) -> RandomPrompt:
        words = torch.randint(0, planted.model.config.vocab_size, (QUESTION_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
        return cls([*words[:2], *[planted.placeholder] * planted.vision.image_seq_length, *words[2:]], planted=planted, seed=seed)

    @property
    def identity(self) -> object:
        return {"input_ids": self.input_ids, "pixels": self.seed}

    def given(self) -> ImagePrompt:
        """The one view, of the target and its exit."""
        pixels = torch.randn(1, *self.planted.vision.shape, generator=torch.Generator().manual_seed(self.seed))
        return ImagePrompt({self.planted.model: View(self.input_ids, self.planted.placeholder, partial(self.planted.vision, pixels))})

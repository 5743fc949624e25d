"""Questions about pictures, as target and draft are given them.

Read: a folder of pictures (the form of COCO's test2015) with one question for all, or JSONL in LLaVA's form: `question_id`, `image` (a name, several, or none), `text`, and maybe
`scene`, which makes an answer checkable (shapes_dataset.py). Pictures are opened when they are needed; those that cannot be read are counted and left out.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from command_line import UserError, first_line

from bench_prompts import Prompt
from data_utils import encode_prompt
from decoding.vlm import PicturePrompt, View
from llava_target import SightedTarget
from pictures import MARKER, Picture, expanded, open_picture
from row_files import SkipRow, describe_skipped
from shapes_dataset import DATASET as SHAPES_DATASET
from shapes_dataset import Scene, make_row, names_all
from target_model import Target

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class PictureQuestion:
    """A question `text` about some pictures, or none; `scene` is what is really there, where that is known."""

    text: str
    pictures: tuple[Picture, ...] = ()
    scene: Scene | None = None
    name: str = ""


# ---- where they come from ----

def folder_questions(folder: Path, text: str) -> list[PictureQuestion]:
    """`text` asked about every picture in `folder`, by name. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--image_dir {folder}: no such folder; give one with pictures, such as COCO's test2015")
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not names:
        raise UserError(f"--image_dir {folder}: holds no pictures ({', '.join(SUFFIXES)})")
    return [PictureQuestion(text, (name,), name=name) for name in names]


def file_questions(path: Path) -> list[PictureQuestion]:
    """The questions of a JSONL file in LLaVA's form. Raises UserError with the line that is not."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: cannot be read ({first_line(error)}); give a JSONL file with question_id, image and text") from error
    found = [_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"--questions {path}: is empty; give a JSONL file with question_id, image and text")
    return found


def _question(path: Path, number: int, line: str) -> PictureQuestion:
    try:
        row = json.loads(line)
        images = row.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(row["text"], str) or not all(isinstance(name, str) for name in images):
            raise TypeError("image and text must be strings")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--questions {path}, line {number}: not in LLaVA's form, question_id, image and text ({type(error).__name__}: {first_line(error)})") from error
    asked = row["text"].count(MARKER)
    if asked not in (0, len(images)):
        raise UserError(f"--questions {path}, line {number}: {asked} times {MARKER} in the text for {len(images)} pictures; write it once for each, or leave it out")
    return PictureQuestion(row["text"], tuple(images), name=str(row.get("question_id", number)))


def drawn_questions(text: str) -> Iterator[PictureQuestion]:
    """`text` asked about the held-out pictures of shapes_dataset.py."""
    for index, row in ((index, make_row("test", index)) for index in range(len(SHAPES_DATASET.make_rows("test")))):
        yield PictureQuestion(text, tuple(SHAPES_DATASET.parse(row)["images"]), row["scene"], f"test/{index}")


def readable(questions: list[PictureQuestion] | Iterator[PictureQuestion], folder: Path | None, count: int) -> list[PictureQuestion]:
    """The first `count` of `questions` whose pictures can all be read; on stderr how many cannot. Raises UserError for none."""
    skipped: Counter[str] = Counter()
    found = list(islice((question for question in questions if _can_be_read(question, folder, skipped)), count))
    if skipped:
        print(f"pictures: {describe_skipped(skipped)}", file=sys.stderr)
    if not found:
        raise UserError(f"no question with pictures that can be read{f' in {folder}' if folder else ''}: {describe_skipped(skipped)}")
    return found


def _can_be_read(question: PictureQuestion, folder: Path | None, skipped: Counter[str]) -> bool:
    try:
        for picture in question.pictures:
            open_picture(picture, folder)
    except SkipRow as reason:
        skipped[str(reason)] += 1
        return False
    return True


# ---- as models are given them ----

@dataclass(frozen=True)
class Viewers:
    """Target and draft, by the model that decodes: a LLaVA sees pictures with its own eyes, a Llama not at all."""

    target: SightedTarget
    draft: Target | None = None

    def all(self) -> list[Target]:
        return [self.target, *([] if self.draft is None else [self.draft])]


@dataclass(frozen=True, kw_only=True)
class AskedPrompt(Prompt):
    """A question in the target's tokens, placeholders included; `marked` has one marker for each picture."""

    question: PictureQuestion
    marked: list[int]
    viewers: Viewers

    def given(self) -> PicturePrompt:
        """The views of all models; pixels are made now, looked at when it is decoded."""
        return PicturePrompt({one.model: self._view(one) for one in self.viewers.all()})

    def longest(self) -> int:
        """Tokens of the longest view."""
        return max(len(self._ids(one)) for one in self.viewers.all())

    def is_right(self, text: str) -> bool:
        """Whether `text` names the shapes and colours that are there, and no others."""
        return names_all(text, self.question.scene)

    def _view(self, one: Target) -> View:
        if not isinstance(one, SightedTarget) or not self.question.pictures:
            return View(self._ids(one))
        return View(self._ids(one), one.sight.token, partial(one.eyes, one.sight.pixels(self.question.pictures)))

    def _ids(self, one: Target) -> list[int]:
        marker = self.viewers.target.tokenizer.convert_tokens_to_ids(MARKER)
        return expanded(self.marked, marker, one.sight.placeholders if isinstance(one, SightedTarget) else [])

    @cached_property
    def identity(self) -> str:
        """A hash of the tokens and, but for their names, the pictures."""
        folder = self.viewers.target.sight.folder
        digest = hashlib.sha256(json.dumps([self.input_ids, self.answer]).encode())
        for picture in self.question.pictures:
            digest.update(open_picture(picture, folder).tobytes())
        return digest.hexdigest()


def as_prompt(question: PictureQuestion, viewers: Viewers) -> AskedPrompt:
    """The prompt of a question."""
    target = viewers.target
    marked = encode_prompt(target.tokenizer, {"messages": [{"role": "user", "content": question.text}]}, pictures=len(question.pictures))
    marker = target.tokenizer.convert_tokens_to_ids(MARKER)
    if marked.count(marker) != len(question.pictures):
        raise UserError(f"the chat template of {target.name} shows {marked.count(marker)} of {len(question.pictures)} pictures; give a LLaVA with its own template")
    answer = None if question.scene is None else json.dumps(question.scene)
    return AskedPrompt(expanded(marked, marker, target.sight.placeholders), answer, question=question, marked=marked, viewers=viewers)


def hash_of_pictures(prompts: list[AskedPrompt]) -> str:
    """Identifies prompts by their tokens, answers and pictures."""
    return hashlib.sha256(json.dumps([prompt.identity for prompt in prompts]).encode()).hexdigest()

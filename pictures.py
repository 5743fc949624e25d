"""Chats with pictures: what becomes of `<image>` in a text, and of a picture before a vision tower sees it.

A picture stands in a text as one marker token, and in what a model is fed as `rows` placeholder tokens in a row, one for each row of embeddings that its tower and projector make
of it. How many that is follows from the model's configuration alone: nothing is left to the processor's settings, which old checkpoints lack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import BaseImageProcessor

from row_files import SkipRow

MARKER = "<image>"
Picture = str | Callable[[], Image.Image]  # a file's name, or what draws it


def open_picture(picture: Picture, folder: Path | None = None) -> Image.Image:
    """The picture as RGB, read whole. Raises SkipRow for one that is missing or broken."""
    if not isinstance(picture, str):
        return picture()
    try:
        with Image.open((folder or Path()) / picture) as file:
            return file.convert("RGB")
    except FileNotFoundError as error:
        raise SkipRow("whose picture is missing") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise SkipRow("whose picture is broken") from error


def with_pictures(messages: list[dict], count: int) -> list[dict]:
    """`messages` in the form of LLaVA's chat templates, the first user's turn with `count` pictures before its text. Markers in the text are taken out."""
    whole, missing = [], count
    for message in messages:
        parts = [{"type": "text", "text": message["content"].replace(MARKER, "").strip()}]
        if message["role"] == "user":
            parts = [{"type": "image"}] * missing + parts
            missing = 0
        whole.append({**message, "content": parts})
    if missing:
        raise SkipRow("with pictures, but no user's turn")
    return whole


def expanded(ids: Sequence[int], marker: int, placeholders: Sequence[int]) -> list[int]:
    """`ids` with `placeholders` in the place of every `marker`."""
    return [token for one in ids for token in (placeholders if one == marker else (one,))]


@dataclass(frozen=True)
class Sight:
    """What a model with a vision tower sees of a picture: `rows` embeddings, which stand at tokens `token`; `processor` makes its pixels.

    `folder` is where pictures' names are looked up.
    """

    token: int
    rows: int
    processor: BaseImageProcessor
    folder: Path | None = None

    @property
    def placeholders(self) -> list[int]:
        """The tokens of one picture."""
        return [self.token] * self.rows

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """fp32 (n, 3, height, width), n at least 1. Raises SkipRow."""
        return self.processor([open_picture(picture, self.folder) for picture in pictures], return_tensors="pt")["pixel_values"]

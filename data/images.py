"""Chats with images: what becomes of `<image>` in a text, and of an image before a vision encoder sees it.

An image stands in a text as one image token, and in what a model is fed as `image_seq_length` of them in a row, one for each embedding that its vision encoder makes of it. How
many these are follows from the model alone: nothing is left to the processor's settings, which old checkpoints lack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import BaseImageProcessor

from data.row_files import SkipRow

IMAGE_TOKEN = "<image>"
ImageSource = str | Callable[[], Image.Image]  # a file's name, or what draws it


def open_image(source: ImageSource, folder: Path | None = None) -> Image.Image:
    """The image as RGB, read whole. Raises SkipRow for one that is missing or broken."""
    if not isinstance(source, str):
        return source()
    try:
        with Image.open((folder or Path()) / source) as file:
            return file.convert("RGB")
    except FileNotFoundError as error:
        raise SkipRow("whose image is missing") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise SkipRow("whose image is broken") from error


def image_names(row: dict, text: str) -> list[str]:
    """The files that a row in LLaVA's form names under `image`: one, several or none; `text` has an image token for each, or none. Raises SkipRow."""
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SkipRow("whose image is no file name")
    if text.count(IMAGE_TOKEN) not in (0, len(names)):
        raise SkipRow(f"with another number of images than of {IMAGE_TOKEN}")
    return names


def without_image_tokens(text: str) -> str:
    """What is said in a `text` of LLaVA's form."""
    return text.replace(IMAGE_TOKEN, "").strip()


def with_images(messages: list[dict], count: int) -> list[dict]:
    """`messages` in the form of LLaVA's chat templates, the first user's turn with `count` images before its text. Raises SkipRow where there is no such turn."""
    whole, missing = [], count
    for message in messages:
        parts = [{"type": "text", "text": without_image_tokens(message["content"])}]
        if message["role"] == "user":
            parts = [{"type": "image"}] * missing + parts
            missing = 0
        whole.append({**message, "content": parts})
    if missing:
        raise SkipRow("with images, but no user's turn")
    return whole


@dataclass(frozen=True)
class ImageInputs:
    """How a LLaVA takes images: each as `image_seq_length` tokens `image_token_id`, and as pixels that `processor` makes. `image_dir` is where names are looked up."""

    image_token_id: int
    image_seq_length: int
    processor: BaseImageProcessor
    image_dir: Path | None = None

    def with_placeholders(self, ids: Sequence[int], count: int | None = None) -> list[int]:
        """`ids` with `count` (default: image_seq_length) image tokens in the place of each."""
        repeats = self.image_seq_length if count is None else count
        return [token for one in ids for token in ([one] * repeats if one == self.image_token_id else [one])]

    def pixels(self, images: Sequence[ImageSource]) -> torch.Tensor:
        """fp32 (n, 3, height, width), n at least 1. Raises SkipRow."""
        return self.processor([open_image(image, self.image_dir) for image in images], return_tensors="pt")["pixel_values"]

"""Generated text in the colours of where its tokens came from: for terminals, as HTML, and, beside images, as a contact sheet (PNG and HTML).

accepted: drafted, and kept. corrected: the target's own, where a drafted token was not kept. bonus: the target's own, behind drafted tokens that all were. A token
that nothing was drafted for has no colour.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedTokenizerBase

from decoding.state import RoundResult
from running.run_files import write_text
from speculative import Generation

Kind = Literal["accepted", "corrected", "bonus", "plain"]
COLOURS: dict[Kind, tuple[str, int]] = {  # tints of Okabe and Ito's colours, and the nearest of a terminal's 256
    "accepted": ("#a9dccb", 151), "corrected": ("#f5c29b", 216), "bonus": ("#a8cde8", 153), "plain": ("#ffffff", 0)}
BROKEN = "�"  # what a tokenizer makes of part of a character
CARD, PICTURE, MARGIN, FONT = 760, 224, 16, 15  # pixels of the sheet


@dataclass(frozen=True)
class Piece:
    """A stretch of text, and where its tokens came from."""

    text: str
    kind: Kind


def kinds_of(rounds: Iterable[RoundResult], count: int) -> list[Kind]:
    """Where each of the first `count` tokens of `rounds` came from."""
    kinds: list[Kind] = []
    for one in rounds:
        last: Kind = "plain" if one.proposed == 0 else "corrected" if one.tested > one.accepted else "bonus"
        kinds += [*["accepted"] * one.accepted, *[last] * (len(one.tokens) - one.accepted)]
    return kinds[:count]


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int], rounds: Iterable[RoundResult]) -> list[Piece]:
    """The text of `tokens`, which `rounds` brought, cut by kind; a character of several tokens has the kind of its last. Tokens without a text (an end) are left out."""
    found, shown = [], ""
    for index, kind in enumerate(kinds_of(rounds, len(tokens))):
        whole = tokenizer.decode(tokens[: index + 1], skip_special_tokens=True)
        if not whole.endswith(BROKEN) and len(whole) > len(shown):
            found.append(Piece(whole[len(shown) :], kind))
            shown = whole
    return [Piece("".join(piece.text for piece in group), kind) for kind, group in groupby(found, key=lambda piece: piece.kind)]


# ---- on a terminal and as HTML ----

def as_ansi(text: list[Piece]) -> str:
    """`text` with a terminal's colours."""
    return "".join(piece.text if piece.kind == "plain" else f"\x1b[30;48;5;{COLOURS[piece.kind][1]}m{piece.text}\x1b[0m" for piece in text)


def legend() -> list[Piece]:
    """The kinds that have a colour."""
    return [piece for kind in COLOURS if kind != "plain" for piece in (Piece(f" {kind} ", kind), Piece(" ", "plain"))]


def as_html(text: list[Piece]) -> str:
    """`text` as spans, whose title says the kind."""
    return "".join(f'<span style="background:{COLOURS[piece.kind][0]}" title="{piece.kind}">{html.escape(piece.text)}</span>' for piece in text)


@dataclass(frozen=True)
class Card:
    """A prompt with what was generated behind it, and a line on how; with its images, where it has some."""

    prompt: str
    text: list[Piece]
    note: str
    images: tuple[Image.Image, ...] = ()


def card_of(prompt: str, tokenizer: PreTrainedTokenizerBase, generation: Generation, images: tuple[Image.Image, ...] = ()) -> Card:
    """The card of one generation."""
    stats = generation.stats
    note = f"{stats.emitted} tokens in {stats.target_calls} target calls; {stats.accepted} of {stats.proposed} drafted tokens kept"
    return Card(prompt, pieces(tokenizer, generation.tokens, stats.rounds), note, images)


def write_html(path: Path, title: str, cards: list[Card]) -> None:
    """A page of `cards` that needs no other file."""
    rows = "\n".join(
        f'<div class="card"><div>{"".join(map(_embedded, card.images))}</div><div><p class="prompt">{html.escape(card.prompt)}</p>'
        f'<p class="text">{as_html(card.text)}</p><p class="note">{html.escape(card.note)}</p></div></div>' for card in cards)
    style = (".card{display:flex;gap:1em;margin:1em 0}.prompt{font-weight:bold;margin:0}.text{white-space:pre-wrap;line-height:1.6}.note{color:#666;font-size:85%}"
             "body{font-family:sans-serif;max-width:60em;margin:2em auto;background:#fff;color:#000}img{width:14em;image-rendering:pixelated}")
    write_text(path, f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>\n'
                     f"<h1>{html.escape(title)}</h1>\n<p>{as_html(legend())}</p>\n{rows}\n</html>\n")


def _embedded(image: Image.Image) -> str:
    file = io.BytesIO()
    _thumbnail(image).save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _thumbnail(image: Image.Image) -> Image.Image:
    """`image`, made smaller where it is larger than PICTURE."""
    small = image.copy()
    small.thumbnail((PICTURE, PICTURE))
    return small


# ---- as an image ----

def write_png(path: Path, title: str, cards: list[Card]) -> None:
    """A contact sheet of `cards` as one image."""
    plain, bold = map(_font, ("normal", "bold"))
    blocks = [_drawn([Piece(title, "plain")], bold, CARD + PICTURE), _drawn(legend(), plain, CARD + PICTURE), *(_drawn_card(card, plain, bold) for card in cards)]
    sheet = Image.new("RGB", (CARD + PICTURE + 3 * MARGIN, sum(block.height + MARGIN for block in blocks) + MARGIN), "white")
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + MARGIN
    sheet.save(path, optimize=True)


def _font(weight: str) -> ImageFont.FreeTypeFont:
    """matplotlib's own font, so that a sheet looks the same everywhere; laid out letter by letter, as raqm refuses some texts that are none."""
    from matplotlib import font_manager  # is slow to load

    return ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)), FONT, layout_engine=ImageFont.Layout.BASIC)


def _drawn_card(card: Card, plain: ImageFont.FreeTypeFont, bold: ImageFont.FreeTypeFont) -> Image.Image:
    """Pictures on the left, prompt, text and note on the right."""
    images = [_thumbnail(image) for image in card.images]
    images = [one.resize((PICTURE, PICTURE * one.height // one.width), Image.Resampling.NEAREST) if one.width < PICTURE else one for one in images]
    lines = [_drawn([Piece(card.prompt, "plain")], bold, CARD), _drawn(card.text, plain, CARD), _drawn([Piece(card.note, "plain")], plain, CARD)]
    columns = [(0, images), (PICTURE + MARGIN, lines)]
    height = max(sum(one.height + MARGIN // 2 for one in column) for _, column in columns)
    whole = Image.new("RGB", (PICTURE + MARGIN + CARD, height), "white")
    for left, column in columns:
        top = 0
        for one in column:
            whole.paste(one, (left, top))
            top += one.height + MARGIN // 2
    return whole


def _drawn(text: list[Piece], font: ImageFont.FreeTypeFont, width: int) -> Image.Image:
    """`text` on tinted ground, broken into lines of `width` pixels between words."""
    line_height = round(FONT * 1.6)
    placed, x, y = [], 0.0, 0
    for piece in text:
        for word in re.findall(r"\S*\s|\S+", piece.text):  # behind each space a line may end
            length = font.getlength(word.replace("\n", ""))
            if x > 0 and x + length > width:
                x, y = 0.0, y + line_height
            placed.append((x, y, length, word.replace("\n", ""), piece.kind))
            x, y = (0.0, y + line_height) if word.endswith("\n") else (x + length, y)
    block = Image.new("RGB", (width, y + line_height), "white")
    pen = ImageDraw.Draw(block)
    for x, y, length, word, kind in placed:
        pen.rectangle((x, y, x + length, y + line_height - 3), fill=COLOURS[kind][0])
        pen.text((x, y + 1), word, font=font, fill="black")
    return block

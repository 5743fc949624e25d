"""XSum: 226,000 BBC articles, each with a summary of one sentence. No licence is stated; the texts are the BBC's.

    python train.py --dataset xsum ...

Row: {"document": ..., "summary": ..., "id": ...}. Only the summary is learned, whatever --loss_on says.
"""

from __future__ import annotations

from data.row_files import TextDataset, one_turn, text_in

# An example is cut at --max_length tokens from its end, which is where the summary stands. About 350 tokens of
# Llama's, so that question, article and summary (23 words on average) fit the default of 512.
MAX_DOCUMENT_CHARS = 1400


def parse(row: dict) -> dict:
    """An XSum row as the request for a summary and its answer; a long article is cut at a word."""
    article = shorten(text_in(row, "document").strip())
    return {**one_turn(f"Summarize this article in one sentence.\n\n{article}", text_in(row, "summary").strip()), "loss_on": "assistant"}


def shorten(text: str) -> str:
    """`text` cut at the last space within MAX_DOCUMENT_CHARS."""
    if len(text) <= MAX_DOCUMENT_CHARS:
        return text
    return text[: MAX_DOCUMENT_CHARS + 1].rsplit(" ", 1)[0]


# The hub's main branch holds a loading script, which `datasets` no longer runs; this branch holds the same as Parquet.
DATASET = TextDataset(name="xsum", parse=parse, hub_id="EdinburghNLP/xsum", hub_revision="refs/convert/parquet")

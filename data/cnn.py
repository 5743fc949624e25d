"""CNN/DailyMail: 312,000 news articles with their highlights. The card says Apache-2.0; the texts are the publishers'.

    python evaluate.py --spec_prompt_dataset cnn --spec_prompt_length 128 ...

Row: {"article": ..., "highlights": ..., "id": ...}. The article is plain text, not a request for a summary as in
`xsum`: a prompt is the first tokens of a row, and a request that is cut there is never heard to its end.
"""

from __future__ import annotations

from data.row_files import TextDataset, text_in


def parse(row: dict) -> dict:
    """A CNN/DailyMail row as the plain text of its article."""
    return {"text": text_in(row, "article")}


DATASET = TextDataset(name="cnn", parse=parse, hub_id="abisee/cnn_dailymail", hub_config="3.0.0")

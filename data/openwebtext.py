"""OpenWebText: the text of 8,000,000 web pages that Reddit linked to, after GPT-2's WebText. CC0 but for the texts themselves.

    python -m commands.pretrain_draft_model --dataset openwebtext ...

Row: {"text": ...}. The hub has a train split only, and no column but the text, so the hash of the text itself decides
a page's split.
"""

from __future__ import annotations

from data.row_files import SPLITS, TextDataset, parse_text

DATASET = TextDataset(
    name="openwebtext",
    parse=parse_text,
    hub_id="Skylion007/openwebtext",
    hub_splits=dict.fromkeys(SPLITS, "train"),
    streaming=True,
    split_key="text",
)

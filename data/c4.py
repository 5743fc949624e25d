"""C4: filtered English web pages of the Common Crawl of April 2019, 365,000,000 of them. Licence ODC-By 1.0.

    python -m commands.pretrain_draft_model --dataset c4 ...

Row: {"text": ..., "timestamp": ..., "url": ...}. The hub has no test split, and a stream cannot be sliced: the hash of
a page's url takes its test and its validation rows, 2% each, from the hub's validation split. For --dataset_path,
unpack the hub's `c4-train.*.json.gz` to `train*.jsonl`, and `c4-validation.*.json.gz` to `val*.jsonl`.
"""

from __future__ import annotations

from data.row_files import TextDataset, parse_text

DATASET = TextDataset(
    name="c4",
    parse=parse_text,
    hub_id="allenai/c4",
    hub_config="en",
    hub_splits={"train": "train", "validation": "validation", "test": "validation"},
    streaming=True,
    split_key="url",
)

"""FineWeb: filtered English web pages of all Common Crawls; the random sample of 10B tokens. Licence ODC-By 1.0.

    python -m commands.pretrain_draft_model --dataset fineweb ...

Row: {"text": ..., "id": "<urn:uuid:...>", "url": ..., ...}. The hub has a train split only. The hash of a page's id
decides its split, so that every split holds pages of every crawl: the files are in the order of the crawls.
"""

from __future__ import annotations

from data.row_files import SPLITS, TextDataset, parse_text

DATASET = TextDataset(
    name="fineweb",
    parse=parse_text,
    hub_id="HuggingFaceFW/fineweb",
    hub_config="sample-10BT",
    hub_splits=dict.fromkeys(SPLITS, "train"),
    streaming=True,
    split_key="id",
)

"""ShareGPT: 90,000 conversations with ChatGPT that users shared. No licence is stated for the conversations.

    python train.py --dataset share_gpt --dataset_path ShareGPT_V3_unfiltered_cleaned_split.json ...

Row: {"id": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, or with
conversations stored by column, as the hub's Parquet files have them. Long conversations lie in consecutive rows, so
the splits are runs of rows: a random cut would put parts of one conversation on both sides.
"""

from __future__ import annotations

from data.row_files import TextDataset, clean_messages

ROLES = {
    "system": "system", "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "bing": "assistant", "bard": "assistant",
}


def parse(row: dict) -> dict:
    """A ShareGPT row as a chat."""
    return {"messages": clean_messages(row.get("conversations"), "from", "value", ROLES)}


DATASET = TextDataset(
    name="share_gpt",
    parse=parse,
    hub_id="liyucheng/ShareGPT90K",
    hub_splits={"train": "train[:90%]", "validation": "train[90%:95%]", "test": "train[95%:]"},
)

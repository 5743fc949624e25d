"""LLaVA-Instruct: chats about COCO pictures, 150,000 of them written by GPT-4 (CC BY 4.0; the pictures are under their own licences).

    python train.py --model_path llava-hf/llava-1.5-7b-hf --dataset llava_instruct --dataset_path llava_instruct_150k.json --image_dir train2017 ...

Row: {"id": ..., "image": "000000033471.jpg" (or several, or none), "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"}, {"from": "gpt", ...}, ...]}. The
pictures are files of --image_dir. A model that sees no pictures learns the texts alone.
"""

from __future__ import annotations

from pictures import MARKER
from row_files import SkipRow, TextDataset, clean_messages

ROLES = {"human": "user", "gpt": "assistant"}


def parse(row: dict) -> dict:
    """A LLaVA-Instruct row as a chat with pictures."""
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else list(images)
    messages = clean_messages(row.get("conversations"), "from", "value", ROLES)
    if sum(message["content"].count(MARKER) for message in messages) not in (0, len(images)):
        raise SkipRow(f"with another number of pictures than of {MARKER}")
    plain = [{**message, "content": message["content"].replace(MARKER, "").strip()} for message in messages]
    return {"messages": plain, "images": images, "loss_on": "assistant"}


DATASET = TextDataset(
    name="llava_instruct",
    parse=parse,
    hub_id="liuhaotian/LLaVA-Instruct-150K",
    hub_splits={"train": "train[:96%]", "validation": "train[96%:98%]", "test": "train[98%:]"},
)

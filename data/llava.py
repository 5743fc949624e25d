"""LLaVA-Instruct: chats about COCO's images, 150,000 of them written by GPT-4 (CC BY 4.0; the images are under their own licences).

    python train.py --model_path llava-hf/llava-1.5-7b-hf --dataset llava_instruct --dataset_path llava_instruct_150k.json --image_dir train2017 ...

Row: {"id": ..., "image": "000000033471.jpg" (or several, or none), "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"}, {"from": "gpt", ...}, ...]}. The
images are files of --image_dir. A model that sees no images learns the texts alone.
"""

from __future__ import annotations

from running.command_line import UserError

from data.images import image_names, without_image_tokens
from data.row_files import TextDataset, clean_messages

ROLES = {"human": "user", "gpt": "assistant"}


def parse(row: dict) -> dict:
    """A LLaVA-Instruct row as a chat with images."""
    messages = clean_messages(row.get("conversations"), "from", "value", ROLES)
    images = image_names(row, "".join(message["content"] for message in messages))
    return {"messages": [{**message, "content": without_image_tokens(message["content"])} for message in messages], "images": images, "loss_on": "assistant"}


def no_rows(split: str) -> list[dict]:
    """The hub's repository holds files of several forms that repeat each other, so that its splits would share rows. Raises UserError."""
    raise UserError("--dataset llava_instruct is read from a file: get llava_instruct_150k.json from "
                    "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, and name it with --dataset_path (benchmark.py: with --dataset)")


DATASET = TextDataset(name="llava_instruct", parse=parse, make_rows=no_rows)

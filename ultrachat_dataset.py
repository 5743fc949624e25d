"""UltraChat 200k: 208,000 dialogues of several turns that ChatGPT wrote, as filtered for Zephyr. Licence MIT.

    python train.py --dataset ultrachat ...

Row: {"prompt": ..., "prompt_id": ..., "messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}
"""

from __future__ import annotations

from data.row_files import TextDataset, parse_messages

DATASET = TextDataset(
    name="ultrachat",
    parse=parse_messages,
    hub_id="HuggingFaceH4/ultrachat_200k",
    hub_splits={"train": "train_sft", "validation": "test_sft[:50%]", "test": "test_sft[50%:]"},
)

"""GSM8K: 8,800 grade-school word problems with worked answers that end in `#### N`. Licence MIT.

    python train.py --dataset gsm8k ...

Row: {"question": ..., "answer": ...}. The last 5% of the hub's train split are the validation split.
"""

from __future__ import annotations

from data.row_files import TextDataset, parse_question

DATASET = TextDataset(
    name="gsm8k",
    parse=parse_question,
    hub_id="openai/gsm8k",
    hub_config="main",
    hub_splits={"train": "train[:95%]", "validation": "train[95%:]", "test": "test"},
)

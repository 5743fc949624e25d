"""MT-Bench: 80 open questions in eight categories, as prompts; there is nothing in it to train on. Licence Apache-2.0.

    python evaluate.py --spec_prompt_dataset mt_bench ...

Row: {"question_id": ..., "category": ..., "turns": [first question, follow-up]} (FastChat's `question.jsonl`), or the
same list under `prompt` (the hub's form). The example is the first question. Every split holds all rows.
"""

from __future__ import annotations

from row_files import SPLITS, SkipRow, TextDataset


def parse(row: dict) -> dict:
    """An MT-Bench row as a chat that waits for its first answer."""
    turns = row.get("turns") or row.get("prompt")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0].strip():
        raise SkipRow("without turns")
    return {"messages": [{"role": "user", "content": turns[0].strip()}]}


DATASET = TextDataset(name="mt_bench", parse=parse, hub_id="HuggingFaceH4/mt_bench_prompts", hub_splits=dict.fromkeys(SPLITS, "train"), cut=False)

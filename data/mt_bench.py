"""MT-Bench: 80 open questions in eight categories, as prompts; there is nothing in it to train on. Licence Apache-2.0.

    python benchmark.py --dataset question.jsonl ...
    python evaluate.py --spec_prompt_dataset mt_bench ...

Row: {"question_id": ..., "category": ..., "turns": [first question, follow-up], "reference": [answer, answer]} (FastChat's `question.jsonl`, some
rows with a reference; Spec-Bench's file has the same form), or the turns under `prompt` (the hub's form). A turn may be an
object, `{"content": question}` (Arena-Hard). The example is the first question, with
the further turns as `follow_ups` and, of a mathematical question, the `references` (None: a turn without). Every split holds all rows.
"""

from __future__ import annotations

from data.row_files import SPLITS, SkipRow, TextDataset, content_of

WITH_NUMBERS = ("math", "math_reasoning")  # categories whose answers end in a number that can be checked


def parse(row: dict) -> dict:
    """An MT-Bench row as a chat that waits for its first answer."""
    turns = row.get("turns") or row.get("prompt")
    if isinstance(turns, list):
        turns = [content_of(turn, "content") if isinstance(turn, dict) else turn for turn in turns]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise SkipRow("without turns")
    references = row.get("reference") if row.get("category") in WITH_NUMBERS else None
    return {"messages": [{"role": "user", "content": turns[0].strip()}], "follow_ups": [turn.strip() for turn in turns[1:]],
            "references": [text if isinstance(text, str) else None for text in references or []]}


DATASET = TextDataset(name="mt_bench", parse=parse, hub_id="HuggingFaceH4/mt_bench_prompts", hub_splits=dict.fromkeys(SPLITS, "train"), cut=False)

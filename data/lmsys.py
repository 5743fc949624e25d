"""LMSYS-Chat-1M: a million conversations of visitors of the Chatbot Arena with 25 models, in 154 languages.

    python train.py --dataset lmsys ...

Row: {"conversation_id": ..., "model": ..., "conversation": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...],
"turn": ..., "language": ..., "openai_moderation": [{"flagged": ..., ...}, ...], "redacted": ...}. Every language is
kept. Two kinds of rows are skipped: those with a turn that the moderation flagged, and redacted ones, in which names
are placeholders (NAME_1) that no traffic holds. The hub has a train split only: its last tenth is held out, as for
`share_gpt`. It is gated: agree to its licence on its page, which forbids to pass the data on, and log in.
"""

from __future__ import annotations

from data.row_files import ROLES, SkipRow, TextDataset, clean_messages


def is_flagged(row: dict) -> bool:
    """Whether the moderation flagged a turn of the row. A row without verdicts, as in a file of one's own, is not flagged."""
    verdicts = row.get("openai_moderation")
    return isinstance(verdicts, list) and any(isinstance(verdict, dict) and verdict.get("flagged") for verdict in verdicts)


def parse(row: dict) -> dict:
    """An LMSYS-Chat row as a chat."""
    if is_flagged(row):
        raise SkipRow("flagged by the moderation")
    if row.get("redacted"):
        raise SkipRow("that are redacted")
    return {"messages": clean_messages(row.get("conversation"), "role", "content", {role: role for role in ROLES})}


DATASET = TextDataset(
    name="lmsys",
    parse=parse,
    hub_id="lmsys/lmsys-chat-1m",
    hub_splits={"train": "train[:90%]", "validation": "train[90%:95%]", "test": "train[95%:]"},
)

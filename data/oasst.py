"""OpenAssistant Conversations: 10,000 trees of messages that volunteers wrote and ranked, in 35 languages. Licence Apache-2.0.

    python train.py --dataset oasst ...

Row, one for each message: {"message_id": ..., "parent_id": ..., "role": "prompter" or "assistant", "text": ..., "lang": ...,
"rank": ..., "deleted": ..., "review_result": ..., "message_tree_id": ..., "tree_state": ...}. The root of a tree has no
parent; the best of several replies has rank 0. Keys without a value may be missing.

A tree gives one dialogue, whatever its language: from the root, each prompter's turn is followed by its best reply, and
each reply by the best prompter's turn that was answered. Ranked messages come before those without a rank, equal ones
in the order of the rows. Messages on other branches are left out as they are alternatives, and a last turn without an
answer is cut; neither is counted. Messages that were deleted, that review rejected (spam), or that lie in a tree that
was given up are cut, and so is what follows them; they and the replies to them are counted by reason.

Nothing promises that the rows of a tree lie together, so all are read before trees are assembled. Splits are cut
between trees: the hub's validation and test are a half each of its validation trees. Its `.messages.jsonl.gz` files
serve --dataset_path when unpacked; the `.trees` files, which nest messages, do not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from data.row_files import SkipRow, TextDataset, clean_messages

ROLES = {"prompter": "user", "assistant": "assistant"}
KEPT = ("message_id", "parent_id", "role", "text", "rank")
GIVEN_UP = ("aborted_low_grade", "halted_by_moderator")  # states of a tree


def parse(row: dict) -> dict:
    """An assembled row as a chat; a message that was cut is skipped for its reason."""
    if "cut" in row:
        raise SkipRow(row["cut"])
    return {"messages": clean_messages(row["thread"], "role", "text", ROLES)}


def assemble(rows: Iterable) -> list[dict]:
    """`{"thread": [message, ...]}` for each root among the messages `rows`, and `{"cut": reason}` for each that is cut.

    Each stands at its message's place, so that what is cut is spread over the splits as it was over the rows.
    """
    messages: dict[str, dict] = {}
    in_order = []
    for row in rows:
        reason = why_cut(row, messages)
        in_order.append({name: row.get(name) for name in KEPT} if reason is None else {"cut": reason})
        if reason is None:
            messages[row["message_id"]] = in_order[-1]
    replies = defaultdict(list)
    for message in messages.values():
        replies[message["parent_id"]].append(message)
    return [assembled for row in in_order for assembled in _assembled(row, messages, replies)]


def why_cut(row: object, earlier: dict[str, dict]) -> str | None:
    """Why the message `row` cannot be used; None where it can. `earlier` has the messages before it by id."""
    if not isinstance(row, dict):
        return "that are not objects"
    if not all(isinstance(row.get(name), str) for name in ("message_id", "role", "text")):
        return "without message_id, role and text"
    if row["message_id"] in earlier:
        return "that came before"
    if row.get("deleted"):
        return "that are deleted"
    if row.get("review_result") is False:  # None: nobody has reviewed it
        return "that review rejected"
    if row.get("tree_state") in GIVEN_UP:
        return f"in a tree that is {row['tree_state']}"
    return None


def _assembled(row: dict, messages: dict[str, dict], replies: dict[str, list[dict]]) -> list[dict]:
    """What stands for one message: its thread where it is a root, nothing where it belongs to another's."""
    if "cut" in row:
        return [row]
    if row["parent_id"] is None:
        return [{"thread": best_thread(row, replies)}]
    return [] if row["parent_id"] in messages else [{"cut": "whose parent is missing or cut"}]


def best_thread(root: dict, replies: dict[str, list[dict]]) -> list[dict]:
    """The messages from `root` to a leaf, the best reply at each step; `replies` has each message's by its id."""

    def badness(message: dict) -> tuple[bool, float]:
        unanswered = message["role"] == "prompter" and not replies.get(message["message_id"])
        return unanswered, message["rank"] if isinstance(message["rank"], int | float) else math.inf

    thread = [root]
    while replies.get(thread[-1]["message_id"]):
        thread.append(min(replies[thread[-1]["message_id"]], key=badness))
    return thread


DATASET = TextDataset(
    name="oasst",
    parse=parse,
    hub_id="OpenAssistant/oasst1",
    hub_splits={"train": "train", "validation": "validation", "test": "validation"},
    assemble=assemble,
)

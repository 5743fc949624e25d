"""SlimPajama: deduplicated web text, code, books, papers and Wikipedia; its sources keep their own licences.

    python -m commands.pretrain_draft_model --dataset slim_pj ...

Row: {"text": ..., "meta": ...}. The 6B-token sample of the 627B tokens is read: the full set is 59,166 zstd-compressed
JSONL files (895 GB) that need another package to open and a long listing first; the sample is plain Parquet.
"""

from __future__ import annotations

from data.row_files import TextDataset, parse_text

DATASET = TextDataset(name="slim_pj", parse=parse_text, hub_id="DKYoon/SlimPajama-6B", streaming=True)

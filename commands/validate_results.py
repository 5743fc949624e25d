"""Check benchmark.py's JSONL against its schema, line by line.

    python -m commands.validate_results --path results.jsonl --strict
    python -m commands.validate_results --schema

Exit code 0: all records are right; 1: some are not (each gets a line); 2: a file cannot be read. Unknown fields are told, and wrong with --strict.
A field whose type changes from record to record is wrong, as the schema gives every field one type. Half a last line, which a killed
benchmark.py leaves and mends at its next start, is told, and wrong with --strict.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from running.command_line import UserError, parse_args, run

from harness.schema import complaints, schema_table, unknown_fields
from running.record_file import read_records


@dataclass(kw_only=True)
class Args:
    """Check results."""

    path: list[str] = field(default_factory=list, metadata={"help": "files, or folders whose .jsonl files are checked"})
    strict: bool = field(default=False, metadata={"help": "unknown fields and half a last line are wrong"})
    schema: bool = field(default=False, metadata={"help": "print every field with its type and meaning, and stop"})


def files_in(paths: list[str]) -> list[Path]:
    """The files that the paths name. Raises UserError where there is none."""
    if not paths:
        raise UserError("give --path FILE")
    found = [file for path in map(Path, paths) for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not found:
        raise UserError(f"--path {' '.join(paths)}: no .jsonl file there")
    return found


def check_file(path: Path, strict: bool) -> tuple[Counter[str], list[str]]:
    """How many records of each kind the file has, and a line for everything that is wrong."""
    records = read_records(path)
    if not records:
        raise UserError(f"{path}: holds no records")
    counted = Counter("summary" if record.get("summary") else f"run, {record.get('status')}" for record in records)
    wrong = [f"{path}, line {number}: {what}" for number, record in enumerate(records, start=1) for what in complaints(record, strict)]
    torn = [f"{path}: the last line is cut off; start benchmark.py again, which mends it"] if not path.read_bytes().endswith(b"\n") else []
    if strict:
        return counted, wrong + torn
    for note in [*torn, *(f"{path}: unknown field {name}" for name in sorted({name for record in records for name in unknown_fields(record)}))]:
        print(note)
    return counted, wrong


def main() -> int:
    args = parse_args(Args)
    if args.schema:
        print("\n".join(f"{name}: {kind}. {meaning}" for name, kind, meaning in schema_table()))
        return 0
    failed = False
    for path in files_in(args.path):
        counted, wrong = check_file(path, args.strict)
        print("\n".join([*wrong, f"{path}: {', '.join(f'{count} {kind}' for kind, count in counted.items())}; {f'{len(wrong)} complaints' if wrong else 'valid'}"]))
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    run(main)

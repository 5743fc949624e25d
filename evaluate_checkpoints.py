"""Many exits of one target: a row of figures each, beside the untuned exits and the target itself.

    python evaluate_checkpoints.py --model_path assets/pydoc-llama-7m --checkpoint_glob "runs/demo/*/layer*/model_*.safetensors" \\
        --quality_datasets pydoc --out_dir runs/demo/evaluation

Writes results.csv row by row and the plots, and prints a table. A second start with the same settings measures only
what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from running.command_line import UserError, first_line, parse_args, run

import pandas as pd

from measuring.evaluation import Draft, EvaluationArgs, evaluate_draft, exit_draft, summary_table
from models.target_model import Target, load_target
from running.run_files import file_hash, make_output_dir, record_run, write_csv
from truncated_llama import Exit, ExitInfo, TruncatedLlama, check_exit_fits, find_checkpoints, load_exit, read_exit_info

RESULTS_NAME = "results.csv"


@dataclass(kw_only=True)
class Args(EvaluationArgs):
    """Evaluate many checkpoints."""

    checkpoint_glob: list[str] = field(metadata={"help": "globs or paths of exits made by train.py, quoted"})

    def checkpoints(self) -> list[tuple[str, ExitInfo]]:
        """(path, header) of every checkpoint, by layer and kind. Raises UserError for none, and for a broken one."""
        found = [(path, read_exit_info(path)) for path in find_checkpoints(self.checkpoint_glob)]
        return sorted(found, key=lambda item: (item[1].target_layer, str(item[1].kind), item[1].step, item[0]))


def finished_rows(path: Path, settings_hash: str) -> list[dict]:
    """Rows already in results.csv. Raises UserError when they were measured with other settings."""
    if not path.exists():
        return []
    try:
        table = pd.read_csv(path, dtype={"settings_hash": str, "checkpoint_hash": str})
    except (OSError, ValueError) as error:  # pandas' errors for an empty or broken file are ValueErrors
        raise UserError(f"{path} is no table ({first_line(error)}); delete it, or choose another --out_dir") from error
    if set(table.get("settings_hash", [])) != {settings_hash}:
        raise UserError(f"{path} was measured with other settings, or another target or data; choose another --out_dir, or delete it")
    if "checkpoint" not in table or table["checkpoint"].isna().any():
        raise UserError(f"{path} has a row without its checkpoint; delete the row, or choose another --out_dir")
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def is_current(row: dict) -> bool:
    """Whether the checkpoint of a finished row is still the file that was measured."""
    return "checkpoint_hash" not in row or row["checkpoint_hash"] == file_hash(row["checkpoint"])


def untuned(target: Target, layer: int, kind: str) -> Draft:
    """The exit at `layer` before any training; at the last layer that is the target itself."""
    return exit_draft(target, TruncatedLlama(target.model, Exit(target.model, layer)), None, f"{kind}@{layer}", kind)


def tuned(target: Target, path: str, kind: str) -> Draft:
    exit_, info = load_exit(path, target)
    draft = exit_draft(target, TruncatedLlama(target.model, exit_), info, path, kind)
    return replace(draft, columns={**draft.columns, "checkpoint_hash": file_hash(path)})


def planned_drafts(target: Target, checkpoints: list[tuple[str, ExitInfo]]) -> dict[str, Callable[[], Draft]]:
    """Name in the `checkpoint` column -> how to load that draft: the target, then each layer untuned and tuned."""
    last = target.model.config.num_hidden_layers - 1
    plan: dict[str, Callable[[], Draft]] = {f"target@{last}": partial(untuned, target, last, "target")}
    for path, info in checkpoints:
        layer = info.target_layer
        plan.setdefault(f"untuned@{layer}", partial(untuned, target, layer, "untuned"))
        plan[path] = partial(tuned, target, path, str(info.kind))
    return plan


def main() -> None:
    args = parse_args(Args)
    args.check()
    checkpoints = args.checkpoints()
    folder = make_output_dir(args.out_dir)
    results = folder / RESULTS_NAME
    data = args.open_data()
    target = load_target(args.model_path, args)
    facts = args.facts(target, data)
    settings = {"settings_hash": args.settings_hash(facts)}
    rows = finished_rows(results, settings["settings_hash"])
    for path, info in checkpoints:
        check_exit_fits(path, info, target)
    plan = planned_drafts(target, checkpoints)
    rows = [row for row in rows if row["checkpoint"] not in plan or is_current(row)]
    missing = [name for name in plan if name not in {row["checkpoint"] for row in rows}]
    if missing:
        record_run(folder, args, facts)
    for number, name in enumerate(missing, start=1):
        print(f"[{number}/{len(missing)}] {name}", flush=True)
        row, _ = evaluate_draft(target, plan[name](), args, data)
        rows.append({**row, **settings})
        write_csv(results, rows)
    if missing or not (folder / "plots").exists():
        from plotting.exits import plot_results  # matplotlib is slow to load, and only needed here

        logs = [Path(path).parent / "train_log.csv" for path, _ in checkpoints]
        plot_results(folder, [log for log in logs if log.exists()])
    print(summary_table(rows, args.quality_datasets[0]))
    print(results)


if __name__ == "__main__":
    run(main)

"""Check the presets: every flag is one of benchmark.py's with a value that it takes, and every experiment's parts exist and go together.

    python -m commands.validate_configs
    python -m commands.validate_configs --folder my_presets

Exit code 0: right; 1: not (each complaint gets a line); 2: a file cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from running.command_line import UserError, parse_args, run

from harness.flags import Args as BenchmarkArgs
from harness.presets import FOLDER, PARTS, PresetArgs, as_words, preset_flags, read_presets

OF_EXPERIMENTS = {"description", *PARTS}


@dataclass(kw_only=True)
class Args:
    """Check presets."""

    folder: str = field(default=str(FOLDER), metadata={"help": "where models.json, methods.json and experiments.json are"})


def complaints(folder: Path) -> Iterator[str]:
    """What is wrong with the presets in `folder`."""
    models, methods, experiments = (read_presets(kind, folder) for kind in ("models", "methods", "experiments"))
    for kind, presets in (("model", models), ("method", methods)):
        for name, flags in presets.items():
            yield from (f"{kind} {name}: {complaint}" for complaint in _flag_complaints(flags))
    for name, experiment in experiments.items():
        yield from (f"experiment {name}: unknown key {key}; known: {', '.join(sorted(OF_EXPERIMENTS))}" for key in sorted(set(experiment) - OF_EXPERIMENTS))
        yield from (f"experiment {name}: {complaint}" for complaint in _experiment_complaints(name, experiment, folder))


def _flag_complaints(flags: dict) -> Iterator[str]:
    try:
        parsed = parse_args(BenchmarkArgs, as_words(flags))
        parsed.settings()
        parsed.methods()
    except UserError as error:
        yield str(error)


def _experiment_complaints(name: str, experiment: dict, folder: Path) -> Iterator[str]:
    if experiment.get("target_preset") is None or experiment.get("method_preset") is None:
        yield "needs a target_preset and a method_preset"
        return
    if experiment["target_preset"] == experiment.get("draft_preset"):
        yield f"{experiment['target_preset']} would draft for itself"
    try:
        yield from _flag_complaints(preset_flags(PresetArgs(experiment=name), folder))
    except UserError as error:
        yield str(error)


def main() -> int:
    args = parse_args(Args)
    wrong = list(complaints(Path(args.folder)))
    counts = [f"{len(read_presets(kind, Path(args.folder)))} {kind}" for kind in ("models", "methods", "experiments")]
    print("\n".join([*wrong, f"{args.folder if args.folder != str(FOLDER) else FOLDER.name}: {', '.join(counts)}; {f'{len(wrong)} complaints' if wrong else 'valid'}"]))
    return int(bool(wrong))


if __name__ == "__main__":
    run(main)

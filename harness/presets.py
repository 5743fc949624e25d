"""Named sets of flags for benchmark.py: models, methods, and experiments that combine them.

`presets/models.json` {"models": {name: flags}}, `methods.json` {"methods": {name: flags}}, `experiments.json` {"experiments": {name: {"description",
"target_preset", "draft_preset", "method_preset"}}}. Flags are benchmark.py's, without dashes. A model's are the target's; where it drafts, they
are prefixed: hf_model is hf_draft_model, dtype is draft_dtype. What is later in the list experiment, model, draft, method, command line wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from running.command_line import UserError, first_line

FOLDER = Path(__file__).parent / "presets"
ROOT = FOLDER.parent.parent
PARTS = ("target_preset", "draft_preset", "method_preset")
OF_DRAFT = {"hf_model": "hf_draft_model", "dtype": "draft_dtype", "device": "draft_device", "quant": "draft_quant", "bnb_compute_dtype": "draft_bnb_compute_dtype",
            "checkpoint": "checkpoint"}


@dataclass(kw_only=True)
class PresetArgs:
    """Flags that name presets."""

    experiment: str | None = field(default=None, metadata={"help": "target, draft and methods in one word: see --list_presets"})
    model_preset: str | None = field(default=None, metadata={"help": "the target"})
    draft_preset: str | None = field(default=None, metadata={"help": "the draft"})
    method_preset: str | None = field(default=None, metadata={"help": "the methods"})
    list_presets: bool = field(default=False, metadata={"help": "print all presets and stop"})


def read_presets(kind: str, folder: Path = FOLDER) -> dict[str, dict]:
    """The presets of one `kind`: models, methods or experiments. Raises UserError for a file that is not of that form."""
    path = folder / f"{kind}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); mend it, or fetch it again") from error
    presets = content.get(kind) if isinstance(content, dict) and set(content) == {kind} else None
    if not isinstance(presets, dict) or not all(isinstance(flags, dict) for flags in presets.values()):
        raise UserError(f'{path}: must be {{"{kind}": {{name: {{…}}}}}}; mend it')
    return {name: {key: value for key, value in flags.items() if value is not None} for name, flags in presets.items()}


def preset_flags(chosen: PresetArgs, folder: Path = FOLDER, out: Collection[str] = ()) -> dict:
    """What the named presets set, those of the PARTS `out` left out. Raises UserError for unknown names."""
    names = {}
    if chosen.experiment is not None:
        experiment = _find("experiments", chosen.experiment, folder)
        names = {part: experiment.get(part) for part in PARTS}
    names |= {part: own for part, own in zip(PARTS, (chosen.model_preset, chosen.draft_preset, chosen.method_preset), strict=True) if own is not None}
    flags: dict = {}
    for part, name in names.items():
        if name is None or part in out:
            continue
        found = _find("methods" if part == "method_preset" else "models", name, folder)
        flags |= as_draft(found, name) if part == "draft_preset" else found
    return {key: _path(value) for key, value in flags.items()}


def _path(value: object) -> object:
    """A path into assets/, which lies beside the presets, from where the command runs."""
    return os.path.relpath(ROOT / value) if isinstance(value, str) and value.startswith("assets/") else value


def as_draft(flags: dict, name: str) -> dict:
    """A model's flags where it drafts. Raises UserError for one that cannot."""
    unfit = sorted(set(flags) - set(OF_DRAFT))
    if unfit:
        raise UserError(f"--draft_preset {name}: {', '.join(unfit)} cannot be set for a draft; choose another model")
    return {OF_DRAFT[key]: value for key, value in flags.items()}


def _find(kind: str, name: str, folder: Path) -> dict:
    known = read_presets(kind, folder)
    if not isinstance(name, str) or name not in known:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(known)}")
    return known[name]


def listing(folder: Path = FOLDER) -> str:
    """All presets, as --list_presets prints them."""
    lines = ["experiments (--experiment)"]
    lines += [f"  {name:28}{experiment.get('description', '')}" for name, experiment in read_presets("experiments", folder).items()]
    for kind, flag in (("models", "--model_preset, --draft_preset"), ("methods", "--method_preset")):
        lines += ["", f"{kind} ({flag})"]
        lines += [f"  {name:28}{' '.join(f'{key}={json.dumps(value)}' for key, value in flags.items())}" for name, flags in read_presets(kind, folder).items()]
    return "\n".join(lines)


# ---- presets as words of a command line ----

TARGETS, DRAFTS = {"toy", "hf_model", "model_path"}, {"checkpoint", "hf_draft_model", "draft_model_path"}
EMBEDDED = ("embedded", "embedded_exit")  # where no target is named


def with_presets(words: list[str], folder: Path = FOLDER) -> list[str]:
    """A command line with what its presets set put before what was typed, which so has the last word. A typed model takes the place of a preset's, a typed
    draft or a toy that of a preset's draft with all its flags. Raises UserError."""
    from transformers import HfArgumentParser

    def refuse(message: str) -> None:
        raise UserError(f"{message}; --list_presets lists them")

    parser = HfArgumentParser(PresetArgs, allow_abbrev=False, add_help=False)
    parser.error = refuse
    chosen, _ = parser.parse_known_args(words)
    typed = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    if not typed & {"experiment", "model_preset", *TARGETS}:
        chosen.model_preset, chosen.draft_preset = EMBEDDED[0], chosen.draft_preset or EMBEDDED[1]
    flags = preset_flags(chosen, folder, ("draft_preset",) if typed & {"toy", *DRAFTS} else ())
    return [*as_words({name: value for name, value in flags.items() if name not in TARGETS or not typed & TARGETS}), *words]


def as_words(flags: dict) -> list[str]:
    """Flags as they would be typed."""
    words: list[str] = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words

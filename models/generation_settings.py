"""A model's generation_config.json: that it can be read, and what it asks for beside the ends of texts, which no method of the suite does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import shorten
from weakref import WeakSet

from running.command_line import UserError, first_line

from torch import nn
from transformers import GenerationConfig

from running.hub import model_folder

FILE_NAME = "generation_config.json"
# Settings that change a text's law, with the values that leave it as it is beside None. Temperature, top-p and top-k are the commands' own flags.
UNAPPLIED = {
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ([], {}), "min_length": (0,),
    "min_new_tokens": (0,), "exponential_decay_length_penalty": (), "typical_p": (1,), "min_p": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (),
    "guidance_scale": (1,), "num_beams": (1,), "penalty_alpha": (0,), "dola_layers": (), "watermarking_config": (), "stop_strings": ([],), "token_healing": (False,),
}
SHOWN_LETTERS = 60
_noted: WeakSet[nn.Module] = WeakSet()


def check_generation_config(path: str) -> None:
    """Raise UserError where the model at `path` has a generation_config.json that cannot be read: transformers would go on without it, and without its ends of texts."""
    file = _file_of(path)
    if file is None:
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        ends = content.get("eos_token_id")
        if not _are_ids(ends):
            raise ValueError(f"eos_token_id is {ends!r}, not a token id or a list of them")
        GenerationConfig.from_dict(content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); fetch or save it again, or delete it: texts then end where config.json says") from error


def _are_ids(ends: object) -> bool:
    """Whether `ends` is nothing, a token id, or a list of them."""
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return all(isinstance(token, int) and not isinstance(token, bool) for token in found)


def _file_of(path: str) -> Path | None:
    """The model's generation_config.json; None where it has none."""
    found = Path(model_folder(path)) / FILE_NAME
    return found if found.exists() else None


def unapplied(config: GenerationConfig) -> dict[str, object]:
    """What `config` asks for that changes a text's law and is not done here."""
    asked = {name: (getattr(config, name, None), neutral) for name, neutral in UNAPPLIED.items()}
    return {name: value for name, (value, neutral) in asked.items() if value is not None and value not in neutral}


def note_unapplied(model: nn.Module) -> None:
    """Say on stderr, once for each model, what its generation config asks for in vain."""
    config = getattr(model, "generation_config", None)
    if config is None or model in _noted:
        return
    _noted.add(model)
    asked = [shorten(f"{name} {value}", SHOWN_LETTERS, placeholder=" …") for name, value in unapplied(config).items()]
    if asked:
        print(f"note: the target's generation_config asks for {', '.join(asked)}; no method here applies that: texts follow the model's own distribution", file=sys.stderr)

"""An exit as a draft model of its own: a plain Llama in a standard Hugging Face folder, for transformers and vLLM.

    python export_draft.py --model_path assets/pydoc-llama-7m --out_dir runs/demo/draft_layer3 \\
        --checkpoint runs/demo/ftlast/layer3/model_000100.safetensors
    python export_draft.py --model_path meta-llama/Llama-3.2-1B-Instruct --out_dir runs/draft_layer11 --gamma 3 \\
        --checkpoint runs/head/layer11/model_005000.safetensors

The folder holds copies of the target's embeddings and first blocks, the exit's block, norm and (untied) head, and the
target's tokenizer, in the dtype that the target is stored in: exits are trained in fp32, and TruncatedLlama rounds them
to the target's dtype just so. The generation_config makes transformers draft `--gamma` tokens in every round, as this
suite does; transformers reads that from the assistant, and ignores it where it is given to the target's generate().
The subfolder `export` says how all was made.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from running.command_line import UserError, parse_args, run

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from models.plain_llama import as_llama, drafting_config
from models.target_model import DTYPES, DeviceArgs, load_config, load_target
from running.run_files import file_hash, in_one_step, make_output_dir, read_config, record_run, write_json
from speculative import DecodeOptions
from truncated_llama import load_exit, module_bytes, read_exit_info

RECORD_FOLDER = "export"  # apart from the model, whose own config.json it would replace


@dataclass(kw_only=True)
class Args(DeviceArgs):
    """Export one exit."""

    model_path: str = field(metadata={"help": "the target that the exit was trained for"})
    checkpoint: str = field(metadata={"help": "an exit made by train.py"})
    out_dir: str = field(metadata={"help": "the model's folder; must not exist"})
    gamma: int = field(default=DecodeOptions.gamma, metadata={"help": "drafted tokens per round", "aliases": ["--speculate_len", "--k"]})
    device: Literal["auto", "cpu", "cuda"] = field(default="cpu", metadata={"help": "where the weights are put together"})
    torch_dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(default="auto", metadata={"help": "of the files; auto: the target's own"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before a model is loaded."""
        self.check_device()
        if self.gamma < 1:
            raise UserError(f"--gamma {self.gamma}: must be at least 1")
        if Path(self.out_dir).exists():
            raise UserError(f"{self.out_dir} exists already and is not written over; choose another --out_dir")
        self.stored_dtype()
        read_exit_info(self.checkpoint)

    def stored_dtype(self) -> str:
        """The key of DTYPES to store in. Raises UserError where the target's own has none and no other is given."""
        own = load_config(self.model_path).dtype
        names = [name for name, dtype in DTYPES.items() if dtype == own]
        if self.torch_dtype == "auto" and not names:
            raise UserError(f"{self.model_path} is stored as {own}; give --torch_dtype {' or '.join(DTYPES)}")
        return names[0] if self.torch_dtype == "auto" else self.torch_dtype


def build_draft(args: Args) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dict]:
    """The draft model, its tokenizer, and the facts that identify it. Target and exit are released on return."""
    target = load_target(args.model_path, replace(args, torch_dtype=args.stored_dtype()))
    exit_, info = load_exit(args.checkpoint, target)
    draft = as_llama(target.model, exit_)
    draft.generation_config = drafting_config(target.model, args.gamma)
    facts = {"checkpoint_hash": file_hash(args.checkpoint), "exit": {**asdict(info), "kind": str(info.kind)},
             "num_hidden_layers": draft.config.num_hidden_layers, "dtype": str(draft.dtype)}
    return draft, target.tokenizer, facts


def add_older_rope_keys(folder: Path) -> None:
    """Give the model's config.json the RoPE keys of transformers 4 too.

    transformers 4, and vLLM on top of it, read `rope_theta` beside `rope_parameters`, and take 10,000 where it is
    missing without a word (vllm-project/vllm pull request 42624): the draft would run, and hardly be accepted.
    """
    config = read_config(folder)
    rope = config["rope_parameters"]
    scaling = None if rope["rope_type"] == "default" else {name: value for name, value in rope.items() if name != "rope_theta"}
    write_json(folder / "config.json", {**config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling})


def write_folder(args: Args, draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, facts: dict) -> None:
    """Write `args.out_dir`, complete or not at all."""
    with in_one_step(Path(args.out_dir)) as partial:
        draft.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        add_older_rope_keys(partial)
        record_run(make_output_dir(str(partial / RECORD_FOLDER)), args, facts)


def usage(args: Args) -> str:
    """How transformers and vLLM load the folder."""
    speculation = json.dumps({"model": args.out_dir, "num_speculative_tokens": args.gamma, "method": "draft_model"})
    return (
        f"transformers: draft = AutoModelForCausalLM.from_pretrained({args.out_dir!r}, dtype=target.dtype)\n"
        f"              target.generate(**inputs, assistant_model=draft)  # γ: draft.generation_config.num_assistant_tokens\n"
        f"vLLM:         vllm serve {shlex.quote(args.model_path)} --speculative-config {shlex.quote(speculation)}"
    )


def main() -> None:
    args = parse_args(Args)
    args.check()
    make_output_dir(str(Path(args.out_dir).parent))
    draft, tokenizer, facts = build_draft(args)
    write_folder(args, draft, tokenizer, facts)
    print(f"{args.out_dir}: {facts['num_hidden_layers']} blocks, {facts['exit']['kind']}, {facts['dtype']}, {module_bytes(draft) / 1e6:.1f} MB")
    print(usage(args))


if __name__ == "__main__":
    run(main)

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

import copy
import json
import shlex
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from command_line import UserError, parse_args, run

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from results import file_hash, make_output_dir, read_config, record_run, write_json
from speculative import DecodeOptions
from target_model import DTYPES, DeviceArgs, load_config, load_target
from truncated_llama import Exit, load_exit, module_bytes, read_exit_info

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


# ---- what a plain Llama can express ----

def why_not_a_llama(exit_: Exit, config: LlamaConfig) -> str | None:
    """What keeps `exit_` from being the end of a plain Llama of `config`'s shapes, or None where nothing does."""
    others = {name.split(".")[0] for name in exit_.state_dict()} - {"block", "norm", "head"}
    if others:
        return f"it has parts that a Llama lacks: {', '.join(sorted(others))}"
    if type(exit_).forward is not Exit.forward:
        return f"a {type(exit_).__name__} makes its logits in another way"
    return _head_complaint(exit_.head, config) or _norm_complaint(exit_.norm, config) or _block_complaint(exit_.block, config)


def _head_complaint(head: nn.Module, config: LlamaConfig) -> str | None:
    full = (config.vocab_size, config.hidden_size)
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a single matrix"
    if head.bias is not None:
        return "its head has a bias"
    return None if head.weight.shape == full else f"its head is {tuple(head.weight.shape)}, not the full vocabulary's {full}"


def _norm_complaint(norm: nn.Module, config: LlamaConfig) -> str | None:
    if type(norm) is not LlamaRMSNorm:
        return f"its norm is a {type(norm).__name__}, not a LlamaRMSNorm"
    found, plain = (tuple(norm.weight.shape), norm.variance_epsilon), ((config.hidden_size,), config.rms_norm_eps)
    return None if found == plain else f"its norm has (shape, epsilon) {found}, the target's blocks have {plain}"


def _block_complaint(block: nn.Module | None, config: LlamaConfig) -> str | None:
    if block is None:
        return None
    if type(block) is not LlamaDecoderLayer:
        return f"its block is a {type(block).__name__}, not a LlamaDecoderLayer"
    with torch.device("meta"):
        plain = LlamaDecoderLayer(config, layer_idx=0)
    found, wanted = _block_shapes(block), _block_shapes(plain)
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"its block differs from the target's in {', '.join(differing)}" if differing else None


def _block_shapes(block: LlamaDecoderLayer) -> dict:
    """Shapes by tensor name, and the width of an attention head, which they leave open."""
    return {**{name: tensor.shape for name, tensor in block.state_dict().items()}, "head_dim": block.self_attn.head_dim}


# ---- the model and its folder ----

def as_llama(target: LlamaForCausalLM, exit_: Exit) -> LlamaForCausalLM:
    """The exit and the blocks below it as a model of its own, frozen, in the target's dtype and place.

    Every tensor is a copy, so in-memory changes of the target (tensors that share storage) do not matter. Raises
    UserError for an exit that a plain Llama cannot express.
    """
    complaint = why_not_a_llama(exit_, target.config)
    if complaint is not None:
        raise UserError(f"this exit cannot be exported as a plain Llama: {complaint}")
    blocks = [*target.model.layers[: exit_.prefix], *([] if exit_.block is None else [exit_.block])]
    config = copy.deepcopy(target.config)
    config.num_hidden_layers, config.tie_word_embeddings = len(blocks), False
    with torch.device("meta"):  # real weights would only be replaced
        draft = LlamaForCausalLM(config)
    draft.load_state_dict(_copied_tensors(target, exit_, blocks), assign=True)
    draft.model.rotary_emb = LlamaRotaryEmbedding(config).to(target.device)  # computed, not loaded
    return draft.eval().requires_grad_(False)


def _copied_tensors(target: LlamaForCausalLM, exit_: Exit, blocks: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Copies of all that the exported model holds, by their names there, in the target's dtype."""
    parts = {"model.embed_tokens": target.model.embed_tokens, "model.norm": exit_.norm, "lm_head": exit_.head}
    parts |= {f"model.layers.{i}": block for i, block in enumerate(blocks)}
    return {
        f"{place}.{name}": tensor.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
        for place, part in parts.items() for name, tensor in part.state_dict().items()
    }


def drafting_config(target: LlamaForCausalLM, gamma: int) -> GenerationConfig:
    """The target's special tokens, and `gamma` drafted tokens in every round, however sure the draft is of them."""
    own = target.generation_config
    return GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id,
        num_assistant_tokens=gamma, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0,
    )


def build_draft(args: Args) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dict]:
    """The draft model, its tokenizer, and the facts that identify it. Target and exit are released on return."""
    target = load_target(args.model_path, replace(args, torch_dtype=args.stored_dtype()))
    exit_, info = load_exit(args.checkpoint, target)
    draft = as_llama(target.model, exit_)
    draft.generation_config = drafting_config(target.model, args.gamma)
    facts = {"checkpoint_hash": file_hash(args.checkpoint), "exit": {**asdict(info), "kind": info.kind},
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
    folder = Path(args.out_dir)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    draft.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    add_older_rope_keys(partial)
    record_run(make_output_dir(str(partial / RECORD_FOLDER)), args, facts)
    partial.rename(folder)


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

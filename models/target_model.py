"""Loading the frozen full model (the target) and its tokenizer: flags, early errors, and the hashes that identify them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import MISSING, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

from running.command_line import UserError, first_line, import_optional

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.exactness import ropes, why_no_cache
from models.generation_settings import check_generation_config
from running.hub import model_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Quant = Literal["8bit", "4bit"]
ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED_TARGET, CONFIGS = ASSETS / "pydoc-llama-7m", ASSETS / "configs"
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$")  # what older checkpoints hold and models compute
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
NOT_COMPUTED = {  # settings that the shape or the names of the tensors show, and those that change no logits
    *SHAPE, "rope_parameters", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "max_position_embeddings", "pad_token_id", "bos_token_id",
    "eos_token_id", "use_cache", "initializer_range", "pretraining_tp", "attention_dropout", "dtype", "architectures", "transformers_version", "id2label",
    "label2id", "problem_type", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder",
}

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(kw_only=True)
class DeviceArgs:
    """Where and in which number format a model runs."""

    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto: cuda where there is one"})
    torch_dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(default="auto", metadata={"help": "auto: bf16 on cuda, fp32 on cpu"})
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = field(default="auto", metadata={"help": "auto: sdpa"})
    tf32: bool = field(default=True, metadata={"help": "TF32 for fp32 matrix products on cuda"})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of torch (default: torch's own choice)"})

    def check_device(self) -> None:
        """Raise UserError for flags that this machine cannot meet."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"--num_threads {self.num_threads}: must be at least 1")
        if self.attn_implementation == "flash_attention_2":
            self._check_flash_attention()

    def resolve(self) -> tuple[torch.device, torch.dtype, str]:
        """(device, dtype, attention implementation) for these flags; sets torch's threads and TF32."""
        device = torch.device(self._cuda_device() if self.device != "cpu" and torch.cuda.is_available() else "cpu")
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = automatic if self.torch_dtype == "auto" else DTYPES[self.torch_dtype]
        return device, dtype, "sdpa" if self.attn_implementation == "auto" else self.attn_implementation

    @staticmethod
    def _cuda_device() -> str:
        """The GPU of this process, where a launcher started several."""
        if "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return "cuda"

    def _check_flash_attention(self) -> None:
        if importlib.util.find_spec("flash_attn") is None:
            raise UserError("--attn_implementation flash_attention_2: the flash-attn package is not installed; use sdpa, or pip install flash-attn (PyPI has no wheels of it, so it compiles; NVIDIA's containers bring it)")
        device, dtype, _ = self.resolve()
        if device.type != "cuda" or dtype != torch.bfloat16:
            raise UserError("--attn_implementation flash_attention_2 needs cuda and bf16; use sdpa")


@dataclass(frozen=True)
class Target:
    """The full model, its tokenizer, and the name that was typed for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_config(path: str, families: tuple[str, ...] | None = ("llama",)) -> PretrainedConfig:
    """The configuration of the model at `path`, of one of `families` (None: of any). Raises UserError."""
    try:
        config = AutoConfig.from_pretrained(model_folder(path))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"no model at {path} ({first_line(error)}); give a Hugging Face id or a folder with config.json") from error
    wrong = next(filter(None, map(_what_is_wrong, (config, getattr(config, "text_config", None)))), None)
    if wrong is not None:
        raise UserError(f"{path}: its config.json has {wrong}; mend it, or fetch the model again")
    if families is not None and config.model_type not in families:
        sees = "; train.py distils LLaVAs, and commands/benchmark_llava.py decodes with them" if config.model_type == "llava" else ""
        raise UserError(f"{path} is a {config.model_type} model; a {' or '.join(families)} model is needed here{sees}")
    return config


def _what_is_wrong(config: PretrainedConfig | None) -> str | None:
    """A setting with which no model can be made, where there is one."""
    sizes = {name: value for name in SHAPE if isinstance(value := getattr(config, name, None), int)}
    found = [f"{name} {value}" for name, value in sizes.items() if value < 1]
    if isinstance(activation := getattr(config, "hidden_act", None), str) and activation not in ACT2FN:
        found.append(f"hidden_act {activation!r}, which is none of transformers'")
    kinds = {rope.get("rope_type", "default") for rope in ropes(config)} if getattr(config, "model_type", None) == "llama" else set()  # other families may have kinds of their own
    found += [f"rope_type {kind!r}, which is none of transformers'" for kind in sorted(kinds - {"default", *ROPE_INIT_FUNCTIONS})]
    return found[0] if found else None


def named_config(name: str, families: tuple[str, ...] = ("llama",)) -> PretrainedConfig:
    """The configuration `name` of assets/configs, or of a folder or config.json, of one of `families`. Raises UserError."""
    path = CONFIGS / f"{name}.json"
    if path.exists():
        return load_config(str(path), families)
    if not Path(name).exists():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json") if load_config(str(path), None).model_type in families))
        raise UserError(f"no shape {name}: give one of {known}, a folder or a config.json")
    return load_config(name, families)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`. Raises UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(path))
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {path} ({first_line(error)})") from error
    tokenizer.name_or_path = path
    return tokenizer


def load_target(
    path: str, args: DeviceArgs, *, quant: Quant | None = None, compute_dtype: str = "bf16", families: tuple[str, ...] | None = ("llama",),
) -> Target:
    """The model at `path` in evaluation mode with frozen weights, and its tokenizer; `quant`: see check_quant, products then run in `compute_dtype`."""
    device, dtype, _ = args.resolve()
    config, tokenizer = load_config(path, families), load_tokenizer(path)
    _check_decodable(path, config)
    check_generation_config(path)
    _check_ids(path, tokenizer, config)
    stored = {"quantization_config": _quantization(quant, compute_dtype), "device_map": {"": device}} if quant is not None else {}
    attention = None if args.attn_implementation == "auto" else args.attn_implementation  # some families have no sdpa
    model = read_weights(AutoModelForCausalLM, path, dtype=dtype, attn_implementation=attention, **stored)
    placed = model if quant is not None else model.to(device)
    return Target(placed.eval().requires_grad_(False), tokenizer, path)


def read_weights(model_class: type[Model], path: str, *, all_blocks: bool = True, **settings: object) -> Model:
    """The model at `path`, by model_class.from_pretrained. Raises UserError unless its tensors are those of its configuration: what is missing would be drawn anew.

    Without `all_blocks` there may be tensors of blocks that the configuration in `settings` leaves out.
    """
    try:
        model, found = model_class.from_pretrained(model_folder(path, weights=True), output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    except ValueError as error:  # such as an attention implementation that its family has not
        raise UserError(f"{path} cannot be loaded: {first_line(error)}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights of {path} cannot be read ({first_line(error)}); fetch or train the model again") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors of its configuration, such as {missing[0]}; give a whole checkpoint, or mend config.json (num_hidden_layers, tie_word_embeddings)")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise UserError(f"{path}: {name} is {tuple(stored)}, its configuration asks for {tuple(wanted)}; mend config.json")
    unused = sorted(name for name in found["unexpected_keys"] if not COMPUTED.search(name) and (all_blocks or not re.search(r"\.layers\.\d+\.", name)))
    if unused:
        raise UserError(f"{path} has {len(unused)} tensors that its configuration has no place for, such as {unused[0]}; mend config.json (num_hidden_layers), or remove them")
    return model


def _check_decodable(path: str, config: PretrainedConfig) -> None:
    """Raise UserError for models that write no text, or that cannot be decoded with a cache that forgets single tokens."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path} is a {config.model_type} model, which is no causal language model; give one that is, such as a Llama")
    reason = why_no_cache(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    if reason is not None:
        raise UserError(f"{path} is a {config.model_type} model with {reason}; drafted tokens could not be taken back: give a model of attention alone")


def _check_ids(path: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise UserError for tokens that the model has no embedding for. The padding token needs none, as nothing looks at it."""
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size and token != tokenizer.pad_token}
    if beyond:
        token = min(beyond, key=beyond.get)
        raise UserError(f"{path}: {token!r} is token {beyond[token]} of its tokenizer, but its embedding has {config.vocab_size} rows; "
                        "give the tokenizer that belongs to the model, or resize the model's embedding")


def check_quant(flag: str, quant: Quant | None, args: DeviceArgs) -> None:
    """Raise UserError where weights cannot be stored in 8 or 4 bit: it takes CUDA and bitsandbytes."""
    if quant is None:
        return
    if args.resolve()[0].type != "cuda":
        raise UserError(f"--{flag} {quant}: needs a CUDA device; leave it out, or use --dtype bf16")
    import_optional("bitsandbytes", "bitsandbytes", f"--{flag} {quant}")


def _quantization(quant: Quant, compute_dtype: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=quant == "8bit", load_in_4bit=quant == "4bit", bnb_4bit_compute_dtype=DTYPES[compute_dtype])


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies the token <-> id mapping: equal for tokenizers that give every token the same id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def encoding_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies all that turns texts and chats into token ids: the tokenizer whole, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    asked_for = ("truncation", "padding")  # by the last call: no part of the tokenizer
    content = [{name: value for name, value in whole.items() if name not in asked_for}, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_hash(model: PreTrainedModel) -> str:
    """Identifies the target's architecture and weights by its shape-giving settings, those that it computes with, and a few values of every tensor.

    A bf16 checkpoint has one hash in bf16, fp16 and fp32: values too small for fp16's normal range count as 0.
    """
    config = model.config
    shape = [*(getattr(config, name, None) for name in SHAPE), str(getattr(config, "rope_parameters", None))]
    computed = computed_otherwise(config)
    return values_hash(json.dumps([*shape, computed] if computed else shape, default=str), model)


def computed_otherwise(config: PretrainedConfig) -> dict:
    """The settings with which a model computes something else from the same weights, where they are not what they are in Llama 3 or, in other families, by default."""
    usual = {one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(config)} | {"rms_norm_eps": 1e-5}
    found = {name: getattr(config, name, default) for name, default in usual.items() if name not in NOT_COMPUTED}
    return {name: value for name, value in sorted(found.items()) if value != usual[name]}


def text_facts(target: Target) -> dict:
    """What identifies the texts that a target writes, beside the prompts and how they are decoded. The numbers are rounded as `dtype` has it."""
    config, tokenizer = target.model.config, target.tokenizer
    return {
        "target_hash": weights_hash(target.model), "encoding_hash": None if tokenizer is None else encoding_hash(tokenizer),
        "eos_ids": [] if tokenizer is None else sorted(eos_token_ids(target)), "context": getattr(config, "max_position_embeddings", None), "dtype": str(target.model.dtype),
    }


def values_hash(shape: str, *modules: nn.Module) -> str:
    """Identifies `modules` by `shape` and a few values of every tensor."""
    digest = hashlib.sha256(shape.encode())
    for name, parameter in chain.from_iterable(module.named_parameters() for module in modules):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).float().cpu()
        sample[sample.abs() < torch.finfo(torch.float16).smallest_normal] = 0
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def eos_token_ids(target: Target) -> frozenset[int]:
    """Every id that ends a generation: the generation config's, else the tokenizer's; a list of them is normal."""
    ids = target.model.generation_config.eos_token_id
    if ids is None:
        ids = target.tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])

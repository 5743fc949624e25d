"""Milliseconds per decoding step: transformers, torch.compile and the suite's engine, the full model and early exits.

    python benchmark_torch_compile.py --exit_layers 1 3 7 --num_threads 2 --out_dir runs/step_times
    python benchmark_torch_compile.py --config llama-3.2-1b --exit_layers 3 7 --modes none --num_threads 2 --out_dir runs/step_times_1b
    python benchmark_torch_compile.py --model_path meta-llama/Llama-3.2-1B-Instruct --device cuda --out_dir runs/step_times_cuda

A step is one forward pass of `width` new tokens of one text behind a cache of `context` tokens, with logits for all of
them: width 1 is plain decoding, width γ+1 verification. An exit at layer ℓ runs blocks 0..ℓ, norm and head.

    transformers                 the model as it is called by default: eager, with a DynamicCache
    transformers static          eager with a StaticCache: the share of the cache in what torch.compile gains
    transformers+compile <mode>  torch.compile over the StaticCache; "reduce-overhead" and "max-autotune" use CUDA
                                 graphs on CUDA only
    engine                       engine/static_llama.py as decoding uses it: on the CPU its C++
    engine torch                 on the CPU, the engine without its C++ (where there is no C++ compiler, the same as engine)
    engine+graph                 on CUDA, the engine's pass as a captured graph (not yet measured on a GPU)

All implementations of one model, context and width take turns. Before, each one's logits are compared with those of
`transformers`: what fails, or differs too far in fp32, is a row with `error`. Writes step_times.json (COLUMNS says what each name
means) and plots/step_times.png, and prints a table.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from running.command_line import UserError, parse_args, run

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig, StaticCache

from decoding.state import synchronize
from engine.kv_cache import CachedModel
from engine.static_llama import KEPT_WIDTHS, StaticLlama
from measuring.machine_speed import memory_bandwidth
from models.target_model import DTYPES, EMBEDDED_TARGET, DeviceArgs, load_config, load_target, weights_hash
from running.run_files import new_output_dir, record_run, write_json
from truncated_llama import step_bytes

CONFIGS = Path(__file__).parent / "assets" / "configs"
RESULTS_NAME = "step_times.json"
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
BASELINE = "transformers"
FAILURES = (RuntimeError, ValueError)  # those of torch.compile and CUDA are RuntimeErrors; what the engine cannot run is a ValueError
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DIFFERENCE = 1e-3  # of fp32 logits from the baseline's; a wrong mask or position moves them by far more
WARM_UPS = 5  # steps behind the first one: a mode that uses CUDA graphs records them in the second or third
SETTLE_SECONDS = 0.01  # of untimed steps at the start of a turn: the turn before has left its own data in the processor's caches
STEPS_PER_TURN = 3

COLUMNS = {
    "model": "name or folder of the model, or of its configuration where the weights are random",
    "dtype": "number format of weights, keys and values",
    "device": "cpu, or the name of the GPU",
    "num_threads": "torch's threads on the CPU",
    "variant": "full, or exit ℓ",
    "blocks": "decoder blocks that a step runs",
    "context": "tokens in the cache before the step",
    "width": "tokens of the step",
    "implementation": "see the head of this file",
    "ms_per_step": "median of `steps` steps, in ms",
    "ms_per_step_q1": "first quartile",
    "ms_per_step_q3": "third quartile",
    "steps": "timed steps, STEPS_PER_TURN in each of --repeats turns",
    "speedup": "the baseline's ms_per_step / this one's, same model, context and width",
    "compile_seconds": "first call of a compiled implementation, with empty caches of the compiler; for engine+graph the capture",
    "max_logit_difference": "largest absolute difference from the baseline's logits",
    "bytes_per_step": "what a step has to read: blocks, norm, head, and keys and values of the context",
    "achieved_bytes_per_s": "bytes_per_step / seconds per step",
    "bandwidth_bytes_per_s": "machine_speed.memory_bandwidth at the start of the run: reading on the CPU, copying on CUDA",
    "roofline_share": "achieved_bytes_per_s / bandwidth_bytes_per_s; weights that fit in the processor's caches can exceed 1",
    "error": "why there is no time, in one line",
}


@dataclass(kw_only=True)
class Args(DeviceArgs):
    """Measure decoding steps."""

    out_dir: str = field(metadata={"help": "new folder for step_times.json and the figure"})
    model_path: str | None = field(default=None, metadata={"help": "Hugging Face id or folder of a Llama (default: the embedded target)"})
    config: str | None = field(default=None, metadata={"help": "random weights in this shape: a name in assets/configs, a folder or a config.json"})
    exit_layers: list[int] = field(default_factory=list, metadata={"help": "early exits to measure beside the full model (0-based)"})
    widths: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "tokens per step"})
    contexts: list[int] = field(default_factory=lambda: [128, 1024], metadata={"help": "tokens in the cache"})
    modes: list[str] = field(default_factory=lambda: list(MODES[:3]), metadata={"help": f"of torch.compile: {', '.join(MODES)}; none: without it"})
    repeats: int = field(default=10, metadata={"help": f"turns of {STEPS_PER_TURN} timed steps per implementation"})
    seed: int = field(default=0, metadata={"help": "of the tokens, and of random weights"})
    tf32: bool = field(default=False, metadata={"help": "TF32 for fp32 matrix products on cuda"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before a model is loaded."""
        self.check_device()
        if self.model_path is not None and self.config is not None:
            raise UserError("give either --model_path MODEL or --config CONFIG")
        for name in ("widths", "contexts"):
            if min(getattr(self, name)) < 1:
                raise UserError(f"--{name} {min(getattr(self, name))}: must be at least 1")
        if max(self.widths) > KEPT_WIDTHS:
            raise UserError(f"--widths {max(self.widths)}: must be at most {KEPT_WIDTHS}")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: must be at least 1")
        unknown = [mode for mode in self.compile_modes() if mode not in MODES]
        if unknown:
            raise UserError(f"--modes {unknown[0]}: choose from {', '.join(MODES)}, or none alone")
        self._check_shape(self.load_config())

    def _check_shape(self, config: PretrainedConfig) -> None:
        last = config.num_hidden_layers - 1
        beyond = [layer for layer in self.exit_layers if not 0 <= layer < last]
        if beyond:
            raise UserError(f"--exit_layers {beyond[0]}: this model has {last + 1} blocks, so choose 0 to {last - 1}")
        if max(self.contexts) + max(self.widths) > config.max_position_embeddings:
            raise UserError(f"the context of this model is {config.max_position_embeddings} tokens: lower --contexts or --widths")

    def model_name(self) -> str:
        """What was typed for the model, or the embedded target's folder."""
        return self.config or self.model_path or EMBEDDED_TARGET.name

    def load_config(self) -> PretrainedConfig:
        """The shape that --config or --model_path names. Raises UserError."""
        if self.config is None:
            return load_config(self.model_path or str(EMBEDDED_TARGET))
        known = {path.stem: path for path in sorted(CONFIGS.glob("*.json"))}
        path = known.get(self.config, Path(self.config))
        if not path.exists():
            raise UserError(f"--config {self.config}: no such folder or file; known names: {', '.join(known)}")
        return load_config(str(path))

    def compile_modes(self) -> list[str]:
        return [] if self.modes == ["none"] else list(dict.fromkeys(self.modes))

    def capacity(self, context: int) -> int:
        """Slots of a cache for `context` and every width; of 8, because attention kernels on CUDA want their mask so."""
        return -(-(context + max(self.widths)) // 8) * 8


# ---- models ----

def load_model(args: Args) -> LlamaForCausalLM:
    """The model that the flags name, frozen: with its weights, or with random ones made in its dtype on its device."""
    if args.config is None:
        return load_target(args.model_path or str(EMBEDDED_TARGET), args).model
    device, dtype, attention = args.resolve()
    torch.manual_seed(args.seed)
    with device:
        model = AutoModelForCausalLM.from_config(args.load_config(), dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def first_blocks(model: LlamaForCausalLM, blocks: int) -> LlamaForCausalLM:
    """`model` cut to its first `blocks` blocks under its norm and head: the very same modules, nothing copied."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = blocks
    with torch.device("meta"):
        short = LlamaForCausalLM(config)
    inner = model.model
    short.model.embed_tokens, short.model.norm, short.model.rotary_emb = inner.embed_tokens, inner.norm, inner.rotary_emb
    short.model.layers, short.lm_head = nn.ModuleList(inner.layers[:blocks]), model.lm_head
    return short.eval()


def variants(model: LlamaForCausalLM, exit_layers: list[int]) -> Iterator[tuple[str, LlamaForCausalLM]]:
    """(name, model): the full one, then one per exit."""
    yield "full", model
    for layer in sorted(set(exit_layers)):
        yield f"exit {layer}", first_blocks(model, layer + 1)


def kv_bytes(model: LlamaForCausalLM, context: int) -> int:
    """Bytes of the keys and values of `context` tokens in all blocks."""
    config = model.config
    return 2 * config.num_hidden_layers * context * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


# ---- implementations: a filled cache and a step behind it ----

class Implementation(Protocol):
    """`step` makes logits (1, T, V) of `tokens` (1, T) behind the context; `rewind` takes them out of the cache again."""

    compiles: bool

    def step(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def rewind(self) -> None: ...


class DynamicSteps:
    """transformers with its DynamicCache."""

    compiles = False

    def __init__(self, model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
        self._model, self._context = CachedModel(model), prompt.shape[1]
        self._model.prefill(prompt.tolist())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._model.append(tokens)

    def rewind(self) -> None:
        self._model.crop([self._context])


class StaticSteps:
    """transformers over a StaticCache: its shapes and places in memory never change, as torch.compile wants them."""

    def __init__(self, model: LlamaForCausalLM, cache: StaticCache, context: int, mode: str | None = None) -> None:
        self.compiles, self._cache, self._context = mode is not None, cache, context
        self._model = torch.compile(model, mode=mode, fullgraph=True, dynamic=False) if self.compiles else model

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True).logits

    def rewind(self) -> None:
        for layer in self._cache.layers:  # in place: a compiled step reads the length where it was when it was compiled
            layer.cumulative_length.fill_(self._context)


class EngineSteps:
    """StaticLlama; a pass that is not counted as appended is overwritten by the next."""

    def __init__(self, model: LlamaForCausalLM, prompt: torch.Tensor, capacity: int, cpp: bool = True, graph: bool = False) -> None:
        self.compiles, self._engine = graph, StaticLlama(model, capacity, cpp=cpp)
        self._engine.prefill(prompt.tolist())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        starts = self._engine.starts()
        if not self.compiles:
            return self._engine.forward(tokens, starts)
        return self._engine.programs(("step", self._engine.reach), self._pass, tokens, starts)[0]

    def _pass(self, tokens: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor]:
        return (self._engine.forward(tokens, starts),)

    def rewind(self) -> None:
        pass


def filled_cache(model: LlamaForCausalLM, prompt: torch.Tensor, capacity: int) -> StaticCache:
    """A StaticCache with `prompt` (1, T) in it: filled eagerly, as compiled code cannot allocate it."""
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def implementations(model: LlamaForCausalLM, prompt: torch.Tensor, args: Args) -> dict[str, Callable[[], Implementation]]:
    """Name -> how to make it, for `model` behind `prompt` (1, T); the baseline first."""
    context, capacity = prompt.shape[1], args.capacity(prompt.shape[1])
    cache = filled_cache(model, prompt, capacity)  # shared: every step is taken out again
    made = {BASELINE: partial(DynamicSteps, model, prompt), "transformers static": partial(StaticSteps, model, cache, context)}
    made |= {f"transformers+compile {mode}": partial(StaticSteps, model, cache, context, mode) for mode in args.compile_modes()}
    made["engine"] = partial(EngineSteps, model, prompt, capacity)
    if prompt.device.type == "cuda":
        made["engine+graph"] = partial(EngineSteps, model, prompt, capacity, graph=True)
    else:
        made["engine torch"] = partial(EngineSteps, model, prompt, capacity, cpp=False)
    return made


# ---- one cell: a model, a context and a width ----

def try_all(made: dict[str, Callable[[], Implementation]]) -> tuple[dict[str, Implementation], dict[str, dict]]:
    """What could be made, and {"error": why not} of the others. All before any step: an engine moves the weights when it is made."""
    works, failed = {}, {}
    for name, make in made.items():
        try:
            works[name] = make()
        except FAILURES as error:
            if name == BASELINE:
                raise
            failed[name] = {"error": error_line(error)}
    return works, failed


def error_line(error: BaseException) -> str:
    """The type and the first line of an error's message; the second too where the first only announces it ("... raised:")."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = lines[:2] if lines[0].endswith(":") else lines[:1]
    return " ".join([f"{type(error).__name__}:", *said])[:300]


def load_compiler(device: torch.device) -> None:
    """Compile a trifle, so that the first compile_seconds does not hold what loading the compiler takes (8 s on 2 cores)."""
    with suppress(*FAILURES):  # those who need it will say so
        torch.compile(lambda x: x.sin())(torch.ones(8, device=device))


def measure_cell(works: dict[str, Implementation], tokens: torch.Tensor, repeats: int) -> dict[str, dict]:
    """Name -> compile_seconds, max_logit_difference and the `seconds` of all timed steps on `tokens` (1, T); or an error."""
    torch.compiler.reset()  # the graphs of other widths count against torch's limit of compiled versions
    reference = timed_step(works[BASELINE], tokens)[0].clone()
    figures = {name: first_steps(implementation, tokens, reference) for name, implementation in works.items()}
    good = {name: works[name] for name in works if "error" not in figures[name]}
    for name, seconds in take_turns(good, tokens, repeats).items():
        figures[name]["seconds"] = seconds
    return figures


def first_steps(implementation: Implementation, tokens: torch.Tensor, reference: torch.Tensor) -> dict:
    """Compile, compare the logits with `reference` (1, T, V), and warm up."""
    figures = {}
    with empty_compiler_caches() if implementation.compiles else nullcontext():
        try:
            logits, seconds = timed_step(implementation, tokens)
            figures |= {"compile_seconds": seconds} if implementation.compiles else {}
            figures |= compare(logits, reference)
            with torch.compiler.set_stance("fail_on_recompile"):
                for _ in range(WARM_UPS):
                    timed_step(implementation, tokens)
        except FAILURES as error:
            implementation.rewind()
            figures["error"] = error_line(error)
    return figures


def empty_compiler_caches() -> AbstractContextManager[None]:
    """Inside, nothing that torch.compile made before is used."""
    from torch._inductor.utils import fresh_inductor_cache  # slow to load

    return fresh_inductor_cache()


def compare(logits: torch.Tensor, reference: torch.Tensor) -> dict:
    """max_logit_difference of two (1, T, V), and an error where it is too large for fp32 or no number."""
    difference = float((logits.float() - reference.float()).abs().max())
    figures = {"max_logit_difference": difference} if math.isfinite(difference) else {}
    if difference <= (MAX_DIFFERENCE if logits.dtype == torch.float32 else math.inf):
        return figures
    return {**figures, "error": f"logits differ by {difference:.2g} from those of {BASELINE}"}


def take_turns(works: dict[str, Implementation], tokens: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of every timed step; each repeat in the order opposite to the one before."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with torch.compiler.set_stance("fail_on_recompile"):
        for repeat in range(repeats):
            for name in reversed(works) if repeat % 2 else works:
                settled = time.perf_counter() + SETTLE_SECONDS
                while time.perf_counter() < settled:
                    timed_step(works[name], tokens)
                seconds[name] += [timed_step(works[name], tokens)[1] for _ in range(STEPS_PER_TURN)]
    return seconds


def timed_step(implementation: Implementation, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits (1, T, V), valid until the next step, and the step's seconds; the cache is as before."""
    synchronize(tokens.device)
    start = time.perf_counter()
    logits = implementation.step(tokens)
    synchronize(tokens.device)
    seconds = time.perf_counter() - start
    implementation.rewind()
    return logits, seconds


# ---- rows ----

@torch.inference_mode()
def measure(model: LlamaForCausalLM, args: Args, base: dict) -> Iterator[list[dict]]:
    """The rows of one cell after another; each begins with the columns `base`."""
    widths, generator = sorted(set(args.widths)), torch.Generator().manual_seed(args.seed)
    if args.compile_modes():
        load_compiler(model.device)
    for variant, part in variants(model, args.exit_layers):
        for context in sorted(set(args.contexts)):
            tokens = torch.randint(model.config.vocab_size, (1, context + widths[-1]), generator=generator).to(model.device)
            works, failed = try_all(implementations(part, tokens[:, :context], args))
            place = {"variant": variant, "blocks": len(part.model.layers), "context": context}
            for width in widths:
                cell = {**base, **place, "width": width, "bytes_per_step": step_bytes(part) + kv_bytes(part, context)}
                yield cell_rows(cell, {**measure_cell(works, tokens[:, context : context + width].clone(), args.repeats), **failed})


def cell_rows(cell: dict, figures: dict[str, dict]) -> list[dict]:
    """A row of COLUMNS per implementation; what was not measured is absent."""
    rows = []
    for name, measured in figures.items():
        measured = dict(measured)
        seconds = measured.pop("seconds", None)
        speed = {} if seconds is None else speed_columns(seconds, figures[BASELINE]["seconds"], cell)
        rows.append({**cell, "implementation": name, **speed, **measured})
    return rows


def speed_columns(seconds: list[float], baseline: list[float], cell: dict) -> dict:
    """The columns that the seconds of a cell's steps give."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    achieved = cell["bytes_per_step"] / median
    return {
        "ms_per_step": 1000 * median, "ms_per_step_q1": 1000 * q1, "ms_per_step_q3": 1000 * q3, "steps": len(seconds),
        "speedup": statistics.median(baseline) / median, "achieved_bytes_per_s": achieved,
        "roofline_share": achieved / cell["bandwidth_bytes_per_s"],
    }


def summary_table(rows: list[dict]) -> str:
    """The printed table: a line per row that has a time."""
    table = pd.DataFrame(rows).reindex(columns=list(COLUMNS)).dropna(subset=["ms_per_step"])
    shown = {
        "ms_per_step": "ms", "ms_per_step_q1": "q1", "ms_per_step_q3": "q3", "speedup": "speedup", "achieved_bytes_per_s": "GB/s",
        "roofline_share": "roofline", "compile_seconds": "compile s", "max_logit_difference": "max diff",
    }
    table = table.assign(achieved_bytes_per_s=table["achieved_bytes_per_s"] / 1e9)
    table = table[["variant", "context", "width", "implementation", *shown]].rename(columns=shown)
    return table.to_string(index=False, float_format="%.4g", na_rep="")


def main() -> None:
    args = parse_args(Args)
    args.check()
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "step times")
    model = load_model(args)
    bandwidth = memory_bandwidth(model.device)
    record_run(folder, args, {"target_hash": weights_hash(model), "bandwidth_bytes_per_s": bandwidth})
    base = {
        "model": args.model_name(), "dtype": DTYPE_NAMES[model.dtype], "num_threads": torch.get_num_threads(), "bandwidth_bytes_per_s": bandwidth,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
    }
    rows: list[dict] = []
    for cell in measure(model, args, base):
        rows += cell
        write_json(folder / RESULTS_NAME, rows)
        print("{variant}, context {context}, width {width}: measured".format(**cell[0]), flush=True)
        for row in cell:
            if "error" in row:
                print(f"    {row['implementation']}: {row['error']}", flush=True)
    from plotting.exits import plot_step_times  # matplotlib is slow to load, and only needed here

    plot_step_times(folder)
    print(summary_table(rows))
    print(folder / RESULTS_NAME)


if __name__ == "__main__":
    run(main)

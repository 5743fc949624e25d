"""The flags of the benchmarks, those of benchmark.py whole, and what can be wrong with them before a model is loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from running.command_line import UserError

from decoding.sampling import SamplingPolicy
from harness.methods import Settings, chosen_methods
from harness.presets import PresetArgs
from measuring.evaluation import DraftArgs
from measuring.followers import load_followers
from measuring.tree_plans import read_growmap
from models.target_model import EMBEDDED_TARGET, DeviceArgs, check_quant, load_config, load_tokenizer
from training.judges import read_judge_info

RESULTS_NAME = "results.jsonl"


@dataclass(kw_only=True)
class MethodArgs(DraftArgs, DeviceArgs):
    """Flags of every benchmark: how tokens are drawn, chains, trees, and runs."""

    max_new_tokens: int = field(default=64, metadata={"help": "new tokens per prompt, at most"})
    temperature: float = field(default=0.7, metadata={"help": "0: greedy"})
    top_p: float = field(default=1.0, metadata={"help": "1: off"})
    top_k: int = field(default=0, metadata={"help": "0: off"})
    gamma: str = field(default="4", metadata={"help": "tokens that a chain drafts in a round, or auto: as many as pay", "aliases": ["--k"]})
    verification: Literal["rejection", "coupled"] = field(default="rejection", metadata={"help": "of chains; coupled returns vanilla's own tokens for the seed"})
    tree_verification: Literal["coupled", "match", "swor"] = field(default="coupled", metadata={"help": "of static and dynamic trees"})
    tree_budget: int = field(default=16, metadata={"help": "nodes of a tree, the root included"})
    tree_depth: int = field(default=8, metadata={"help": "levels of a tree; specexec: twice as many"})
    parallel_branches: int = field(default=8, metadata={"help": "trees: children of a node and nodes of a draft pass"})
    growmap: str | None = field(default=None, metadata={"help": "static_tree: the shape, made by commands/build_growmap.py (default: fitted on the spot)"})
    runs: int = field(default=1, metadata={"help": "times that all prompts are decoded"})
    seed: int = field(default=0, metadata={"help": "of the first run's noise, the order and the bootstrap"})
    fit_prompts: int = field(default=16, metadata={"help": "prompts that trees are fitted to"})

    def check_counts(self, *names: str) -> None:
        """Raise UserError unless these flags, and those that every benchmark counts by, can be met."""
        for name in (*names, "max_new_tokens", "runs", "fit_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")

    def settings(self) -> Settings:
        """What methods are set to. Raises UserError."""
        try:
            policy = SamplingPolicy(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(f"--{error}") from error
        shared = {one.name for one in fields(Settings)} & {one.name for one in fields(self)}
        return Settings(policy=policy, **{name: getattr(self, name) for name in shared})


@dataclass(kw_only=True)
class Args(PresetArgs, MethodArgs):
    """Run decoding methods on prompts."""

    out: str = field(default="runs/benchmark", metadata={"help": f"the file, .jsonl, or a folder for {RESULTS_NAME}"})
    method: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "methods, all, or all_lossless"})
    model_path: str | None = field(default=None, metadata={"help": "the target: a Hugging Face id or folder (default: the embedded one)", "aliases": ["--hf_model"]})
    draft_model_path: str | None = field(default=None, metadata={"help": "an independent draft with the target's tokenizer", "aliases": ["--hf_draft_model"]})
    toy: bool = field(default=False, metadata={"help": "random weights of a tiny shape: to try the harness"})
    torch_dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(default="auto", metadata={"help": "auto: bf16 on cuda, fp32 on cpu", "aliases": ["--dtype"]})
    quant: Literal["8bit", "4bit"] | None = field(default=None, metadata={"help": "store the target's weights so, with bitsandbytes on CUDA"})
    bnb_compute_dtype: Literal["bf16", "fp16", "fp32"] = field(default="bf16", metadata={"help": "number format of products with quantised weights"})
    draft_dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = field(default=None, metadata={"help": "an independent draft's (default: the target's)"})
    draft_device: Literal["auto", "cpu", "cuda"] | None = field(default=None, metadata={"help": "must be the target's: p and q are compared on one device"})
    draft_quant: Literal["8bit", "4bit"] | None = field(default=None, metadata={"help": "an independent draft's"})
    draft_bnb_compute_dtype: Literal["bf16", "fp16", "fp32"] | None = field(default=None, metadata={"help": "an independent draft's (default: the target's)"})

    dataset: str = field(default="builtin", metadata={"help": "builtin, a data set of the suite, or a file in the form of MT-Bench, GSM8K, ShareGPT or UltraChat"})
    turn_index: int = field(default=0, metadata={"help": "1: the second turn, behind the target's own greedy answer to the first"})
    max_samples: int = field(default=50, metadata={"help": "prompts, at most"})
    use_chat_template: bool = field(default=True, metadata={"help": "ask through the tokenizer's chat template"})
    system_prompt: str | None = field(default=None, metadata={"help": "the system's turn before each prompt"})

    branch_prune_threshold: float = field(default=0.0, metadata={"help": "specexec: a child needs this share of its best sibling's probability"})
    commonsense: Literal["exact", "overwrite"] = field(default="exact", metadata={"help": "common_sense: exact (lossless), or the published form, which is LOSSY"})
    followers: str | None = field(default=None, metadata={"help": "common_sense: the table, made by commands/build_followers.py"})
    topk_rank: list[str] = field(default_factory=lambda: ["4"], metadata={"help": "topk (LOSSY): a drafted token is kept if it is among so many of the target's most likely, or all"})
    autojudge_checkpoint: str | None = field(default=None, metadata={"help": "autojudge (LOSSY): the judge, made by commands/train_judge.py"})
    autojudge_threshold: list[float] | None = field(default=None, metadata={"help": "autojudge: instead of the judge's own; mode paper keeps a token below it, draft above"})

    require_headless: bool = field(default=False, metadata={"help": "stop where a GPU drives a display"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before a model is loaded."""
        self.check_device()
        self.methods()
        self.check_counts("max_samples")
        if self.turn_index not in (0, 1):
            raise UserError(f"--turn_index {self.turn_index}: must be 0 or 1")
        if not self.toy and self.model_path is None:
            raise UserError("no target: give --hf_model, --model_preset or --toy")
        if self.toy and (self.model_path or self.checkpoint or self.draft_model_path):
            raise UserError("--toy has models of its own: leave out the others, or --toy")
        if self.draft_device not in (None, self.device):
            raise UserError(f"--draft_device {self.draft_device}: must be the target's, {self.device}; p and q are compared on one device")
        if not self.toy:
            load_config(self.model_path, self.families)
        self.settings()
        self._check_draft()
        self._check_files()

    def _check_files(self) -> None:
        """Raise UserError for a file of a chosen method that cannot be read."""
        methods, _ = self.methods()
        if self.growmap is not None:
            read_growmap(self.growmap)
        if self.followers is not None and "common_sense" in methods:
            load_followers(self.followers, load_tokenizer(self.model_path or str(EMBEDDED_TARGET)))
        if self.autojudge_checkpoint is not None and "autojudge" in methods:
            read_judge_info(self.autojudge_checkpoint)

    @property
    def families(self) -> tuple[str, ...] | None:
        """Families of models that the target may be of (None: any): only Llamas have exits."""
        return None if self.checkpoint is None else ("llama",)

    def _check_draft(self) -> None:
        """Raise UserError for flags of the draft and of quantised weights that cannot work."""
        independent = self.draft_model_path is not None
        for name in ("draft_dtype", "draft_quant", "draft_bnb_compute_dtype"):
            if getattr(self, name) is not None and not independent:
                raise UserError(f"--{name} belongs to an independent draft: give --hf_draft_model, or leave it out")
        if self.checkpoint is not None or independent:
            self.check_draft(self.model_path, 0, self.families)
            if independent and load_tokenizer(self.model_path).chat_template != load_tokenizer(self.draft_model_path).chat_template:
                print(f"note: {self.draft_model_path} was made with another chat template than {self.model_path}; prompts use the target's", file=sys.stderr)
        check_quant("quant", self.quant, self)
        check_quant("draft_quant", self.draft_quant, self)

    @property
    def draft_compute_dtype(self) -> str:
        """Number format of products with an independent draft's quantised weights."""
        return self.draft_bnb_compute_dtype or self.bnb_compute_dtype

    def methods(self) -> tuple[list[str], set[str]]:
        """The methods to measure, and those of them that were named themselves. Raises UserError."""
        return chosen_methods(self.method, self.commonsense)

    @property
    def file(self) -> Path:
        """Where records go."""
        path = Path(self.out)
        return path if path.suffix == ".jsonl" else path / RESULTS_NAME

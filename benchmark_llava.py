"""Every decoding method on questions about pictures: a LLaVA as the target, and a small LLaVA, a text-only Llama or the target's own exit as the draft.

    python benchmark_llava.py --method all --out runs/llava                      # the embedded LLaVA, pictures that the suite draws
    python benchmark_llava.py --model anthonycmu/llava-1.5-160m --target llava-hf/llava-1.5-7b-hf --image_dir test2015 \\
        --prompt "Can you tell me what is in the image?" --temperature 0.6 --top_p 0.9 --method dynamic_tree --start 0 --end 200 --out runs/llava
    python benchmark_llava.py --target llava-hf/llava-1.5-7b-hf --checkpoint runs/llava-exit/model_002000.safetensors --method vanilla self_speculative \\
        --image_dir coco --questions llava-bench.jsonl --max_new_tokens 256 --out runs/llava-exit

Each model looks at a picture once, with its own tower, and is prefilled once; then text is decoded as everywhere in this suite, with its records, statistics
and plots (see benchmark.py). Pictures are looked at inside the prefill's time. With a draft, a contact sheet shows some pictures with what was written, in the colours of where
tokens came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

from command_line import UserError, parse_args, run

from bench_args import RESULTS_NAME
from bench_methods import Settings, Subject, ways_of
from bench_runs import Benchmark, Data, check_records, models_and_place, named_models, table, what_was_added
from decoding.sampling import SamplingPolicy
from evaluation import Draft, load_draft, model_draft
from llava_target import SightedTarget, is_llava, load_llava, load_llava_config, load_picture_draft
from picture_prompts import (
    AskedPrompt,
    PictureQuestion,
    Viewers,
    as_prompt,
    drawn_questions,
    file_questions,
    folder_questions,
    hash_of_pictures,
    readable,
)
from pictures import open_picture
from planted_llava import RandomPrompt, planted_llava
from record_file import RecordFile
from speculative import DecodeOptions, generate
from target_model import ASSETS, DeviceArgs, Target, eos_token_ids, load_config, named_config, values_hash
from token_views import Card, card_of, write_html, write_png
from tree_args import Fitted, read_growmap
from truncated_llama import read_exit_info

METHODS = ("vanilla", "speculative", "self_speculative", "static_tree", "dynamic_tree", "specexec", "hf_generate")
EMBEDDED_LLAVA, EMBEDDED_DRAFT = ASSETS / "shapes-llava", ASSETS / "shapes-llava-draft"
QUESTION = "Can you tell me what is in the image?"
SHARED_FLAGS = ("temperature", "top_p", "top_k", "max_new_tokens", "num_threads", "tf32", "attn_implementation")
SHOWN = ("self_speculative", "speculative", "dynamic_tree", "static_tree", "specexec")  # the first that was measured is on the contact sheet


@dataclass(kw_only=True)
class Args(DeviceArgs):
    """Run decoding methods on pictures."""

    target: str = field(default=str(EMBEDDED_LLAVA), metadata={"help": "a LLaVA 1.5: a Hugging Face id or folder (default: the embedded one)"})
    model: str | None = field(default=None, metadata={"help": "the draft: a small LLaVA, or a Llama that sees no pictures, with the target's tokenizer"})
    checkpoint: str | None = field(default=None, metadata={"help": "the draft instead: an exit of the target, made by train.py"})
    random_init: str | None = field(default=None, metadata={"help": "random weights in this shape instead, such as llava-1.5-7b, with an exit: for speed"})
    planted_alpha: float = field(default=0.8, metadata={"help": "with --random_init: the acceptance that the exit is made to have"})
    planted_layer: int = field(default=1, metadata={"help": "with --random_init: the exit's layer"})
    method: list[str] = field(default_factory=lambda: ["all"], metadata={"help": f"all, or some of {' '.join(METHODS)}"})
    image_dir: str | None = field(default=None, metadata={"help": "folder of pictures (default: pictures that the suite draws)"})
    prompt: str = field(default=QUESTION, metadata={"help": "what is asked about each picture of --image_dir"})
    questions: str | None = field(default=None, metadata={"help": "JSONL in LLaVA's form instead: question_id, image (looked up in --image_dir), text"})
    start: int = field(default=0, metadata={"help": "first question"})
    end: int = field(default=50, metadata={"help": "behind the last question"})
    out: str = field(default="runs/llava", metadata={"help": f"folder for {RESULTS_NAME} and the contact sheet"})
    sheet: int = field(default=6, metadata={"help": "pictures on the contact sheet; 0: none"})

    max_new_tokens: int = field(default=128, metadata={"help": "new tokens per question, at most"})
    temperature: float = field(default=0.6, metadata={"help": "0: greedy"})
    top_p: float = field(default=0.9, metadata={"help": "1: off"})
    top_k: int = field(default=0, metadata={"help": "0: off"})
    gamma: str = field(default="4", metadata={"help": "tokens that a chain drafts in a round, or auto: as many as pay", "aliases": ["--k"]})
    verification: Literal["rejection", "coupled"] = field(default="rejection", metadata={"help": "of chains; coupled returns vanilla's own tokens for the seed"})
    tree_verification: Literal["coupled", "match", "swor"] = field(default="coupled", metadata={"help": "of static and dynamic trees"})
    tree_budget: int = field(default=16, metadata={"help": "nodes of a tree, the root included"})
    tree_depth: int = field(default=8, metadata={"help": "levels of a tree; specexec: twice as many"})
    parallel_branches: int = field(default=8, metadata={"help": "trees: children of a node and nodes of a draft pass"})
    growmap: str | None = field(default=None, metadata={"help": "static_tree: the shape, made by build_growmap.py (default: fitted on the spot)"})
    runs: int = field(default=1, metadata={"help": "times that all questions are decoded"})
    seed: int = field(default=0, metadata={"help": "of the first run's noise, the order and the bootstrap"})
    fit_prompts: int = field(default=16, metadata={"help": "questions behind the measured ones that trees are fitted to"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before a model is loaded."""
        self.check_device()
        self._check_values()
        if self.growmap is not None:
            read_growmap(self.growmap)
        self.settings()
        if self.random_init is not None:
            self._check_random()
            return
        load_llava_config(self.target)
        if self.draft_path is not None and is_llava(self.draft_path):
            load_llava_config(self.draft_path)
        elif self.draft_path is not None:
            load_config(self.draft_path)
        if self.checkpoint is not None:
            read_exit_info(self.checkpoint)

    def _check_random(self) -> None:
        """Raise UserError for what random weights do not go with."""
        named_config(self.random_init, ("llava",))
        if self.model or self.checkpoint or self.image_dir or self.questions:
            raise UserError("--random_init has a draft and pictures of its own: leave out --model, --checkpoint, --image_dir and --questions")

    def _check_values(self) -> None:
        """Raise UserError for values that no run can have."""
        unknown = [word for word in self.method if word not in (*METHODS, "all")]
        if unknown:
            raise UserError(f"--method {' '.join(unknown)}: choose from {', '.join((*METHODS, 'all'))}")
        if not 0 <= self.start < self.end:
            raise UserError(f"--start {self.start} --end {self.end}: must be numbers with 0 <= start < end")
        for name in ("max_new_tokens", "runs", "fit_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("seed", "sheet"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.model is not None and self.checkpoint is not None:
            raise UserError("--model and --checkpoint: give one draft")

    @property
    def draft_path(self) -> str | None:
        """The model to draft with; the embedded target has one of its own."""
        if self.model is None and self.checkpoint is None and self.target == str(EMBEDDED_LLAVA):
            return str(EMBEDDED_DRAFT)
        return self.model

    @property
    def folder(self) -> Path | None:
        """Where pictures' names are looked up."""
        return None if self.image_dir is None else Path(self.image_dir)

    def settings(self) -> Settings:
        """What methods are set to. Raises UserError."""
        try:
            policy = SamplingPolicy(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(f"--{error}") from error
        own = {name: getattr(self, name) for name in Settings.__dataclass_fields__ if hasattr(self, name)}
        return Settings(policy=policy, branch_prune_threshold=0.0, commonsense="exact", followers=None, topk_rank=[], autojudge_checkpoint=None, autojudge_threshold=None, **own)

    def methods(self) -> tuple[list[str], set[str]]:
        """The methods to measure, in the order of METHODS, and those of them that were named themselves."""
        named = set(self.method) - {"all"}
        return [name for name in METHODS if name in named or "all" in self.method], named

    def asked(self) -> list[PictureQuestion]:
        """The questions to measure and those behind them that trees are fitted to. Raises UserError."""
        if self.questions is not None:
            found = file_questions(Path(self.questions))
        else:
            found = drawn_questions(self.prompt) if self.folder is None else folder_questions(self.folder, self.prompt)
        rest = list(islice(found, self.start, None)) if not isinstance(found, list) else found[self.start :]
        if not rest:
            raise UserError(f"--start {self.start}: there are not so many questions; give a lower one")
        return rest


def load_pair(args: Args) -> tuple[SightedTarget, Draft | None, Viewers]:
    """The target, its draft if there is one, and who looks at pictures."""
    target = load_llava(args.target, args, args.folder)
    if args.checkpoint is not None:
        return target, load_draft(target, args), Viewers(target)
    if args.draft_path is None:
        return target, None, Viewers(target)
    draft = load_picture_draft(args.draft_path, args, target)
    return target, model_draft(target, draft.model, args.draft_path), Viewers(target, draft)


def load_data(args: Args, viewers: Viewers) -> Data:
    """The questions from start to end as prompts; the next ones are fitted to, or, where there are none, the measured ones."""
    count = args.end - args.start
    chosen = readable(args.asked(), args.folder, count + args.fit_prompts)
    room = min(one.model.config.max_position_embeddings for one in viewers.all()) - args.max_new_tokens - args.settings().longest
    prompts = [as_prompt(question, viewers) for question in chosen]
    too_long = next((prompt for prompt in prompts if prompt.longest() > room), None)
    if too_long is not None:
        raise UserError(f"question {too_long.question.name} has {too_long.longest()} tokens, the context leaves {room}: lower --max_new_tokens, or leave it out")
    measured, more = prompts[:count], prompts[count:]
    fit = cache(lambda: [prompt.given() for prompt in (more or measured[: args.fit_prompts])])
    fitted_to = f"{len(more)} prompts {hash_of_pictures(more)[:16]} behind" if more else f"{args.fit_prompts} of"
    return Data(measured, fit, f"{fitted_to} the measured prompts {hash_of_pictures(measured)[:16]}, seed {args.seed}, {args.max_new_tokens} new tokens")


def shared_inputs(args: Args, target: Target, draft: Draft | None, eyes: list[str | None], data: Data) -> dict:
    """Everything that the figures of all methods depend on, beside the code and, its GPU apart, the machine; `eyes` are hashes."""
    return {**models_and_place(target, draft), "eyes": eyes, "prompts": hash_of_pictures(data.prompts), "seed": args.seed,
            **{name: getattr(args, name) for name in SHARED_FLAGS}}


def base_fields(args: Args, target: Target, draft: Draft | None, shared: dict) -> dict:
    """What every record says of models and prompts."""
    named = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    return {"backend": "hf" if args.random_init is None else "toy", **named_models(target, draft, args.draft_path or target.name), **named, "use_chat_template": True, "turn_index": 0,
            "max_samples": args.end - args.start, "dataset": args.questions or args.image_dir or ("shapes" if args.random_init is None else "random"), "dataset_sha256": shared["prompts"]}


# ---- random weights ----

def random_pair(args: Args) -> tuple[Target, Draft, Data]:
    """A random LLaVA in the shape of --random_init, its exit of planted acceptance, and random questions."""
    device, dtype, _ = args.resolve()
    config, settings = named_config(args.random_init, ("llava",)), args.settings()
    planted = planted_llava(config, args.planted_layer, args.planted_alpha, settings.policy, args.verification, dtype, device, args.seed)
    count = args.end - args.start
    prompts = [RandomPrompt.of(planted, args.start + number) for number in range(count + args.fit_prompts)]
    fit = cache(lambda: [prompt.given() for prompt in prompts[count:]])
    draft = Draft(planted.draft, {"checkpoint": f"exit at layer {args.planted_layer}, planted acceptance {planted.alpha:.3f}"})
    return Target(planted.model, None, f"random {args.random_init}"), draft, Data(prompts[:count], fit, f"random prompts, seed {args.seed}")


# ---- the contact sheet ----

def write_sheet(args: Args, benchmark: Benchmark, prompts: list[AskedPrompt]) -> None:
    """Some pictures with what the first drafting method wrote: sheet.png and sheet.html."""
    options = shown_options(args, benchmark)
    if options is None or not prompts or args.random_init is not None:
        return
    target = benchmark.target
    cards = [_card(prompt, index, options, benchmark) for index, prompt in enumerate(prompts)]
    title = f"{Path(target.name).name}, drafted by {Path(benchmark.subject.draft.columns['checkpoint']).name}: {options.method}"
    folder = Path(args.out)
    write_html(folder / "sheet.html", title, cards)
    write_png(folder / "sheet.png", title, cards)
    print(f"{folder / 'sheet.png'}, {folder / 'sheet.html'}: the colours of {len(cards)} texts")


def shown_options(args: Args, benchmark: Benchmark) -> DecodeOptions | None:
    """How the sheet's texts are decoded: by the first of SHOWN that was measured."""
    ok = {record["method"] for record in benchmark.file.records if record["status"] == "ok" and record["inputs"]["shared"] == benchmark.shared}
    method = next((name for name in SHOWN if name in ok and name in args.methods()[0]), None)
    if method is None:
        return None
    way, = ways_of(method, benchmark.subject, benchmark.settings)
    return benchmark.options.get(way.name) or way.make(benchmark.data.prompts[0].given())


def _card(prompt: AskedPrompt, index: int, options: DecodeOptions, benchmark: Benchmark) -> Card:
    """One text with its picture."""
    generation = generate(benchmark.target.model, prompt.given(), options, benchmark.subject.draft_model, prompt_id=index)
    pictures = tuple(open_picture(picture, benchmark.target.sight.folder) for picture in prompt.question.pictures)
    return card_of(prompt.question.text, benchmark.target.tokenizer, generation, pictures)


def main() -> int:
    args = parse_args(Args)
    args.check()
    methods, named = args.methods()
    path = Path(args.out) / RESULTS_NAME
    with RecordFile(path) as file:
        before = check_records(path, file)
        if args.random_init is not None:
            target, draft, data = random_pair(args)
            eyes, ends = [], frozenset()
        else:
            target, draft, viewers = load_pair(args)
            data, ends = load_data(args, viewers), eos_token_ids(target)
            eyes = [values_hash(str(one.eyes.shape), *one.eyes.modules()) if isinstance(one, SightedTarget) else None for one in viewers.all()]
        subject = Subject(target, draft, ends, Fitted(data.fit, data.fitted_to, None if draft is None else draft.columns["checkpoint"]))
        shared = shared_inputs(args, target, draft, eyes, data)
        benchmark = Benchmark(file, subject, data, args.settings(), shared, base_fields(args, target, draft, shared))
        benchmark.measure(methods, named, args.runs)
        records = file.records
        print(table(records, shared, methods))
        write_sheet(args, benchmark, data.prompts[: args.sheet])
    print(what_was_added(path, records[before:]))
    return int(benchmark.incomplete)


if __name__ == "__main__":
    run(main)

"""Every decoding method on questions about images: a LLaVA as the target, and a small LLaVA, a text-only Llama or the target's own exit as the draft.

    python -m commands.benchmark_llava --method all --out runs/llava                      # the embedded LLaVA, images that the suite draws
    python -m commands.benchmark_llava --model anthonycmu/llava-1.5-160m --target llava-hf/llava-1.5-7b-hf --image_dir test2015 \\
        --prompt "Can you tell me what is in the image?" --temperature 0.6 --top_p 0.9 --method dynamic_tree --start 0 --end 200 --out runs/llava
    python -m commands.benchmark_llava --target llava-hf/llava-1.5-7b-hf --checkpoint runs/llava-exit/model_002000.safetensors --method vanilla self_speculative \\
        --image_dir coco --questions llava-bench.jsonl --max_new_tokens 256 --out runs/llava-exit
    python -m commands.benchmark_llava --random_init llava-1.5-7b --torch_dtype bf16 --temperature 0 --out runs/llava-7b-speed

Each model encodes an image once, with its own vision encoder, and is prefilled once; then text is decoded as everywhere in this suite, with its records, statistics
and plots (see benchmark.py). Encoding belongs to the prefill's time. With a draft, a contact sheet shows some images with what was written, in the colours of where
tokens came from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from running.command_line import UserError, parse_args, run

from data.images import open_image
from data.shapes import QUESTION
from harness.flags import RESULTS_NAME, MethodArgs
from harness.image_prompts import AskedPrompt, ImageQuestion, RandomPrompt, as_prompt, drawn_questions, file_questions, folder_questions, readable
from harness.methods import Subject, chosen_methods, ways_of
from harness.prompts import fitting
from harness.runs import Benchmark, Data, check_records, named_models, shared_inputs, table, what_was_added
from measuring.evaluation import Draft, load_draft, model_draft
from measuring.token_views import Card, card_of, write_html, write_png
from measuring.tree_plans import Fitted, read_growmap
from models.llava_target import LlavaTarget, load_llava, load_llava_config, load_llava_draft, text_config
from models.planted_llava import planted_llava
from models.target_model import ASSETS, Target, eos_token_ids, named_config
from running.record_file import RecordFile
from speculative import DecodeOptions, context_length, generate
from truncated_llama import read_exit_info

METHODS = ("vanilla", "speculative", "self_speculative", "static_tree", "dynamic_tree", "specexec", "hf_generate")
EMBEDDED_LLAVA, EMBEDDED_DRAFT = ASSETS / "shapes-llava", ASSETS / "shapes-llava-draft"
SHARED_FLAGS = ("temperature", "top_p", "top_k", "max_new_tokens", "num_threads", "tf32", "attn_implementation")
SHOWN = ("self_speculative", "speculative", "dynamic_tree", "static_tree", "specexec")  # the first that was measured is on the contact sheet


@dataclass(kw_only=True)
class Args(MethodArgs):
    """Run decoding methods on images."""

    model_path: str | None = field(default=None, metadata={"help": "the target, a LLaVA 1.5: a Hugging Face id or folder (default: the embedded one)", "aliases": ["--target"]})
    draft_model_path: str | None = field(default=None, metadata={
        "help": "the draft: a small LLaVA, or a Llama that sees no images, with the target's tokenizer (default: the embedded target's own)", "aliases": ["--model"]})
    random_init: str | None = field(default=None, metadata={"help": "random weights in this shape instead, such as llava-1.5-7b, with an exit: for speed"})
    planted_alpha: float = field(default=0.8, metadata={"help": "with --random_init: the acceptance that the exit is made to have"})
    planted_layer: int = field(default=1, metadata={"help": "with --random_init: the exit's layer"})
    method: list[str] = field(default_factory=lambda: ["all"], metadata={"help": f"all, or some of {' '.join(METHODS)}"})
    image_dir: str | None = field(default=None, metadata={"help": "folder of images (default: images that the suite draws)"})
    prompt: str | None = field(default=None, metadata={"help": f"what is asked about each image (default: {QUESTION})"})
    questions: str | None = field(default=None, metadata={"help": "JSONL in LLaVA's form instead: question_id, image (looked up in --image_dir), text"})
    start: int = field(default=0, metadata={"help": "index of the first question, from 0"})
    end: int = field(default=50, metadata={"help": "index behind the last question"})
    out: str = field(default="runs/llava", metadata={"help": f"folder for {RESULTS_NAME} and the contact sheet"})
    sheet: int = field(default=6, metadata={"help": "images on the contact sheet; 0: none"})
    max_new_tokens: int = field(default=128, metadata={"help": "new tokens per question, at most"})
    temperature: float = field(default=0.6, metadata={"help": "0: greedy"})
    top_p: float = field(default=0.9, metadata={"help": "1: off"})

    def check(self) -> None:
        """Raise UserError for flags that cannot work, before a model is loaded."""
        self.check_device()
        self.check_counts()
        self.methods()
        self._check_questions()
        if self.draft_model_path is not None and self.checkpoint is not None:
            raise UserError("--draft_model_path and --checkpoint: give one draft")
        if self.random_init is not None:
            self._check_random()
        else:
            self._check_models()
        self.settings()
        if self.growmap is not None:
            read_growmap(self.growmap)

    def _check_models(self) -> None:
        """Raise UserError for models that cannot be found, or are none for this."""
        load_llava_config(self.target_path)
        if self.draft_path is not None:
            text_config(self.draft_path)
        if self.checkpoint is not None:
            read_exit_info(self.checkpoint)

    def _check_questions(self) -> None:
        """Raise UserError for questions that nobody can ask."""
        if not 0 <= self.start < self.end:
            raise UserError(f"--start {self.start} --end {self.end}: must be numbers with 0 <= start < end")
        if self.sheet < 0:
            raise UserError(f"--sheet {self.sheet}: must not be negative")
        if self.questions is not None and self.prompt is not None:
            raise UserError("--questions and --prompt: the file says what is asked; leave one out")

    def _check_random(self) -> None:
        """Raise UserError for what random weights do not go with."""
        named_config(self.random_init, ("llava",))
        others = ("model_path", "draft_model_path", "checkpoint", "image_dir", "questions", "prompt")
        given = [f"--{name}" for name in others if getattr(self, name) is not None]
        if given:
            raise UserError(f"--random_init has a target, a draft and questions of its own: leave out {' and '.join(given)}")

    @property
    def target_path(self) -> str:
        """The target, or the embedded one."""
        return self.model_path or from_here(EMBEDDED_LLAVA)

    @property
    def draft_path(self) -> str | None:
        """The model to draft with; the embedded target has one of its own."""
        embedded = self.model_path is None and self.checkpoint is None and self.random_init is None
        return self.draft_model_path or (from_here(EMBEDDED_DRAFT) if embedded else None)

    @property
    def folder(self) -> Path | None:
        """Where images' names are looked up."""
        return None if self.image_dir is None else Path(self.image_dir)

    def methods(self) -> tuple[list[str], set[str]]:
        """The methods to measure, and those of them that were named themselves. Raises UserError."""
        return chosen_methods(self.method, names=METHODS)

    def asked(self) -> Iterable[ImageQuestion]:
        """All questions. Raises UserError."""
        if self.questions is not None:
            return file_questions(Path(self.questions))
        text = self.prompt or QUESTION
        return drawn_questions(text) if self.folder is None else folder_questions(self.folder, text)

    def chosen(self) -> tuple[list[ImageQuestion], list[ImageQuestion]]:
        """Of the questions from `start` to `end` those whose images can be read, and of those behind them that trees are fitted to. Raises UserError."""
        asked = islice(self.asked(), self.start, self.end + self.fit_prompts)
        count = self.end - self.start
        measured = readable(islice(asked, count), self.folder)
        if not measured:
            raise UserError(f"--start {self.start} --end {self.end}: no question there whose images can be read; choose others")
        return measured, readable(asked, self.folder)


def from_here(path: Path) -> str:
    """`path` as records name it: from the current folder."""
    return os.path.relpath(path)


# ---- what decodes, and what it decodes ----

def load_subject(args: Args, questions: tuple[list[ImageQuestion], list[ImageQuestion]]) -> tuple[Subject, Data, list[str | None]]:
    """Target and draft, the prompts, and what identifies how models see."""
    target = load_llava(args.target_path, args, args.folder)
    models, draft = (target,), None
    if args.checkpoint is not None:
        draft = load_draft(target, args)
    elif args.draft_path is not None:
        model = load_llava_draft(args.draft_path, args, target)
        models, draft = (target, model), model_draft(target, model.model, args.draft_path)
    data = load_data(args, questions, models)
    subject = Subject(target, draft, eos_token_ids(target), Fitted(data.fit, data.fitted_to, None if draft is None else draft.columns["checkpoint"]))
    return subject, data, [one.sees_as if isinstance(one, LlavaTarget) else None for one in models]


def load_data(args: Args, questions: tuple[list[ImageQuestion], list[ImageQuestion]], models: tuple[Target, ...]) -> Data:
    """The measured questions as prompts, and those behind them that trees are fitted to, or, where there are none, the measured ones."""
    room = context_length(models[0].model.config) - args.max_new_tokens - args.settings().longest
    measured, behind = ([prompt for _, prompt in fitting(some, partial(as_prompt, models=models), room)] if some else [] for some in questions)
    return Data.of(measured, behind, list, args)


def random_subject(args: Args) -> tuple[Subject, Data, list[str | None]]:
    """A random LLaVA in the shape of --random_init with an exit of planted acceptance, and random questions."""
    device, dtype, _ = args.resolve()
    planted = planted_llava(
        named_config(args.random_init, ("llava",)), args.planted_layer, args.planted_alpha, args.settings().policy, args.verification, dtype, device, args.seed)
    prompts = [RandomPrompt.of(planted, number) for number in range(args.start, args.end + args.fit_prompts)]
    count = args.end - args.start
    data = Data.of(prompts[:count], prompts[count:], list, args)
    draft = Draft(planted.draft, {"checkpoint": f"exit at layer {args.planted_layer}, planted acceptance {planted.alpha:.3f}"})
    return Subject(Target(planted.model, None, f"random {args.random_init}"), draft, frozenset(), Fitted(data.fit, data.fitted_to)), data, [planted.vision.identity]


def base_fields(args: Args, subject: Subject, shared: dict) -> dict:
    """What every record says of models and prompts."""
    named = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    return {"backend": "hf" if args.random_init is None else "toy", **named_models(subject, args.draft_path), **named, "use_chat_template": args.random_init is None,
            "turn_index": 0, "max_samples": args.end - args.start, "dataset": args.questions or args.image_dir or ("shapes" if args.random_init is None else "random"),
            "dataset_sha256": shared["prompts"]}


# ---- the contact sheet ----

def write_sheet(args: Args, benchmark: Benchmark) -> None:
    """Some images with what the first drafting method wrote: sheet.png and sheet.html."""
    if args.sheet == 0 or args.random_init is not None:
        return
    options = shown_options(args, benchmark)
    if options is None:
        return
    cards = [_card(prompt, index, options, benchmark) for index, prompt in enumerate(benchmark.data.prompts[: args.sheet])]
    title = f"{Path(benchmark.target.name).name}, drafted by {Path(benchmark.subject.draft.columns['checkpoint']).name}: {options.method}"
    png, page = (Path(args.out) / f"sheet.{suffix}" for suffix in ("png", "html"))
    write_html(page, title, cards)
    write_png(png, title, cards)
    print(f"{png}, {page}: where the tokens of {len(cards)} texts came from")


def shown_options(args: Args, benchmark: Benchmark) -> DecodeOptions | None:
    """How the sheet's texts are decoded: by the first of SHOWN that was measured."""
    measured = {record["method"] for record in benchmark.file.records if record["status"] == "ok" and record["inputs"]["shared"] == benchmark.shared}
    method = next((name for name in SHOWN if name in measured and name in args.methods()[0]), None)
    if method is None:
        return None
    way, = ways_of(method, benchmark.subject, benchmark.settings)
    return benchmark.options.get(way.name) or way.make(benchmark.data.prompts[0].given())


def _card(prompt: AskedPrompt, index: int, options: DecodeOptions, benchmark: Benchmark) -> Card:
    generation = generate(benchmark.target.model, prompt.given(), options, benchmark.subject.draft_model, prompt_id=index)
    images = tuple(open_image(image, benchmark.target.images.image_dir) for image in prompt.images)
    return card_of(prompt.question.text, benchmark.target.tokenizer, generation, images)


def main() -> int:
    args = parse_args(Args)
    args.check()
    methods, named = args.methods()
    questions = ([], []) if args.random_init is not None else args.chosen()
    with RecordFile(Path(args.out) / RESULTS_NAME) as file:
        check_records(file)
        before = len(file.records)
        subject, data, vision = random_subject(args) if args.random_init is not None else load_subject(args, questions)
        shared = shared_inputs(subject, data, args, SHARED_FLAGS, vision=vision)
        benchmark = Benchmark(file, subject, data, args.settings(), shared, base_fields(args, subject, shared))
        benchmark.measure(methods, named, args.runs)
        print(table(file.records, shared, methods))
        if len(file.records) > before:
            write_sheet(args, benchmark)
        print(what_was_added(file, before))
    return int(benchmark.incomplete)


if __name__ == "__main__":
    run(main)

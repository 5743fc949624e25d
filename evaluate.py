"""One draft against its target: quality, acceptance, tokens per second.

    python evaluate.py --model_path assets/pydoc-llama-7m --checkpoint runs/try/model_000100.safetensors \\
        --quality_datasets pydoc --out_dir runs/try/evaluation
    python evaluate.py --model_path meta-llama/Llama-3.1-8B-Instruct --draft_model_path meta-llama/Llama-3.2-1B-Instruct \\
        --quality_datasets ultrachat --spec_temperature 0.7 --spec_top_p 0.95 --out_dir runs/llama-pair
    python evaluate.py --model_path assets/pydoc-llama-7m --checkpoint runs/try/model_000100.safetensors --method dynamic_tree \\
        --tree_budget 32 --quality_datasets pydoc --out_dir runs/try/tree
    python evaluate.py --model_path assets/pydoc-llama-7m --checkpoint runs/try/model_000100.safetensors \\
        --quality_datasets pydoc --potential --start 0 --end 100 --out_dir runs/try/potential

Prints a table and writes metrics.json; metrics.QUALITY_COLUMNS and SPECULATION_COLUMNS say what each name means. With
`--potential` nothing is decoded: a quick look at what the draft promises, in potential.json (metrics.POTENTIAL_COLUMNS). With `--show 4` the texts
behind the first 4 prompts, in the colours of where their tokens came from: on a terminal, and in texts.html.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from running.command_line import UserError, parse_args, run

from measuring.evaluation import DraftArgs, EvaluationArgs, choose_prompts, evaluate_draft, load_draft, summary_table
from measuring.potential import PotentialArgs, PotentialOptions, evaluate_examples, potential_table
from measuring.token_views import as_ansi, card_of, legend, write_html
from models.target_model import Target, load_target
from running.run_files import new_output_dir, record_run, write_json
from speculative import Generation

RESULTS_NAME, POTENTIAL_NAME, TEXTS_NAME = "metrics.json", "potential.json", "texts.html"


@dataclass(kw_only=True)
class Args(PotentialArgs, DraftArgs, EvaluationArgs):
    """Evaluate one draft."""

    show: int = field(default=0, metadata={"help": f"show so many texts in the colours of where their tokens came from: on a terminal, and in {TEXTS_NAME}"})

    def check(self) -> None:
        super().check()
        if not 0 <= self.show <= self.spec_num_prompts:
            raise UserError(f"--show {self.show}: must lie between 0 and --spec_num_prompts {self.spec_num_prompts}")
        if self.show and self.potential:
            raise UserError("--show and --potential: the latter decodes nothing; leave one out")
        self.check_draft(self.model_path, max(self.spec_prompt_length + self.spec_max_new_tokens + self.longest, self.max_length))
        self.check_potential(self.gamma, [path for path in (self.model_path, self.draft_model_path) if path is not None])

    def settings_hash(self, facts: dict) -> str:
        """As evaluate_checkpoints.py's: the flags of the potential test change nothing in metrics.json."""
        shared = {flag.name: getattr(self, flag.name) for flag in fields(EvaluationArgs)}
        return EvaluationArgs(**shared).settings_hash(facts)


def evaluate(args: Args) -> None:
    """Quality and speculation of the draft: metrics.json."""
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "an evaluation")
    data = args.open_data()
    target = load_target(args.model_path, args)
    facts = args.facts(target, data)
    record_run(folder, args, facts)
    row, drafted = evaluate_draft(target, load_draft(target, args), args, data)
    row["settings_hash"] = args.settings_hash(facts)
    print(summary_table([row], args.quality_datasets[0]))  # first: it stays if there is no room for the file
    write_json(folder / RESULTS_NAME, row)
    if args.show:
        show_texts(target, row, choose_prompts(target, args, data), drafted[: args.show], folder / TEXTS_NAME)
    print(folder / RESULTS_NAME)


def show_texts(target: Target, row: dict, prompts: list[list[int]], drafted: list[Generation], path: Path) -> None:
    """The first measured texts in the colours of where their tokens came from: at `path`, and on a terminal."""
    cards = [card_of(target.tokenizer.decode(prompt, skip_special_tokens=True), target.tokenizer, one) for prompt, one in zip(prompts, drafted, strict=False)]
    write_html(path, f"{row['method']}, drafted by {Path(row['checkpoint']).name}", cards)
    if sys.stdout.isatty():
        print("\n\n".join([as_ansi(legend()), *(f"{card.prompt}{as_ansi(card.text)}\n{card.note}" for card in cards)]))
    print(path)


def evaluate_potential(args: Args) -> None:
    """What the draft promises on the first quality data set: potential.json."""
    folder = new_output_dir(args.out_dir, POTENTIAL_NAME, "a potential test")
    data = args.open_data()
    examples = args.chosen_examples(args.quality_datasets[0], data)
    target = load_target(args.model_path, args)
    draft = load_draft(target, args)
    record_run(folder, args, args.facts(target, data))
    options = PotentialOptions(args.policy(), int(args.gamma), args.kl_temperature or 1.0, args.quality_batch_size, args.seed)
    row = evaluate_examples(target, draft.model, examples, args, options)
    print(potential_table(row))
    write_json(folder / POTENTIAL_NAME, {**draft.columns, "dataset": args.quality_datasets[0], **row})
    print(folder / POTENTIAL_NAME)


def main() -> None:
    args = parse_args(Args)
    args.check()
    (evaluate_potential if args.potential else evaluate)(args)


if __name__ == "__main__":
    run(main)

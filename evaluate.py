"""One draft against its target: quality, acceptance, tokens per second.

    python evaluate.py --model_path assets/pydoc-llama-7m --checkpoint runs/try/model_000100.safetensors \\
        --quality_datasets pydoc --out_dir runs/try/evaluation
    python evaluate.py --model_path meta-llama/Llama-3.1-8B-Instruct --draft_model_path meta-llama/Llama-3.2-1B-Instruct \\
        --quality_datasets ultrachat --spec_temperature 0.7 --spec_top_p 0.95 --out_dir runs/llama-pair
    python evaluate.py --model_path assets/pydoc-llama-7m --checkpoint runs/try/model_000100.safetensors \\
        --quality_datasets pydoc --potential --start 0 --end 100 --out_dir runs/try/potential

Prints a table and writes metrics.json; metrics.QUALITY_COLUMNS and SPECULATION_COLUMNS say what each name means. With
`--potential` nothing is decoded: a quick look at what the draft promises, in potential.json (metrics.POTENTIAL_COLUMNS).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from command_line import UserError, parse_args, run

from transformers import PretrainedConfig

from evaluation import Draft, EvaluationArgs, evaluate_draft, exit_draft, model_draft, summary_table
from potential import PotentialArgs, PotentialOptions, evaluate_examples, potential_table
from results import new_output_dir, record_run, write_json
from target_model import Target, load_config, load_target, load_tokenizer, tokenizer_hash
from truncated_llama import TruncatedLlama, load_exit, read_exit_info

RESULTS_NAME, POTENTIAL_NAME = "metrics.json", "potential.json"


@dataclass(kw_only=True)
class Args(PotentialArgs, EvaluationArgs):
    """Evaluate one draft."""

    checkpoint: str | None = field(default=None, metadata={"help": "an exit made by train.py"})
    draft_model_path: str | None = field(default=None, metadata={"help": "an independent model with the target's tokenizer"})

    def check(self) -> None:
        if (self.checkpoint is None) == (self.draft_model_path is None):
            raise UserError("give either --checkpoint EXIT or --draft_model_path MODEL")
        super().check()
        self.check_potential(self.gamma, [path for path in (self.model_path, self.draft_model_path) if path is not None])
        if self.checkpoint is not None:
            read_exit_info(self.checkpoint)
            return
        self._check_draft_model(load_config(self.draft_model_path))

    def _check_draft_model(self, config: PretrainedConfig) -> None:
        hashes = {tokenizer_hash(load_tokenizer(path)) for path in (self.model_path, self.draft_model_path)}
        if len(hashes) > 1 or config.vocab_size != load_config(self.model_path).vocab_size:
            raise UserError(f"{self.draft_model_path} and {self.model_path} have different tokenizers; a draft needs the target's own")
        if max(self.spec_prompt_length + self.spec_max_new_tokens + self.longest, self.max_length) > config.max_position_embeddings:
            raise UserError(f"the context of {self.draft_model_path} is {config.max_position_embeddings} tokens: lower --spec_prompt_length, "
                            f"--spec_max_new_tokens or --max_length")

    def settings_hash(self, facts: dict) -> str:
        """As evaluate_checkpoints.py's: the flags of the potential test change nothing in metrics.json."""
        shared = {flag.name: getattr(self, flag.name) for flag in fields(EvaluationArgs)}
        return EvaluationArgs(**shared).settings_hash(facts)


def load_draft(args: Args, target: Target) -> Draft:
    """The draft that the flags name."""
    if args.checkpoint is None:
        return model_draft(target, load_target(args.draft_model_path, args).model, args.draft_model_path)
    exit_, info = load_exit(args.checkpoint, target)
    return exit_draft(target, TruncatedLlama(target.model, exit_), info, args.checkpoint, info.kind)


def evaluate(args: Args) -> None:
    """Quality and speculation of the draft: metrics.json."""
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "an evaluation")
    data = args.open_data()
    target = load_target(args.model_path, args)
    facts = args.facts(target, data)
    record_run(folder, args, facts)
    row = {**evaluate_draft(target, load_draft(args, target), args, data), "settings_hash": args.settings_hash(facts)}
    write_json(folder / RESULTS_NAME, row)
    print(summary_table([row], args.quality_datasets[0]))
    print(folder / RESULTS_NAME)


def evaluate_potential(args: Args) -> None:
    """What the draft promises on the first quality data set: potential.json."""
    folder = new_output_dir(args.out_dir, POTENTIAL_NAME, "a potential test")
    data = args.open_data()
    examples = args.chosen_examples(args.quality_datasets[0], data)
    target = load_target(args.model_path, args)
    draft = load_draft(args, target)
    record_run(folder, args, args.facts(target, data))
    options = PotentialOptions(args.policy(), int(args.gamma), args.kl_temperature or 1.0, args.quality_batch_size, args.seed)
    row = evaluate_examples(target, draft.model, examples, args, options)
    write_json(folder / POTENTIAL_NAME, {**draft.columns, "dataset": args.quality_datasets[0], **row})
    print(potential_table(row))
    print(folder / POTENTIAL_NAME)


def main() -> None:
    args = parse_args(Args)
    args.check()
    (evaluate_potential if args.potential else evaluate)(args)


if __name__ == "__main__":
    run(main)

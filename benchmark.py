"""Every decoding method on the same prompts, side by side: JSONL that can be checked, resumed and plotted.

    python benchmark.py --method all --max_samples 10 --out results.jsonl
    python benchmark.py --experiment llama3_draft_k4 --dataset question.jsonl --runs 3 --out runs/mt_bench
    python benchmark.py --hf_model meta-llama/Llama-3.2-1B-Instruct --checkpoint runs/chat/model_002000.safetensors --method self_speculative \\
        hf_generate --dataset gsm8k --max_new_tokens 512 --temperature 0 --out runs/gsm8k
    python benchmark.py --toy --method all --max_samples 3 --max_new_tokens 16 --out runs/toy
    python benchmark.py --list_presets

Without a model it takes the embedded target and its exit. A record per (method, run) is appended as soon as it is known, then a summary per method;
`harness/schema.py` says what every field means, `commands/validate_results.py` checks a file, `commands/plot_results.py` draws it. The same command goes on
where it stopped: what is finished is skipped, what failed is tried again. A method that cannot run is skipped with the reason, one that raises leaves
the others alone.

Every method first decodes a few prompts that do not count, the longest among them; then they take turns, prompt by prompt, in an order drawn anew each time.
Run r draws with seed + r - 1. Tokenisation is outside all times, prefill and decoding are apart. Static trees and coupled values are fitted to prompts
behind the measured ones, where the data set has more.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from running.command_line import UserError, parse_args, run

from decoding.sampling import SamplingPolicy
from harness.flags import Args
from harness.methods import Subject
from harness.presets import listing, with_presets
from harness.prompts import Prompt, Question, encode, read_questions, turn_prompts
from harness.runs import Benchmark, Data, check_records, named_models, shared_inputs, table, what_was_added
from measuring.evaluation import Draft, load_draft, model_draft
from measuring.tree_plans import Fitted
from models.planted import planted_pair
from models.target_model import EMBEDDED_TARGET, Target, eos_token_ids, load_target, load_tokenizer, named_config
from running.record_file import RecordFile
from running.run_files import display_active
from speculative import DecodeOptions, context_length, generate

TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOY_ALPHA = 0.8
SHARED_FLAGS = ("temperature", "top_p", "top_k", "max_new_tokens", "turn_index", "use_chat_template", "system_prompt", "num_threads", "tf32", "attn_implementation",
                "quant", "bnb_compute_dtype", "draft_dtype", "draft_quant", "draft_bnb_compute_dtype", "toy")


# ---- what decodes, and what it decodes ----

def load_pair(args: Args) -> tuple[Target, Draft | None]:
    """The target and its draft, if there is one."""
    if args.toy:
        return toy_pair(args)
    target = load_target(args.model_path, args, quant=args.quant, compute_dtype=args.bnb_compute_dtype, families=args.families)
    if args.draft_model_path is not None:
        own = replace(args, torch_dtype=args.draft_dtype or args.torch_dtype)
        model = load_target(args.draft_model_path, own, quant=args.draft_quant, compute_dtype=args.draft_compute_dtype, families=None).model
        return target, model_draft(target, model, args.draft_model_path)
    return target, load_draft(target, args) if args.checkpoint is not None else None


def toy_pair(args: Args) -> tuple[Target, Draft]:
    """A tiny random Llama with the embedded tokenizer, and an exit of planted acceptance."""
    device, dtype, _ = args.resolve()
    config = named_config(str(EMBEDDED_TARGET))
    for name, value in TOY.items():
        setattr(config, name, value)
    pair = planted_pair(config, 1, TOY_ALPHA, SamplingPolicy(1.0), dtype=dtype, device=device, seed=args.seed)
    target = Target(pair.model, load_tokenizer(str(EMBEDDED_TARGET)), "toy")
    return target, Draft(pair.draft, {"checkpoint": "toy"})


def load_data(target: Target, draft: Draft | None, args: Args, questions: list[Question]) -> Data:
    """The first `max_samples` questions as prompts; the next ones are fitted to, or, where there are none, the measured ones."""
    context = min(context_length(model.config) for model in (target.model, *([] if draft is None else [draft.model])))
    longest = context - args.max_new_tokens - args.settings().longest

    def as_prompts(chosen: list[Question]) -> list[Prompt]:
        return turn_prompts(chosen, args.turn_index, lambda question: encode(question, target.tokenizer, args.system_prompt, args.use_chat_template),
                            lambda prompt: greedy_answer(target, prompt, args), longest)

    measured, behind = questions[: args.max_samples], questions[args.max_samples : args.max_samples + args.fit_prompts]
    return Data.of(as_prompts(measured), behind, as_prompts, args)


def greedy_answer(target: Target, prompt: Prompt, args: Args) -> str:
    """The target's own answer to a first turn."""
    options = DecodeOptions(policy=SamplingPolicy(0.0), max_new_tokens=args.max_new_tokens, eos_ids=eos_token_ids(target))
    return target.tokenizer.decode(generate(target.model, prompt.input_ids, options).tokens, skip_special_tokens=True).strip()


def base_fields(args: Args, subject: Subject, shared: dict) -> dict:
    """What every record says of models and prompts."""
    quantised = {"quant": args.quant, "bnb_compute_dtype": args.bnb_compute_dtype} if args.quant else {}
    if args.draft_quant:
        quantised |= {"draft_quant": args.draft_quant, "draft_bnb_compute_dtype": args.draft_compute_dtype}
    named = {name: getattr(args, name) for name in ("use_chat_template", "system_prompt", "max_samples", "turn_index", "max_new_tokens", "temperature", "top_p", "top_k")}
    return {"backend": "toy" if args.toy else "hf", **named_models(subject, args.draft_model_path), **quantised, **named,
            "dataset": args.dataset, "dataset_sha256": shared["prompts"]}


def main() -> int:
    args = parse_args(Args, with_presets(sys.argv[1:]))
    if args.list_presets:
        print(listing())
        return 0
    if args.require_headless and display_active() == "enabled":
        raise UserError("--require_headless: a GPU drives a display, which disturbs timing; stop the display server, or leave the flag out")
    args.check()
    questions = read_questions(args.dataset, args.turn_index, args.max_samples + args.fit_prompts)
    methods, named = args.methods()
    with RecordFile(args.file) as file:
        check_records(file)
        before = len(file.records)
        target, draft = load_pair(args)
        data = load_data(target, draft, args, questions)
        path = None if draft is None or args.toy else draft.columns["checkpoint"]
        subject = Subject(target, draft, eos_token_ids(target), Fitted(data.fit, data.fitted_to, path))
        shared = shared_inputs(subject, data, args, SHARED_FLAGS)
        benchmark = Benchmark(file, subject, data, args.settings(), shared, base_fields(args, subject, shared))
        benchmark.measure(methods, named, args.runs)
        print(table(file.records, shared, methods))
        print(what_was_added(file, before))
    return int(benchmark.incomplete)


if __name__ == "__main__":
    run(main)

"""benchmark.py from the command line: what it measures and in which order, what it leaves out, repeats, and survives; one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import benchmark
from commands import validate_results
from decoding.autojudge import Judge
from decoding.growmap import chain, save_growmap
from harness import flags as bench_args
from harness import methods as bench_methods
from harness import runs as bench_runs
from harness.methods import LOSSY, NAMES
from harness.prompts import Prompt
from harness.schema import complaints
from measuring.followers import Followers, save_followers
from models.target_model import tokenizer_hash
from running.record_file import RecordFile, read_records
from test_commands import check_one_line, run_main
from test_tuning import save_exits, time_little
from toy_models import noisy_exit, tiny_llama
from training.judges import Fitted, JudgeInfo, save_judge

CHAINS, TREES = ("speculative", "self_speculative"), ("static_tree", "dynamic_tree", "specexec", "common_sense")
QUESTIONS = ["Add 2 and 3.", "Add 4 and 4, please, and show how.", "Add 1 and 9.", "Take 5 from 8.", "Double 6."]
SMALL = {"method": ["all"], "max_samples": 3, "max_new_tokens": 8, "fit_prompts": 2, "tree_budget": 6, "tree_depth": 2, "parallel_branches": 3, "num_threads": 1}


@pytest.fixture(scope="module")
def subject(tmp_path_factory, tokenizer) -> SimpleNamespace:
    """A saved target, exits of it (see save_exits), and all that its methods need: a judge, followers, a growmap, questions."""
    root = tmp_path_factory.mktemp("bench")
    found = save_exits(root, tokenizer)
    draft = noisy_exit(found.target.model, 1, scale=0.02)
    judge = Judge(torch.zeros(7), torch.ones(7), ((torch.ones(1, 7), torch.zeros(1)),), 0.5, "law")
    save_judge(root / "judge.safetensors", judge, JudgeInfo.of(Fitted(judge, None, 0.5, 0.5, 10, 5), found.target, draft, "noisy", {}))
    table = torch.randint(0, len(tokenizer), (len(tokenizer), 3), generator=torch.Generator().manual_seed(0))
    save_followers(root / "followers.safetensors", Followers(table, tokenizer_hash(tokenizer), {}))
    save_growmap(root / "growmap.json", chain(3))
    rows = [{"question": text, "answer": f"#### {index}"} for index, text in enumerate(QUESTIONS)]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(root=root, target=found.target, model=found.target.name, noisy=found.noisy, same=found.same, judge=str(root / "judge.safetensors"),
                           followers=str(root / "followers.safetensors"), growmap=str(root / "growmap.json"), questions=str(root / "questions.jsonl"))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    time_little(monkeypatch)


def command(subject: SimpleNamespace, out: Path, **changes: object) -> list:
    flags = {**SMALL, "hf_model": subject.model, "checkpoint": subject.noisy, "dataset": subject.questions, "out": out, **changes}
    given = {name: value for name, value in flags.items() if value is not None}
    return [text for name, value in given.items() for text in (f"--{name}", *(value if isinstance(value, list) else [value]))]


def start(monkeypatch, subject: SimpleNamespace, out: Path, status: int = 0, **changes: object) -> list[dict]:
    """The records of the file after a start that must end with this status; all must be valid."""
    assert run_main(benchmark, command(subject, out, **changes), monkeypatch) == status
    records = read_records(out)
    assert not [(record["method"], wrong) for record in records for wrong in complaints(record)]
    return records


def runs_of(records: list[dict], **wanted: object) -> list[tuple]:
    """(method, run, status) of the runs among the records that have these values."""
    return [(record["method"], record["run"], record["status"]) for record in records
            if not record["summary"] and all(record.get(name) == value for name, value in wanted.items())]


def record_calls(monkeypatch) -> list[SimpleNamespace]:
    """Every generation that the benchmark asks for, in order."""
    calls, exact = [], benchmark.generate

    def generate(target, prompt, options, draft=None, *, prompt_id=0):
        found = exact(target, prompt, options, draft, prompt_id=prompt_id)
        calls.append(SimpleNamespace(options=options, prompt=tuple(prompt), prompt_id=prompt_id, tokens=found.tokens))
        return found

    for module in (benchmark, bench_runs):
        monkeypatch.setattr(module, "generate", generate)
    return calls


# ---- every method ----

@pytest.fixture(scope="module")
def everything(subject, tmp_path_factory) -> SimpleNamespace:
    """Two runs of all methods, coupled where they can be: the file, what was decoded and printed; then a second start of the same command."""
    out = tmp_path_factory.mktemp("all") / "results.jsonl"
    flags = {"runs": 2, "verification": "coupled", "autojudge_checkpoint": subject.judge, "followers": subject.followers, "topk_rank": ["2", "all"]}
    with pytest.MonkeyPatch.context() as patch:
        time_little(patch)
        calls = record_calls(patch)
        records = start(patch, subject, out, **flags)
        first, content = list(calls), out.read_bytes()
        start(patch, subject, out, **flags)
        return SimpleNamespace(out=out, records=records, calls=first, again=calls[len(first):], content=content, flags=flags)


def test_each_method_has_its_runs_and_a_summary(everything):
    ways = [method for method in NAMES for _ in range(2 if method == "topk" else 1)]
    assert Counter(runs_of(everything.records)) == Counter((method, run, "ok") for method in ways for run in (1, 2))
    assert Counter(record["method"] for record in everything.records if record["summary"]) == Counter(ways)


def test_lossless_methods_are_named_so_and_coupled_ones_return_vanillas_text(everything):
    for record in everything.records:
        assert record["lossless"] == (record["method"] not in LOSSY)
    texts = {}
    for call in everything.calls:
        texts.setdefault((call.prompt, call.prompt_id, call.options.seed), {})["common_sense" if call.options.common_sense else call.options.method] = call.tokens
    for found in texts.values():
        assert all(found[method] == found["vanilla"] for method in (*CHAINS, *TREES) if method in found)
    vanilla = {record["run"]: record["tokens_by_prompt"] for record in everything.records if record["method"] == "vanilla" and not record["summary"]}
    for record in everything.records:
        if not record["summary"] and record["method"] in (*CHAINS, *TREES):
            assert record["tokens_by_prompt"] == vanilla[record["run"]]


def test_figures_of_a_run_belong_together(everything):
    for record in (record for record in everything.records if not record["summary"]):
        assert len(record["tokens_by_prompt"]) == len(record["decode_sec_by_prompt"]) == len(record["correct_by_prompt"]) == record["prompts"] == 3
        assert record["tokens_per_sec"] == pytest.approx(sum(record["tokens_by_prompt"]) / sum(record["decode_sec_by_prompt"]))
        assert record["duration_sec"] == pytest.approx(record["prefill_sec"] + record["decode_sec"])
        assert record["tokens_per_call"] == pytest.approx(sum(record["tokens_by_prompt"]) / sum(record["target_calls_by_prompt"]))
        assert record["seed"] == record["run"] - 1 and "peak_memory_bytes" not in record
        assert ("proposed" in record) == (record["method"] not in ("vanilla", "hf_generate", "hf_assisted"))
        assert ("cache_hit_rate" in record) == (record["method"] in TREES) and ("target_fallback_rate" in record) == (record["method"] in LOSSY)
    rules = {record["judge_rule"] for record in everything.records if "judge_rule" in record}
    assert rules == {"among the target's top 2", "among the target's top all", "P(accept) >= 0.5"}


def test_the_strict_validator_agrees(everything, monkeypatch, capsys):
    assert run_main(validate_results, ["--path", everything.out, "--strict"], monkeypatch) == 0
    assert "24 run, ok, 12 summary; valid" in capsys.readouterr().out


def test_a_second_start_adds_nothing_and_decodes_nothing(everything):
    assert not everything.again and everything.out.read_bytes() == everything.content


def test_the_table_is_printed_again(everything, subject, monkeypatch, capsys):
    start(monkeypatch, subject, everything.out, **everything.flags)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{everything.out}: nothing left to do"
    assert printed[0].split()[:2] == ["method", "lossless"]
    assert [line.split()[0] for line in printed[1:-1]] == [method for method in NAMES for _ in range(2 if method == "topk" else 1)]


def test_skipped_methods_say_why_and_only_named_ones_are_missed(subject, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    records = start(monkeypatch, subject, out, method=["all"], checkpoint=None)
    assert [name for name, _, status in runs_of(records) if status == "ok"] == ["vanilla", "hf_generate"]
    reasons = {record["method"]: record["info_message"] for record in records if record["status"] == "skipped" and not record["summary"]}
    assert set(reasons) == set(NAMES) - {"vanilla", "hf_generate"} and all("give --checkpoint EXIT or --draft_model_path MODEL" in why for why in reasons.values())
    assert "speculative is skipped: needs a draft" in capsys.readouterr().err
    for _ in range(2):  # what is missing is missing at the second start, too, which adds no record
        again = start(monkeypatch, subject, out, status=1, method=["vanilla", "speculative"], checkpoint=None)
        assert len(again) == len(records)
    records = start(monkeypatch, subject, out, method=["all"], autojudge_checkpoint=subject.judge)
    assert {name for name, _, status in runs_of(records) if status == "skipped"} >= {"common_sense"}
    assert ("autojudge", 1, "ok") in runs_of(records)


def test_all_lossless_leaves_lossy_methods_out():
    lossless = [name for name in NAMES if name not in LOSSY]
    assert bench_methods.chosen_methods(["all_lossless"]) == (lossless, set())
    assert bench_methods.chosen_methods(["all_lossless", "topk"]) == ([name for name in NAMES if name != "autojudge"], {"topk"})
    assert "common_sense" not in bench_methods.chosen_methods(["all_lossless"], "overwrite")[0]
    assert bench_methods.chosen_methods(["all", "vanilla"], "overwrite") == (list(NAMES), {"vanilla"})


def test_overwriting_common_sense_is_lossy(subject, tmp_path, monkeypatch):
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", method=["common_sense"], commonsense="overwrite", followers=subject.followers)
    assert [record["lossless"] for record in records] == [False, False]


def test_an_independent_draft(subject, tmp_path, monkeypatch):
    methods = ["vanilla", "speculative", "self_speculative", "dynamic_tree", "hf_assisted", "topk"]
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", status=1, method=methods, checkpoint=None, hf_draft_model=subject.model, draft_dtype="fp32")
    assert [record["info_message"] for record in records if record["status"] == "skipped"][0] == "drafts with an exit of the target: give --checkpoint EXIT"
    assert {name for name, _, status in runs_of(records) if status == "ok"} == set(methods) - {"self_speculative"}
    chain_ = next(record for record in records if record["method"] == "speculative")
    assert chain_["acceptance_rate"] == 1 and chain_["spec_overlap"] == pytest.approx(1, abs=1e-5)
    assert chain_["draft_model"] == chain_["draft_tokenizer"] == subject.model and chain_["draft_dtype"] == "float32"


@pytest.mark.parametrize(("family", "trees"), [("gpt2", "ok"), ("bloom", "skipped"), ("gemma2", "ok")])
def test_other_families_draft_for_themselves(subject, tmp_path, monkeypatch, tokenizer, family, trees):
    """They name their sizes otherwise, have no positions, or no sdpa; where trees cannot be exact they are skipped."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "max_position_embeddings": 256}}.get(family, {})
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more)).save_pretrained(tmp_path / family)
    tokenizer.save_pretrained(tmp_path / family)
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", hf_model=tmp_path / family, hf_draft_model=tmp_path / family, checkpoint=None,
                    method=["vanilla", "speculative", "dynamic_tree"], status=0 if trees == "ok" else 1)
    assert sorted(runs_of(records)) == [("dynamic_tree", 1, trees), ("speculative", 1, "ok"), ("vanilla", 1, "ok")]


def test_models_without_exits_can_be_measured(subject, tmp_path, monkeypatch, tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           max_position_embeddings=256)
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    tokenizer.save_pretrained(tmp_path / "mistral")
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", hf_model=tmp_path / "mistral", checkpoint=None, method=["vanilla", "hf_generate"])
    assert runs_of(records) == [("vanilla", 1, "ok"), ("hf_generate", 1, "ok")]


def test_a_growmap_and_adaptive_lengths(subject, tmp_path, monkeypatch):
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", method=["static_tree", "speculative", "hf_assisted"], growmap=subject.growmap, k="auto", status=1)
    found = {record["method"]: record for record in records if not record["summary"]}
    assert found["static_tree"]["tree_budget"] == 4 and found["speculative"]["k"] == "auto"
    assert found["hf_assisted"]["info_message"] == "drafts a fixed number of tokens: give --k"


def test_prompts_leave_room_for_the_draft_with_the_shortest_context_and_for_the_deepest_tree(subject, tmp_path, monkeypatch, capsys, tokenizer):
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=64).float().save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    rows = [{"question": text, "answer": "1"} for text in ("Add 2 and 3.", "Add 2 and 3, please, and show how you do it, each step on a line of its own, for a child.")]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"checkpoint": None, "hf_draft_model": tmp_path / "short", "dataset": tmp_path / "questions.jsonl", "method": ["vanilla", "speculative"]}
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", **flags)
    assert [record["prompts"] for record in records if not record["summary"]] == [1, 1]
    assert "1 prompts are left out: more than 51 tokens" in capsys.readouterr().err
    save_growmap(tmp_path / "deep.json", chain(30))
    assert bench_args.Args(tree_depth=8).settings().longest == 17 and bench_args.Args(growmap=str(tmp_path / "deep.json")).settings().longest == 30


def test_toy(tmp_path, monkeypatch, capsys):
    command_ = ["--toy", "--method", "vanilla", "self_speculative", "--max_samples", 2, "--max_new_tokens", 8, "--out", tmp_path, "--num_threads", 1]
    assert run_main(benchmark, command_, monkeypatch) == 0
    assert {(record["backend"], record["target_model"]) for record in read_records(tmp_path / bench_args.RESULTS_NAME)} == {("toy", "toy")}


# ---- the order of things ----

def test_prompts_take_turns_behind_a_warm_up_that_does_not_count(subject, tmp_path, monkeypatch):
    calls, methods = record_calls(monkeypatch), ["vanilla", "hf_generate", "speculative"]
    exact = benchmark.encode
    monkeypatch.setattr(benchmark, "encode", lambda *arguments: (calls.append("encode"), exact(*arguments))[1])
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", method=methods, runs=2, max_samples=4, seed=5)
    assert "encode" in calls and "encode" not in calls[calls.index(next(call for call in calls if call != "encode")):], "tokenisation comes before"
    calls = [call for call in calls if call != "encode"]
    warm_up, counted = calls[: 2 * len(methods)], calls[2 * len(methods) :]
    longest = max((call.prompt for call in counted), key=len)
    assert {call.prompt for call in warm_up[: len(methods)]} == {longest} and sorted(call.options.method for call in warm_up) == sorted(2 * methods)
    turns = [counted[first : first + len(methods)] for first in range(0, len(counted), len(methods))]
    assert len(turns) == 8 and all(len({call.prompt for call in turn}) == 1 and {call.options.method for call in turn} == set(methods) for turn in turns)
    assert [turn[0].prompt_id for turn in turns] == 2 * [0, 1, 2, 3]
    assert [[call.options.seed for call in turn] for turn in turns] == [[5] * 3] * 4 + [[6] * 3] * 4
    assert len({tuple(call.options.method for call in turn) for turn in turns}) > 1, "the order changes"
    vanilla = [record for record in records if record["method"] == "vanilla" and not record["summary"]]
    assert [record["tokens_by_prompt"] for record in vanilla] == [
        [len(call.tokens) for call in counted if call.options.method == "vanilla" and call.options.seed == seed] for seed in (5, 6)]


def test_warming_covers_every_reach_the_longest_first():
    prompts = [Prompt([0] * length) for length in (10, 300, 40, 600, 290)]
    assert [len(prompt.input_ids) for prompt in bench_runs.warming(prompts)] == [600, 600, 290, 10]


# ---- what is measured again ----

def test_changed_inputs_are_measured_again_and_more_runs_added(subject, tmp_path, monkeypatch):
    out, methods = tmp_path / "out.jsonl", ["vanilla", "speculative", "dynamic_tree"]
    known = 0
    for changes, added in (
        ({}, {(method, 1) for method in methods}),
        ({"runs": 2}, {(method, 2) for method in methods}),
        ({"k": 2}, {("speculative", 1)}),
        ({"tree_budget": 5}, {("dynamic_tree", 1)}),
        ({"fit_prompts": 1}, {("dynamic_tree", 1)}),
        ({"verification": "coupled"}, {("speculative", 1)}),
        *(({name: value}, {(method, 1) for method in methods}) for name, value in (
            ("seed", 1), ("temperature", 1.5), ("top_k", 9), ("max_samples", 2), ("max_new_tokens", 4), ("use_chat_template", "false"), ("checkpoint", subject.same))),
    ):
        records = start(monkeypatch, subject, out, **{"method": methods, **changes})
        runs = [record for record in records if not record["summary"]]
        assert {(name, run) for name, run, _ in runs_of(runs[known:])} == added, changes
        known = len(runs)
    assert [record["runs"] for record in records if record["summary"] and record["method"] == "vanilla"][:2] == [1, 2]


def test_a_judge_made_anew_is_measured_again(subject, tmp_path, monkeypatch):
    path, out = tmp_path / "judge.safetensors", tmp_path / "out.jsonl"
    path.write_bytes(Path(subject.judge).read_bytes())
    flags = {"method": ["autojudge"], "autojudge_checkpoint": path}
    start(monkeypatch, subject, out, **flags)
    start(monkeypatch, subject, out, **flags, autojudge_threshold=["0.25", "0.75"])
    judge = Judge(torch.zeros(7), torch.ones(7), ((torch.zeros(1, 7), torch.zeros(1)),), 0.5, "law")
    save_judge(path, judge, JudgeInfo.of(Fitted(judge, None, 0.5, 0.5, 10, 5), subject.target, noisy_exit(subject.target.model, 1, scale=0.02), "noisy", {}))
    records = start(monkeypatch, subject, out, **flags)
    assert [record["autojudge_threshold"] for record in records if not record["summary"]] == [0.5, 0.25, 0.75, 0.5]
    assert records[-1]["runs"] == 1, "runs of the former judge are none of this one's"


# ---- files that were damaged or are in use ----

def test_a_torn_last_line_is_cut_off_and_its_run_repeated(subject, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "out.jsonl", {"method": ["vanilla", "hf_generate"]}
    start(monkeypatch, subject, out, **flags)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])
    records = start(monkeypatch, subject, out, **flags)
    assert "the last line was cut off" in capsys.readouterr().err
    assert out.read_bytes().startswith(lines[0]) and Counter(runs_of(records)) == Counter([("vanilla", 1, "ok"), ("hf_generate", 1, "ok")])


@pytest.mark.parametrize(
    ("line", "message"),
    [("{broken", "line 1: not JSON"), ("[1]", "line 1: not an object"), ('{"turns": ["Hello"]}', "line 1: lacks schema_version, so it is no record of this version; choose another --out"),
     ('{"speedup": NaN}', "line 1: not JSON .NaN is no number")],
)
def test_a_file_of_something_else_is_refused_as_it_is(subject, tmp_path, monkeypatch, capsys, line, message):
    out = tmp_path / "out.jsonl"
    out.write_text(f'{line}\n{{"half": ')
    assert run_main(benchmark, command(subject, out), monkeypatch) == 2
    check_one_line(capsys, message)
    assert out.read_text() == f'{line}\n{{"half": '


def test_two_processes_on_one_file_are_refused(subject, tmp_path, monkeypatch, capsys):
    with RecordFile(tmp_path / "out.jsonl"):
        assert run_main(benchmark, command(subject, tmp_path / "out.jsonl"), monkeypatch) == 2
    check_one_line(capsys, "is being written by another process; wait for it, or choose another --out")


ZYGOTE = """
import os, random, signal, sys, time
from pathlib import Path
import benchmark

out, whole, chance, kept = Path(sys.argv[sys.argv.index("--out") + 1]), b"", random.Random(0), []

def start():
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        status = 3
        try:
            status = benchmark.main()
        finally:
            os._exit(status)
    return pid

def size():
    return out.stat().st_size if out.exists() else 0

for number in range(20):
    before, pid, deadline = size(), start(), time.monotonic() + 20
    if number % 2:  # behind the first byte that is written
        while size() <= before and time.monotonic() < deadline and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
    else:
        time.sleep(chance.uniform(0, 0.6))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    content = out.read_bytes() if out.exists() else b""
    assert content.startswith(whole), f"attempt {number} changed what was written before"
    whole = content[: content.rfind(b"\\n") + 1]
    kept.append(whole.count(b"\\n"))
print(*kept, os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]))
"""


def test_killed_at_any_moment_it_loses_no_record_and_measures_none_twice(subject, tmp_path):
    """SIGKILL at random moments; every start goes on behind what is there. One process imports, and forks the ones that are killed."""
    out, methods, runs = tmp_path / "out.jsonl", ["vanilla", "self_speculative", "hf_generate"], 50
    words = command(subject, out, method=methods, runs=runs, max_samples=1, max_new_tokens=3)
    found = subprocess.run([sys.executable, "-c", ZYGOTE, *map(str, words)], capture_output=True, text=True, timeout=300, cwd=Path(benchmark.__file__).parent)
    assert found.returncode == 0, found.stderr
    *kept, status = map(int, found.stdout.split())
    assert status == 0 and len(set(kept) - {0, len(methods) * (runs + 1)}) >= 3, "it was to be killed between its records"
    records = read_records(out)
    assert not [wrong for record in records for wrong in complaints(record)]
    assert Counter(runs_of(records)) == Counter((method, run, "ok") for method in methods for run in range(1, runs + 1))
    assert {record["method"]: record["runs_successful"] for record in records if record["summary"]} == dict.fromkeys(methods, runs)


# ---- methods that fail ----

def break_method(monkeypatch, method: str, error: Exception, call: int = 0) -> None:
    """Let a method raise from its `call`-th generation on."""
    exact, calls = bench_runs.generate, Counter()

    def generate(target, prompt, options, *arguments, **names):
        calls[options.method] += 1
        if options.method == method and calls[method] > call:
            raise error
        return exact(target, prompt, options, *arguments, **names)

    monkeypatch.setattr(bench_runs, "generate", generate)


@pytest.mark.parametrize(
    ("error", "call"),
    [(ValueError("no such thing\nindeed"), 0), (torch.OutOfMemoryError("CUDA out of memory"), 0), (RuntimeError(), 3), (UserWarning("a warning that was raised"), 4)],
)
def test_a_method_that_raises_leaves_the_others_alone_and_is_tried_again(subject, tmp_path, monkeypatch, capsys, error, call):
    """Two generations are the warm-up's, so the latter two fail in the middle of the run."""
    out, methods = tmp_path / "out.jsonl", ["vanilla", "speculative", "hf_generate"]
    with pytest.MonkeyPatch.context() as patch:
        break_method(patch, "speculative", error, call)
        records = start(patch, subject, out, status=1, method=methods)
    assert Counter(runs_of(records)) == Counter([("vanilla", 1, "ok"), ("hf_generate", 1, "ok"), ("speculative", 1, "error")])
    failed = next(record for record in records if record["status"] == "error")
    assert failed["error_type"] == type(error).__name__ and failed["error_message"] == (str(error) or "RuntimeError") and "in generate" in failed["traceback"]
    assert f"speculative failed in run 1: {type(error).__name__}: " in capsys.readouterr().err
    summary = next(record for record in records if record["summary"] and record["method"] == "speculative")
    assert (summary["status"], summary["runs_failed"], summary["error_type"]) == ("error", 1, failed["error_type"])
    records = start(monkeypatch, subject, out, method=methods)
    assert runs_of(records)[3:] == [("speculative", 1, "ok")] and records[-1]["runs_failed"] == 0


def test_a_method_that_cannot_be_prepared_or_summed_up_fails_alone(subject, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("weights")

    monkeypatch.setattr(bench_methods, "best_static_trees", fail)
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", status=1, method=["vanilla", "static_tree"], runs=2)
    assert Counter(runs_of(records)) == Counter((method, run, status) for method, status in (("vanilla", "ok"), ("static_tree", "error")) for run in (1, 2))
    assert {record["lossless"] for record in records if record["method"] == "vanilla"} == {True}
    exact = bench_runs.run_fields
    monkeypatch.setattr(bench_runs, "run_fields", lambda runs, correct, options: fail() if options.method == "speculative" else exact(runs, correct, options))
    records = start(monkeypatch, subject, tmp_path / "other.jsonl", status=1, method=["vanilla", "speculative"])
    assert Counter(runs_of(records)) == Counter([("vanilla", 1, "ok"), ("speculative", 1, "error")])


def test_texts_that_end_with_the_prefill_cannot_be_timed(subject, tmp_path, monkeypatch):
    """transformers' first token comes with the prefill: there is no tokens per second of none."""
    records = start(monkeypatch, subject, tmp_path / "out.jsonl", status=1, method=["vanilla", "hf_generate"], max_new_tokens=1)
    assert Counter(runs_of(records)) == Counter([("vanilla", 1, "ok"), ("hf_generate", 1, "error")])
    assert "raise --max_new_tokens" in next(record["error_message"] for record in records if record["status"] == "error")


# ---- mistakes ----

def test_require_headless_stops_before_anything_is_loaded(subject, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "display_active", lambda: "enabled")
    for module, name in ((benchmark, "load_target"), (benchmark, "read_questions"), (bench_args, "load_tokenizer"), (bench_args, "load_config")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something was loaded"))
    assert run_main(benchmark, [*command(subject, tmp_path / "out.jsonl"), "--require_headless"], monkeypatch) == 2
    check_one_line(capsys, "--require_headless: a GPU drives a display, which disturbs timing; stop the display server")


def test_without_a_display_headless_is_met(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "display_active", lambda: None)
    start(monkeypatch, subject, tmp_path / "out.jsonl", require_headless="true", method=["vanilla"])


def test_list_presets(monkeypatch, capsys):
    assert run_main(benchmark, ["--list_presets"], monkeypatch) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("experiments (--experiment)", "embedded_early_exit", "models (--model_preset, --draft_preset)", "all_methods"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["medusa", "vanilla"]}, "--method medusa: choose from vanilla, .*all_lossless"),
        ({"quant": "8bit"}, "--quant 8bit: needs a CUDA device; leave it out"),
        ({"checkpoint": None, "draft_quant": "4bit"}, "--draft_quant belongs to an independent draft: give --hf_draft_model"),
        ({"draft_dtype": "fp16"}, "--draft_dtype belongs to an independent draft"),
        ({"hf_draft_model": "/some/model"}, "give either --checkpoint EXIT or --draft_model_path MODEL"),
        ({"draft_device": "cuda"}, "--draft_device cuda: must be the target's, auto"),
        ({"hf_model": "/no/such/model"}, "no model at /no/such/model"),
        ({"checkpoint": "/no/such.safetensors"}, "no checkpoint at /no/such.safetensors"),
        ({"k": 0}, "--gamma 0: must be auto, or a number from 1 to 63"),
        ({"k": "many"}, "--gamma many"),
        ({"runs": 0}, "--runs 0: must be at least 1"),
        ({"max_samples": 0}, "--max_samples 0: must be at least 1"),
        ({"max_new_tokens": -1}, "--max_new_tokens -1: must be at least 1"),
        ({"max_new_tokens": 500}, "at most 7 tokens, which is what the context leaves: lower --max_new_tokens"),
        ({"turn_index": 2}, "--turn_index 2: must be 0 or 1"),
        ({"turn_index": 1}, "no question with a second turn; use --turn_index 0"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"temperature": -1}, "--temperature"),
        ({"top_p": 0}, "--top_p"),
        ({"tree_budget": 1}, "--tree_budget 1: must lie between 2 and"),
        ({"tree_depth": 0}, "--tree_depth 0: must be at least 1"),
        ({"parallel_branches": 0}, "--parallel_branches 0: must be at least 1"),
        ({"branch_prune_threshold": 2}, "--branch_prune_threshold 2.0: must lie between 0 and 1"),
        ({"topk_rank": ["few"]}, "--topk_rank few: must be all, or a number of at least 1"),
        ({"autojudge_threshold": [1.5]}, "--autojudge_threshold 1.5: must lie between 0 and 1"),
        ({"autojudge_checkpoint": "/no/judge"}, "no judge at /no/judge; give the path that commands/train_judge.py printed last"),
        ({"followers": "/no/table"}, "no follower table at /no/table; build it"),
        ({"growmap": "/no/growmap.json"}, "/no/growmap.json"),
        ({"dataset": "/no/questions.jsonl"}, "--dataset /no/questions.jsonl: no such file; give a JSON"),
        ({"dataset": "mtbench"}, "unknown data set 'mtbench'"),
        ({"metod": "vanilla"}, "unknown argument --metod: did you mean --method"),
        ({"experiment": "nothing"}, "unknown preset 'nothing': choose one of embedded_all"),
        ({"toy": "true"}, "--toy has models of its own"),
    ],
)
def test_mistakes_get_one_line(subject, tmp_path, monkeypatch, capsys, changes, message):
    for module in (benchmark, bench_runs):
        monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("something was decoded"))
    assert run_main(benchmark, command(subject, tmp_path / "out.jsonl", **changes), monkeypatch) == 2
    check_one_line(capsys, message)


def test_drafts_and_judges_of_others_are_refused(subject, tmp_path, monkeypatch, capsys, tokenizer):
    tiny_llama(seed=5, vocab_size=len(tokenizer)).float().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    table = Followers(torch.zeros(5, 1, dtype=torch.int64), tokenizer_hash(tokenizer), {})
    save_followers(tmp_path / "short.safetensors", table)
    for changes, message in (
        ({"hf_model": tmp_path / "other"}, "belongs to another target"),
        ({"followers": tmp_path / "short.safetensors"}, "knows 5 tokens, the target 320; build it again"),
    ):
        assert run_main(benchmark, command(subject, tmp_path / "out.jsonl", **changes), monkeypatch) == 2
        check_one_line(capsys, message)


def test_a_judge_of_another_draft_leaves_the_others_alone(subject, tmp_path, monkeypatch, capsys):
    """Presets have judges; who types another draft gets all but the judge."""
    changes = {"checkpoint": subject.same, "autojudge_checkpoint": subject.judge, "method": ["vanilla", "autojudge"]}
    assert run_main(benchmark, command(subject, tmp_path / "out.jsonl", **changes), monkeypatch) == 1
    assert "autojudge is skipped" in (told := capsys.readouterr().err) and "belongs to another draft" in told
    assert {record["method"]: record["status"] for record in read_records(tmp_path / "out.jsonl")} == {"vanilla": "ok", "autojudge": "skipped"}


def test_unwritable_output_gets_one_line(subject, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert run_main(benchmark, command(subject, tmp_path / "file" / "out.jsonl"), monkeypatch) == 2
    check_one_line(capsys, "cannot write to .*; choose another --out")

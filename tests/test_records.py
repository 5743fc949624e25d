"""The schema of benchmark.py's records, their file, the validator, and summaries from records whose figures are known."""

from __future__ import annotations

import json
import math
import re

from running.command_line import UserError

import pytest

from commands import validate_results
from decoding.state import DecodeStats, RoundResult, TreeCounts
from harness.figures import MethodRun, needed_summaries, run_fields, summary_key
from harness.schema import BOUNDS, FIELDS, SCHEMA_VERSION, TYPES, complaints, schema_table
from measuring.metrics import mcnemar_p, wilson_interval
from running import record_file
from running.record_file import RecordFile, read_records
from speculative import DecodeOptions
from test_commands import check_one_line, run_main

SHARED = {"target": "t", "prompts": "p", "seed": 3}
OF_ALL = {
    "schema_version": SCHEMA_VERSION, "backend": "hf", "target_model": "t", "tokenizer": "t", "device": "cpu", "dtype": "float32", "use_chat_template": True,
    "dataset": "builtin", "dataset_sha256": "p", "max_samples": 2, "turn_index": 0, "max_new_tokens": 10, "temperature": 0.7, "top_p": 1.0, "top_k": 0,
}


def run_record(method: str, run: int = 1, tokens: tuple = (10, 20), seconds: tuple = (1.0, 2.0), status: str = "ok", inputs: dict | None = None, **more: object) -> dict:
    """A run as benchmark.py writes it: two prompts with these tokens in these seconds."""
    record = {**OF_ALL, **MethodRun(method, inputs or {}, run).fields(SHARED, status)}
    if status == "error":
        return {**record, "error_type": "ValueError", "error_message": "no", "traceback": "…", **more}
    if status == "skipped":
        return {**record, "info_message": "why", **more}
    total, whole = sum(tokens), sum(seconds)
    return {
        **record, "lossless": True, "prompts": 2, "total_prompt_tokens": 8, "total_generated_tokens": total, "duration_sec": whole + 1, "prefill_sec": 1.0, "decode_sec": whole,
        "tokens_per_sec": total / whole, "tokens_by_prompt": list(tokens), "decode_sec_by_prompt": list(seconds), "target_calls_by_prompt": [5, 5], "steps": 10,
        "avg_tokens_per_step": total / 10, "tokens_per_call": total / 10, "target_calls": 10, "target_calls_per_token": 10 / total, **more,
    }


def summaries(records: list[dict]) -> dict[str, dict]:
    """What would be appended, by method."""
    return {made["method"]: {**OF_ALL, **made} for made in needed_summaries(records, SHARED, 0)}


KINDS = {"ok": run_record("vanilla"), "error": run_record("vanilla", status="error"), "skipped": run_record("vanilla", status="skipped"),
         "summary": summaries([run_record("vanilla")])["vanilla"], "failed summary": summaries([run_record("vanilla", status="error")])["vanilla"]}
REQUIRED = {"ok": {"all", "run", "ok"}, "error": {"all", "run", "error"}, "skipped": {"all", "run", "skipped"}, "summary": {"all", "summary", "measured"},
            "failed summary": {"all", "summary"}}


# ---- schema ----

@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_valid_and_lacks_nothing_without_a_complaint(kind):
    record = KINDS[kind]
    assert complaints(record) == []
    needed = [name for name, field in FIELDS.items() if REQUIRED[kind] & field.metadata["in"]]
    assert {"method", "resume_key", "inputs"} <= set(needed)
    for name in needed:
        without = {key: value for key, value in record.items() if key != name}
        if name in ("summary", "status"):  # which decide what else is needed
            assert f"lacks {name}" in complaints(without)
        else:
            assert complaints(without) == complaints({**record, name: None}) == [f"lacks {name}"]


@pytest.mark.parametrize("name", TYPES)
def test_a_wrong_type_is_a_complaint(name):
    record = KINDS["ok"]
    found = complaints({**record, name: {"a": 1} if name != "inputs" else [1]})
    assert any(text.startswith(f"{name} is ") for text in found) and (len(found) == 1 or name in ("schema_version", "summary"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"steps": True}, "steps is True, not int"), ({"temperature": False}, "temperature is False, not float"), ({"status": "done"}, "status is 'done', not ok or error or skipped"),
     ({"speedup": "2"}, "speedup is '2', not float or null"), ({"tokens_by_prompt": [1, "2"]}, "tokens_by_prompt is"), ({"decode_sec": math.nan}, "decode_sec is nan"),
     ({"decode_sec": math.inf}, "decode_sec is inf"), ({"schema_version": 0}, "schema_version 0 is not 1"), ({"k": 4.0}, "k is 4.0, not int or str or null")],
)
def test_values_that_only_look_right(changes, complaint):
    assert [text for text in complaints({**KINDS["ok"], **changes}) if text.startswith(complaint)]


NUMBERS = [name for name, hint in TYPES.items() if re.search("int|float", str(hint)) and name != "schema_version"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_cannot_be_is_a_complaint(name):
    """Counts, seconds, speeds and shares: of the one table, and nothing is below 0."""
    record, items = KINDS["ok"], "list" in str(TYPES[name])
    low, high = BOUNDS.get(name, (0, math.inf))
    for value in [-3, 10**400, *([] if high == math.inf else [1.7, 2] if "float" in str(TYPES[name]) else [2]), *([0] if low else [])]:
        found = complaints({**record, name: [value, value] if items else value})
        assert found[0].startswith(f"{name} is ") and len(found[0]) < 250 and (len(found) == 1 or name == "prompts"), value


def test_rounding_is_no_complaint():
    assert complaints({**KINDS["ok"], "spec_overlap": 1.0000001, "acceptance_rate": 1, "proposed": 0, "accepted": 0}) == []


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [("ok", {"accepted": 5, "proposed": 4}, "accepted is 5, more than proposed, 4"), ("summary", {"runs_successful": 3}, "runs_successful is 3, more than runs, 1"),
     ("summary", {"speedup": 2.0, "speedup_ci_low": 3.0, "speedup_ci_high": 1.0}, "speedup_ci_low is 3.0, more than speedup_ci_high, 1.0"),
     ("ok", {"tokens_by_prompt": [3]}, "tokens_by_prompt has 1 values for 2 prompts"), ("ok", {"inputs": {"shared": {}}}, "inputs lacks method"),
     ("ok", {"inputs": {"shared": None, "method": {}}}, "inputs lacks shared"), ("ok", {"turn_index": 2}, "turn_index is 2, not from 0 to 1"),
     ("ok", {"acceptance_rate": 1.7}, "acceptance_rate is 1.7, not from 0 to 1"), ("summary", {"speedup": -3}, "speedup is -3, not at least 0")],
)
def test_what_goes_with_what(kind, changes, complaint):
    assert complaints({**KINDS[kind], **changes}) == [complaint]
    assert complaints({**KINDS[kind], **changes, "mood": "good"}) == [complaint, "has an unknown field mood"]


def test_numbers_and_words_where_both_are_meant():
    assert complaints({**KINDS["ok"], "k": 4}) == complaints({**KINDS["ok"], "k": "auto"}) == complaints({**KINDS["ok"], "temperature": 0}) == []
    assert complaints({**KINDS["summary"], "cache_hit_rate_median": 0.5, "speedup_ci_low": None}) == []
    assert complaints({**KINDS["summary"], "cache_hit_rate_median": "0.5"})


def test_unknown_fields_are_wrong_when_strict():
    record = {**KINDS["ok"], "mood": "good"}
    assert complaints(record) == ["has an unknown field mood"] and complaints(record, strict=False) == []
    assert complaints([1]) == ["is a list, not an object"]


def test_every_field_is_explained():
    rows = list(schema_table())
    assert {name for names, _, _ in rows for name in names.split(", ")} == set(TYPES)
    assert all(meaning for name, _, meaning in rows if name not in ("torch_version", "transformers_version", "runs_successful", "runs_failed", "runs_skipped"))


# ---- the file ----

def test_records_survive_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with RecordFile(path) as file:
        file.append({"a": "γ\n\r\u2028"})
        file.append({"b": 0.1 + 0.2})
    with RecordFile(path) as file:
        assert file.records == [{"a": "γ\n\r\u2028"}, {"b": 0.1 + 0.2}] == read_records(path) and not file.torn


def test_half_a_line_stays_until_a_record_replaces_it(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    with RecordFile(path) as file:
        assert file.torn and file.records == [{"a": 1}]
    assert path.read_bytes() == b'{"a": 1}\n{"b": '
    with RecordFile(path) as file:
        file.append({"c": 3})
        file.append({"d": 4})
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n{"d": 4}\n'


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    with RecordFile(tmp_path / "out.jsonl") as file:
        file.append({"a": 1})
        with monkeypatch.context() as patch:
            def full(_: int) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(record_file.os, "fsync", full)
            with pytest.raises(UserError, match=r"No space left on device.; make room and start the same command again"):
                file.append({"b": 2})
        assert file.path.read_bytes() == b'{"a": 1}\n' and file.records == [{"a": 1}]
        file.append({"c": 3})
        assert file.path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_a_file_is_free_again_after_a_refusal(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("broken\n")
    with pytest.raises(UserError, match=r"line 1: not JSON"):
        RecordFile(path)
    path.write_text("")
    with RecordFile(path), pytest.raises(UserError, match="another process"):
        RecordFile(path)
    RecordFile(path)


# ---- the validator ----

@pytest.mark.parametrize(
    ("lines", "flags", "status", "printed"),
    [
        ([KINDS["ok"], KINDS["summary"]], ["--strict"], 0, "1 run, ok, 1 summary; valid"),
        ([{**KINDS["ok"], "mood": 1}], [], 0, "unknown field mood"),
        ([{**KINDS["ok"], "mood": 1}], ["--strict"], 1, "line 1: has an unknown field mood"),
        ([KINDS["ok"], {**KINDS["ok"], "steps": "many"}], [], 1, "line 2: steps is 'many', not int or null"),
        ([KINDS["ok"], '{"half": '], [], 0, "valid"),
        ([KINDS["ok"], '{"half": '], ["--strict"], 1, "the last line is cut off"),
    ],
)
def test_validator(tmp_path, monkeypatch, capsys, lines, flags, status, printed):
    path = tmp_path / "out.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    assert run_main(validate_results, ["--path", tmp_path, *flags], monkeypatch) == status
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [("{\n{}\n", "line 1: not JSON .*; delete the line"), ("", "holds no records"), ("3\n", "line 1: not an object"), ('{"speedup": Infinity}\n', "Infinity is no number of JSON")],
)
def test_validator_cannot_read(tmp_path, monkeypatch, capsys, content, message):
    (tmp_path / "out.jsonl").write_text(content)
    assert run_main(validate_results, ["--path", tmp_path / "out.jsonl"], monkeypatch) == 2
    check_one_line(capsys, message)


def test_validator_needs_a_file_and_tells_the_schema(tmp_path, monkeypatch, capsys):
    for words, message in (([], "give --path FILE"), (["--path", tmp_path], "no .jsonl file there"), (["--path", tmp_path / "none.jsonl"], "No such file")):
        assert run_main(validate_results, words, monkeypatch) == 2
        check_one_line(capsys, message)
    assert run_main(validate_results, ["--schema"], monkeypatch) == 0
    assert "tokens_by_prompt: list[int] or null. new tokens that decode_sec covers" in capsys.readouterr().out


# ---- summaries ----

def test_medians_over_runs_and_speedups_over_common_ones():
    """The baseline is the faster one: vanilla 10 tokens per second, hf_generate 5; run 3 is the draft's alone."""
    records = [run_record("vanilla", 1, (10, 20), (1, 2)), run_record("vanilla", 2, (10, 20), (2, 1)), run_record("hf_generate", 1, (10, 10), (2, 2))]
    records += [run_record("speculative", run, (10, 20), seconds, inputs={"k": 4}, k=4, acceptance_rate=rate)
                for run, seconds, rate in ((1, (0.5, 0.5), 0.5), (2, (1, 1), 0.7), (3, (9, 9), 0.9))]
    made = summaries(records)
    found = made["speculative"]
    assert complaints(found) == [] and found["k"] == 4 and (found["runs"], found["runs_successful"]) == (3, 3)
    assert found["tokens_per_sec_median"] == 15 and found["acceptance_rate_median"] == 0.7 and found["tokens_per_call_mean"] == 3
    assert found["speedup"] == pytest.approx((60 / 3) / (60 / 6)) and found["speedup_baseline"] == "vanilla"
    assert found["speedup_ci_low"] <= found["speedup"] <= found["speedup_ci_high"]
    assert found["speedup_over_hf_generate"] == pytest.approx(30 / 5), "run 1 is common"
    assert made["vanilla"]["speedup"] == made["vanilla"]["speedup_ci_low"] == 1 and made["hf_generate"]["speedup"] == pytest.approx(5 / 10)


def test_the_faster_baseline_may_be_transformers():
    made = summaries([run_record("vanilla", 1, (10, 10), (4, 4)), run_record("hf_generate", 1, (10, 10), (1, 1)), run_record("specexec", 1, (10, 10), (2, 2))])
    assert made["specexec"]["speedup_baseline"] == "hf_generate" and made["specexec"]["speedup"] == pytest.approx(0.5)


def test_without_a_baseline_there_is_no_speedup():
    made = summaries([run_record("specexec", 1), run_record("vanilla", 2)])
    assert not {name for name in made["specexec"] if name.startswith("speedup")}


def test_a_prompt_that_ended_with_its_prefill_counts_for_nothing():
    made = summaries([run_record("hf_generate", 1, (0, 20), (0.1, 2)), run_record("specexec", 1, (10, 20), (1, 1))])
    assert made["specexec"]["speedup"] == pytest.approx(15 / (20 / 2.1)) and math.isfinite(made["specexec"]["speedup_ci_high"])


def test_a_run_that_failed_and_then_went_well_counts_once():
    records = [run_record("vanilla", 1, status="error"), run_record("vanilla", 1, (10, 10), (1, 1)), run_record("vanilla", 1, status="error"), run_record("vanilla", 2, status="error")]
    found = summaries(records)["vanilla"]
    assert (found["status"], found["runs"], found["runs_successful"], found["runs_failed"]) == ("ok", 2, 1, 1) and found["tokens_per_sec_median"] == 10


def test_a_method_that_never_ran_says_why():
    made = summaries([run_record("topk", 1, status="skipped"), run_record("vanilla", 1, status="error")])
    assert made["topk"]["info_message"] == "why" and made["topk"]["runs_skipped"] == 1 and made["vanilla"]["error_type"] == "ValueError"
    assert all(complaints(record) == [] for record in made.values())


def test_other_settings_and_other_inputs_have_summaries_of_their_own():
    records = [run_record("speculative", 1, inputs={"k": k}, k=k) for k in (4, 2)]
    other = {**run_record("speculative", 1, inputs={"k": 4}), "inputs": {"shared": {**SHARED, "seed": 9}, "method": {"k": 4}}}
    made = needed_summaries([*records, other], SHARED, 0)
    assert [one["k"] for one in made] == [4, 2] and [one["resume_key"] for one in made] == [summary_key(record) for record in records]
    assert all(one["inputs"]["shared"] == SHARED and one["runs"] == 1 for one in made)


def test_summaries_are_made_again_only_where_something_changed():
    records = [run_record("vanilla"), run_record("specexec", 1, (10, 20), (1, 1))]
    first = needed_summaries(records, SHARED, 0)
    records += json.loads(json.dumps(first))
    assert needed_summaries(records, SHARED, 0) == []
    records.append(run_record("specexec", 2, (10, 20), (3, 3)))
    assert [made["method"] for made in needed_summaries(records, SHARED, 0)] == ["specexec"]
    records.append(run_record("hf_generate", 1, (10, 20), (0.5, 0.5)))
    assert {made["method"] for made in needed_summaries(records, SHARED, 0)} == {"hf_generate", "specexec", "vanilla"}, "the baseline is another"


def test_accuracy_counts_prompts_once_however_often_they_were_run():
    records = [run_record("vanilla", run, correct_by_prompt=[True, False], exact_match=0.5) for run in (1, 2, 3)]
    found = summaries(records)["vanilla"]
    assert found["exact_match_mean"] == 0.5 and (found["exact_match_mean_ci_low"], found["exact_match_mean_ci_high"]) == wilson_interval(1, 2)
    assert "mcnemar_p" not in found


def test_judged_methods_are_compared_with_the_same_decoding_without_a_judge():
    records = [run_record(method, correct_by_prompt=correct, **more) for method, correct, more in (
        ("vanilla", [True, True], {}), ("hf_generate", [True, True], {}), ("speculative", [True, False], {}), ("topk", [False, True], {"judge_rule": "…"}), ("specexec", [True, True], {}))]
    made = summaries(records)
    assert [made[name].get("exact_match_baseline") for name in ("vanilla", "hf_generate", "speculative", "topk", "specexec")] == [None, None, "vanilla", "speculative", "vanilla"]
    assert made["topk"]["mcnemar_p"] == 1 and made["specexec"]["mcnemar_p"] == 1


def test_answers_are_compared_in_the_first_run_that_both_have():
    right, wrong = ([answer] * 6 for answer in (True, False))
    runs = {"vanilla": {2: right, 3: wrong}, "specexec": {1: right, 2: wrong, 3: wrong}}
    records = [run_record(method, run, correct_by_prompt=correct) for method, found in runs.items() for run, correct in found.items()]
    assert summaries(records)["specexec"]["mcnemar_p"] == pytest.approx(2 / 64)


def test_a_run_says_which_seed_it_was_decoded_with():
    """--seed in the first run, and the next ones in further runs."""
    assert [run_record("vanilla", run)["seed"] for run in (1, 2, 5)] == [3, 4, 7]


def by_hand(lost: int, gained: int) -> float:
    """Chance, in fair tosses, of a split at least as uneven."""
    total = lost + gained
    return sum(math.comb(total, count) for count in range(total + 1) if abs(2 * count - total) >= abs(lost - gained)) / 2**total


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 112 / 1024), (3, 3, 1.0), (12, 4, by_hand(12, 4))])
def test_mcnemar(lost, gained, p):
    one = [True] * lost + [False] * gained + [True, False, True]
    other = [False] * lost + [True] * gained + [True, False, True]
    assert mcnemar_p(one, other) == mcnemar_p(other, one) == pytest.approx(p) == pytest.approx(by_hand(lost, gained))


@pytest.mark.parametrize(("right", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)])
def test_wilson(right, total, low, high):
    """The last are Newcombe's (1998), table I."""
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


# ---- figures of a run ----

def stats(*rounds: RoundResult, with_prefill: int = 0) -> DecodeStats:
    found = DecodeStats(prompt_tokens=4, emitted=with_prefill + sum(len(one.tokens) for one in rounds), with_prefill=with_prefill, target_calls=len(rounds), rounds=list(rounds), wall_s=3.0)
    found.seconds["prefill"] = 1.0
    return found


def test_figures_of_a_judged_chain():
    from decoding.autojudge import TopK

    options = DecodeOptions("topk", judge=TopK(4), gamma=3)
    row = run_fields([stats(RoundResult([1, 2, 3, 4], 3, 3, judged=2, overridden=2), RoundResult([1, 2], 3, 1, judged=1)), stats(RoundResult([1], 1, 0))], [True, False], options)
    assert (row["prompts"], row["total_generated_tokens"], row["prefill_sec"], row["decode_sec"], row["duration_sec"]) == (2, 7, 2.0, 4.0, 6.0)
    assert (row["proposed"], row["accepted"], row["rejections"], row["steps"], row["target_calls"]) == (7, 4, 2, 3, 3)
    assert row["acceptance_rate"] == 4 / 7 and row["tokens_per_sec"] == 7 / 4 and row["tokens_per_call"] == 7 / 3 and row["target_calls_per_token"] == 3 / 7
    assert (row["judge_total"], row["judge_accepted"], row["judge_rejected"]) == (3, 2, 1) and row["judge_accept_rate"] == 2 / 3
    assert (row["target_fallbacks"], row["target_fallback_rate"]) == (2, 2 / 7) and row["exact_match"] == 0.5
    assert not set(row) - set(FIELDS) and json.dumps(row, allow_nan=False)


def test_a_tree_is_rejected_where_none_of_the_children_that_were_tried_was_kept():
    """Not where the walk came to a leaf, though most nodes are on no walk."""
    tree = TreeCounts(considered=12, nodes=8, depth=2, fed=4, passes=2)
    rounds = [RoundResult([0] * (kept + 1), 7, kept, tested=tested, tree=tree) for kept, tested in ((2, 2), (1, 2), (0, 1))]
    row = run_fields([stats(*rounds)], [], DecodeOptions("dynamic_tree"))
    assert (row["proposed"], row["accepted"], row["rejections"], row["acceptance_rate"]) == (21, 3, 2, 3 / 6)
    assert (row["branches_total"], row["branches_kept"], row["branches_pruned"], row["cache_hits"], row["cache_misses"]) == (12, 21, 15, 3, 3)


def test_transformers_first_tokens_do_not_count():
    row = run_fields([stats(RoundResult([0]), RoundResult([0]), with_prefill=1), stats(with_prefill=1)], [], DecodeOptions("hf_generate"))
    assert row["total_generated_tokens"] == 4 and row["tokens_by_prompt"] == [2, 0] and row["tokens_per_sec"] == 2 / 4 and "exact_match" not in row
    with pytest.raises(ValueError, match="ended with its prefill"):
        run_fields([stats(with_prefill=1)], [], DecodeOptions("hf_generate"))

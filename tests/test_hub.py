"""Models and data sets of the Hugging Face hub, from an endpoint on the loopback address that answers, and fails, as the hub does."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event, Thread

from running.command_line import UserError

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.registry import DATASETS
from data.row_files import SPLITS
from hub_endpoint import NO_ACCESS_TOKEN, TOKEN, Hub, Repository, hub_endpoint
from running.hub import hub_errors
from test_datasets import FORMS, form_rows

SHARDS, ROWS = 3, 60  # of each split
PARQUET = "data/{split}-{shard:05}-of-{shards:05}-a3ecf92756993583.parquet"
# Of each data set: the hub's splits, how its files are named, and the configuration that its card names, if any.
LAYOUTS = {
    "ultrachat": (("train_sft", "test_sft", "train_gen", "test_gen"), PARQUET, "default"),
    "share_gpt": (("train",), "data/{split}-{shard:05}-of-{shards:05}.parquet", None),
    "oasst": (("train", "validation"), PARQUET, None),
    "lmsys": (("train",), PARQUET, "default"),
    "slim_pj": (SPLITS, PARQUET, None),
    "fineweb": (("train",), "sample/10BT/{shard:03}_00000.parquet", "sample-10BT"),
    "c4": (("train", "validation"), "en/c4-{split}.{shard:05}-of-{shards:05}.json.gz", "en"),
    "openwebtext": (("train",), "plain_text/{split}-{shard:05}-of-{shards:05}.parquet", "plain_text"),
    "cnn": (SPLITS, "3.0.0/{split}-{shard:05}-of-{shards:05}.parquet", "3.0.0"),
    "xsum": (SPLITS, "default/{split}/{shard:04}.parquet", None),
    "gsm8k": (("train", "test"), "main/{split}-{shard:05}-of-{shards:05}.parquet", "main"),
    "mt_bench": (("train",), PARQUET, None),
}
EVALUATION = ["--quality_datasets", "ultrachat", "--quality_max_batches", 1, "--spec_num_prompts", 2, "--spec_prompt_length", 8, "--spec_max_new_tokens", 8,
              "--fit_prompts", 2, "--max_length", 32, "--gamma", 2, "--num_threads", 1]


# ---- what the hub has ----

def hub_rows(name: str) -> list[dict]:
    """Rows for all of a data set's splits in the hub's own form."""
    rows = form_rows(name, ROWS * len(LAYOUTS[name][0]))
    if name == "share_gpt":  # by column
        return [{**row, "conversations": {key: [turn[key] for turn in row["conversations"]] for key in ("from", "value")}} for row in rows]
    if name == "mt_bench":
        return [{"prompt_id": i, "category": "writing", "prompt": row["turns"], "reference": []} for i, row in enumerate(rows)]
    return [{**row, "id": f"<urn:uuid:{i}>", "url": f"https://fox.com/{i}"} if name in ("fineweb", "c4") else row for i, row in enumerate(rows)]


def file_of(name: str, rows: list[dict]) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode())
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


def data_files(name: str) -> dict[str, bytes]:
    """The shards of a data set, and the card that names them."""
    splits, place, config = LAYOUTS[name]
    rows, files = hub_rows(name), {}
    for number, split in enumerate(splits):
        own = rows[number * len(rows) // len(splits) : (number + 1) * len(rows) // len(splits)]
        for shard in range(SHARDS):
            part = own[shard * len(own) // SHARDS : (shard + 1) * len(own) // SHARDS]
            path = place.format(split=split, shard=shard, shards=SHARDS)
            files[path] = file_of(path, part)
    if DATASETS[name].hub_revision is not None:
        return files
    paths = "".join(f"  - split: {split}\n    path: {re.sub('{shard.*', '*', place).format(split=split)}\n" for split in splits)
    card = "" if config is None else f"configs:\n- config_name: {config}\n  data_files:\n{paths}"
    return {"README.md": f"---\nlicense: mit\n{card}---\n# {name}\n".encode(), **files}


@pytest.fixture(scope="module")
def model_files(tiny_target_path: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in tiny_target_path.iterdir()}
    settings = json.loads(files["generation_config.json"]) | {"eos_token_id": [1, 6]}  # a list, which only this file has
    return {**files, "generation_config.json": json.dumps(settings).encode(), "README.md": b"# A tiny Llama", "original/consolidated.00.pth": b"not to be fetched"}


@dataclass
class Ran:
    """What a command left."""

    status: int
    out: str
    err: str


class Machine:
    """Where commands run: a process with the endpoint for its hub and an empty cache, which has imported them."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder, self.numbers = hub, folder, count()
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        left_out = re.compile(r"HF_.*|HUGGING.*|TRANSFORMERS_.*|.*_proxy", re.IGNORECASE)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hub_commands.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**{name: value for name, value in os.environ.items() if not left_out.fullmatch(name)}, **own})
        assert self.process.stdout.readline() == "ready\n"

    def run(self, command: str, *arguments: object, **how: object) -> Ran:
        folder = self.folder / f"{next(self.numbers)}-{command}"
        folder.mkdir()
        job = {"command": command, "argv": list(map(str, arguments)), "folder": str(folder), **how}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return Ran(status, *((folder / name).read_text() for name in ("stdout", "stderr")))

    def ok(self, command: str, *arguments: object, **how: object) -> str:
        ran = self.run(command, *arguments, **how)
        assert ran.status == 0, ran.err
        return ran.out

    def train(self, output: Path, model: object = "org/tiny", data: str = "ultrachat", steps: int = 3, how: dict | None = None, **flags: object) -> Ran:
        words = {"model_path": model, "dataset": data, "target_layer": 1, "ft_head": True, "max_steps": steps, "batch_size": 2, "max_length": 32, "num_threads": 1,
                 "output_dir": output, **flags}
        return self.run("train", *(word for name, value in words.items() for word in (f"--{name}", value)), **(how or {}))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, model_files: dict[str, bytes]) -> Iterator[Machine]:
    with hub_endpoint() as hub:
        hub.add(Repository("models", "org/tiny", model_files))
        for name in LAYOUTS:
            dataset = DATASETS[name]
            hub.add(Repository("datasets", dataset.hub_id, data_files(name), dataset.hub_revision or "main"))
        machine = Machine(hub, tmp_path_factory.mktemp("hub"))
        yield machine
        machine.process.stdin.close()
        machine.process.wait()


def check_one_line(ran: Ran, pattern: str) -> None:
    """Of a failure: one line, behind what the libraries say of their own retries."""
    assert ran.status == 2, ran.err
    assert re.match(f"error: .*{pattern}", ran.err.splitlines()[-1]), ran.err
    assert ran.err.count("error: ") == 1 and "Traceback" not in ran.err


# ---- what works ----

def test_train_evaluate_benchmark_and_export_work_on_the_hubs_model(machine, tiny_target_path, tmp_path):
    assert machine.train(tmp_path / "exit").status == 0
    assert machine.train(tmp_path / "local", tiny_target_path).status == 0
    checkpoint = tmp_path / "exit" / "model_000003.safetensors"
    weights, local = load_file(checkpoint), load_file(tmp_path / "local" / "model_000003.safetensors")
    assert weights.keys() == local.keys() and all(weights[name].equal(local[name]) for name in weights)
    machine.ok("evaluate", "--model_path", "org/tiny", "--checkpoint", checkpoint, "--out_dir", tmp_path / "evaluation", *EVALUATION)
    assert json.loads((tmp_path / "evaluation" / "config.json").read_text())["model_path"] == "org/tiny"
    machine.ok("benchmark", "--hf_model", "org/tiny", "--checkpoint", checkpoint, "--method", "vanilla", "self_speculative", "--dataset", "mt_bench", "--max_samples", 2,
               "--max_new_tokens", 4, "--num_threads", 1, "--out", tmp_path / "records.jsonl")
    records = list(map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines()))
    assert {record["status"] for record in records if "status" in record} == {"ok"}
    machine.ok("export_draft", "--model_path", "org/tiny", "--checkpoint", checkpoint, "--out_dir", tmp_path / "draft")
    assert "original/consolidated.00.pth" not in machine.hub.repositories["models", "org/tiny", "main"].served
    assert json.loads(machine.ok("model", tmp_path / "draft"))[1] == json.loads(machine.ok("model", "org/tiny", offline=True))[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_data_set_of_the_hub_is_read_in_its_form(name, machine):
    dataset = DATASETS[name]
    used = SPLITS if dataset.cut else SPLITS[1:]
    found = json.loads(machine.ok("rows", name, dataset.hub_id, ROWS * 9, *used))
    rows = hub_rows(name) if dataset.assemble is None else dataset.assemble(hub_rows(name))
    learned = [name for name in LAYOUTS[name][0] if any(name in place for place in dataset.hub_splits.values())]
    expected = [json.dumps(dataset.parse(row)) for row in rows[: len(rows) * len(learned) // len(LAYOUTS[name][0])]]
    shown = {split: list(map(json.dumps, examples)) for split, examples in found.items()}
    if not dataset.cut:
        assert shown["validation"] == shown["test"] == expected
        return
    together = sum(shown.values(), [])
    assert len(set(together)) == len(together) and shown["train"]
    assert set(together) <= set(expected)
    kept = 1 if name != "c4" else 0.5  # whose held-out rows are a few of the hub's
    assert len(together) >= kept * len(expected)


def test_all_data_sets_of_the_hub_are_served():
    assert {name for name, dataset in DATASETS.items() if dataset.hub_id is not None} == LAYOUTS.keys() <= FORMS.keys()


# ---- streams ----

def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("model_*.safetensors"))


@contextmanager
def down_from_the_first_checkpoint(repository: Repository, run: Path) -> Iterator[None]:
    """The hub answers no more once `run` has saved: what was read ahead is used up before its data have been read three times."""
    over = Event()

    def watch() -> None:
        while not over.wait(0.005):
            if saved_steps(run):
                repository.problem = "down"

    watching = Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        repository.problem = None


def test_a_stream_that_the_hub_broke_off_is_resumed_exactly(machine, tmp_path):
    """An uninterrupted run of three epochs, and one whose hub fails in the midst of it."""
    flags = {"data": "fineweb", "steps": 60, "save_every_steps": 5}
    assert machine.train(tmp_path / "whole", **flags).status == 0
    with down_from_the_first_checkpoint(machine.hub.repositories["datasets", DATASETS["fineweb"].hub_id, "main"], tmp_path / "broken"):
        ran = machine.train(tmp_path / "broken", **flags)
    check_one_line(ran, r"--dataset fineweb: HuggingFaceFW/fineweb could not be read from the hub .*; try again later, or give local files")
    assert saved_steps(tmp_path / "broken")[-1] < "model_000060"
    assert machine.train(tmp_path / "broken", **flags, resume=True).status == 0
    found, expected = (load_file(tmp_path / name / "model_000060.safetensors") for name in ("broken", "whole"))
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.fixture(scope="module")
def whole(machine) -> dict[str, str]:
    """What `rows` says of data sets that are downloaded and streamed."""
    return {name: machine.ok("rows", name, DATASETS[name].hub_id, ROWS * 9, "train") for name in ("ultrachat", "fineweb", "c4")}


@pytest.mark.parametrize("name", ["ultrachat", "fineweb", "c4"])
def test_a_connection_that_broke_once_loses_no_row_and_repeats_none(name, machine, whole):
    broken = machine.hub.add(Repository("datasets", f"org/{name}-flaky", data_files(name), problem="broken", bad_answers=1))
    assert machine.ok("rows", name, broken.name, ROWS * 9, "train") == whole[name]
    assert len(broken.served) > 1


# ---- what fails ----

FAILURES = {
    "gated": r"is gated on the hub; ask for access at http://127.0.0.1:\d+/{page}, then run hf auth login \(or set HF_TOKEN\), or give ",
    "missing": r"is not on the hub, or is private; check the name; for a private one run hf auth login \(or set HF_TOKEN\), or give ",
    "slow": r"could not be read from the hub \(no answer in time\); try again, or wait longer with HF_HUB_ETAG_TIMEOUT=60 HF_HUB_DOWNLOAD_TIMEOUT=60, or give ",
    "broken": r"could not be read from the hub \(the connection broke\); try again: files that are whole are kept, or give ",
    "limited": r"could not be read from the hub \(429, too many requests\); wait some minutes and try again, or for a higher limit run hf auth login .*, or give ",
    "down": r"could not be read from the hub \(it is out of order: 503\); try again later, or give ",
}
FAILURES["stalled"] = FAILURES["slow"]
PATIENCE = dict.fromkeys(FAILURES) | {"slow": 0.2, "stalled": 0.2}  # seconds


@pytest.fixture(scope="module")
def identity(machine) -> str:
    """What `model` says of org/tiny."""
    return machine.ok("model", "org/tiny")


@pytest.mark.parametrize(("problem", "token"), [*((problem, None) for problem in FAILURES), ("gated", NO_ACCESS_TOKEN)])
def test_a_model_that_the_hub_does_not_give_is_one_line_and_nothing_of_it_is_used(problem, token, machine, model_files, identity, tmp_path):
    repository = machine.hub.add(Repository("models", f"org/{problem}{token or ''}", model_files, problem=problem))
    failure = f"no model at {repository.name}: it {FAILURES[problem].format(page=repository.name)}a folder with config.json$"
    check_one_line(machine.train(tmp_path / "exit", repository.name, how={"token": token, "patience": PATIENCE[problem]}), failure)
    if problem == "broken":
        check_one_line(machine.run("model", repository.name, offline=True), "is not downloaded, and HF_HUB_OFFLINE is set; unset it, or give a folder")
    if problem == "gated":
        assert machine.ok("model", repository.name, token=TOKEN) == identity and not machine.hub.tokens_at_storage
    else:
        repository.problem = None
        assert machine.ok("model", repository.name) == identity


@pytest.mark.parametrize("problem", ["slow", "limited"])
def test_a_model_that_was_downloaded_needs_no_hub(problem, machine, model_files, identity):
    repository = machine.hub.add(Repository("models", f"org/kept-{problem}", model_files))
    assert machine.ok("model", repository.name) == identity
    repository.problem = problem
    assert machine.ok("model", repository.name, patience=PATIENCE[problem]) == machine.ok("model", repository.name, offline=True) == identity


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"])
def test_no_file_of_a_model_is_done_without_because_the_hub_failed(file, machine, model_files, identity):
    """transformers goes on without those that a model need not have: other end tokens, no chat template."""
    repository = machine.hub.add(Repository("models", f"org/without-{file}", model_files, problem="down", only=file))
    check_one_line(machine.run("model", repository.name), FAILURES["down"])
    check_one_line(machine.run("model", repository.name, offline=True), "is not downloaded")
    repository.problem = None
    assert machine.ok("model", repository.name) == identity


def test_a_model_whose_connection_broke_once_is_whole(machine, model_files, identity):
    repository = machine.hub.add(Repository("models", "org/flaky", model_files, problem="broken", only="model.safetensors", bad_answers=1))
    assert machine.ok("model", repository.name) == identity and repository.served.count("model.safetensors") == 2


def test_a_model_that_lacks_one_of_its_shards_is_not_used(machine, tiny_target_path, model_files, identity, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_target_path).save_pretrained(tmp_path, max_shard_size="80KB")
    shards = {path.name: path.read_bytes() for path in tmp_path.glob("model*")}
    files = {name: content for name, content in model_files.items() if name != "model.safetensors"} | shards
    last = max(name for name in shards if name.endswith(".safetensors"))
    repository = machine.hub.add(Repository("models", "org/sharded", files, problem="broken", only=last))
    check_one_line(machine.run("model", repository.name), FAILURES["broken"])
    check_one_line(machine.run("model", repository.name, offline=True), "is not downloaded")
    assert len(shards) > 3 and repository.served.count(min(shards)) == 1
    repository.problem = None
    assert machine.ok("model", repository.name) == identity


@pytest.mark.parametrize(("name", "problem"), [*(("ultrachat", problem) for problem in FAILURES), ("fineweb", "gated"), ("fineweb", "broken")])
def test_a_data_set_that_the_hub_does_not_give_is_one_line_and_no_part_of_it_is_used(name, problem, machine, whole):
    """One that is downloaded, and one that is streamed."""
    repository = machine.hub.add(Repository("datasets", f"org/{name}-{problem}", data_files(name), problem=problem))
    arguments = ("rows", name, repository.name, ROWS * 9, "train")
    remedy = FAILURES[problem].format(page=f"datasets/{repository.name}")
    check_one_line(machine.run(*arguments, patience=PATIENCE[problem]), f"--dataset {name}: {repository.name} {remedy}local files of the same form with --dataset_path$")
    if problem == "broken":
        check_one_line(machine.run(*arguments, offline=True), "HF_HUB_OFFLINE is set; unset it, or give local files")
    if problem != "gated":
        repository.problem = None
    assert machine.ok(*arguments, token=TOKEN) == whole[name]


@pytest.mark.parametrize(("error", "told"), [
    (OSError(errno.ENOSPC, "No space left on device", "/cache/blob"), "org/tiny could not be kept (No space left on device: /cache/blob); make room there, or set HF_HOME to another folder, or ask"),
    (PermissionError(errno.EACCES, "Permission denied", "/cache"), "org/tiny could not be kept (Permission denied: /cache); make room there, or set HF_HOME to another folder, or ask"),
    (ValueError("Bad split: dev"), "org/tiny could not be read from the hub (Bad split: dev); check the network and try again, or ask"),
])
def test_what_is_not_the_hubs_fault_is_told_as_it_is(error, told, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"), hub_errors("org/tiny", "org/tiny", "ask"):
        raise OSError("it failed") from error


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        endpoint = f"http://127.0.0.1:{closed_soon.getsockname()[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    with pytest.raises(UserError, match=r"it could not be read from the hub \(it cannot be reached\); check the network, or ask"), hub_errors("no model: it", "org/tiny", "ask"):
        huggingface_hub.HfApi(endpoint=endpoint).model_info("org/tiny")

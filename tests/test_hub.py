"""Models and data sets of the Hugging Face hub, from an endpoint on the loopback address that answers, and fails, as the hub does."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from hub_endpoint import NO_ACCESS_TOKEN, TOKEN, Hub, Repository, hub_endpoint
from row_files import SPLITS
from test_datasets import FORMS, form_rows
from text_datasets import DATASETS

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

    def run(self, command: str, *arguments: object, token: str | None = None, offline: bool = False) -> Ran:
        folder = self.folder / f"{next(self.numbers)}-{command}"
        folder.mkdir()
        job = {"command": command, "argv": list(map(str, arguments)), "folder": str(folder), "token": token, "offline": offline}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return Ran(status, *((folder / name).read_text() for name in ("stdout", "stderr")))

    def ok(self, command: str, *arguments: object, **how: object) -> str:
        ran = self.run(command, *arguments, **how)
        assert ran.status == 0, ran.err
        return ran.out

    def train(self, output: Path, model: object = "org/tiny", data: str = "ultrachat", steps: int = 3, **flags: object) -> Ran:
        words = {"model_path": model, "dataset": data, "target_layer": 1, "ft_head": True, "max_steps": steps, "batch_size": 2, "max_length": 32, "num_threads": 1,
                 "output_dir": output, **flags}
        return self.run("train", *(word for name, value in words.items() for word in (f"--{name}", value)))


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
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["model_path"] == "org/tiny"
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

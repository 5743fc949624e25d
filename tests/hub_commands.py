"""Runs commands of the suite with the hub's environment, each in a process of its own that has imported everything already.

`python hub_commands.py` reads jobs as lines of JSON, {"command": "train", "argv": [...], "folder": where stdout and stderr go, "token": ..., "offline": ...,
"patience": ...}, and answers each with its exit status. The libraries' retries stay what they are; the time between them is cut.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]
import datasets
import huggingface_hub

import benchmark
import evaluate
import export_draft
import train
from data.registry import DATASETS, open_stream
from models.target_model import DeviceArgs, eos_token_ids, load_target, tokenizer_hash, weights_hash
from running import command_line

LONGEST_WAIT_SEC = 0.005


def rows() -> None:
    """Prints the first examples of splits of a data set: its name, where the hub has it, how many, the splits."""
    name, hub_id, count, *splits = sys.argv[1:]
    DATASETS[name] = replace(DATASETS[name], hub_id=hub_id)
    print(json.dumps({split: list(islice(open_stream(name, split, shuffle=False).rest_of_epoch(), int(count))) for split in splits}))


def model() -> None:
    """Prints what identifies a model."""
    target = load_target(sys.argv[1], DeviceArgs(device="cpu"))
    print(json.dumps([weights_hash(target.model), tokenizer_hash(target.tokenizer), sorted(eos_token_ids(target)), target.tokenizer.bos_token, target.tokenizer.chat_template]))


COMMANDS = {command.__module__: command for command in (train.main, evaluate.main, benchmark.main, export_draft.main)} | {"rows": rows, "model": model}


def hurry(patience: float | None) -> None:
    """Wait a moment where the libraries wait seconds between two tries, and for an answer `patience` seconds (None: theirs)."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, LONGEST_WAIT_SEC))
    if patience is not None:
        huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = patience


def run_job(job: dict) -> None:
    """Never returns."""
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        os.dup2(os.open(Path(job["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    hurry(job.get("patience"))
    if job.get("token"):
        os.environ["HF_TOKEN"] = job["token"]
    if job.get("offline"):
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    sys.argv = [f"{job['command']}.py", *job["argv"]]
    status = 1
    try:
        command_line.run(COMMANDS[job["command"]])
    except SystemExit as exit_:
        status = exit_.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_job(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    serve()

"""The documentation: what it links, names and tells the reader to type exists."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers import HfArgumentParser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("assets/*/README.md"))]
MOST_README_LINES, FIRST_COMMAND_WITHIN, MOST_COLUMNS = 200, 40, 120
NOT_REWRAPPED = {"log.md"}  # dated entries stay as they were written
# Folders of the repository; a path that begins with another one, such as runs/, is an example.
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "logs"}
ROOT_SUFFIXES = {".py", ".sh", ".md", ".toml", ".txt"}
WRITTEN_BY_RUNS = {"cmd.txt", "train_cmd.txt", "final_checkpoint.txt"}
FOREIGN_MODULES = {"pytest", "ruff", "commands.NAME"}  # and what stands for any of ours
STARTERS = {"python", "bash", "make", "accelerate", "torchrun"}


# ---- what a page says ----

def split_page(text: str) -> tuple[str, list[str]]:
    """The prose of a page, and its fenced code blocks."""
    parts = re.split(r"^```.*$", text, flags=re.MULTILINE)
    return "".join(parts[::2]), parts[1::2]


def links_in(text: str) -> Iterator[str]:
    """Targets of the links and images in the prose that point into the repository."""
    yield from (target for target in re.findall(r"\]\(([^)\s]+)\)", split_page(text)[0]) if not re.match(r"[a-z]+:", target))


def anchors_in(text: str) -> set[str]:
    """What links can point at behind #: headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", split_page(text)[0], flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths_in(text: str) -> Iterator[str]:
    """What stands in backticks in the prose and looks like a file or folder of the repository."""
    for span in re.findall(r"`([^`\n]+)`", split_page(text)[0]):
        if re.fullmatch(r"[\w.@+*-]+(/[\w.@+*-]+)*/?", span):
            first, slash, _ = span.partition("/")
            in_folder = bool(slash) and first in FOLDERS
            if in_folder or (not slash and Path(span).suffix in ROOT_SUFFIXES and span not in WRITTEN_BY_RUNS):
                yield span


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of every command in fenced blocks, and of code spans that begin as one. Variables that a block sets are filled in."""
    prose, blocks = split_page(text)
    for span in re.findall(r"`([^`]+)`", prose):
        if span.split(maxsplit=1)[0] in STARTERS and " " in span.strip():
            yield from _words_of(span.replace("\n", " "))
    for block in blocks:
        yield from _words_of(block)


def _words_of(block: str) -> Iterator[list[str]]:
    known: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # code in another language
            continue
        if len(words) == 1 and re.fullmatch(r"[A-Z]\w*=.*", words[0]):
            name, _, value = words[0].partition("=")
            known[name] = value
        command: list[str] = []
        for word in words:
            if word in ("&&", "||", ";", "|"):
                yield command
                command = []
            else:
                command += known[word[1:]].split() if word[:1] == "$" and word[1:] in known else [word]
        yield command


# ---- what is wrong with it ----

def complaints(page: Path, root: Path = ROOT) -> list[str]:
    """One sentence for every link, path and command of `page` that leads nowhere."""
    text = page.read_text(encoding="utf-8")
    found = [f"dead link {target}" for target in links_in(text) if not _leads_somewhere(page, target)]
    found += [f"no file {path}" for path in paths_in(text) if not any(True for base in (root, page.parent) for _ in base.glob(path.rstrip("/")))]
    for words in commands_in(text):
        found += command_complaints(words)
    return found


def _leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    aim = page.parent / path if path else page
    return aim.exists() and (not anchor or anchor in anchors_in(aim.read_text(encoding="utf-8")))


def command_complaints(words: list[str]) -> list[str]:
    """What a command names that does not exist: script, module, make target or flag."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], flags=re.DOTALL):
        words.pop(0)
    if words and words[0] in ("accelerate", "torchrun"):
        words = ["python", *_launched(words)]
    if not words:
        return []
    if words[0] == "make":
        return [f"no make target {word}" for word in words[1:] if not word.startswith("-") and "=" not in word and word not in make_targets()]
    if words[0] in ("bash", "./launch_train_bg.sh", "./install_dependencies.sh") or re.fullmatch(r"\./[\w/.]+\.sh", words[0]):
        return _script_complaints(words[1:] if words[0] == "bash" else words)
    return _python_complaints(words[1:]) if words[0] in ("python", "python3", ".venv/bin/python") else []


def _launched(words: list[str]) -> list[str]:
    """What `accelerate launch` or `torchrun` starts."""
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return [] if script is None else words[script:]


def _script_complaints(words: list[str]) -> list[str]:
    script = Path(words[0].removeprefix("./"))
    if not (ROOT / script).is_file():
        return [f"no script {script}"]
    if script.name == "launch_train_bg.sh":  # a name, and the command that it starts
        return command_complaints(words[2:])
    text = (ROOT / script).read_text(encoding="utf-8")
    own = [] if script.parts[0] == "tests" else [word for word in words[1:] if word.startswith("--")]
    return [f"{script} has no flag {word}" for word in own if word != "--help" and word not in text]


def _python_complaints(words: list[str]) -> list[str]:
    module = words[1] if words[:1] == ["-m"] and len(words) > 1 else words[0].removesuffix(".py").replace("/", ".") if words and words[0].endswith(".py") else None
    if module is None:
        return []
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        return [] if module in FOREIGN_MODULES else [f"no command {module}"]
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{module} has no flag {flag}" for flag in given if flag not in flags_of(module)]


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@cache
def flags_of(module: str) -> set[str]:
    """The flags that a command takes, aliases included."""
    if hasattr(importlib.import_module(module), "Args"):
        parser: argparse.ArgumentParser = HfArgumentParser(importlib.import_module(module).Args, allow_abbrev=False)
        return {option for action in parser._actions for option in action.option_strings}
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument")
    return {"--help", *(arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant))}


# ---- tests ----

@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_what_a_page_names_exists(page: Path):
    assert not complaints(page)


@pytest.mark.parametrize(("text", "complaint"), [
    ("[here](docs/nowhere.md)", "dead link docs/nowhere.md"),
    ("![a picture](nowhere.png)", "dead link nowhere.png"),
    ("# A heading\n[there](page.md#another)", "dead link page.md#another"),
    ("the file `decoding/nowhere.py`", "no file decoding/nowhere.py"),
    ("the file `nowhere.py`", "no file nowhere.py"),
    ("all of `results/nowhere/*.csv`", "no file results/nowhere/*.csv"),
    ("```\npython nowhere.py --out x\n```", "no command nowhere"),
    ("```\npython -m commands.nowhere\n```", "no command commands.nowhere"),
    ("```\npython train.py --no_such_flag 1\n```", "train has no flag --no_such_flag"),
    ("`python train.py --no_such_flag 1`", "train has no flag --no_such_flag"),
    ("```\nA=1 python evaluate.py \\\n    --no_such_flag 1  # why\n```", "evaluate has no flag --no_such_flag"),
    ('```\nM="--no_such_flag 1"\npython evaluate.py $M\n```', "evaluate has no flag --no_such_flag"),
    ("```\nmake help && python -m commands.plot_results x.jsonl --no_such_flag\n```", "commands.plot_results has no flag --no_such_flag"),
    ("```\naccelerate launch --num_processes 2 train.py --no_such_flag\n```", "train has no flag --no_such_flag"),
    ("```\nbash launch_train_bg.sh name python train.py --no_such_flag\n```", "train has no flag --no_such_flag"),
    ("```\nbash sweeps/nowhere.sh\n```", "no script sweeps/nowhere.sh"),
    ("```\n./install_dependencies.sh --no_such_flag\n```", "install_dependencies.sh has no flag --no_such_flag"),
    ("```\nmake demo nowhere OUT=x\n```", "no make target nowhere"),
])
def test_what_does_not_exist_is_found(tmp_path: Path, text: str, complaint: str):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert complaints(page) == [complaint]


def test_examples_and_written_files_are_no_complaints(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("`runs/demo/results.csv` `cmd.txt` `results.csv` `docs/*.md` `--gamma` [a](https://example.org) [b](#how-so)\n## How so?\n"
                    "```\npython train.py --target_layer 1 --resume\npython -m pytest --some_flag\npython -m commands.NAME\nmake bench OUT=x\n```\n", encoding="utf-8")
    assert not complaints(page)


def test_readme_is_short_and_begins_with_a_command():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_README_LINES
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("```")) < FIRST_COMMAND_WITHIN


def test_readme_leads_to_every_page():
    linked = set(links_in((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= linked


def test_lines_are_short_but_for_tables():
    long = [f"{page.name}:{i}" for page in PAGES if page.parent in (ROOT, ROOT / "docs") and page.name not in NOT_REWRAPPED
            for i, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if len(line) > MOST_COLUMNS and not line.startswith("|")]
    assert not long

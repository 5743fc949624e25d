"""Chats about Python libraries, made from the docstrings of the packages installed on this machine.

The data set that needs no hub: files are read with `ast`, never imported, and every docstring becomes a chat in
UltraChat form whose turns are its sections (summary, parameters, returns, examples).

    python -m data.pydoc_texts            # build the cache, print counts and one chat
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.row_files import SPLITS, TextDataset, parse_messages, split_of
from running.run_files import write_text

PACKAGES = ("torch", "transformers", "numpy", "pandas", "matplotlib", "datasets", "accelerate", "huggingface_hub")
CACHE_DIR = Path(__file__).parent.parent / ".cache"
FORMAT_VERSION = 2
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3", "__pycache__", "_vendor"}
MIN_ANSWER_CHARS, MAX_ANSWER_CHARS = 24, 2400
SHINGLE_WORDS, MAX_SEEN_SHARE = 6, 0.7

SECTION_KINDS = {
    "parameters": "parameters", "args": "parameters", "arguments": "parameters", "keyword args": "parameters",
    "returns": "returns", "return": "returns", "yields": "returns",
    "examples": "examples", "example": "examples",
    "notes": "notes", "note": "notes",
}
IGNORED_SECTIONS = {
    "raises", "see also", "references", "warning", "warnings", "shape", "attributes", "methods",
    "other parameters", "tip",
}
QUESTIONS = {
    "module": ("What is the module `{name}` for?", "Give me an overview of `{name}`.", "Describe the Python module `{name}`."),
    "class": ("What is the class `{name}`?", "Explain `{name}` to me.", "When would I use the class `{name}`?"),
    "function": ("What does `{name}` do?", "Explain `{name}`.", "Can you tell me what the function `{name}` is for?",
                 "I found a call of `{name}` in some code. What does it do?"),
    "parameters": ("Which parameters does it take?", "What are its arguments?", "Describe the parameters of `{short}`."),
    "returns": ("What does it return?", "And the return value?", "What do I get back from `{short}`?"),
    "notes": ("Anything else that I should know?", "Is there more to say about `{short}`?", "What should I watch out for?"),
    "examples": ("Show me an example.", "How is it used? An example, please.", "Can you give an example of `{short}`?"),
}


@dataclass(frozen=True)
class Docstring:
    """One docstring: dotted name of what it documents, its kind (a key of QUESTIONS) and its dedented text."""

    module: str
    name: str
    kind: str
    text: str


def package_roots() -> dict[str, Path]:
    """Name -> folder of every source package that is installed here ("" for the standard library)."""
    roots = {"": Path(sysconfig.get_paths()["stdlib"])}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def cache_key() -> str:
    """Hash of everything that the rows depend on: Python's and the packages' versions, and this file's format."""
    versions = {name: importlib.metadata.version(name) for name in package_roots() if name}
    described = json.dumps([FORMAT_VERSION, platform.python_version(), sorted(versions.items())])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def source_files() -> list[tuple[str, Path]]:
    """(module name, path) of every source file, sorted by module name."""
    files = []
    for package, root in package_roots().items():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and not parts[-1].startswith("test_"):
                names = [package, *(part for part in parts if part != "__init__")]
                files.append((".".join(filter(None, names)), path))
    return sorted(file for file in files if file[0])


def read_docstrings(file: tuple[str, Path]) -> list[Docstring]:
    """Docstrings of one source file, in source order; [] for a file that Python cannot parse."""
    module, path = file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, RecursionError, ValueError):
        return []
    return list(_walk_docstrings(tree, module, module, "module"))


def _walk_docstrings(node: ast.AST, module: str, name: str, kind: str) -> Iterator[Docstring]:
    text = ast.get_docstring(node, clean=False)
    if text:
        yield Docstring(module, name, kind, inspect.cleandoc(text))
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            child_kind = "class" if isinstance(child, ast.ClassDef) else "function"
            yield from _walk_docstrings(child, module, f"{name}.{child.name}", child_kind)


def split_sections(text: str) -> dict[str, str]:
    """{"summary", "parameters", "returns", "examples", "notes"} -> text, from Google or numpy style headings.

    Text under any other heading (raises, see also) is left out; a docstring without headings is all summary.
    """
    sections: dict[str, list[str]] = {"summary": []}
    kept = sections["summary"]
    lines = text.splitlines()
    for i, line in enumerate(lines):
        heading = line.strip().rstrip(":").lower()
        is_google = line.strip().endswith(":") and not line.startswith(" ")
        is_numpy = i + 1 < len(lines) and re.fullmatch(r"\s*-{3,}\s*", lines[i + 1]) is not None
        if (is_google or is_numpy) and heading in SECTION_KINDS:
            kept = sections.setdefault(SECTION_KINDS[heading], [])
        elif (is_google or is_numpy) and heading in IGNORED_SECTIONS:
            kept = []
        elif not re.fullmatch(r"\s*-{3,}\s*", line):
            kept.append(line)
    return {kind: _clip(textwrap.dedent("\n".join(body))) for kind, body in sections.items()}


def _clip(text: str) -> str:
    """`text` cut at the last line end before MAX_ANSWER_CHARS."""
    if len(text) <= MAX_ANSWER_CHARS:
        return text.strip()
    return text[:MAX_ANSWER_CHARS].rsplit("\n", 1)[0].strip()


def to_chat(doc: Docstring) -> dict | None:
    """The chat of one docstring in UltraChat form, or None when its summary says too little."""
    sections = split_sections(doc.text)
    if len(sections["summary"]) < MIN_ANSWER_CHARS:
        return None
    digest = hashlib.sha256(doc.name.encode()).digest()
    messages = []
    for turn, (section, answer) in enumerate(sections.items()):
        if len(answer) < MIN_ANSWER_CHARS:
            continue
        phrasings = QUESTIONS[doc.kind if section == "summary" else section]
        question = phrasings[digest[turn] % len(phrasings)].format(name=doc.name, short=doc.name.rsplit(".", 1)[-1])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"prompt": messages[0]["content"], "prompt_id": digest.hex()[:16], "messages": messages}


class NearDuplicates:
    """Remembers the six-word shingles of the texts it was shown.

    Names and numbers are folded first, so that texts which differ only in a class name count as equal.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Whether less than MAX_SEEN_SHARE of the text's shingles occurred in earlier texts; remembers the text."""
        words = re.findall(r"[a-z]+", re.sub(r"\w*[A-Z0-9_]\w*", "x", text))
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        shingles = {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(count)}
        new = len(shingles - self.seen)
        self.seen |= shingles
        return new > (1 - MAX_SEEN_SHARE) * len(shingles)


def build_rows(files: list[tuple[str, Path]]) -> dict[str, list[dict]]:
    """Split name -> chats of `files`, near-duplicates dropped, in an order fixed by the hashes of their names."""
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    duplicates = NearDuplicates()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(read_docstrings, files, chunksize=32)
        for docs in tqdm(found, total=len(files), desc="reading docstrings", unit="file"):
            for doc in docs:
                chat = to_chat(doc)
                if chat is not None and duplicates.is_new(doc.text):
                    rows[split_of(doc.module)].append(chat)
    return {split: sorted(chats, key=lambda chat: chat["prompt_id"]) for split, chats in rows.items()}


def make_rows(split: str) -> list[dict]:
    """The chats of "train", "validation" or "test", from the cache, which is built first where it is missing."""
    path = CACHE_DIR / f"pydoc-{cache_key()}.json"
    if not path.exists():
        rows = build_rows(source_files())
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(rows))
    return json.loads(path.read_text())[split]


DATASET = TextDataset(name="pydoc", parse=parse_messages, make_rows=make_rows)


def main() -> None:
    for split in SPLITS:
        rows = make_rows(split)
        chars = sum(len(m["content"]) for row in rows for m in row["messages"])
        print(f"{split}: {len(rows)} chats, {chars / 1e6:.1f} MB", file=sys.stderr)
    print(json.dumps(rows[0], indent=2))


if __name__ == "__main__":
    main()

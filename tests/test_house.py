"""The house: what lies where, and who may import whom."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A folder imports from those before it, and from itself.
FOLDERS = ("running", "engine", "data", "decoding", "plotting", "models", "speculative", "training", "measuring", "harness", "commands")
# Libraries at the root count with the folder that they front; everything else there is a command.
FRONTS = {
    "data": "data_utils share_gpt_dataset ultrachat_dataset slim_pj_dataset xsum_dataset", "models": "truncated_llama", "training": "tuned_llama",
    "speculative": "speculative",
}
FOLDER_OF = {module: folder for folder, modules in FRONTS.items() for module in modules.split()}
BASELINE = "decoding.vanilla"  # its round is what others do where nothing is drafted
MOST_ROOT_FILES = 34
OWN_BEFORE = {"evaluate"}  # the root's commands keep their names


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module but tests."""
    found = {path.stem: path for path in root.glob("*.py")}
    return found | {f"{folder}.{path.stem}": path for folder in FOLDERS for path in root.glob(f"{folder}/*.py") if path.stem != "__init__"}


def folder_of(module: str) -> str:
    """The folder that `module` counts with."""
    return module.split(".")[0] if "." in module else FOLDER_OF.get(module, "commands")


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names that `path` imports anywhere, inside functions too; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [path.parent.name if node.level else "", node.module]))
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def graph_of(root: Path) -> dict[str, set[str]]:
    """Module -> the suite's own modules that it imports."""
    files = modules_of(root)
    return {module: files.keys() & set(imported_names(path)) - {module} for module, path in files.items()}


def rounds_of(root: Path) -> set[str]:
    """The modules of decoding/ whose rounds, or whole decoders, `speculative.py` imports."""
    names = imported_names(root / "speculative.py")
    return {name.rsplit(".", 1)[0] for name in names if name.startswith("decoding.") and name.endswith(("_round", "_decode"))} - {BASELINE}


def broken_rules(root: Path) -> list[str]:
    """One sentence for every import in `root` that breaks a rule."""
    found, rounds = [], rounds_of(root)
    for module, imports in graph_of(root).items():
        for imported in sorted(imports):
            own, other = folder_of(module), folder_of(imported)
            if FOLDERS.index(other) > FOLDERS.index(own):
                found.append(f"{module} ({own}) imports {imported} ({other}), which lies above it")
            elif own == other == "commands":
                found.append(f"the command {module} imports the command {imported}")
            elif {module, imported} <= rounds:
                found.append(f"the round {module} imports the round {imported}")
    return found


def test_imports_go_one_way():
    assert not broken_rules(ROOT)
    tuple(graphlib.TopologicalSorter(graph_of(ROOT)).static_order())  # raises CycleError


def test_every_kind_of_breach_is_found(tmp_path: Path):
    modules = {"train": "def f():\n    import evaluate", "evaluate": "", "running/results": "from train import x", "commands/tune_it": "", "commands/draw": "from . import tune_it",
               "decoding/chain": "from . import hf_peers", "decoding/hf_peers": "from models.targets import load", "models/targets": "import speculative",
               "speculative": "from decoding.chain import chain_round\nfrom decoding.hf_peers import hf_decode"}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    found = broken_rules(tmp_path)
    for breach in ("the command train imports the command evaluate", "running.results (running) imports train (commands)", "the command commands.draw imports the command commands.tune_it",
                   "the round decoding.chain imports the round decoding.hf_peers", "decoding.hf_peers (decoding) imports models.targets (models)",
                   "models.targets (models) imports speculative (speculative)"):
        assert any(breach in sentence for sentence in found)
    assert len(found) == 6


def test_the_root_holds_what_one_runs_and_what_the_study_is_named_after():
    files = [path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert len(files) <= MOST_ROOT_FILES
    assert all((ROOT / f"{module}.py").exists() for module in FOLDER_OF)


def test_folders_are_flat_and_their_packages_empty():
    for folder in set(FOLDERS) - {"speculative"}:
        assert not (ROOT / folder / "__init__.py").read_text()
        assert not list((ROOT / folder).glob("*/*.py"))


def test_no_name_hides_a_library():
    """An import of ours would find theirs, or theirs ours."""
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    own = {name for name in (*FOLDERS, *(path.stem for path in ROOT.glob("*.py")))} - OWN_BEFORE
    assert not own & libraries
    assert not [module for module in modules_of(ROOT) if module.endswith("utils") and module != "data_utils"]

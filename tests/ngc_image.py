"""A small imitation of NVIDIA's PyTorch container, offline: a Python with packages of its own, their pins, and an index of packages without contents.

The versions are those of 25.01 and of the index on a day of 2026; pip and the virtual environments are real.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NGC_25_01 = "2.6.0a0+ecf3bae40a.nv25.1"  # as its metadata have it; torch.__version__ ends in nv25.01
PINS = {"numpy": "1.26.4", "packaging": "23.2", "pandas": "2.2.2", "pillow": "11.1.0", "pyarrow": "17.0.0", "tqdm": "4.67.1"}  # brought and pinned
# What transformers does at import beside a torch that it refuses, and 5.18 and 5.19 beside torch 2.6 without a GPU.
LLAMA = """
import torch
numbers = torch.__version__.split("+")[0].split(".")
if (int(numbers[1]), "a" not in numbers[2]) < {least}:
    raise ImportError("LlamaForCausalLM requires the PyTorch library but it was not found in your environment")
if {fails} and numbers[1] == "6":
    raise RuntimeError("Cannot access accelerator device when none is available.")
class LlamaForCausalLM: ...
"""
INDEX = {  # name: {version: its requirements}
    "torch": {"2.6.0": [], "2.9.1": [], "2.15.0": []},
    "torchvision": {"0.30.0": ["torch==2.15.0"]},
    "transformers": {
        version: ["packaging>=20.0", "numpy>=1.17", f'torch>={torch}; extra == "torch"', 'accelerate>=1.1.0; extra == "torch"']
        for version, torch in (("5.16.0", "2.4"), ("5.17.0", "2.5"), ("5.18.0", "2.5"), ("5.19.0", "2.5"), ("5.20.0", "2.6"), ("5.24.0", "2.6"), ("6.0.0", "2.12"))},
    "datasets": {"4.0.0": ["pyarrow>=15.0.0"], "5.2.0": ["pyarrow>=21.0.0"]},
    "accelerate": {"1.10.0": ["torch>=2.0.0"], "1.15.0": ["torch>=2.0.0"]},
    "pandas": {"2.2.2": [], "3.1.1": ["numpy>=1.26"]},
    "matplotlib": {"3.11.2": ["numpy>=1.25"], "3.12.0": ["numpy>=2"]},
    "numpy": {"1.26.4": [], "2.5.5": []},
    "pyarrow": {"17.0.0": [], "26.0.1": []},
    "pytest": {"8.4.2": ["packaging>=20"], "9.2.0": ["packaging>=24"]},
    **{name: {version: []} for name, version in (("packaging", "26.4"), ("pillow", "13.0.0"), ("tqdm", "4.70.1"), ("pytest-xdist", "3.8.0"), ("ruff", "0.17.6"))},
}


def files_of(name: str, version: str, requirements: list[str]) -> dict[str, str]:
    """Path in site-packages → contents, of a package without contents."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {text}" for text in requirements)]
    metadata += ["Provides-Extra: torch"] if any("extra ==" in text for text in requirements) else []
    found = {f"{info}/METADATA": "\n".join(metadata) + "\n", f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    found[f"{name.replace('-', '_')}/__init__.py"] = f"__version__ = {version!r}\n"
    if name == "transformers":
        least = (6, True) if any("torch>=2.6" in text for text in requirements) else (5, False)
        found |= {"transformers/models/__init__.py": "", "transformers/models/llama/__init__.py": ""}
        found["transformers/models/llama/modeling_llama.py"] = LLAMA.format(least=least, fails=version in ("5.18.0", "5.19.0"))
    return found | {f"{info}/RECORD": "".join(f"{path},,\n" for path in [*found, f"{info}/RECORD"])}


def write_index(folder: Path) -> None:
    """INDEX as wheels, as pip's --find-links takes them."""
    folder.mkdir()
    for name, versions in INDEX.items():
        for version, requirements in versions.items():
            with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
                for path, text in files_of(name, version, requirements).items():
                    wheel.writestr(path, text)


class Image:
    """The container: `torch` and PINS in the packages of its Python, and in PIP_CONSTRAINT with `pins`."""

    def __init__(self, folder: Path, index: Path, torch: str, pins: dict[str, str] | None = None) -> None:
        self.folder, self.torch, self.venv = folder, torch, folder / "venv"
        self.python = sys._base_executable
        base = folder / "python"  # what a user's site is to this Python, the container's own packages are to its
        self.packages = Path(sysconfig.get_path("purelib", "posix_user", vars={"userbase": str(base)}))
        self.packages.mkdir(parents=True)
        for name, version in {"torch": torch, **PINS}.items():
            self.add(name, version)
        (self.packages / "pip").symlink_to(importlib.metadata.distribution("pip").locate_file("pip"))  # imported, it would keep setuptools from its work
        (folder / "constraint.txt").write_text("".join(f"{name}=={version}\n" for name, version in {**PINS, **(pins or {})}.items()))
        stubs = folder / "bin"
        stubs.mkdir()
        (stubs / "apt-get").write_text("#!/bin/sh\necho apt-get $* >&2; exit 1\n")
        (stubs / "apt-get").chmod(0o755)
        self.settings = {
            "PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(folder), "PYTHONUSERBASE": str(base), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(index), "PIP_CONSTRAINT": str(folder / "constraint.txt"), "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_COMPILE": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def add(self, name: str, version: str) -> None:
        for path, text in files_of(name, version, []).items():
            file = self.packages / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def run(self, *command: str | Path, **settings: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(word) for word in command], env=self.settings | settings, cwd=self.folder, capture_output=True, text=True, timeout=120)

    def pip_install(self, suite: Path = ROOT, **settings: str) -> subprocess.CompletedProcess:
        """`pip install -r requirements.txt`, into the container's own packages."""
        return self.run(self.python, "-m", "pip", "install", "--user", "-r", suite / "requirements.txt", **settings)

    def keep_torch(self, suite: Path = ROOT, **settings: str) -> subprocess.CompletedProcess:
        """`./install_dependencies.sh --keep_torch`."""
        return self.run("bash", suite / "install_dependencies.sh", "--keep_torch", "--venv", self.venv, **{"SYSTEM_PYTHON": self.python} | settings)

    def torch_files(self) -> dict[str, bytes]:
        """Every file of the container's torch."""
        return {str(path): path.read_bytes() for path in sorted(self.packages.glob("torch*/**/*")) if path.is_file()}

    def works(self, python: str | Path) -> bool:
        """Whether the transformers that `python` sees takes its torch, the container's."""
        done = self.run(python, "-c", "import torch; from transformers.models.llama.modeling_llama import LlamaForCausalLM; print(torch.__version__)")
        return done.stdout.strip() == self.torch

    def version(self, python: str | Path, package: str) -> str:
        return self.run(python, "-c", f"import importlib.metadata; print(importlib.metadata.version('{package}'))").stdout.strip()


def copy_suite(folder: Path) -> Path:
    """The installer and its requirements in a folder of their own, to plant mistakes in."""
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("install_dependencies.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder

"""The installation in NVIDIA's containers, on an imitation: their torch stays, and what comes beside it works."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngc_image import NGC_25_01, PINS, ROOT, Image, copy_suite, write_index


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "wheels"
    write_index(folder)
    return folder


def test_pip_alone_keeps_the_torch_of_25_01_and_finds_what_works(tmp_path: Path, index: Path):
    image = Image(tmp_path, index, NGC_25_01)
    before = image.torch_files()
    assert before and not image.works(image.python)  # no transformers yet
    done = image.pip_install()
    assert done.returncode == 0, done.stderr
    assert image.torch_files() == before and image.works(image.python)
    assert image.version(image.python, "transformers") == "5.17.0" and image.version(image.python, "numpy") == PINS["numpy"]


@pytest.mark.parametrize(("torch", "transformers"), [
    (NGC_25_01, "5.17.0"), ("2.6.0a0+df5bbc09d1.nv24.12", "5.17.0"), ("2.9.0a0+50eac811a6.nv25.9", "5.24.0"), ("2.13.0a0+9186a08b2c.nv26.7.59513937", "5.24.0")])
def test_keep_torch_holds_it_and_takes_the_newest_transformers_for_it(tmp_path: Path, index: Path, torch: str, transformers: str):
    image = Image(tmp_path, index, torch)
    before = image.torch_files()
    done = image.keep_torch()
    assert done.returncode == 0, done.stdout + done.stderr
    python = image.venv / "bin/python"
    assert image.torch_files() == before and not list(image.venv.glob("lib/*/site-packages/torch*")) and image.works(python)
    assert (image.version(python, "transformers"), image.version(python, "numpy")) == (transformers, PINS["numpy"])
    assert done.stdout.splitlines()[-1] == (
        f"==== {image.venv} has torch=={torch} and transformers {transformers}: the torch is {image.python}'s own, and this transformers works with it")
    assert "nothing more to do" in image.keep_torch().stdout
    assert image.run(image.venv / "bin/pip", "--version").stdout.startswith("pip ")  # the environment's, not the container's


def test_pins_that_leave_no_choice_are_left_behind_but_for_torch_and_numpy(tmp_path: Path, index: Path):
    image = Image(tmp_path, index, NGC_25_01, pins={"datasets": "3.6.0"})
    before = image.torch_files()
    done = image.keep_torch()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"PIP_CONSTRAINT={tmp_path}/constraint.txt did not let pip finish" in done.stdout and f"numpy=={PINS['numpy']} torch=={NGC_25_01} held" in done.stdout
    python = image.venv / "bin/python"
    assert image.torch_files() == before and image.works(python)
    assert (image.version(python, "datasets"), image.version(python, "numpy"), image.version(python, "matplotlib")) == ("5.2.0", PINS["numpy"], "3.11.2")


def test_another_container_makes_the_environment_anew(tmp_path: Path, index: Path):
    """In the same folder, as where one goes on in a newer image: the older one's transformers would stay."""
    old, new = Image(tmp_path / "old", index, NGC_25_01), Image(tmp_path / "new", index, "2.13.0a0+9186a08b2c.nv26.7")
    new.venv = old.venv
    assert old.keep_torch().returncode == 0 and old.version(old.venv / "bin/python", "transformers") == "5.17.0"
    done = new.keep_torch()
    assert done.returncode == 0 and "made anew" in done.stdout
    assert new.works(new.venv / "bin/python") and new.version(new.venv / "bin/python", "transformers") == "5.24.0"


def test_container_s_python_may_be_a_virtual_environment(tmp_path: Path, index: Path):
    image = Image(tmp_path, index, NGC_25_01)
    image.run(image.python, "-m", "venv", "--without-pip", tmp_path / "own")
    python = tmp_path / "own/bin/python"
    packages, = (tmp_path / "own").glob("lib/*/site-packages")
    for package in image.packages.iterdir():
        (packages / package.name).symlink_to(package)
    done = image.keep_torch(SYSTEM_PYTHON=str(python), PYTHONNOUSERSITE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.works(image.venv / "bin/python") and not list(image.venv.glob("lib/*/site-packages/torch*"))


@pytest.mark.parametrize(("torch", "complaint"), [("2.5.0a0+e000cf0ad9.nv24.10", "is too old: needs 2.6.0a0 or newer"), ("2.16.0a0+123.nv27.1", "is too new")])
def test_torch_outside_the_range_is_one_line(tmp_path: Path, index: Path, torch: str, complaint: str):
    done = Image(tmp_path, index, torch).keep_torch()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: --keep_torch: torch=={torch} of ") and complaint in done.stderr and done.stderr.count("\n") == 1


def test_choice_that_does_not_work_is_one_line(tmp_path: Path, index: Path):
    """As where a container brings a transformers that is in the range and refuses its torch."""
    suite = copy_suite(tmp_path / "suite")
    newest = suite / "requirements/newest.txt"
    newest.write_text(newest.read_text().replace("transformers[torch]", "transformers"))
    image = Image(tmp_path / "image", index, NGC_25_01)
    done = image.keep_torch(suite)
    assert done.returncode == 2 and not (image.venv / ".installed").exists()
    assert done.stderr.splitlines()[-1].startswith(f"error: torch=={NGC_25_01} and transformers 5.24.0 do not work together: ImportError: LlamaForCausalLM requires")


PLANTED = {  # what: (file, right, wrong, planted in pip's way, torch)
    "no pre-releases": ("requirements/common.txt", "torch>=2.6.0a0", "torch>=2.6", True, NGC_25_01),
    "a newer torch": ("requirements/common.txt", "torch>=2.6.0a0", "torch>=2.9", True, NGC_25_01),
    "a transformers that refuses it": ("requirements.txt", "<5.18", "<6", True, NGC_25_01),
    "a transformers that needs a GPU to import": ("requirements.txt", "<5.18", "<5.20", True, NGC_25_01),
    "torchvision from the index": ("requirements/common.txt", "datasets>=4,<6", "datasets>=4,<6\ntorchvision", True, NGC_25_01),
    "no pre-releases, torch held": ("requirements/common.txt", "torch>=2.6.0a0", "torch>=2.6", False, NGC_25_01),
    "5.19, torch held": ("requirements/newest.txt", ",!=5.18.*,!=5.19.*", "", False, NGC_25_01),
    "no choice by torch": ("requirements/newest.txt", "[torch]", "", False, NGC_25_01),
    "an excluded newer torch": ("requirements/common.txt", "<2.16", "<2.13", False, "2.13.0a0+9186a08b2c.nv26.7"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_wrong_ranges_are_found(tmp_path: Path, index: Path, mistake: str):
    """The checks above, with a mistake planted in the requirements."""
    name, right, wrong, by_pip, torch = PLANTED[mistake]
    suite = copy_suite(tmp_path / "suite")
    text = (suite / name).read_text()
    lines = [line.replace(right, wrong) if not line.startswith("#") else line for line in text.splitlines(keepends=True)]
    assert "".join(lines) != text
    (suite / name).write_text("".join(lines))
    image = Image(tmp_path / "image", index, torch)
    before = image.torch_files()
    done = image.pip_install(suite) if by_pip else image.keep_torch(suite)
    python = image.python if by_pip else image.venv / "bin/python"
    assert done.returncode != 0 or image.torch_files() != before or not image.works(python)


def test_ranges_are_those_of_the_version_check():
    from running.command_line import NO_IMPORT, SUPPORTED

    common, pip_alone, newest = ((ROOT / name).read_text() for name in ("requirements/common.txt", "requirements.txt", "requirements/newest.txt"))
    torch, transformers = SUPPORTED["torch"], SUPPORTED["transformers"]
    assert f"\ntorch>={torch[0]}.0a0,<{torch[1]}\n" in common
    assert f"\ntransformers>={transformers[0]},<{min(NO_IMPORT)}\n" in pip_alone
    assert f"\ntransformers[torch]>={transformers[0]},{''.join(f'!={version}.*,' for version in NO_IMPORT)}<{transformers[1]}\n" in newest

"""Installation: the script with stubs for apt-get, pip and Python, which say what they were asked for; images and CI by their files."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from running.command_line import SUPPORTED

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "install_dependencies.sh"
DOCKERFILES = ["Dockerfile", "Dockerfile.gpu"]
TOOLS = "bash basename cat chmod cksum cp cut dirname env ls mkdir rm sed touch uname".split()
PACKAGES = "-r requirements/newest.txt -r requirements/dev.txt"
TORCH = re.search(r"^torch==\S+", (ROOT / "requirements/constraints.txt").read_text(), flags=re.MULTILINE)[0]
# What it answers to the script's question is in a file beside it, here and in the virtual environments that it makes.
PYTHON = r"""#!/usr/bin/env bash
if [[ $1 == -c && $2 == *torch.version.cuda* ]]; then exit "${CPU_BUILD:-0}"; fi
if [[ $1 == -c && $2 == *modeling_llama* ]]; then echo "${BROKEN:-}" >&2; [[ -z ${BROKEN:-} ]]; exit; fi
if [[ $1 == -c && $2 == *'version("transformers")'* ]]; then echo 5.23.0; exit; fi
if [[ $1 == -c ]]; then echo $(<"$0.has"); exit; fi
echo "${0##*/} $*" >>"$CALLS"
case $2 in
  venv) folder=${*: -1}; mkdir -p "$folder/bin"; touch "$folder/pyvenv.cfg"; cp "$0" "$folder/bin/python"; cp "$0.has" "$folder/bin/python.has" ;;
  pip) [[ -z ${FAIL:-} || $* != *"$FAIL"* ]] ;;
esac
"""
APT_GET = r"""#!/usr/bin/env bash
echo "apt-get $*" >>"$CALLS"
[[ $1 == install ]] || exit 0
for package; do
  case $package in
    python*-venv) echo venv >>"$BIN/${package%-venv}.has" ;;
    python*-dev) echo headers >>"$BIN/${package%-dev}.has" ;;
    python*) cp "$STUBS/python" "$BIN/$package"; echo "${package#python}" >"$BIN/$package.has" ;;
    install | -* | ca-certificates) ;;
    *) cp "$STUBS/nothing" "$BIN/$package" ;;
  esac
done
"""
RECORDED = '#!/usr/bin/env bash\necho "${0##*/} $*" >>"$CALLS"\n'
SUDO = RECORDED + '"$@"\n'
APT_CACHE = '#!/usr/bin/env bash\necho "$2:"\nfor name in $APT_PYTHONS; do [[ $2 != "${name%=*}" ]] || echo "  Candidate: ${name#*=}"; done\n'


class Machine:
    """A PATH with a few real tools and stubs for all that installs; everything is written into one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.venv, self.calls_file = folder, folder / "bin", folder / "venv", folder / "calls"
        self.bin.mkdir()
        (folder / "stubs").mkdir()
        for name, text in (("python", PYTHON), ("nothing", "#!/usr/bin/env bash\n")):
            self.write(folder / "stubs" / name, text)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.command("apt-get", APT_GET)
        self.command("apt-cache", APT_CACHE)
        self.user("0")
        self.release("debian", "12")
        self.base = {"PATH": str(self.bin), "HOME": str(folder), "CALLS": str(self.calls_file), "BIN": str(self.bin), "STUBS": str(folder / "stubs"),
                     "OS_RELEASE": str(folder / "os-release"), "APT_PYTHONS": "python3.11=3.11.2-6"}

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def command(self, name: str, text: str = "#!/usr/bin/env bash\n") -> None:
        self.write(self.bin / name, text)

    def user(self, uid: str) -> None:
        self.command("id", f"#!/usr/bin/env bash\necho {uid}\n")

    def release(self, system: str, version: str) -> None:
        (self.folder / "os-release").write_text(f'NAME="A system"\nID={system}\nVERSION_ID="{version}"\n')

    def python(self, name: str = "python3.11", has: str = "3.11 venv headers") -> None:
        self.command(name, PYTHON)
        (self.bin / f"{name}.has").write_text(has + "\n")

    def complete(self) -> None:
        """Nothing is missing but the virtual environment."""
        self.python()
        for name in ("make", "g++", "git"):
            self.command(name)

    def run(self, *arguments: str, **settings: str) -> tuple[int, str]:
        """(exit status, output) of the script."""
        done = subprocess.run(["bash", str(SCRIPT), "--venv", str(self.venv), *arguments], env=self.base | settings, capture_output=True, text=True, timeout=30)
        return done.returncode, done.stdout + done.stderr

    def calls(self) -> list[str]:
        """What the stubs were asked for since the last look."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def installed(calls: list[str]) -> list[str]:
    """Packages that apt-get was asked for; the machine that runs the tests may lack certificates."""
    return [word for call in calls if call.startswith("apt-get install") for word in call.split()[2:] if word[0] != "-" and word != "ca-certificates"]


def from_pip(calls: list[str]) -> list[str]:
    return [call.split("/constraints.txt ")[1] for call in calls if " -m pip install " in call]


def test_bare_machine_gets_all_and_the_second_run_nothing(machine: Machine):
    status, output = machine.run()
    calls = machine.calls()
    assert status == 0, output
    assert calls[0] == "apt-get update" and installed(calls) == ["make", "g++", "git", "python3.11", "python3.11-venv", "python3.11-dev"]
    assert from_pip(calls) == [f"{TORCH}+cpu", PACKAGES]
    assert f"{TORCH}+cpu" in (machine.venv / "constraints.txt").read_text().splitlines()
    assert output.endswith(f"==== {machine.venv} has {TORCH}+cpu and transformers 5.23.0: the tested versions\n")
    status, output = machine.run()
    assert status == 0 and "nothing more to do" in output and machine.calls() == []


@pytest.mark.parametrize(("has", "commands", "packages"), [
    ("3.11 venv headers", "make git", ["g++"]), ("3.11 headers", "make g++ git", ["python3.11-venv"]), ("3.12", "make g++ git", ["python3.12-venv", "python3.12-dev"])])
def test_only_missing_packages_are_installed(machine: Machine, has: str, commands: str, packages: list[str]):
    name = "python" + has.split()[0]
    machine.python(name, has)
    for command in commands.split():
        machine.command(command)
    status, output = machine.run()
    assert status == 0, output
    calls = machine.calls()
    assert installed(calls) == packages and f"{name} -m venv {machine.venv}" in calls


def test_without_apt_or_root_the_virtual_environment_is_made_all_the_same(machine: Machine):
    machine.python()
    machine.user("1000")
    status, output = machine.run()
    assert status == 0 and "warning: going on without make g++ git" in output and not installed(machine.calls())
    machine.command("sudo", SUDO)
    assert machine.run()[0] == 0
    calls = machine.calls()
    assert installed(calls) == ["make", "g++", "git"] and sum(call.startswith("sudo ") for call in calls) == 2


def test_tested_python_is_preferred_then_the_system_s_own_then_any_that_will_do(machine: Machine):
    machine.complete()
    machine.python("python3", "3.12 venv headers")
    machine.python("python3.13", "3.13 venv headers")
    for python, has in (("python3.11", "3.11"), ("python3", "3.12"), ("python3.13", "3.13")):
        assert machine.run()[0] == 0 and (machine.venv / "bin/python.has").read_text().startswith(has)
        (machine.bin / python).unlink()
    machine.python("python3", "3.9 venv headers")
    machine.calls()
    assert machine.run(APT_PYTHONS="python3.11=3.11.0~rc1-1 python3.10=3.10.12-1")[0] == 0
    calls = machine.calls()
    assert installed(calls) == ["python3.10", "python3.10-venv", "python3.10-dev"]
    assert any("--clear" in call for call in calls)  # what was made with another Python
    assert (machine.venv / "constraints.txt").read_text() == f"{TORCH}+cpu\n"  # the tested versions need Python 3.11


def test_settings_reach_pip(machine: Machine):
    machine.complete()
    machine.python("other", "3.12 venv headers")
    status, output = machine.run(SYSTEM_PYTHON="other", PIP_FLAGS="--quiet\n--no-cache-dir", TORCH_VERSION="2.9.1", TORCH_INDEX_URL="https://torch.example")
    calls = machine.calls()
    assert status == 0, output
    assert calls[0].startswith("other -m venv") and all(" pip install --quiet --no-cache-dir -c " in call for call in calls[1:])
    assert from_pip(calls)[0] == "--extra-index-url https://torch.example torch==2.9.1+cpu"
    assert "torch==2.9.1+cpu" in (machine.venv / "constraints.txt").read_text().splitlines()


def test_index_without_a_cpu_build_is_left_to_uv(machine: Machine):
    machine.complete()
    machine.venv.joinpath("bin").mkdir(parents=True)
    (machine.venv / "pyvenv.cfg").touch()
    machine.write(machine.venv / "bin/python", PYTHON)
    machine.write(machine.venv / "bin/uv", RECORDED)
    assert machine.run(FAIL="pip install")[0] != 0
    machine.calls()
    assert machine.run(FAIL="+cpu")[0] == 0  # what failed is not taken for installed
    calls = machine.calls()
    assert f"uv pip install --torch-backend=cpu {TORCH}+cpu" in calls and from_pip(calls)[1:] == ["uv", PACKAGES]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_cpu_never_gets_the_cuda_build(machine: Machine, python: str):
    machine.complete()
    machine.command("nvidia-smi")  # not even beside a driver
    machine.python("python3.11", f"{python} venv headers")
    assert machine.run()[0] == 0
    assert from_pip(machine.calls())[0] == f"{TORCH}+cpu" and f"{TORCH}+cpu" in (machine.venv / "constraints.txt").read_text().splitlines()


def test_gpu_needs_a_driver_and_a_build_with_cuda(machine: Machine):
    machine.complete()
    machine.python()
    status, output = machine.run("--gpu")
    assert status == 2 and output.startswith("error: --gpu: no NVIDIA driver") and output.count("\n") == 1 and machine.calls() == []
    machine.command("nvidia-smi", RECORDED)
    assert machine.run("--gpu")[0] == 0
    assert from_pip(machine.calls())[0] == TORCH
    assert "nothing more to do" in machine.run()[1]  # without a flag, what is there stays
    assert machine.run("--gpu", CPU_BUILD="1", PIP_FLAGS="-q", TORCH_VERSION="2.9.1")[0] == 2
    (machine.bin / "nvidia-smi").unlink()
    assert machine.run("--gpu_later")[0] == 0


def test_what_does_not_work_together_is_not_called_installed(machine: Machine):
    machine.complete()
    status, output = machine.run(BROKEN="ImportError: no PyTorch")
    assert status == 2 and output.splitlines()[-1] == f"error: {TORCH}+cpu and transformers 5.23.0 do not work together: ImportError: no PyTorch"
    assert "nothing more to do" not in machine.run()[1]


def test_other_kind_of_torch_makes_the_environment_anew(machine: Machine):
    machine.complete()
    machine.run()
    machine.calls()
    assert machine.run("--gpu_later")[0] == 0
    assert f"python3.11 -m venv --clear {machine.venv}" in machine.calls()


def test_container_keeps_its_torch(machine: Machine):
    machine.complete()
    machine.python("python3", "3.12 pip headers torch==2.12.0a0+5b1.nv26.05")  # its pip serves the virtual environment, so ensurepip is not needed
    status, output = machine.run("--keep_torch")
    calls = machine.calls()
    assert status == 0, output
    assert calls[0] == f"python3 -m venv --system-site-packages --without-pip {machine.venv}" and from_pip(calls) == [PACKAGES]
    assert (machine.venv / "constraints.txt").read_text() == "torch==2.12.0a0+5b1.nv26.05\n"
    machine.python("python3", "3.12 pip headers")
    status, output = machine.run("--keep_torch")
    assert status == 2 and "has no torch" in output


@pytest.mark.parametrize(("system", "version", "status"), [
    ("ubuntu", "20.04", 2), ("ubuntu", "22.04", 0), ("ubuntu", "26.04", 0), ("debian", "11", 2), ("debian", "13", 0), ("debian", "", 0), ("fedora", "9", 0)])
def test_releases_without_updates_are_refused(machine: Machine, system: str, version: str, status: int):
    machine.complete()
    machine.release(system, version)
    found, output = machine.run()
    assert found == status, output
    if status:
        assert output.startswith(f"error: {system} {version} gets no more updates") and machine.calls() == []
        assert machine.run("--allow_eol_ubuntu")[0] == 0


def test_mistakes_are_one_line_that_names_them(machine: Machine):
    machine.complete()
    (machine.folder / "full/of").mkdir(parents=True)
    for arguments, settings, complaint in (
            (["--gpus"], {}, "unknown argument --gpus"), (["--venv"], {}, "--venv: give a path"), ([], {"SYSTEM_PYTHON": "no_python"}, "SYSTEM_PYTHON=no_python"),
            (["--venv", str(machine.folder / "full")], {}, "is no virtual environment")):
        status, output = machine.run(*arguments, **settings)
        assert status == 2 and output.startswith("error: ") and complaint in output and output.count("\n") == 1, output
    assert machine.calls() == []


def test_help_lists_every_flag_and_setting(machine: Machine):
    status, output = machine.run("--help")
    text = SCRIPT.read_text()
    flags = set(re.findall(r"^ +(--\w+).*\)", text, flags=re.MULTILINE))
    assert status == 0 and {"--gpu", "--venv"} < flags and flags <= set(re.findall(r"^  (--\w+)", output, flags=re.MULTILINE))
    assert set(re.findall(r"\$\{([A-Z_]{4,}):", text)) - {"VERSION_ID"} == set(re.findall(r"^  ([A-Z_]+) ", output, flags=re.MULTILINE))


def test_what_a_python_has_is_found_out():
    probe = re.search(r"PROBE='(.*?)'", SCRIPT.read_text(), flags=re.DOTALL)[1]
    words = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()
    assert words[0] == f"{sys.version_info[0]}.{sys.version_info[1]}" and {"pip", f"torch=={importlib.metadata.version('torch')}", f"packages={sysconfig.get_path('purelib')}"} <= set(words)


def test_range_of_pythons_is_the_commands_own():
    minors = [int(name.split(".")[1]) for name in re.search(r"PYTHONS=\((.*?)\)", SCRIPT.read_text())[1].split()]
    lowest, excluded = (int(version.split(".")[1]) for version in SUPPORTED["python"])
    assert sorted(minors) == list(range(lowest, excluded))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_copy_what_exists_and_explain_their_arguments(name: str):
    text = (ROOT / name).read_text()
    head, body = re.split(r"^(?=ARG )", text, maxsplit=1, flags=re.MULTILINE)
    for line in re.findall(r"^COPY (.*)", body, flags=re.MULTILINE):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        assert all((ROOT / source).exists() for source in sources), line
    arguments = {word.split("=")[0] for line in re.findall(r"^ARG (.*)", body, flags=re.MULTILINE) for word in line.split()}
    assert arguments == set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", head.split("# Build arguments:")[1])), name
    assert arguments <= set(re.findall(r"\b[A-Z_]+\b", (ROOT / "Makefile").read_text()))
    assert re.findall(r"^(USER .*|VOLUME .*|CMD .*)", body, flags=re.MULTILINE) == ["USER suite", "VOLUME /data", 'CMD ["make", "test"]']


def test_images_leave_out_only_what_git_ignores():
    """A tracked file that is missing there would make every result look like one of changed sources."""
    ignored, left_out = ({line.removeprefix("**/").strip("/") for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#!"}
                         for name in (".gitignore", ".dockerignore"))
    assert left_out - ignored == {".git/*"}


def make(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, env={"PATH": os.environ["PATH"]})
    return done.returncode, done.stdout + done.stderr


def test_make_hands_its_variables_to_the_script(tmp_path: Path):
    status, output = make("-n", "setup", f"VENV={tmp_path}/venv", "SYSTEM_PYTHON=python3.12", "PIP_FLAGS=-q --no-cache-dir", "SETUP_FLAGS=--gpu_later")
    assert status == 0 and output.strip() == (
        f'SYSTEM_PYTHON="python3.12" PIP_FLAGS="-q --no-cache-dir" bash install_dependencies.sh --venv {tmp_path}/venv --gpu_later')


@pytest.mark.parametrize("target", ["docker-build", "docker-build-gpu", "docker-test", "docker-bench"])
def test_images_need_docker(target: str):
    for docker, complaint in (("no_docker", "is not installed"), ("false", "does not reach its engine")):
        status, output = make(target, f"DOCKER={docker}")
        assert status == 2 and output.startswith(f"error: {docker} {complaint}")


def test_benchmark_in_the_image_sees_the_files_and_writes_the_results(tmp_path: Path):
    questions = tmp_path / "questions.jsonl"
    questions.touch()
    flags = ["-n", "docker-bench", "VENV=" + str(tmp_path), "DOCKER=echo"]
    output = make(*flags, f"OUT={tmp_path}/out/all.jsonl", f"DATASET={questions}", "EXPERIMENT=toy_all")[1]
    assert f"-v {tmp_path}/out:{tmp_path}/out" in output and f"-v {questions}:{questions}:ro" in output
    assert f"make bench OUT={tmp_path}/out/all.jsonl DATASET={questions} EXPERIMENT=toy_all" in output
    output = make(*flags, f"OUT={tmp_path}/out", "DATASET=gsm8k")[1]
    assert f"-v {tmp_path}/out:{tmp_path}/out" in output and ":ro" not in output and "DATASET=gsm8k" in output


def test_ci_runs_targets_that_exist():
    job, = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    targets = re.findall(r"\bmake (.+)", "\n".join(step.get("run", "") for step in job["steps"]))
    targets = {word for words in targets for word in words.split() if "=" not in word}
    assert targets == {"setup", "check", "test", "bench-toy", "validate-results"} and job["timeout-minutes"]
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

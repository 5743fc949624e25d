"""Plant each bug of planted_bugs.json in a copy of the repository, and see that its test fails there: `make test-planted`.

    python tests/plant_bugs.py            # all of them
    python tests/plant_bugs.py training   # those whose description has these words

An entry names the `bug`, its `file`, what stands there (`right`, once), what a mistake would make of it (`wrong`), and the `test` that catches it.
The exit status is 1 where a bug is not caught, or a test fails without it. test_planted_list.py keeps the entries in step with the code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_name("planted_bugs.json")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "runs")
FAILED = 1  # pytest's exit status where a test has failed; others say that none ran


def read_bugs(words: list[str]) -> list[dict]:
    """The entries with all of `words` in their descriptions."""
    return [entry for entry in json.loads(LIST.read_text(encoding="utf-8")) if all(word in entry["bug"] for word in words)]


def run_tests(folder: Path, tests: list[str]) -> int:
    """pytest's exit status in `folder`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=False).returncode


def is_caught(folder: Path, entry: dict) -> bool:
    """Whether the entry's test fails with its bug."""
    path = folder / entry["file"]
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(entry["right"], entry["wrong"]), encoding="utf-8")
    try:
        return run_tests(folder, [entry["test"]]) == FAILED
    finally:
        path.write_text(sound, encoding="utf-8")


def main() -> int:
    bugs, missed = read_bugs(sys.argv[1:]), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(ROOT, Path(temporary) / "planted", ignore=LEFT_OUT))
        if run_tests(folder, sorted({entry["test"] for entry in bugs})) != 0:
            print("error: the tests fail without a bug, or there are none; run them first: make test", file=sys.stderr)
            return 1
        for entry in bugs:
            caught = is_caught(folder, entry)
            missed += not caught
            print(f"{'caught' if caught else 'NOT CAUGHT':10}  {entry['bug']}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

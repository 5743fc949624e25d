"""The list of planted bugs is in step with the code: each can be planted, and names a test that is there."""

from __future__ import annotations

import re

import pytest

from plant_bugs import ROOT, read_bugs


@pytest.mark.parametrize("entry", read_bugs([]), ids=lambda entry: entry["bug"])
def test_each_bug_can_be_planted_and_has_its_test(entry):
    """Where this fails the line has changed: plant the bug anew, and see that it is caught, or drop it: make test-planted."""
    source = (ROOT / entry["file"]).read_text(encoding="utf-8")
    assert source.count(entry["right"]) == 1 and entry["wrong"] not in (entry["right"], "")
    file, name = entry["test"].split("[")[0].split("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_no_bug_stands_twice():
    bugs = read_bugs([])
    assert len({entry["bug"] for entry in bugs}) == len({(entry["file"], entry["right"], entry["wrong"]) for entry in bugs}) == len(bugs)

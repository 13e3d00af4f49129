# SPDX-License-Identifier: Apache-2.0
"""What GitHub is asked to run and to ask: files that are named are there, and nothing publishes but a tag.

The workflows themselves run on GitHub alone; there actionlint reads them first.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(file: Path) -> dict:
    return yaml.load(file.read_text(), Loader=yaml.BaseLoader)  # which leaves `on` a word


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_what_a_workflow_names_is_there(file):
    text = file.read_text() + (ROOT / "pyproject.toml").read_text()
    named = set(re.findall(r"(?:tests|\.ci)/[\w./]+", text))
    assert "tests/check_wheel.py" in named
    assert {name for name in named if not (ROOT / name).exists()} == set()
    workflow = read(file)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert re.search(r"@(v\d|release/v\d)", step.get("uses", "@v0")), step


def test_only_a_tag_publishes_a_package():
    may_publish = [
        (file.stem, name, job.get("if"), job.get("environment"))
        for file in WORKFLOWS
        for name, job in read(file)["jobs"].items()
        if "id-token" in job.get("permissions", {}) or "gh-action-pypi-publish" in str(job)
    ]
    site, package = may_publish
    assert site == ("docs", "publish", "github.ref == 'refs/heads/main'", "github-pages")
    assert package == ("wheels", "publish", "github.ref_type == 'tag'", "pypi")
    assert set(read(ROOT / ".github/workflows/wheels.yml")["jobs"]["publish"]["needs"]) == {
        "sdist",
        "wheels",
        "windows",
    }


def test_an_issue_comes_with_what_nearsight_info_prints():
    fields = {field.get("id"): field for field in read(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "`nearsight info`" in fields["info"]["attributes"]["description"]
    assert fields["info"]["validations"]["required"] == "true"
    assert "docs/reference/security.md" in (ROOT / "SECURITY.md").read_text()

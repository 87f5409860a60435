"""What is published says one version everywhere, and the files around it can be read."""

import re
from pathlib import Path

import yaml

import hf_cuttlefish

ROOT = Path(__file__).parents[2]


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert citation["version"] == newest.group(1) == hf_cuttlefish.__version__
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2305.02538"


def test_workflows_and_forms_are_valid():
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        found = yaml.safe_load(path.read_text("utf-8"))
        assert found["name"], path
        for job in found.get("jobs", {}).values():
            scripts = [step["run"] for step in job["steps"] if "run" in step]
            assert scripts, path
            for script in scripts:
                program = script.split()[0]
                assert program == "make" or (ROOT / program).is_file(), script


def test_the_workflow_runs_what_everyone_runs():
    assert "run: .ci/run" in (ROOT / ".github" / "workflows" / "checks.yml").read_text("utf-8")
    steps = (ROOT / ".ci" / "run").read_text("utf-8")
    for step in ("make test", "make lint", "make types", "make notebooks", "make docs", ".ci/audit", ".ci/smoke"):
        assert step in steps

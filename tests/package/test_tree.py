"""The repository's texts: commands and extras exist, there is one version, and nothing names this machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

from tests.package.tree import PACKAGE, ROOT, extras, texts, version


def _first_bash_block(heading: str) -> list[str]:
    """Return the lines of the first ```bash block below README's heading, before the next heading."""
    readme = (ROOT / "README.md").read_text()
    sections = re.split(r"^#+ +(.+?) *#*$", readme, flags=re.MULTILINE)
    bodies = [body for title, body in zip(sections[1::2], sections[2::2], strict=True) if title == heading]
    assert len(bodies) == 1, f"README.md must have exactly one heading {heading!r}"
    block = re.search(r"^```bash\n(.*?)^```$", bodies[0], re.MULTILINE | re.DOTALL)
    assert block is not None, f"no ```bash block below README's {heading!r}"
    return [line for line in block[1].splitlines() if line.strip()]


@pytest.mark.parametrize(("heading", "script"), [("Quickstart", "recipes/quickstart.sh"), ("Tests", "tests/run.sh")])
def test_readme_command(heading: str, script: str) -> None:
    lines = _first_bash_block(heading)
    assert len(lines) == 1, f"README.md must have one command below {heading!r}, but has {len(lines)} lines"
    words = shlex.split(lines[0])
    files = [Path(word) for word in words if word.endswith(".sh")]
    assert [str(file) for file in files] == [script]
    assert words[0] in (script, f"./{script}", "bash")


@pytest.mark.parametrize("script", ["recipes/quickstart.sh", "tests/run.sh", "tests/clients.sh", ".ci/run"])
def test_scripts_run_as_they_are(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK), f"{script} is not executable"
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(path)], check=True)
    head = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-s", script], capture_output=True, text=True)
    if head.returncode == 0 and head.stdout:  # in a checkout git must know it, too
        assert head.stdout.startswith("100755"), f"git does not record {script} as executable"


def test_named_extras_exist() -> None:
    """Every `am-lightning[...]` in code and documents is an extra that pyproject.toml defines."""
    known = extras()
    frameworks = {"lightning", "pytorch-lightning", "accelerate", "transformers", "deepspeed", "triton"}
    assert known == {*frameworks, "all", "recipes", "data", "litdata", "studies", "docs", "dev"}
    for path, text in texts().items():
        for names in re.findall(r"am[-_]lightning\[([a-z,-]+)\]", text):
            assert set(names.split(",")) <= known, f"{path} names am-lightning[{names}]"


@pytest.mark.parametrize("extra", ["lightning"])
def test_extras_of_modules_are_named_in_their_errors(extra: str) -> None:
    """The package's texts name the extra of each module that needs one."""
    assert any(f"am-lightning[{extra}]" in path.read_text() for path in PACKAGE.rglob("*.py"))


def test_one_version() -> None:
    """Package, citation and changelog agree: the newest release is this version or precedes it."""
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None and citation[1] == version()
    released = [Version(name) for name in _changelog() if name != "Unreleased"]
    assert released == sorted(released, reverse=True)
    assert all(Version(version()) >= each for each in released)


def test_changelog_is_kept() -> None:
    """Keep a Changelog's form: the unreleased changes come first, and their kinds are its six, in its order."""
    versions = _changelog()
    assert next(iter(versions)) == "Unreleased"
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for name, body in versions.items():
        sections = re.split(r"^### (.+)\n", body, flags=re.MULTILINE)
        assert sections[1::2] == [kind for kind in kinds if kind in sections[1::2]], f"{name}: {sections[1::2]}"
        for kind, entries in zip(sections[1::2], sections[2::2], strict=True):
            lines = [line for line in entries.splitlines() if line]
            assert lines and all(line.startswith(("- ", "  ")) for line in lines), f"{name}, {kind}: a list of entries"


def _changelog() -> dict[str, str]:
    """Return version -> the text below its heading in CHANGELOG.md."""
    parts = re.split(r"^## (.+)\n", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    titles = [re.fullmatch(r"\[(?:(Unreleased)\]|(\S+)\] - \d{4}-\d\d-\d\d)", title) for title in parts[1::2]]
    assert all(titles), f"headings are [Unreleased] and [VERSION] - YYYY-MM-DD, but got {parts[1::2]}"
    return {title[1] or title[2]: body for title, body in zip(titles, parts[2::2], strict=True) if title}


def test_no_machine_paths_and_no_index_hosts() -> None:
    """No machine's folder and no host of a package index appears, because both belong to a user's own set-up."""
    folders = "|".join(["work", "root", "Users", "home/[a-z]+"])
    hosts = "|".join(["pypi[.]org", "pythonhoste[d]", "download[.]pytorch", "deb[.]debian[.]org"])
    pattern = re.compile(rf"(?<![\w.~-])/(?:{folders})/|(?:{hosts})")
    found = [f"{path}: {match[0]}" for path, text in texts().items() for match in pattern.finditer(text)]
    assert found == []


def test_texts_end_with_one_newline() -> None:
    wrong = [
        str(p) for p, t in texts().items() if t and p.name != "LICENSE" and (not t.endswith("\n") or t.endswith("\n\n"))
    ]
    assert wrong == []


def test_citation() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license", "references"} <= set(citation)
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2510.04988"

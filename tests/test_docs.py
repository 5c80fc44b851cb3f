"""The documentation: its commands parse, its links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from stand_ins import count_each_once
from typer.main import get_command

from tokbench.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """The tokbench command lines of a page, in blocks and in `code` spans; continued lines are joined."""
    text = text.replace("\\\n", " ")
    quoted = re.findall(r"`(tokbench [^`\n]+)`", text)
    lines = re.findall(r"^(?:\s*(?:- run: |srun )|    )?(tokbench [a-z]+ .*)$", text, flags=re.MULTILINE)
    return [*quoted, *lines]


root = cache(lambda: get_command(app))


def refusal(command: str) -> str:
    """Why the command line does not parse, "" if it does. Nothing of it is run.

    A command's bare name, as in a sentence on `tokbench check`, may lack what the command requires.
    """
    words = [word for word in shlex.split(command, comments=True)[1:] if word not in ("...", "…")]
    words = [word.split("|")[0] for word in words]
    if words and words[0].startswith("-"):
        return "" if words[0] in ("--help", "--version", "-h") else f"no option {words[0]}"
    if not words or words[0] not in root().commands:  # type: ignore[attr-defined]
        return f"no command {words[:1]}"
    try:
        root().commands[words[0]].make_context(words[0], words[1:], resilient_parsing=False)  # type: ignore[attr-defined]
    except Exception as error:  # typer's usage errors, from a click of its own
        kind = type(error).__name__
        return "" if kind == "MissingParameter" and len(words) == 1 else f"{kind}: {error}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path) -> None:
    wrong = {line: refusal(line) for line in commands(page.read_text(encoding="utf-8"))}
    assert not {line: why for line, why in wrong.items() if why}


def test_a_wrong_command_would_be_seen() -> None:
    page = "    tokbench run --limt 3\n\nand `tokbench plott results/x`, `tokbench table results/x --format md`"
    assert [bool(refusal(line)) for line in sorted(commands(page))] == [True, True, False]
    assert "Missing" in refusal("tokbench check --limit 3") and not refusal("tokbench check")
    assert refusal("tokbench run --limit many") and refusal("tokbench run --limit")
    assert len([line for path in PAGES for line in commands(path.read_text(encoding="utf-8"))]) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.draws
def test_the_notebook_runs_as_it_stands(tmp_path: Path, monkeypatch, one_thread, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "notebook.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {}
    count_each_once(monkeypatch)
    for block in blocks:
        exec(block.replace("limit=64", "limit=16"), names)
    assert len(blocks) == 4 and 0.5 < names["share"] < 0.9 and names["same"] > 0.5
    assert (
        list(names["table"]["method"]) == ["none", "tome", "tome", "evit"] and names["table"]["drop_low"].notna().all()
    )
    assert names["cells"].equals(names["table"]) and "% top-1" in capsys.readouterr().out
    assert (tmp_path / "results" / "notebook" / "pareto.png").is_file()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "tokens_per_block" in api and "Import a public name" not in api
    loaded = re.findall(r'<(?:link|script|img)[^>]*(?:src|href)="(https?://[^"]+)"', api)
    assert not loaded, "the page loads something from the network"

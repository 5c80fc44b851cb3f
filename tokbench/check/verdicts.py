"""What a check found: as lines for people, as JUnit XML, and in GitHub Actions as annotations and a job summary."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tokbench.errors import RunStopped, UserError, printable
from tokbench.report.text import for_markdown
from tokbench.results.conditions import Differences, in_words
from tokbench.results.folder import replace_file


@dataclass(frozen=True)
class Verdict:
    """One gate for one cell. text: its numbers, as a clause. size: how far it moved; the largest is the worst."""

    gate: str
    cell: str
    passed: bool
    text: str
    size: float = 0.0


@dataclass
class Check:
    """All verdicts on a run.

    Attributes:
        scope: what was compared, in one line.
        differ: conditions that are not the baseline's, and what that means. None of them fails.
        limits: for each gate that was asked for, in the order they are told, what cells that pass it do.
        verdicts: by gate and cell.
        skipped: why a gate had nothing to compare, where that is not for lack of a measurement.
        notes: what is worth knowing and no failure: gains, new cells.
    """

    run: Path
    baseline: Path
    scope: str
    differ: Differences
    limits: dict[str, str]
    verdicts: list[Verdict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing moved by more than it may."""
        return all(verdict.passed for verdict in self.verdicts)

    def of_gate(self, gate: str) -> list[Verdict]:
        """The gate's verdicts, the worst first."""
        mine = [verdict for verdict in self.verdicts if verdict.gate == gate]
        return sorted(mine, key=lambda verdict: (verdict.passed, -verdict.size))

    def headline(self, gate: str) -> str:
        """One line: how many cells pass, and the numbers of the one that comes nearest to failing."""
        verdicts = self.of_gate(gate)
        if not verdicts:
            return f"nothing to compare: {self.skipped.get(gate, 'it was not measured in both runs')}"
        good = sum(verdict.passed for verdict in verdicts)
        told = f"{good} of {len(verdicts)} cells {self.limits[gate]}"
        nearest = next((verdict for verdict in verdicts if verdict.passed), None)
        if nearest is None or not nearest.text or not nearest.size:
            return told
        return f"{told}; {'worst' if good == len(verdicts) else 'worst of these'} {nearest.cell}: {nearest.text}"

    def word(self, gate: str) -> str:
        """pass, FAIL, or skip for a gate that had nothing to compare."""
        if not self.of_gate(gate):
            return "skip"
        return "FAIL" if self.failed(gate) else "pass"

    def failed(self, gate: str) -> list[str]:
        """The cells that failed the gate and their numbers, a line each; cells of which the same is said share one."""
        told: dict[str, list[str]] = {}
        for verdict in self.of_gate(gate):
            if not verdict.passed:
                told.setdefault(verdict.text, []).append(verdict.cell)
        return [f"{', '.join(cells)}: {text}" for text, cells in told.items()]

    def conclusion(self) -> str:
        """The verdict on everything, in one line."""
        others = self.differ.settings
        under = f" (its {in_words(others)} {'is' if len(others) == 1 else 'are'} not the baseline's)" if others else ""
        if self.passed:
            skipped = [gate for gate in self.limits if self.word(gate) == "skip"]
            only = f", but for {' and '.join(skipped)}, which could not be compared" if skipped else ""
            return f"passed: this run says what the baseline says{only}{under}"
        moved = dict.fromkeys(verdict.cell for verdict in self.verdicts if not verdict.passed)
        gates = ", ".join(filter(self.failed, self.limits))
        return f"failed: {gates}, in {len(moved)} of {len(self.of_gate('cells'))} cells{under}"

    def lines(self) -> list[str]:
        """Everything, for a terminal or a log: a line per gate, below it the cells that failed it."""
        lines = [f"{self.run} against {self.baseline}", f"  {self.scope}"]
        lines += [f"  {line}" for line in self.differ.lines()]
        for gate in self.limits:
            lines.append(f"{self.word(gate)}  {gate:6}  {self.headline(gate)}")
            lines += [f"        {line}" for line in self.failed(gate)]
        lines += [f"note  {note}" for note in self.notes]
        return [printable(line) for line in [*lines, self.conclusion()]]


def require_writable(path: Path) -> None:
    """Make the file's folder. Raises UserError where it cannot be, so that nothing is measured in vain."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_folder, there = path.is_dir(), path if path.exists() else path.parent
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from error
    if is_folder or not os.access(there, os.W_OK):
        raise UserError(f"cannot write {path}: {'it is a folder' if is_folder else 'permission denied'}")


def write_junit(check: Check, path: Path) -> None:
    """Write JUnit XML, as CI servers read it: a test case per gate and cell. Raises RunStopped where it cannot be."""
    failures = sum(not verdict.passed for verdict in check.verdicts)
    counts = {"tests": str(len(check.verdicts)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "tokbench check", **counts, "skipped": "0"})
    properties = ElementTree.SubElement(suite, "properties")
    described = {"run": check.run, "baseline": check.baseline, "differences": "; ".join(check.differ.told)}
    for name, value in described.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": printable(str(value))})
    for verdict in check.verdicts:
        names = {"classname": f"tokbench.{verdict.gate}", "name": printable(verdict.cell)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if verdict.passed:
            ElementTree.SubElement(case, "system-out").text = printable(verdict.text)
        else:
            ElementTree.SubElement(case, "failure", {"message": printable(verdict.text), "type": verdict.gate})
    ElementTree.indent(root)
    tree = ElementTree.ElementTree(root)
    try:
        replace_file(path, lambda file: tree.write(file, encoding="utf-8", xml_declaration=True))
    except OSError as error:
        raise RunStopped(f"cannot write {path}: {error.strerror or error}.") from error


def summary(check: Check) -> str:
    """The check as Markdown, for a job's summary: the gates, then the cells that failed."""
    told = for_markdown
    lines = [f"### tokbench check {'passed' if check.passed else 'failed'}", ""]
    lines += [told(f"{check.run} against {check.baseline}: {check.scope}."), ""]
    if check.differ.told:
        lines += [*(f"- {told(line)}" for line in check.differ.lines()), ""]
    lines += ["| gate | verdict | |", "|---|---|---|"]
    for gate in check.limits:
        word = check.word(gate).replace("FAIL", "**FAIL**")
        lines.append(f"| {gate} | {word} | {told(check.headline(gate))} |")
    for gate in filter(check.failed, check.limits):
        lines += ["", f"Failed {gate}:", "", *(f"- {told(line)}" for line in check.failed(gate))]
    lines += [line for note in check.notes for line in ("", f"Note: {told(note)}")]
    return "\n".join(lines) + "\n"


def tell_github(check: Check, environment: Mapping[str, str] = os.environ) -> None:
    """In a GitHub Actions job: print annotations, and add to the job's summary. Elsewhere nothing."""
    if environment.get("GITHUB_ACTIONS") != "true":
        return
    for gate in filter(check.failed, check.limits):  # GitHub shows no more than ten in a step
        # The only escape there is that of URLs.
        told = [printable(line).replace("%", "%25") for line in (check.headline(gate), *check.failed(gate))]
        print(f"::error title=tokbench check, {gate}::{'%0A'.join(told)}", flush=True)
    path = environment.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(summary(check))

"""Kill a real run (SIGKILL) at random moments, continue it, and compare it with an undisturbed run.

    python benchmarks/kill_and_resume.py --kills 20

Every session is a process forked from one that has imported PyTorch but not used it, so that kills hit work and not
imports. Predictions, counts, FLOPs and token counts must be identical, bit for bit; timings may differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import tokbench.cli
import tokbench.running.runner  # noqa: F401  (imported once, here, for all sessions)

# The fields of a speed record that do not depend on timings.
TIMELESS = {"schema", "kind", "cell", "model", "weights_sha256", "method", "params", "schedule", "resolved", "tokens"}
TIMELESS |= {"input_size", "data", "data_fingerprint", "dtype", "device", "weights", "fused_attention", "batch_size"}


def session(words: list[str], log: Path, save_seconds: float) -> multiprocessing.process.BaseProcess:
    """Start `tokbench` with these arguments in a new process."""

    def work() -> None:
        import tokbench.running.half_pass

        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        tokbench.running.half_pass.SAVE_SECONDS = save_seconds
        sys.argv = ["tokbench", *words]
        tokbench.cli.main()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def figures(run: Path) -> dict[str, Any]:
    """Everything that interruptions must not change: a record for each cell and measurement, and the predictions."""
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {f"{record['kind']} {record['cell']}": strip(record) for record in lines}
    if len(found) != len(lines):
        found["measured twice"] = len(lines) - len(found)
    for path in sorted((run / "predictions").glob("*.npz")):
        with np.load(path) as archive:
            found[path.name] = {name: archive[name].tobytes() for name in archive.files}
    found["left over"] = [
        str(path) for path in run.rglob("*") if path.suffix == ".tmp" or path.parent.name == "partial"
    ]
    return found


def strip(record: dict[str, Any]) -> dict[str, Any]:
    timed = {"pass_seconds", "reading_seconds"} if record["kind"] != "speed" else record.keys() - TIMELESS
    return {key: value for key, value in record.items() if key not in timed}


def kill_and_resume(folder: Path, words: list[str], kills: int, seed: int = 0, save_seconds: float = 0.2) -> list[str]:
    """Kill and continue runs of `tokbench run WORDS` until there are `kills` kills; returns what happened, in lines.

    Raises AssertionError if a run that was killed and continued differs from the undisturbed one.
    """
    dice, told = random.Random(seed), []
    log = folder / "log.txt"
    began = time.monotonic()
    process = session(["run", *words, "--out", str(folder / "whole")], log, save_seconds)
    while process.is_alive() and not (folder / "whole" / "manifest.json").exists():
        time.sleep(0.01)
    startup = time.monotonic() - began
    process.join()
    work = time.monotonic() - began - startup
    assert process.exitcode == 0, log.read_text()
    whole = figures(folder / "whole")
    told.append(f"undisturbed: {startup:.1f} s until the first measurement, {work:.1f} s of work, {len(whole)} figures")

    killed = number = 0
    while killed < kills:
        number += 1
        run = folder / f"run{number}"
        while True:
            process = session(["run", *words, "--out", str(run)], log, save_seconds)
            process.join(dice.uniform(0.5 * startup, startup + work) if killed < kills else None)
            if not process.is_alive():
                break
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            killed += 1
            records = (run / "records.jsonl").read_bytes().count(b"\n") if (run / "records.jsonl").exists() else 0
            partial = [path.stem for path in sorted(run.glob("partial/*/*.npz"))]
            told.append(
                f"kill {killed}: run {number} has {records} records"
                + (f", and a pass saved up to image {int(partial[-1])}" if partial else "")
            )
        assert process.exitcode == 0, f"run {number} ended with {process.exitcode}:\n{log.read_text()}"
        outcome = figures(run)
        assert outcome == whole, f"run {number} differs: {[key for key in whole if outcome.get(key) != whole[key]]}"
        told.append(f"run {number} finished: all figures equal the undisturbed run's")
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="what to run instead of a small grid on the bundled model")
    asked = parser.parse_args()
    small = ["--device=cpu", "--limit=200", "--method=tome", "--method=tofu", "--method=evit", "--schedule=13"]
    with tempfile.TemporaryDirectory() as folder:
        for line in kill_and_resume(Path(folder), asked.words or small, asked.kills, asked.seed):
            print(line)

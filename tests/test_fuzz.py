"""Whatever is typed or lies in a file: an answer, or exit code 2 and one line. Never a traceback.

`pytest tests/test_fuzz.py --hypothesis-profile long` tries a thousand inputs of each kind instead of some dozens.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokbench import cli
from tokbench.errors import UserError
from tokbench.report.metrics import load_table
from tokbench.report.tables import render_table
from tokbench.schedules import GRAMMAR, parse_schedule

if settings.get_current_profile_name() == "default":
    settings.load_profile("short")

numbers = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "1e999", "-0", "٣", "0x1f", "1_000", "nan", "²", "9" * 5000]),
)
schedules = st.one_of(
    st.text(max_size=30),
    st.builds(
        lambda kind, values, at: f"{kind}:{','.join(values)}{at}",
        st.sampled_from([*GRAMMAR, "kep", ""]),
        st.lists(numbers, max_size=4),
        st.one_of(st.just(""), st.lists(numbers, max_size=3).map(lambda blocks: "@" + ",".join(blocks))),
    ),
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def call(*words: str) -> tuple[int, str]:
    """Exit code and standard error of a command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["tokbench", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        cli.main()
    return int(caught.value.code or 0), err.getvalue()


def assert_answer_or_one_line(*words: str) -> None:
    code, err = call(*words)
    assert code in (0, 2), (words, code, err)
    if code == 2:
        assert err.startswith("tokbench: ") and err.count("\n") == 1 and err.endswith("\n"), (words, err)


@given(schedules)
def test_schedules(text):
    try:
        schedule = parse_schedule(text)
    except UserError as error:
        assert str(error)
    else:
        assert parse_schedule(str(schedule)) == schedule
        if schedule.kind != "flops":
            assert all(isinstance(schedule.removals(block, 12, 196), int) for block in range(12))


@given(schedules.filter(lambda text: "\0" not in text))
def test_schedules_on_the_command_line(text):
    assert_answer_or_one_line("run", "--dry-run", "--method", "tome", f"--schedule={text}")


FLAGS = (
    "--model", "--checkpoint", "--method", "--schedule", "--data", "--out", "--device", "--dtype", "--batch-size",
    "--limit", "--only", "--workers", "--max-bad", "--fresh", "--nonsense", "-x", "--",
)  # fmt: skip
words = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(["tome", "tome:prop_attn=", "tome:=", "mctf:tau_sim=[1,", "none", "13", "bf16", "auto", "speed,"]),
    numbers,
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
)


@given(st.lists(words, max_size=6))
def test_command_lines(rest):
    # First, so that no flag can take it for its value.
    assert_answer_or_one_line("run", "--dry-run", *rest)


@given(st.sampled_from(["table", "plot", "list", "tabel"]), st.lists(words, max_size=3))
def test_other_commands(command, rest):
    assert_answer_or_one_line(command, "no such run", *rest)


keys = st.one_of(
    st.sampled_from(
        ["data", "models", "methods", "schedules", "options", "name", "label", "input_size", "limit", "only", "max_bad"]
    ),
    st.text("abc_", min_size=1, max_size=4),
)
lines = st.one_of(
    st.builds(lambda key, value: f"{key} = {json.dumps(value)}", keys, plain),
    st.sampled_from(["[[models]]", "[[methods]]", "[options]", "name = 'tome'", "schedules = ['8']", "[models", "= 3"]),
    st.text(max_size=12),
)


@given(st.one_of(st.lists(lines, max_size=8).map("\n".join).map(str.encode), st.binary(max_size=40)))
def test_grids(content):
    path = Path(TEMPORARY) / "grid.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    assert_answer_or_one_line("run", "--dry-run", str(path))


RECORD = {
    "schema": 1, "kind": "accuracy", "cell": "m/tome/8", "model": "m", "method": "tome", "params": {}, "schedule": "8",
    "weights_sha256": "a", "input_size": [3, 32, 32], "device": "cpu", "dtype": "fp32", "top1": 0.5, "drop": 1.0,
    "drop_low": 0.0, "drop_high": 2.0, "images": 10, "seconds": [0.1, 0.2], "throughput": 5.0, "tokens": [9, 8],
}  # fmt: skip
records = st.builds(
    lambda changes, without: {key: value for key, value in {**RECORD, **changes}.items() if key not in without},
    st.dictionaries(st.one_of(st.sampled_from(sorted(RECORD)), st.text(max_size=4)), plain, max_size=3),
    st.sets(st.sampled_from(sorted(RECORD)), max_size=2),
)


@given(st.lists(st.one_of(records.map(json.dumps), st.text(max_size=20)), max_size=4), st.binary(max_size=5))
def test_records(rows, tail):
    run = Path(TEMPORARY) / "run"
    run.mkdir(exist_ok=True)
    (run / "manifest.json").write_text('{"schema": 1}')
    text = "".join(f"{row}\n" for row in rows).encode(errors="surrogatepass")
    (run / "records.jsonl").write_bytes(text + tail)
    try:
        table = load_table([run])
        for form in ("md", "json", "csv", "tex"):
            render_table(table, form)
    except UserError as error:
        assert str(run) in str(error) and "\n" not in str(error)


@pytest.fixture(autouse=True, scope="module")
def _temporary(tmp_path_factory):
    global TEMPORARY
    TEMPORARY = str(tmp_path_factory.mktemp("fuzz"))


class _Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_a_checkpoint_that_would_start_a_program_is_refused(tmp_path):
    marker, checkpoint = tmp_path / "made", tmp_path / "hostile.pth"
    checkpoint.write_bytes(pickle.dumps({"state_dict": _Hostile(marker)}))
    words = ("--model", "vit_tiny_patch16_224", "--checkpoint", str(checkpoint), "--device", "cpu", "--only", "flops")
    code, err = call("run", *words, "--method", "tome", "--schedule", "8", "--out", str(tmp_path / "run"))
    assert code == 2 and err.startswith("tokbench: ") and err.count("\n") == 1, err
    assert not marker.exists()
    pickle.loads(checkpoint.read_bytes())
    assert marker.exists()  # the file does what it threatens where it is let

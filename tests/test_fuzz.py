"""Whatever is typed or lies in a file: an answer, or exit code 2 and one line. Never a traceback.

Exit code 1 is where a command's answer may be "no" (check, pick), 3 where a run began and could not go on.
`python benchmarks/fuzz.py` tries thousands of inputs of each kind instead of some dozens.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
import pickle
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from stand_ins import Source, stand_in_for_checks

import tokbench.show.trace  # noqa: F401  (before the ground stands in for the models of runs)
from tokbench import cli, interrupts
from tokbench.errors import UserError
from tokbench.fusion.core import METHODS
from tokbench.models import load_model
from tokbench.report.tables import FORMATS, render_table
from tokbench.results.folder import MANIFEST, RECORDS, SKIPPED, RunFolder
from tokbench.results.predictions import Predictions
from tokbench.results.table import load_cells
from tokbench.running import estimate, half_pass, runner
from tokbench.schedules import GRAMMAR, parse_schedule

# Exit codes so far, by command: what benchmarks/fuzz.py prints.
OUTCOMES: Counter[tuple[str, int]] = Counter()
CODES = {"run": (0, 2, 3), "check": (0, 1, 2), "pick": (0, 1, 2)}


def few(examples: int) -> settings:
    """So many examples in the short version, of what takes longer; as many as of the others in the long one."""
    short = settings.get_current_profile_name() == "short"
    return settings(max_examples=examples) if short else settings()


def call(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line, in this process; warnings go to the latter."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with (
        patch.object(sys, "argv", ["tokbench", *words]),
        patch.object(interrupts, "_exit", sys.exit),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as caught,
    ):
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        cli.main()
    out.flush()
    err.flush()
    code = int(caught.value.code or 0)
    OUTCOMES[words[0], code] += 1
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]


def assert_answer_or_one_line(*words: str) -> str:
    """What it prints comes back. Nothing in it is obeyed by a terminal or a CI server, nothing outside is touched."""
    code, out, err = call(*words)
    assert code in CODES.get(words[0], (0, 2)), (words, code, err)
    assert "Traceback" not in err, (words, err)
    if code == 2:
        assert err.startswith("tokbench: ") and err.count("\n") == 1 and err.endswith("\n"), (words, err)
    lines = [line for line in (out + err).split("\n") if not line.startswith("::error title=tokbench check, ")]
    assert not any(re.search(r"^\s*::|##\w*\[", line) or not line.isprintable() for line in lines), (words, out, err)
    assert {path.name: path.read_bytes() for path in Path("outside").rglob("*.*")} == OUTSIDE, words
    return out


# What links in a run folder lead to, by the names that a run has of its own: nobody may write there, or delete.
OUTSIDE = {name: b"precious" for name in ("manifest.json", "records.jsonl", "report.html", "pareto.png", ".owner.json",
           "skipped.json", "a.npz")}  # fmt: skip


def make_outside() -> None:
    Path("outside/partial").mkdir(parents=True)
    for name, content in OUTSIDE.items():
        Path("outside", "partial" if name == "a.npz" else "", name).write_bytes(content)


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[None]:
    """Work in a folder that holds `whole`, a run of a tiny model, and `half`, one that was stopped in its pass."""
    with pytest.MonkeyPatch.context() as patches, contextlib.chdir(folder):
        make_outside()
        source = stand_in_for_checks(patches, Source())
        patches.setattr(half_pass, "SAVE_SECONDS", 0)
        patches.setattr(estimate, "preview", lambda grid, out, **_: grid.describe())  # a probe takes a while
        assert call(*GO_ON, "whole")[0] == 0
        read = Source.__getitem__

        def interrupted(self: Source, index: int) -> Any:
            if index == len(source) - 1:
                raise KeyboardInterrupt
            return read(self, index)

        with patch.object(Source, "__getitem__", interrupted):
            assert call(*GO_ON, "half")[0] == 130
        OUTCOMES.clear()
        yield


GO_ON = (
    "run", "--model=tiny", "--device=cpu", "--readers=0", "--batch-size=8", "--method=tome", "--method=topk",
    "--schedule=8", "--out",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _ground(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ground(tmp_path_factory.mktemp("fuzz")):
        yield
    torch.set_num_threads(threads)


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
HOSTILE = (
    "deit[/v2]", "imagenet[v2]", "$\\b$", "::add-mask::x", "##[error]x", "##vso[task.x]", "\x1b[31m\x1b]0;x\x07",
    "a\udcff", "a\n::warning::x", "=cmd()", "-1+cmd()", "<script>alert(1)</script>", "100 %", "_x_ \\ ^~{}", "a&b",
    "`x`|y", "![a](b)", "\u202eabc", "x" * 3000,
)  # fmt: skip
odd = plain | st.sampled_from([[], {}, "", "../../x", "/", -1, 10**400, 1e308, 2**63, [{}], 0.5, *HOSTILE])
# What a shell can hand over: no zero, and bytes that are no UTF-8 as lone surrogates. No "/": files are written.
arguments = st.text(
    st.one_of(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), st.sampled_from("\udc80\udcff")),
    max_size=10,
)


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
    "--limit", "--only", "--readers", "--max-bad", "--fresh", "--nonsense", "-x", "--",
)  # fmt: skip
words = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(["tome", "tome:prop_attn=", "tome:=", "mctf:tau_sim=[1,", "none", "13", "bf16", "auto", "speed,"]),
    numbers,
    arguments,
)


@given(st.lists(words, max_size=6))
def test_command_lines(rest):
    # First, so that no flag can take it for its value.
    assert_answer_or_one_line("run", "--dry-run", *rest)


# The other commands, what they are about, and their flags with values that make sense somewhere.
RUN_FOLDERS = ("whole", "half", "no such run", "", ".", "..", "whole/manifest.json", "whole/", "w\udcff", "x" * 300)
IMAGES = ("bundled:3", "bundled:-1", "bundled:99999", "bundled:x", "bundled:", "whole/records.jsonl", "whole", "no.png")
THEMES, LIMITS = ("light", "dark", "ligt"), ("0", "1", "5", "-5", "1e6")
COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "pick": (
        RUN_FOLDERS,
        {"--max-drop": LIMITS, "--min-speedup": LIMITS, "--max-latency-ms": LIMITS, "--max-gflops": LIMITS,
         "--json": ()},
    ),
    "check": (
        RUN_FOLDERS,
        {"--baseline": RUN_FOLDERS, "--max-drop": LIMITS, "--max-flips": LIMITS, "--max-slowdown": LIMITS,
         "--despite-warnings": (),
         "--limit": LIMITS, "--junit": ("junit.xml", "whole", "whole/records.jsonl/x", "x" * 300),
         "--plugin": ("no.py",)},
    ),
    "report": (RUN_FOLDERS, {"--out": ("a.html", "a.png", "whole", "whole/records.jsonl/a.html", "x" * 300 + ".html")}),
    "table": (
        RUN_FOLDERS,
        {"--format": ("md", "csv", "json", "tex", "rich", "xml"), "--sort": ("top1", "tpo1", "method", "schedule"),
         "--filter": ("method=tome", "drop<1", "drop<x", "=", "schedule=[*", "model<3", "images>=2"), "--pareto": ()},
    ),
    "plot": (
        RUN_FOLDERS,
        {"--x": ("gflops", "top1", "gflop", "batch"), "--y": ("drop", "top1", "kl"), "--format": ("svg", "bmp", "png"),
         "--out": ("a.png", "a.svg", "a", "whole", "whole/records.jsonl/a.png", "x" * 300 + ".png"),
         "--size": ("page", "paper", "wide", "huge"), "--theme": THEMES, "--published": (), "--linear": ()},
    ),
    "show": (
        IMAGES,
        {"--model": ("bundled", "bundle", "vit_tiny"), "--checkpoint": ("no.pth", "whole", "whole/records.jsonl"),
         "--input-size": ("0", "-1", "56", "9" * 12), "--method": ("tome", "none", "tmoe", "mctf:tau_sim=-1"),
         "--schedule": ("8", "keep:0.5@3", "keep:2", "keep:0.5@99", ""), "--blocks": (), "--theme": THEMES,
         "--out": ("a.png", "a.gif", "a", "whole", "whole/records.jsonl/a.png")},
    ),
    "list": (("models", "methods", "schedules", "data", "modles"), {"--help": ()}),
    "tabel": (RUN_FOLDERS, {}),
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn, command: str) -> list[str]:
    """A command line that is right in most places."""
    about, flags = COMMANDS[command]
    asked = draw(st.lists(st.sampled_from(about[:2]) | st.sampled_from(about) | arguments, min_size=1, max_size=2))
    if command == "check":
        asked = [f"--baseline={asked[0]}", asked[-1]]  # without a run it would make one
    for flag in draw(st.lists(st.sampled_from(sorted(flags)), max_size=3)) if flags else ():
        value = draw(st.sampled_from(flags[flag]) | numbers | arguments) if flags[flag] else ""
        asked.append(f"{flag}={value}" if flags[flag] else flag)
    return [command, *asked, *draw(st.lists(arguments, max_size=1) if draw(st.integers(0, 9)) == 0 else st.just([]))]


@given(st.sampled_from(["pick", "check", "table", "list", "tabel"]).flatmap(command_lines))
def test_other_commands(line):
    assert_answer_or_one_line(*line)


@few(4)
@example(["plot", "whole", "half", "--published"])
@given(st.sampled_from(["report", "plot", "show"]).flatmap(command_lines))
def test_commands_that_draw(line):
    assert_answer_or_one_line(*line)


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
    Path("grid.toml").write_bytes(content)
    assert_answer_or_one_line("run", "--dry-run", "grid.toml")


method_bodies = st.lists(
    st.sampled_from([
        "    name = 'mine'", "    name = 'tome'", "    name = 3", "    name = 'A\\nB'", "    paper = None",
        "    x: int = 'a'",
        "    x: list = []", "    y: float = 0.5",
        "    x: int = 1", "    def check_x(value, default): return 3", "    def check_x(value, default): 1/0",
        "    def check_y(value, default): raise SystemExit(0)", "    check_x = 5", "    z: int = field(kw_only=True)",
        "    def plan(self): pass", "    def __post_init__(self): raise ValueError('no\\nno')", "    z: object",
        "    def __post_init__(self): raise GeneratorExit", "    def __new__(cls, **fields): return 3",
        "    place = 'nowhere'", "    flops_shape = None", "    def __init__(self): pass",
    ]),
    max_size=4,
).map("\n".join)  # fmt: skip
plugins = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(str.encode),
    st.sampled_from([
        b"", b"\0", b"# coding: nonsense\n", b"def f(:", b"x = '\xff'", b"raise SystemExit(0)",
        b"import sys; sys.exit('bye')",
        b"1/0", b"raise BaseException('a\\nb')", b"import no_such_module", b"def f(): f()\nf()",
        b"raise Exception", b"(" * 300,
        b"raise GeneratorExit", 
        b"class E(Exception):\n    def __str__(self): raise KeyError\nraise E",
        b"import tokbench\ntokbench.register_method(3)", b"raise KeyError",
    ]),
    st.builds(
        lambda decorators, base, body: (
            f"import tokbench\nfrom dataclasses import dataclass, field\nfrom tokbench.fusion.core import Method\n"
            f"{decorators}\nclass Mine{base}:\n    name = 'mine'\n{body}\n".encode()
        ),
        st.sampled_from([
            *["@tokbench.register_method\n@dataclass(frozen=True)"] * 3, "@tokbench.register_method",
            "@dataclass\n@tokbench.register_method", "@tokbench.register_method()", "",
        ]),
        st.sampled_from([*["(Method)"] * 3, "", "(Methd)", "(int)"]),
        method_bodies,
    ),
)  # fmt: skip


@given(plugins, st.sampled_from(["mine", "mine:x=1", "mine:y=2", "tome", "tome:x=1"]))
def test_plugins(content, method):
    Path("plugin.py").write_bytes(content)
    registered = dict(METHODS)
    try:
        assert_answer_or_one_line("run", "--dry-run", "--plugin=plugin.py", f"--method={method}", "--schedule=8")
    finally:
        METHODS.clear()
        METHODS.update(registered)


tensors = st.lists(st.integers(0, 5), max_size=4).map(torch.zeros)
weights = st.recursive(
    st.one_of(plain, tensors, st.binary(max_size=4)),
    lambda inner: st.dictionaries(
        st.sampled_from(["model", "state_dict", "pos_embed", "head.weight", "module.x",
        "blocks.0.attn.qkv.weight", "cls_token"])
        | st.integers() | st.none() | st.text(max_size=3),
        inner,
        max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


SAFETENSORS = save({"head.weight": torch.zeros(2, 3), "pos_embed": torch.zeros(1, 5)})
checkpoints = st.one_of(
    st.tuples(st.sampled_from(["a.pth", "a.bin"]),
    st.binary(max_size=40) | weights.map(_saved) | plain.map(pickle.dumps)),
    st.tuples(
        st.just("a.safetensors"),
        st.binary(max_size=40)
        | st.builds(lambda at, new: SAFETENSORS[:at] + new + SAFETENSORS[at + len(new) :], st.integers(0, 160),
        st.binary(max_size=8)),
    ),
)  # fmt: skip


@example(("a.pth", _saved({"pos_embed": torch.zeros(0, 1, 0)})), 56)
@given(checkpoints, st.sampled_from([None, 56, 112]))
def test_checkpoints(file, input_size):
    name, content = file
    Path(name).write_bytes(content)
    try:
        load_model("bundled", name, input_size=input_size)
    except UserError as error:
        assert str(error)


def damaged(value: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one to three of its parts replaced, or gone."""

    @st.composite
    def build(draw: st.DrawFn) -> Any:
        holder = [copy.deepcopy(value)]
        for _ in range(draw(st.integers(1, 3))):
            node: Any = holder
            key: Any = 0
            while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 5)):
                node = node[key]
                key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if isinstance(node, dict) and draw(st.booleans()):
                del node[key]
            else:
                node[key] = copy.deepcopy(draw(odd))
        return holder[0]

    return build()


@st.composite
def tampered_runs(draw: st.DrawFn) -> str:
    """The folder `whole` or `half`, as `tampered`: one or two of its files are damaged, some lead elsewhere."""
    original = Path(draw(st.sampled_from(["whole", "half"])))
    files: dict[Path, bytes | None] = {}
    names = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    for name in draw(
        st.lists(st.sampled_from([MANIFEST, MANIFEST, RECORDS, RECORDS, SKIPPED, "an array"]), min_size=1, max_size=2)
    ):
        if name == "an array":
            path = draw(st.sampled_from([path for path in names if path.suffix == ".npz"]))
            content = (original / path).read_bytes()
            at = draw(st.integers(0, len(content)))
            files[path] = content[:at] + draw(st.binary(max_size=9)) + content[at + draw(st.integers(0, 9)) :]
        elif name == MANIFEST:
            value = draw(damaged(json.loads((original / name).read_text())))
            files[Path(name)] = json.dumps(value).encode(errors="surrogatepass")
        elif name == SKIPPED:
            value = draw(damaged({"tiny": [{"index": 1, "name": "a.png", "reason": "empty"}]}))
            files[Path(name)] = json.dumps(value).encode(errors="surrogatepass")
        else:
            rows = draw(damaged([json.loads(line) for line in (original / name).read_text().splitlines()]))
            rows = rows if isinstance(rows, list) else [rows]
            rows += draw(st.lists(st.sampled_from(rows), max_size=2)) if rows else []  # the last of a kind counts
            text = "".join(json.dumps(row) + "\n" for row in rows).encode(errors="surrogatepass")
            files[Path(name)] = text + draw(st.binary(max_size=5))
        if draw(st.integers(0, 19)) == 0:
            files[Path(names[-1] if name == "an array" else name)] = draw(st.none() | st.binary(max_size=20))
    shutil.rmtree("tampered", ignore_errors=True)
    shutil.copytree(original, "tampered")
    for path, damage in files.items():
        target = "tampered" / path
        if damage is None:
            target.unlink(missing_ok=True)
            target.mkdir()
        elif not target.is_dir():
            target.write_bytes(damage)
    own = (
        [*OUTSIDE, *OUTSIDE, "partial", "predictions"]
        if draw(st.integers(0, 2)) == 0
        else ["report.html", "pareto.png"]
    )
    links = draw(st.lists(st.sampled_from(own), max_size=2, unique=True))
    for name in links:
        path, target = (
            Path("tampered", name),
            Path("outside", "" if "." in name else "partial", name if "." in name else ""),
        )
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target.resolve())
    return "\n".join([*(f"{path}: {damage!r}" for path, damage in files.items()), f"links: {links}"])


READERS = (
    ("table", "--format=md"), ("table", "--format=rich", "--pareto"), ("table", "--format=json", "--filter=drop<1"),
    ("table", "whole", "--format=csv"), ("pick", "--max-drop=5"), ("pick", "--min-speedup=1", "--json"),
    ("pick", "--max-gflops=1", "--max-latency-ms=1"), ("check", "--baseline=whole", "--max-slowdown=5"),
    ("table", "--format=tex"), ("compare", "whole"), ("compare", "--format=csv", "--baseline=whole:none", "whole"),
    ("check", "whole", "--baseline"), ("check", "--baseline=whole", "--limit=4"), ("check", "whole", "--limit=4",
    "--baseline"),
)  # fmt: skip


@given(tampered_runs(), st.sampled_from(READERS))
def test_tampered_runs_are_read(_, command):
    assert_answer_or_one_line(*command, "tampered")


@few(4)
@given(
    tampered_runs(),
    st.sampled_from([("report",), ("plot",), ("plot", "--out=a.svg", "whole")]),
)
def test_tampered_runs_are_drawn(_, command):
    assert_answer_or_one_line(*command, "tampered")


@few(4)
@given(tampered_runs())
def test_tampered_runs_are_continued(_):
    """What was measured stays, whatever comes of it."""
    path = Path("tampered") / RECORDS
    before = path.read_bytes() if path.is_file() else b""
    assert_answer_or_one_line(*GO_ON, "tampered")
    assert not path.is_file() or path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


@given(tampered_runs())
def test_tampered_runs_are_measured_again(_):
    """The baseline's own grid, as far as the measuring itself."""
    with patch.object(runner, "run", side_effect=UserError("measured")):
        assert_answer_or_one_line("check", "--out=again", "--baseline", "tampered")


def test_a_run_folder_may_have_any_name():
    name = "./-a\n[red]'\"<b>$x$\x1b[31m\udcff"
    try:
        for words in (GO_ON, ("table", "--format=md"), ("table", "--format=csv"), ("plot",), ("report",), ("check",)):
            code, _, err = call(*words, name, *["--baseline=whole"] * (words == ("check",)))
            assert (code, "\x1b" in err) == (0, False), (words, err)
        assert {"report.html", "pareto.png"} <= {path.name for path in Path(name).iterdir()}
        assert_answer_or_one_line("pick", name, "--max-drop=5")
        assert_answer_or_one_line("table", name + "?")
    finally:
        shutil.rmtree(name)


def hostile_run(path: Path, flops: int) -> str:
    """A run in which everything that has a name has each of `HOSTILE`: its methods by themselves, the rest by turns."""
    folder = RunFolder.create(
        path, {"machine": {"cpu": HOSTILE[0]}, "command": HOSTILE[3], "plugins": {HOSTILE[4]: "a"}}
    )
    labels = np.arange(8)
    answers = Predictions(labels, labels, np.full(8, 0.5, np.float32), labels >= 0)
    for place, name in enumerate(("none", *HOSTILE)):
        other, cell = HOSTILE[place - 2], f"{name}/8"
        same = {
            "cell": cell, "model": "".join(HOSTILE[:-1]), "method": name, "schedule": "8" if place else "",
            "params": {other: name} if place % 2 else {}, "weights_sha256": "a", "data": "".join(HOSTILE[:-1]),
            "data_fingerprint": "b", "device": "cpu", "dtype": "fp32", "caveats": [other] if place < 5 else [],
        }  # fmt: skip
        folder.append({"kind": "flops", "flops": 10**9 - flops * place, "flops_ratio": 1 - place / 100} | same)
        top1 = {"top1": 1 - place / 100, "drop": 1.0 * place, "drop_low": 0.0, "drop_high": 2.0 * place}
        folder.append({"kind": "accuracy", "images": 8, "agreement": 1.0, **top1} | same)
        folder.replace(folder.prediction_name(cell), answers.save)
    folder.append({"kind": "failure", "phase": "speed", "message": "\n".join(HOSTILE)} | same)
    return str(path)


@pytest.fixture(scope="module")
def hostile():
    """Two such runs, by names that are hostile, too."""
    yield hostile_run(Path("=cmd()##[error]\n::x\udcff[/v2]"), 10**7), hostile_run(Path("::add-mask::x"), 2 * 10**7)
    for name in Path().iterdir():
        if name.name.startswith(("=cmd", "::")):
            shutil.rmtree(name)


def test_names_are_text_in_every_command_and_format(hostile, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    one, two = hostile
    tables = {form: assert_answer_or_one_line("table", one, two, f"--format={form}") for form in FORMATS}
    assert all(name in tables["rich"] for name in ("deit[/v2]", "imagenet[v2]", "$\\b$", "![a](b)"))
    for sheet in (tables["csv"], assert_answer_or_one_line("compare", one, two, "--format=csv")):
        rows = list(csv.reader(io.StringIO(sheet)))
        assert len({*map(len, rows)}) == 1 and not any(
            own[:1] in ("=", "@") or own[:2] == "-1+" for own in sum(rows, [])
        )
    assert {row["method"] for row in json.loads(tables["json"])} >= {"deit[/v2]", "=cmd()", "a\\udcff"}
    for page in (tables["md"], assert_answer_or_one_line("compare", one, two, "--format=md")):
        lines = [re.sub(r"`(none|free)`", "", line) for line in page.splitlines()]
        assert not any(re.search(r"(?<!\\)(\\\\)*(<|!\[|`|\$)", line) for line in lines)
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines if line.startswith("| ")}) == 1
    rows = [line for line in tables["tex"].splitlines() if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    assert not any(re.search(r"(?<!\\)[%_#{]", re.sub(r"\\\w+(\{\}|\{(?=[^}]))?", "", row)) for row in rows[1:])
    for form in ("rich", "json"):
        assert_answer_or_one_line("compare", one, two, f"--format={form}")
    for words in (
        ("pick", one, "--max-drop=50"),
        ("pick", one, "--max-drop=50", "--json"),
        ("plot", one, "--x=gflops", "--size=page"),
    ):
        assert_answer_or_one_line(*words)
    assert_answer_or_one_line("report", one, two)
    page = Path(one, "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    told = assert_answer_or_one_line("check", one, f"--baseline={two}", "--junit=junit.xml")
    assert re.findall("^::.*?(?=::)", told, re.MULTILINE) == ["::error title=tokbench check, flops"]
    assert "<" not in Path("summary.md").read_text().replace(r"\<", "")
    assert len([*ElementTree.parse("junit.xml").iter("testcase")]) > 3 * len(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_in_errors(name):
    for words in (
        ("table", name),
        ("plot", "whole", f"--x={name}"),
        ("table", "whole", f"--filter={name}"),
        ("list", name),
    ):
        assert_answer_or_one_line(*words)
    assert_answer_or_one_line("run", "--dry-run", f"--label={name}", "--model=tiny", f"--data={name}", f"--out={name}")


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
    run = Path("records")
    run.mkdir(exist_ok=True)
    (run / "manifest.json").write_text('{"schema": 1}')
    text = "".join(f"{row}\n" for row in rows).encode(errors="surrogatepass")
    (run / "records.jsonl").write_bytes(text + tail)
    try:
        cells = load_cells([run])
        for form in ("md", "json", "csv", "tex"):
            render_table(cells, form)
    except UserError as error:
        assert str(run) in str(error) and "\n" not in str(error)


class _Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_a_checkpoint_that_would_start_a_program_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", load_model)
    marker, checkpoint = tmp_path / "made", tmp_path / "hostile.pth"
    checkpoint.write_bytes(pickle.dumps({"state_dict": _Hostile(marker)}))
    words = ("--model", "vit_tiny_patch16_224", "--checkpoint", str(checkpoint), "--device", "cpu", "--only", "flops")
    code, _, err = call("run", *words, "--method", "tome", "--schedule", "8", "--out", str(tmp_path / "run"))
    assert code == 2 and err.startswith("tokbench: ") and err.count("\n") == 1, err
    assert not marker.exists()
    pickle.loads(checkpoint.read_bytes())
    assert marker.exists()  # the file does what it threatens where it is let

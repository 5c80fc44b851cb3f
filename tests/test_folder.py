"""The run folder: what is written stays, what is torn is ignored, what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tokbench.errors import RunStopped, UserError
from tokbench.results import folder as store
from tokbench.results import records as results_records
from tokbench.results.folder import RunFolder, is_run, new_run_path
from tokbench.results.records import AccuracyRecord, FlopsRecord

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"
RECORD = {
    "kind": "flops",
    "cell": "m/tome/8",
    "model": "m",
    "method": "tome",
    "schedule": "8",
    "params": {},
    "flops": 5,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "results" / "run", {"grid": {"models": [{"name": "m"}]}})


def test_records_come_back_in_order_with_a_schema(run: RunFolder) -> None:
    run.append(RECORD)
    run.append({**RECORD, "kind": "accuracy", "images": 4, "top1": 0.5})
    records = RunFolder.open(run.path).records()
    assert [type(record) for record in records] == [FlopsRecord, AccuracyRecord]
    assert records[0].plain() == {"schema": 1, **RECORD} and records[1].top1 == 0.5


def test_the_manifest_comes_back(run: RunFolder) -> None:
    assert RunFolder.open(run.path).manifest.plain() == {"schema": 1, "grid": {"models": [{"name": "m"}]}}


def test_nan_is_refused(run: RunFolder) -> None:
    with pytest.raises(ValueError):
        run.append({**RECORD, "flops_ratio": float("nan")})
    assert run.records() == []


def test_a_torn_last_line_is_ignored_and_cut_by_the_next_append(run: RunFolder) -> None:
    run.append(RECORD)
    with open(run.path / "records.jsonl", "a") as file:
        file.write('{"schema": 1, "kind": "acc')
    assert len(run.records()) == 1
    run.append({**RECORD, "flops": 6})
    assert [record.flops for record in run.records()] == [5, 6]


def test_a_broken_line_is_named_by_its_number(run: RunFolder) -> None:
    run.append(RECORD)
    with open(run.path / "records.jsonl", "a") as file:
        file.write("nonsense\n")
    with pytest.raises(UserError, match=r"records\.jsonl, line 2: not valid JSON"):
        run.records()


def test_records_of_a_newer_schema_are_refused(run: RunFolder) -> None:
    (run.path / "records.jsonl").write_text(json.dumps({**RECORD, "schema": 9}) + "\n")
    with pytest.raises(UserError, match="schema 9.* a newer tokbench wrote it; upgrade"):
        run.records()


def test_records_of_an_older_schema_are_read(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.append(RECORD)
    monkeypatch.setattr(results_records, "SCHEMA", 2)
    assert [record.plain() for record in RunFolder.open(run.path).records()] == [{"schema": 1, **RECORD}]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", 3, "'method' must be text, not 3"),
        ("flops", "0.5", "'flops' must be a whole number, not '0.5'"),
        ("flops", True, "'flops' must be a whole number"),
        ("flops", 0, "'flops' must be above 0, not 0"),
        ("flops_low", "x", "'flops_low' must be a number, not 'x'"),
        ("top1", 500, "'top1' must be at most 1, not 500"),
        ("images", 0.5, "'images' must be a whole number"),
        ("seconds", [0.1, 0], r"'seconds\[1\]' must be above 0"),
        ("tokens", "65", "'tokens' must be a list"),
        ("schedule", None, "'schedule' must be text, not None"),
        ("params", [], "'params' must be a table"),
    ],
)
def test_a_field_of_another_kind_is_named(run: RunFolder, field: str, value: object, message: str) -> None:
    kind = {"top1": "accuracy", "images": "accuracy", "seconds": "speed"}.get(field, "flops")
    record = {"schema": 1, **RECORD, "kind": kind, "images": 4, field: value}
    with pytest.raises(ValueError):
        run.append(record)
    (run.path / "records.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"line 1: {message}"):
        run.records()


@pytest.mark.parametrize("field", ["kind", "cell", "model", "method", "schedule", "flops"])
def test_a_field_that_is_missing_is_named(run: RunFolder, field: str) -> None:
    record = {"schema": 1, **RECORD}
    del record[field]
    (run.path / "records.jsonl").write_text(json.dumps(record) + "\n")
    # Without its kind a record is of none, and has no FLOPs to lack.
    with pytest.raises(UserError, match=f"line 1: '{field}' is missing"):
        run.records()


@contextmanager
def full_disk(more: int) -> Iterator[None]:
    """Files may grow to so many bytes inside the block, as a disk allows that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_spoils_nothing(run: RunFolder) -> None:
    run.append(RECORD)
    run.replace("predictions/a.npz", lambda file: file.write(b"whole"))
    with full_disk(200):
        with pytest.raises(RunStopped, match="cannot write to the run folder .* File too large; what was measured"):
            run.append({**RECORD, "note": "x" * 500})
        with pytest.raises(RunStopped):
            run.replace("predictions/a.npz", lambda file: file.write(b"x" * 500))
    assert (run.path / "predictions" / "a.npz").read_bytes() == b"whole"
    assert not list(run.path.rglob("*.tmp"))
    assert (run.path / "records.jsonl").read_bytes().endswith(b"}\n") and len(run.records()) == 1
    run.append(RECORD)
    assert len(run.records()) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(UserError, match="cannot write to the run folder .* Read-only") as caught,
        RunFolder.held(tmp_path / "run"),
    ):
        pass
    assert not isinstance(caught.value, RunStopped)


def test_a_folder_removed_while_running_stays_removed(run: RunFolder) -> None:
    run.append(RECORD)
    shutil.rmtree(run.path)
    with pytest.raises(RunStopped, match="was removed while running"):
        run.append(RECORD)
    with pytest.raises(RunStopped, match="was removed while running"):
        run.replace("predictions/a.npz", lambda file: file.write(b"x"))
    assert not run.path.exists()


def test_no_name_leads_out_of_the_folder(run: RunFolder) -> None:
    for name in ("../../x", "/etc/passwd", "..", "a/../../..", "\\..\\x", "C:x"):
        for path in (run.prediction_path(name), run.path / run.partial_name(name, 1)):
            assert run.path.resolve() in path.resolve().parents and ".." not in path.parts


def test_a_run_never_overwrites_another(run: RunFolder) -> None:
    with pytest.raises(UserError, match="not empty"):
        RunFolder.create(run.path, {})


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="a file of that name"):
        RunFolder.create(tmp_path / "out", {})
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunFolder.create(tmp_path / "out" / "run", {})


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert RunFolder.create(tmp_path / "out", {}).records() == []


def test_opening_names_the_nearest_run(run: RunFolder) -> None:
    with pytest.raises(UserError, match="Did you mean 'run'"):
        RunFolder.open(run.path.parent / "runn")
    with pytest.raises(UserError, match="newest run in .* is 'run'"):
        RunFolder.open(run.path.parent / "xyz")


def test_opening_the_folder_of_runs_names_the_newest(run: RunFolder) -> None:
    with pytest.raises(UserError, match="but holds runs; the newest is .*run"):
        RunFolder.open(run.path.parent)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"schema": 2})])
def test_a_bad_manifest_is_one_line(run: RunFolder, text: str) -> None:
    (run.path / "manifest.json").write_text(text)
    with pytest.raises(UserError) as error:
        RunFolder.open(run.path)
    assert "manifest.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": ["x"]}, "'machine' must be a table, not ['x']"),
        ({"conditions": []}, "'conditions' must be a table, not []"),
        ({"conditions": {"models": ["m"]}}, "'conditions.models' must be a table"),
        ({"conditions": {"models": {"m": 3}}}, "'conditions.models.m' must be a table, not 3"),
        (
            {"conditions": {"models": {"m": {"images": "x"}}}},
            "'conditions.models.m.images' must be a whole number, not 'x'",
        ),
        ({"continued": [1]}, "'continued[0]' must be a table, not 1"),
        ({"plugins": "x"}, "'plugins' must be a table"),
    ],
)
def test_a_manifest_of_other_kinds_is_one_line(run: RunFolder, change: dict, words: str) -> None:
    (run.path / "manifest.json").write_text(json.dumps({**run.manifest.plain(), **change}))
    with pytest.raises(UserError) as caught:
        RunFolder.open(run.path)
    assert words in str(caught.value) and str(run.path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", '{"m": 3}', '{"m": [3]}', '{"m": [{}]}', '{"m": [{"index": -1}]}', "[" * 9000, "x"]
)
def test_odd_lists_of_skipped_images_are_one_line(run: RunFolder, text: str) -> None:
    (run.path / "skipped.json").write_text(text)
    with pytest.raises(UserError, match="skipped.json") as caught:
        run.skipped()
    assert "\n" not in str(caught.value)


def test_a_record_without_parameters_has_none(run: RunFolder) -> None:
    run.append({key: value for key, value in RECORD.items() if key != "params"})
    assert run.records()[0].params == {}


def test_prediction_paths_are_unique_and_readable(run: RunFolder) -> None:
    cells = ["m/tome/8", "m/tome_8", "M/tome/8", "m/topk/" + "list:1," * 99, "m/topk/" + "list:1," * 98 + "2"]
    paths = [run.prediction_path(cell) for cell in cells]
    assert len({path.name.lower() for path in paths}) == len(cells)
    assert paths[0].name.startswith("m_tome_8-") and paths[0].parent == run.path / "predictions"
    assert all(len(path.name) < 128 and path.suffix == ".npz" for path in paths)


def test_new_run_paths_do_not_exist(tmp_path: Path) -> None:
    first = new_run_path(tmp_path, "hf-hub:a/b c")
    first.mkdir(parents=True)
    second = new_run_path(tmp_path, "hf-hub:a/b c")
    assert first.name.endswith("-hf-hub-a-b-c") and not second.exists() and second != first


def test_commands_on_finished_runs_do_not_import_torch(tmp_path: Path) -> None:
    run = str(REFERENCE)
    commands = [
        ("table", run),
        ("pick", run, "--max-drop=1"),
        ("plot", run, "--out=a.png"),
        ("check", run, "--baseline", run),
        ("compare", run, "--baseline=reference:none"),
    ]
    code = f"""
import sys
from tokbench import cli
for words in {commands}:
    sys.argv = ["tokbench", *words]
    try:
        cli.main()
    except SystemExit as end:
        print(words[0], end.code or 0, "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [f"{words[0]} 0 False" for words in commands]


def test_repair_leaves_the_temporary_files_of_others_alone(run: RunFolder) -> None:
    ours, foreign = run.path / "manifest.json.tokbench.tmp", run.path / "notes.tmp"
    ours.touch()
    foreign.touch()
    run.repair()
    assert foreign.exists() and not ours.exists()


@pytest.mark.parametrize("name", ["x" * 300, "file/x", "a\0b"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="run folder .*: "):
        if not is_run(tmp_path / name):
            RunFolder.create(tmp_path / name, {})


def test_lines_that_nobody_wrote_are_refused_and_cut(run: RunFolder, monkeypatch) -> None:
    run.append(RECORD)
    whole = (run.path / "records.jsonl").read_bytes()
    with open(run.path / "records.jsonl", "ab") as file:
        file.write(b"\0" * 200_000)  # as a file system leaves them after a power cut
    assert len(run.records()) == 1
    run.repair()
    assert (run.path / "records.jsonl").read_bytes() == whole
    monkeypatch.setattr(store, "_LONGEST_LINE", 10)
    with pytest.raises(UserError, match="line 1: longer than 10 bytes"):
        run.records()


def test_more_records_than_can_be_read_in_time_are_refused_with_their_size(run: RunFolder) -> None:
    os.truncate(run.path / "records.jsonl", 740_000_000)  # sparse: it takes no room
    with pytest.raises(UserError, match="records.jsonl has 740,000,000 bytes; .* up to 134,217,728"):
        run.records()


def test_a_name_of_any_characters_has_a_place_for_its_predictions(run: RunFolder) -> None:
    places = {run.prediction_name(name) for name in ("a\udcff", "a\udcfe", "a", "a\n")}
    assert len(places) == 4 and all(place.isascii() for place in places)


def elsewhere(tmp_path: Path, *names: str) -> Path:
    """A folder with files that nobody may touch."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"precious")
    return folder


@pytest.mark.parametrize(
    "name", ["records.jsonl", "manifest.json", "skipped.json", "predictions/a.npz", "partial/m/0.npz"]
)
def test_a_link_in_place_of_a_runs_own_file_is_refused(run: RunFolder, tmp_path: Path, name: str) -> None:
    target = elsewhere(tmp_path, "file") / "file"
    if name == "manifest.json":
        target.write_bytes((run.path / name).read_bytes())
    before = target.read_bytes()
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a link") as caught:
        RunFolder.open(run.path)
    assert "\n" not in str(caught.value) and target.read_bytes() == before


@pytest.mark.parametrize("name", ["predictions", "partial", "partial/m"])
def test_a_link_in_place_of_a_runs_own_folder_is_refused(run: RunFolder, tmp_path: Path, name: str) -> None:
    folder = elsewhere(tmp_path, "0.npz")
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).symlink_to(folder)
    with pytest.raises(UserError, match=f"{name} is a link"):
        RunFolder.open(run.path)
    assert (folder / "0.npz").read_bytes() == b"precious"


@pytest.mark.parametrize("name", [".owner.json", ".lock"])
def test_holding_a_folder_never_writes_through_a_link(run: RunFolder, tmp_path: Path, name: str) -> None:
    target = elsewhere(tmp_path, "file") / "file"
    (run.path / name).symlink_to(target)
    with contextlib.suppress(UserError), RunFolder.held(run.path):
        pass
    assert target.read_bytes() == b"precious"


def test_in_a_runs_folder_a_link_is_replaced_and_elsewhere_it_is_followed(run: RunFolder, tmp_path: Path) -> None:
    folder = elsewhere(tmp_path, "report.html", "mine")
    for place in (run.path / "report.html", tmp_path / "link"):
        place.symlink_to(folder / ("mine" if place.name == "link" else place.name))
        store.replace_file(place, lambda file: file.write(b"new"))
        assert place.read_bytes() == b"new"
    assert (folder / "report.html").read_bytes() == b"precious" and not (run.path / "report.html").is_symlink()
    assert (folder / "mine").read_bytes() == b"new" and (tmp_path / "link").is_symlink()


def test_a_run_folder_may_itself_be_a_link(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.path)
    RunFolder.open(tmp_path / "link").append(RECORD)
    assert len(run.records()) == 1

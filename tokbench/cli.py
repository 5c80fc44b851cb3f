"""The command line: parse, call, print. Heavy imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from tokbench import __version__
from tokbench.errors import RunStopped, UserError, complain, nearest, require_known, say
from tokbench.interrupts import ending_after_unwinding, ending_at_once, ignoring_at_exit

if TYPE_CHECKING:
    from rich.console import Console

    from tokbench.config import Grid
    from tokbench.progress import LiveProgress

app = typer.Typer(
    name="tokbench",
    help="Which token-fusion method and schedule buys the most speed for the least accuracy, on your Vision "
    "Transformer, your data and your hardware?",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _option(metavar: str, help: str, *names: str, **more: Any) -> Any:
    """An option that takes a value, called as its parameter where no names are given."""
    return typer.Option(*names, metavar=metavar, help=help, **more)


def _flag(name: str, help: str) -> Any:
    """An option that is there or not."""
    return typer.Option(name, help=help, show_default=False)


Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)]

Plugins = Annotated[list[Path] | None, _option("FILE", "A Python file with methods of your own. Repeatable.")]


# What `run` and `search` share.
Models = Annotated[list[str] | None, _option("NAME", "A timm model, 'bundled', hf:…, openclip:… or tv:…. Repeatable.")]
Checkpoint = Annotated[Path | None, _option("FILE", "Weights for the one --model: .safetensors, .pth, .pt or .bin.")]
InputSize = Annotated[int | None, _option("PIXELS", "Side of the models' input (default: their own).")]
Label = Annotated[str | None, _option("NAME", "What the one --model is called in tables and plots.")]
Methods = Annotated[list[str] | None, _option("METHOD", "As in tome or tome:prop_attn=false. Repeatable.")]
Device = Annotated[str | None, _option("DEVICE", "auto, cpu, cuda, cuda:1 or mps (default: auto).")]
DType = Annotated[str | None, _option("DTYPE", "fp32, bf16 or fp16 (default: fp32).")]
Ray = Annotated[
    str | None,
    _option("N", "Share the images between N workers, one a GPU ('auto'), or those of the cluster at HOST:PORT."),
]


def main() -> NoReturn:
    """Run the command line and exit: 0 fine, 2 bad usage or input, 3 cells failed or the run stopped, 130 Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with ending_at_once():
            _require_current_folder()
            code = app(args=sys.argv[1:] or ["--help"], prog_name="tokbench", standalone_mode=False)
            if sys.stdout:  # None where it is closed
                sys.stdout.flush()
    except RunStopped as error:
        complain(str(error))
        code = 3
    except (UserError, TyperException) as error:
        complain(_usage(error) if isinstance(error, TyperException) else str(error))
        code = 2
    except BrokenPipeError:
        _silence_stdout()
        code = 1
    except OSError as error:
        if error.filename is None:  # what could not be written is the output itself
            _silence_stdout()
            complain(f"cannot write the output: {error.strerror or error}")
            code = 3
        else:
            complain(f"{error.strerror}: {str(error.filename)[:100]!r}")
            code = 2
    ignoring_at_exit()
    sys.exit(code)


def _require_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder no longer exists; go to another one") from None


def _silence_stdout() -> None:
    """Python writes what is left when it exits, and would say that this cannot be."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: TyperException) -> str:
    """What is wrong with the words of the command line: for an option's value what it must be, and what it is."""
    found: list[Any] = getattr(error.__cause__ or error.__context__, "errors", list)()
    kinds = {"float_parsing": "a number", "int_parsing": "a whole number", "int_from_float": "a whole number"}
    param = getattr(error, "param", None)
    if param is None or not found or found[0]["type"] not in kinds:
        return error.format_message()
    return f"{param.opts[0]} must be {kinds[found[0]['type']]}, not {found[0]['input']!r}"


def _grid(context: typer.Context, *others: str) -> Grid:
    """The grid file that a command names, if any, with what the flags say instead.

    others: the command's parameters that are no part of a grid.
    """
    from tokbench.config import Grid

    plural = {name: f"{name}s" for name in ("model", "method", "schedule", "runtime")}
    given = {name: value for name, value in context.params.items() if value is not None and name not in others}
    base = Grid.from_toml(given.pop("grid")) if "grid" in given else None
    return Grid.from_flags(base, **{plural.get(name, name): value for name, value in given.items()})


def _load_plugins(paths: list[Path] | None) -> None:
    if paths:
        from tokbench.plugins import load_plugins

        load_plugins(paths)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tokbench {__version__}")
        raise typer.Exit


@app.callback()
def _global_flags(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    context: typer.Context,
    grid: Annotated[
        Path | None,
        typer.Argument(metavar="GRID.toml", help="What to measure; flags replace what it says.", show_default=False),
    ] = None,
    model: Models = None,
    checkpoint: Checkpoint = None,
    random_weights: Annotated[
        bool, _flag("--random-weights", "FLOPs and speed of --model without a download.")
    ] = False,
    input_size: InputSize = None,
    label: Label = None,
    method: Methods = None,
    schedule: Annotated[list[str] | None, _option("SCHEDULE", "As in 13 or keep:0.7@3,6,9. Repeatable.")] = None,
    plugin: Plugins = None,
    data: Annotated[
        str | None, _option("SPEC", "'bundled', a folder of class folders, or hfds/…, wds/…, torch/….")
    ] = None,
    out: Annotated[
        Path | None, _option("DIR", "Run folder to make or to continue (default: a new one under results/).")
    ] = None,
    fresh: Annotated[bool, _flag("--fresh", "Never continue a run: begin a new one in DIR-2, DIR-3, …")] = False,
    device: Device = None,
    dtype: DType = None,
    batch_size: Annotated[
        str | None, _option("N", "Images, 'auto' (the default), or several to time at each: 1,8,32.")
    ] = None,
    seconds: Annotated[
        float | None, _option("S", "Time each model so long in all (default: 1.5, up to 6 on a noisy machine).")
    ] = None,
    rounds: Annotated[int | None, _option("N", "Rounds of timing, however long (default: as many as fit).")] = None,
    processes: Annotated[
        int | None, _option("N", "Time in N fresh processes in turn; intervals are over them.")
    ] = None,
    runtime: Annotated[
        str | None, _option("NAMES", "Time in each of eager,compile,onnxruntime,openvino,tensorrt (default: eager).")
    ] = None,
    compile: Annotated[bool | None, _flag("--compile", "The same as --runtime compile.")] = None,
    fused: Annotated[
        str | None, _option("on|off", "off: attention written out, methods by their definitions (default: on).")
    ] = None,
    check_answers: Annotated[
        bool | None, _flag("--check-answers", "Compare the answers in other runtimes with eager's.")
    ] = None,
    limit: Annotated[
        int | None,
        _option("N", "Measure accuracy on N images; may grow later (default: 1,000 bundled ones, else all)."),
    ] = None,
    only: Annotated[str | None, _option("MEASURES", "Some of flops,accuracy,speed (default: all).")] = None,
    max_bad: Annotated[float | None, _option("PERCENT", "Stop if more images cannot be decoded (default: 1).")] = None,
    readers: Annotated[int | None, _option("N", "Processes that read images.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", hidden=True)] = None,
    ray: Ray = None,
    cache: Annotated[
        str | None, _option("DIR", "Keep prepared images there, so that no later run decodes them again.")
    ] = None,
    labels: Annotated[
        str | None, _option("FILE", "What each image of a folder shows: lines of file name,class.")
    ] = None,
    dry_run: Annotated[bool, _flag("--dry-run", "Say what would be measured and how long that takes.")] = False,
) -> None:
    """Measure accuracy, FLOPs and speed of every cell of a grid.

    Without arguments: the bundled model on 1,000 bundled images, every method at two levels of FLOPs. The same command
    with the --out of an earlier run continues that run: what it has is not measured again.
    """
    from rich.console import Console

    from tokbench.results.folder import is_run

    _load_plugins(plugin)
    if workers is not None:
        complain("--workers is called --readers now; the next release no longer takes the old name")
        context.params["readers"] = workers if readers is None else readers
    chosen = _grid(context, "plugin", "out", "fresh", "workers", "dry_run")
    if dry_run:
        with _live_progress(Console(stderr=True, quiet=not sys.stderr.isatty()), out, continuable=False) as progress:
            from tokbench.running.estimate import preview

            told = preview(chosen, out, progress=progress, fresh=fresh)
        say(told)
        return

    if out is None and not fresh:
        from tokbench.running.unfinished import find_unfinished

        if left := find_unfinished(chosen):
            complain(
                f"{left.path} is an unfinished run of this grid ({left.done} of {left.measurements} measurements); "
                f"this begins a new one, and to continue that: {_command(left.path)}"
            )
    earlier = out if out and not fresh and is_run(out) else None
    with _live_progress(Console(), out, earlier) as progress:
        from tokbench.running.runner import run as run_grid

        run_grid(chosen, out, progress=progress, fresh=fresh)
    raise typer.Exit(3 if progress.failures else 0)


@app.command()
def search(
    context: typer.Context,
    grid: Annotated[
        Path | None,
        typer.Argument(metavar="GRID.toml", help="Models and methods; flags replace what it says.", show_default=False),
    ] = None,
    budget: Annotated[
        list[str] | None,
        _option("BUDGET", "flops:0.35 or speedup:1.5. Repeatable (default: flops:0.5 and flops:0.35)."),
    ] = None,
    model: Models = None,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    label: Label = None,
    method: Methods = None,
    plugin: Plugins = None,
    data: Annotated[
        str | None, _option("SPEC", "Images to search on, best none that will be measured on (default: bundled:train).")
    ] = None,
    images: Annotated[int, _option("N", "How many of them.", min=1)] = 256,
    params: Annotated[bool, _flag("--params", "Search the methods' parameters that are numbers, too.")] = False,
    time: Annotated[str, _option("TIME", "Most time for one search, as in 10m or 90s.")] = "10m",
    seed: Annotated[int, _option("N", "Seed of the search.", min=0)] = 0,
    device: Device = None,
    dtype: DType = None,
    ray: Ray = None,
    out: Annotated[Path, _option("FILE.toml", "Grid file to write, for tokbench run.")] = Path("searched.toml"),
) -> None:
    """Search how many tokens each block should lose, within a budget of FLOPs or time. No labels, no training.

    Keeps the model's answers nearest to the unreduced model's. The same command continues a search that was
    interrupted, and finds at once what was found before.
    """
    from rich.console import Console

    from tokbench.progress import LiveProgress

    _load_plugins(plugin)
    if out.suffix != ".toml":
        raise UserError(f"--out {out}: a grid file ends in .toml")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {str(out.parent)!r} does not exist")
    if data == "bundled:train":  # the images to search on, and none that a grid's accuracy is measured on
        context.params["data"] = None
    chosen = _grid(context, "budget", "plugin", "images", "params", "time", "seed", "out")
    progress = LiveProgress(Console())

    def kept() -> str:
        progress.abandon()
        return f"interrupted; {out} has the best so far" if out.is_file() else "interrupted before anything was found"

    with ending_after_unwinding(kept), progress:
        from tokbench.searching.command import as_table, search_grid

        found = search_grid(
            chosen, budget or ["flops:0.5", "flops:0.35"], out, data=data, images=images, seconds=_seconds(time),
            seed=seed, tune=params, progress=progress, ray=ray,
        )  # fmt: skip
    Console().print(as_table(found))
    print(f"Measure these: tokbench run {shlex.quote(str(out))}")


def _seconds(text: str) -> float:
    """A time such as 90, 90s, 10m or 2h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not found or not (seconds := float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]):
        raise UserError(f"--time {text!r}: expected a time above 0, as in 90s, 10m or 2h")
    return seconds


def _command(out: Path | None) -> str:
    """This command line as it continues the run in `out`; None for the --out that it has."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    if out:
        end = words.index("--") if "--" in words else len(words)
        words[end:end] = ["--out", str(out)]
    return shlex.join(["tokbench", *words])


@contextmanager
def _live_progress(
    console: Console, out: Path | None, earlier: Path | None = None, continuable: bool = True
) -> Iterator[LiveProgress]:
    """What a run shows; interrupted, it says what is kept and how to go on, and exits with 130.

    earlier: the run that is continued, if one is.
    """
    from tokbench.progress import LiveProgress

    progress = LiveProgress(console)

    def kept() -> str:
        progress.abandon()
        made = progress.folder.path if progress.folder and progress.folder.path != out else None
        return progress.kept(_command(made) if continuable else "", earlier)

    with ending_after_unwinding(kept), progress:
        yield progress


@app.command()
def plot(
    runs: Runs,
    x: Annotated[
        list[str] | None,
        _option(
            "METRIC",
            "A panel's x axis. Repeatable (default: gflops, throughput). 'batch': speed-up by batch size.",
            "--x",
        ),
    ] = None,
    y: Annotated[
        str | None, _option("METRIC", "Any metric (default: top1, or agreement where there are no labels).", "--y")
    ] = None,
    format: Annotated[
        str | None, _option("FORMAT", "png, svg or pdf (default: png, or what FILE's name ends in).")
    ] = None,
    out: Annotated[Path | None, _option("FILE", "File to write (default: pareto.png in the first RUN).")] = None,
    size: Annotated[str, _option("SIZE", "wide (a screen), page (a paper's width) or paper (one column).")] = "wide",
    theme: Annotated[str, _option("THEME", "light or dark.")] = "light",
    published: Annotated[
        bool, _flag("--published", "Lay over what papers printed for this model, where they did.")
    ] = False,
    linear: Annotated[bool, _flag("--linear", "Never stretch the y axis near the unreduced model.")] = False,
) -> None:
    """Draw accuracy against cost, with the Pareto front. Several runs are laid over each other."""
    from tokbench.report.plots import plot_pareto
    from tokbench.results.table import load_shown

    if out and format and out.suffix != f".{format}":
        raise UserError(f"--format {format} and --out {out} contradict each other: one of them is enough")
    target = out or runs[0] / f"pareto.{'png' if format is None else format}"
    with ending_after_unwinding():
        drawn = plot_pareto(
            load_shown(runs, complain), target, x=x, y=y, size=size, theme=theme, published=published, linear=linear,
            tell=complain,
        )  # fmt: skip
    say(str(drawn))


@app.command()
def table(
    runs: Runs,
    format: Annotated[str, _option("FORMAT", "rich, md, csv, tex or json.")] = "rich",
    sort: Annotated[str, _option("COLUMN", "Sort by this column, best first.")] = "",
    filter: Annotated[
        list[str] | None,
        _option("CONDITION", "Only cells such as method=tome, schedule=flops:* or drop<1. Repeatable."),
    ] = None,
    pareto: Annotated[bool, _flag("--pareto", "Only the Pareto front.")] = False,
    columns: Annotated[
        str | None, _option("NAMES", "These only, in this order, as in method,schedule,top1,drop,speedup.")
    ] = None,
) -> None:
    """Print the cells of one or more runs as a table."""
    from rich.console import Console

    from tokbench.report.tables import print_table, render_table
    from tokbench.results.table import load_shown

    cells = load_shown(runs, complain)
    names = None if columns is None else [name.strip() for name in columns.split(",")]
    asked: dict[str, Any] = {"sort": sort, "pareto": pareto, "filters": filter or (), "columns": names}
    if format == "rich":
        console = Console()
        piped = not console.is_terminal and "COLUMNS" not in os.environ
        print_table(console, cells, every_column=piped, **asked)
    else:
        say(render_table(cells, format, **asked))


@app.command()
def report(
    runs: Runs,
    out: Annotated[Path | None, _option("FILE.html", "File to write (default: report.html in the first RUN).")] = None,
) -> None:
    """Write one HTML page: findings, an interactive plot, a sortable table, how it was measured."""
    from tokbench.report.html import write_report

    with ending_after_unwinding():
        written = write_report(runs, out or runs[0] / "report.html", tell=complain)
    say(str(written))


@app.command()
def show(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Files, or bundled:17 for the 17th bundled image.", show_default=False),
    ],
    model: Annotated[str, _option("NAME", "A timm model, 'bundled', hf:…, openclip:… or tv:….")] = "bundled",
    checkpoint: Annotated[
        Path | None, _option("FILE", "Weights for the model: .safetensors, .pth, .pt or .bin.")
    ] = None,
    input_size: Annotated[int | None, _option("PIXELS", "Side of the model's input (default: its own).")] = None,
    method: Annotated[
        list[str] | None,
        _option("METHOD", "As in tome or mctf:tau_sim=2. Repeatable (default: tome, tofu, mctf, evit)."),
    ] = None,
    schedule: Annotated[str, _option("SCHEDULE", "As in 13 or keep:0.7@3,6,9.")] = "flops:0.5",
    plugin: Plugins = None,
    blocks: Annotated[
        bool, _flag("--blocks", "The tokens after each block that removes some, not only the last.")
    ] = False,
    theme: Annotated[str, _option("THEME", "light or dark.")] = "light",
    out: Annotated[Path, _option("FILE", "File to write: .png, .svg or .pdf.")] = Path("tokens.png"),
) -> None:
    """Draw what methods make of images: which patches end up in one token, and which are dropped."""
    from tokbench.show.trace import show as draw

    _load_plugins(plugin)
    options: dict[str, Any] = {"methods": method} if method else {}
    with ending_after_unwinding(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        drawn = draw(
            images, out, model=model, checkpoint=checkpoint, input_size=input_size, schedule=schedule, blocks=blocks,
            theme=theme, **options,
        )  # fmt: skip
    for warning in caught:
        complain(f"warning: {warning.message}")
    say(str(drawn))


@app.command()
def check(
    baseline: Annotated[Path, _option("RUN", "The run folder that says how it should be.", show_default=False)],
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run folder to check (default: run the baseline's grid again)."),
    ] = None,
    max_drop: Annotated[float, _option("POINTS", "Most points of top-1 that may be lost.")] = 1.0,
    max_flips: Annotated[float, _option("PCT", "Most answers that may change.")] = 2.0,
    max_slowdown: Annotated[
        float | None, _option("PCT", "Most that may be lost of a speed-up (default: not checked).")
    ] = None,
    despite_warnings: Annotated[
        bool, _flag("--despite-warnings", "Check --max-slowdown even where timing was warned of.")
    ] = False,
    limit: Annotated[int | None, _option("N", "Compare on N of the baseline's images (default: all).")] = None,
    out: Annotated[Path | None, _option("DIR", "Run folder to make (default: a new one under results/).")] = None,
    device: Annotated[
        str | None, _option("DEVICE", "Where to measure (default: on the baseline's kind of device).")
    ] = None,
    junit: Annotated[Path | None, _option("FILE", "Write the verdicts as JUnit XML, too.")] = None,
    plugin: Plugins = None,
) -> None:
    """Compare a run with a baseline: accuracy image by image, FLOPs, tokens. Exits with 1 if anything moved.

    Fails also where a loss of top-1 within --max-drop is significant. In GitHub Actions it annotates the job.
    """
    from rich.console import Console

    from tokbench.check.verdicts import require_writable, tell_github, write_junit

    _load_plugins(plugin)
    if junit:
        require_writable(junit)
    with _live_progress(Console(), out, continuable=False) as progress:
        from tokbench.check.compare import Limits
        from tokbench.check.compare import check as check_run

        limits = Limits(max_drop, max_flips, max_slowdown, despite_warnings)
        found = check_run(baseline, run, limits=limits, limit=limit, out=out, device=device, progress=progress)
    say("\n".join(found.lines()))
    if junit:
        with ending_after_unwinding():
            write_junit(found, junit)
    tell_github(found)
    raise typer.Exit(0 if found.passed else 1)


@app.command()
def compare(
    runs: Runs,
    baseline: Annotated[
        str | None, _option("RUN:CELL", "Compare all cells with this one, such as a:none (default: see above).")
    ] = None,
    format: Annotated[str, _option("FORMAT", "rich, md, csv or json.")] = "rich",
) -> None:
    """Tell how each cell differs from the same cell of the first RUN, also between checkpoints, dtypes and machines.

    Of models with the same label, or of the only one in each run. With intervals, paired where the images are the same.
    """
    from rich.console import Console

    from tokbench.check.differences import as_table, render
    from tokbench.check.differences import compare as compare_runs

    found = compare_runs(runs, baseline)
    if format == "rich":
        Console().print(as_table(found))
    else:
        say(render(found, format))


@app.command()
def pick(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    max_drop: Annotated[float | None, _option("POINTS", "Most points of top-1 to lose.")] = None,
    min_agreement: Annotated[
        float | None, _option("PERCENT", "Least agreement with the unreduced model; needs no labels.")
    ] = None,
    min_speedup: Annotated[float | None, _option("X", "Least speed-up over the unreduced model.")] = None,
    max_latency_ms: Annotated[float | None, _option("MS", "Most milliseconds at batch 1, median.")] = None,
    max_gflops: Annotated[float | None, _option("G", "Most 1e9 multiply-adds an image.")] = None,
    as_json: Annotated[bool, _flag("--json", "Print JSON: a list with one decision per model.")] = False,
) -> None:
    """Name the best cell within limits, and the Python that applies it. Exits with 1 if nothing meets them.

    Judged by the unfavorable end of 95 % intervals. With --max-drop or --min-agreement the fastest wins, else the most
    accurate. Each model of the run gets a decision.
    """
    import json

    from tokbench.report.pick import pick_cells

    picks = pick_cells(
        run, max_drop=max_drop, min_agreement=min_agreement, min_speedup=min_speedup, max_latency_ms=max_latency_ms,
        max_gflops=max_gflops,
    )  # fmt: skip
    if as_json:
        say(json.dumps([found.to_dict() for found in picks], indent=2, ensure_ascii=False))
    else:
        say("\n\n".join(found.text() for found in picks))
    raise typer.Exit(0 if all(found.best is not None for found in picks) else 1)


@app.command()
def export(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder that --cell is of.", show_default=False)
    ] = None,
    cell: Annotated[str | None, _option("ID", "A cell of RUN, as column `cell` of `tokbench table` names it.")] = None,
    model: Annotated[str | None, _option("NAME", "Instead of a cell: a model as `tokbench run` takes it.")] = None,
    checkpoint: Annotated[Path | None, _option("FILE", "Weights for --model: .safetensors, .pth, .pt or .bin.")] = None,
    input_size: Annotated[int | None, _option("PIXELS", "Side of the model's input (default: its own).")] = None,
    method: Annotated[str | None, _option("METHOD", "As in tome or tome:prop_attn=false (default: none).")] = None,
    schedule: Annotated[str | None, _option("SCHEDULE", "As in 13 or keep:0.7@3,6,9.")] = None,
    plugin: Plugins = None,
    format: Annotated[str | None, _option("FORMAT", "onnx or pt2 (default: what FILE's name ends in).")] = None,
    out: Annotated[Path | None, _option("FILE", "File to write (default: model.onnx, or what FORMAT is).")] = None,
    batch: Annotated[str, _option("N", "The only batch size it takes, or 'dynamic'.")] = "dynamic",
    dtype: Annotated[str | None, _option("DTYPE", "fp32 or fp16 (default: fp16 for a cell measured in it).")] = None,
    force: Annotated[bool, _flag("--force", "Replace a FILE that is there.")] = False,
) -> None:
    """Write a model with its method for ONNX Runtime, OpenVINO, TensorRT (onnx) or PyTorch (pt2).

    The file is opened again and must answer as the model does, or it goes (exit code 3). FILE.json tells how to use it.
    """
    from tokbench.exporting.command import export_asked

    _load_plugins(plugin)
    asked = {"model": model, "checkpoint": checkpoint, "input_size": input_size, "method": method, "schedule": schedule}
    with ending_after_unwinding():
        target = out or Path(f"model.{format or 'onnx'}")
        written = export_asked(run, cell, asked, target, format=format, batch=batch, dtype=dtype, force=force)
    print(written.text())


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="models|methods|schedules|data", help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="For models: part of the name, or '*small*'.")] = "",
    plugin: Plugins = None,
) -> None:
    """List the models, methods, schedules or kinds of data there are."""
    require_known(what, ("models", "methods", "schedules", "data"), "list of")
    if pattern and what != "models":
        raise UserError(f"'{pattern}': only models are listed by a pattern, not {what}")
    from tokbench.config import SPECS, describe_methods, describe_schedules

    _load_plugins(plugin)
    match what:
        case "models":
            from tokbench.models import model_names

            names = model_names(pattern)
            if not names:
                families = dict.fromkeys(name.partition("_patch")[0] for name in model_names())
                raise UserError(f"no model is called {pattern!r}.{nearest(pattern, families)}")
            say("\n".join(names))
        case "methods":
            say(describe_methods())
        case "schedules":
            say(describe_schedules())
        case "data":
            say(SPECS)

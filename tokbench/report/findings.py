"""What a table of cells says, in sentences. Each is as strong as its interval allows and no stronger."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pandas as pd

from tokbench.catalogue import controls
from tokbench.report.metrics import METRICS, comparable, find_metric, nonfinite, pareto_front
from tokbench.report.styles import short_schedule, variant_name
from tokbench.report.tables import sensible_digits

# What stands in for top-1 where there are no labels or no classes.
_LIKENESS = {
    "agreement": "agreement with the unreduced model",
    "similarity": "cosine to the unreduced model's features",
}

_VAGUE = 5.0  # points of top-1: a drop that may be more than this is no answer
_MODEL = "the unreduced model"
_RUNS_DIFFER = 1.1  # what a speed-up at batch 1 may be multiplied with from one run to the next: docs/measuring.md


@dataclass
class Findings:
    """What is known of one model under one set of conditions.

    Attributes:
        title: names them.
        answer: what one may take without losing accuracy, for who reads one sentence; "" where that is not known.
        sentences: all of it.
    """

    title: str
    answer: str = ""
    sentences: list[str] = field(default_factory=list)


def findings(df: pd.DataFrame) -> list[Findings]:
    """Sentences for each set of comparable cells of `metrics.load_table`, in the order they were measured."""
    return [
        Findings(group_title(group), _answer(group), _sentences(group)) for group in comparable(tell_runs_apart(df))
    ]


def group_title(group: pd.DataFrame) -> str:
    """Model and conditions of comparable cells in one line."""
    first = group.iloc[0]
    images, batch = group["images"].dropna(), group["batch_size"].dropna()
    parts = [
        str(first["model"]),
        f"{int(images.max()):,} {_plural(int(images.max()), 'image')} of {first['data']}" if len(images) else "",
        _where(first),
        str(first["dtype"] or ""),
        "compiled" if first["compiled"] == "yes" else "",
        f"batch {int(batch.max())}" if len(batch) else "",
    ]
    return ", ".join(part for part in parts if part)


def tell_runs_apart(df: pd.DataFrame) -> pd.DataFrame:
    """With a column `run_of_several`: the run of each cell that may be compared with cells of other runs, else ""."""
    told = df.assign(run_of_several="")
    for group in comparable(df):
        if group["run"].nunique() > 1:
            told.loc[group.index, "run_of_several"] = group["run"]
    return told


def cell_name(row: pd.Series) -> str:
    """A cell as one says it: "ToMe at r=13", with its run where `tell_runs_apart` found several."""
    name = variant_name(row["method"], row["variant"])
    if row["schedule"] and not row["is_baseline"]:
        name += f" at {short_schedule(row['schedule'])}"
    return f"{name} in {row['run_of_several']}" if row.get("run_of_several") else name


def drop_phrase(row: pd.Series) -> str:
    """What a cell does to top-1: a loss, a gain, or nothing that could be told from chance."""
    if pd.isna(row["drop_low"]):
        return f"a drop of {_points(row, row['drop'])} (no interval)"
    interval = f"[{_number(row, row['drop_low'])}, {_number(row, row['drop_high'])}]"
    if row["drop_low"] <= 0 <= row["drop_high"]:
        return f"top-1 that cannot be told from the unreduced model's ({_short_drop(row)})"
    if row["drop"] < 0:
        gain = f"[{_number(row, -row['drop_high'])}, {_number(row, -row['drop_low'])}]"
        return f"a gain of {_points(row, -row['drop'])} of top-1 {gain}"
    return f"a loss of {_points(row, row['drop'])} of top-1 {interval}"


def _short_drop(row: pd.Series) -> str:
    return f"drop {_points(row, row['drop'])} [{_number(row, row['drop_low'])}, {_number(row, row['drop_high'])}]"


def speed_phrase(row: pd.Series) -> str:
    """A cell's speed-up with its interval: "1.46× [1.44, 1.48] the speed"."""
    interval = "" if pd.isna(row["speedup_low"]) else f" [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
    return f"{row['speedup']:.2f}×{interval} the unreduced model's speed"


def _answer(group: pd.DataFrame) -> str:
    """The fastest cell, or the one with the fewest FLOPs, among those with no significant loss of top-1."""
    cells = group[~group["is_baseline"] & group["drop_low"].notna() & ~nonfinite(group)]
    if cells.empty:
        return ""
    kept, model = cells[cells["drop_low"] <= 0], str(group["model"].iloc[0])
    images = int(cells["images"].max())
    unseen = f"no loss of accuracy that {images:,} {_plural(images, 'image')} can show"
    if cells["speedup_low"].notna().any():
        faster = kept[kept["speedup_low"] > 1]
        if faster.empty:
            return f"Nothing that was tried makes {model} surely faster with {unseen}."
        best = faster.loc[faster["speedup"].idxmax()]
        if best["drop_high"] > _VAGUE:
            return _too_vague(best, images, "fastest")
        batches = (
            f" in batches of {best['batch_size']}" if pd.notna(best["batch_size"]) and best["batch_size"] > 1 else ""
        )
        gain = f"makes {model} {_times_as_fast(best)}{_on(best)}{batches}"
        told = f"{_upper(cell_name(best))} {gain}, with {unseen}: {_at_most(best)}."
        if batches and (single := _alone(best)):
            told += f" One image at a time it {single}: {_single(best)}."
        return told + _beaten_by_a_control(best, faster)
    cheaper = kept[kept["flops_ratio"] < 1]
    if cheaper.empty:
        return (
            f"Nothing that was tried saves FLOPs of {model} with {unseen}." if kept["flops_ratio"].notna().any() else ""
        )
    best = cheaper.loc[cheaper["flops_ratio"].idxmin()]
    if best["drop_high"] > _VAGUE:
        return _too_vague(best, images, "cheapest")
    return (
        f"{_upper(cell_name(best))} takes {_flops_phrase(best)} of {model}, with {unseen}: {_at_most(best)}. "
        "Whether it is faster was not measured."
    )


def _beaten_by_a_control(best: pd.Series, faster: pd.DataFrame) -> str:
    """Who wants a method from a paper is told which; "" where the best is one."""
    if best["method"] not in controls():
        return ""
    told = f" {_upper(variant_name(best['method'], best['method']))} is a control, there to be beaten"
    published = faster[~faster["method"].isin(controls())]
    if published.empty:
        return f"{told}; no paper's method is surely faster without such a loss."
    row = published.loc[published["speedup"].idxmax()]
    return f"{told}; of the papers' methods it is {cell_name(row)}, {_times_as_fast(row)}."


def _times_as_fast(row: pd.Series) -> str:
    return f"{row['speedup']:.2f} times as fast [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def _at_most(row: pd.Series) -> str:
    return f"{_short_drop(row)}" + (
        f", so up to {_number(row, row['drop_high'])} may be lost" if row["drop_high"] > 0 else ""
    )


def _too_vague(row: pd.Series, images: int, which: str) -> str:
    return (
        f"{images:,} {_plural(images, 'image')} cannot tell what is to be had without losing accuracy: "
        f"{cell_name(row)}, the {which} cell with no significant loss, may lose up to {_points(row, row['drop_high'])}."
    )


def _sentences(group: pd.DataFrame) -> list[str]:
    cells = group[~group["is_baseline"]]
    measured = cells[cells[["top1", *_LIKENESS, "gflops", "speedup"]].notna().any(axis=1) & ~nonfinite(cells)]
    sentences = [_unreduced(group)]
    if cells.empty:
        return [*sentences, "Nothing but the unreduced model was measured, so there is nothing to compare."]
    sentences += _missing(group) + _nonfinite(group)
    if measured["flops_ratio"].notna().any() and measured[["top1", "speedup"]].isna().all(axis=None):
        sentences.append(_savings(measured))
    if measured["drop"].notna().any():
        sentences += _accuracy(measured)
    elif group["top1"].isna().all():
        sentences += [text for name in _LIKENESS for text in _likeness(measured, name)]
    if measured["speedup"].notna().any():
        sentences += _speed(measured) + _latency(measured)
    gains = [name for name in ("top1", *_LIKENESS) if measured[name].notna().any()]
    sentences += [text for y in gains[:1] for x in ("speedup", "gflops") for text in _front(group, x, y)]
    return [*sentences, *_failures(cells)]


def _unreduced(group: pd.DataFrame) -> str:
    base = group[group["is_baseline"]]
    if base.empty:
        return "The unreduced model was not measured, so no drop and no speed-up is known."
    if len(base) > 1:
        return " ".join(_unreduced_of(row, f"Unreduced, the model has in {row['run']} ") for _, row in base.iterrows())
    return _unreduced_of(base.iloc[0], "Unreduced, the model has ")


def _unreduced_of(row: pd.Series, begin: str) -> str:
    values = [
        f"{row['top1']:.{sensible_digits(METRICS['top1'], row['images'])}f} % top-1" if pd.notna(row["top1"]) else "",
        f"{row['gflops']:.3g} GFLOPs an image (multiply-adds)" if pd.notna(row["gflops"]) else "",
        f"{row['throughput']:,.0f} images/s" if pd.notna(row["throughput"]) else "",
    ]
    told = [value for value in values if value]
    return f"{begin}{_list(told)}." if told else "Of the unreduced model no figures are known."


def _missing(group: pd.DataFrame) -> list[str]:
    texts = []
    if group["top1"].isna().all() and group["agreement"].notna().any():
        texts.append(
            "Without labels top-1 is unknown: said below is how often answers stay what they were, right or not."
        )
    elif group["top1"].isna().all() and group["similarity"].notna().any():
        texts.append("The model has no classes, so there is no top-1: its features are compared instead.")
    elif group["top1"].isna().all():
        texts.append("Accuracy was not measured: what the savings cost is unknown.")
    if group["throughput"].isna().all():
        texts.append("Speed was not measured: fewer FLOPs need not mean more images per second.")
    return texts


def _nonfinite(group: pd.DataFrame) -> list[str]:
    broken = group[nonfinite(group)]
    if broken.empty:
        return []
    names = _list([f"{cell_name(row)} ({row['nonfinite']:,} of {row['images']:,} images)"
                   if pd.notna(row["images"]) else cell_name(row) for _, row in broken.iterrows()])  # fmt: skip
    return [f"NaN or infinite logits, so left out of fronts and of what is said of reduced cells: {names}."]


def _savings(cells: pd.DataFrame) -> str:
    shares = 100 * cells["flops_ratio"].dropna()
    low, high = round(shares.min()), round(shares.max())
    span = f"{low} %" if low == high else f"{low} to {high} %"
    return f"The {_plural(len(shares), 'reduced cell')} {_plural(len(shares), 'takes', 'take')} {span} of its FLOPs."


def _accuracy(cells: pd.DataFrame) -> list[str]:
    """How many cells are as good as the unreduced model as far as one can tell, and the cheapest of them."""
    known = cells[cells["drop_low"].notna()]
    if known.empty:
        return []
    same = known[(known["drop_low"] <= 0) & (known["drop_high"] >= 0)]
    gained = known[known["drop_high"] < 0]
    lost = known[known["drop_low"] > 0]
    count = len(known)
    parts = [
        f"{_count(len(same), count)} cannot be told from the unreduced model in top-1" if len(same) else "",
        f"{_count(len(gained), count)} {'is' if len(gained) == 1 else 'are'} better" if len(gained) else "",
        f"{_count(len(lost), count)} {'loses' if len(lost) == 1 else 'lose'} top-1" if len(lost) else "",
    ]
    total = f"Of {count} reduced {_plural(count, 'cell')}, " if count > 1 else "The one reduced cell: "
    told = total + _list([part for part in parts if part])
    if len(same) == count > 1:
        told = f"None of the {count} reduced cells can be told from the unreduced model in top-1"
    sentences = [f"{told} (95 % intervals, each cell for itself)."]
    as_good = pd.concat([same, gained])
    which = f"of the {len(as_good)} with no significant loss is" if len(as_good) > 1 else ""
    if len(as_good) and as_good["speedup"].notna().any():
        best = as_good.loc[as_good["speedup"].idxmax()]
        subject = f"The fastest {which}" if which else "That one is"
        sentences.append(f"{subject} {cell_name(best)}:{_on(best)} {speed_phrase(best)}, {_short_drop(best)}.")
    elif len(as_good) and as_good["flops_ratio"].notna().any():
        best = as_good.loc[as_good["flops_ratio"].idxmin()]
        subject = f"The cheapest {which}" if which else "That one is"
        sentences.append(f"{subject} {cell_name(best)}: {_flops_phrase(best)}, {_short_drop(best)}.")
    elif len(lost) and as_good.empty:
        best = lost.loc[lost["drop"].idxmin()]
        sentences.append(f"The smallest loss is that of {cell_name(best)}: {_costs(best)}{drop_phrase(best)}.")
    widest = (known["drop_high"] - known["drop_low"]).median() / 2
    if widest >= 0.5:
        images = int(known["images"].max())
        sentences.append(
            f"With {images:,} {_plural(images, 'image')} a drop is known to about ±{widest:.1f} points; smaller ones "
            "cannot be seen."
        )
    return sentences


def _likeness(cells: pd.DataFrame, name: str) -> list[str]:
    """How near cells without a top-1 come to the unreduced model: in its answers, or in its features."""
    known = cells[cells[name].notna()]
    if known.empty:
        return []
    metric = METRICS[name]
    digits, unit = sensible_digits(metric, known["images"].max()), " %" if name == "agreement" else ""
    ends = [f"{value:.{digits}f}" for value in (known[name].min(), known[name].max())]
    span = ends[0] if ends[0] == ends[1] else " to ".join(ends)
    best = known.loc[known[name].idxmax()]
    interval = f" [{best[metric.low]:.{digits}f}, {best[metric.high]:.{digits}f}]" if pd.notna(best[metric.low]) else ""
    kl = f", KL divergence {best['kl']:.3g} nats" if name == "agreement" and pd.notna(best["kl"]) else ""
    which = f"Of {len(known)} reduced cells the {_LIKENESS[name]} is {span}{unit}; it is the highest with"
    if len(known) == 1:
        which = f"The one reduced cell has its {_LIKENESS[name]} at"
        return [f"{which} {ends[0]}{unit}{interval}{kl}."]
    return [f"{which} {cell_name(best)}: {ends[1]}{unit}{interval}{kl}."]


def _speed(cells: pd.DataFrame) -> list[str]:
    timed = cells[cells["speedup"].notna()]
    limits, timed = timed[timed["method"] == "free"], timed[timed["method"] != "free"]
    told = [f"{cell_name(row)} runs at {speed_phrase(row)}: the same shapes, nothing chosen or merged."
            for _, row in limits.iterrows()]  # fmt: skip
    return [*(_speed_of_methods(timed) if len(timed) else []), *told]


def _speed_of_methods(timed: pd.DataFrame) -> list[str]:
    best = timed.loc[timed["speedup"].idxmax()]
    cost = f", with {_cost(best)}" if _cost(best) else ""
    sentences = [f"The fastest cell{_on(best)} is {cell_name(best)}: {speed_phrase(best)}{cost}."]
    slower, unclear = (
        timed[timed["speedup_high"] < 1],
        timed[(timed["speedup_low"] <= 1) & (timed["speedup_high"] >= 1)],
    )
    if len(slower):
        sentences.append(f"Slower than the unreduced model: {_named(slower, _factor)}.")
    if len(unclear):
        sentences.append(f"Not to be told from the unreduced model in speed: {_named(unclear, _factor)}.")
    counted = timed[(timed["flops_ratio"] < 0.95) & timed["flops_ratio"].notna()]
    if len(counted):
        promise = counted["speedup"] * counted["flops_ratio"]
        low, high = 100 * promise.min(), 100 * promise.max()
        span = f"{low:.0f} %" if round(low) == round(high) else f"{low:.0f} to {high:.0f} %"
        sentences.append(f"The speed-ups are {span} of what the FLOPs saved would give if time followed FLOPs.")
    return sentences


def _cost(row: pd.Series) -> str:
    """What a cell's speed costs in top-1, or else how near it stays to the unreduced model; "" if neither is known."""
    if pd.notna(row["drop"]):
        return drop_phrase(row)
    digits = sensible_digits(METRICS["agreement"], row["images"])
    if pd.notna(row["agreement"]):
        return f"the unreduced model's answer for {row['agreement']:.{digits}f} % of the images"
    return f"a cosine of {row['similarity']:.4f} to its features" if pd.notna(row["similarity"]) else ""


def _latency(cells: pd.DataFrame) -> list[str]:
    """Which cells that are faster in batches are not at batch 1, by speed-ups paired there too."""
    timed = cells[
        cells["latency_speedup"].notna() & (cells["method"] != "free")
        & (cells["speedup_low"] > 1) & (cells["batch_size"].fillna(0) > 1)
    ]  # fmt: skip
    told = []
    for word, alike in timed.groupby(timed.apply(_alone, axis=1, result_type="reduce"), sort=False):
        if word:
            verb, _, rest = str(word).replace(_MODEL, "it").partition(" ")
            told.append(f"{len(alike)} {_plural(len(alike), verb, 'are')} {rest}: {_named(alike, _single)}")
    if not told:
        return []
    faster = f"faster than {_MODEL} at batch {int(timed['batch_size'].max())}"
    if len(timed) == 1:
        return [f"One image at a time the one cell {faster} {told[0].partition(' ')[2]}."]
    return [f"One image at a time it is another story: of the {len(timed)} cells {faster}, {'; '.join(told)}."]


def _alone(row: pd.Series) -> str:
    """Whether a cell is slower at batch 1 than the unreduced model, as far as one run can tell; "" if it is faster."""
    if row["latency_speedup_high"] < 1 / _RUNS_DIFFER:
        return f"is slower than {_MODEL}"
    if row["latency_speedup_low"] <= _RUNS_DIFFER:
        return f"is within {100 * (_RUNS_DIFFER - 1):.0f} % of {_MODEL}, by which runs differ"
    return ""


def _factor(row: pd.Series) -> str:
    return f"{row['speedup']:.2f}×"


def _single(row: pd.Series) -> str:
    return f"{row['latency_speedup']:.2f}×"


def _named(cells: pd.DataFrame, figure: Callable[[pd.Series], str]) -> str:
    """The first four cells by name, each with a figure, and how many more there are."""
    names = [f"{cell_name(row)} ({figure(row)})" for _, row in cells.head(4).iterrows()]
    return _list(names) if len(cells) <= 4 else f"{', '.join(names)} and {len(cells) - 4} more"


def _front(group: pd.DataFrame, x: str, y: str) -> list[str]:
    """Which methods are on the front of y against x, and which never are."""
    known = group[find_metric(x).column].notna() & group[y].notna()
    there = group[known & ~group["is_baseline"] & ~nonfinite(group)]
    if there["method"].nunique() < 2:
        return []
    front = there[pareto_front(group, x, y)[there.index]]
    names = {variant: variant_name(method, variant) for variant, method in there[["variant", "method"]].to_numpy()}
    on = [variant for variant in names if (front["variant"] == variant).any()]
    never = [names[variant] for variant in names if variant not in on]
    what = f"{_LIKENESS.get(y, 'top-1')} against {'speed' if x == 'speedup' else 'FLOPs'}"
    if not on:
        return [f"No reduced cell is on the front of {what}."]
    counts = [f"{names[variant]} ({_times(int((front['variant'] == variant).sum()))})" for variant in on]
    verb = "is" if len(never) == 1 else "are"
    rest = f"; {_list(never)} {verb} never on it" if never else ""
    return [f"On the front of {what}, by the measured values: {_list(counts)}{rest}."]


def _failures(cells: pd.DataFrame) -> list[str]:
    failed = cells[cells["error"].notna()]
    if failed.empty:
        return []
    reasons = "; ".join(f"{cell_name(row)}: {row['error']}" for _, row in failed.iterrows())
    return [f"{len(failed)} {_plural(len(failed), 'cell')} failed ({reasons})."]


def _costs(row: pd.Series) -> str:
    if pd.notna(row["speedup"]):
        return f"{speed_phrase(row)}, with "
    return f"{_flops_phrase(row)}, with " if pd.notna(row["flops_ratio"]) else ""


def _flops_phrase(row: pd.Series) -> str:
    return f"{100 * row['flops_ratio']:.0f} % of the FLOPs"


def _where(row: pd.Series) -> str:
    return str(row["machine"] or row["device"] or "")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _on(row: pd.Series) -> str:
    if pd.isna(row["device"]):
        return ""
    return " on this CPU" if str(row["device"]) == "cpu" else f" on {_where(row)}"


def _points(row: pd.Series, value: float) -> str:
    return f"{_number(row, value)} points"


def _number(row: pd.Series, value: float) -> str:
    digits = sensible_digits(METRICS["drop"], row["images"])
    text = f"{value:.{digits}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "−")


def _count(part: int, whole: int) -> str:
    if whole == 1:
        return "it"
    return "all" if part == whole else f"{part}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _plural(count: int, word: str, plural: str = "") -> str:
    return word if count == 1 else plural or f"{word}s"


def _list(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last

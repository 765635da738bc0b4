"""A paper's table or figure: plans its runs, runs what is missing, and writes ours beside the published numbers."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tables import TABLES
from experiments.tables.base import Column, Row, Table
from prefix_tuning import launch, population, setup, sweep
from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import guarded, read_json, replace, write_json
from prefix_tuning.progress import say
from prefix_tuning.record import WORKDIR, check_config

# What says where something lies or how a run is watched, and changes no number.
NEUTRAL = {"dataset.path", "dataset.urls", "evaluation.samples"}
NEUTRAL |= {f"train.{name}" for name in ("log_every", "checkpoint_every", "keep", "prefetch", "population")}

Load = Callable[[list[str]], dict[str, Any]]  # flags of `run.py train` -> the config; raises what is wrong with them


class Options(NamedTuple):
    """What makes a run of a table smaller than the paper's."""

    model: str | None = None  # instead of every row's
    dataset: str | None = None  # where the data set lies
    examples: int | None = None  # pairs to train on, and records to score
    seeds: tuple[int, ...] | None = None
    only: tuple[str, ...] | None = None  # names of rows
    population: int = 1  # runs that train at once, where they can
    overrides: dict[str, str] = {}  # "section.key" -> text, for every run  # noqa: RUF012


class Run(NamedTuple):
    """One run: a row with one seed, and where columns have runs of their own, for one of those."""

    row: Row
    arg: str  # the columns'
    planned: sweep.Planned
    config: dict[str, Any]
    published: dict[str, Any]  # the config of the paper's own setting


def options(
    table: Table,
    *,
    model: str | None = None,
    dataset: str | None = None,
    examples: str | None = None,
    seeds: str | None = None,
    only: str | None = None,
    overrides: dict[str, str] | None = None,
) -> Options:
    """The options as they are typed; raises `UserError` for numbers that are none and for unknown rows."""
    if examples is not None and not (examples.isdecimal() and int(examples)):
        raise UserError(f"--examples={examples!r} must be a number of at least 1")
    numbers = None if seeds is None else seeds.split(",")
    if numbers is not None and (not all(map(str.isdecimal, numbers)) or len(set(numbers)) < len(numbers)):
        raise UserError(f"--seeds={seeds!r} must be different whole numbers with commas between them")
    names = None if only is None else tuple(only.split(","))
    for name in names or ():
        valid("row", name, [row.name for row in table.rows if row.file])
    rest = dict(overrides or {})
    for key in ("seed", "train.draw"):
        if key in rest:
            raise UserError(f"--config.{key} is what --seeds says; drop it")
    size = rest.pop("train.population", "1")
    if not size.isdecimal() or not int(size):
        raise UserError(f"--config.train.population={size!r} must be a number of at least 1")
    count = None if examples is None else int(examples)
    return Options(model, dataset, count, numbers and tuple(map(int, numbers)), names, int(size), rest)


def groups(table: Table, row: Row) -> dict[str, list[Column]]:
    """What the config takes for a group of columns -> the columns that one run of a row fills."""
    found: dict[str, list[Column]] = {}
    for column in table.columns:
        if column.label not in row.without:
            found.setdefault(column.arg, []).append(column)
    return found


def plan(table: Table, given: Options, load: Load) -> list[Run]:
    """Every run of the rows that have a config; those that `given.only` leaves out are there where they can be.

    Raises `UserError`, naming the row, for a config, an argument or an override that cannot be.
    """
    made: list[Run] = []
    drawn = [published(row, row.arg, load)["train"]["examples"] for row in table.rows if row.file and sized(row)]
    for row in table.rows:
        try:
            made += plan_row(table, row, max(filter(None, drawn), default=0), given, load) if row.file else []
        except UserError:
            if given.only is None or row.name in given.only:
                raise
    return made


def plan_row(table: Table, row: Row, largest: int, given: Options, load: Load) -> list[Run]:
    """The runs of a row: one for every seed, and where columns have runs of their own, for every one of those."""
    made = []
    for group in groups(table, row):
        arg = ",".join(filter(None, (row.arg, group)))
        theirs = published(row, arg, load)
        own = row.overrides | smaller(theirs, given, largest if sized(row) else 0) | given.overrides
        ours = loaded(row.name, sweep.Planned(row.name, row.file, arg, own), load)
        fewer = shorter(table, theirs, ours)
        if fewer and "optimizer.warmup_steps" not in given.overrides:
            own |= fewer
            ours = loaded(row.name, sweep.Planned(row.name, row.file, arg, own), load)
        lacking = [key for key in table.needs if flat(ours)[key] is None]
        if lacking:
            raise UserError(f"this table needs {' and '.join(f'--config.{key}=...' for key in lacking)}")
        for seed in given.seeds or row.seeds or (theirs["seed"],):
            draw = {} if row.seeds_a_subset is None else {"draw": seed // row.seeds_a_subset}
            overrides = own | {"seed": seed} | {f"train.{key}": value for key, value in draw.items()}
            name = ",".join(filter(None, (row.name, group, f"seed={seed}")))
            config = ours | {"seed": seed, "train": ours["train"] | draw}
            made.append(Run(row, group, sweep.Planned(name, row.file, arg, overrides), config, theirs))
    return made


def sized(row: Row) -> bool:
    """Whether a row is about a number of training pairs."""
    return "train.examples" in row.overrides or "low_data=" in row.arg


def published(row: Row, arg: str, load: Load) -> dict[str, Any]:
    """The config of a row in the paper's own setting."""
    return loaded(row.name, sweep.Planned(row.name, row.file, arg, row.overrides), load)


def smaller(theirs: dict[str, Any], given: Options, largest: int) -> dict[str, Any]:
    """The overrides that a model, a data set and a number of examples stand for.

    Rows about numbers of pairs, of which the table's highest is `largest`, keep their proportion.
    """
    own: dict[str, Any] = {} if given.model is None else {"model.name": given.model}
    if given.dataset is not None:
        own["dataset.path"] = given.dataset
    if given.examples is not None:
        size = theirs["train"]["examples"]
        share = min(1, given.examples / largest) if largest else 1
        own["train.examples"] = max(1, round(size * share)) if largest else given.examples
        own["evaluation.examples"] = given.examples
    return own


def shorter(table: Table, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The warm-up of a run with fewer steps: as large a share of them as in the paper's."""
    pairs, warmup = theirs["train"]["examples"] or table.pairs, theirs["optimizer"]["warmup_steps"]
    whole, few = (
        train["epochs"] * math.ceil((train["examples"] or pairs or 0) / train["batch_size"])
        for train in (theirs["train"], ours["train"])
    )
    return {"optimizer.warmup_steps": warmup * few // whole} if warmup and few < whole else {}


def loaded(name: str, planned: sweep.Planned, load: Load) -> dict[str, Any]:
    """The config of a run; raises `UserError` naming it."""
    try:
        return load(planned.flags)
    except Exception as error:  # a config is a program, and flags have a dozen types of errors
        text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        raise UserError(f"row {name!r} cannot be planned: {' '.join(text.split())}") from error


def flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested sections as "section.key" -> value."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def differences(table: Table, given: Options, runs: Sequence[Run]) -> list[str]:
    """What differs from the paper's setting, in words; [] where nothing does."""
    chosen = [run for run in runs if given.only is None or run.row.name in given.only]
    told = list(table.instead)
    if given.model is not None:
        names = dict.fromkeys(run.published["model"]["name"].rpartition("/")[2] for run in chosen)
        theirs = list(names)
        if theirs != [Path(given.model).name]:
            told.append(f"model {given.model} instead of {' and '.join(theirs)}")
    if given.examples is not None:
        sizes = list(dict.fromkeys(run.config["train"]["examples"] for run in chosen))
        of = list(dict.fromkeys(run.published["train"]["examples"] or table.pairs for run in chosen))
        told.append(f"{counted(sizes)} of {counted(of)} training pairs")
        told.append(f"at most {given.examples:,} of {counted([table.records])} records scored")
    if given.seeds is not None:
        theirs = sorted({run.row.seeds or (run.published["seed"],) for run in chosen})
        ours, counts = ", ".join(map(str, given.seeds)), sorted({len(seeds) for seeds in theirs})
        plural = "" if len(given.seeds) == 1 else "s"
        if len(given.seeds) < counts[0]:
            told.append(f"{len(given.seeds)} seed{plural} of {' or '.join(map(str, counts))} ({ours})")
        elif theirs != [given.seeds]:
            listed = [", ".join(map(str, seeds)) for seeds in theirs[:3]] + ["..."] * (len(theirs) > 3)
            told.append(f"seed{plural} {ours} instead of {' or '.join(listed)}")
    rows = [row.name for row in table.rows if row.file]
    if given.only is not None and set(given.only) != set(rows):
        told.append(f"{len(set(given.only))} of {len(rows)} rows")
    for key in given.overrides:
        if key not in NEUTRAL:
            theirs = dict.fromkeys(str(flat(run.published).get(key)) for run in chosen)
            ours = dict.fromkeys(str(flat(run.config).get(key)) for run in chosen)
            if theirs != ours:
                told.append(f"{key} {', '.join(ours)} instead of {', '.join(theirs)}")
    warmups = {(run.config["optimizer"]["warmup_steps"], run.published["optimizer"]["warmup_steps"]) for run in chosen}
    if "optimizer.warmup_steps" not in given.overrides and any(ours != theirs for ours, theirs in warmups):
        told.append("as much less warm-up")
    return told


def counted(numbers: Sequence[int | None]) -> str:
    """Numbers in words, "all" for one that depends."""
    return "/".join("all" if number is None else f"{number:,}" for number in numbers)


class Score(NamedTuple):
    """What runs of a row gave for a column, on the paper's scale, in the order of `seeds`."""

    values: list[float]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


class Line(NamedTuple):
    """A row with what its runs gave."""

    row: Row
    scores: list[Score | None]  # a column each, None where there is none
    seeds: list[int]  # of the finished runs
    planned: int  # how many runs it has
    finished: int


def columns(table: Table) -> list[Column]:
    """The table's, and the mean over them where it has one."""
    return [*table.columns, *([Column(table.mean, (), digits=table.columns[0].digits)] if table.mean else [])]


def collect(table: Table, runs: Sequence[Run], root: Path) -> list[Line]:
    """What finished runs below `root` gave, a line for every row of the table."""
    lines = []
    for row in table.rows:
        own = [run for run in runs if run.row is row]
        found: dict[str, dict[int, float]] = {column.label: {} for column in table.columns}
        finished = []
        for run in own:
            path = root / run.planned.name / "summary.json"
            if not path.exists():
                continue
            finished.append(run)
            tuned = read_json(path, WORKDIR)["tuned"]
            for column in groups(table, row)[run.arg]:
                values = [tuned.get(key) for key in column.keys]
                if None not in values:
                    found[column.label][run.config["seed"]] = column.scale * statistics.mean(values)
        scores = [Score(list(values.values())) if values else None for values in found.values()]
        if table.mean:
            shared = set.intersection(*(set(values) for values in found.values()))
            means = [statistics.mean(values[seed] for values in found.values()) for seed in sorted(shared)]
            scores.append(Score(means) if means else None)
        seeds = list(dict.fromkeys(run.config["seed"] for run in finished))
        lines.append(Line(row, scores, seeds, len(own), len(finished)))
    return lines


def status(line: Line) -> str:
    """Whether a row was run."""
    if not line.finished:
        return "not run"
    return "run" if line.finished == line.planned else f"{line.finished} of {line.planned} runs"


def number(value: float | None, column: Column, signed: bool = False) -> str:
    """A number as the paper prints it."""
    if value is None:
        return "-"
    return f"{value:{'+' if signed else ''}.{column.digits}f}"


def markdown(name: str, table: Table, lines: Sequence[Line], differing: Sequence[str]) -> str:
    """The table: for each row the published numbers, ours, and the difference from the first published version."""
    shown = columns(table)
    text = [
        f"# {table.title}",
        "",
        f"{table.source[0].upper()}{table.source[1:]}.",
        "",
        f"**{setting(differing)}**",
        "",
    ]
    if table.shape:
        text += [f"Published: {table.shape}", ""]
    arrows = [f"{column.label} {'↓' if column.lower else ''}".strip() for column in shown]
    cells = [["row", "", *arrows, "seeds"], ["---"] * (len(shown) + 3)]  # the second is whose numbers they are
    for line in lines:
        first = line.row.label
        for version, numbers in line.row.published.items():
            padded = [*numbers, *[None] * (len(shown) - len(numbers))]
            cells.append([first, version, *(number(n, c) for n, c in zip(padded, shown, strict=True)), ""])
            first = ""
        if not line.finished:
            cells.append([first, "ours", *["not run"] * len(shown), ""])
            continue
        ours = []
        for score, column in zip(line.scores, shown, strict=True):
            spread = score and score.deviation
            mean = number(score and score.mean, column)
            ours.append(mean if spread is None else f"{mean} ± {number(spread, column)}")
        seeds = ", ".join(map(str, line.seeds))
        if line.finished < line.planned:
            seeds += f" ({status(line)})"
        cells.append([first, "ours", *ours, seeds])
        if line.row.published:
            gaps = [number(gap, column, signed=True) for gap, column in zip(against(line), shown, strict=True)]
            cells.append(["", f"ours - {next(iter(line.row.published))}", *gaps, ""])
    if not table.versions:
        cells = [[label, *rest] for label, _, *rest in cells]
    text += ["| " + " | ".join(row) + " |" for row in cells]
    text += ["", "Ours is the mean over seeds ± their standard deviation; ↓: lower is better; -: no number."]
    idle = [line.row.label for line in lines if not line.finished]
    if idle:
        text.append(f"Not run: {', '.join(idle)}.")
    told = [*table.notes, *filter(None, (line.row.note for line in lines))]
    text += ["", *(f"- {note}" for note in told), "", f"`python run.py table {name} --workdir=DIR`: {table.cost}."]
    return "\n".join(text) + "\n"


def setting(differing: Sequence[str]) -> str:
    """One sentence on whether this is what the paper did."""
    return f"Not the paper's setting: {'; '.join(differing)}." if differing else "The paper's setting."


def against(line: Line) -> list[float | None]:
    """Ours minus the first published version, a column each."""
    numbers = next(iter(line.row.published.values()), ())
    padded = [*numbers, *[None] * (len(line.scores) - len(numbers))]
    return [
        None if score is None or theirs is None else score.mean - theirs
        for score, theirs in zip(line.scores, padded, strict=True)
    ]


def records(table: Table, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A flat record for every row and column."""
    made = []
    for line in lines:
        for index, (column, score, gap) in enumerate(zip(columns(table), line.scores, against(line), strict=True)):
            published = {version: (*numbers, None)[index] for version, numbers in line.row.published.items()}
            made.append(
                {
                    "row": line.row.name,
                    "label": line.row.label,
                    "column": column.label,
                    **{f"published {version}": published.get(version) for version in table.versions},
                    "ours": score and score.mean,
                    "deviation": score and score.deviation,
                    "runs": len(score.values) if score else 0,
                    "difference": gap,
                    "seeds": " ".join(map(str, line.seeds)),
                    "status": status(line),
                }
            )
    return made


def as_json(name: str, table: Table, lines: Sequence[Line], differing: Sequence[str]) -> dict[str, Any]:
    """Everything, for programs."""
    shown = columns(table)
    rows = []
    for line in lines:
        gaps = against(line)
        ours = {
            column.label: None
            if score is None
            else {"mean": score.mean, "deviation": score.deviation, "values": score.values, "difference": gap}
            for column, score, gap in zip(shown, line.scores, gaps, strict=True)
        }
        theirs = {
            version: dict(zip((column.label for column in table.columns), numbers, strict=True))
            for version, numbers in line.row.published.items()
        }
        place = {"series": line.row.series, "x": line.row.x} if table.axis else {}
        rows.append(
            {"name": line.row.name, "label": line.row.label, **place, "status": status(line), "seeds": line.seeds}
            | {"published": theirs, "ours": ours}
        )
    return {
        "table": name,
        "title": table.title,
        "source": table.source,
        "papers_setting": not differing,
        "differences": list(differing),
        "lower_is_better": [column.label for column in shown if column.lower],
        "rows": rows,
        "notes": list(table.notes),
    }


def as_csv(table: Table, lines: Sequence[Line], differing: Sequence[str]) -> str:
    """A line for every row and column."""
    out = io.StringIO()
    made = [record | {"setting": setting(differing)} for record in records(table, lines)]
    writer = csv.DictWriter(out, list(made[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    return out.getvalue()


def draw(table: Table, lines: Sequence[Line], differing: Sequence[str], path: Path) -> None:
    """A panel for each column: bars, or lines over the axis of a figure, with the published numbers as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = columns(table)
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    height = 3.2 if table.axis else 1.2 + 0.32 * len(lines)
    figure, axes = pyplot.subplots(
        down, across, figsize=(5.2 * across, height * down + 1.2), squeeze=False, layout="constrained"
    )
    for index, axis in enumerate(axes.flat):
        if index >= len(shown):
            axis.set_visible(False)
            continue
        column = shown[index]
        axis.set_title(column.label + (" (lower is better)" if column.lower else ""))
        (curves if table.axis else bars)(axis, table, lines, index)
    handles = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    figure.suptitle(f"{table.title}\n{setting(differing)}", wrap=True, fontsize=10)
    guarded(path.parent, lambda: figure.savefig(path, dpi=110))
    pyplot.close(figure)


def theirs(line: Line, version: str, index: int) -> float | None:
    """A published number; None for the mean over columns."""
    return (*line.row.published.get(version, (None,) * len(line.scores)), None)[index]


def bars(axis: Any, table: Table, lines: Sequence[Line], index: int) -> None:
    """A bar for each row, the published numbers as marks on it; a row that was not run has marks alone."""
    for version, (marker, color) in zip(table.versions, (("D", "black"), ("x", "tab:orange")), strict=False):
        points = [(value, y) for y, line in enumerate(lines) if (value := theirs(line, version, index)) is not None]
        x, y = [x for x, _ in points], [y for _, y in points]
        axis.scatter(x, y, marker=marker, color=color, s=26, zorder=3, label=version)
    found = [(y, line.scores[index]) for y, line in enumerate(lines) if line.scores[index]]
    axis.barh(
        [y for y, _ in found],
        [score.mean for _, score in found],
        xerr=[score.deviation or 0.0 for _, score in found],
        color="tab:blue",
        label="ours",
    )
    names = [line.row.label + ("" if line.finished else " (not run)") for line in lines]
    axis.set_yticks(range(len(lines)), names, fontsize=8)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    values = [score.mean for _, score in found]
    values += [v for line in lines for version in table.versions if (v := theirs(line, version, index)) is not None]
    if values and min(values) > 0:  # bars from 0 would hide what tells methods apart
        margin = 0.15 * (max(values) - min(values)) or 0.1 * max(values)
        axis.set_xlim(max(0.0, min(values) - margin), max(values) + margin)


def curves(axis: Any, table: Table, lines: Sequence[Line], index: int) -> None:
    """A line for each series, with bars of one standard deviation; published points are hollow."""
    for color, series in enumerate(dict.fromkeys(line.row.series for line in lines)):
        own = [line for line in lines if line.row.series == series]
        found = [(line.row.x, line.scores[index]) for line in own if line.scores[index]]
        shade = f"C{color}"
        axis.errorbar(
            [x for x, _ in found],
            [score.mean for _, score in found],
            yerr=[score.deviation or 0.0 for _, score in found],
            marker="o",
            capsize=3,
            color=shade,
            label=f"ours: {series}" + ("" if any(line.finished for line in own) else " (not run)"),
        )
        for version in table.versions:
            points = [(line.row.x, v) for line in own if (v := theirs(line, version, index)) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker="D",
                    mfc="none",
                    ls="--",
                    color=shade,
                    label=f"{version}: {series}",
                )
    if table.log:
        axis.set_xscale("log")
    ticks = sorted({line.row.x for line in lines})
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7)
    axis.minorticks_off()
    axis.set_xlabel(table.axis)


def write(name: str, table: Table, lines: Sequence[Line], differing: Sequence[str], root: Path) -> str:
    """Writes NAME.md, NAME.csv, NAME.json and NAME.png; returns the Markdown."""
    text = markdown(name, table, lines, differing)
    guarded(root, lambda: replace(root / f"{name}.md", text))
    guarded(root, lambda: replace(root / f"{name}.csv", as_csv(table, lines, differing)))
    write_json(root / f"{name}.json", as_json(name, table, lines, differing))
    draw(table, lines, differing, root / f"{name}.png")
    return text


def planned(name: str, given: dict[str, Any], load: Load) -> tuple[Table, Options, list[Run]]:
    """A table, the options as they are meant, and all its runs; raises `UserError` for what cannot be."""
    table = TABLES[valid("table", name, TABLES)]
    chosen = options(table, **given)
    return table, chosen, plan(table, chosen, load)


def make(
    name: str,
    workdir: str | Path,
    given: dict[str, Any],
    load: Load,
    launcher: Callable[[list[sweep.Planned], list[list[str]]], launch.Local | launch.Slurm],
) -> str:
    """Runs what a table lacks below `workdir`, writes it there, and returns it as Markdown.

    `launcher` takes what is to run and the names of those that train at once.  Raises `UserError` before anything runs
    for what cannot be, and after everything else is written where runs failed.
    """
    table, chosen, runs = planned(name, given, load)
    root = Path(workdir)
    for run in runs:
        check_config(root / run.planned.name, run.config, setup.usual(run.config))
    differing = differences(table, chosen, runs)
    asked = [run for run in runs if chosen.only is None or run.row.name in chosen.only]
    parts = population.groups([run.config for run in asked], chosen.population)
    together = [[asked[number].planned.name for number in part] for part in parts]
    todo = [run.planned for run in asked]
    started = launcher(todo, together)
    setup.check_inputs({one.planned.name: one.config for one in asked if not sweep.finished(root / one.planned.name)})
    say(f"{setting(differing)}  {len(asked)} runs; {table.cost}")
    try:
        sweep.run_all(todo, started, root, together)
    finally:
        text = write(name, table, collect(table, runs, root), differing, root)
    return text


def listing() -> str:
    """Every table with its number of runs and what they cost, as Markdown."""
    rows = [["NAME", "what", "published in", "runs", "cost"], ["---"] * 5]
    for name, table in TABLES.items():
        runs = sum(len(groups(table, row)) * len(row.seeds or (0,)) for row in table.rows if row.file)
        rows.append([f"`{name}`", table.title, table.source, str(runs), table.cost])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

"""Finished runs beside each other: scores over seeds, what their difference is worth, and what they wrote."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sacrebleu

from prefix_tuning import bootstrap, metrics, page
from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import guarded, read_json, read_lines, replace
from prefix_tuning.metrics import resampling
from prefix_tuning.progress import aligned, shown
from prefix_tuning.record import WORKDIR, differences

SHOWN = 5  # records on standard output; a page has all
PAGES = (".html", ".md")


class Run(NamedTuple):
    """What a finished run wrote for the records of a split."""

    name: str  # its folder
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # source, prediction, references


class Setting(NamedTuple):
    """A run, or several that differ in their seed."""

    name: str
    runs: list[Run]


class Tested(NamedTuple):
    """Two settings and the difference between them."""

    title: str
    rows: list[list[str]]  # the head first
    notes: list[str]


class Compared(NamedTuple):
    """Everything that is shown."""

    title: str
    scores: list[list[str]]  # the head first
    tests: list[Tested]
    settings: list[Setting]
    closeness: np.ndarray  # chrF of every record, the mean over the seeds [settings N]


def compare(
    arguments: Sequence[str],
    split: str | None = None,
    names: Sequence[str] | None = None,
    samples: int = 1000,
    output: str | None = None,
) -> str:
    """Compares settings on the records of a split and returns the text; `output`, .html or .md, has every record.

    An argument is a run's workdir, a folder of runs or several workdirs with commas between them.  The split is the one
    that the runs ended on, the metrics are those of their configs, unless they are given.  Raises `UserError` for what
    is no finished run, for runs of one argument that differ in more than the seed, and for other inputs.
    """
    for name in names or ():
        valid("metric", name, metrics.METRICS)
    if len(arguments) < 2:
        raise UserError(f"compare needs at least two runs, not {len(arguments)}: 'run.py compare A B [C ...]'")
    if output is not None and (Path(output).suffix not in PAGES or not Path(output).resolve().parent.is_dir()):
        raise UserError(
            f"cannot write {output}; expected a name that ends in {' or '.join(PAGES)} in a folder that exists"
        )
    settings = read_settings(arguments, split)
    if names is None:
        names = list(dict.fromkeys(name for run in every(settings) for name in run.config["evaluation"]["metrics"]))
        if not names:
            raise UserError("the runs' configs name no metrics; choose some with --metrics")
    compared = make(settings, names, samples)
    if output is not None:
        write = html if output.endswith(".html") else markdown
        guarded(Path(output).parent, lambda: replace(Path(output), write(compared)))
    return text(compared)


# ---- reading


def read_settings(arguments: Sequence[str], split: str | None) -> list[Setting]:
    """The settings that the arguments name, all on the same inputs."""
    folders = [find_runs(argument) for argument in arguments]
    ended = {folder: read_end(folder) for one in folders for folder in one}
    splits = sorted({summary["split"] for summary in ended.values()})
    if split is None and len(splits) > 1:
        raise UserError(f"the runs ended on different splits: {', '.join(splits)}; choose one with --split")
    split = split or splits[0]
    settings = []
    for argument, one in zip(arguments, folders, strict=True):
        runs = [read_run(folder, split, ended[folder]["steps"]) for folder in one]
        check_seeds(argument, runs)
        settings.append(Setting(argument.rstrip("/"), runs))
    runs = list(every(settings))
    for other in runs[1:]:
        check_inputs(runs[0], other)
    return settings


def find_runs(argument: str) -> list[Path]:
    """The workdirs that an argument names."""
    folders = []
    for part in argument.split(","):
        folder = Path(part)
        if not folder.is_dir():
            raise UserError(f"there is no folder {part!r}; expected {WORKDIR}, or a folder of several")
        below = sorted(path.parent for path in folder.glob("*/config.json"))
        folders += [folder] if (folder / "config.json").exists() or not below else below
    return folders


def read_end(folder: Path) -> dict[str, Any]:
    """A run's summary."""
    read_json(folder / "config.json", WORKDIR)
    if not (folder / "summary.json").exists():
        raise UserError(f"the run {folder} is not finished (it has no summary.json); the command that began it goes on")
    summary = read_json(folder / "summary.json", WORKDIR)
    if not {"split", "steps"} <= summary.keys():
        raise UserError(f"{folder / 'summary.json'} lacks 'split' or 'steps'; expected {WORKDIR}")
    return summary


def read_run(folder: Path, split: str, steps: int) -> Run:
    """A run with the predictions of its end: those of training's last step, or those that 'run.py eval' wrote."""
    kept = folder / "predictions"
    file = next((path for path in (kept / f"{split}_{steps}.jsonl", kept / f"{split}.jsonl") if path.exists()), None)
    if file is None:
        there = sorted(path.stem.removesuffix(f"_{steps}") for path in kept.glob("*.jsonl"))
        raise UserError(
            f"the run {folder} has no predictions for the split {split!r} from after its last step; it has: "
            f"{', '.join(there) or 'none'}; 'run.py eval --workdir={folder} --split={split}' writes them"
        )
    rows = read_lines(file)
    for number, row in enumerate(rows, start=1):
        texts = [row.get("source"), row.get("prediction"), *(row.get("references") or [None])]
        if not all(isinstance(one, str) for one in texts):
            raise UserError(f"{file}:{number} lacks a text for source, prediction or references; expected {WORKDIR}")
    if not rows:
        raise UserError(f"{file} is empty; expected {WORKDIR}")
    return Run(str(folder), read_json(folder / "config.json", WORKDIR), rows)


def check_seeds(argument: str, runs: list[Run]) -> None:
    """Raises `UserError` for runs that are not several seeds of one setting."""
    seeds: dict[int, Run] = {}
    for run in runs:
        one = {key: value for key, value in run.config.items() if key != "seed"}
        first = {key: value for key, value in runs[0].config.items() if key != "seed"}
        if differing := differences(first, one):
            raise UserError(
                f"{argument} is not one setting with several seeds: {runs[0].name} and {run.name} differ in "
                f"{'; '.join(differing)}; give them one by one"
            )
        seed = run.config.get("seed")
        if seed in seeds:
            raise UserError(f"{argument} has the seed {seed} twice, {seeds[seed].name} and {run.name}: it counts once")
        seeds[seed] = run


def check_inputs(first: Run, other: Run) -> None:
    """Raises `UserError`, naming the first difference, unless two runs answered the same inputs."""
    between = f"{first.name} and {other.name} did not answer the same inputs"
    if len(first.rows) != len(other.rows):
        raise UserError(f"{between}: {len(first.rows)} records and {len(other.rows)}")
    for number, (one, two) in enumerate(zip(first.rows, other.rows, strict=True), start=1):
        for key in ("source", "references"):
            if one[key] != two[key]:
                raise UserError(f"{between}: {key} of record {number} is {one[key]!r} and {two[key]!r}")


def every(settings: Sequence[Setting]) -> Iterator[Run]:
    """The runs of all settings."""
    return (run for setting in settings for run in setting.runs)


# ---- numbers


def columns(run: Run) -> tuple[list[str], list[list[str]], list[str]]:
    """(predictions, references, sources), as metrics take them."""
    return tuple([row[key] for row in run.rows] for key in ("prediction", "references", "source"))


def make(settings: list[Setting], names: Sequence[str], samples: int) -> Compared:
    """Scores every run, and tests each setting against the first."""
    try:
        scores = [[metrics.score(names, *columns(run)) for run in setting.runs] for setting in settings]
    except ValueError as error:
        raise UserError(str(error)) from error
    keys = list(dict.fromkeys(key for setting in scores for run in setting for key in run))
    rows = [["", "runs", *keys]]
    for setting, runs in zip(settings, scores, strict=True):
        rows.append([setting.name, str(len(runs)), *(spread([run.get(key) for run in runs]) for key in keys)])
    tests = []
    for other, found in zip(settings[1:], scores[1:], strict=True):
        tests.append(test(settings[0], other, names, scores[0], found, samples))
    if len(tests) > 1:
        tests[-1].notes.append(f"{len(tests)} comparisons with the first setting: no p is corrected for their number")
    closeness = [np.mean([chrf(run) for run in setting.runs], axis=0) for setting in settings]
    size = len(settings[0].runs[0].rows)
    return Compared(f"{len(settings)} settings on {size} records", rows, tests, settings, np.array(closeness))


def chrf(run: Run) -> list[float]:
    """Of each record alone, whatever the metrics: of all that there are, it tells most about one short text."""
    return [sacrebleu.sentence_chrf(row["prediction"], row["references"]).score for row in run.rows]


def spread(values: list[float | None]) -> str:
    """A score's mean and standard deviation over seeds."""
    if None in values:
        return shown(None)
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return shown(statistics.fmean(values)) + deviation


def test(
    first: Setting,
    other: Setting,
    names: Sequence[str],
    first_scores: list[dict[str, float | None]],
    other_scores: list[dict[str, float | None]],
    samples: int,
) -> Tested:
    """Paired bootstrap of every score, and approximate randomisation where each setting is one run."""
    runs, plain = [*first.runs, *other.runs], [*first_scores, *other_scores]
    size, counts = len(runs[0].rows), (len(first.runs), len(other.runs))
    rows = [["", "difference", "95 % interval", "p", "p, randomised", "resamples"]]
    untested, notes = [key for key in plain[0] if all(one.get(key) is not None for one in plain)], []
    for name in names:
        if name in resampling.LEFT_OUT:
            notes.append(f"{name} is not tested: {resampling.LEFT_OUT[name]}")
            continue
        scorers, both, most = make_scorers(name, runs)
        drawn = samples if most is None else min(samples, most)
        check_scorers(scorers, plain, size)
        found = bootstrap.paired(scorers[: counts[0]], scorers[counts[0] :], size, drawn)
        swapped = bootstrap.randomised(both, size, drawn) if both else {}
        for key, one in found.items():
            if key not in untested:  # a score that a run does not have
                continue
            untested.remove(key)
            one = one._replace(randomised=swapped.get(key))
            interval = f"[{one.low:+.4f}, {one.high:+.4f}]"
            p = "" if one.randomised is None else f"{one.randomised:.4f}"
            rows.append([key, f"{one.value:+.4f}", interval, f"{one.p:.4f}", p, str(one.samples)])
    if untested and not notes:
        notes.append(f"not tested, since a resample need not have it: {', '.join(untested)}")
    if counts == (1, 1):
        notes.append("one run each: this is about other records, and says nothing about other seeds")
    elif min(counts) == 1:
        notes.append("one seed on one side: how much that side varies between seeds is not part of the interval")
    elif min(counts) < 5:
        notes.append("an interval from fewer than five seeds a side is still too narrow")
    seeds = "" if counts == (1, 1) else f" and of {counts[0]} and {counts[1]} seeds"
    return Tested(f"{other.name} minus {first.name}: paired bootstrap of {size} records{seeds}", rows, notes)


def make_scorers(name: str, runs: list[Run]) -> tuple[list[bootstrap.Scores], bootstrap.Scores | None, int | None]:
    """(a function for each run, one of both where there are two, the most resamples or None)."""
    if len(runs) > 2:
        made = [resampling.resampled(name, *columns(run)) for run in runs]
        return [scores for scores, _ in made], None, made[0][1]
    one, two = map(columns, runs)
    both, most = resampling.resampled(name, *(ours + theirs for ours, theirs in zip(one, two, strict=True)))

    def first(counts: np.ndarray) -> dict[str, np.ndarray]:
        return both(np.concatenate([counts, np.zeros_like(counts)], axis=1))

    def second(counts: np.ndarray) -> dict[str, np.ndarray]:
        return both(np.concatenate([np.zeros_like(counts), counts], axis=1))

    return [first, second], both, most


def check_scorers(scorers: list[bootstrap.Scores], plain: list[dict[str, float | None]], size: int) -> None:
    """Raises `RuntimeError` if what is resampled is not the metric, as a new version of sacreBLEU might have it."""
    for scores, right in zip(scorers, plain, strict=True):
        for key, (value,) in scores(np.ones((1, size))).items():
            if right.get(key) is not None and not np.isclose(value, right[key], rtol=1e-6, atol=1e-9):
                raise RuntimeError(f"{key} is {right[key]}, but {value} from its statistics")


# ---- showing


def order(compared: Compared) -> list[int]:
    """The records, those first on which the settings differ most."""
    return np.argsort(-np.ptp(compared.closeness, axis=0), kind="stable").tolist()


def answers(compared: Compared, record: int) -> Iterator[tuple[str, float, list[tuple[str, str]]]]:
    """(setting, its chrF, [(run, prediction)]) of a record."""
    for setting, closeness in zip(compared.settings, compared.closeness, strict=True):
        yield setting.name, closeness[record], [(run.name, run.rows[record]["prediction"]) for run in setting.runs]


def text(compared: Compared) -> str:
    """The tables, and the few records on which the settings differ most."""
    lines = [compared.title, "", *aligned(compared.scores)]
    for one in compared.tests:
        lines += ["", one.title, *aligned(one.rows), *one.notes]
    records, differing = compared.settings[0].runs[0].rows, np.count_nonzero(np.ptp(compared.closeness, axis=0))
    lines += ["", f"chrF differs on {differing} of {len(records)} records" + (", most on these:" if differing else "")]
    for record in order(compared)[: min(SHOWN, differing)]:
        shown_rows = [("", "source", records[record]["source"]), ("", "reference", records[record]["references"][0])]
        for name, closeness, written in answers(compared, record):
            shown_rows += [(f"{closeness:.1f}" if i == 0 else "", name, one) for i, (_, one) in enumerate(written)]
        width = max(len(name) for _, name, _ in shown_rows)
        lines += ["", f"record {record + 1}"]
        lines += [f"  {score:>5}  {name:{width}}  {' '.join(one.split())}" for score, name, one in shown_rows]
    return "\n".join(lines)


def markdown(compared: Compared) -> str:
    """All of it as Markdown, every record included."""

    def line(cells: Sequence[str]) -> str:
        shown_cells = (" ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(cell.replace('<', '&lt;') for cell in shown_cells)} |"

    def rows(table: list[list[str]]) -> list[str]:
        return [line(table[0]), line(["---"] * len(table[0])), *map(line, table[1:])]

    lines = [f"# {compared.title}", "", *rows(compared.scores)]
    for one in compared.tests:
        lines += ["", f"## {one.title}", "", *rows(one.rows), *(f"\n{note}" for note in one.notes)]
    table = [["record", "source", "references", *(setting.name for setting in compared.settings)]]
    records = compared.settings[0].runs[0].rows
    for record in order(compared):
        cells = [f"{chrf:.1f}: {' / '.join(one for _, one in runs)}" for _, chrf, runs in answers(compared, record)]
        given = [records[record]["source"], " / ".join(records[record]["references"])]
        table.append([str(record + 1), *given, *cells])
    lines += ["", "## Every record, by how much chrF differs", "", *rows(table)]
    return "\n".join(lines) + "\n"


def html(compared: Compared) -> str:
    """All of it as a page, every record included, to be sorted by a click and filtered by what is typed."""
    parts = [page.plain_table(compared.scores)]
    for one in compared.tests:
        parts += [f"<h2>{page.escape(one.title)}</h2>", page.plain_table(one.rows)]
        parts += [f'<p class="note">{page.escape(note)}</p>' for note in one.notes]
    records, rows = compared.settings[0].runs[0].rows, []
    for record in order(compared):
        differ = float(np.ptp(compared.closeness[:, record]))
        cells = [
            page.cell(str(record + 1), number=True),
            page.cell(f"{differ:.1f}", differ, number=True),
            page.cell(page.escape(records[record]["source"])),
            page.cell("\n".join(map(page.escape, records[record]["references"]))),
        ]
        for _, closeness, written in answers(compared, record):
            named = (f"<small>{page.escape(name)}</small>\n" if len(written) > 1 else "" for name, _ in written)
            texts = [name + page.escape(one) for name, (_, one) in zip(named, written, strict=True)]
            cells.append(page.cell(f"<small>{closeness:.1f}</small>\n" + "\n".join(texts), closeness))
        rows.append(cells)
    head = ["record", "difference", "source", "references", *(setting.name for setting in compared.settings)]
    parts += [
        '<section><h2>Every record</h2><p class="note">The small numbers are each record\'s chrF, the mean over seeds. '
        "A click on a head sorts.</p>",
        '<input class="filter" type="search" placeholder="show records that contain ...">',
        page.table(head, rows, sortable=True),
        "</section>",
    ]
    return page.document(compared.title, "\n".join(parts))

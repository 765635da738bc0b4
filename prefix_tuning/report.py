"""One HTML page about every run below a folder: table, settings, curves, samples; it needs no network to be read.

Nothing that a run has written is trusted: text is escaped, a file that cannot be read is a line on the page, and the
page's policy lets no script run but its own.
"""

import base64
import hashlib
import html
import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from prefix_tuning.errors import UserError
from prefix_tuning.files import guarded, lines_of, read_json, read_text, replace
from prefix_tuning.state import State, look

PAGE = Path(__file__).with_name("report_page.html")
MARKS = ("summary.json", "metrics.jsonl", "environment.json", "exit_code")  # a folder with one of them is a run's
INSIDE = ("checkpoints", "predictions", "tensorboard", "adapter", "slurm")  # folders that hold no runs
SAMPLES = 12  # inputs that are shown
ANSWERS = 12  # different ones to an input before the rest is folded
EACH = 2  # of a run none of whose inputs is among them
WORKDIR = "what 'run.py train' writes"
READ = 200  # first predictions of a run that are looked at
LONG = 2000  # characters of a text that are shown
ACROSS = 6  # runs that stand side by side in the settings' table; more are below each other
POINTS = 400  # of a curve that are drawn
UNTUNED = "untuned"


class Found(NamedTuple):
    """What a run's folder holds."""

    name: str
    folder: Path
    state: State
    settings: dict[str, Any]  # "section.key" -> value
    environment: dict[str, Any]
    curves: dict[str, list[tuple[int, float | None]]]
    scores: dict[str, dict[str, Any]]  # of each eval_SPLIT.json
    samples: dict[str, list[dict[str, Any]]]  # the last predictions of each split, and the untuned model's


def write(workdir: str, output: str | None = None) -> Path:
    """Writes the page, into the folder itself unless told otherwise; returns its path.

    Raises `UserError` if there is no run, or the page cannot be written.
    """
    root = Path(workdir)
    problems: list[str] = []
    folders = find(root)
    if not folders:
        raise UserError(f"there is no run in {root} or below it; expected folders made by 'run.py train' or 'sweep'")
    runs = [read(root, folder, problems) for folder in folders]
    path = Path(output) if output else root / "report.html"
    text = page(root.resolve().name, runs, problems)
    guarded(path.parent, lambda: (path.parent.mkdir(parents=True, exist_ok=True), replace(path, text)))
    return path


def find(root: Path) -> list[Path]:
    """The folders of runs, at any depth, in the order of their names with numbers as numbers."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in INSIDE]
        if any(mark in files for mark in MARKS):
            found.append(Path(folder))
    return sorted(found, key=lambda path: [(p.isdigit(), int(p) if p.isdigit() else p) for p in pieces(path)])


def pieces(path: Path) -> list[str]:
    """A path's digits and what is between them."""
    return [piece for piece in re.split(r"([0-9]+)", str(path)) if piece]


# ---- what a run has left


def read(root: Path, folder: Path, problems: list[str]) -> Found:
    """Everything about a run, with a line in `problems` for each file that is not what it should be."""
    name = folder.relative_to(root).as_posix()
    name = root.resolve().name if name == "." else name

    def json_of(file: str) -> dict[str, Any]:
        try:
            return read_json(folder / file, WORKDIR) if (folder / file).exists() else {}
        except UserError as error:
            problems.append(str(error))
            return {}

    state = look(folder)
    if state.name == "failed":
        problems.append(f"{name}: {state.note}")
    curves: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines(folder / "metrics.jsonl", problems):
        step = line.get("step")
        for key, value in line.items():
            if isinstance(step, int) and key != "step" and (value is None or isinstance(value, int | float)):
                curves.setdefault(key, []).append((step, number(value)))
    scores = {file.stem.removeprefix("eval_"): json_of(file.name) for file in sorted(folder.glob("eval_*.json"))}
    newest: dict[str, tuple[int, Path]] = {}
    for file in (folder / "predictions").glob("*.jsonl"):
        split, _, step = file.stem.rpartition("_")
        if file.stem == UNTUNED:
            newest[UNTUNED] = (0, file)
        elif split and step.isdigit():
            newest[split] = max(newest.get(split, (-1, file)), (int(step), file))
    samples = {split: lines(file, problems, READ) for split, (_, file) in newest.items()}
    settings = flat(json_of("config.json"))
    return Found(name, folder, state, settings, flat(json_of("environment.json")), curves, scores, samples)


def lines(file: Path, problems: list[str], most: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that may not exist, less a last line that a kill has cut short."""
    if not file.exists():
        return []
    try:
        texts = lines_of(read_text(file))
    except UserError as error:
        problems.append(str(error))
        return []
    rows, bad = [], []
    for place, text in enumerate(texts[:most], start=1):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            rows.append(value)
        elif value is not None or place < len(texts):
            bad.append(place)
    if bad:
        problems.append(f"{file}:{bad[0]} is no JSON object" + (f", nor are {len(bad) - 1} more" * (len(bad) > 1)))
    return rows


def flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    found = {}
    for key, inner in value.items():
        name = f"{path}.{key}" if path else key
        found |= flat(inner, name) if isinstance(inner, dict) and inner else {name: inner}
    return found


def number(value: Any) -> float | None:
    """A value if it is a number that can be drawn."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else None


def differing(tables: list[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of them."""
    keys = dict.fromkeys(key for one in tables for key in one)
    return [key for key in keys if len({json.dumps(one.get(key, ...), default=str) for one in tables}) > 1]


# ---- the page


def page(title: str, runs: list[Found], problems: list[str]) -> str:
    """The whole page."""
    sections = {
        "Runs": overview(runs),
        "Settings": settings(runs),
        "Curves": curves(runs),
        "Samples": samples(runs),
        "Environment": environment(runs),
    }
    sections = {name: body for name, body in sections.items() if body}
    counts = [(name, sum(state_of(run)[0] == name for run in runs)) for name in ("finished", "failed", "unfinished")]
    states = ", ".join(f"{count} {name}" for name, count in counts if count)
    when = time.strftime("%Y-%m-%d %H:%M")
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="soft">{len(runs)} run{"s" * (len(runs) > 1)}: {states}. {when}</p></header>',
        "<nav>" + "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections) + "</nav>",
    ]
    if problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        body.append(
            f'<section class="problems card"><b>What went wrong or cannot be read</b><ul>{items}</ul></section>'
        )
    body += [f'<section id="{name.lower()}"><h2>{name}</h2>{text}</section>' for name, text in sections.items()]
    template = PAGE.read_text()
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = [{"name": run.name, "hue": hue(i, len(runs)), "dash": i // 12 % 4} for i, run in enumerate(runs)]
    parts = {
        "title": escape(title),
        "hash": f"sha256-{digest}",
        "body": "\n".join(body),
        # What could end the element must not be in it; JSON says it by number.
        "data": json.dumps({"runs": drawn, "charts": charts(runs)}).replace("<", "\\u003c"),
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # once: what is put in may hold braces
    return text.encode("utf-8", "replace").decode()


def escape(text: object) -> str:
    """Text for any place of the page, cut if it is very long; characters that no page may hold are shown as such."""
    text = str(text)
    text = text if len(text) <= LONG else f"{text[:LONG]} … ({len(text) - LONG:,} more characters)"
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text))


def hue(index: int, count: int) -> int:
    """A run's colour: around the circle if they are few, else each far from the one before."""
    return round((255 + index * (360 / count if count <= 8 else 137.508)) % 360)


def swatch(index: int, count: int) -> str:
    """A run's colour as a mark before its name."""
    return f'<i class="swatch" style="--hue:{hue(index, count)}"></i>'


def named(runs: list[Found], index: int) -> str:
    """The head of a run's row."""
    name = escape(runs[index].name)
    return f'<th scope="row" data-value="{name}" title="{name}">{swatch(index, len(runs))}{name}</th>'


def grid(heads: list[tuple[str, bool]], rows: Iterable[tuple[str, list[str]]]) -> str:
    """A table that can be sorted: heads with whether their column holds numbers, rows with a head of their own."""
    head = "".join(
        f'<th scope="col" data-sort{" class=number" * is_number}>{escape(name)}</th>' for name, is_number in heads
    )
    body = "".join(f"<tr>{first}{''.join(cells)}</tr>" for first, cells in rows)
    return f'<div class="card scroll tall"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value: Any, form: str = "", style: str = "") -> str:
    """A table's cell: a number in the form given, or text."""
    if value is ...:
        return '<td data-value=""></td>'
    if form and number(value) is not None:
        return f'<td class="number" data-value="{value!r}">{value:{form}}</td>'
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f'<td class="long {style}" data-value="{escape(text)}" title="{escape(text)}">{escape(text)}</td>'


def state_of(run: Found) -> tuple[str, str]:
    """A run's state, with what there is to say of it; whether an unfinished one still runs cannot be known here."""
    if run.state.name in ("finished", "failed"):
        return run.state.name, run.state.name
    return "unfinished", f"unfinished, {run.state.note}"


def overview(runs: list[Found]) -> str:
    """Scores and cost of every run, and those of other splits that were evaluated later."""
    summaries = [run.state.summary or {} for run in runs]
    names = list(dict.fromkeys(name for summary in summaries for name in summary.get("tuned", {})))
    costs: dict[str, tuple[Callable, str]] = {
        "trained": (lambda s: s["parameters"].get("trained", ...), ",d"),
        "steps": (lambda s: s.get("steps", ...), ",d"),
        "minutes": (lambda s: s["seconds"] / 60, ".1f"),
        "s / step": (lambda s: s.get("seconds_per_step", ...), ".3f"),
        "peak MiB": (lambda s: s.get("peak_memory_mb", ...), ",d"),
    }

    def row(index: int) -> list[str]:
        name, text = state_of(runs[index])
        summary = summaries[index]
        cells = [cell(text, style=name), *(cell(summary.get("tuned", {}).get(key, ...), ".4f") for key in names)]
        return cells + [cell(get(summary) if summary else ..., form) for get, form in costs.values()]

    rows = [(named(runs, i), row(i)) for i in range(len(runs))]
    before = {json.dumps(summary["untuned"]): summary["untuned"] for summary in summaries if summary.get("untuned")}
    for i, scores in enumerate(before.values(), start=1):  # more than one where models or data differ
        label = UNTUNED + f" ({i})" * (len(before) > 1)
        head = f'<th scope="row" data-value="{label}"><i class="swatch plain"></i>{label}</th>'
        rows.append(
            (head, [cell(...), *(cell(scores.get(key, ...), ".4f") for key in names), *[cell(...)] * len(costs)])
        )
    heads = [("run", False), ("state", False), *((name, True) for name in [*names, *costs])]
    splits = sorted({f"{s['split']} split" for s in summaries if "split" in s})
    note = f'<p class="soft">Scores after training, on the {escape(" or the ".join(splits))}.</p>' if splits else ""
    return grid(heads, rows) + note + evaluations(runs, summaries)


def evaluations(runs: list[Found], summaries: list[dict[str, Any]]) -> str:
    """The splits that `run.py eval` has scored beside the one in the summary."""
    others = [
        (i, split, scores)
        for i, run in enumerate(runs)
        for split, scores in run.scores.items()
        if split != summaries[i].get("split")
    ]
    if not others:
        return ""
    names = list(dict.fromkeys(name for _, _, scores in others for name in scores if name != "step"))
    heads = [("run", False), ("split", False), ("step", True), *((name, True) for name in names)]
    rows = [
        (
            named(runs, i),
            [
                cell(split),
                cell(scores.get("step", ...), ",d"),
                *(cell(scores.get(name, ...), number_form(name)) for name in names),
            ],
        )
        for i, split, scores in others
    ]
    return f"<h3>Other splits</h3>{grid(heads, rows)}"


def number_form(name: str) -> str:
    """How a value of an evaluation is written."""
    return ",d" if name == "records" else ".4f"


def settings(runs: list[Found]) -> str:
    """The settings in which runs differ, and those that they share."""
    tables = [run.settings for run in runs if run.settings]
    if not tables:
        return ""
    keys = differing(tables)
    shared = {key: value for key, value in tables[0].items() if key not in keys}
    few = len(runs) <= ACROSS
    values = [[cell(run.settings.get(key, ...), "" if few else "g") for key in keys] for run in runs]
    if few:
        heads = [("setting", False), *((run.name, False) for run in runs)]
        rows = [
            (f'<th scope="row" data-value="{escape(key)}">{escape(key)}</th>', [row[k] for row in values])
            for k, key in enumerate(keys)
        ]
    else:
        heads = [("run", False), *((key, all(number(t.get(key)) is not None for t in tables)) for key in keys)]
        rows = [(named(runs, i), row) for i, row in enumerate(values)]
    text = grid(heads, rows) if keys else ""
    label = f"{len(shared)} settings that all runs share" if len(runs) > 1 else f"{len(shared)} settings"
    return text + folded(label, pairs(shared))


def folded(label: str, text: str) -> str:
    """Something that a click unfolds."""
    return f"<details><summary>{label}</summary>{text}</details>"


def pairs(values: dict[str, Any]) -> str:
    """Names and values as a table."""
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th>{cell(value)}</tr>' for key, value in values.items())
    return f'<div class="card scroll"><table><tbody>{rows}</tbody></table></div>'


def charts(runs: list[Found]) -> list[dict[str, Any]]:
    """What is drawn: every metric that some run has told at two steps or more, losses and scores before the rest."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    found = []
    for name in names:
        series, thinned = [], False
        for i, run in enumerate(runs):
            told = run.curves.get(name, [])
            kept = thin(told)
            thinned |= len(kept) < len(told)
            if any(value is not None for _, value in kept):
                series.append([i, [step for step, _ in kept], [value for _, value in kept]])
        if any(len(steps) > 1 for _, steps, _ in series):
            main = name == "train/loss" or not name.startswith("train/")
            note = f"thinned to the extremes of {POINTS // 2} intervals" if thinned else ""
            found.append({"name": name, "group": "main" if main else "more", "note": note, "series": series})
    return found


def thin(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """A curve of at most `POINTS` points: the lowest and the highest of every interval, so that no peak is lost."""
    if len(points) <= POINTS:
        return points
    kept: list[tuple[int, float | None]] = []
    size = math.ceil(len(points) / (POINTS // 2))
    for start in range(0, len(points), size):
        part = [point for point in points[start : start + size] if point[1] is not None]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} if part else {points[start]}
        kept += sorted(ends)
    return kept


def curves(runs: list[Found]) -> str:
    """Where the page's script draws."""
    groups = {chart["group"] for chart in charts(runs)}
    if not groups:
        return ""
    text = '<div class="legend"></div><noscript><p>The curves are drawn by the script of this page.</p></noscript>'
    if "main" in groups:
        text += '<div class="charts" data-group="main"></div>'
    if "more" in groups:
        text += folded("More of training", '<div class="charts" data-group="more"></div>')
    return text


def samples(runs: list[Found]) -> str:
    """The same inputs through every run, equal answers once; inputs that most runs have come first."""
    answers: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}  # (split, source, which) -> run -> row
    for i, run in enumerate(runs):
        split = final_split(run)
        for key, row in numbered(run.samples.get(split, []) if split else []):
            answers.setdefault((split, *key), {})[i] = row
    chosen = sorted(answers, key=lambda key: -len(answers[key]))[:SAMPLES]
    for i in range(len(runs)):
        own = [key for key in answers if i in answers[key]]
        if not any(key in chosen for key in own):
            chosen += own[:EACH]
    bare = [(final_split(run), dict(numbered(run.samples.get(UNTUNED, [])))) for run in runs]
    cards = []
    for key in chosen:
        split, *place = key
        before = {
            text_of(rows[tuple(place)].get("prediction")): None
            for i, (of, rows) in enumerate(bare)
            if of == split and i in answers[key] and tuple(place) in rows
        }
        cards.append(card(runs, split, answers[key], list(before)))
    if not cards:
        return ""
    total = len(answers)
    note = f"{len(cards)} of the first {total}" if total > len(cards) else f"{total}"
    return f'<p class="soft">{note} inputs, decoded at each run\'s last evaluation.</p>' + "".join(cards)


def final_split(run: Found) -> str | None:
    """The split whose predictions are shown: the final one, else the one that training evaluates on."""
    wanted = [run.settings.get(f"evaluation.{key}") for key in ("final_split", "split")]
    return next((split for split in [*wanted, *run.samples] if split in run.samples and split != UNTUNED), None)


def numbered(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, int], dict[str, Any]]]:
    """Rows by source, and which of those with this source."""
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        source = text_of(row.get("source"))
        seen[source] = seen.get(source, -1) + 1
        found.append(((source, seen[source]), row))
    return found


def text_of(value: Any) -> str:
    """A source or an answer as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def card(runs: list[Found], split: str, answers: dict[int, dict[str, Any]], before: list[str]) -> str:
    """One input, its references, and what each run made of it."""
    row = next(iter(answers.values()))
    references = row.get("references")
    references = [text_of(one) for one in (references if isinstance(references, list) else [references])]
    rows = [(f"source, {escape(split)}", f"<p>{escape(text_of(row.get('source')))}</p>")]
    rows.append(
        ("references" if len(references) > 1 else "reference", "".join(f"<p>{escape(r)}</p>" for r in references))
    )
    groups: dict[str, list[int]] = {}
    for i, own in answers.items():
        groups.setdefault(text_of(own.get("prediction")), []).append(i)
    text = "".join(f"<dt>{name}</dt><dd dir=auto>{value}</dd>" for name, value in rows) + '<div class="rule"></div>'
    for prediction in before:
        text += f'<dt><div><i class="swatch plain"></i>{UNTUNED}</div></dt>{answer(prediction, references)}'
    entries = []
    for prediction, members in groups.items():
        shown = members if len(members) <= 12 else members[:10]
        names = "".join(f"<div>{swatch(i, len(runs))}{escape(runs[i].name)}</div>" for i in shown)
        names += f"and {len(members) - len(shown)} more" * (len(shown) < len(members))
        entries.append(f"<dt>{names}</dt>{answer(prediction, references)}")
    text = f"<dl>{text}{''.join(entries[:ANSWERS])}</dl>"
    if left := entries[ANSWERS:]:
        text += folded(f"{len(left)} more answers", f"<dl>{''.join(left)}</dl>")
    return f'<article class="sample card">{text}</article>'


def answer(prediction: str, references: list[str]) -> str:
    """One prediction."""
    if not prediction:
        return '<dd class="empty">(empty)</dd>'
    same = ' <span class="same" title="equal to a reference">✓</span>' if prediction in references else ""
    return f"<dd dir=auto>{escape(prediction)}{same}</dd>"


def environment(runs: list[Found]) -> str:
    """Where, when and with what the runs were made."""
    tables = [dict(run.environment) for run in runs]
    for table in tables:
        command = table.get("command")
        if isinstance(command, list):
            table["command"] = shlex.join(map(str, command))
    known = [table for table in tables if table]
    if not known:
        return ""
    keys = differing(known) if len(runs) > 1 else []
    shared = {key: value for key, value in known[0].items() if key not in keys}
    text = pairs(shared)
    if keys:
        rows = [(named(runs, i), [cell(table.get(key, ...)) for key in keys]) for i, table in enumerate(tables)]
        text += folded("What differs between the runs", grid([(key, False) for key in ["run", *keys]], rows))
    return text

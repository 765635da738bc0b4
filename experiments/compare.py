"""Which method should I take?  Every method on one task: a learning rate found for each, several seeds, one table.

    python -m experiments.compare --config=configs/e2e_smollm2.py --workdir=runs/compare --output=table.md \\
        --config.model.name=FOLDER --config.dataset.path=FOLDER --config.train.epochs=1

For each method, runs on `--search` pairs at the config's learning rate times each of `--factors` choose the rate by
validation loss; then one run per seed trains on all pairs and is scored on the test split, in a process of its own, so
that its peak memory is its own.  Last, one process takes a step of each method in turn, `--rounds` times, so that all
meet the same noise of the machine.  The same command again goes on where it stopped; `--report` only writes the table
of what is there.  Where the data set's folder has no test file, the validation records are halved: the first half
chooses, the second is scored.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
from absl import flags

import run
from prefix_tuning import parallel, setup
from prefix_tuning.train_step import make_train_step

ROOT = Path(__file__).resolve().parent.parent
METHODS = (
    "prefix",
    "prompt",
    "lora",
    "adapter",
    "finetune",
    "mam",
    "ptuning",
    "bitfit",
    "ft_top2",
    "memory",
    "infix",
    "unipelt",
    "propagation",
)
FILES = {split: f"src1_{name}.txt" for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))}
FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "FILE", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "where all runs go", flag_values=FLAGS)
flags.DEFINE_string("output", None, "where the table goes", flag_values=FLAGS)
flags.DEFINE_list("methods", list(METHODS), "which of them", flag_values=FLAGS)
flags.DEFINE_list("seeds", ["0", "1"], "a run each", flag_values=FLAGS)
flags.DEFINE_list("factors", ["0.3333", "1", "3"], "of the config's learning rate", flag_values=FLAGS)
flags.DEFINE_integer("search", 192, "pairs to choose the learning rate with", flag_values=FLAGS)
flags.DEFINE_integer("search_records", 30, "validation records to choose it by", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 7, "of timing", flag_values=FLAGS)
flags.DEFINE_bool("report", False, "only the table", flag_values=FLAGS)


def train(workdir: Path, config: str, options: list[str]) -> dict | None:
    """The summary of `run.py train` with these options, in a process of its own; None if it failed."""
    summary = workdir / "summary.json"
    if not summary.exists():
        command = [
            sys.executable,
            str(ROOT / "run.py"),
            "train",
            f"--config={config}",
            f"--workdir={workdir}",
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode < 0 or done.returncode > 128:
            sys.exit(done.returncode)  # stopped: so are we
        if done.returncode:
            print(f"{workdir}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
    return json.loads(summary.read_text())


def rate(config: str, method: str) -> float:
    """The learning rate that the config gives a method."""
    return run.load_config(f"{config}:method={method}").optimizer.learning_rate


def loss_only() -> list[str]:
    """The options of a run that decodes nothing."""
    evaluation = {"metrics": "()", "final_split": "validation", "examples": FLAGS.search_records}
    return [f"--config.evaluation.{name}={value}" for name, value in evaluation.items()]


def search(root: Path, config: str, method: str, options: list[str]) -> dict[float, float]:
    """Learning rate -> validation loss; one that diverged is left out."""
    if len(FLAGS.factors) == 1:  # nothing to choose between
        return {float(f"{rate(config, method) * float(FLAGS.factors[0]):.1e}"): 0.0}
    losses = {}
    for factor in FLAGS.factors:
        learning_rate = float(f"{rate(config, method) * float(factor):.1e}")
        own = [
            f"--config.optimizer.learning_rate={learning_rate}",
            f"--config.train.examples={FLAGS.search}",
            "--config.train.epochs=1",
            *loss_only(),
        ]
        found = train(root / "search" / method / f"{learning_rate}", f"{config}:method={method}", [*options, *own])
        if found:
            losses[learning_rate] = found["tuned"]["loss"]
    return losses


def score(root: Path, config: str, method: str, seed: str, learning_rate: float, options: list[str]) -> None:
    """One run to its end, scored on the test split."""
    workdir = root / "final" / method / seed
    shared, own = root / "untuned.jsonl", workdir / "predictions" / "untuned.jsonl"
    if shared.exists() and not own.exists():  # the same for all, so decoded once
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared, own)
    given = [
        f"--config.seed={seed}",
        f"--config.optimizer.learning_rate={learning_rate}",
        "--config.evaluation.metrics=('e2e', 'slots')",
        "--config.evaluation.final_split=test",
    ]
    if train(workdir, f"{config}:method={method}", [*options, *given]) and not shared.exists():
        shutil.copy(own, shared)


def halve(options: list[str], root: Path) -> list[str]:
    """The options with a data set that has a test split: its own, or the second half of its validation records."""
    path = next((o.partition("=")[2] for o in options if o.startswith("--config.dataset.path=")), None)
    if path is None or (Path(path) / FILES["test"]).exists():
        return options
    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(path) / FILES["train"], folder)
    lines = (Path(path) / FILES["validation"]).read_text().splitlines(keepends=True)
    records = list(dict.fromkeys(line.partition("||")[0] for line in lines))
    first = set(records[: len(records) // 2])
    for split, chosen in (("validation", True), ("test", False)):
        kept = [line for line in lines if (line.partition("||")[0] in first) == chosen]
        (folder / FILES[split]).write_text("".join(kept))
    return [o for o in options if not o.startswith("--config.dataset.path=")] + [f"--config.dataset.path={folder}"]


def time_steps(config: str, methods: list[str], options: list[str], rounds: int) -> dict[str, float]:
    """The median seconds of a compiled train step of each method, all on the same batch, a step of each in turn."""
    steps, seconds, weights = {}, {method: [] for method in methods}, None
    for method in methods:
        arguments = ["train", f"--config={config}:method={method}", "--config.train.shapes=1", "--workdir=unused"]
        settings = run.parse([*arguments, *options])[1]["config"]
        base = setup.make_base(settings)
        made = setup.make_run(settings, base)
        weights = weights or parallel.place(setup.loading.load_weights(base.folder, base.model, "float32"))
        frozen = base.method.prepare(jax.random.key(0), base.model, weights)
        body = make_train_step(base.model, base.method, base.objective, made.tx, axis=parallel.AXIS)
        state = parallel.place(setup.fresh_state(settings, base, made, frozen))
        batch = parallel.split_batch(next(iter(made.data.batches(0))), made.train.accumulate)
        steps[method] = [parallel.train_step(body), frozen, state, batch]
    for number in range(rounds + 1):
        for method, own in steps.items():
            step, frozen, state, batch = own
            start = time.perf_counter()
            own[2] = jax.block_until_ready(step(frozen, state, batch)[0])
            if number:  # the first one compiles
                seconds[method].append(time.perf_counter() - start)
    return {method: statistics.median(values) for method, values in seconds.items()}


def spread(values: list[float], digits: int) -> str:
    """The mean, and with several values their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def report(root: Path) -> str:
    """The table of every run that is there, best BLEU first; methods without one are named below it."""
    rows, missing, timed = [], [], root / "seconds_per_step.json"
    steps = json.loads(timed.read_text()) if timed.exists() else {}
    for method in FLAGS.methods:
        runs = [path.parent for path in sorted(root.glob(f"final/{method}/*/summary.json"))]
        if not runs:
            missing.append(method)
            continue
        summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
        config = json.loads((runs[0] / "config.json").read_text())
        tuned = {key: [s["tuned"][key] for s in summaries] for key in ("loss", "bleu", "rouge_l", "slot_accuracy")}
        parameters = summaries[0]["parameters"]
        relative = f"{steps[method] / steps['prefix']:.2f}" if method in steps and "prefix" in steps else "-"
        cells = [
            method,
            f"{config['optimizer']['learning_rate']:g}",
            spread(tuned["loss"], 3),
            spread(tuned["bleu"], 3),
            spread(tuned["rouge_l"], 3),
            spread([100 - x for x in tuned["slot_accuracy"]], 1),
            f"{parameters['trained']:,}",
            f"{parameters['stored'] * 4 / 1000:,.0f}",
            relative,
            f"{max(s['peak_memory_mb'] for s in summaries):,}",
            str(len(runs)),
        ]
        rows.append((statistics.mean(tuned["bleu"]), cells, summaries[0]["untuned"]))
    if not rows:
        raise FileNotFoundError(f"{root} holds no finished run")
    untuned = rows[0][2]
    head = [
        "method",
        "learning rate",
        "loss",
        "BLEU",
        "ROUGE-L",
        "slot error %",
        "trained",
        "stored kB",
        "time per step",
    ]
    head += ["peak MiB", "seeds"]
    bare = ["(untuned)", "-", "-", *(f"{untuned[key]:.3f}" for key in ("bleu", "rouge_l"))]
    bare += [f"{100 - untuned['slot_accuracy']:.1f}", "0", "0", "-", "-", "-"]
    lines = [head, ["---"] * len(head), *(cells for _, cells, _ in sorted(rows, key=lambda row: -row[0])), bare]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return text + (f"\n\nNot run: {', '.join(missing)}." if missing else "")


def main(arguments: list[str]) -> None:
    """Runs what is missing, then writes the table."""
    options = FLAGS(arguments, known_only=True)[1:]
    if not FLAGS.config or not FLAGS.workdir:
        sys.exit("error: expected --config=FILE and --workdir=DIR")
    root = Path(FLAGS.workdir).absolute()
    if not FLAGS.report:
        root.mkdir(parents=True, exist_ok=True)
        options = halve(options, root)
        chosen = {}
        for method in FLAGS.methods:
            losses = search(root, FLAGS.config, method, options)
            print(f"{method}: validation loss by learning rate: {losses}", flush=True)
            if losses:
                chosen[method] = min(losses, key=losses.get)
        for seed in FLAGS.seeds:  # outermost, so that what was cut short has every method
            for method, learning_rate in chosen.items():
                score(root, FLAGS.config, method, seed, learning_rate, options)
        if FLAGS.rounds:
            medians = time_steps(FLAGS.config, FLAGS.methods, options, FLAGS.rounds)
            (root / "seconds_per_step.json").write_text(json.dumps(medians, indent=2) + "\n")
    table = report(root)
    print(table)
    if FLAGS.output:
        Path(FLAGS.output).write_text(table + "\n")


if __name__ == "__main__":
    main(sys.argv)

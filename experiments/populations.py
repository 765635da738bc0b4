"""Does it pay to train several runs in one step?  The runs of a sweep, one after the other and then all at once.

    python -m experiments.populations --config=configs/e2e_smollm2.py --workdir=DIR --output=results.json \\
        --runs=length=1,seed=0,length=5,seed=0 --config.model.name=FOLDER --config.dataset.path=FOLDER

Each of the separate runs, and all of them together, is `run.py train` in a process of its own: what is counted is the
whole command, with imports, loading, compiling, training, evaluation and export.  The same command again uses what is
finished.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

import run

ROOT = Path(__file__).resolve().parent.parent
FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "FILE", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "where all runs go", flag_values=FLAGS)
flags.DEFINE_string("runs", None, "names of the config's sweep", flag_values=FLAGS)
flags.DEFINE_string("output", None, "where the numbers go, as JSON", flag_values=FLAGS)


def timed(names: list[str], folder: Path, options: list[str]) -> tuple[float, list[dict]]:
    """Minutes of the command that trains these runs at once, and their summaries; raises if it fails."""
    clock = folder / f"minutes_{len(names)}_{names[0]}.json"
    if not clock.exists():
        command = [sys.executable, str(ROOT / "run.py"), "train", f"--config={FLAGS.config}", f"--workdir={folder}"]
        start = time.perf_counter()
        subprocess.run([*command, f"--runs={','.join(names)}", *options], check=True)
        clock.write_text(json.dumps((time.perf_counter() - start) / 60))
    return json.loads(clock.read_text()), [json.loads((folder / name / "summary.json").read_text()) for name in names]


def main(arguments: list[str]) -> None:
    """Runs both sides and prints the table."""
    options = FLAGS(arguments, known_only=True)[1:]
    if not FLAGS.config or not FLAGS.workdir or not FLAGS.runs:
        sys.exit("error: expected --config=FILE, --workdir=DIR and --runs=NAME,NAME")
    names = run.named(FLAGS.runs, [one.name for one in run.listed(FLAGS.config)])
    root = Path(FLAGS.workdir).absolute()
    alone = [timed([name], root / "separate", options) for name in names]
    minutes, together = timed(names, root / "together", options)
    separate = [summary for _, (summary,) in alone]
    total = sum(own for own, _ in alone)
    training = [sum(summary["seconds"] for summary in side) / 60 for side in (separate, together)]
    peak = [max(summary["peak_memory_mb"] for summary in side) for side in (separate, together)]
    losses = [[summary["tuned"]["loss"] for summary in side] for side in (separate, together)]
    gap = max(abs(one - other) for one, other in zip(*losses, strict=True))
    rows = [
        ("minutes of all commands", total, minutes),
        ("of them in training", *training),
        ("peak memory of a process, MiB", *peak),
    ]
    print(f"| {len(names)} runs | one by one | at once | ratio |\n|---|---|---|---|")
    for name, one, other in rows:
        print(f"| {name} | {one:,.4g} | {other:,.4g} | {other / one:.2f} |")
    print(f"\nlargest difference of a validation loss: {gap:.2g}")
    if FLAGS.output:
        numbers = {"minutes": [total, minutes], "training": training, "peak_memory_mb": peak, "loss_difference": gap}
        Path(FLAGS.output).write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv)

"""What 8-bit weights lose and save: a prefix trained beside float32 weights, evaluated beside both.

    python -m experiments.quantised --config.model.name=FOLDER --config.dataset.path=FOLDER --steps=24

It takes the config's method and data, batches of 4; then the loss of `--pairs` validation pairs, greedy texts for
`--prompts` records, and `--rounds` rounds of decoding them, the two in turn in one process.  Peak memory is that of a
fresh process for each, which loads the weights and writes 8 tokens.  Prints Markdown.
"""

import copy
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments import in_turn, our_side
from prefix_tuning import evaluate, setup
from prefix_tuning.models import loading
from prefix_tuning.train_step import make_eval_step
from prefix_tuning.types import Params

flags.DEFINE_integer("steps", 24, "of training", lower_bound=1)
flags.DEFINE_integer("pairs", 100, "whose loss is taken", lower_bound=1)
flags.DEFINE_integer("prompts", 20, "that texts are written for", lower_bound=1)
flags.DEFINE_integer("rounds", 3, "of decoding", lower_bound=1)
flags.DEFINE_enum("peak", None, loading.WEIGHTS, "only load such weights, write, and print the peak in MiB")
CONFIG = config_flags.DEFINE_config_file("config", "configs/e2e_smollm2.py")
BATCH = 4


def cut(config: dict[str, Any], weights: str) -> dict[str, Any]:
    """The config with such weights and as much data as is asked for."""
    config, options = copy.deepcopy(config), flags.FLAGS
    config["model"]["weights"] = weights
    config["train"] |= {"batch_size": BATCH, "examples": BATCH * options.steps, "epochs": 1, "shapes": 2}
    config["evaluation"] |= {"examples": None, "pairs": options.pairs, "batch_size": BATCH}
    return config


def peak(config: dict[str, Any]) -> float:
    """MiB at most of loading and writing."""
    base = setup.make_base(config | {"decode": config["decode"] | {"max_new_tokens": 8}})
    frozen = base.layout.place(setup.load_weights(base, config))
    state = base.method.init(jax.random.key(0), base.model, frozen)
    prompts = setup.make_prompts(base, list(setup.load_split(config, "validation").select(range(BATCH))))
    evaluate.make_writer(base, BATCH)(*base.method.bind(frozen, state), prompts, 0)
    return in_turn.host_memory()["peak"]


def fresh_peak(weights: str) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, "-m", "experiments.quantised", *sys.argv[1:], f"--peak={weights}"]
    # A compiled program is loaded, and not compiled, where it lies in the cache: both are to compile.
    own = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    root = Path(__file__).resolve().parents[1]
    return float(subprocess.run(command, cwd=root, env=own, capture_output=True, text=True, check=True).stdout)


def scorer(base: setup.Base, run: setup.Run) -> Callable[[Params, Params], float]:
    """The loss of the validation pairs, beside any weights."""
    layout = base.layout
    step = layout.eval_step(make_eval_step(base.model, base.method, base.objective, axis=layout.axis))

    def loss(frozen: Params, trainable: Params) -> float:
        placed = layout.place(trainable)
        return evaluate.mean_loss(step, layout, frozen, placed, run.split, run, check=lambda: None)["loss"]

    return loss


def main(config: dict[str, Any]) -> None:
    """Trains, compares, prints."""
    options = flags.FLAGS
    if options.peak is not None:
        print(peak(cut(config, options.peak)))
        return
    peaks = {weights: fresh_peak(weights) for weights in loading.WEIGHTS}
    full = cut(config, "full")
    base = setup.make_base(full)
    run = setup.make_run(full, base)
    frozen = {w: base.layout.place(setup.load_weights(base, cut(config, w))) for w in loading.WEIGHTS}
    state = base.layout.place(setup.fresh_state(full, base, run, frozen["full"]))
    step, now = our_side.make_step(base, run.tx, frozen["full"], state)
    for number, batch in enumerate(run.data.batches(0), start=1):
        print(f"step {number}: loss {step(batch):.3f}", file=sys.stderr, flush=True)
    trainable = jax.device_get(now())
    loss = scorer(base, run)
    losses = {w: loss(frozen[w], trainable) for w in loading.WEIGHTS}
    prompts = run.split.prompts[: options.prompts]
    write = evaluate.make_writer(base, len(prompts))
    bound = {w: base.method.bind(frozen[w], base.layout.place(trainable)) for w in loading.WEIGHTS}
    texts = {w: write(*bound[w], prompts, 0) for w in loading.WEIGHTS}
    seconds: dict[str, list[float]] = {w: [] for w in loading.WEIGHTS}
    for _ in range(options.rounds):
        for w in loading.WEIGHTS:
            in_turn.timed(seconds[w], write, *bound[w], prompts, 0)
    rows = {
        "weights, MiB": {w: sum(x.nbytes for x in jax.tree.leaves(frozen[w])) / 2**20 for w in frozen},
        f"loss of {len(run.split.pairs)} pairs": losses,
        "peak memory of loading and writing, MiB": peaks,
        "seconds of decoding, median": {w: statistics.median(seconds[w]) for w in frozen},
    }
    print(f"| | {full['model']['dtype']} | int8 | ratio |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['full']:,.5g} | {row['int8']:,.5g} | {row['int8'] / row['full']:.3f} |")
    equal = sum(a == b for a, b in zip(texts["full"], texts["int8"], strict=True))
    print(f"\n{equal} of {len(prompts)} texts equal; {run.data.total_steps} steps of {BATCH} beside float weights")


if __name__ == "__main__":
    flags.FLAGS(sys.argv)
    main(CONFIG.value.to_dict())

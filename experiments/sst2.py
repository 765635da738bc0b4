"""Sentiment with 20 virtual tokens, ours beside PEFT: the same sentences, batch size and epochs, in one process.

    python -m experiments.sst2 --config=configs/sst2_minilm.py --seeds=0,1 --output=results.json \\
        --config.model.name=FOLDER --config.dataset.path=FOLDER

Every step of PEFT is followed by one of ours, so that both meet the same noise of the machine; after each epoch both
classify the whole validation split.  PEFT (torch) trains as its users do: a prefix of normal entries, a head behind
BERT's pooler, dropout in the model, AdamW with linear decay, and batches in random order, padded to their longest
sentence.  Ours are of sentences of similar length, which is part of why they are fast; what remains without that is
measured, too: at every tenth step PEFT also differentiates our batch, padded no further than its longest sentence,
and learns nothing from it.  A run is repeated for each of `--seeds`.  Needs tests/requirements.txt.  Prints a Markdown
table.
"""

import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers
from absl import flags
from ml_collections import config_flags

from experiments import in_turn, our_side, peft_side
from prefix_tuning import evaluate, setup

NAMES = ("PEFT", "ours")
LEARNING_RATE = 1e-2  # of PEFT
EVERY = 10  # steps between two of PEFT on our batches


def peft_batch(examples):
    """Examples of ours as a batch of PEFT."""
    return {
        "input_ids": peft_side.padded([example.read for example in examples]),
        "attention_mask": peft_side.padded([[1] * len(example.read) for example in examples]),
        "labels": torch.tensor([example.targets[0] for example in examples]),
    }


def peft_accuracy(model, split, size):
    """The percentage of a split that PEFT's model classifies as it should."""
    right, examples = 0, sorted(split.prompts.examples, key=lambda example: len(example.read))
    model.eval()
    for start in range(0, len(examples), size):
        given = peft_batch(examples[start : start + size])
        labels = given.pop("labels")
        with torch.no_grad():
            right += int((model(**given).logits.argmax(-1) == labels).sum())
    model.train()
    return 100 * right / len(examples)


def train_both(config):
    """One run of each: accuracies by epoch, and (seconds, sentences, tokens) by step."""
    base = setup.make_base(config)
    run = setup.make_run(config, base)
    settings, section, size = run.train, config["optimizer"], run.evaluation.batch_size

    # ---- PEFT
    torch.manual_seed(config["seed"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base.folder, dtype=torch.float32, num_labels=len(config["objective"]["labels"])
    )
    own = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=base.taken.read)
    theirs = peft.get_peft_model(model, own)
    examples = setup.encode(base, our_side.training_rows(config))
    their_step = peft_side.torch_step(
        theirs,
        run.data.total_steps,
        learning_rate=LEARNING_RATE,
        weight_decay=section["weight_decay"],
        clip=section["clip"],
    )

    def their_gradient(batch):
        theirs(**batch).loss.backward()
        theirs.zero_grad()

    # ---- ours
    our_step, bound = our_side.our_step(config, base, run)
    write = evaluate.make_writer(base, size)

    def our_accuracy():
        found = write(*bound(), run.split.prompts, config["seed"])
        return 100 * evaluate.score(("accuracy",), found, run.split)["accuracy"]

    # ---- in turn
    steps = {name: [] for name in (*NAMES, "PEFT on our batches")}
    accuracy = {name: [] for name in NAMES}

    def turn(name, function, argument, sentences, tokens):
        seconds = []
        result = in_turn.timed(seconds, function, argument)
        steps[name].append((seconds[0], int(sentences), int(tokens)))
        return result

    theirs.train()
    ends = np.cumsum(run.data.steps_per_epoch)
    rows = peft_side.shuffled(examples, settings.batch_size, settings.epochs, config["seed"])
    for number, (mine, batch) in enumerate(zip(rows, run.data.batches(0), strict=True), start=1):
        given = peft_batch(mine)
        sizes = (batch["examples"] > 0).sum(), (batch["segments"] > 0).sum()
        losses = {
            "PEFT": turn("PEFT", their_step, given, len(mine), given["attention_mask"].sum()),
            "ours": turn("ours", our_step, batch, *sizes),
        }
        if number % EVERY == 1:
            turn("PEFT on our batches", their_gradient, peft_side.read_batch(batch, "classify"), *sizes)
        if number in ends:
            accuracy["PEFT"].append(peft_accuracy(theirs, run.split, size))
            accuracy["ours"].append(our_accuracy())
            shown = ", ".join(f"{n} {losses[n]:.3f}, {accuracy[n][-1]:.2f} %" for n in NAMES)
            print(f"seed {config['seed']}, step {number}/{run.data.total_steps}: {shown}", file=sys.stderr, flush=True)
    trained = {
        "PEFT": sum(p.numel() for p in theirs.parameters() if p.requires_grad),
        "ours": setup.parameter_counts(base.method, base.model)["trained"],
    }
    return {"accuracy": accuracy, "steps": steps, "trained": trained}


def table(runs):
    """All runs as Markdown: accuracies by epoch, the mean of the seeds, then speeds."""
    lines = ["| | PEFT | ours | ours / PEFT |", "|---|---|---|---|"]
    steps = {name: [step for run in runs for step in run["steps"][name]] for name in runs[0]["steps"]}

    def median(name, column):
        return statistics.median(step[column] / step[0] for step in steps[name])

    def line(label, theirs, ours, form):
        lines.append(f"| {label} | {theirs:{form}} | {ours:{form}} | {ours / theirs:.2f} |")

    for epoch in range(len(runs[0]["accuracy"]["ours"])):
        found = {name: [run["accuracy"][name][epoch] for run in runs] for name in NAMES}
        cells = " | ".join(spread(found[name]) for name in NAMES)
        lines.append(f"| accuracy after epoch {epoch + 1}, % | {cells} | |")
    line("sentences per second, median of the steps", median("PEFT", 1), median("ours", 1), ".3g")
    line("the same, PEFT on our batches", median("PEFT on our batches", 1), median("ours", 1), ".3g")
    line("tokens per second, padding not counted", median("PEFT", 2), median("ours", 2), ".4g")
    line("seconds per step", *(statistics.median(step[0] for step in steps[name]) for name in NAMES), ".3f")
    minutes = (sum(step[0] for step in steps[name]) / 60 / len(runs) for name in NAMES)
    line("minutes of training, compiling included", *minutes, ".2f")
    lines.append("| parameters trained | " + " | ".join(f"{runs[0]['trained'][name]:,}" for name in NAMES) + " | |")
    return "\n".join(lines)


def spread(values):
    """The mean, and with several values all of them."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ({', '.join(f'{value:.2f}' for value in values)})"


def main(config, seeds):
    """Runs, prints the table, returns everything."""
    runs = [train_both(config | {"seed": seed}) for seed in seeds]
    print(table(runs))
    return {"seeds": list(seeds), "runs": runs, "jax": jax.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "where to write everything as JSON")
    flags.DEFINE_list("seeds", ["0"], "a run of each, one after the other")
    CONFIG = config_flags.DEFINE_config_file("config", "configs/sst2_minilm.py")
    flags.FLAGS(sys.argv)
    found = main(CONFIG.value.to_dict(), [int(seed) for seed in flags.FLAGS.seeds])
    if flags.FLAGS.output:
        Path(flags.FLAGS.output).write_text(json.dumps(found, indent=1))

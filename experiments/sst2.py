"""Sentiment with 20 virtual tokens, ours beside PEFT: the same sentences in the same batches, step by step.

    python -m experiments.sst2 --config=configs/sst2_minilm.py --output=results.json \\
        --config.model.name=FOLDER --config.dataset.path=FOLDER --config.objective.pooling=token

Every step of PEFT (torch, a batch padded to its longest row) is followed by one of ours on the same sentences, so that
both meet the same noise of the machine; after each epoch both classify the whole validation split.  PEFT trains as its
users do: a prefix of normal entries, the head behind BERT's pooler, dropout in the model, AdamW with linear decay.  A
run is repeated for each of `--seeds`.  Needs tests/requirements.txt.  Prints a Markdown table.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers
from absl import flags
from ml_collections import config_flags

from prefix_tuning import evaluate, parallel, setup
from prefix_tuning.train import fresh_state
from prefix_tuning.train_step import make_train_step


def their_batch(batch):
    """One of our batches as PEFT reads it: padding that no row needs is cut off."""
    real = batch["segments"] > 0
    kept = real.any(0).sum()
    return {
        "input_ids": torch.tensor(batch["tokens"][:, :kept], dtype=torch.long),
        "attention_mask": torch.tensor(real[:, :kept], dtype=torch.long),
        "labels": torch.tensor(batch["targets"][:, 0], dtype=torch.long),
    }


def their_accuracy(model, split, size):
    """The percentage of a split that PEFT's model classifies as it should."""
    right, examples = 0, split.prompts.examples
    model.eval()
    for indices, batch in evaluate.pipeline.eval_batches(examples, batch_size=size, shapes=evaluate.SHAPES):
        given = their_batch(batch)
        labels = given.pop("labels")
        with torch.no_grad():
            found = model(**given).logits.argmax(-1)
        right += int((found == labels)[torch.tensor(indices >= 0)].sum())
    model.train()
    return 100 * right / len(examples)


def train_both(config):
    """Accuracies by epoch, seconds by step, and sizes of one run of each."""
    base = setup.make_base(config)
    run = setup.make_run(config, base)
    settings, section = run.train, config["optimizer"]

    # ---- PEFT
    torch.manual_seed(config["seed"])
    labels = config["objective"]["labels"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base.folder, dtype=torch.float32, num_labels=len(labels)
    )
    own = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=base.prefix_length)
    theirs = peft.get_peft_model(model, own)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, section["learning_rate"], weight_decay=section["weight_decay"])
    total = run.data.total_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    def their_step(batch):
        loss = theirs(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, section["clip"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    # ---- ours
    frozen = parallel.place(setup.load_weights(base, config))
    state = parallel.place(fresh_state(config, base, run, frozen))
    step = parallel.train_step(make_train_step(base.model, base.method, base.objective, run.tx, axis=parallel.AXIS))
    write = evaluate.make_writer(base, run.evaluation.batch_size, seed=config["seed"])

    def our_step(batch):
        nonlocal state
        state, sums = step(frozen, state, parallel.split_batch(batch, settings.accumulate))
        return float(sums["loss"] / sums["count"])

    def our_accuracy():
        found = write(*base.method.bind(frozen, state.trainable), run.split.prompts)
        return 100 * evaluate.score(("accuracy",), found, run.split)["accuracy"]

    # ---- in turn
    seconds = {"PEFT": [], "ours": []}
    accuracy = {"PEFT": [], "ours": []}
    examples, tokens = [], []
    ends = np.cumsum(run.data.steps_per_epoch)
    theirs.train()
    for number, batch in enumerate(run.data.batches(0), start=1):
        given, losses = their_batch(batch), {}
        for name, function, argument in (("PEFT", their_step, given), ("ours", our_step, batch)):
            start = time.perf_counter()
            losses[name] = function(argument)
            seconds[name].append(time.perf_counter() - start)
        examples.append(int((batch["examples"] > 0).sum()))
        tokens.append(int((batch["segments"] > 0).sum()))
        if number in ends:
            accuracy["PEFT"].append(their_accuracy(theirs, run.split, run.evaluation.batch_size))
            accuracy["ours"].append(our_accuracy())
            shown = ", ".join(f"{n} {losses[n]:.3f}, {accuracy[n][-1]:.2f} %" for n in losses)
            print(f"seed {config['seed']}, step {number} of {total}: {shown}", file=sys.stderr, flush=True)
    sizes = {
        "PEFT": sum(p.numel() for p in trained),
        "ours": setup.parameter_counts(base.method, base.model)["trained"],
    }
    return {"accuracy": accuracy, "seconds": seconds, "examples": examples, "tokens": tokens, "trained": sizes}


def table(runs):
    """All runs as Markdown: a line per epoch, then speeds, of which each is a median over the steps of all runs."""
    lines = ["| | PEFT | ours | ours / PEFT |", "|---|---|---|---|"]
    names = ("PEFT", "ours")

    def spread(values):
        mean = statistics.mean(values)
        return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")

    for epoch in range(len(runs[0]["accuracy"]["ours"])):
        found = {name: [run["accuracy"][name][epoch] for run in runs] for name in names}
        cells = " | ".join(spread(found[name]) for name in names)
        lines.append(f"| accuracy after epoch {epoch + 1}, % | {cells} | |")

    def rate(name, of):
        return statistics.median(n / s for run in runs for n, s in zip(run[of], run["seconds"][name], strict=True))

    for label, of in (("sentences per second", "examples"), ("tokens per second", "tokens")):
        theirs, ours = (rate(name, of) for name in names)
        lines.append(f"| {label}, median | {theirs:.3g} | {ours:.3g} | {ours / theirs:.2f} |")
    theirs, ours = (sum(sum(run["seconds"][name]) for run in runs) / len(runs) / 60 for name in names)
    lines.append(f"| minutes of training, compiling included | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} |")
    lines.append(f"| parameters trained | {runs[0]['trained']['PEFT']:,} | {runs[0]['trained']['ours']:,} | |")
    return "\n".join(lines)


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

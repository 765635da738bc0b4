"""Ours beside PEFT: the same frozen model, pairs, length, batch size and epochs, step by step in one process.

    python -m experiments.beside_peft --config=configs/e2e_smollm2.py --output=results.json \\
        --config.model.name=FOLDER --config.dataset.path=FOLDER

Every step of PEFT (torch, a shuffled batch padded to its longest row) is followed by one of ours, so that both meet the
same noise of the machine; afterwards both decode the same records greedily, in the same batches.  Needs
tests/requirements.txt.  Prints a Markdown table of medians, ratios and scores.
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
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

from prefix_tuning import evaluate, parallel, setup
from prefix_tuning.data import pipeline
from prefix_tuning.train import fresh_state
from prefix_tuning.train_step import make_train_step

LEARNING_RATE = 5e-3
TEXT = "Describe the restaurant in one sentence that mentions every field of its record."


def peft_examples(config, base):
    """The training pairs of our own run, so that both see the same text."""
    pairs = setup.load_split(config, "train")
    pairs = setup.data.subsample(pairs, config["train"]["examples"], config["seed"])
    return pipeline.encode(pairs, base.tokenizer, **config["text"])


def peft_batches(examples, batch_size, epochs, seed):
    """Shuffled batches padded to their longest row, as a Hugging Face collator makes them."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(examples))
        for start in range(0, len(order), batch_size):
            rows = [examples[i] for i in order[start : start + batch_size]]
            length = max(len(row.prompt) + len(row.target) for row in rows)
            tokens = torch.zeros(len(rows), length, dtype=torch.long)
            mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
            for b, (prompt, target) in enumerate(rows):
                whole = prompt + target
                tokens[b, : len(whole)] = torch.tensor(whole)
                mask[b, : len(whole)] = 1
                labels[b, len(prompt) : len(whole)] = torch.tensor(target)
            yield {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def main(config):
    """Trains both, decodes with both, prints the table."""
    base = setup.make_base(config)
    run = setup.make_run(config, base)
    settings, split = run.train, run.final
    examples = peft_examples(config, base)
    real = sum(len(x.prompt) + len(x.target) - 1 for x in examples) * settings.epochs

    # ---- PEFT
    torch.manual_seed(config["seed"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    theirs = peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=base.prefix_length)
    )
    initialize_kv_prefix_from_text(theirs, base.tokenizer, text=TEXT)
    batches = list(peft_batches(examples, settings.batch_size, settings.epochs, config["seed"]))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))

    def their_step(batch):
        loss = theirs(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    # ---- ours
    frozen = parallel.place(setup.load_weights(base, config))
    state = parallel.place(fresh_state(config, base, run, frozen))
    step = parallel.train_step(make_train_step(base.model, base.method, base.objective, run.tx, axis=parallel.AXIS))

    def our_step(batch):
        nonlocal state
        state, sums = step(frozen, state, parallel.split_batch(batch, settings.accumulate))
        return float(sums["loss"] / sums["count"])

    seconds = {"PEFT": [], "ours": []}
    theirs.train()
    for number, (batch, ours) in enumerate(zip(batches, run.data.batches(0), strict=True), start=1):
        losses = {}
        for name, function, argument in (("PEFT", their_step, batch), ("ours", our_step, ours)):
            start = time.perf_counter()
            losses[name] = function(argument)
            seconds[name].append(time.perf_counter() - start)
        if number % 10 == 0:
            shown = ", ".join(f"{n} {losses[n]:.3f} after {sum(seconds[n]) / 60:.1f} min" for n in losses)
            print(f"step {number}/{len(batches)}: loss {shown}", file=sys.stderr, flush=True)

    # ---- decoding
    banned = [[token] for token in base.decode.banned] or None
    theirs.eval()
    texts, decoding = {}, {}
    start = time.perf_counter()
    texts["PEFT"] = [""] * len(split.prompts)
    size = run.evaluation.batch_size
    for indices, tokens, lengths in pipeline.prompt_batches(split.prompts, batch_size=size, multiple=1):
        left = torch.zeros(tokens.shape, dtype=torch.long)
        mask = torch.zeros_like(left)
        for b, n in enumerate(lengths):
            left[b, tokens.shape[1] - n :] = torch.tensor(tokens[b, :n])
            mask[b, tokens.shape[1] - n :] = 1
        with torch.no_grad():
            out = theirs.generate(
                input_ids=left,
                attention_mask=mask,
                max_new_tokens=base.decode.max_new_tokens,
                do_sample=False,
                bad_words_ids=banned,
                pad_token_id=base.decode.pad_token,
            )
        for b, i in enumerate(indices):
            if i >= 0:
                texts["PEFT"][i] = base.tokenizer.decode(out[b, tokens.shape[1] :], skip_special_tokens=True).strip()
    decoding["PEFT"] = time.perf_counter() - start
    write = evaluate.make_writer(base, run.evaluation.batch_size, seed=config["seed"])
    bound = base.method.bind(frozen, state.trainable)
    start = time.perf_counter()
    texts["ours"] = write(*bound, split.prompts)
    decoding["ours"] = time.perf_counter() - start

    # ---- the table
    results = {}
    for name in ("PEFT", "ours"):
        scores = evaluate.score(run.evaluation.metrics, texts[name], split)
        results[name] = {
            **scores,
            "training minutes, compiling included": sum(seconds[name]) / 60,
            "median seconds per step": statistics.median(seconds[name]),
            "real tokens per second in training": real / sum(seconds[name]),
            "decoding seconds, compiling included": decoding[name],
        }
    lines = ["| | PEFT | ours | ours / PEFT |", "|---|---|---|---|"]
    for key, value in results["PEFT"].items():
        ours = results["ours"][key]
        lines.append(f"| {key} | {value:.4g} | {ours:.4g} | {ours / value:.2f} |")
    print("\n".join(lines))
    return {"results": results, "seconds": seconds, "texts": texts, "jax": jax.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "where to write everything as JSON")
    CONFIG = config_flags.DEFINE_config_file("config", "configs/e2e_smollm2.py")
    flags.FLAGS(sys.argv)
    found = main(CONFIG.value.to_dict())
    if flags.FLAGS.output:
        Path(flags.FLAGS.output).write_text(json.dumps(found, indent=1))

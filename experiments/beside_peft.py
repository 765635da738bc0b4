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
import peft
import torch
import transformers
from absl import flags
from ml_collections import config_flags
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

from experiments import in_turn, our_side, peft_side
from prefix_tuning import evaluate, setup
from prefix_tuning.data import pipeline

LEARNING_RATE = 5e-3
TEXT = "Describe the restaurant in one sentence that mentions every field of its record."


def peft_batch(rows):
    """Pairs as a batch of PEFT: the prompt is no label."""
    whole = [row.prompt + row.target for row in rows]
    tokens = peft_side.padded(whole)
    labels = peft_side.padded([[-100] * len(row.prompt) + row.target for row in rows], -100)
    return {
        "input_ids": tokens,
        "attention_mask": peft_side.padded([[1] * len(row) for row in whole]),
        "labels": labels,
    }


def main(config):
    """Trains both, decodes with both, prints the table."""
    base = setup.make_base(config)
    run = setup.make_run(config, base)
    settings, split = run.train, run.final
    examples = pipeline.encode(our_side.training_rows(config), base.tokenizer, **config["text"])
    real = sum(len(x.prompt) + len(x.target) - 1 for x in examples) * settings.epochs

    # ---- PEFT
    torch.manual_seed(config["seed"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    theirs = peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=base.taken.read)
    )
    initialize_kv_prefix_from_text(theirs, base.tokenizer, text=TEXT)
    rows = peft_side.shuffled(examples, settings.batch_size, settings.epochs, config["seed"])
    batches = [peft_batch(own) for own in rows]
    their_step = peft_side.torch_step(theirs, len(batches), learning_rate=LEARNING_RATE)

    # ---- in turn
    our_step, bound = our_side.our_step(config, base, run)
    seconds = {"PEFT": [], "ours": []}
    theirs.train()
    for number, (batch, ours) in enumerate(zip(batches, run.data.batches(0), strict=True), start=1):
        losses = {
            "PEFT": in_turn.timed(seconds["PEFT"], their_step, batch),
            "ours": in_turn.timed(seconds["ours"], our_step, ours),
        }
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
    write = evaluate.make_writer(base, run.evaluation.batch_size)
    adapted = bound()
    start = time.perf_counter()
    texts["ours"] = write(*adapted, split.prompts, config["seed"])
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

"""Prefix-tunes SmolLM2-135M-Instruct on 500 pairs of E2E, decodes 100 validation records greedily.

    python run.py train --config=configs/e2e_smollm2.py --workdir=runs/e2e \\
        --config.model.name=FOLDER --config.dataset.path=FOLDER

`model.name` may be the hub's name or a folder, `dataset.path` tuetschek/e2e_nlg or a folder with src1_train.txt and
src1_valid.txt.  On two x86-64 cores: 6.4 minutes of training, 60.7 BLEU (experiments/results/beside_peft.md).
"""

from configs import common


def sweep(add):
    """The prefix's length, as in figure 4 of Li & Liang (2021), with two seeds."""
    for length in (1, 5, 10, 20, 40):
        for seed in (0, 1):
            add(f"length={length},seed={seed}", {"method.length": length, "seed": seed})


def get_config(arg=None):
    """`quick` trains on 32 pairs and decodes 8 records; `method` as in every config.

    `init=WORDS` is what the prefix starts from instead of a sentence; `init=random` draws it.
    """
    settings = common.parse(arg, init="")
    quick, words = settings["quick"], settings["init"]
    if words and "prefix" not in common.PRESETS.get(settings["method"], (settings["method"].split("+"),))[0]:
        raise ValueError(f"init={words} is what a prefix starts from, and method={settings['method']} has none")
    prefix = {"text": f" {words}" if words else "Describe the restaurant in one sentence.\n"}
    if words == "random":
        prefix = {"init": "random", "text": None}
    return common.config(
        seed=0,
        model=common.model(name="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32"),
        dataset=common.section(name="e2e", path="tuetschek/e2e_nlg", strip=True),
        text=common.section(prompt="{source}\n", completion="{target}", max_source=None, max_target=None),
        method=common.method(settings["method"], prefix=prefix),
        objective=common.section(name="lm", normalisation="token"),
        optimizer=common.section(
            name="adamw",
            learning_rate=common.rate(settings["method"], common.RATES),
            schedule="linear",
            warmup_steps=0,
            weight_decay=0.0,
            clip=1.0,
        ),
        train=common.train(
            batch_size=8,
            epochs=1 if quick else 3,
            examples=32 if quick else 500,
            accumulate=1,
            packing=False,
            shapes=6,
            prefetch=8,
            log_every=10,
            checkpoint_every=50,
            keep=2,
        ),
        evaluation=common.evaluation(
            metrics=("e2e",),
            batch_size=20,
            split="validation",
            final_split="validation",
            examples=8 if quick else 100,
            samples=3,
        ),
        decode=common.section(max_new_tokens=80, num_beams=1, banned=("\n",)),
    )

"""The quick start: prefix-tunes the small model that the repository ships, offline.

    python run.py

Tunes on records in a format, and tests on names and values, that the model's pretraining never contained.
On two x86-64 cores: 0.4 minutes of training; BLEU from 10.7 to 99.7 (experiments/results/quickstart.md).
"""

from configs import common


def get_config(arg=None):
    """`quick` takes 100 steps and decodes 16 records, for tests; `method` as in every config."""
    settings = common.parse(arg)
    quick = settings["quick"]
    return common.section(
        seed=0,
        model=common.section(name="configs/quickstart_assets/model", dtype="float32"),
        dataset=common.section(name="text", path="configs/quickstart_assets/task"),
        text=common.section(prompt="{source}\n", completion="{target}", max_source=None, max_target=None),
        method=common.method(settings["method"], prefix={"length": 10, "init": "random", "text": None, "scale": 0.5}),
        objective=common.section(name="lm", normalisation="token"),
        optimizer=common.section(
            name="adamw", learning_rate=2e-2, schedule="linear", warmup_steps=10, weight_decay=0.0, clip=1.0
        ),
        train=common.section(
            batch_size=16,
            epochs=4 if quick else 10,
            examples=None,
            accumulate=1,
            packing=False,
            shapes=3,
            prefetch=8,
            log_every=25,
            eval_every=None,
            checkpoint_every=100,
            keep=2,
        ),
        evaluation=common.section(
            metrics=("bleu", "slots", "exact_match"),
            batch_size=16 if quick else 40,
            split="validation",
            final_split="test",
            examples=16 if quick else None,
            samples=2,
        ),
        decode=common.section(max_new_tokens=96, num_beams=1),
    )

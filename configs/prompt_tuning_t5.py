"""Prompt tuning (Lester et al. 2021): SuperGLUE as text, T5 1.1 adapted to language modelling, Adafactor at 0.3.

    python run.py train --config=configs/prompt_tuning_t5.py:task=rte,size=base --workdir=runs/rte \\
        --config.model.name=FOLDER --config.dataset.path=FOLDER

`task`, `size` and `length` choose; `python run.py table prompt-length` runs figure 3a.  Published: RTE 68.6 % with size
base (the released prompt), and 90.5 for SuperGLUE as a whole with size xxl; curves otherwise.  Not run by us at this
size: small and base took the authors four TPU v2 chips, larger ones sixteen TPU v3.  What differs from their code:

- 30,000 steps are as many epochs as come nearest to them, and the last step is scored, not the best by the dev split.
- A prompt of fewer rows than classes, which cannot start from their names, starts from the vocabulary.
- MultiRC, ReCoRD and WSC, which they make a text of their own, are left out.
- The order of fields is from memory.
- T5X adds a z-loss of 1e-4, of which the paper does not speak; there is none here.
"""

from configs import common

SIZES = ("small", "base", "large", "xl", "xxl")
TASKS = {  # task -> training rows, and the texts that are written
    "boolq": (9_427, ("False", "True")),
    "cb": (250, ("entailment", "contradiction", "neutral")),
    "copa": (400, ("choice1", "choice2")),
    "rte": (2_490, ("entailment", "not_entailment")),
    "wic": (5_428, ("False", "True")),
}
STEPS, BATCH = 30_000, 32
RATES = common.RATES | {"prompt": 0.3}


def get_config(arg=None):
    """`quick` trains on 64 rows for an epoch and scores 32; `method` as in every config."""
    settings = common.parse(arg, task="rte", size="base", length=100, method="prompt")
    quick, name, length = settings["quick"], settings["method"], settings["length"]
    task, size = common.choose(settings, "task", TASKS), common.choose(settings, "size", SIZES)
    rows, labels = TASKS[task]
    start = {"init": "labels", "labels": labels} if length >= len(labels) else {"init": "vocabulary"}
    return common.config(
        seed=0,
        model=common.model(name=f"google/t5-{size}-lm-adapt", dtype="float32"),
        dataset=common.section(name="superglue", path="aps/super_glue", task=task, as_text=True),
        text=common.section(prompt="{source}{eos}", completion="{target}", max_source=511, max_target=None),
        method=common.method(name, prompt={"length": length, **start}, prefix={"init": "random", "text": None}),
        objective=common.section(name="lm", normalisation="token"),
        optimizer=common.section(
            name="adafactor_unscaled" if name == "prompt" else "adamw",
            learning_rate=common.rate(name, RATES),
            schedule="constant",
            warmup_steps=0,
            weight_decay=1e-5,
            clip=None,
        ),
        train=common.train(
            batch_size=BATCH,
            epochs=1 if quick else round(STEPS / -(-rows // BATCH)),
            examples=64 if quick else None,
            accumulate=1,
            packing=False,
            shapes=4,
            prefetch=8,
            log_every=50,
            checkpoint_every=1000,
            keep=2,
        ),
        evaluation=common.evaluation(
            metrics=("accuracy",),
            batch_size=32,
            split="validation",
            final_split="validation",  # the benchmark keeps the answers of its test splits
            examples=32 if quick else None,
            samples=3,
        ),
        decode=common.section(max_new_tokens=10, num_beams=1),
    )

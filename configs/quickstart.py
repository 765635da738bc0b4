"""The quick start: prefix-tunes the small model that the repository ships, offline.

    python run.py

Tunes on records in a format, and tests on names and values, that the model's pretraining never contained.
On two x86-64 cores: 0.4 minutes of training; BLEU from 10.7 to 99.7 (experiments/results/quickstart.md).
"""

from configs import common

# Where each method learns the task in 250 steps; found on validation data.
RATES = {
    "prefix": 2e-2,
    "infix": 2e-2,
    "prompt": 6e-2,
    "ptuning": 4e-3,
    "memory": 1e-2,
    "propagation": 2e-2,
    "lora": 6e-3,
    "adapter": 1e-2,
    "finetune": 5e-4,
    "mam": 4e-3,
    "unipelt": 6e-3,
    "bitfit": 2e-2,
    "ft_top2": 2e-3,
}
COMPARED = ("prompt", "prefix", "lora", "finetune")


def get_config(arg=None):
    """`quick` takes 100 steps and decodes 16 records, for tests; `method` as in every config.

    `compare` trains prefix, prompt, LoRA and full fine-tuning one after the other and prints them side by side.
    """
    settings = common.parse(arg, compare=False)
    config = shared(settings["quick"])
    if settings["compare"]:
        config.compare = {name: adapted(name) for name in COMPARED}
    else:
        config.update(adapted(settings["method"]))
    return config


def adapted(name):
    """The sections that depend on the method."""
    return common.section(
        method=common.method(name, prefix={"length": 10, "init": "random", "text": None, "scale": 0.5}),
        optimizer=common.section(
            name="adamw",
            learning_rate=common.rate(name, RATES),
            schedule="linear",
            warmup_steps=10,
            weight_decay=0.0,
            clip=1.0,
        ),
    )


def shared(quick):
    """All other sections."""
    return common.config(
        seed=0,
        model=common.model(name="configs/quickstart_assets/model", dtype="float32"),
        dataset=common.section(name="text", path="configs/quickstart_assets/task"),
        text=common.section(prompt="{source}\n", completion="{target}", max_source=None, max_target=None),
        objective=common.section(name="lm", normalisation="token"),
        train=common.train(
            batch_size=16,
            epochs=4 if quick else 10,
            examples=None,
            accumulate=1,
            packing=False,
            shapes=3,
            prefetch=8,
            log_every=25,
            checkpoint_every=100,
            keep=2,
        ),
        evaluation=common.evaluation(
            metrics=("bleu", "slots", "exact_match"),
            batch_size=16 if quick else 40,
            split="validation",
            final_split="test",
            examples=16 if quick else None,
            samples=2,
        ),
        decode=common.section(max_new_tokens=96, num_beams=1),
    )

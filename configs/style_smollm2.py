"""Prefix-tunes SmolLM2-135M-Instruct to answer instructions in one fixed style; experiments/style.py writes the pairs.

    python -m experiments.style --workdir=runs/style [--config.model.name=FOLDER]

writes them and calls run.py train --config=configs/style_smollm2.py --workdir=runs/style/run with these options.  It
is an ordinary config for conversations: {chat} stands for what the tokenizer's chat template makes of them.  On two
x86-64 cores: 3.0 minutes of training, 60 of 60 answers in the style's form (experiments/results/style.md).
"""

from configs import common


def get_config(arg=None):
    """`quick` trains on 32 pairs and answers 8; `method` as in every config."""
    settings = common.parse(arg)
    quick = settings["quick"]
    return common.config(
        seed=0,
        model=common.model(name="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32"),
        dataset=common.section(name="chat", path="runs/style/data", system=None),
        text=common.section(prompt="{chat}", completion="{chat}", max_source=None, max_target=None),
        method=common.method(settings["method"], prefix={"text": "Answer with a numbered list and count it.\n"}),
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
            examples=32 if quick else None,
            accumulate=1,
            packing=False,
            shapes=2,
            prefetch=8,
            log_every=10,
            checkpoint_every=50,
            keep=2,
        ),
        evaluation=common.evaluation(
            metrics=("rouge",),
            batch_size=20,
            split="validation",
            final_split="test",
            examples=8 if quick else None,
            samples=3,
        ),
        decode=common.section(max_new_tokens=48, num_beams=1, banned=()),
    )

"""Li & Liang (2021), table 2, row PREFIX(0.1%) of E2E: GPT-2 medium, the paper's best hyperparameters (its table 6).

    python run.py train --config=configs/e2e_gpt2_medium.py --workdir=runs/e2e_gpt2 --config.dataset.path=FOLDER

FOLDER holds src1_{train,valid,test}.txt as the authors released them.  Expected (published): BLEU 70.3, NIST 8.82,
METEOR 46.3, ROUGE-L 72.1, CIDEr 2.46.  Not run by us at this size yet: it asks for a GPU.
"""

from configs import common


def get_config(arg=None):
    """`quick` trains on 100 pairs for an epoch; `method` as in every config."""
    settings = common.parse(arg)
    quick = settings["quick"]
    return common.section(
        seed=101,
        model=common.section(name="openai-community/gpt2-medium", dtype="float32"),
        dataset=common.section(name="e2e", path="tuetschek/e2e_nlg", strip=False),
        # The spaces are the released code's: every one of them is a token of GPT-2's.
        text=common.section(prompt=" {source} {bos}", completion=" {target} ", max_source=None, max_target=None),
        method=common.method(
            settings["method"],
            prefix={"length": 5, "reparametrisation": 512, "init": "random", "text": None},
        ),
        objective=common.section(name="lm", normalisation="sequence"),
        optimizer=common.section(
            name="adamw", learning_rate=8e-5, schedule="linear", warmup_steps=0, weight_decay=0.0, clip=1.0
        ),
        train=common.section(
            batch_size=10,
            epochs=1 if quick else 5,
            examples=100 if quick else None,
            accumulate=1,
            packing=False,
            shapes=4,
            prefetch=8,
            log_every=50,
            eval_every=None,
            checkpoint_every=1000,
            keep=2,
        ),
        evaluation=common.section(
            metrics=("e2e",),
            batch_size=10,
            split="validation",
            final_split="validation" if quick else "test",
            examples=20 if quick else None,
            samples=3,
        ),
        decode=common.section(
            max_new_tokens=100, num_beams=5, length_penalty=1.0, normalise="full", banned=("\n", "\n\n")
        ),
    )

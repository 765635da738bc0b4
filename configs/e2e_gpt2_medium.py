"""Li & Liang (2021), table 2, row PREFIX(0.1%) of E2E: GPT-2 medium, the paper's best hyperparameters (its table 6).

    python run.py train --config=configs/e2e_gpt2_medium.py --workdir=runs/e2e_gpt2 --config.dataset.path=FOLDER

FOLDER holds src1_{train,valid,test}.txt as the authors released them.  Expected (published): BLEU 70.3, NIST 8.82,
METEOR 46.3, ROUGE-L 72.1, CIDEr 2.46.  Not run by us at this size yet: it asks for a GPU.
"""

from configs import common

# The paper's own rows (its table 6), LoRA's own (its table 11), and the prefix's for what neither paper tried.
RATES = dict.fromkeys([*common.METHODS, *common.PRESETS], 8e-5) | {"finetune": 5e-5, "ft_top2": 5e-5, "lora": 2e-4}
# What the released code trains with a mean over target tokens; a prefix and its kin with a sum over each example's.
TOKEN_MEAN = ("adapter", "finetune", "ft_top2", "bitfit", "lora")


def get_config(arg=None):
    """`quick` trains on 100 pairs for an epoch; `method` as in every config."""
    settings = common.parse(arg)
    name, quick = settings["method"], settings["quick"]
    return common.section(
        seed=101,
        model=common.section(name="openai-community/gpt2-medium", dtype="float32"),
        dataset=common.section(name="e2e", path="tuetschek/e2e_nlg", strip=False),
        # The spaces are the released code's: every one of them is a token of GPT-2's.
        text=common.section(prompt=" {source} {bos}", completion=" {target} ", max_source=None, max_target=None),
        method=common.method(
            name,
            prefix={"length": 5, "reparametrisation": 512, "init": "random", "text": None},
            infix={"length": 10, "reparametrisation": 512, "scale": 1.0},
            prompt={"length": 20, "reparametrisation": 512, "init": "random"},  # the paper's EMB-20
            adapter={"form": "lin", "bottleneck": 6},  # ADAPTER(0.1%)
        ),
        objective=common.section(name="lm", normalisation="token" if name in TOKEN_MEAN else "sequence"),
        optimizer=common.section(
            name="adamw",
            learning_rate=common.rate(name, RATES),
            schedule="linear",
            warmup_steps=0,
            weight_decay=0.0,
            clip=1.0,
        ),
        train=common.train(
            batch_size=10,
            epochs=1 if quick else 5,
            examples=100 if quick else None,
            accumulate=1,
            packing=False,
            shapes=4,
            prefetch=8,
            log_every=50,
            checkpoint_every=1000,
            keep=2,
        ),
        evaluation=common.evaluation(
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

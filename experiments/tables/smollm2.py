"""Figures 3, 4 and 5 of Li & Liang (2021) in small: SmolLM2-135M-Instruct on E2E, which two cores do in hours."""

from typing import Any

from experiments.tables.base import Column, D, Row, Table

FILE = "configs/e2e_smollm2.py"
COLUMNS = (
    Column("BLEU", ("bleu",), 100.0, 1),
    Column("ROUGE-L", ("rouge_l",), 100.0, 1),
    Column("loss", ("loss",), 1.0, 3, lower=True),
)
SEEDS = (0, 1)
RATES = {"prefix": 4.5e-2, "finetune": 3e-4}
EPOCHS = {50: 4, 100: 2, 200: 1, 250: 1, 500: 1}  # by pairs
RECORDS = 40
INSTEAD = (
    "SmolLM2-135M-Instruct instead of GPT-2 medium",
    "two seeds, each with pairs of its own",
    f"{RECORDS} validation records, decoded greedily",
    "no reparametrisation",
)
LOSS = "The loss is that of 80 validation pairs, per token."
RATE = "4.5e-2 for prefixes, 3e-4 for all weights: what experiments/compare.py chose"


def row(
    name: str,
    label: str,
    pairs: int,
    *,
    method: str = "prefix",
    init: str = "",
    own: dict[str, Any] | None = None,
    **place: Any,
) -> Row:
    """A row of any of the three; `place` is where a figure has it."""
    arg = f"method={method}" + (f",init={init}" if init else "")
    overrides = {
        "train.examples": pairs,
        "train.epochs": EPOCHS[pairs],
        "optimizer.learning_rate": RATES[method],
        "evaluation.examples": RECORDS,
        "evaluation.pairs": 80,
        "evaluation.untuned": False,
    }
    return Row(name, label, FILE, arg, overrides | (own or {}), seeds=SEEDS, **place)


length = Table(
    "The prefix's length, E2E, 250 pairs, SmolLM2-135M-Instruct",
    "after Li & Liang (2021), figure 4",
    D,
    COLUMNS,
    tuple(
        row(
            f"length-{slots}",
            f"{slots} slot" + "s" * (slots > 1),
            250,
            own={"method.length": slots},
            series="prefix",
            x=slots,
        )
        for slots in (1, 5, 10, 20, 40)
    ),
    axis="slots",
    log=True,
    shape="better with more slots up to a peak (10 for DART, 200 for XSUM), slightly worse beyond.",
    instead=("E2E with 250 pairs instead of DART and XSUM", *INSTEAD),
    notes=(
        LOSS,
        f"32 steps of batch 8; learning rate {RATE}.",
        "The prefix starts from the config's text, as far as it reaches, and over again.",
    ),
)

low_data = Table(
    "Low data, E2E, SmolLM2-135M-Instruct",
    "after Li & Liang (2021), figure 3",
    D,
    COLUMNS,
    tuple(
        row(f"{name}-{pairs}", f"{label}, {pairs} pairs", pairs, method=method, series=label, x=pairs)
        for name, label, method in (("prefix", "prefix", "prefix"), ("ft", "fine-tuning", "finetune"))
        for pairs in (50, 100, 200, 500)
    ),
    axis="training pairs",
    log=True,
    shape="the prefix is 2.9 BLEU better than fine-tuning on average, and less so the more pairs there are.",
    instead=INSTEAD,
    notes=(LOSS, f"28, 26, 25 and 63 steps of batch 8 for 50, 100, 200 and 500 pairs; learning rate {RATE}."),
)

initialisation = Table(
    "What the prefix starts from, E2E, 100 pairs, SmolLM2-135M-Instruct",
    "after Li & Liang (2021), figure 5",
    D,
    COLUMNS,
    tuple(
        row(name, label, 100, init=init, own={"method.length": 6})
        for name, label, init in (
            *((word.strip(":"), word, word) for word in ("random", "elephant", "table-to-text:")),
            ("sentence", "Describe the restaurant in one sentence.", ""),
        )
    ),
    shape="random is worst and varies most, words of the task are slightly better than others, and all words beat "
    "random.",
    instead=(*INSTEAD, "three starts of nine, and a sentence"),
    notes=(
        LOSS,
        f"26 steps of batch 8; learning rate {RATE}.",
        "All have 6 slots here; a shorter text is repeated, a longer one cut.",
    ),
)

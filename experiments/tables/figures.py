"""Figures 3 and 4 of Li & Liang (2021), each of which has table-to-text beside summaries."""

from experiments.tables import summaries, table_to_text
from experiments.tables.base import A, B, C, Table

(BLEU, *_, ROUGE_L, _), (R1, R2, RL) = table_to_text.E2E, summaries.ROUGE
low_data = Table(
    "Low data: E2E with GPT-2 medium, XSUM with BART-large",
    "Li & Liang (2021), figure 3 (curves without numbers)",
    f"{A} (E2E); {C} (XSUM)",
    (BLEU._replace(label="E2E BLEU"), ROUGE_L._replace(label="E2E R-L"), R1, R2, RL),
    (*table_to_text.low_data_e2e, *summaries.low_data),
    axis="training pairs",
    log=True,
    shape="the prefix is 2.9 BLEU better than fine-tuning on average, and less so the more pairs there are; E2E's BLEU "
    "lies between 50 and 60, its ROUGE-L between 60 and 66, XSUM's ROUGE-1 between 32 and 37, its ROUGE-2 between 10 "
    "and 15.",
    notes=(
        "Runs stop early by a drawn dev set there; here they take the number of steps or epochs that was tuned.",
        "GPT-2's and BART's own dropout is off here.",
    ),
)
DART_BLEU, _, DART_TER, *_ = table_to_text.DART
prefix_length = Table(
    "The prefix's length: DART with GPT-2 medium, XSUM with BART-large",
    "Li & Liang (2021), figure 4 (curves without numbers)",
    f"{A} (DART); {B} (XSUM)",
    (DART_BLEU._replace(label="DART BLEU"), DART_TER._replace(label="DART TER"), R2, RL),
    (*table_to_text.dart_lengths, *summaries.lengths),
    axis="slots",
    log=True,
    shape="best at 10 slots for DART (BLEU between 44 and 46, TER between 0.46 and 0.48) and at 200 for XSUM (ROUGE-2 "
    "between 18.5 and 21, ROUGE-L between 33.5 and 36), slightly worse beyond.",
    notes=("Seeds and other hyperparameters of this figure are not listed: those of tables 2 and 3 are taken.",),
)

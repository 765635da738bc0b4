"""P-tuning v2 (Liu et al. 2022): what its repository's README reports of its run scripts."""

from experiments.tables.base import A, Column, Row, Table

FILE = "configs/ptuning_v2.py"
README = "README"
ptuning_v2 = Table(
    "Deep prompts on SuperGLUE, CoNLL-2003 and SQuAD",
    "README of github.com/THUDM/P-tuning-v2 (Liu et al. 2022)",
    A,
    (
        *(
            Column(label, ("accuracy",), 100, 1, arg=f"task={label.lower()}")
            for label in ("BoolQ", "COPA", "RTE", "WiC", "WSC")
        ),
        Column("CoNLL03", ("entity_f1",), 100, 1, arg="task=conll2003"),
        Column("SQuAD 1.1 EM", ("squad_em",), 1, 1, arg="task=squad"),
        Column("SQuAD 1.1 F1", ("squad_f1",), 1, 1, arg="task=squad"),
        Column("SQuAD 2.0 EM", ("squad_em",), 1, 1, arg="task=squad_v2"),
        Column("SQuAD 2.0 F1", ("squad_f1",), 1, 1, arg="task=squad_v2"),
    ),
    (
        Row(
            "bert",
            "BERT-large",
            FILE,
            "backbone=bert",
            published={README: (74.3, 77.0, 80.1, 75.1, 68.3, None, None, None, None, None)},
            without=("CoNLL03", "SQuAD 1.1 EM", "SQuAD 1.1 F1", "SQuAD 2.0 EM", "SQuAD 2.0 F1"),
        ),
        Row(
            "roberta",
            "RoBERTa-large",
            FILE,
            "backbone=roberta",
            published={README: (84.0, 92.0, 86.6, 73.7, 64.4, 91.8, 88.1, 94.2, 81.3, 84.7)},
        ),
    ),
    notes=(
        "Each number is of the best epoch on the dev split there, and of the last one here; each run has its script's "
        "seed.",
        "CoNLL-2004, CoNLL-2005, CoNLL-2012 and OntoNotes are left out: there is no reader of these data sets.",
        "What else differs from the scripts is in configs/ptuning_v2.py.",
    ),
)

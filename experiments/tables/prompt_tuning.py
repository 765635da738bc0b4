"""Prompt tuning (Lester et al. 2021): figure 3a."""

from experiments.tables.base import A, C, Column, Row, Table

FILE = "configs/prompt_tuning_t5.py"
prompt_length = Table(
    "The prompt's length, SuperGLUE, T5 1.1 adapted to language modelling",
    "Lester et al. (2021), figure 3a (curves without numbers)",
    f"{A} (small, base); {C} (the others)",
    tuple(
        Column(label, ("accuracy",), 100, 1, arg=f"task={label.lower()}")
        for label in ("BoolQ", "CB", "COPA", "RTE", "WiC")
    ),
    tuple(
        Row(
            f"{size}-{length}",
            f"{size}, {length}",
            FILE,
            f"size={size},length={length}",
            seeds=(0, 1, 2),
            series=size,
            x=length,
        )
        for size in ("small", "base", "large", "xl", "xxl")
        for length in (1, 5, 20, 100, 150)
    ),
    axis="rows of the prompt",
    log=True,
    mean="mean",
    shape="a large gain beyond one row, little beyond 20; more than 100 harms large models slightly, and xxl does well "
    "with one.  SuperGLUE as a whole is at 90.5 with xxl and 100 rows.",
    notes=(
        "The paper's mean is over all eight tasks; MultiRC, ReCoRD and WSC are left out here, and CB is scored by its "
        "accuracy alone.",
        "The paper keeps the best step by the dev split, here the last one is scored.",
    ),
)

"""The objectives: name in the config -> factory(**options) -> `Objective`."""

from prefix_tuning.objectives import lm

OBJECTIVES = {"lm": lm.make}

"""What is minimised; a new objective is a file with a `make(tokenizer, ...)` and a line in `OBJECTIVES`."""

from prefix_tuning.objectives import choice, classify, lm, span, tag

OBJECTIVES = {
    "lm": lm.make,
    "classify": classify.make,
    "tag": tag.make,
    "choice": choice.make,
    "span": span.make,
}

"""The methods: name in the config -> factory(tokenizer, **options) -> `Method`."""

import functools

from prefix_tuning.methods import (
    adapter,
    compose,
    finetune,
    infix,
    lora,
    memory,
    prefix,
    prompt,
    propagation,
    ptuning,
)

PARTS = {
    "prefix": prefix.make,
    "infix": infix.make,
    "prompt": prompt.make,
    "ptuning": ptuning.make,
    "memory": memory.make,
    "propagation": propagation.make,
    "lora": lora.make,
    "adapter": adapter.make,
    "finetune": finetune.make,
}
METHODS = PARTS | {"compose": functools.partial(compose.make, PARTS)}

"""Config -> optax: AdamW (or Adafactor, SGD) behind gradient clipping, with warm-up and a decaying learning rate."""

import optax
from jax import Array

from prefix_tuning.errors import UserError, valid

SCHEDULES = {
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, max(steps, 1)),
    "constant": lambda peak, steps: optax.constant_schedule(peak),
}
OPTIMIZERS = {
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "adafactor": lambda rate, decay: optax.adafactor(rate, weight_decay_rate=decay or None),
    # Without the step's size following that of the parameter, as prompts are tuned (Lester et al. 2021).
    "adafactor_unscaled": lambda rate, decay: optax.adafactor(
        rate, multiply_by_parameter_scale=False, weight_decay_rate=decay or None
    ),
    "sgd": lambda rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate)),
}


def make_optimizer(
    total_steps: int,
    *,
    name: str = "adamw",
    learning_rate: float | Array,
    schedule: str = "linear",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate per step, which "linear" and "cosine" end at 0; clip is a norm or None.

    Defaults are the released prefix-tuning code's: AdamW (0.9, 0.999, 1e-8) without decay, linear to 0, clipping at 1.
    A learning rate may be an array [] that a compiled step is given; it is not looked at then.
    """
    valid("optimizer.name", name, OPTIMIZERS)
    valid("optimizer.schedule", schedule, SCHEDULES)
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup_steps} must be at least 0 and below the {total_steps} steps of the run"
        )
    known = not isinstance(learning_rate, Array)
    if (known and learning_rate <= 0) or weight_decay < 0 or (clip is not None and clip <= 0):
        raise UserError(
            f"optimizer needs learning_rate > 0, weight_decay >= 0 and clip > 0 or None; "
            f"got {learning_rate}, {weight_decay}, {clip}"
        )
    decay = SCHEDULES[schedule](learning_rate, total_steps - warmup_steps)
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    rate = optax.join_schedules([warmup, decay], [warmup_steps]) if warmup_steps else decay
    tx = OPTIMIZERS[name](rate, weight_decay)
    return (tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)), rate

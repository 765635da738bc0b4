"""The loop: train, evaluate, save; stop at any moment and go on with the same command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prefix_tuning import evaluate, parallel, publish, setup
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.data.pipeline import without
from prefix_tuning.data.tasks import Encoded
from prefix_tuning.errors import UserError
from prefix_tuning.files import read_json, read_lines, write_json
from prefix_tuning.progress import Interrupted, Meter, Stop, say, share, shown
from prefix_tuning.record import WORKDIR, Record, check_config
from prefix_tuning.train_step import make_eval_step, make_train_step
from prefix_tuning.types import Adaptation, TrainState


def train(config: dict[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Trains, evaluates and exports into `workdir`, going on from its newest checkpoint; returns the summary.

    Raises `UserError` for a config that cannot work, before anything is computed, and for a loss that is not finite;
    `Interrupted` with the exit code after SIGTERM or Ctrl-C, once the state is saved.
    """
    # ---- everything that can be wrong with what the user gave
    base = setup.make_base(config)
    run = setup.make_run(config, base)
    settings, total = run.train, run.data.total_steps
    parallel.check_rows(settings.batch_size, settings.accumulate)
    parallel.check_rows(run.evaluation.batch_size)
    check_config(workdir, config)
    summary_path = Path(workdir) / "summary.json"
    if summary_path.exists():
        say(f"{workdir} is finished; this is what came out")
        return read_json(summary_path, WORKDIR)
    weights = setup.load_weights(base, config)
    record = Record(workdir, config)
    checkpoints = Checkpoints(record.workdir / "checkpoints", settings.keep)

    with Stop() as stop:
        # ---- weights, steps, state
        frozen = parallel.place(weights)
        body = make_train_step(base.model, base.method, base.objective, run.tx, axis=parallel.AXIS)
        train_step = parallel.train_step(body)
        score = make_scorer(config, base, run, record, frozen, stop)
        state = fresh_state(config, base, run, frozen)
        state, notes = checkpoints.restore(state) or (state, {"evaluated": False, "meter": None})
        first = int(state.step)
        # Lines beyond the checkpoint come again; so does its own evaluation, if that was cut short.
        record.start(lambda line: line["step"] < first + ("train/loss" in line or notes["evaluated"]))
        counts = setup.parameter_counts(base.method, base.model)
        introduce(counts, run, first)

        # ---- the loop
        state = parallel.place(state)
        meter = Meter(
            record, run.schedule, total=total, log_every=settings.log_every, first=first, notes=notes["meter"]
        )
        pending, evaluated = None, notes["evaluated"]  # the last step's sums are read while the next one runs

        def save() -> None:
            meter.read(pending)
            checkpoints.save(state, evaluated=evaluated, meter=meter.notes())

        try:
            untuned = score_untuned(base, run, record, frozen, stop, config)
            if evaluation_due(first, total, settings.eval_every) and not evaluated:
                score(state, run.evaluation.split, run.split)
            for step, batch in enumerate(run.data.batches(first), start=first + 1):
                stop.check()
                meter.resume()
                state, sums = train_step(frozen, state, parallel.split_batch(batch, settings.accumulate))
                meter.read(pending)
                pending, evaluated = (step, sums), False
                if evaluation_due(step, total, settings.eval_every):
                    meter.read(pending)
                    meter.pause()
                    pending = None
                    score(state, run.evaluation.split, run.split)
                    evaluated = True
                if step % settings.checkpoint_every == 0 or step == total:
                    save()
                    pending = None
            # ---- what came out
            tuned = score(state, run.evaluation.final_split, run.final)
        except Interrupted:
            save()
            say(f"stopped after step {int(state.step)} of {total}; the same command goes on from there")
            raise
        finally:
            meter.close()
            record.close()
            checkpoints.close()

    folder = export_adapter(base, config, frozen, state.trainable, record.workdir / "adapter")
    summary = {
        "split": run.evaluation.final_split,
        "records": len(run.final.records),
        "untuned": untuned,
        "tuned": tuned,
        "parameters": counts,
        "steps": total,
        **meter.cost(),
        "workdir": str(record.workdir),
        "adapter": folder,
    }
    scores = {"step": total, "records": len(run.final.records), **tuned}
    write_json(record.workdir / f"eval_{run.evaluation.final_split}.json", scores)
    write_json(summary_path, summary)
    return summary


def introduce(counts: dict[str, int], run: setup.Run, first: int) -> None:
    """Says what is about to happen."""
    data, settings = run.data, run.train
    say(f"{share(counts)}; {counts['stored']:,} are stored once trained")
    lengths = ", ".join(str(shape.length) for shape in data.shapes)
    say(
        f"{data.total_steps} steps of {settings.batch_size} in {settings.epochs} epochs, padded to lengths {lengths} "
        f"(padding {data.padding:.1%})" + (f"; going on after step {first}" if first else "")
    )


def fresh_state(config: dict[str, Any], base: setup.Base, run: setup.Run, frozen: Any) -> TrainState:
    """The state before the first step, a function of the seed and the frozen weights alone."""
    key, start = jax.random.split(jax.random.key(config["seed"]))
    trainable = base.method.init(start, base.model, frozen)
    return TrainState(jnp.int32(0), trainable, run.tx.init(trainable), key)


def evaluation_due(step: int, total: int, every: int | None) -> bool:
    """Whether to evaluate after this step; after the last one the final evaluation comes anyway."""
    return every is not None and 0 < step < total and step % every == 0


def make_scorer(
    config: dict[str, Any], base: setup.Base, run: setup.Run, record: Record, frozen: Any, stop: Stop
) -> Callable[..., dict[str, float | None]]:
    """score(state, name, split) -> loss and metrics; it also records them, with the predictions and a few samples."""
    evaluation = run.evaluation
    body = make_eval_step(base.model, base.method, base.objective, axis=parallel.AXIS)
    step = parallel.eval_step(body)
    write = evaluate.make_writer(base, evaluation.batch_size, seed=config["seed"], check=stop.check)

    def score(state: TrainState, name: str, split: setup.Split) -> dict[str, float | None]:
        number = int(state.step)
        say(f"step {number}: evaluating on {len(split.records)} records of the {name} split")
        loss = evaluate.mean_loss(step, frozen, state.trainable, split, run, check=stop.check)
        prefix = "eval" if name == evaluation.split else name
        if not evaluation.metrics:  # the loss is all that is asked for, so nothing is decoded
            record.metrics(number, {f"{prefix}/{key}": value for key, value in loss.items()})
            say("  " + ", ".join(f"{key} {shown(value)}" for key, value in loss.items()))
            return loss
        predictions = write(*base.method.bind(frozen, state.trainable), split.prompts)
        rows = evaluate.rows(predictions, split)
        scores = loss | evaluate.score(evaluation.metrics, predictions, split)
        record.predictions(f"{name}_{number}", rows)
        record.metrics(number, {f"{prefix}/{key}": value for key, value in scores.items()})
        for row in rows[: evaluation.samples]:
            shown_row = {**row, "reference": row["references"][0]}
            say("\n".join(f"  {key:11} {shown_row[key]}" for key in ("source", "prediction", "reference")) + "\n")
        say("  " + ", ".join(f"{key} {shown(value)}" for key, value in scores.items()))
        return scores

    return score


def score_untuned(
    base: setup.Base, run: setup.Run, record: Record, frozen: Any, stop: Stop, config: dict[str, Any]
) -> dict[str, float | None]:
    """The final split's scores without any adaptation; decoded once per workdir."""
    path, split = record.workdir / "predictions" / "untuned.jsonl", run.final
    if not run.evaluation.metrics or base.objective.head is not None:  # a fresh head knows nothing
        return {}
    if path.exists():
        predictions = [row["prediction"] for row in read_lines(path)]
    else:
        say(f"decoding {len(split.records)} records with the untuned model")
        write = evaluate.make_writer(base, run.evaluation.batch_size, seed=config["seed"], check=stop.check)
        predictions = write(frozen, Adaptation(), plain(split.prompts, base))
        record.predictions("untuned", evaluate.rows(predictions, split))
    return evaluate.score(run.evaluation.metrics, predictions, split)


def plain(prompts: list[list[int]] | Encoded, base: setup.Base) -> list[list[int]] | Encoded:
    """Prompts without virtual tokens, which the untuned model does not have."""
    if isinstance(prompts, Encoded):
        return prompts._replace(examples=[without(example, base.model.vocabulary) for example in prompts.examples])
    return [[token for token in prompt if token < base.model.vocabulary] for prompt in prompts]


def export_adapter(base: setup.Base, config: dict[str, Any], frozen: Any, trainable: Any, folder: Path) -> str | None:
    """Writes the adaptation in PEFT's format; None, saying why, for one that PEFT cannot express."""
    try:
        publish.save_adapter(folder, base, config, frozen, *base.method.bind(frozen, trainable))
    except UserError as error:
        say(f"no adapter/ is written: {error}")
        return None
    return str(folder)

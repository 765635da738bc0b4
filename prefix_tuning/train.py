"""The loop: train, evaluate, save; stop at any moment and go on with the same command."""

import dataclasses
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefix_tuning import evaluate, hosts, metrics, population, publish, setup
from prefix_tuning.checkpoint import Checkpoints, checksum, plain
from prefix_tuning.data.pipeline import Tokens, without
from prefix_tuning.data.tasks import Encoded
from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import read_json, read_lines, write_json
from prefix_tuning.progress import Interrupted, Meter, Stop, say, share, shown
from prefix_tuning.record import WORKDIR, Record, check_config
from prefix_tuning.train_step import make_eval_step
from prefix_tuning.types import Adaptation, TrainState

SUMMARY = "summary.json"


@dataclasses.dataclass
class Member:
    """One of the runs that train together, and how far it is."""

    config: dict[str, Any]
    base: setup.Base
    run: setup.Run
    record: Record
    checkpoints: Checkpoints
    kept: Checkpoints | None  # where the best state is, if one is selected
    meter: Meter | None = None
    untuned: dict[str, float | None] = dataclasses.field(default_factory=dict)
    evaluated: bool = False  # since the last step
    best: dict[str, Any] | None = None  # "step" and "scores" of the best evaluation so far
    waited: int = 0  # evaluations since
    error: str | None = None  # what ended it

    @property
    def training(self) -> bool:
        """Whether further steps can change what comes out."""
        patience = self.run.evaluation.patience
        return self.error is None and (patience is None or self.waited <= patience)

    def read(self, pending: tuple[int, dict[str, Any]], *, alone: bool) -> None:
        """Takes in the sums of a step; what ends a run that is not alone is kept for later."""
        try:
            self.meter.read(pending)
        except UserError as error:
            if alone:
                raise
            self.error = str(error)
            say(f"{self.record.workdir}: {error}")

    def save(self, state: TrainState) -> None:
        """Starts to save all that the run needs to go on."""
        notes = {"evaluated": self.evaluated, "best": self.best, "waited": self.waited}
        self.checkpoints.save(state, meter=self.meter.notes(), **notes)

    def select(self, state: TrainState, scores: dict[str, float | None]) -> None:
        """Keeps the state if it is the best so far; raises `UserError` if nobody can know, the score being null."""
        name = self.run.evaluation.select
        if name is None:
            return
        if scores[name] is None:
            raise UserError(f"evaluation.select={name!r} is null on this machine; expected a score that it can compute")
        sign = -1 if metrics.lower_is_better(name) else 1
        if self.best is not None and sign * scores[name] <= sign * self.best["scores"][name]:
            self.waited += 1
            return
        self.best, self.waited = {"step": int(state.step), "scores": scores}, 0
        self.kept.save(state)

    def close(self) -> None:
        """Closes every file."""
        if self.meter is not None:
            self.meter.close()
        self.record.close()
        for checkpoints in (self.checkpoints, self.kept):
            if checkpoints is not None:
                checkpoints.close()


def train(config: dict[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Trains, evaluates and exports into `workdir`, going on from its newest checkpoint; returns the summary.

    Raises `UserError` for a config that cannot work, before anything is computed, and for a loss that is not finite;
    `Interrupted` with the exit code after SIGTERM or Ctrl-C, once the state is saved.
    """
    return train_together([config], [workdir])[0]


def train_together(configs: Sequence[dict[str, Any]], workdirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """As `train`, several runs in one compiled step, each into its own workdir as if it had been alone.

    Raises `UserError` as well for runs that cannot train together (population.py), and in the end, with the others
    finished, for those whose loss was not finite.
    """
    # ---- everything that can be wrong with what the user gave
    bases = [setup.make_base(config) for config in configs]
    runs = [setup.make_run(*made) for made in zip(configs, bases, strict=True)]
    settings, evaluation = runs[0].train, runs[0].evaluation
    if settings.population != 1:
        raise UserError(
            f"train.population={settings.population} is how many runs of a sweep train at once; expected 1 in a run of "
            "its own, or 'run.py sweep', or 'run.py train --runs=NAME,NAME'"
        )
    setup.check_rows(bases[0], runs[0])
    check_selection(runs[0])
    if len(configs) > 1:
        population.check(configs, bases, runs)
    for config, workdir in zip(configs, workdirs, strict=True):
        check_config(workdir, config, setup.usual(config))
    summaries = hosts.agreed(
        lambda: {str(w): read_json(Path(w) / SUMMARY, WORKDIR) for w in workdirs if (Path(w) / SUMMARY).exists()}
    )
    for workdir in summaries:
        say(f"{workdir} is finished; this is what came out")
    left = [i for i, workdir in enumerate(workdirs) if str(workdir) not in summaries]
    if not left:
        return list(summaries.values())
    alone = len(left) == 1
    largest = max(left, key=lambda i: setup.parameter_counts(bases[i].method, bases[i].model)["trained"])
    setup.check_memory(bases[largest], configs[largest], runs[largest], len(left))
    weights = setup.read_weights(bases[0], configs[0])
    members = []
    for i in left:
        record = Record(workdirs[i], configs[i])
        checkpoints = Checkpoints(record.workdir / "checkpoints", settings.keep)
        kept = Checkpoints(record.workdir / "best", 1) if evaluation.select else None
        members.append(Member(configs[i], bases[i], runs[i], record, checkpoints, kept))

    with Stop() as stop:
        # ---- weights, steps, states
        made = [[getattr(member, name) for member in members] for name in ("config", "base", "run")]
        kind = population.Single if alone else population.Population
        engine = kind(*([one[0] for one in made] if alone else made), weights)
        states = restore_together(members, engine.like) or engine.fresh()
        first, total = int(states[0].step), runs[0].data.total_steps
        # What has begun to differ, in data or weights, would never be noticed: every host adds to the same gradient.
        if hosts.count() > 1:
            config = zlib.crc32(json.dumps(configs, sort_keys=True).encode())
            hosts.same(config=config, steps=total, step=first, state=checksum(list(map(plain, states))))
        for number, member in enumerate(members):
            # Lines beyond the checkpoint come again; so does its own evaluation, if that was cut short.
            evaluated = member.evaluated
            member.record.start(lambda line, e=evaluated: line["step"] < first + ("train/loss" in line or e))
            member.meter = Meter(
                member.record,
                member.run.schedule,
                total=total,
                log_every=settings.log_every,
                first=first,
                notes=member.meter,
                quiet=number > 0,
            )
        introduce(members, first)
        engine.start(states)
        score = make_scorer(engine, members, stop)
        due = evaluations(runs[0])
        pending = None  # the last step's sums, read while the next one runs

        def read() -> None:
            nonlocal pending
            if pending is not None:
                step, sums = pending
                for member, own in zip(members, engine.read(sums), strict=True):
                    if member.training:
                        member.read((step, own), alone=alone)
                pending = None

        def save() -> None:
            read()
            for member, state in zip(members, engine.states(), strict=True):
                if member.error is None:
                    member.save(state)

        def evaluate_all(step: int) -> None:
            for number, (member, state) in enumerate(zip(members, engine.states(), strict=True)):
                if member.training and not member.evaluated:
                    member.meter.pause()
                    member.select(state, score(number, state, evaluation.split, member.run.split))
                    member.evaluated = True

        # ---- the loop
        try:
            score_untuned(engine, members, stop)
            if first in due:
                evaluate_all(first)
            for step, batch in enumerate(engine.batches(first), start=first + 1):
                if not any(member.training for member in members):
                    break
                stop.check()
                for member in members:
                    member.meter.resume()
                sums = engine.advance(batch)
                read()
                pending = (step, sums)
                for member in members:
                    member.evaluated = False
                if step in due:
                    read()
                    evaluate_all(step)
                if step % settings.checkpoint_every == 0 or step == total or not any(m.training for m in members):
                    save()
            # ---- what came out
            for number, (member, state) in enumerate(zip(members, engine.states(), strict=True)):
                if member.error is None:
                    summary = finish(engine, number, member, state, score, together=len(members))
                    summaries[str(workdirs[left[number]])] = summary
        except Interrupted:
            save()
            say(f"stopped after step {int(engine.states()[0].step)} of {total}; the same command goes on from there")
            raise
        finally:
            if hosts.lost(sys.exception()) is None:  # else what is still being saved would wait for the lost one
                for member in members:
                    member.close()
    failed = [f"{member.record.workdir}: {member.error}" for member in members if member.error is not None]
    if failed:
        raise UserError(f"{len(failed)} of {len(members)} runs failed; {'; '.join(failed)}")
    return [summaries[str(workdir)] for workdir in workdirs]


def finish(
    engine: population.Single | population.Population,
    number: int,
    member: Member,
    state: TrainState,
    score: Callable[..., dict[str, float | None]],
    *,
    together: int,
) -> dict[str, Any]:
    """Scores and exports what a run comes out with, and writes its summary."""
    run, evaluation, steps = member.run, member.run.evaluation, int(state.step)
    member.checkpoints.wait()  # a summary says that all is saved
    if member.best is not None:
        member.kept.wait()
        trainable, step = member.kept.restore_trainable(state.trainable)
        state = state.replace(trainable=trainable, step=step)
    if member.best is not None and evaluation.final_split == evaluation.split:
        tuned = member.best["scores"]
    else:
        tuned = score(number, state, evaluation.final_split, run.final)
    target = member.record.workdir / "adapter"
    folder = export_adapter(member.base, member.config, engine.own(number), state.trainable, target)
    summary = {
        "split": evaluation.final_split,
        "records": len(run.final.records),
        "untuned": member.untuned,
        "tuned": tuned,
        "parameters": setup.parameter_counts(member.base.method, member.base.model),
        "steps": steps,
        "selected": None if member.best is None else {"step": int(state.step), "by": evaluation.select},
        "population": together,
        **member.meter.cost(together),
        "workdir": str(member.record.workdir),
        "adapter": folder,
    }
    scores = {"step": int(state.step), "records": len(run.final.records), **tuned}

    def written() -> dict[str, Any]:
        write_json(member.record.workdir / f"eval_{evaluation.final_split}.json", scores)
        write_json(member.record.workdir / SUMMARY, summary)
        return summary

    return hosts.agreed(written)


def restore_together(members: Sequence[Member], likes: Sequence[TrainState]) -> list[TrainState] | None:
    """The states after the last step that all runs have saved, with what was noted beside them; None without one."""
    limit = None
    while True:
        found = [m.checkpoints.restore(like, limit) for m, like in zip(members, likes, strict=True)]
        steps = [0 if one is None else int(one[0].step) for one in found]
        if len(set(steps)) == 1:
            break
        limit = min(steps)  # one was stopped while it saved, or had trained alone
    if all(one is None for one in found):
        return None
    for member, (_, notes) in zip(members, found, strict=True):
        member.evaluated, member.meter = notes["evaluated"], notes["meter"]
        member.best, member.waited = notes.get("best"), notes.get("waited", 0)
    return [state for state, _ in found]


def introduce(members: Sequence[Member], first: int) -> None:
    """Says what is about to happen."""
    for member in members:
        counts = setup.parameter_counts(member.base.method, member.base.model)
        name = "" if len(members) == 1 else f"{member.record.workdir}: "
        say(f"{name}{share(counts)}; {counts['stored']:,} are stored once trained")
    data, settings = members[0].run.data, members[0].run.train
    lengths = ", ".join(str(shape.length) for shape in data.shapes)
    say(
        f"{data.total_steps} steps of {settings.batch_size} in {settings.epochs} epochs, padded to lengths {lengths} "
        f"(padding {data.padding:.1%})"
        + (f", {len(members)} runs in each" if len(members) > 1 else "")
        + (f"; going on after step {first}" if first else "")
    )


def evaluations(run: setup.Run) -> set[int]:
    """The steps to evaluate after; the last one only where it may be selected: the final evaluation comes anyway."""
    total, steps = run.data.total_steps, run.data.steps_per_epoch
    due: set[int] = set()
    if run.train.eval_every is not None:
        due = set(range(run.train.eval_every, total, run.train.eval_every))
    if run.train.eval_epochs is not None:
        due = {sum(steps[:n]) for n in range(run.train.eval_epochs, len(steps), run.train.eval_epochs)}
    return due | ({total} if run.evaluation.select else set())


def check_selection(run: setup.Run) -> None:
    """Raises `UserError` for a checkpoint that could not be selected, or an evaluation that would do nothing."""
    settings, evaluation = run.train, run.evaluation
    if settings.eval_every is not None and settings.eval_epochs is not None:
        raise UserError("train.eval_every and train.eval_epochs both say when to evaluate; expected one of them")
    for name in ("eval_every", "eval_epochs"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise UserError(f"train.{name} must be at least 1 or None, got {getattr(settings, name)}")
    if evaluation.select is None:
        if evaluation.patience is not None:
            raise UserError("evaluation.patience waits for a better evaluation.select, which is None; name a score")
        return
    if evaluation.patience is not None and evaluation.patience < 0:
        raise UserError(f"evaluation.patience must be at least 0 or None, got {evaluation.patience}")
    if settings.eval_every is None and settings.eval_epochs is None:
        raise UserError(
            "evaluation.select needs evaluations to choose among: set train.eval_every or train.eval_epochs"
        )
    # What the metrics return for the first record, were it answered rightly, has the names that they always return.
    first = run.split._replace(records=run.split.records.select([0]))
    found = evaluate.score(evaluation.metrics, [first.records["targets"][0][0]], first)
    known = ["loss", "accuracy", *(["perplexity"] if isinstance(run.split.pairs[0], Tokens) else []), *found]
    valid("evaluation.select", evaluation.select, dict.fromkeys(known))


def make_scorer(
    engine: population.Single | population.Population, members: Sequence[Member], stop: Stop
) -> Callable[..., dict[str, float | None]]:
    """score(number, state, name, split) -> loss and metrics of one run.

    It also records them, with the predictions and a few samples.
    """
    base, evaluation, layout = members[0].base, members[0].run.evaluation, members[0].base.layout
    step = layout.eval_step(make_eval_step(base.model, engine.method, base.objective, axis=layout.axis))
    write = evaluate.make_writer(base, evaluation.batch_size, check=stop.check)

    def score(number: int, state: TrainState, name: str, split: setup.Split) -> dict[str, float | None]:
        member, at = members[number], int(state.step)
        record, run = member.record, member.run
        where = "" if len(members) == 1 else f"{record.workdir}, "
        say(f"{where}step {at}: evaluating on {len(split.records)} records of the {name} split")
        frozen, trainable = engine.bound(number, state.trainable)
        loss = evaluate.mean_loss(step, layout, frozen, trainable, split, run, check=stop.check)
        prefix = "eval" if name == evaluation.split else name
        if not evaluation.metrics:  # the loss is all that is asked for, so nothing is decoded
            record.metrics(at, {f"{prefix}/{key}": value for key, value in loss.items()})
            say("  " + ", ".join(f"{key} {shown(value)}" for key, value in loss.items()))
            return loss
        predictions = write(*engine.method.bind(frozen, trainable), split.prompts, member.config["seed"])
        rows = evaluate.rows(predictions, split)
        scores = loss | hosts.agreed(lambda: evaluate.score(evaluation.metrics, predictions, split))
        record.predictions(f"{name}_{at}", rows)
        record.metrics(at, {f"{prefix}/{key}": value for key, value in scores.items()})
        for row in rows[: evaluation.samples]:
            shown_row = {**row, "reference": row["references"][0]}
            say("\n".join(f"  {key:11} {shown_row[key]}" for key in ("source", "prediction", "reference")) + "\n")
        say("  " + ", ".join(f"{key} {shown(value)}" for key, value in scores.items()))
        return scores

    return score


def score_untuned(engine: population.Single | population.Population, members: Sequence[Member], stop: Stop) -> None:
    """Gives every run the final split's scores without any adaptation; decoded once per workdir, or for all at once."""
    first, evaluation = members[0], members[0].run.evaluation
    base, split = first.base, first.run.final
    if not evaluation.untuned or not evaluation.metrics or base.objective.head is not None:
        return  # a fresh head knows nothing
    paths = [member.record.workdir / "predictions" / "untuned.jsonl" for member in members]
    predictions = hosts.agreed(
        lambda: next(([row["prediction"] for row in read_lines(path)] for path in paths if path.exists()), None)
    )
    if predictions is None:
        say(f"decoding {len(split.records)} records with the untuned model")
        write = evaluate.make_writer(base, evaluation.batch_size, check=stop.check)
        prompts = without_virtual(split.prompts, base)
        predictions = write(engine.own(0), Adaptation(), prompts, first.config["seed"])
    scores = hosts.agreed(lambda: evaluate.score(evaluation.metrics, predictions, split))
    for member, path in zip(members, paths, strict=True):
        member.untuned = scores
        if not path.exists():
            member.record.predictions("untuned", evaluate.rows(predictions, split))


def without_virtual(prompts: list[list[int]] | Encoded, base: setup.Base) -> list[list[int]] | Encoded:
    """Prompts without virtual tokens, which the untuned model does not have."""
    if isinstance(prompts, Encoded):
        return prompts._replace(examples=[without(example, base.model.vocabulary) for example in prompts.examples])
    return [[token for token in prompt if token < base.model.vocabulary] for prompt in prompts]


def export_adapter(base: setup.Base, config: dict[str, Any], frozen: Any, trainable: Any, folder: Path) -> str | None:
    """Writes the adaptation in PEFT's format; None, saying why, for one that PEFT cannot express."""
    try:
        publish.save_adapter(folder, base, config, frozen, *base.method.bind(frozen, base.layout.place(trainable)))
    except UserError as error:
        say(f"no adapter/ is written: {error}")
        return None
    return str(folder)

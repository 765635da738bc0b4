"""Config -> everything a run needs: the only place that looks names up, before an accelerator is touched."""

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import optax

from prefix_tuning import data, fit, parallel, positions
from prefix_tuning.attention import FEW
from prefix_tuning.data import pipeline, tasks
from prefix_tuning.decode import DecodeConfig
from prefix_tuning.errors import UserError, at_least_one, valid
from prefix_tuning.heads import with_head
from prefix_tuning.methods import METHODS
from prefix_tuning.metrics import METRICS
from prefix_tuning.models import loading
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.optimizer import make_optimizer
from prefix_tuning.registry import call, defaults, fits, in_words, named, options_of
from prefix_tuning.types import Adaptation, Batch, Compute, Method, Model, Objective, Params, TrainState, count, joined

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("decode", "parallel", "mesh")  # not in every config
SECTIONS = ("seed", "model", "dataset", "text", "method", "objective", "optimizer", "train", "evaluation", *OPTIONAL)
# What `abstract_trainable` has found, by the method's `init` and the model's `hidden`.
TRAINABLE: weakref.WeakKeyDictionary[Callable, dict[Callable, Params]] = weakref.WeakKeyDictionary()
# What the section `model` need not say.
MODEL = {"dtype": "float32", "scan": True, "remat": False, "attention": "plain", "weights": "full"}
KERNELS = ("plain", "cudnn")  # for attention


class Train(NamedTuple):
    """The section `train`."""

    batch_size: int  # examples per step (rows, when packing), over all devices and micro-batches
    epochs: int
    population: int = 1  # runs of a sweep that train in one compiled step
    examples: int | None = None  # pairs drawn from the training split; None takes all
    draw: int | None = None  # the seed of that draw; None is the run's, so that a subset may have several runs
    accumulate: int = 1  # micro-batches per step
    packing: bool = False
    shapes: int = 4  # padded lengths that batches may have
    prefetch: int = 8  # batches made ahead
    log_every: int = 10  # steps
    eval_every: int | None = None  # steps; without it and eval_epochs, only the end is evaluated
    eval_epochs: int | None = None
    checkpoint_every: int = 100  # steps
    keep: int = 2  # checkpoints


class Evaluation(NamedTuple):
    """The section `evaluation`."""

    metrics: tuple[str, ...]  # none of them: only the loss is computed, and nothing is decoded
    batch_size: int = 16
    split: str = "validation"  # while training
    final_split: str = "validation"  # at the end, untuned against tuned
    examples: int | None = None  # records, each with all its references; None takes all
    pairs: int | None = None  # of those records, drawn, that the loss is computed on; None takes all
    untuned: bool = True  # whether the model without any adaptation is scored as well
    samples: int = 3  # shown after each evaluation
    select: str | None = None  # the score whose best checkpoint is what comes out; None takes the last one
    patience: int | None = None  # evaluations that may follow the best one before training stops


class Base(NamedTuple):
    """What training, evaluation and generation share."""

    model: Model
    folder: Path
    tokenizer: Any
    method: Method  # with the objective's head, if it has one
    bare: Method  # without
    objective: Objective
    task: tasks.Task | None  # None: answers are generated
    text: dict[str, Any]  # how examples are tokenised, the method's template filled in
    decode: DecodeConfig | None
    taken: positions.Taken  # positions that the method takes from real tokens
    layout: parallel.Layout  # where arrays lie


class Split(NamedTuple):
    """Records to answer and score."""

    prompts: list[list[int]] | tasks.Encoded
    records: datasets.Dataset  # columns source, targets, and perhaps group, which some metrics tell apart
    pairs: list[pipeline.Tokens] | list[pipeline.Example]  # for the loss


class Run(NamedTuple):
    """What training needs beyond `Base`."""

    train: Train
    evaluation: Evaluation
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    data: pipeline.TrainData
    split: Split
    final: Split


def make_base(config: dict[str, Any]) -> Base:
    """Model, tokenizer, method and decoder, without the weights; raises `UserError` for anything that cannot work."""
    check_sections(config)
    for key in config["model"]:
        valid("key in config section model:", key, ("name", *MODEL))
    valid("model.dtype", config["model"].get("dtype", MODEL["dtype"]), loading.DTYPES)
    weights = valid("model.weights", config["model"].get("weights", MODEL["weights"]), loading.WEIGHTS)
    folder = loading.find_folder(resolve(config["model"]["name"]))
    # Unrolled layers take longer to compile and, on a CPU, less time to train: a loop copies what its derivative needs.
    # Rematerialised ones are computed twice, and of the first time only their inputs are kept.
    compute = Compute(**{name: config["model"].get(name, MODEL[name]) for name in Compute._fields})
    if compute.remat and not compute.scan:
        raise UserError(
            "model.remat=True saves nothing with model.scan=False, where XLA undoes it; expected one of them"
        )
    model = loading.read_model(folder, **compute._asdict())
    valid("model.attention", compute.attention, KERNELS)
    tokenizer = loading.load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer; text cannot be read without")
    method = named("method", METHODS, config["method"], tokenizer)
    objective = named("objective", OBJECTIVES, config["objective"], tokenizer)
    kind = config["objective"]["name"]
    task = named("objective", tasks.TASKS, config["objective"]) if objective.predict else None
    if (task is None) != ("decode" in config):
        wrong = "lacks the section decode" if task is None else "has a section decode, which would do nothing"
        raise UserError(f"a config with objective {kind!r} {wrong}")
    if task is None and not model.writes:
        raise UserError(
            f"a {model.config['model_type']} model writes no text, which objective {kind!r} is about; "
            f"valid: {', '.join(tasks.TASKS)}"
        )
    if task is not None and model.is_encoder_decoder:
        raise UserError(
            f"a {model.config['model_type']} model answers in text; expected objective 'lm', with the names of classes "
            f"as targets, instead of {kind!r}"
        )
    if kind == "choice" and one_text_a_row(method, model):
        raise UserError(
            "objective 'choice' reads several texts in a row, and an encoder's prompt belongs to one; "
            "valid: method.name='ptuning' with a template, or a prefix"
        )
    if weights == "int8":
        check_int8(config["method"]["name"], method, model)
    if compute.attention == "cudnn":
        check_cudnn(config["model"].get("dtype", MODEL["dtype"]), method, model)
    bare = method
    if objective.head is not None:
        method = with_head(method, objective.head)
    return Base(
        model=model,
        folder=folder,
        tokenizer=tokenizer,
        method=method,
        bare=bare,
        objective=objective,
        task=task,
        text=make_text(config["text"], method, model),
        decode=None if task else make_decode(config["decode"], tokenizer, folder),
        taken=positions.taken(abstract_adaptation(method, model), model),
        layout=parallel.make(model.specs, config.get("parallel", "replicated"), config.get("mesh")),
    )


def check_cudnn(dtype: str, method: Method, model: Model) -> None:
    """Raises `UserError` where cuDNN has no attention for a model and a method in this dtype, or no device for it."""
    needs = None
    if not parallel.has_cudnn():
        device = jax.local_devices()[0].device_kind
        needs = f"an NVIDIA GPU of compute capability 8.0 or more, and the device is {device}"
    elif dtype == "float32":
        needs = "model.dtype='bfloat16' or 'float16', and it is 'float32'"
    sizes = {size for sites in model.sites.values() for _, size in sites.kv.values()}
    if any(size % 8 or size > 128 for size in sizes):
        needs = f"heads of a multiple of 8 numbers, 128 at most, and they have {', '.join(map(str, sorted(sizes)))}"
    if needs:
        raise UserError(f"model.attention='cudnn' needs {needs}; expected 'plain'")
    row = jax.ShapeDtypeStruct((1, FEW + 1), jnp.int32)
    source = {"source": row, "source_positions": row, "source_segments": row} if model.is_encoder_decoder else {}
    batch = Batch(*[row] * 3, *[None] * 4, **source)  # of a row that is long enough for a kernel
    jax.eval_shape(model.hidden, abstract_frozen(method, model, dtype), abstract_adaptation(method, model), batch)


def check_sections(config: dict[str, Any]) -> None:
    """Raises `UserError` for sections that a config lacks, or that nobody reads."""
    unknown = [key for key in config if key not in SECTIONS]
    missing = [key for key in SECTIONS if key not in (*config, *OPTIONAL)]
    if unknown or missing:
        told = [f"{what} {', '.join(keys)}" for what, keys in (("unknown:", unknown), ("lacking:", missing)) if keys]
        raise UserError(f"config sections {' and '.join(told)}; expected {', '.join(SECTIONS)}")
    for section, key in (("model", "name"), ("dataset", "path")):
        if not isinstance(config[section].get(key), str):
            raise UserError(f"{section}.{key} is {config[section].get(key)!r}; expected a text")


def check_inputs(configs: dict[str, dict[str, Any]]) -> None:
    """Raises `UserError`, naming the first run that needs it, for a model or a data set that cannot be read.

    Each is read once, however many runs share it, and no weights; the process that starts runs must leave accelerators
    to them, so that none is touched.
    """
    read: set[str] = set()
    for name, config in configs.items():
        try:
            check_sections(config)
            if (key := config["model"]["name"]) not in read:
                read.add(key)
                loading.read_config(loading.find_folder(resolve(key)))
            splits = call("evaluation", Evaluation, config["evaluation"])
            for split in ("train", splits.split, splits.final_split):
                if (key := json.dumps([config["dataset"], split])) not in read:
                    read.add(key)
                    load_split(config, split)
        except UserError as error:
            raise UserError(f"run {name!r}: {error}") from error


def check_int8(name: str, method: Method, model: Model) -> None:
    """Raises `UserError` for a method that trains matrices which are frozen in 8 bits."""
    changed: list[str] = []

    def bind(frozen: Params, trainable: Params) -> None:
        bound = {name: joined(weights) for name, weights in method.bind(frozen, trainable)[0].items()}
        kept = set(map(id, jax.tree.leaves(bound)))
        for path, spec in loading.paths(model.specs):
            leaf = loading.flatten({path[0]: frozen[path[0]]})[path]
            if loading.contracted(path, spec) is not None and id(leaf) not in kept:
                changed.append("/".join(path))

    jax.eval_shape(bind, abstract_frozen(method, model), abstract_trainable(method, model))
    if changed:
        raise UserError(
            f"method {name!r} trains weights that model.weights='int8' freezes in 8 bits "
            f"({', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}); expected model.weights='full', or a "
            "method that adds to them, such as prefix or lora"
        )


def usual(config: dict[str, Any]) -> dict[str, Any]:
    """What options are that a config leaves out, by section, as far as they have a default."""
    task = config["objective"]["name"] in tasks.TASKS
    encode = named("objective", tasks.TASKS, config["objective"]).encode if task else pipeline.encode
    factories = {"text": encode, "optimizer": make_optimizer, "train": Train, "evaluation": Evaluation}
    factories |= {
        name: known[config[name]["name"]]
        for name, known in (("method", METHODS), ("objective", OBJECTIVES), ("dataset", data.DATASETS))
    }
    found = {name: defaults(factory) for name, factory in (factories | {"decode": DecodeConfig}).items()}
    found["method"]["parts"] = {part: defaults(METHODS[part]) for part in config["method"].get("parts", {})}
    return found | {"model": MODEL}


def make_text(section: dict[str, Any], method: Method, model: Model) -> dict[str, Any]:
    """The section `text` with the prompt as the method's template has it."""
    prompt = section.get("prompt")
    if not isinstance(prompt, str):
        raise UserError(f"text.prompt is {prompt!r}; expected a template such as '{{source}}\n'")
    if "{rows:" in prompt:
        raise UserError("text.prompt has {rows:N}; virtual tokens belong to a method: set method.template instead")
    refuse("text", section, ("virtual", "start"), "the model's")
    return section | {"prompt": method.template.replace("{prompt}", prompt), "virtual": model.vocabulary}


def refuse(name: str, section: dict[str, Any], taken: Sequence[str], whose: str) -> None:
    """Raises `UserError` for options of a config section that are not the user's to set, rather than ignoring them."""
    for key in taken:
        if key in section:
            raise UserError(f"config section {name} has {key!r}, which is {whose}; drop it")


def load_weights(base: Base, config: dict[str, Any]) -> Params:
    """The frozen weights, and what the method keeps beside them, which the layout has yet to place."""
    return prepare(base, config, read_weights(base, config))


def read_weights(base: Base, config: dict[str, Any]) -> Params:
    """The frozen weights alone, where the layout has them."""
    section = MODEL | config["model"]
    return loading.load_weights(
        base.folder, base.model, section["dtype"], base.layout.where, weights=section["weights"]
    )


def check_memory(base: Base, config: dict[str, Any], run: Run | None = None, together: int = 1) -> None:
    """Raises `UserError` for weights and, with a run, its state that are more than a device's memory.

    So many runs that train `together`, none with more parameters than this one, share the weights alone.
    """
    section = MODEL | config["model"]
    weights = loading.abstract(base.model, section["dtype"], section["weights"])
    frozen = abstract_frozen(base.method, base.model, section["dtype"], section["weights"])
    trainable = abstract_trainable(base.method, base.model)
    own = {"what the method keeps": {name: x for name, x in frozen.items() if name not in weights}}
    own["trained parameters"] = trainable
    if run is not None:
        own["optimizer state"] = jax.eval_shape(run.tx.init, trainable)
    if together > 1:
        each = together // jax.local_device_count() if base.layout.by_run(together) else together
        stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((each, *x.shape), x.dtype), own)
        own = {f"{name} of {each} of {together} runs": tree for name, tree in stacked.items()}
    parts = {"weights": weights} | {name: tree for name, tree in own.items() if jax.tree.leaves(tree)}
    parallel.check_memory(base.layout, base.model.specs, parts, parallel.memory_limit())


def prepare(base: Base, config: dict[str, Any], weights: Params) -> Params:
    """The frozen weights, and beside them what the method keeps."""
    return base.method.prepare(jax.random.key(config["seed"]), base.model, weights)


def fresh_state(config: dict[str, Any], base: Base, run: Run, frozen: Params) -> TrainState:
    """The state before the first step, a function of the seed and the frozen weights alone."""
    key, start = jax.random.split(jax.random.key(config["seed"]))
    trainable = base.method.init(start, base.model, frozen)
    return TrainState(jnp.int32(0), trainable, run.tx.init(trainable), key)


def abstract_state(base: Base, run: Run) -> TrainState:
    """The shapes of a run's state."""
    trainable = abstract_trainable(base.method, base.model)
    key = jax.eval_shape(jax.random.key, 0)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(run.tx.init, trainable), key)


def make_run(config: dict[str, Any], base: Base) -> Run:
    """Data and optimizer; raises `UserError` for anything that cannot work, lengths included."""
    train = call("train", Train, config["train"])
    evaluation = call("evaluation", Evaluation, config["evaluation"])
    with options_of("train"):
        counts = ("examples", "accumulate", "log_every", "checkpoint_every", "keep")
        at_least_one(**{name: getattr(train, name) for name in counts})
    with options_of("evaluation"):
        at_least_one(batch_size=evaluation.batch_size, examples=evaluation.examples, pairs=evaluation.pairs)
    for name in evaluation.metrics:
        valid("metric", name, METRICS)
    if train.draw is not None and train.examples is None:
        raise UserError(
            f"train.draw={train.draw} is the seed that draws train.examples, which is None; set both or neither"
        )
    pairs = load_split(config, "train")
    if train.examples is not None:
        pairs = said(data.subsample, pairs, train.examples, config["seed"] if train.draw is None else train.draw)
    if train.packing and one_text_a_row(base.method, base.model):
        raise UserError("train.packing puts several texts in a row, and an encoder's prompt belongs to one; drop it")
    examples = encode(base, pairs)
    check_lengths("train", base, examples)
    options = {"batch_size": train.batch_size, "epochs": train.epochs, "seed": config["seed"], "packing": train.packing}
    options |= {"shapes": train.shapes, "prefetch": train.prefetch, "part": base.layout.part(train.accumulate)}
    stream = call("train", pipeline.train_data, options, examples)
    tx, schedule = call("optimizer", make_optimizer, config["optimizer"], stream.total_steps)
    if evaluation.pairs is not None and base.task is not None:
        raise UserError(
            f"evaluation.pairs={evaluation.pairs} is for texts with several references; objective.name="
            f"{config['objective']['name']!r} takes evaluation.examples alone"
        )
    split = make_split(config, base, evaluation.split, evaluation)
    final = split
    if evaluation.final_split != evaluation.split:
        final = make_split(config, base, evaluation.final_split, evaluation)
    return Run(train, evaluation, tx, schedule, stream, split, final)


def check_rows(base: Base, run: Run) -> None:
    """Raises `UserError` unless every batch can be split over the devices."""
    with options_of("train"):
        base.layout.check_rows(run.train.batch_size, run.train.accumulate)
    with options_of("evaluation"):
        base.layout.check_rows(run.evaluation.batch_size)


def make_split(config: dict[str, Any], base: Base, name: str, evaluation: Evaluation) -> Split:
    """A split's records with their references, as many as `evaluation` says drawn, always the same ones."""
    pairs = load_split(config, name)
    records = data.group_references(pairs) if base.task is None else pairs
    if evaluation.examples is not None:
        records = said(data.subsample, records, min(evaluation.examples, len(records)), 0)
    if base.task is not None:
        encoded = make_prompts(base, records, name)
        told = [{"source": base.task.source(row), "targets": base.task.references(row)} for row in encoded.rows]
        return Split(encoded, datasets.Dataset.from_list(told), encoded.examples)
    kept = set(records["source"])
    pairs = pairs.select([i for i, source in enumerate(pairs["source"]) if source in kept])
    if evaluation.pairs is not None:
        pairs = said(data.subsample, pairs, min(evaluation.pairs, len(pairs)), 0)
    return Split(make_prompts(base, records, name), records, encode(base, pairs))


def encode(base: Base, pairs: datasets.Dataset) -> list[pipeline.Tokens] | list[pipeline.Example]:
    """Rows of a data set as examples to train on."""
    for name in ("prompt", "completion"):
        if name in base.text:
            pipeline.check_fields(f"text.{name}", base.text[name], pairs.column_names)
    if base.task is None:
        options = base.text | {"start": base.model.start}
        return said(call, "text", pipeline.encode, options, pairs, base.tokenizer)
    return said(
        call, "text", base.task.encode, base.text, pairs, base.tokenizer, base.model.entry == "encoder"
    ).examples


def make_prompts(
    base: Base, records: datasets.Dataset | list[dict[str, Any]], name: str = "given"
) -> list[list[int]] | tasks.Encoded:
    """What answers are made from; raises `UserError` if one leaves no room for what may be generated."""
    if base.task is not None:
        if isinstance(records, list):
            records = datasets.Dataset.from_list(records)
        first = base.model.entry == "encoder"
        encoded = said(call, "text", base.task.encode, base.text, records, base.tokenizer, first)
        check_lengths(name, base, encoded.examples)
        return encoded
    if isinstance(records, list):
        records = datasets.Dataset.from_list([{"source": row["source"]} for row in records])
    options = {name: base.text[name] for name in ("prompt", "max_source", "virtual")}
    prompts = call("text", pipeline.encode_prompts, options, records, base.tokenizer)
    longest, new = max(map(len, prompts)), base.decode.max_new_tokens
    check_positions(base, {f"longest source of the {name} split": longest}, {"decode.max_new_tokens": new})
    return prompts


def load_split(config: dict[str, Any], split: str) -> datasets.Dataset:
    """One split of the data set that the config names."""
    section = dict(config["dataset"])
    path = resolve(section.pop("path"))
    return said(named, "dataset", data.DATASETS, section, path, split)


def make_decode(section: dict[str, Any], tokenizer: Any, folder: Path) -> DecodeConfig:
    """A `DecodeConfig`; its banned tokens are given as texts of one token each, its end token is the tokenizer's."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder} has no tokenizer with an end token (eos_token); text cannot be written without")
    refuse("decode", section, ("end_tokens", "pad_token"), "the tokenizer's")
    options = dict(section)
    banned, texts = [], options.pop("banned", ())
    if not fits(texts, tuple[str, ...]):
        raise UserError(f"decode.banned is {texts!r}; expected {in_words(tuple[str, ...])}")
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"decode.banned: {text!r} is {len(ids)} tokens; expected texts of one token")
        banned += ids
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options |= {"banned": tuple(banned), "end_tokens": (end,), "pad_token": pad}
    return call("decode", DecodeConfig, options)


def abstract_frozen(method: Method, model: Model, dtype: str = "float32", weights: str = "full") -> Params:
    """The shapes of the weights and of what a method keeps beside them, without weights or arithmetic."""
    prepare = lambda key, frozen: method.prepare(key, model, frozen)  # noqa: E731
    return jax.eval_shape(prepare, jax.random.key(0), loading.abstract(model, dtype, weights))


def abstract_trainable(method: Method, model: Model) -> Params:
    """The shapes of what a method trains; traced once, since some take a second and every run asks a few times."""
    known = TRAINABLE.setdefault(method.init, {})
    if model.hidden not in known:
        init = lambda key, frozen: method.init(key, model, frozen)  # noqa: E731
        known[model.hidden] = jax.eval_shape(init, jax.random.key(0), abstract_frozen(method, model))
    return known[model.hidden]


def abstract_adaptation(method: Method, model: Model) -> Adaptation:
    """The shapes of what a method makes; raises `UserError` for what this model does not offer."""
    adaptation = jax.eval_shape(method.bind, abstract_frozen(method, model), abstract_trainable(method, model))[1]
    fit.check(adaptation, model.sites, rows=1)
    return adaptation


def one_text_a_row(method: Method, model: Model) -> bool:
    """Whether rows may hold one text only: the rows of a prompt see the text in an encoder, and so belong to it."""
    return model.entry == "encoder" and abstract_adaptation(method, model).prompt is not None


def check_lengths(split: str, base: Base, examples: list[pipeline.Tokens] | list[pipeline.Example]) -> None:
    """Raises `UserError` if what is read or written does not fit the model's positions."""
    longest = pipeline.longest(examples)
    if base.model.is_encoder_decoder:
        written = {f"longest target of the {split} split": max(len(example.read) for example in examples)}
        check_positions(base, {f"longest source of the {split} split": longest}, written)
    else:
        check_positions(base, {f"longest source and target of the {split} split": longest}, {})


def check_positions(base: Base, read: dict[str, int], written: dict[str, int]) -> None:
    """Raises `UserError` if lengths, and what the method takes, are more positions than the model has."""
    options = "method.length, text.max_source, text.max_target or decode.max_new_tokens"
    if base.task is not None:
        options = "method.length or text.max_length"
    positions.check(base.model, base.taken, read, written, f"shorten {options}")


def parameter_counts(method: Method, model: Model) -> dict[str, int]:
    """How many parameters are trained, stored once trained, and frozen."""
    trainable = abstract_trainable(method, model)
    stored = jax.eval_shape(method.stored, abstract_frozen(method, model), trainable)
    return {"trained": count(trainable), "stored": count(stored), "frozen": count(model.specs)}


def resolve(path: str) -> str:
    """`path`, or the same below the repository, so that shipped configs run from any folder."""
    inside = ROOT / path
    return str(inside) if not Path(path).exists() and inside.exists() else path


def said(function: Callable, *arguments: Any, **options: Any) -> Any:
    """Calls a function of `data`, whose plain ValueErrors are about what the user gave, and makes them `UserError`s."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        raise UserError(str(error)) from error

"""The Python interface, and what the commands do with a workdir."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_tuning import evaluate, hosts, positions, publish, setup
from prefix_tuning import parallel as layouts
from prefix_tuning.checkpoint import Checkpoints
from prefix_tuning.decode import DecodeConfig, make_generate, ready
from prefix_tuning.errors import UserError, valid
from prefix_tuning.files import guarded, lines_of, read_json, read_text, replace, write_json
from prefix_tuning.interop import kv, merged, peft, reading
from prefix_tuning.interop.base import fingerprint
from prefix_tuning.methods import compose
from prefix_tuning.models import loading
from prefix_tuning.record import WORKDIR
from prefix_tuning.registry import call, checked
from prefix_tuning.types import Adaptation, Batch, Model, Params

FORMATS = ("peft", "kv", "merged")
SOURCE = ("source", "source_positions", "source_segments")


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    weights: str = "full",
    parallel: str = "replicated",
    mesh: dict[str, int | None] | None = None,
) -> tuple[Model, Params, Any]:
    """(model, frozen weights, tokenizer or None) of a folder in Hugging Face layout, a name on the hub, or a gguf file
    of the Llama family.

    With weights="int8" matrices are held in 8 bits.  Weights are on the first device, or with parallel="sharded" split
    over a mesh such as {"data": 1, "model": 8} of all devices, as in a config; `logits` and `generate` then run on all.
    Raises `UserError`, with sizes and before any weight is read, where a device cannot hold them.
    """
    valid("dtype", dtype, loading.DTYPES)
    valid("weights", weights, loading.WEIGHTS)
    folder = loading.find_folder(name)
    model = loading.read_model(folder)
    layout = layouts.make(model.specs, parallel, mesh)
    held = loading.abstract(model, dtype, weights)
    layouts.check_memory(layout, model.specs, {"weights": held}, layouts.memory_limit())
    where = layout.where if isinstance(layout, layouts.Sharded) else lambda _: None
    frozen = loading.load_weights(folder, model, dtype, where, weights=weights)
    return model, frozen, loading.load_tokenizer(folder)


def load_adapter(folder: str, model: Model, frozen: Params) -> Adaptation:
    """The adaptation in a workdir's adapter/, any PEFT folder here or on the hub, or a file of another kind.

    See interop/reading.py for those.  Raises `UserError` if it does not fit the model.
    """
    return reading.load_adapter(folder, model, frozen)


def save_adapter(folder: str, adaptation: Adaptation, model: Model, frozen: Params | None = None) -> None:
    """Writes an adaptation in PEFT's layout, with the weights' fingerprint if they are given.

    Raises `UserError` for what PEFT cannot express.
    """
    if adaptation is None:
        raise UserError("None, which is the bare model, cannot be saved as an adapter; expected an adaptation")
    peft.save_adapter(folder, adaptation, model, model.config.get("_name_or_path", ""), frozen=frozen)


def combine_adapters(
    adaptations: Sequence[Adaptation], how: str = "concatenate", weights: Sequence[float] | None = None
) -> Adaptation:
    """Several trained adaptations as one, without training: "concatenate", or "average" with weights (1/n each).

    Raises `UserError` for averages of different shapes, and where two change the same thing.
    """
    return compose.combine(adaptations, how, weights)


def logits(
    model: Model,
    frozen: Params,
    adaptation: Adaptation | None,
    rows: Sequence[Sequence[int]],
    *,
    sources: Sequence[Sequence[int]] | None = None,
) -> list[np.ndarray]:
    """Next-token logits, float32 [T V] for each row of token ids, without padding.

    An encoder-decoder reads `sources`, one for each row, and rows are what its decoder reads, `model.start` first.
    """
    adaptation = adaptation or Adaptation()
    if (sources is not None) != model.is_encoder_decoder or (sources is not None and len(sources) != len(rows)):
        raise UserError(
            "logits of an encoder-decoder need one of sources=[...] for each row, and those of other models none"
        )
    read = None if sources is None else padded(model, adaptation, sources)
    tokens, lengths = padded(model, adaptation if read is None else None, rows)
    first = {"longest row": tokens.shape[1]} if read is None else {"longest source": read[0].shape[1]}
    rows = {} if read is None else {"longest row": tokens.shape[1]}
    positions.check(model, positions.taken(adaptation, model), first, rows)
    run = full_logits(model.hidden, model.unembed)
    with layouts.told_of(frozen):
        out = jax.device_get(run(frozen, adaptation, tokens, lengths, read))
    return [out[b, :length] for b, length in enumerate(lengths)]


def generate(
    model: Model,
    frozen: Params,
    adaptation: Adaptation | None,
    rows: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    **options: Any,
) -> list[list[int]]:
    """New token ids for each row of token ids, without the end token; options are `DecodeConfig`'s.

    To an encoder-decoder the rows are sources, and the start token is not among the new ones.  The end tokens are those
    of config.json unless `end_tokens` is given.
    """
    tokens, lengths = padded(model, adaptation, rows)
    end = model.config.get("eos_token_id")
    ends = options.pop("end_tokens", () if end is None else (end,) if isinstance(end, int) else tuple(end))
    config = checked("generate()", DecodeConfig, {"end_tokens": ends, "pad_token": ends[0] if ends else 0} | options)
    run = generator(HashableModel(model), config)
    frozen = ready(frozen, model)
    with layouts.told_of(frozen):
        new, counts = jax.device_get(run(frozen, adaptation or Adaptation(), tokens, lengths, jax.random.key(seed)))
    return [[int(i) for i in new[b, :n] if int(i) not in ends] for b, n in enumerate(counts)]


class HashableModel:
    """A model as a cache key: its functions tell it apart."""

    def __init__(self, model: Model):
        self.model = model

    def __hash__(self) -> int:
        return hash(self.model.prefill)

    def __eq__(self, other: object) -> bool:
        return self.model.prefill is other.model.prefill


@functools.lru_cache(maxsize=32)
def generator(model: HashableModel, config: DecodeConfig) -> Any:
    """A compiled decoder, kept for the next call."""
    return make_generate(model.model, config)


@functools.lru_cache(maxsize=32)
def full_logits(hidden: Any, unembed: Any) -> Any:
    """A compiled forward pass, kept for the next call."""

    def laid_out(tokens, lengths):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return tokens, positions, (positions < lengths[:, None]).astype(jnp.int32)

    @jax.jit
    def run(frozen, adaptation, tokens, lengths, read):
        none = jnp.zeros((len(tokens), 0), jnp.int32)
        source = {} if read is None else dict(zip(SOURCE, laid_out(*read), strict=True))
        predicted = (none, none, none.astype(jnp.float32), jnp.ones_like(lengths))
        batch = Batch(*laid_out(tokens, lengths), *predicted, **source)
        return unembed(frozen, hidden(frozen, adaptation, batch))

    return run


def padded(model: Model, adaptation: Adaptation | None, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B T] padded on the right, lengths [B]); raises `UserError` for what are no rows of possible ids."""
    virtual = 0 if adaptation is None or adaptation.rows is None else len(adaptation.rows)
    known = model.vocabulary + virtual
    for b, row in enumerate(rows):
        if not np.ndim(row) or (not np.issubdtype(np.asarray(row).dtype, np.integer) and len(row)):
            raise UserError(f"row {b} is {str(row)[:40]!r}; expected lists of token ids, such as [[5, 7, 9], [4]]")
    if not len(rows) or not all(len(row) for row in rows):
        raise UserError("expected at least one row, and at least one token id in each")
    for b, row in enumerate(rows):
        for i in row:
            if not 0 <= i < known:
                raise UserError(f"row {b} has token id {i}; valid: 0 to {known - 1}")
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return tokens, lengths


def open_workdir(workdir: str) -> tuple[dict[str, Any], setup.Base, Params, Params, int]:
    """(config, base, frozen, trainable, step) of a workdir's best or newest checkpoint; raises `UserError` without."""
    config = read_json(Path(workdir) / "config.json", WORKDIR)
    base = setup.make_base(config | layouts.here(config))
    # The best one where one is selected, else the newest
    folder = Path(workdir) / ("best" if config["evaluation"].get("select") else "checkpoints")
    if not folder.is_dir():
        raise UserError(f"{workdir} has no checkpoints; expected {WORKDIR}")
    setup.check_memory(base, config)
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore_trainable(base.layout.like(setup.abstract_trainable(base.method, base.model)))
    checkpoints.close()
    if found is None:
        raise UserError(f"{folder} holds no checkpoint yet; let 'run.py train' go on until it has saved one")
    trainable, step = found
    return config, base, base.layout.place(setup.load_weights(base, config)), base.layout.place(trainable), step


def evaluate_workdir(workdir: str, split: str) -> dict[str, Any]:
    """Decodes and scores a split with a workdir's newest checkpoint; writes eval_SPLIT.json and the predictions."""
    config, base, frozen, trainable, step = open_workdir(workdir)
    section = call("evaluation", setup.Evaluation, config["evaluation"])
    chosen = setup.make_split(config, base, split, section)
    write = evaluate.make_writer(base, section.batch_size)
    predictions = write(*base.method.bind(frozen, trainable), chosen.prompts, config["seed"])

    def written() -> dict[str, Any]:
        scores = {"step": step, "records": len(chosen.records), **evaluate.score(section.metrics, predictions, chosen)}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluate.rows(predictions, chosen))
        replace(Path(workdir) / "predictions" / f"{split}.jsonl", lines)
        write_json(Path(workdir) / f"eval_{split}.json", scores)
        return scores

    return hosts.agreed(written)


def generate_file(workdir: str, source: str, output: str) -> int:
    """Reads JSON lines with `source`, writes them with `prediction`, in order; returns how many.

    Of several hosts the first one reads and writes.
    """
    rows = hosts.agreed(lambda: read_sources(source, output))
    config, base, frozen, trainable, _ = open_workdir(workdir)
    section = call("evaluation", setup.Evaluation, config["evaluation"])
    prompts = setup.make_prompts(base, rows)
    write = evaluate.make_writer(base, section.batch_size)
    predictions = write(*base.method.bind(frozen, trainable), prompts, config["seed"])
    done = [row | {"prediction": prediction} for row, prediction in zip(rows, predictions, strict=True)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done)
    hosts.agreed(lambda: guarded(Path(output).parent, lambda: replace(Path(output), text)))
    return len(done)


def read_sources(source: str, output: str) -> list[dict[str, Any]]:
    """The objects of a file for `generate_file`; raises `UserError` for what is none, or could not be written."""
    rows = []
    for number, line in enumerate(lines_of(read_text(source)), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{source}:{number} is not JSON") from None
        if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("source"), str):
            raise UserError(f"{source}:{number} has no text under 'source'")
    if not rows:
        raise UserError(f"{source} is empty; expected JSON lines with 'source'")
    if not Path(output).resolve().parent.is_dir():
        raise UserError(f"cannot write {output}: its folder does not exist")
    if Path(output).is_dir():
        raise UserError(f"cannot write {output}: it is a folder; expected the name of a file")
    return rows


def export_workdir(
    workdirs: Sequence[str],
    format: str,
    output: str,
    *,
    how: str = "concatenate",
    weights: Sequence[float] | None = None,
) -> None:
    """Writes a workdir's newest adaptation in another format, or that of several as one, combined without training.

    Raises `UserError` for what the format cannot express, and for workdirs of different models.
    """
    valid("format", format, FORMATS)
    valid("way to combine", how, ("average", "concatenate"))
    if len(workdirs) < 2 and (how != "concatenate" or weights is not None):
        raise UserError("--combine and --weights are for several workdirs; expected --workdir=DIR,DIR or neither")
    for workdir in workdirs if format == "merged" else ():
        if read_json(Path(workdir) / "config.json", WORKDIR)["model"].get("weights") == "int8":
            raise UserError(
                f"{workdir} has model.weights='int8', which no merged model can be made of; valid: kv, peft"
            )
    opened = [open_workdir(workdir) for workdir in workdirs]
    config, base = opened[0][:2]
    for workdir, one in zip(workdirs, opened, strict=True):
        if one[1].objective.head is not None and (format == "kv" or len(opened) > 1):
            raise UserError(
                f"{workdir}: its task head has no place in plain keys and values, nor in several as one; valid formats "
                "for one with a head: peft, merged"
            )
    bound = [own.method.bind(frozen, trainable) for _, own, frozen, trainable, _ in opened]
    params, adaptation = jax.device_get(bound[0])
    if len(opened) > 1:
        others = {other["model"]["name"] for other, *_ in opened}
        if len(others) > 1:
            raise UserError(f"the workdirs adapt different models: {', '.join(sorted(others))}; expected one")
        if any(publish.new_weights(one[2], made[0]) for one, made in zip(opened, bound, strict=True)):
            raise UserError("fine-tuned weights cannot be combined; expected adaptations such as prefixes")
        adaptation = combine_adapters([jax.device_get(made) for _, made in bound], how, weights)
    if format == "merged":
        merged.save(output, base.model, params, adaptation, base.tokenizer, config["objective"])
    elif format == "kv":
        if publish.new_weights(opened[0][2], bound[0][0]):
            raise UserError(f"{workdirs[0]} has weights of its own, which have no place beside plain keys and values")
        kv.save(output, adaptation, base.model, params)
    else:
        publish.save_adapter(output, base, config, opened[0][2], bound[0][0], adaptation)


def import_adapter(config: dict[str, Any], source: str, workdir: str) -> None:
    """Makes a workdir whose training starts from an adapter made elsewhere, its task head included, or from a workdir.

    Raises `UserError` for what cannot be read, does not fit the config, or no method can start from.
    """
    if (Path(source) / "checkpoints").is_dir():
        _, other, frozen, trainable, _ = open_workdir(source)
        begin = functools.partial(publish.continued, jax.device_get(trainable), fingerprint(other.model, frozen))
    else:
        begin = functools.partial(publish.adopted, source, config)
    publish.start_from(config, begin, workdir)

"""Ours beside PEFT, speed and memory: the same weights, prefix, length, batches and precision, in turn.

    python -m experiments.bench --output=bench.json --e2e=FOLDER --sst2=FOLDER --smollm2=FOLDER --minilm=FOLDER
    python -m experiments.bench --parts=train,greedy --model=smollm2 --batch=10,largest --rounds=8

Each side is a process of its own, so that peak memory is its own, and waits while the other works.  `--parts` are

- train: a step on E2E, real tokens a second.  PEFT takes batches in random order, padded to their longest row, as its
  users have them, and also our batches, which hold rows of similar length.  `--batch` lists batch sizes; `largest` is
  the last doubling whose peak stays below `--memory` GiB (default: 80 % of what the machine has free, or of the GPU).
- greedy, beam: `--new` tokens for `--rows` prompts, and for 4 with 5 beams; both sides are made to write that many.
- texts: a whole text for each of the first `--records` of the validation split, greedily `--rows` at a time and with 5
  beams 4 at a time, by the trained prefix in `--adapter`, as `run.py train` leaves it: texts of E2E end at different
  lengths.  PEFT takes records in order and waits for the longest of each batch; ours gives a row that is done to the
  next.
- classify: a step on SST-2 with a head, for `bert`, batches of 32.
- profile: where the time of a step on the same batch, and of greedy decoding, goes on each side, by the names that XLA
  and torch give to operations: products of matrices (attention's too, where it is no operation of its own), those
  that only move numbers, the others, and none at all.  One run of each, whatever `--rounds` says.
- start: from the start of a process to the end of its first step, ours without and with a filled compilation cache,
  and how long loading weights and adapter takes of it.

`--model` lists smollm2 (SmolLM2-135M-Instruct), gpt2, gpt2-medium, gpt2-large, bert (these with random weights, made
once in `--workdir`) and quickstart, which needs no download and is too small to say anything about speed.  GFLOP/s are
XLA's count of our step, padding included, by its time: beside what the machine can do, they say how well it is used.
Compiling is not counted, but for `start`.  Every first loss and every text of ours is compared with PEFT's.  Ratios are
of medians.  A GPU is used where both find one; there take --dtype=bfloat16, and --attention=cudnn for long rows.  Needs
tests/requirements.txt; prints Markdown.

`largest` starts two processes for every doubling.
"""

import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import config_dict

import run
from experiments import in_turn, profiles
from prefix_tuning import models, setup
from prefix_tuning.data import pipeline
from prefix_tuning.files import read_json, write_json
from prefix_tuning.interop import peft
from prefix_tuning.models import loading
from prefix_tuning.types import KV, Adaptation, LayerHooks

PARTS = ("train", "greedy", "beam", "texts", "classify", "profile", "start")
SIDES = {"PEFT": "experiments.peft_side", "ours": "experiments.our_side"}
LEARNING_RATE, STEPS = 1e-3, 10_000
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "activation_function": "gelu_new",
} | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
BERT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SHAPES = {  # drawn at random; dropout 0, since the two sides would draw differently
    "gpt2": GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "bert": BERT,
}
MODELS = ("smollm2", *SHAPES, "quickstart")

FLAGS = flags.FlagValues()
ASKED = [part for part in PARTS if part not in ("texts", "profile")]
flags.DEFINE_list("parts", ASKED, f"of {', '.join(PARTS)}", flag_values=FLAGS)
flags.DEFINE_list("model", ["smollm2", "gpt2", "bert"], f"of {', '.join(MODELS)}", flag_values=FLAGS)
flags.DEFINE_list("batch", ["10"], "sizes of training batches, and largest", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 7, "turns of each side", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rows", 8, "prompts that are written at once without beams", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("new", 48, "tokens that are written", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("adapter", None, "the folder of a trained prefix, for texts", flag_values=FLAGS)
flags.DEFINE_integer("records", 64, "that get texts", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("memory", None, "GiB that the largest batch may take", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the frozen weights", flag_values=FLAGS)
flags.DEFINE_enum("attention", "plain", setup.KERNELS, "of our side", flag_values=FLAGS)
flags.DEFINE_string("workdir", "runs/bench", "where models are made", flag_values=FLAGS)
flags.DEFINE_string("output", None, "where the numbers go, as JSON", flag_values=FLAGS)
flags.DEFINE_string("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a name or folder", flag_values=FLAGS)
flags.DEFINE_string("minilm", "sentence-transformers/all-MiniLM-L6-v2", "bert's tokenizer", flag_values=FLAGS)
flags.DEFINE_string("e2e", "tuetschek/e2e_nlg", "a name or folder", flag_values=FLAGS)
flags.DEFINE_string("sst2", "nyu-mll/glue", "a name or folder", flag_values=FLAGS)


class Row(NamedTuple):
    """A line of the table: what both sides did in each round, and how well the results agree."""

    part: str
    model: str
    batch: int
    unit: str
    values: dict[str, list[float]]  # side -> rounds
    peak: dict[str, float]  # side -> MiB
    agreement: str = ""
    operations: list[float] | None = None  # ours a second in each round, by XLA's count, padding included


class Profile(NamedTuple):
    """Where a side's time goes: seconds of each of `profiles.KINDS`."""

    what: str
    model: str
    batch: int
    side: str
    kinds: dict[str, float]


class Subject(NamedTuple):
    """What is measured: a model's config, its data, and the adapter that both sides start from."""

    name: str
    config: dict[str, Any]
    base: setup.Base
    adapter: Path
    task: Path  # where the two sides find what to do


def make_config(name: str, batch: int) -> dict[str, Any]:
    """The config that a user would train this model with, its prefix drawn at random."""
    file = {"bert": "sst2_minilm", "quickstart": "quickstart"}.get(name, "e2e_smollm2")
    config = run.load_config(f"configs/{file}.py" + (":random" if name == "bert" else ""))
    changes: dict[str, Any] = {
        "train": {"batch_size": batch},
        "model": {"dtype": FLAGS.dtype, "attention": FLAGS.attention},
    }
    changes["optimizer"] = {"learning_rate": LEARNING_RATE}
    if name == "bert":
        changes["dataset"] = {"path": FLAGS.sst2}
        changes["objective"] = {"pooling": "token"}
    elif name != "quickstart":
        changes["dataset"] = {"path": FLAGS.e2e}
        changes["method"] = {"init": "random", "text": None}
    if name == "smollm2":
        changes["model"]["name"] = FLAGS.smollm2
    elif name in SHAPES:
        changes["model"]["name"] = str(made(name))
    config.update(config_dict.ConfigDict(changes))
    return config.to_dict()


def made(name: str) -> Path:
    """The folder of a model with random weights, made if it is not there."""
    folder = Path(FLAGS.workdir).absolute() / name
    if not (folder / "model.safetensors").exists():
        tokenizer = loading.load_tokenizer(loading.find_folder(FLAGS.minilm if name == "bert" else FLAGS.smollm2))
        model = models.build(SHAPES[name] | {"initializer_range": 0.02})
        loading.save_pretrained(folder, model, loading.initialise(jax.random.key(0), model))
        tokenizer.save_pretrained(folder)
    return folder


def make_subject(name: str, batch: int, folder: Path) -> Subject:
    """A model with an adapter that is drawn at random."""
    config = make_config(name, batch)
    base = setup.make_base(config)
    rng = np.random.default_rng(0)
    entry = base.model.entry
    sites = base.model.sites[entry]
    k, v = (0.1 * rng.standard_normal((sites.layers, base.taken.read, *sites.kv["self"]), np.float32) for _ in "kv")
    adaptation = Adaptation(**{entry: LayerHooks(kv={"self": KV(k, v)})}, shift=base.taken.read)
    head = None
    if base.objective.head is not None:
        shape = sites.width, len(config["objective"]["labels"])
        weights = {"kernel": 0.02 * rng.standard_normal(shape, np.float32), "bias": np.zeros(shape[1], np.float32)}
        head = peft.head_of(config["objective"], base.model), weights
    adapter = folder / f"{name}_{batch}"
    peft.save_adapter(adapter, adaptation, base.model, str(base.folder), head=head)
    return Subject(name, config, base, adapter, adapter / "task.json")


def trained(subject: Subject) -> Subject:
    """The same model with the prefix that `--adapter` names."""
    folder = Path(FLAGS.adapter)
    length = read_json(folder / "adapter_config.json", "a folder in PEFT's layout")["num_virtual_tokens"]
    config = subject.config | {"method": subject.config["method"] | {"length": length}}
    return subject._replace(config=config, base=setup.make_base(config), adapter=folder)


def write_task(subject: Subject) -> Path:
    """What both sides read first."""
    task = {
        "folder": str(subject.base.folder),
        "adapter": str(subject.adapter),
        "objective": subject.config["objective"]["name"],
        "labels": len(subject.config["objective"].get("labels", ())),
        "dtype": FLAGS.dtype,
        "learning_rate": LEARNING_RATE,
        "steps": STEPS,
        "config": subject.config,
    }
    write_json(subject.task, task)
    return subject.task


def start(side: str, task: Path, cache: Path | None = None) -> in_turn.Worker:
    """One side, in a process of its own."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
    own |= {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return in_turn.Worker(SIDES[side], str(task), environment=os.environ | own)


def batches(subject: Subject, folder: Path, count: int) -> tuple[list[Path], list[Path]]:
    """Files of batches as PEFT's users have them, and of our own."""
    from experiments import peft_side

    settings = subject.config["train"]
    rows = setup.load_split(subject.config, "train")
    size = count * settings["batch_size"]
    examples = setup.encode(subject.base, rows.select(range(min(len(rows), max(size, 50 * settings["batch_size"])))))
    options = {name: settings[name] for name in ("batch_size", "packing", "shapes", "prefetch")}
    stream = pipeline.train_data(examples, epochs=1, seed=0, **options)
    random = peft_side.shuffled(examples, settings["batch_size"], 1, 0)
    found = []
    for name, side in (("theirs", map(alone, random)), ("ours", stream.batches(0))):
        files = []
        for number, batch in zip(range(count), side, strict=False):
            files.append(folder / f"{name}_{settings['batch_size']}_{number}.npz")
            np.savez(files[-1], **batch)
        found.append(files)
    return found[0], found[1]


def alone(examples: list[Any]) -> dict[str, np.ndarray]:
    """Examples as a batch padded to the longest of them."""
    laid_out = [x.example if isinstance(x, pipeline.Tokens) else x for x in examples]
    shape = max(x.length for x in laid_out), max(len(x.targets) for x in laid_out)
    return pipeline.collate([[x] for x in laid_out], *shape)


def real(file: Path) -> int:
    """The tokens in a batch, padding not counted."""
    return int((np.load(file)["segments"] > 0).sum())


def train(part: str, subject: Subject, folder: Path) -> Iterator[Row]:
    """Steps on the same text, and on the same batches."""
    batch = subject.config["train"]["batch_size"]
    users, own = batches(subject, folder, FLAGS.rounds)
    task = write_task(subject)
    with start("PEFT", task) as theirs, start("ours", task) as ours:
        for side in (theirs, ours):
            side.ask("load")
        first = [side.ask("train", batch=str(own[0]))["loss"] for side in (theirs, ours)]
        theirs.ask("train", batch=str(users[0]))
        for file in own[1:]:  # compiles every shape
            ours.ask("train", batch=str(file))
        counts = [ours.ask("operations", batch=str(file))["count"] for file in own]
        rates: dict[str, list[float]] = {"users": [], "same": [], "ours": []}
        operations = []
        for n in range(FLAGS.rounds):
            for name, side, files in (("users", theirs, users), ("same", theirs, own), ("ours", ours, own)):
                file = files[n % len(files)]
                seconds = side.ask("train", batch=str(file))["seconds"]
                rates[name].append(real(file) / seconds)
                if name == "ours":
                    operations.append(counts[n % len(files)] / seconds)
        peak = {"PEFT": theirs.ask("memory")["peak"], "ours": ours.ask("memory")["peak"]}
    agreement = f"first loss {first[0]:.5f} and {first[1]:.5f}"
    for label, name in (("as users run it", "users"), ("same batches", "same")):
        values = {"PEFT": rates[name], "ours": rates["ours"]}
        yield Row(f"{part}, {label}", subject.name, batch, "real tokens/s", values, peak, agreement, operations)


def first_prompts(subject: Subject, count: int) -> list[list[int]]:
    """So many different prompts of the validation split; ends the program if it has fewer."""
    sources = list(dict.fromkeys(setup.load_split(subject.config, "validation")["source"]))
    if len(sources) < count:
        sys.exit(
            f"error: {count} prompts are asked for; the validation split of {subject.name}'s data has {len(sources)}"
        )
    return setup.make_prompts(subject.base, [{"source": source} for source in sources[:count]])


def write(part: str, subject: Subject, beams: int, rows: int) -> Row:
    """So many tokens for the first prompts of the validation split."""
    prompts = first_prompts(subject, rows)
    task, rates = write_task(subject), {name: [] for name in SIDES}
    asked = {"prompts": prompts, "beams": beams, "new": FLAGS.new, "end": list(subject.base.decode.end_tokens)}
    with start("PEFT", task) as theirs, start("ours", task) as ours:
        sides = dict(zip(SIDES, (theirs, ours), strict=True))
        texts = {}
        for name, side in sides.items():
            side.ask("load")
            texts[name] = side.ask("generate", **asked)["tokens"]
        for _ in range(FLAGS.rounds):
            for name, side in sides.items():
                rates[name].append(len(prompts) * FLAGS.new / side.ask("generate", **asked)["seconds"])
        peak = {name: side.ask("memory")["peak"] for name, side in sides.items()}
    equal = sum(a == b for a, b in zip(texts["PEFT"], texts["ours"], strict=True))
    return Row(part, subject.name, len(prompts), "new tokens/s", rates, peak, f"{equal} of {len(prompts)} texts equal")


def texts(subject: Subject) -> Iterator[Row]:
    """Whole texts for many records."""
    prompts = first_prompts(subject, FLAGS.records)
    task, end = write_task(subject), list(subject.base.decode.end_tokens)
    with start("PEFT", task) as theirs, start("ours", task) as ours:
        sides = dict(zip(SIDES, (theirs, ours), strict=True))
        for side in sides.values():
            side.ask("load")
        for beams, rows in ((1, FLAGS.rows), (5, 4)):
            asked = {"prompts": prompts, "beams": beams, "new": subject.base.decode.max_new_tokens, "end": end}
            found, rates = {}, {name: [] for name in SIDES}
            sides["ours"].ask("texts", rows=rows, **asked)  # compiles
            for _ in range(FLAGS.rounds):
                for name, side in sides.items():
                    answer = side.ask("texts", rows=rows, **asked)
                    found[name] = answer["tokens"]
                    rates[name].append(sum(map(len, found[name])) / answer["seconds"])
            peak = {name: side.ask("memory")["peak"] for name, side in sides.items()}
            equal = sum(a == b for a, b in zip(found["PEFT"], found["ours"], strict=True))
            part = f"texts of {len(prompts)} records" + (f", {beams} beams" if beams > 1 else ", greedy")
            yield Row(part, subject.name, rows, "new tokens/s", rates, peak, f"{equal} of {len(prompts)} texts equal")


def profile(subject: Subject, folder: Path) -> Iterator[Profile]:
    """A step on the same batch, and greedy decoding where the model writes."""
    batch = subject.config["train"]["batch_size"]
    _, own = batches(subject, folder, 1)
    asked = {"a step": (batch, "train", {"batch": str(own[0])})}
    if subject.base.decode:
        prompts = first_prompts(subject, FLAGS.rows)
        values = {"prompts": prompts, "beams": 1, "new": FLAGS.new, "end": list(subject.base.decode.end_tokens)}
        asked[f"{FLAGS.new} tokens, greedy"] = FLAGS.rows, "generate", values
    task = write_task(subject)
    for name in SIDES:
        with start(name, task) as side:
            side.ask("load")
            for label, (rows, what, values) in asked.items():
                side.ask(what, **values)  # compiles
                yield Profile(label, subject.name, rows, name, side.ask("profile", what=what, **values)["kinds"])


def first_step(subject: Subject, folder: Path) -> Iterator[Row]:
    """Fresh processes, up to the end of their first step."""
    batch, cache = subject.config["train"]["batch_size"], folder / "cache"
    _, own = batches(subject, folder, 1)
    task = write_task(subject)
    kinds = (("PEFT", None), ("ours", None), ("ours", cache))
    total: dict[Any, list[float]] = {kind: [] for kind in kinds}
    loading_: dict[str, list[float]] = {name: [] for name in SIDES}
    peak = {}
    with start("ours", task, cache) as side:  # fills it
        side.ask("load")
        side.ask("train", batch=str(own[0]))
    for _ in range(min(FLAGS.rounds, 3)):
        for kind in kinds:
            with start(kind[0], task, kind[1]) as side:
                loaded = side.ask("load")["seconds"]
                side.ask("train", batch=str(own[0]))
                total[kind].append(side.elapsed())
                peak[kind[0]] = side.ask("memory")["peak"]
            loading_[kind[0]].append(loaded)
    for label, kind in (("start to first step, nothing cached", kinds[1]), ("the same, compiled before", kinds[2])):
        yield Row(label, subject.name, batch, "s", {"PEFT": total[kinds[0]], "ours": total[kind]}, peak)
    yield Row("loading weights and adapter", subject.name, batch, "s", loading_, peak)


def largest(name: str, side: str, folder: Path) -> int:
    """The last doubling of the batch size that one side has memory for, by the growth of its peak."""
    limit, batch, before = None, 8, 0.0
    while True:
        subject = make_subject(name, batch, folder)
        _, own = batches(subject, folder, 1)
        try:
            with start(side, write_task(subject)) as worker:
                worker.ask("load")
                if limit is None:
                    held = worker.ask("memory")
                    limit = FLAGS.memory * 1024 if FLAGS.memory else 0.8 * (held["peak"] + held["free"])
                worker.ask("train", batch=str(own[0]))
                peak = worker.ask("memory")["peak"]
        except RuntimeError:
            return batch // 2
        if peak > limit:
            return batch // 2
        if peak + 2 * max(peak - before, 0) > limit and before:
            return batch
        batch, before = 2 * batch, peak


def first_size() -> int:
    """The first batch size that is asked for."""
    return next((int(size) for size in FLAGS.batch if size != "largest"), 8)


def rows_of(name: str, folder: Path) -> Iterator[Row | Profile]:
    """All that is measured of one model."""
    parts = [part for part in PARTS if part in FLAGS.parts]
    if "profile" in parts:
        yield from profile(make_subject(name, 32 if name == "bert" else first_size(), folder), folder)
    if name == "bert":
        if "classify" in parts:
            yield from train("classify", make_subject(name, 32, folder), folder)
        return
    sizes = [int(size) for size in FLAGS.batch if size != "largest"]
    if "train" in parts:
        for size in sizes:
            yield from train("train", make_subject(name, size, folder), folder)
        if "largest" in FLAGS.batch:
            for size in sorted({largest(name, side, folder) for side in SIDES}):
                yield from train("train at the largest batch of one side", make_subject(name, size, folder), folder)
    subject = make_subject(name, first_size(), folder)
    for part, beams, rows in (("greedy", 1, FLAGS.rows), ("beam", 5, 4)):
        if part in parts:
            yield write(f"{part}, {FLAGS.new} tokens" + (f", {beams} beams" if beams > 1 else ""), subject, beams, rows)
    if "texts" in parts:
        yield from texts(trained(subject))
    if "start" in parts:
        yield from first_step(subject, folder)


def table(rows: list[Row]) -> str:
    """All rows as Markdown; a ratio above 1 says that we are faster, of memory that we take more."""
    lines = ["| | model | batch | unit | PEFT | ours | faster by | PEFT MiB | ours MiB | memory ratio "]
    lines[0] += "| ours GFLOP/s | agreement |"
    lines.append("|" + "---|" * 12)
    for row in rows:
        theirs, ours = (statistics.median(row.values[side]) for side in SIDES)
        faster = theirs / ours if row.unit == "s" else ours / theirs
        memory = [row.peak[side] for side in SIDES]
        cells = [row.part, row.model, f"{row.batch}", row.unit, f"{theirs:.4g}", f"{ours:.4g}", f"{faster:.2f}"]
        cells += [f"{memory[0]:,.0f}", f"{memory[1]:,.0f}", f"{memory[1] / memory[0]:.2f}"]
        cells += [f"{statistics.median(row.operations) / 1e9:,.0f}" if row.operations else "", row.agreement]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def profile_table(found: list[Profile]) -> str:
    """Where the time goes, as Markdown; kinds in percent."""
    lines = ["| | model | batch | | seconds | " + " | ".join(profiles.KINDS) + " |", "|" + "---|" * 10]
    for one in found:
        seconds = sum(one.kinds.values())
        cells = [one.what, one.model, str(one.batch), one.side, f"{seconds:.3g}"]
        cells += [f"{100 * one.kinds[kind] / seconds:.0f} %" for kind in profiles.KINDS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    FLAGS(arguments)
    for name, given, known in (("parts", FLAGS.parts, PARTS), ("model", FLAGS.model, MODELS)):
        if unknown := [value for value in given if value not in known]:
            sys.exit(f"error: unknown --{name} {', '.join(unknown)}; valid: {', '.join(known)}")
    if ("texts" in FLAGS.parts) != bool(FLAGS.adapter):
        sys.exit("error: --parts=texts and --adapter, the folder adapter/ of a run that trained a prefix, go together")
    for size in FLAGS.batch:
        if size != "largest" and not (size.isdigit() and int(size)):
            sys.exit(f"error: --batch has {size!r}; expected sizes of at least 1, and largest")
    rows: list[Row] = []
    kinds: list[Profile] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(FLAGS.model):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            for found in rows_of(name, folder):
                known, write_out = (kinds, profile_table) if isinstance(found, Profile) else (rows, table)
                known.append(found)
                print(write_out([found]).splitlines()[-1], file=sys.stderr, flush=True)
    versions = {name: version(name) for name in ("jax", "torch", "peft", "transformers")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {FLAGS.dtype}"
    print("\n\n".join(write_out(found) for found, write_out in ((rows, table), (kinds, profile_table)) if found))
    print(f"\n{machine}; {', '.join(f'{name} {number}' for name, number in versions.items())}; {FLAGS.rounds} rounds")
    if FLAGS.output:
        found = {"rows": [row._asdict() for row in rows], "profiles": [one._asdict() for one in kinds]}
        write_json(Path(FLAGS.output), found | {"machine": machine, "versions": versions})


if __name__ == "__main__":
    main(sys.argv)

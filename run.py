#!/usr/bin/env python3
"""The command line: one subcommand per job; every error is one line, unless it is a bug of ours or --debug is given."""

import importlib.util
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple


def interrupted(number: int, _: Any) -> None:
    """Ends this process at Ctrl-C where there is nothing to save: an exception would be lost in some callbacks."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)

from absl import flags  # noqa: E402 (it takes a while)
from ml_collections import config_dict, config_flags  # noqa: E402

ROOT = Path(__file__).resolve().parent
QUICKSTART = ["train", "--config=configs/quickstart.py", "--workdir=runs/quickstart"]
REQUIRED = object()
LAUNCHER = {"launcher": "local", "slurm": None}  # options of commands that start many runs
HOSTS = {"hosts": None}  # of those that may run in several processes, which prefix_tuning/hosts.py joins


class Command(NamedTuple):
    """A subcommand: what it does, its string flags with defaults, and the function that takes their values."""

    purpose: str
    options: dict[str, Any]
    run: Callable[..., None]
    several: str | None = None  # the function's parameter that takes the arguments without a name, if it has one


def tell(text: str) -> None:
    """Prints what a command that may run on several hosts has to say, on the first of them."""
    from prefix_tuning import hosts

    if hosts.primary():
        print(text)


def train(config: dict[str, Any], workdir: str, runs: str | None, file: str, flags: list[str]) -> None:
    """Prints the summary of a run, or of several of its sweep that train together."""
    from prefix_tuning import progress
    from prefix_tuning.train import train as run

    if runs is not None:
        planned = {one.name: one for one in listed(file)}
        configs = {name: alone(configured(planned[name], flags)) for name in named(runs, planned)}
        train_at_once(configs, Path(workdir))
    elif "compare" in config:
        from prefix_tuning.variants import train_variants

        tell(train_variants(config, workdir))
    else:
        tell(progress.table(run(config, workdir)))


def evaluate(workdir: str, split: str) -> None:
    """Scores a workdir's newest checkpoint on a split."""
    from prefix_tuning import api

    tell(json.dumps(api.evaluate_workdir(workdir, split), indent=2))


def generate(workdir: str, input: str, output: str) -> None:
    """Adds a prediction to every line of a file."""
    from prefix_tuning import api

    tell(f"{api.generate_file(workdir, input, output)} lines written to {output}")


def score(metrics: str, predictions: str, references: str, sources: str | None, groups: str | None) -> None:
    """Scores one file against another."""
    from prefix_tuning import metrics as library
    from prefix_tuning.errors import UserError
    from prefix_tuning.files import lines_of, read_groups, read_text

    lines = lines_of(read_text(predictions))
    columns = [None if file is None else lines_of(read_text(file)) for file in (sources, groups)]
    try:
        print(json.dumps(library.score(metrics.split(","), lines, read_groups(references), *columns), indent=2))
    except ValueError as error:
        raise UserError(str(error)) from error


def export(workdir: str, format: str, output: str, combine: str, weights: str | None) -> None:
    """Writes what a workdir has trained, or several at once, for use elsewhere."""
    from prefix_tuning import api
    from prefix_tuning.errors import UserError

    try:
        numbers = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(f"--weights={weights!r} must be numbers with commas between them") from None
    api.export_workdir(workdir.split(","), format, output, how=combine, weights=numbers)
    print(f"written to {output}")


def listed(file: str) -> list[Any]:
    """The runs that the sweep(add) of a config FILE[:arg] lists."""
    from prefix_tuning import sweep as library
    from prefix_tuning.errors import UserError

    path, _, arg = file.partition(":")
    module = load_module(path)
    if not hasattr(module, "sweep"):
        raise UserError(f"{path} has no sweep(add), which lists the runs")
    return library.plan(module.sweep, path, arg, module.get_config)


def named(names: str, known: Collection[str]) -> list[str]:
    """The runs of --runs=NAME,NAME, whose names may have commas in them; raises `UserError` for unknown ones."""
    from prefix_tuning.errors import UserError

    found, rest = [], names
    while rest:
        hits = [name for name in known if rest == name or rest.startswith(name + ",")]
        if not hits:
            raise UserError(f"--runs: {rest!r} does not begin with a run; valid: {'; '.join(known)}")
        found.append(max(hits, key=len))
        rest = rest[len(found[-1]) + 1 :]
    if len(set(found)) < len(found) or not found:
        raise UserError(f"--runs={names!r} names no run, or one twice; expected each once")
    return found


def train_at_once(configs: dict[str, dict[str, Any]], root: Path) -> None:
    """Trains runs in one step, each into a folder of its name below `root`, and prints their summaries."""
    from prefix_tuning import progress
    from prefix_tuning.train import train_together

    summaries = train_together(list(configs.values()), [root / name for name in configs])
    tell("\n\n".join(map(progress.table, summaries)))


def left(job: str, together: list[list[str]], root: Path) -> list[str]:
    """The runs that train with `job`, itself among them, without those that are finished."""
    from prefix_tuning import sweep as library

    return [name for name in library.group_of(job, together) if name == job or not library.finished(root / name)]


def configured(one: Any, flags: list[str]) -> dict[str, Any]:
    """The config of a planned run, with what the command line overrides."""
    return parse(["train", *one.flags[:1], *flags, *one.flags[1:], "--workdir=unused"])[1]["config"]


def alone(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a run as it would be by itself: how many train beside it is none of its settings."""
    return config | {"train": config["train"] | {"population": 1}}


def sweep(file: str, flags: list[str], workdir: str, launcher: str, slurm: str | None) -> None:
    """Runs what the config's sweep(add) lists, train.population of them at once, and prints the table."""
    from prefix_tuning import launch, setup
    from prefix_tuning import sweep as library

    root, planned = Path(workdir), listed(file)
    runs = {one.name: one for one in planned}
    configs = {name: configured(one, flags) for name, one in runs.items()}
    together = grouped(configs)

    def command(name: str) -> list[str]:
        config, *overrides = runs[name].flags
        if together is None:
            own = [config, *flags, *overrides, f"--workdir={root / name}"]
        else:
            own = [f"--config={file}", *flags, f"--workdir={root}", f"--runs={','.join(left(name, together, root))}"]
        return [sys.executable, str(ROOT / "run.py"), "train", *own]

    started = launch.make(launcher, slurm, command, root)
    # Variants of one run share its model and its data, and check their sections themselves.
    setup.check_inputs(
        {n: alone(c) for n, c in configs.items() if "compare" not in c and not library.finished(root / n)}
    )
    print(library.run_all(planned, started, root, together))


def grouped(configs: dict[str, dict[str, Any]]) -> list[list[str]] | None:
    """The names of runs that train at once: train.population of them, where they can; None for one by one."""
    from prefix_tuning.errors import UserError

    names = list(configs)
    size = configs[names[0]]["train"].get("population", 1)
    if size < 1:
        raise UserError(f"train.population must be at least 1, got {size}")
    if size == 1:
        return None
    from prefix_tuning import population

    return [[names[i] for i in group] for group in population.groups(list(map(alone, configs.values())), size)]


def report(workdir: str, output: str | None) -> None:
    """Writes one page about every run below a folder."""
    from prefix_tuning import report as library

    print(f"written to {library.write(workdir, output)}")


def table(
    name: str,
    flags: list[str],
    workdir: str | None,
    model: str | None,
    dataset: str | None,
    examples: str | None,
    seeds: str | None,
    only: str | None,
    runs: str | None,
    launcher: str,
    slurm: str | None,
) -> None:
    """Runs a paper's table and prints it, or trains some of its runs in one step, or lists the tables."""
    from experiments import table as library
    from prefix_tuning import launch
    from prefix_tuning.errors import UserError, valid

    if valid("table", name, ("list", *library.TABLES)) == "list":
        print(library.listing())
        return
    if workdir is None:
        raise UserError("table needs --workdir")
    given = {"model": model, "dataset": dataset, "examples": examples, "seeds": seeds, "only": only}
    pairs = (flag.lstrip("-").removeprefix("config.").partition("=") for flag in flags)
    given["overrides"] = {key: value for key, _, value in pairs}

    def load(flags: list[str]) -> dict[str, Any]:
        return parse(["params", *flags])[1]["config"]

    root = Path(workdir)
    if runs is not None:
        if launcher != "local" or slurm is not None:
            raise UserError("--runs trains here and now; drop --launcher and --slurm")
        configs = {one.planned.name: one.config for one in library.planned(name, given, load)[2]}
        train_at_once({one: configs[one] for one in named(runs, configs)}, root)
        return
    told = [f"--{option}={value}" for option, value in given.items() if isinstance(value, str)] + flags

    def launched(planned: list[Any], together: list[list[str]]) -> launch.Local | launch.Slurm:
        alone = {one.name: one.flags for one in planned}

        def command(job: str) -> list[str]:
            names = left(job, together, root)
            if len(names) == 1:
                own = ["train", *alone[job], f"--workdir={root / job}"]
            else:
                own = ["table", name, *told, f"--workdir={root}", f"--runs={','.join(names)}"]
            return [sys.executable, str(ROOT / "run.py"), *own]

        return launch.make(launcher, slurm, command, root)

    print(library.make(name, workdir, given, load, launched))


def import_adapter(config: dict[str, Any], input: str, workdir: str) -> None:
    """Makes a workdir that `train` with the same config goes on in, from an adapter made elsewhere."""
    from prefix_tuning import api

    api.import_adapter(config, input, workdir)
    print(f"{workdir} holds it; 'run.py train' with the same config goes on from there")


def params(config: dict[str, Any], file: str, budget: str | None) -> None:
    """Prints what every method trains and stores on a config's model."""
    from configs import common
    from prefix_tuning import accounting

    path, _, arg = file.partition(":")
    rest = ",".join(part for part in arg.split(",") if part and not part.startswith("method="))
    sections = {
        name: load_config(f"{path}:{rest},method={name}").method.to_dict()
        for name in [*common.METHODS, *common.PRESETS]
    }
    chosen = next((part.partition("=")[2] for part in arg.split(",") if part.startswith("method=")), "prefix")
    sections[chosen] = config["method"]  # with what was overridden on the command line
    print(accounting.table(config, sections, common.SIZES, budget))


def inspect(workdir: str, split: str | None, examples: str) -> None:
    """Writes and prints what a trained prefix or prompt does."""
    from prefix_tuning import inspection

    print(inspection.inspect_workdir(workdir, split, at_least_one("examples", examples)))


def compare(runs: list[str], split: str | None, metrics: str | None, samples: str, output: str | None) -> None:
    """Prints what several runs scored and wrote on the same records, and whether the differences are luck."""
    from prefix_tuning import compare as library

    names = None if metrics is None else metrics.split(",")
    print(library.compare(runs, split, names, at_least_one("samples", samples), output))
    if output is not None:
        print(f"written to {output}")


def at_least_one(option: str, value: str) -> int:
    """The value of an option that counts something."""
    from prefix_tuning.errors import UserError

    if not value.isdecimal() or not int(value):
        raise UserError(f"--{option}={value!r} must be a number of at least 1")
    return int(value)


COMMANDS = {
    "train": Command(
        "train, evaluate and export; the same command resumes; --runs: several of the config's sweep(add) at once",
        {"config": REQUIRED, "workdir": REQUIRED, "runs": None} | HOSTS,
        train,
    ),
    "eval": Command("restore, decode, score", {"workdir": REQUIRED, "split": "test"} | HOSTS, evaluate),
    "generate": Command(
        "JSON lines with `source` in, with `prediction` out",
        {"workdir": REQUIRED, "input": REQUIRED, "output": REQUIRED} | HOSTS,
        generate,
    ),
    "score": Command(
        "predictions one a line, references in groups parted by an empty line",
        {"metrics": REQUIRED, "predictions": REQUIRED, "references": REQUIRED, "sources": None, "groups": None},
        score,
    ),
    "export": Command(
        "what was trained, for use elsewhere; several workdirs, with commas between them, as one",
        {"workdir": REQUIRED, "format": "peft", "output": REQUIRED, "combine": "concatenate", "weights": None},
        export,
    ),
    "sweep": Command(
        "every run that the config's sweep(add) lists, here or in Slurm's queue; the same command goes on",
        {"config": REQUIRED, "workdir": REQUIRED} | LAUNCHER,
        sweep,
    ),
    "report": Command(
        "every run below a folder as one HTML page: table, curves, settings, samples",
        {"workdir": REQUIRED, "output": None},
        report,
    ),
    "table": Command(
        "NAME: a paper's table, ours beside the published numbers; `table list` shows them",
        {"workdir": None, "model": None, "dataset": None, "examples": None, "seeds": None, "only": None, "runs": None}
        | LAUNCHER,
        table,
    ),
    "import": Command(
        "an adapter made elsewhere, as the start of a run with this config",
        {"config": REQUIRED, "input": REQUIRED, "workdir": REQUIRED},
        import_adapter,
    ),
    "params": Command(
        "what every method trains and stores, without weights", {"config": REQUIRED, "budget": None}, params
    ),
    "inspect": Command(
        "which slots of a trained prefix or prompt do something",
        {"workdir": REQUIRED, "split": None, "examples": "64"},
        inspect,
    ),
    "compare": Command(
        "scores over seeds, whether their differences are luck, and what was written, side by side; a RUN is a workdir,"
        " a folder of several seeds', or theirs with commas between them",
        {"split": None, "metrics": None, "samples": "1000", "output": None},
        compare,
        several="runs",
    ),
}


def parse(arguments: list[str]) -> tuple[Command, dict[str, Any], bool]:
    """The command, the values of its flags, whether to show tracebacks; raises what flags and configs raise."""
    name, *rest = arguments
    if name not in COMMANDS:
        raise flags.Error(f"unknown command {name!r}; valid: {', '.join(COMMANDS)}")
    command, values, config = COMMANDS[name], flags.FlagValues(), None
    own = {}
    if command.run is table:
        own = {"name": next((argument for argument in rest if not argument.startswith("-")), None)}
        if own["name"] is None:
            raise flags.Error("table needs a name, or list")
        rest.remove(own["name"])
        own["flags"] = [argument for argument in rest if argument.lstrip("-").startswith("config.")]
        rest = [argument for argument in rest if argument not in own["flags"]]
    flags.DEFINE_bool("debug", False, "show tracebacks", flag_values=values)
    for option, default in command.options.items():
        if option != "config":
            flags.DEFINE_string(option, None if default is REQUIRED else default, option, flag_values=values)
            continue
        files = [argument.partition("=")[2] for argument in rest if argument.lstrip("-").startswith("config=")]
        rest = [argument for argument in rest if not argument.lstrip("-").startswith("config=")]
        if files:
            config = load_config(files[-1])
            new = command.run is train  # what its sections leave out; others would find a typo when much is done
            check_options(config, rest, new)
            options = {"flag_values": values, "sys_argv": [name, *rest]}
            config_flags.DEFINE_config_dict("config", config, **options, accept_new_attributes=new, lock_config=not new)
    values.set_gnu_getopt(command.several is not None)  # arguments without a name may stand before options
    try:
        extra = values([name, *rest])[1:]
    except flags.IllegalFlagValueError as error:
        raise flags.Error(mistyped(str(error), config)) from error
    if extra and command.several is None:
        raise flags.Error(f"unexpected argument {extra[0]!r}; options are given as --name=value")
    given = own | {option: values[option].value for option in command.options if option != "config"}
    if command.several is not None:
        given[command.several] = extra
    if "config" in command.options:
        given["config"] = config and config.to_dict()
        if command.run in (train, params, sweep):
            given["file"] = files[-1] if files else None
        if command.run is sweep:
            given.pop("config")
        if command.run in (train, sweep):
            given["flags"] = [argument for argument in rest if argument.lstrip("-").startswith("config.")]
    wanted = {o for o, default in command.options.items() if default is REQUIRED}
    missing = [f"--{o}" for o in command.options if o in wanted and not given.get(o, given.get("file"))]
    if missing:
        raise flags.Error(f"{name} needs {' and '.join(missing)}")
    return command, given, values["debug"].value


def check_options(config: config_dict.ConfigDict, arguments: list[str], new: bool) -> None:
    """Raises `flags.Error` for --config.a.b that the config lacks; if `new`, a section may get further options."""
    for argument in arguments:
        flag, *names = argument.lstrip("-").partition("=")[0].split(".")
        section = config
        for depth, name in enumerate(names if flag == "config" else (), 1):
            known = list(section) if isinstance(section, config_dict.ConfigDict) else []
            key = name.partition("[")[0]  # an index may follow
            if key not in known and not (new and known and 1 < depth == len(names)):
                told = ", ".join(known) or "nothing below it"
                raise flags.Error(f"unknown option config.{'.'.join(names[:depth])}; the config has {told}")
            section = section[key] if key in known else None


def mistyped(message: str, config: config_dict.ConfigDict) -> str:
    """What flags say of a value that is not of its option's type, as a user would."""
    from prefix_tuning.registry import in_words

    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if found is None:
        return message
    path, value = found.groups()
    section, name = config, path
    while "." in name:
        first, _, name = name.partition(".")
        section = section[first]
    kind = section.get_type(name)
    if kind is config_dict.ConfigDict:
        return f"config.{path} is a section; expected one of its options, --config.{path}.{min(section[name])}=... say"
    return f"config.{path} is {value!r}; expected {in_words(kind)}"


def load_config(value: str) -> config_dict.ConfigDict:
    """What get_config(arg) of FILE[:arg] returns."""
    file, _, arg = value.partition(":")
    module = load_module(file)
    try:
        return module.get_config(arg or None)
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "  # a mistake in the program
        raise flags.Error(f"{module.__file__}: {kind}{error}") from error


def load_module(file: str) -> Any:
    """The config file as a module; it is looked for here, then below this repository."""
    path = next((path for path in (Path(file), ROOT / file) if path.is_file()), None)
    if path is None:
        shipped = ", ".join(str(f.relative_to(ROOT)) for f in sorted(ROOT.glob("configs/*.py")) if f.stem != "common")
        raise flags.Error(f"there is no config file {file}; shipped: {shipped}")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise flags.Error(f"{path}: {type(error).__name__}: {error}") from error
    return module


def usage() -> str:
    """The commands and their options."""
    lines = ["python run.py COMMAND --option=value ...   (no command: the quick start)"]
    for name, command in COMMANDS.items():
        options = " ".join(f"--{o}" if d is REQUIRED else f"[--{o}]" for o, d in command.options.items())
        if command.several is not None:
            options = f"RUN RUN ... {options}"
        lines.append(f"  {name:9} {options}\n            {command.purpose}")
    return "\n".join([*lines, "  --debug   with any command: where an error comes from"])


def main(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(usage())
        return 0
    try:
        command, values, debug = parse(arguments or QUICKSTART)
    except Exception as error:  # a config is the user's code and may raise anything
        if "--debug" in arguments:
            raise
        return fail(error)
    from prefix_tuning import compiled

    compiled.keep()
    hosts, lost, code = None, None, 0
    try:
        if "hosts" in command.options:
            from prefix_tuning import hosts

            hosts.start(values.pop("hosts"))
        command.run(**values)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        raise
    except Exception as error:
        lost = hosts and hosts.lost(error)
        if type(error).__name__ == "Interrupted":
            code = error.args[0]
        elif debug or (type(error).__name__ != "UserError" and not lost):
            traceback.print_exc()
            code = 1
        else:
            code = 1 if lost else fail(error)  # `leave` says what is lost
    if hosts is not None:
        hosts.leave(code, lost)
    return code


def fail(error: Exception) -> int:
    """Prints an error as one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)  # a KeyError quotes its message
    text = " ".join(text.split()) or type(error).__name__
    print(f"error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    os.environ.setdefault("PREFIX_TUNING_WITHOUT_TORCH", "1")  # this process is ours alone, and has no use for it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # what a shell says of a closed pipe
    if code:  # not when Orbax's threads give up on a folder that could not be made, which takes minutes
        sys.stderr.flush()
        os._exit(code)

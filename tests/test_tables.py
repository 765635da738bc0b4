"""Tables of papers: every row can be run as published, and a small table is run for real."""

import csv
import json

import pytest
from test_configs import HUB, Words, at_true_size

import run
from experiments import table as library
from experiments.tables import TABLES
from experiments.tables.base import Column, Row, Table
from prefix_tuning import models, setup
from prefix_tuning.errors import UserError
from prefix_tuning.methods import METHODS
from prefix_tuning.objectives import OBJECTIVES
from prefix_tuning.optimizer import make_optimizer
from prefix_tuning.registry import call, named


def load(flags):
    return run.parse(["params", *flags])[1]["config"]


def planned(name, **given):
    table = TABLES[name]
    given.setdefault("overrides", {"dataset.urls": "urls.txt"} if table.needs else {})
    options = library.options(table, **given)
    runs = library.plan(table, options, load)
    return table, runs, library.differences(table, options, runs)


def row(name, of):
    return next(row for row in TABLES[name].rows if row.name == of)


# --- As published


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_planned_and_fits_its_model_at_true_size(name):
    """One of each kind that differs in what is trained; a whole step of each is traced in test_configs.py."""
    table, runs, differing = planned(name)
    assert differing == list(table.instead)
    assert (library.setting(differing) == "The paper's setting.") == (not name.startswith("smollm2"))
    assert {one.row.name for one in runs} == {row.name for row in table.rows if row.file}
    assert len({one.planned.name for one in runs}) == len(runs)
    seen, built = set(), {}
    for one in runs:
        config = one.config
        same = {"seed": config["seed"], "train": config["train"], "dataset": config["dataset"]}
        assert config == one.published | same
        method = {key: value for key, value in config["method"].items() if key not in ("labels", "text")}
        key = json.dumps([config["model"], method, config["objective"]["name"], config["optimizer"]])
        if key in seen:
            continue
        seen.add(key)
        where = config["model"]["name"]
        model = built.setdefault(where, models.build(HUB[where]))
        method = named("method", METHODS, config["method"], Words())
        named("objective", OBJECTIVES, config["objective"], Words())
        call("optimizer", make_optimizer, config["optimizer"], 1000)
        call("train", setup.Train, config["train"])
        setup.abstract_adaptation(method, model)


@pytest.mark.parametrize(
    ("name", "arg", "trained"),
    [
        ("gpt2_table_to_text", "model=large", 47_940_352),  # Li & Liang's prefix of 5 slots with its MLP
        ("gpt2_table_to_text", "data=dart", 25_750_016),
        ("gpt2_table_to_text", "method=ft_top2", 25_192_448),
        ("gpt2_table_to_text", "method=adapter,share=0.1%", 368_784 + 24 * 2 * 1024),  # and LoRA leaves the norms out
        ("lora_gpt2", "", 393_216),
        ("lora_gpt2", "model=large", 737_280),
        ("prompt_tuning_t5", "size=xxl", 409_600),
    ],
)
def test_recipes_train_as_many_parameters_as_the_papers_say(name, arg, trained):
    config, counts = at_true_size(name, arg)
    if "adapter" in arg:
        width, bottleneck = 1024, config["method"]["bottleneck"]
        assert counts["trained"] == 24 * (2 * width * bottleneck + width + bottleneck + 2 * width)
    else:
        assert counts["trained"] == trained


@pytest.mark.parametrize(
    ("arg", "rate", "epochs", "batch", "length"),
    [
        ("data=e2e", 8e-5, 5, 10, 5),
        ("data=webnlg", 5e-5, 5, 5, 5),
        ("data=dart", 5e-5, 10, 5, 10),
        ("data=e2e,method=adapter,share=3%", 5e-5, 5, 5, None),
        ("data=webnlg,method=adapter", 5e-5, 10, 5, None),
        ("data=dart,method=adapter", 8e-5, 5, 5, None),
        ("data=webnlg,method=finetune", 1e-5, 10, 6, None),
        ("data=webnlg,method=ft_top2", 5e-5, 10, 9, None),
        ("low_data=50", 5e-5, 40, 10, None),  # 200 steps
        ("low_data=500,method=finetune", 5e-5, 8, 10, None),  # 400 steps
    ],
)
def test_hyperparameters_are_those_of_table_6(arg, rate, epochs, batch, length):
    config = run.load_config(f"configs/gpt2_table_to_text.py:{arg}").to_dict()
    assert config["optimizer"]["learning_rate"] == rate
    assert (config["train"]["epochs"], config["train"]["batch_size"]) == (epochs, batch)
    assert config["method"].get("length") == length
    assert config["evaluation"]["metrics"] == (config["dataset"]["name"],)


def test_published_numbers_are_the_papers():
    assert row("e2e", "prefix").published["ACL"] == (70.3, 8.82, 46.3, 72.1, 2.46)
    assert row("e2e", "prefix").published["arXiv v1"] == (69.7, 8.81, 46.1, 71.4, 2.49)
    assert row("e2e", "ft-full").published["arXiv v1"][0] == 68.2
    assert row("e2e", "ft-top2").published["arXiv v1"] == row("e2e", "ft-top2").published["ACL"]
    assert row("webnlg", "prefix").published["ACL"] == (62.9, 45.3, 55.0, 0.44, 0.37, 0.41, 0.35, 0.51, 0.42)
    assert row("webnlg", "adapter-3").published["arXiv v1"][1] == 48.3
    assert row("dart", "large-prefix").published["ACL"] == (46.7, 0.39, 0.45, 0.51, 0.94, 0.40)
    assert row("xsum", "prefix-2").published["ACL"] == (43.80, 20.93, 36.05)
    assert row("xsum-extrapolation", "within-news-ft").published["ACL"] == (39.20, 16.35, 31.15)
    assert row("embedding-infix", "infix-1").published["ACL"] == (67.9, 8.63, 45.8, 69.4, 2.42)
    assert row("lora-e2e", "lora").published["LoRA"] == (70.4, 8.85, 46.8, 71.8, 2.53)
    assert row("lora-rank", "r-1024").published["LoRA"] == (69.37,)
    assert row("ptuning-v2", "roberta").published["README"][:2] == (84.0, 92.0)


def test_low_data_has_five_subsets_with_two_seeds_each():
    runs = [one for one in planned("low-data")[1] if one.row.name == "prefix-50"]
    assert [one.config["train"]["draw"] for one in runs] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len({one.config["seed"] for one in runs}) == 10


# --- Smaller


def test_what_is_smaller_is_told():
    _, runs, differing = planned(
        "e2e", model="tiny", examples="500", seeds="3", only="prefix", overrides={"train.epochs": "1"}
    )
    assert library.setting(differing) == (
        "Not the paper's setting: model tiny instead of gpt2-medium; 500 of 42,061 training pairs; at most 500 of 630 "
        "records scored; seed 3 instead of 101; 1 of 7 rows; train.epochs 1 instead of 5."
    )
    assert {one.config["model"]["name"] for one in runs} == {"tiny"}
    assert planned("lora-rank", seeds="110")[2] == []
    assert planned("e2e", model="models/gpt2-medium", only="prefix")[2] == ["1 of 7 rows"]
    assert planned("initialisation", seeds="0")[2] == ["1 seed of 10 (0)"]
    assert planned("e2e", dataset="FOLDER", overrides={"train.keep": "1"})[2] == []


def test_sizes_keep_their_proportion_and_warm_up_its_share():
    runs = planned("data-size", examples="160")[1]
    sizes = [one.config["train"]["examples"] for one in runs[:5]]
    assert sizes == [20, 40, 80, 120, 160]
    for one in planned("lora-rank", examples="80")[1]:
        assert one.config["optimizer"]["warmup_steps"] == 0
    assert {one.config["optimizer"]["warmup_steps"] for one in planned("lora-rank", examples="4000")[1]} == {47}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("e2e", {"only": "prefix,lora"}, "unknown row 'lora'; valid: adapter-0.1, adapter-3, ft-full"),
        ("e2e", {"only": "sota"}, "unknown row 'sota'"),
        ("e2e", {"seeds": "0,x"}, "--seeds='0,x' must be different whole numbers"),
        ("e2e", {"examples": "0"}, "--examples='0' must be a number of at least 1"),
        ("e2e", {"overrides": {"train.epoch": "1"}}, "row 'ft-full' cannot be planned: .*epoch"),
        ("e2e", {"overrides": {"train.epochs": "few"}}, "row 'ft-full' cannot be planned: .*epochs"),
        ("e2e", {"overrides": {"seed": "1"}}, "--config.seed is what --seeds says"),
        ("e2e", {"overrides": {"train.population": "0"}}, "--config.train.population='0' must be a number of at least"),
        ("xsum-extrapolation", {"overrides": {}}, "this table needs --config.dataset.urls="),
    ],
)
def test_what_cannot_be_is_said(name, given, message):
    with pytest.raises(UserError, match=message):
        planned(name, **given)


def test_the_readme_lists_the_tables():
    """As the command prints them."""
    assert library.listing() in (run.ROOT / "experiments/results/tables.md").read_text()


def test_the_command_line(capsys, tmp_path):
    assert run.main(["table", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"| `{name}` |" in listed for name in TABLES)
    for arguments, message in (
        (["e3e", f"--workdir={tmp_path}/w"], "unknown table 'e3e'; valid: dart, data-size, e2e"),
        (["e2e"], "table needs --workdir"),
        ([], "table needs a name, or list"),
        (["e2e", f"--workdir={tmp_path}/w", "--only=x"], "unknown row 'x'"),
        (["e2e", f"--workdir={tmp_path}/w", "--runs=x"], "--runs: 'x' does not begin with a run; valid: ft-full"),
        (["e2e", f"--workdir={tmp_path}/w", "--runs=x", "--launcher=slurm"], "--runs trains here and now; drop"),
    ):
        assert run.main(["table", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "w").exists()


# --- For real

FILE = "configs/quickstart.py"
SHORT = {
    "train.epochs": 1,
    "text.max_source": 12,
    "text.max_target": 6,
    "train.examples": 24,
    "train.shapes": 1,
    "train.batch_size": 8,
    "optimizer.warmup_steps": 0,
    "evaluation.metrics": (),
}
SHORT |= {"evaluation.examples": 8, "evaluation.batch_size": 8}
SMALL = Table(
    "Small",
    "Nobody (2026), table 1",
    "seconds",
    (Column("accuracy", ("accuracy",), 100, 1), Column("loss", ("loss",), lower=True), Column("BLEU", ("nothing",))),
    (
        Row("prefix", "PREFIX", FILE, "", SHORT, {"v2": (50.0, 3.0, 1.0), "v1": (40.0, 3.0, 1.0)}, seeds=(0, 1)),
        Row("lora", "LoRA", FILE, "method=lora", SHORT, {"v2": (51.0, None, 1.0)}, seeds=(0, 1)),
        Row("copied", "SOTA", published={"v2": (60.0, 2.0, 1.0)}, note="Copied."),
    ),
    pairs=24,
    records=8,
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(TABLES, "small", SMALL)


def write_summary(folder, **tuned):
    folder.mkdir(parents=True)
    summary = {"untuned": {}, "tuned": tuned, "parameters": {"trained": 1}, "seconds": 60.0}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_table_is_run_and_goes_on(small, tmp_path, capsys, commands_here):
    """Two seeds of a prefix for real: one is trained here, one launched, which fails at first; LoRA is done."""
    command = ["table", "small", f"--workdir={tmp_path}"]
    assert run.main([*command, "--only=prefix", "--runs=prefix,seed=0"]) == 0
    capsys.readouterr()
    broken = tmp_path / "prefix,seed=1"
    broken.mkdir()
    (broken / "checkpoints").write_text("")  # a file where the run wants a folder
    assert run.main([*command, "--only=prefix"]) == 1
    assert "1 of 2 runs failed or were stopped: prefix,seed=1" in capsys.readouterr().err
    text = (tmp_path / "small.md").read_text()
    assert "**Not the paper's setting: 1 of 2 rows.**" in text
    assert "(1 of 2 runs)" in text
    assert "Not run: LoRA, SOTA." in text
    (broken / "checkpoints").unlink()
    for seed in (0, 1):
        write_summary(tmp_path / f"lora,seed={seed}", accuracy=0.25, loss=2.0)
    finished = tmp_path / "prefix,seed=0" / "summary.json"
    done = finished.stat().st_mtime_ns
    assert run.main(command) == 0
    assert done == finished.stat().st_mtime_ns
    text = capsys.readouterr().out
    assert (tmp_path / "small.md").read_text() == text.removesuffix("\n")
    assert "**The paper's setting.**" in text
    assert "Not run: SOTA." in text
    assert text.count(" not run |") == 3
    found = [
        json.loads((tmp_path / f"prefix,seed={seed}" / "summary.json").read_text())["tuned"]["accuracy"]
        for seed in (0, 1)
    ]
    mean, deviation = 50 * sum(found), 100 * abs(found[0] - found[1]) / 2**0.5
    made = json.loads((tmp_path / "small.json").read_text())
    assert (made["papers_setting"], made["differences"]) == (True, [])
    prefix, lora, copied = made["rows"]
    assert prefix["seeds"] == [0, 1]
    assert prefix["ours"]["accuracy"]["mean"] == pytest.approx(mean)
    assert prefix["ours"]["accuracy"]["deviation"] == pytest.approx(deviation)
    assert prefix["ours"]["accuracy"]["difference"] == pytest.approx(mean - 50)
    assert prefix["ours"]["BLEU"] is None
    assert lora["ours"]["loss"]["difference"] is None
    assert (lora["status"], copied["status"], copied["published"]["v2"]["loss"]) == ("run", "not run", 2.0)
    assert "| PREFIX | v2 | 50.0 | 3.00 | 1.00 |  |\n|  | v1 | 40.0 |" in text
    assert f"| {mean:.1f} ± {deviation:.1f} |" in text
    assert f"|  | ours - v2 | {mean - 50:+.1f} |" in text
    lines = list(csv.DictReader((tmp_path / "small.csv").open()))
    assert len(lines) == 9
    assert float(lines[0]["ours"]) == pytest.approx(mean)
    assert (lines[0]["published v1"], lines[0]["runs"], lines[0]["setting"]) == ("40.0", "2", "The paper's setting.")
    assert (lines[6]["status"], lines[6]["ours"]) == ("not run", "")
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    assert run.main([*command, "--config.train.epochs=2"]) == 1  # not mixed with what is there
    assert "was made with another config: train.epochs" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["model", "dataset"])
def test_what_every_run_reads_is_looked_for_before_the_first_one(small, tmp_path, capsys, option):
    assert run.main(["table", "small", f"--{option}=/nowhere", f"--workdir={tmp_path}/w"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: run 'prefix,seed=0': ")
    assert "/nowhere" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_runs_of_a_table_train_at_once(small, tmp_path, monkeypatch):
    """Those that can, as one job of the launcher's, whose command trains them."""
    jobs = []

    def launched(launcher, slurm, command, root):
        jobs.extend(command(name) for name in ("prefix,seed=1", "lora,seed=1"))
        raise UserError("seen")

    monkeypatch.setattr("prefix_tuning.launch.make", launched)
    options = ["--only=prefix,lora", f"--workdir={tmp_path}", "--config.train.population=4"]
    assert run.main(["table", "small", *options]) == 1
    rest = [options[0], "--config.train.population=4", options[1]]
    assert jobs[0][2:] == ["table", "small", *rest, "--runs=prefix,seed=0,prefix,seed=1"]
    assert jobs[1][2:] == ["table", "small", *rest, "--runs=lora,seed=0,lora,seed=1"]
    assert run.main(jobs[0][2:]) == 0
    for seed in (0, 1):
        summary = json.loads((tmp_path / f"prefix,seed={seed}" / "summary.json").read_text())
        assert summary["population"] == 2
    monkeypatch.setattr("prefix_tuning.launch.make", lambda launcher, slurm, command, root: Nothing())
    assert run.main(["table", "small", f"--workdir={tmp_path}", "--only=prefix"]) == 0
    assert json.loads((tmp_path / "small.json").read_text())["rows"][0]["seeds"] == [0, 1]


class Nothing:
    """A launcher for what is finished."""

    interval = 0

    def submit(self, names):
        assert not names
        return ""

    def poll(self):
        return {}


def test_a_figure_has_series_and_a_column_the_mean_of_others(tmp_path):
    """Of the seeds that all columns have; each column from its own runs."""
    table = TABLES["prompt-length"]
    options = library.options(table)
    runs = [one for one in library.plan(table, options, load) if one.row.name == "base-20"]
    for one in runs:
        if (one.arg, one.config["seed"]) != ("task=cb", 2):
            write_summary(
                tmp_path / one.planned.name, accuracy=0.5 + 0.1 * one.config["seed"] + (one.arg == "task=cb") / 4
            )
    lines = library.collect(table, runs, tmp_path)
    line = next(line for line in lines if line.row.name == "base-20")
    assert library.status(line) == "14 of 15 runs"
    assert [round(score.mean, 6) for score in line.scores] == [60.0, 80.0, 60.0, 60.0, 60.0, 60.0]
    assert line.scores[-1].values == pytest.approx([55.0, 65.0])
    text = library.write("prompt-length", table, lines, ["an example"], tmp_path)
    assert "| base, 20 | 60.0 ± 10.0 | 80.0 ± 7.1 |" in text
    assert "**Not the paper's setting: an example.**" in text
    made = json.loads((tmp_path / "prompt-length.json").read_text())
    assert next(row for row in made["rows"] if row["name"] == "base-20")["x"] == 20

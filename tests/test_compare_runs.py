"""Runs beside each other: what is resampled is the metric, intervals cover what they say, every error is a line."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest

import run
from prefix_tuning import bootstrap, compare, metrics
from prefix_tuning.errors import UserError
from prefix_tuning.metrics import absent, meteor, resampling

WORDS = "the a 0 pub by river cheap French food near Burger King . , serves it is family friendly".split()
SAMPLES = "--samples=60"


def texts(size, seed=0):
    """(predictions, references, sources) of made-up records; some predictions are a reference, one is empty."""
    rng = np.random.default_rng(seed)

    def line(low=3):
        return " ".join(rng.choice(WORDS, rng.integers(low, 12)))

    references = [[line() for _ in range(rng.integers(1, 4))] for _ in range(size)]
    predictions = [group[0] if rng.random() < 0.4 else line() for group in references]
    predictions[1] = ""
    sources = [f"name : {rng.choice(WORDS[3:8])} | food : {rng.choice(WORDS[3:8])}" for _ in range(size)]
    return predictions, references, sources


def of_labels(size, labels, seed=0):
    rng = np.random.default_rng(seed)
    return [str(x) for x in rng.choice(labels, size)], [[str(x)] for x in rng.choice(labels, size)], None


def of_tags(size):
    rng = np.random.default_rng(0)
    tags = [[" ".join(rng.choice(["O", "B-PER", "I-PER", "B-LOC"], 5)) for _ in range(size)] for _ in range(2)]
    return tags[0], [[row] for row in tags[1]], None


def of_answers(size):
    predictions, references, _ = texts(size)
    return predictions, [[""] if i % 3 == 0 else group for i, group in enumerate(references)], None


def data(name, size=12):
    if name in ("f1", "mcc", "accuracy"):
        return of_labels(size, ["no", "yes", "maybe"])
    return {"seqeval": of_tags, "squad": of_answers}.get(name, texts)(size)


@pytest.mark.parametrize("name", resampling.PREPARED)
def test_what_is_resampled_is_the_metric(name, monkeypatch):
    """On resamples, on records that are left out, and on one alone, as if the texts had been scored anew."""
    monkeypatch.setenv("PATH", "")  # Java's METEOR has a test of its own
    monkeypatch.setattr(absent, "_SAID", {"METEOR"})
    given = data(name)
    counts = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), size=5)
    counts = np.concatenate([counts, np.arange(12)[None] % 2, np.eye(12, dtype=int)[4:5]])
    scores, most = resampling.resampled(name, *given)
    found, right = scores(counts), resampling.plainly(name, *given)(counts)
    assert most is None
    assert right.keys() <= found.keys()
    assert set(metrics.score([name], *given)) - set(found) <= {"meteor"}
    for key, values in right.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-9, atol=1e-12, err_msg=key)
    assert any(len(set(values.round(6))) > 2 for values in found.values())  # or this would show little


def test_the_f1_of_two_classes_is_resampled_as_well():
    given = of_labels(12, ["no", "yes"])
    counts = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), size=5)
    found, right = resampling.PREPARED["f1"](*given)(counts), resampling.plainly("f1", *given)(counts)
    assert found.keys() == right.keys() == {"f1_macro", "f1_no", "f1_yes"}
    for key, values in right.items():
        np.testing.assert_allclose(found[key], values)


@pytest.mark.skipif(shutil.which("java") is None, reason="no `java` on this machine")
def test_meteor_of_sums_is_the_programs(one_meteor):
    """Also where texts are their own reference, which the program adds in another way."""
    predictions, references, _ = texts(8)
    groups = [[line.lower() for line in group] for group in references]
    lower = [line.lower() for line in predictions]
    counts = np.array([3, 0, 1, 2, 0, 1, 1, 4])
    drawn = np.repeat(np.arange(8), counts)
    statistics = meteor.meteor_statistics(lower, groups)
    (right,) = meteor.meteor(lower, groups, [drawn])
    assert (statistics[:, 20] == 0).sum() > 2
    assert meteor.meteor_scores((counts @ statistics)[None]) == pytest.approx([right], abs=1e-12)


def mean_of(values):
    return lambda counts: {"mean": counts @ values / counts.sum(1)}


def test_an_interval_covers_the_difference_as_often_as_it_says():
    """Of records: 95 % within what 300 trials leave open; and p is below 5 % in about as many."""
    rng = np.random.default_rng(0)
    covered = rejected = 0
    for trial in range(300):
        easy = rng.normal(size=50)  # what both sides share, so that only a paired test sees the difference
        sides = [[mean_of(3 * easy + rng.normal(size=50) + shift)] for shift in (0.0, 0.2)]
        found = bootstrap.paired(*sides, 50, 200, seed=trial)["mean"]
        covered += found.low <= 0.2 <= found.high
        none = bootstrap.paired(sides[0], [mean_of(3 * easy + rng.normal(size=50))], 50, 200, seed=trial)["mean"]
        rejected += none.p < 0.05
    assert 0.90 < covered / 300 < 0.985
    assert 0.015 < rejected / 300 < 0.10


def test_seeds_are_part_of_the_interval():
    """Six seeds a side that vary far more than records do: still 95 %, where the seeds' average alone would be sure."""
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for trial in range(200):
        sides = [[mean_of(rng.normal(size=40) + 2 * rng.normal()) for _ in range(6)] for _ in range(2)]
        found = bootstrap.paired(*sides, 40, 200, seed=trial)["mean"]
        covered += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    assert 0.88 < covered / 200 < 0.99
    assert np.mean(widths) > 3  # 2 * 1.96 * 2 * sqrt(2 / 6) is 4.5; records alone would make it 0.4


def test_the_variance_of_a_drawn_mean_is_that_of_the_mean():
    values = np.array([1.0, 4.0, 5.0])
    weights = bootstrap.seeds(np.random.default_rng(0), 20000, 3)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights[0], 1 / 3)
    assert np.var(weights[1:] @ values) == pytest.approx(np.var(values, ddof=1) / 3, rel=0.03)


def test_bleu_agrees_with_sacrebleus_own_paired_tests():
    """Where many records differ: theirs do not count a resample that ties with the observed difference.

    Their bootstrap counts the tail on the side of the observed difference alone, ours both.
    """
    predictions, references, _ = texts(60)
    others = texts(60, seed=1)[0]
    better = [group[0] if i % 2 else other for i, (group, other) in enumerate(zip(references, others, strict=True))]
    columns = metrics.text.columns(references)
    systems = [("one", predictions), ("two", better)]
    p = {}
    for kind in ("ar", "bs"):
        _, told = PairedTest(systems, {"bleu": sacrebleu.BLEU(force=True)}, columns, kind, n_samples=1000)()
        p[kind] = told["BLEU"][1].p_value
    both = resampling.resampled("bleu", predictions + better, references * 2)[0]
    sides = [[resampling.resampled("bleu", one, references)[0]] for one in (predictions, better)]
    found = bootstrap.paired(*sides, 60, 1000)["sacrebleu"]
    assert found.value == pytest.approx(told["BLEU"][1].score - told["BLEU"][0].score)
    assert bootstrap.randomised(both, 60, 1000)["sacrebleu"] == pytest.approx(p["ar"], abs=0.03)
    assert found.p == pytest.approx(2 * p["bs"], abs=0.03)


# ---- workdirs


def rows(predictions, references, sources):
    columns = zip(sources, predictions, references, strict=True)
    return [{"source": s, "prediction": p, "references": r} for s, p, r in columns]


def write(folder, lines, seed=0, split="test", steps=9, finished=True, config=None):
    """A workdir as `train` leaves it, as far as it is read here."""
    (folder / "predictions").mkdir(parents=True)
    settings = {"seed": seed, "method": {"name": "prefix"}, "evaluation": {"metrics": ["exact_match", "bleu"]}}
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    (folder / "predictions" / f"{split}_{steps}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "predictions" / "untuned.jsonl").write_text("")
    if finished:
        (folder / "summary.json").write_text(json.dumps({"split": split, "steps": steps}))
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    """A run, and one with more right answers."""
    predictions, references, sources = texts(30)
    better = [group[0] for group in references]
    better[2] = predictions[2]
    first = write(tmp_path / "first", rows(predictions, references, sources))
    return first, write(tmp_path / "second", rows(better, references, sources), config={"method": {"name": "lora"}})


def read_table(output):
    """{score: [difference, low, high, p, randomised p or None, resamples]} of the printed table."""
    found = re.findall(
        r"^(\w+) +([+-][\d.]+) +\[([+-][\d.]+), ([+-][\d.]+)\] +([\d.]+) +([\d.]+ +)?(\d+)$", output, re.MULTILINE
    )
    return {key: [float(x) if x.strip() else None for x in rest] for key, *rest in found}


def test_a_better_run_has_a_small_p_and_an_equal_one_a_p_of_one(pair, capsys):
    assert run.main(["compare", SAMPLES, *pair, "--metrics=exact_match,bleu,chrf,rouge"]) == 0
    output = capsys.readouterr().out
    found = read_table(output)
    assert list(found) == ["exact_match", "sacrebleu", "chrf", "rouge1", "rouge2", "rougeL"]
    for difference, low, high, p, randomised, samples in found.values():
        assert 0 < low < difference < high
        assert p == randomised == pytest.approx(1 / 61, abs=1e-4)
        assert samples == 60
    assert "one run each: this is about other records" in output
    assert run.main(["compare", *pair, SAMPLES, "--metrics=exact_match,bleu,chrf,rouge"]) == 0
    assert capsys.readouterr().out == output  # deterministic
    assert run.main(["compare", pair[0], pair[0], SAMPLES]) == 0
    output = capsys.readouterr().out
    for numbers in read_table(output).values():
        assert numbers == [0, 0, 0, 1, 1, 60]
    assert "chrF differs on 0 of 30 records\n" in output


def test_several_seeds_have_a_mean_and_a_deviation(tmp_path, capsys):
    """A folder of runs, or workdirs with commas, are one setting; scores as by hand."""
    _, references, sources = texts(20)
    right = [group[0] for group in references]
    for seed, hits in ((0, 10), (1, 14), (2, 12)):
        write(tmp_path / "a" / f"seed{seed}", rows(right[:hits] + ["x"] * (20 - hits), references, sources), seed)
    for seed, hits in ((0, 18), (1, 20)):
        write(tmp_path / "b" / f"seed{seed}", rows(right[:hits] + ["x"] * (20 - hits), references, sources), seed)
    commas = ",".join(str(tmp_path / "b" / f"seed{seed}") for seed in (0, 1))
    command = ["compare", f"{tmp_path}/a/", commas, "--metrics=exact_match", SAMPLES]
    assert run.main(command) == 0
    output = capsys.readouterr().out
    assert re.search(rf"^{tmp_path}/a +3 +60\.0000 ± 10\.0000$", output, re.MULTILINE)
    assert re.search(rf"^{commas} +2 +95\.0000 ± 7\.0711$", output, re.MULTILINE)
    difference, low, high, p, randomised, _ = read_table(output)["exact_match"]
    assert difference == 35
    assert 5 < low < 35 < high < 60
    assert p < 0.1
    assert randomised is None
    assert "paired bootstrap of 20 records and of 3 and 2 seeds" in output
    assert "fewer than five seeds" in output


def test_each_of_several_settings_is_compared_with_the_first(pair, capsys):
    assert run.main(["compare", pair[0], pair[1], pair[0], SAMPLES]) == 0
    output = capsys.readouterr().out
    assert output.count("paired bootstrap of 30 records") == 2
    assert "2 comparisons with the first setting: no p is corrected" in output


def test_a_metric_that_only_its_function_can_score_has_fewer_resamples(pair, capsys, monkeypatch):
    def longest(predictions, references, *_):
        return {"longest": max(map(len, predictions)), "missing": None}

    monkeypatch.setitem(metrics.METRICS, "longest", longest)
    monkeypatch.setattr(resampling, "PLAIN_SAMPLES", 7)
    assert run.main(["compare", *pair, "--metrics=longest,bleu", SAMPLES]) == 0
    output = capsys.readouterr().out
    found = read_table(output)
    assert (found["longest"][-1], found["sacrebleu"][-1]) == (7, 60)
    assert "null" in output


def test_a_metric_of_questions_is_left_out_and_says_why(tmp_path, capsys):
    answers, references, _ = of_labels(8, ["True", "False"])
    sources = [f"question {i // 2}\tanswer {i % 2}" for i in range(8)]
    names = [write(tmp_path / name, rows(answers, references, sources)) for name in ("a", "b")]
    assert run.main(["compare", *names, "--metrics=accuracy,multirc", SAMPLES]) == 0
    output = capsys.readouterr().out
    assert list(read_table(output)) == ["accuracy"]
    assert "multirc is not tested: its rows belong together in questions" in output


def test_what_is_resampled_is_checked_against_the_metric(pair, monkeypatch):
    wrong = lambda *_: lambda counts: {"exact_match": np.zeros(len(counts))}  # noqa: E731
    monkeypatch.setitem(resampling.PREPARED, "exact_match", wrong)
    with pytest.raises(RuntimeError, match=r"exact_match is [\d.]+, but 0\.0 from its statistics"):
        compare.compare(pair, names=["exact_match"], samples=3)


class Cells(html.parser.HTMLParser):
    """The texts of a page's cells, its tags, and what would be loaded."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags, self.loads, self.inside = [], [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for key, value in attributes if key in ("src", "href")]
        if tag == "td":
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, text):
        if self.inside:
            self.cells[-1] += text


ODD = "</td><script>alert('1')</script> & \"two\" | three \\"


def test_pages_hold_every_record_as_it_is(tmp_path, capsys):
    """Whatever stands in a text stays text, in HTML and in Markdown; those that differ most come first."""
    references = [["right"], [ODD, "two\nlines"], ["same"]]
    runs = [["righ", ODD, "same"], ["right", "wrong", "same"]]
    names = [write(tmp_path / str(i), rows(one, references, [ODD, "s", "t"])) for i, one in enumerate(runs)]
    for kind in ("html", "md"):
        assert run.main(["compare", *names, SAMPLES, f"--output={tmp_path}/page.{kind}"]) == 0
        assert capsys.readouterr().out.endswith(f"\nwritten to {tmp_path}/page.{kind}\n")
    found = Cells()
    found.feed((tmp_path / "page.html").read_text())
    assert found.tags.count("script") == 1
    assert found.loads == []
    records = [found.cells[-18 + 6 * i :][:6] for i in range(3)]
    assert [record[0] for record in records] == ["2", "1", "3"]
    assert records[0][2:4] == ["s", f"{ODD}\ntwo\nlines"]
    assert records[0][4:] == [f"100.0\n{ODD}", f"{sacrebleu.sentence_chrf('wrong', references[1]).score:.1f}\nwrong"]
    assert records[1][2] == ODD
    assert float(records[2][1]) == 0
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| 2", "| 1", "| 3"]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 6 for line in lines[-5:])
    assert "<script" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare needs at least two runs, not 0: 'run.py compare A B"),
        (["{first}"], "compare needs at least two runs, not 1"),
        (["{first}", "{root}/none"], "there is no folder '{root}/none'; expected a workdir made by 'run.py train'"),
        (["{first}", "{root}/first/predictions"], "predictions has no config.json; expected a workdir"),
        (["{first}", "{unfinished}"], "the run {unfinished} is not finished (it has no summary.json)"),
        (["{first}", "{second}", "--split=dev"], "no predictions for the split 'dev' from after its last step; it has: "
         "test, untuned; 'run.py eval --workdir={first} --split=dev' writes them"),
        (["{first}", "{second}", "--metrics=blue"], "unknown metric 'blue'; valid: accuracy, "),
        (["{first}", "{second}", "--metrics=seqeval"], "references; expected one class"),
        (["{first}", "{second}", "--samples=0"], "--samples='0' must be a number of at least 1"),
        (["{first}", "{second}", "--output={root}/page.txt"], "expected a name that ends in .html or .md"),
        (["{first}", "{second}", "--output={root}/none/page.md"], "in a folder that exists"),
        (["{first}", "{second}", "--sample=3"], "Unknown command line flag 'sample'"),
        (["{first}", "{fewer}"], "did not answer the same inputs: 30 records and 29"),
        (["{first}", "{other}"], "did not answer the same inputs: source of record 3 is 'name : "),
        (["{first}", "{elsewhere}"], "the runs ended on different splits: dev, test; choose one with --split"),
        (["{first},{second}", "{second}"], "{first},{second} is not one setting with several seeds: {first} and "
         "{second} differ in method.name: 'prefix' -> 'lora'; give them one by one"),
        (["{first},{first}", "{second}"], "has the seed 0 twice, {first} and {first}"),
        (["{first}", "{broken}"], "test_9.jsonl:1 lacks a text for source, prediction or references"),
    ],
)  # fmt: skip
def test_every_error_is_a_line(arguments, message, pair, tmp_path, capsys):
    given = rows(*texts(30))
    names = {"first": pair[0], "second": pair[1], "root": str(tmp_path)}
    names["unfinished"] = write(tmp_path / "unfinished", given, finished=False)
    names["fewer"] = write(tmp_path / "fewer", given[:29])
    names["other"] = write(tmp_path / "other", [*given[:2], given[2] | {"source": "x"}, *given[3:]])
    names["elsewhere"] = write(tmp_path / "elsewhere", given, split="dev")
    names["broken"] = write(tmp_path / "broken", [{"source": "x", "prediction": None, "references": ["y"]}] * 30)
    assert run.main(["compare", *(argument.format(**names) for argument in arguments)]) == 1
    caught = capsys.readouterr()
    assert message.format(**names) in caught.err
    assert caught.err.count("\n") == 1
    assert caught.out == ""


def test_other_references_are_other_inputs(pair):
    lines = compare.read_run(*map_path(pair[0]))
    changed = lines._replace(rows=[lines.rows[0] | {"references": ["other"]}, *lines.rows[1:]])
    with pytest.raises(UserError, match=r"references of record 1 is \[.*\] and \['other'\]"):
        compare.check_inputs(lines, changed)


def map_path(name):
    return compare.Path(name), "test", 9


def test_predictions_of_eval_are_read_where_training_wrote_none(pair, tmp_path, capsys):
    for name in pair:
        shutil.copy(f"{name}/predictions/test_9.jsonl", f"{name}/predictions/validation.jsonl")
    assert run.main(["compare", *pair, SAMPLES, "--split=validation", "--metrics=exact_match"]) == 0
    assert read_table(capsys.readouterr().out)["exact_match"][0] > 0


def test_other_commands_still_take_no_argument_without_a_name(capsys):
    assert run.main(["eval", "--workdir=w", "more"]) == 1
    assert "unexpected argument 'more'; options are given as --name=value" in capsys.readouterr().err
    assert run.main(["help"]) == 0
    assert "compare   RUN RUN ... [--split] [--metrics] [--samples] [--output]" in capsys.readouterr().out

"""What the comparison of methods makes of finished runs, and of data without a test split."""

import json

import pytest

from experiments import compare, style
from prefix_tuning.files import read_lines


def finished(root, method, seed, bleu, step=1):
    folder = root / "final" / method / str(seed)
    folder.mkdir(parents=True)
    tuned = {"loss": 2 - bleu, "bleu": bleu, "rouge_l": 0.5, "slot_accuracy": 80.0}
    summary = {"tuned": tuned, "untuned": tuned | {"bleu": 0.01}, "peak_memory_mb": 1000 * step}
    summary["parameters"] = {"trained": 2000, "stored": 500}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"optimizer": {"learning_rate": 0.003}}))


def test_report_has_a_line_per_method_best_first_and_names_the_rest(tmp_path):
    compare.FLAGS(["compare", "--config=c", "--workdir=w", "--methods=prefix,lora,memory"])
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        compare.report(tmp_path)
    for seed, bleu in enumerate((0.2, 0.4)):
        finished(tmp_path, "prefix", seed, bleu, seed + 1)
    finished(tmp_path, "lora", 0, 0.5)
    lines = compare.report(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:5]]
    assert [row[0] for row in cells] == ["method", "---", "lora", "prefix", "(untuned)"]
    assert all(len(row) == len(cells[0]) for row in cells)
    prefix = dict(zip(cells[0], cells[3], strict=True))
    assert prefix["BLEU"] == "0.300 ± 0.141"
    assert prefix["slot error %"] == "20.0 ± 0.0"
    assert (prefix["trained"], prefix["stored kB"], prefix["peak MiB"], prefix["seeds"]) == ("2,000", "2", "2,000", "2")
    assert prefix["time per step"] == "-"
    assert dict(zip(cells[0], cells[2], strict=True))["BLEU"] == "0.500"
    assert lines[-1] == "Not run: memory."
    (tmp_path / "seconds_per_step.json").write_text(json.dumps({"prefix": 2.0, "lora": 3.0}))
    assert "| 1.50 |" in compare.report(tmp_path).splitlines()[2]


def test_validation_records_are_halved_where_there_is_no_test_split(tmp_path):
    (tmp_path / "e2e").mkdir()
    (tmp_path / "e2e" / "src1_train.txt").write_text("name : A||a\n")
    (tmp_path / "e2e" / "src1_valid.txt").write_text("".join(f"name : {r}||{r}{i}\n" for r in "abcd" for i in range(2)))
    options = ["--config.seed=1", f"--config.dataset.path={tmp_path}/e2e"]
    changed = compare.halve(options, tmp_path)
    assert changed == ["--config.seed=1", f"--config.dataset.path={tmp_path}/data"]
    first, second = ((tmp_path / "data" / f"src1_{n}.txt").read_text().splitlines() for n in ("valid", "test"))
    assert [line[-2] for line in first] == ["a", "a", "b", "b"]
    assert [line[-2] for line in second] == ["c", "c", "d", "d"]
    (tmp_path / "e2e" / "src1_test.txt").write_text("name : Z||z\n")
    assert compare.halve(options, tmp_path) == options


# --- Style


def test_pairs_are_in_the_style_and_kinds_of_the_test_split_are_new(tmp_path):
    style.write(tmp_path)
    rows = {split: read_lines(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert [len(own) for own in rows.values()] == [300, 20, 60]
    assert all(style.follows(row["instruction"], row["output"]) for own in rows.values() for row in own)
    kinds = {s: {k for k in style.KINDS for row in own if f" {k}" in row["instruction"]} for s, own in rows.items()}
    assert not kinds["train"] & (kinds["test"] | kinds["validation"])
    style.write(tmp_path / "again")
    assert (tmp_path / "again" / "train.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1. Oak\n2. Pine\nThat makes two.", True),
        ("1. Oak\n2. Brown bear\nThat makes two.", True),
        ("1. Oak\n2. Pine\n3. Ash\nThat makes three.", False),
        ("1. Oak\n2. Pine", False),
        ("1. Oak\n2. Pine\nThat makes three.", False),
        ("1. Oak\n2. Oak\nThat makes two.", False),
        ("1. oak\n2. Pine\nThat makes two.", False),
        ("1. Oak\n3. Pine\nThat makes two.", False),
        ("Oak and pine.", False),
    ],
)
def test_following_the_style(text, right):
    assert style.follows("Name two trees.", text) is right


def test_style_report_counts_answers(tmp_path):
    (tmp_path / "predictions").mkdir()
    asked = {"source": "Name two trees.", "references": ["-"]}
    for file, texts in (
        ("untuned", ["Oak"] * 2),
        ("test_7", ["1. Oak\n2. Ash\nThat makes two.", "1. Oak\n2. Oak\nThat makes two."]),
    ):
        rows = "".join(json.dumps(asked | {"prediction": text}) + "\n" for text in texts)
        (tmp_path / "predictions" / f"{file}.jsonl").write_text(rows)
    summary = {"steps": 7, "untuned": {"rougeL": 1.0}, "tuned": {"rougeL": 50.0}, "seconds": 90}
    summary["parameters"] = {"trained": 20, "frozen": 1000}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = style.report(tmp_path).splitlines()
    assert lines[2:4] == ["| before | 0 of 2 | 0 of 2 | 1.0 |", "| after | 2 of 2 | 1 of 2 | 50.0 |"]
    assert lines[-1] == "20 of 1,000 parameters, 7 steps, 1.5 minutes of training"

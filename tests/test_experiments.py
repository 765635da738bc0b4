"""What the comparison of methods makes of finished runs, and of data without a test split."""

import json

import pytest

from experiments import compare


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

"""What the README says must be what is there."""

import re
from pathlib import Path

import run
from experiments import readme

ROOT = Path(run.__file__).parent
TEXT = (ROOT / "README.md").read_text()


def test_results_in_the_readme_are_those_that_commands_wrote():
    assert readme.filled(TEXT, readme.read_results()) == TEXT
    held = set(re.findall(r"<!-- (\w+) -->", TEXT))
    linked = set(re.findall(r"\]\(experiments/results/(\w+)\.md\)", TEXT))
    assert held | linked == set(readme.read_results())


def test_every_result_begins_with_a_title_or_is_held_by_the_readme():
    for name, text in readme.read_results().items():
        assert text.startswith("# ") or f"<!-- {name} -->" in TEXT
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            folder = ROOT if f"<!-- {name} -->" in TEXT else ROOT / "experiments/results"
            assert (folder / target).exists(), (name, target)


def test_ci_runs_exactly_the_two_commands_of_the_readme():
    commands = [line for line in TEXT.splitlines() if line.startswith("pip install")]
    ran = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert ran == commands


def test_every_command_and_every_link_exists():
    named = set(re.findall(r"^\| `python run\.py (\w+)", TEXT, re.MULTILINE))
    assert named == set(run.COMMANDS)
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert any(
            (folder / target).exists() for folder in (ROOT, ROOT / "prefix_tuning", ROOT / "prefix_tuning/models")
        )


def test_every_config_states_its_command():
    for path in ROOT.glob("configs/*.py"):
        if path.stem != "common":
            assert f"--config=configs/{path.name}" in path.read_text() or path.stem == "quickstart"

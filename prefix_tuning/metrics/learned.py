"""BERTScore, BLEURT and MoverScore, each by its authors' package, in the configuration of the published DART numbers.

The packages need torch or TensorFlow, and MoverScore's releases of both that are years old.  So each runs in a Python
process of its own, which is this Python or the one that the environment variable SCORERS_PYTHON names, and this process
never imports them.  Weights are never fetched.  What cannot run is None, with a warning that says what is missing.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub

from prefix_tuning.metrics.absent import say_once

RUNNER = Path(__file__).with_name("learned_runner.py")
PYTHON = "SCORERS_PYTHON"
ROBERTA = "roberta-large"


def bertscore(texts: list[str], groups: list[list[str]]) -> float | None:
    """The mean F1 of roberta-large's 17th layer, best of the references, no idf, not rescaled (1904.09675 on arXiv)."""
    how = f"`pip install bert-score`, and `hf download {ROBERTA}` for the weights"
    if not isinstance(huggingface_hub.try_to_load_from_cache(ROBERTA, "config.json"), str):
        say_once("BERTScore", f"{ROBERTA} is not in the cache of Hugging Face; {how}")
        return None
    return _mean("bertscore", "BERTScore", how, texts, groups)


def bleurt(texts: list[str], groups: list[list[str]]) -> float | None:
    """The mean score of BLEURT's bundled `test_checkpoint`, against the first reference (2020.acl-main.704).

    That checkpoint is a tiny one, for tests: the numbers are not those of BLEURT-base or BLEURT-20, but published.
    """
    how = f"`pip install git+https://github.com/google-research/bleurt`, here or where {PYTHON} points"
    return _mean("bleurt", "BLEURT", how, texts, groups)


def moverscore(texts: list[str], groups: list[list[str]]) -> float | None:
    """The mean MoverScore against the first reference, by `moverscore_v2` of release 1.0.3 (1909.02622 on arXiv).

    That is DistilBERT's last layer, unigrams weighted by idf, without subwords.  The score is 1 - distance, and not
    1 / (1 + distance) as in later sources: only the first can be as low as the 0.32 in the scripts' documentation.
    """
    how = (
        f"it runs on a GPU only, and beside old packages: make an environment with Python 3.8, point {PYTHON} at its "
        "`python`, and `pip install moverscore==1.0.3 pyemd 'transformers<3' 'numpy<1.24' torch matplotlib` there"
    )
    return _mean("moverscore", "MoverScore", how, texts, groups)


def _mean(name: str, title: str, how: str, texts: list[str], groups: list[list[str]]) -> float | None:
    """The mean of what the runner's function `name` says of every text."""
    command = [os.environ.get(PYTHON, sys.executable), "-", name]
    program = RUNNER.read_text(encoding="utf-8")
    options = {"capture_output": True, "check": True, "encoding": "utf-8", "errors": "replace"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "texts.json").write_text(json.dumps([texts, groups]), encoding="ascii")
        try:
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            # The program comes through a pipe, so that no module beside its file hides one of the same name.
            subprocess.run(command, input=program, cwd=folder, env=environment, **options)
            scores = json.loads(Path(folder, "scores.json").read_text(encoding="ascii"))
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            say_once(title, f"{lines[-1].strip() if lines else error}; {how}")
            return None
    return sum(scores) / len(texts)

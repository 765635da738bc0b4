"""METEOR 1.5 (W14-3348 in the ACL anthology): its authors' Java program, which comes with pycocoevalcap."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.meteor import meteor as coco_meteor

from prefix_tuning.metrics.absent import say_once

METEOR_JAR = Path(coco_meteor.__file__).with_name(coco_meteor.METEOR_JAR)
GET_JAVA = "install Java 8 or newer (`apt install default-jre-headless`, or adoptium.net) so that `java` runs"


def meteor(texts: list[str], groups: list[list[str]], parts: Sequence[Sequence[int]]) -> list[float]:
    """Corpus METEOR, 0 to 1, of some parts of tokenised texts, each given by the indices of at least one.

    An `OSError` or a `SubprocessError` where Java does not run.  The package's own class is not used: it leaves a full
    pipe of warnings unread, and a lock held after a failure.
    """
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf-8"}
    with subprocess.Popen(command, **pipe) as process:

        def ask(*fields: str) -> str:
            # "|||" parts the fields of a request, and nothing in a text may look like it.
            line = " ||| ".join(re.sub(r"\|{3,}", " ", field) for field in fields)
            print(line, file=process.stdin, flush=True)
            return answer()

        def answer() -> str:
            if line := process.stdout.readline():
                return line.strip()
            raise subprocess.SubprocessError("METEOR stopped without an answer")

        def corpus(part: Sequence[int]) -> float:
            ask("EVAL", *(statistics[i] for i in part))
            return [float(answer()) for _ in part][-1]  # a score for each text came first, the corpus's comes last

        statistics = [ask("SCORE", *group, text) for text, group in zip(texts, groups, strict=True)]
        return [corpus(part) for part in parts]


def meteor_if_java(texts: list[str], groups: list[list[str]], parts: Sequence[Sequence[int]]) -> list[float | None]:
    """The same, but None for every part where Java does not run, and a warning that says so."""
    try:
        return meteor(texts, groups, parts)
    except (OSError, subprocess.SubprocessError) as error:
        say_once("METEOR", f"it needs Java ({error}); {GET_JAVA}")
        return [None] * len(parts)

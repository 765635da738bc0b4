"""The page about a tree of runs: numbers, escaping, broken files and size by parsing it; the rest in a real browser."""

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

import run
from prefix_tuning import report
from prefix_tuning.errors import UserError

EVIL = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'> & \"quoted\" </dd>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.texts.append(data)

    def rows(self, text, head):
        """The cells' texts of the row that begins with this head."""
        rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
        cells = [[re.sub("<[^>]*>", "", c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
        return [row for row in cells if row and row[0] == head]


def make(folder, *, length=5, loss=0.5, steps=(2, 4, 6, 8), predictions=("a bright cafe", EVIL), summary=True):
    """A run's folder as `run.py train` leaves it."""
    (folder / "predictions").mkdir(parents=True)
    config = {
        "seed": 0,
        "method": {"name": "prefix", "length": length},
        "evaluation": {"split": "validation", "final_split": "test"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    environment = {"command": ["run.py", "train"], "python": "3.11", "packages": {"jax": f"0.10.{length}"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [{"step": s, "train/loss": loss * 8 / s, "train/grad_norm": 1.0} for s in steps]
    lines += [{"step": s, "eval/loss": loss * 9 / s, "eval/bleu": 0.1 * s} for s in steps[1::2]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"source": f"name[{i}] {EVIL}", "prediction": p, "references": ["a bright cafe", "b"]}
        for i, p in enumerate(predictions)
    ]
    for name in ("test_8", "untuned", "test_4", "validation_8"):
        told = {"test_8": "", "untuned": "bare: "}.get(name, "old: ")
        text = "".join(json.dumps(row | {"prediction": told + row["prediction"]}) + "\n" for row in rows)
        (folder / "predictions" / f"{name}.jsonl").write_text(text)
    if summary:
        made = {
            "split": "test",
            "records": len(rows),
            "untuned": {"bleu": 0.0123},
            "tuned": {"loss": loss, "bleu": 0.75},
            "parameters": {"trained": 1024 * length, "frozen": 9, "stored": 3},
            "steps": 8,
            "seconds": 90.0,
            "seconds_per_step": 0.25,
            "peak_memory_mb": 812,
        }
        (folder / "summary.json").write_text(json.dumps(made))


def written(root):
    text = report.write(str(root)).read_text()
    return text, Page(text)


def test_numbers_settings_samples_and_environment(tmp_path, capsys):
    make(tmp_path / "a", length=5, loss=0.5)
    make(tmp_path / "deep" / "er" / "b", length=7, loss=0.25, predictions=("a bright cafe", "something else"))
    (tmp_path / "a" / "eval_validation.json").write_text('{"step": 8, "records": 2, "loss": 0.6125}')
    assert run.main(["report", f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path}/report.html\n"
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "2 runs: 2 finished" in page.text
    row = ["a", "finished", "0.5000", "0.7500", "5,120", "8", "1.5", "0.250", "812"]
    assert row in page.rows(text, "a")
    assert ["a", "validation", "8", "2", "0.6125"] in page.rows(text, "a")
    assert page.rows(text, "deep/er/b")[0][:3] == ["deep/er/b", "finished", "0.2500"]
    assert page.rows(text, "untuned")[0][:4] == ["untuned", "", "", "0.0123"]
    assert page.rows(text, "method.length") == [["method.length", "5", "7"]]
    assert page.rows(text, "method.name") == [["method.name", "prefix"]]  # the same in both, so in the other table
    assert page.rows(text, "packages.jax") == []
    assert "packages.jax" in page.text
    assert len(re.findall("(?<!bare: )something else", page.text)) == 1
    assert page.text.count("a bright cafe ✓") == 1  # one answer of both runs, a reference
    assert page.text.count("bare: a bright cafe") == 1
    assert "old: " not in page.text


def test_curves_are_in_the_page(tmp_path):
    make(tmp_path / "a", loss=0.5)
    make(tmp_path / "b", loss=1.0, steps=(2, 4))
    data = json.loads(written(tmp_path)[1].scripts[0])
    found = {chart["name"]: chart for chart in data["charts"]}
    assert list(found) == ["train/loss", "train/grad_norm", "eval/loss", "eval/bleu"]
    assert found["train/loss"]["series"] == [[0, [2, 4, 6, 8], [2.0, 1.0, 4 / 6, 0.5]], [1, [2, 4], [4.0, 2.0]]]
    assert [found[name]["group"] for name in found] == ["main", "more", "main", "main"]
    assert [one["name"] for one in data["runs"]] == ["a", "b"]


def test_what_a_run_wrote_is_text(tmp_path):
    """Everywhere: predictions, sources, names of metrics and settings, logs; and nothing is loaded from elsewhere."""
    folder = tmp_path / "run<b>&"
    make(folder)
    (folder / "config.json").write_text(json.dumps({"<b>key</b>": EVIL, "evaluation": {"final_split": "test"}}))
    name = "</script><script>window.pwned = 1</script>{{data}}"
    lines = [{"step": step, name: 1.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "exit_code").write_text("1\n")
    (tmp_path / "failed" / "log.txt").write_text(EVIL + "\n")
    row = {"source": "\ud800 \x00", "prediction": "{{data}}\x1b[0m", "references": None}
    (folder / "predictions" / "test_9.jsonl").write_text(json.dumps(row) + "\n")
    text, page = written(tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == len(page.scripts) == 2
    assert "img" not in tags
    assert "b" in tags  # ours
    assert EVIL.split(">")[0] + ">" in page.text
    assert "run<b>&" in page.text
    assert "{{data}}\ufffd[0m" in page.text
    assert json.loads(page.scripts[0])["charts"][0]["name"] == name
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not [a for _, a in page.elements if "src" in a or not a.get("href", "#").startswith("#")]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_broken_files_are_a_line_each(tmp_path):
    for name in ("good", "cut", "lines", "summary", "config", "bytes", "short"):
        make(tmp_path / name)
    (tmp_path / "cut" / "metrics.jsonl").open("a").write('{"step": 10, "train/lo')  # as a kill leaves it
    (tmp_path / "lines" / "metrics.jsonl").write_text('{"step": 1\n[]\n{"step": 2, "train/loss": NaN, "x": "y"}\n')
    (tmp_path / "summary" / "summary.json").write_text("{")
    (tmp_path / "config" / "config.json").write_text("[]")
    (tmp_path / "bytes" / "predictions" / "test_8.jsonl").write_bytes(b"\xff\xfe{}\n")
    (tmp_path / "short" / "summary.json").write_text('{"tuned": 3}')
    text, page = written(tmp_path)
    problems = re.findall("<li>(.*?)</li>", text)
    assert len(problems) == 5
    for problem in problems:
        assert "\n" not in problem
    told = "\n".join(problems)
    for part in (
        "lines/metrics.jsonl:1 is no JSON object, nor are 1 more",
        "summary/summary.json is not readable JSON",
        "config/config.json holds list, not a JSON object",
        "cannot read ",
        "short/summary.json has no untuned, tuned, parameters, seconds",
    ):
        assert part in told
    assert page.rows(text, "good")[0][1] == "finished"
    assert page.rows(text, "short")[0][1] == "failed"
    assert "NaN" not in page.scripts[0]


def test_runs_that_are_not_finished(tmp_path):
    make(tmp_path / "logged", summary=False)
    (tmp_path / "logged" / "log.txt").write_text("step 25/250: loss 0.1234, 3.0 ex/s, 9 tok/s, 1.0 min left\n")
    make(tmp_path / "bare", summary=False)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "environment.json").write_text("{}")
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "exit_code").write_text("1\n")
    (tmp_path / "failed" / "log.txt").write_text("error: no such model\n\n")
    text, page = written(tmp_path)
    assert "4 runs: 1 failed, 3 unfinished" in page.text
    assert page.rows(text, "logged")[0][1] == "unfinished, step 25/250, loss 0.1234"
    assert page.rows(text, "bare")[0][1] == "unfinished, step 8"
    assert page.rows(text, "fresh")[0][1] == "unfinished, before its first steps"
    assert page.rows(text, "failed")[0][1] == "failed"
    assert "failed: exit code 1: error: no such model" in page.text


def test_a_hundred_runs_stay_readable(tmp_path):
    """Samples are limited, equal answers are written once, and long curves are thinned without losing a peak."""
    for i in range(100):
        make(tmp_path / f"run{i}", length=i, predictions=[f"answer {n} {'of one' * (i == 7)}" for n in range(300)])
    lines = [{"step": s, "train/loss": 99.0 if s == 1234 else 1 / s} for s in range(1, 5001)]
    (tmp_path / "run3" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, page = written(tmp_path)
    assert len(text) < 1_000_000
    assert sum(a.get("class") == "sample card" for _, a in page.elements) == report.SAMPLES
    assert len(re.findall("(?<!bare: )answer 3 of one", page.text)) == 1
    assert "and 89 more" in page.text
    names = re.findall(r'data-value="(run\d+)" title', text)[:100]
    assert names == [f"run{i}" for i in range(100)]
    series = json.loads(page.scripts[0])["charts"][0]["series"][3]
    assert len(series[1]) <= report.POINTS
    assert series[1] == sorted(series[1])
    assert (series[1][0], series[1][-1]) == (1, 5000)
    assert series[2][series[1].index(1234)] == 99.0


def test_one_run_is_a_tree_too(tmp_path):
    make(tmp_path / "only")
    text, page = written(tmp_path / "only")
    assert page.rows(text, "only")[0][1] == "finished"
    assert "1 run: 1 finished" in page.text
    assert page.rows(text, "method.length") == [["method.length", "5"]]


def test_where_there_is_no_run(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")  # a model's, not a run's
    assert run.main(["report", f"--workdir={tmp_path}"]) == 1
    assert f"error: there is no run in {tmp_path} or below it; expected" in capsys.readouterr().err
    make(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        report.write(str(tmp_path), str(tmp_path / "file" / "report.html"))
    assert report.write(str(tmp_path), str(tmp_path / "new" / "page.html")).is_file()


class Browser:
    """Chromium without a window, driven over its debugging pipe."""

    def __init__(self, program, folder):
        ours, theirs = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        command = [program, f"--user-data-dir={folder}", *flags, "about:blank"]
        # It reads from descriptor 3 and writes to 4.
        place = "import os, sys; _, a, b, *it = sys.argv; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(it[0], it)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", place, str(ours[0]), str(theirs[1]), *command],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.out, self.incoming, self.number, self.events = ours[1], open(theirs[0], "rb"), 0, []  # noqa: SIM115
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Sends a command and returns its result; what happens meanwhile is kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        """The next message."""
        parts = []
        while (byte := self.incoming.read(1)) != b"\0":
            assert byte, "the browser has ended"
            parts.append(byte)
        message = json.loads(b"".join(parts))
        self.events.append(message)
        return message

    def open(self, path):
        """Loads a page and waits until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.receive()
        self("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def __call__(self, expression):
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def close(self):
        """Ends it."""
        self.process.terminate()
        self.process.wait()
        self.incoming.close()
        os.close(self.out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def test_in_a_browser(tmp_path, browser):
    """It draws, sorts, hides, shows values, follows the system's colours, fits a phone, loads and runs nothing else."""
    make(tmp_path / "a", length=5, loss=0.5)
    make(tmp_path / "b", length=30, loss=1.0)
    make(tmp_path / ("c" * 60), length=7, loss=0.75, summary=False)
    path = report.write(str(tmp_path))
    browser.open(path)
    assert browser("window.pwned") is None
    curves = "[...document.querySelectorAll('[data-group=main] svg')].map(s => s.querySelectorAll('path').length)"
    assert browser(curves) == [3, 3, 3]
    # ---- a click sorts by number, empty cells last, another one turns round
    column = "[...document.querySelectorAll('#runs th[data-sort]')].find(h => h.textContent == 'loss')"
    order = "[...document.querySelectorAll('#runs tbody tr')].map(r => r.cells[0].textContent[0]).join('')"
    browser(f"{column}.querySelector('button').click()")
    assert browser(order)[:2] == "ba"
    browser(f"{column}.querySelector('button').click()")
    assert browser(order)[:2] == "ab"
    assert set(browser(order)[2:]) == {"c", "u"}
    assert browser(f"{column}.getAttribute('aria-sort')") == "ascending"
    # ---- the legend hides a run
    browser("document.querySelector('.legend button').click()")
    assert browser(curves) == [2, 2, 2]
    browser("document.querySelector('.legend button').click()")
    assert browser(curves) == [3, 3, 3]
    # ---- pointing at a curve shows the values there
    middle = browser(
        "(() => { const s = document.querySelector('svg'); s.scrollIntoView({block: 'center'});"
        " const r = s.getBoundingClientRect(); return [r.right - 12, r.top + r.height / 2] })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=middle[0], y=middle[1])
    tip = browser("document.querySelector('.tip').innerText.split(/\\s+/)")
    assert tip == ["step", "8", "b", "1", "c" * 60, "0.75", "a", "0.5"]
    # ---- light and dark, and a phone
    colours = []
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(browser("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(246, 247, 249)", "rgb(18, 22, 28)"]
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=False)
    assert browser("innerWidth") == 360
    assert browser("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # ---- nothing else was asked for, nothing failed
    time.sleep(0.2)
    browser("0")
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert asked == [path.as_uri()]
    assert [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")] == []

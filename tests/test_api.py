"""What a notebook or a pipe is told, and how files of text are read."""

import subprocess
import sys

import pytest

import prefix_tuning
import run
from prefix_tuning import api
from prefix_tuning.data import sources
from prefix_tuning.errors import UserError
from prefix_tuning.files import read_groups, read_lines

ROWS = r"expected lists of token ids, such as \[\[5, 7, 9\], \[4\]\]"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([5, 7], {}, f"row 0 is '5'; {ROWS}"),
        ([[5], "text"], {}, f"row 1 is 'text'; {ROWS}"),
        ([[5.5]], {}, f"row 0 is '\\[5.5\\]'; {ROWS}"),
        ([], {}, "expected at least one row"),
        ([[5], []], {}, "at least one token id in each"),
        ([[5, 13]], {}, "row 0 has token id 13; valid: 0 to 12"),
        ([[5]], {"max_new_tokens": None}, r"generate\(\) lacks max_new_tokens"),
        ([[5]], {"beams": 3}, r"unknown key in generate\(\): 'beams'; valid: banned, .*num_beams"),
    ],
)
def test_generate_says_what_it_wants(twin, rows, options, message):
    _, _, model, frozen = twin("llama")
    given = {name: value for name, value in ({"max_new_tokens": 2} | options).items() if value is not None}
    with pytest.raises(UserError, match=message):
        prefix_tuning.generate(model, frozen, None, rows, **given)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_logits_beyond_the_positions_are_refused(twin, family):
    """An index beyond a table of positions reads its last row, and no error."""
    _, _, model, frozen = twin(family)
    most = model.max_positions
    for tokens, source in ((most + 1, 1), (1, most + 1)) if family == "bart" else ((most + 1, None),):
        options = {} if source is None else {"sources": [[3] * source]}
        with pytest.raises(UserError, match=rf"\({most + 1}\) are as many positions, but the model has {most}$"):
            prefix_tuning.logits(model, frozen, None, [[3] * tokens], **options)


def test_adapters_that_are_none(twin, tmp_path):
    _, _, model, frozen = twin("llama")
    with pytest.raises(UserError, match="None, which is the bare model, cannot be saved"):
        prefix_tuning.save_adapter(tmp_path / "a", None, model)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a workdir; expected its .*adapter"):
        prefix_tuning.load_adapter(tmp_path, model, frozen)


def test_the_interface_can_be_listed():
    assert dir(prefix_tuning) == sorted(prefix_tuning.__all__)


def test_lines_end_where_json_has_it(tmp_path):
    """Not at U+2028 or U+0085, which JSON need not escape; and a mark at the beginning is no part of the text."""
    file, text = tmp_path / "in.jsonl", "a\u2028b\u0085c"
    for mark in ("", "\ufeff"):
        file.write_text(f'{mark}{{"source": "{text}"}}\r\n{{"source": "d", "target": "e"}}\n', "utf-8")
        assert [row["source"] for row in read_lines(file)] == [text, "d"]
        assert [row["source"] for row in api.read_sources(str(file), str(tmp_path / "out"))] == [text, "d"]
        assert [row.fields["source"] for row in sources.read_jsonl(file)] == [text, "d"]
    with pytest.raises(UserError, match="it is a folder; expected the name of a file"):
        api.read_sources(str(file), str(tmp_path))
    file.write_text(f"{text}\n\nd\ne", "utf-8")
    assert read_groups(file) == [[text], ["d", "e"]]


def test_a_reader_that_has_enough_ends_a_command_without_a_word():
    with subprocess.Popen(
        [sys.executable, run.__file__, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141

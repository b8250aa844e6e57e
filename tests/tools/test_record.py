"""The file that keeps what compiling found, and the digest that says of what."""

import pytest

from tools.record import Record, digest_of, read, write

PYTHON = '''"""A module."""
def f(x):
    """What it does."""
    return x + 1  # why
'''
CPP = '// A file.\nint f(int x) { return x + 1; }  /* why */\nauto s = "// no comment";\n'


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record("triton 3.8.0", "0123abcd", [["sm_80", "a, b", "7"], ["sm_90", "c", ""]])
    write(tmp_path / "new" / "kernels.csv", record, ("chip", "case", "registers"))
    assert read(tmp_path / "new" / "kernels.csv") == record


def test_a_file_without_a_digest_is_refused(tmp_path):
    path = tmp_path / "kernels.csv"
    path.write_text("chip,case\n")
    with pytest.raises(ValueError, match=r"kernels\.csv: the first line does not name"):
        read(path)


@pytest.mark.parametrize(
    ("name", "text", "old", "new", "same"),
    [
        ("a.py", PYTHON, "# why", "# because", True),
        ("a.py", PYTHON, "What it does", "Adds one", True),
        ("a.py", PYTHON, "A module", "The module", True),
        ("a.py", PYTHON, "x + 1", "(x\n        + 1)", True),
        ("a.py", PYTHON, "x + 1", "x + 2", False),
        ("a.cuh", CPP, "A file", "The file", True),
        ("a.cuh", CPP, "/* why */", "", True),
        ("a.cuh", CPP, "x + 1; }", "x + 1;\n}", True),
        ("a.cuh", CPP, "x + 1", "x + 2", False),
        ("a.cuh", CPP, "no comment", "a string", False),
        ("a.json", "[1, 2]", "2", "3", False),
    ],
)
def test_comments_docstrings_and_line_breaks_leave_a_digest_as_it_is(
    tmp_path, name, text, old, new, same
):
    path = tmp_path / name
    digests = []
    for source in (text, text.replace(old, new)):
        path.write_text(source)
        digests.append(digest_of([path]))
    assert old in text
    assert (digests[0] == digests[1]) is same

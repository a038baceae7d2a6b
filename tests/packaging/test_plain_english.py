"""`tests/support/plain_english.py` reports each fault with its line, and passes plain text."""

from __future__ import annotations

import re
import subprocess

import plain_english
import pytest

# An example of every pattern of WORDS.
EXAMPLES = [
    "each token marries its neighbour",
    "the widowed token",
    "it looks for a pair",
    "the superfluous programs",
    "whoever calls it",
    "whatever the batch",
    "all but for the last",
    "alignment has no say",
    "it ends of its own accord",
    "this wants a float",
    "nothing but zeros",
    "hence the order",
    "likewise for videos",
    "in the place of Triton's",
    "where there is to be one",
    "it is content with an error",
    "the process hears that",
    "as nvcc is told",
    "nobody waits",
]


def found(tmp_path, name: str, text: str) -> list[tuple[int, str]]:
    path = tmp_path / name
    path.write_text(text)
    return [
        (line, fault)
        for line, paragraph in plain_english.texts(path)
        for fault in plain_english.faults(paragraph)
    ]


@pytest.mark.parametrize("text", EXAMPLES)
def test_finds_each_listed_word(text):
    assert len(plain_english.faults(text)) == 1
    assert plain_english.faults(text.upper())


def test_every_listed_word_has_an_example():
    for pattern in plain_english.WORDS:
        alone = re.compile(rf"\b(?:{pattern})\b")
        assert any(alone.search(text) for text in EXAMPLES), pattern


@pytest.mark.parametrize(
    "text",
    [
        "What the kernel sees.",
        "Who is nearest",
        "Whose tile was last lists the neighbours.",
        "Plain. What follows is not.",
        "A list: What it reads",
        "Is it plain? What it reads is not.",
        "Plain (What it reads).",
        "| plain | What it reads |",
        "*What it reads.*",
    ],
)
def test_finds_a_sentence_that_begins_with_what_or_who(text):
    (fault,) = plain_english.faults(text)
    assert fault.lstrip("*").startswith(("What", "Who"))


@pytest.mark.parametrize(
    "text",
    [
        "What does it read?",
        "What costs 1.5 times as much, select.cu or prune?",
        "Who owns it? The first backend.",
        "It shows what the kernel reads, and who calls it.",
        "Whole rows. Whatsit.",
        "A table of look-ups, to look up a name.",
        "The value of `look` in `whoever`.",
        "It is wanted by the caller.",
    ],
)
def test_passes_questions_clauses_and_code(text):
    assert plain_english.faults(text) == []


def test_reads_python(tmp_path):
    text = '''"""Plain.

Args:
    x: plain,
        superfluous.

- Plain
- What an item says.
"""

# Plain, over
# whatever lines
x = 1  # Plain
y = 2  # What y is
z = 3  # plain, but
       # widowed
# What comes next.
names = "What is in a string", "whoever"  # look


def test_what_it_does():
    """What it does."""
    raise ValueError(f"{x} looks wrong")


async def test_whose_turn_it_is():
    parser.add_argument("--x", help="whatever")


class A:
    """What A is."""
'''
    assert sorted(found(tmp_path, "a.py", text)) == [
        (3, "superfluous"),
        (8, "What an item says."),
        (11, "whatever"),
        (14, "What y is"),
        (15, "widowed"),
        (17, "What comes next."),
        (18, "look"),
        (21, "What: test_what_it_does"),
        (22, "What it does."),
        (23, "looks"),
        (26, "What: test_whose_turn_it_is"),
        (27, "whatever"),
        (31, "What A is."),
    ]


def test_reads_comments_of_cpp(tmp_path):
    text = """// Plain, then
// superfluous.
int what;  // What it counts
int look = whatever;  /// Plain, but for this
// Plain
int x;
/// Whose it is.
"""
    faults = [(1, "superfluous"), (3, "What it counts"), (4, "but for"), (7, "Whose it is.")]
    for name in ("a.cpp", "a.h", "a.cu", "a.cuh"):
        assert found(tmp_path, name, text) == faults


def test_reads_comments_of_other_files(tmp_path):
    text = """# What it takes.
all: look ## What it makes
\t@# Whatever comes
\techo look
"""
    faults = [(1, "What it takes."), (2, "What it makes"), (3, "Whatever")]
    for name in ("Makefile", "a.toml", "run", "a.yaml"):
        assert found(tmp_path, name, text) == faults


def test_reads_paragraphs_of_markdown_without_code_blocks(tmp_path):
    text = """# What a heading says
Plain, over two
superfluous lines.
- What an item says.
1. Whose an item is.

```python
# What a block of code says, whatever it is
```
`What` is plain, `look` too, **What** is not at the start.

> What a quotation says
"""
    assert found(tmp_path, "a.md", text) == [
        (1, "What a heading says"),
        (2, "superfluous"),
        (4, "What an item says."),
        (5, "Whose an item is."),
        (12, "What a quotation says"),
    ]


def test_command_prints_faults_of_tracked_and_new_files(tmp_path, monkeypatch, capsys):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(plain_english, "ROOT", tmp_path)
    assert plain_english.main([]) == 0
    assert "not checked" in capsys.readouterr().out
    git("init")
    for name in ("tracked.py", "new.py", "removed.py", "LICENSE", "ignored.py"):
        (tmp_path / name).write_text("# What it is.\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("add", "tracked.py", "removed.py")
    (tmp_path / "removed.py").unlink()
    assert plain_english.main([]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == [f"{name}.py:1: 'What it is.'" for name in ("new", "tracked")]
    assert plain_english.main(["new.py"]) == 1
    assert capsys.readouterr().out == "new.py:1: 'What it is.'\n"
    assert plain_english.main([".gitignore"]) == 0
    assert capsys.readouterr().out == "plain English: 1 files\n"

"""A check of `make lint`: comments, docstrings, errors, pages and names of tests are plain English.

    plain_english.py [PATH ...]    prints `path:line: text` for each fault; status 1 if any

A sentence has a subject and a verb, so it does not begin with a clause that "who", "whose" or
"what" introduces. A metaphor or an archaic word gives way to the term of the field. The check finds
two signs: a sentence that begins with one of these three words and is no question, and a word of
`WORDS`. Text in backticks and in code blocks passes.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Patterns, and the plain words to use instead.
WORDS = {
    r"marr(y|ies|ied|iage)": "set_partner, pair",
    r"widow\w*": "orphaned token, lost_partner",
    r"look(s|ed|ing)?(?![ -]up)": "search, read, test; it seems",
    r"superfluous": "unneeded, beyond the length",
    r"who(so)?ever": "the caller, the owner, every ...",
    r"whatever": "any ..., every ...",
    r"but for": "except",
    r"no say": "does not depend on",
    r"of (its|their) own accord": "by itself",
    r"wants? (no|a|an|the|just|what)": "needs, expected",
    r"nothing but": "only",
    r"hence|thereby": "so",
    r"likewise": "also, in the same way",
    r"in the place of": "instead of",
    r"(is|are) to be": "must be, will be",
    r"content with": "accepts",
    r"hears?": "receives, notices",
    r"told": "given, reported",
    r"(no|any)body": "no token, any program",
}
_WORDS = re.compile(rf"\b(?:{'|'.join(f'(?:{word})' for word in WORDS)})\b", re.IGNORECASE)
# At the start of a paragraph, a sentence, a parenthesis or a cell of a table.
_NOUN = re.compile(
    r"(?:^|(?<=[.;:!?|] )|(?<=\())[\"'*\[]{0,2}(?:Who|Whose|What)\b.*?(?:[.?!](?=\W|$)|$)"
)
_CODE = re.compile(r"`[^`]+`")
_TEST = re.compile(r"^test_(?:what|who|whose)_")
_ITEM = re.compile(r"^(?:[-*|#]|\d+\.)\s")
# Generated, quoted or binary files, and licences.
_SKIPPED = re.compile(
    r"^(?:LICENSE|NOTICE|constraints/|benchmarks/results/|.*\.(?:json|png|pth|safetensors))"
)

# A comment or a line of text: its number, its column, whether code stands before it, its text.
Line = tuple[int, int, bool, str]
# The line on which a paragraph begins, and the paragraph on one line.
Paragraph = tuple[int, str]


def _paragraphs(lines: Iterable[Line]) -> Iterator[Paragraph]:
    """Join consecutive lines. An empty line, a list item and a comment after code end a paragraph.

    The lines below a comment after code continue it if they begin in its column.
    """
    start, words, last, place = 0, [], -1, 0
    for number, column, after_code, line in lines:
        follows = number == last + 1 and column == place and not after_code
        if words and not (follows and line and not _ITEM.match(line)):
            yield start, " ".join(words)
            words = []
        if line:
            start = start if words else number
            words.append(_ITEM.sub("", line))
        last, place = number, column
    if words:
        yield start, " ".join(words)


def _strings(node: ast.AST) -> str:
    values = [child.value for child in ast.walk(node) if isinstance(child, ast.Constant)]
    return " ".join(value for value in values if isinstance(value, str))


def _python(source: str) -> Iterator[Paragraph]:
    comments: list[Line] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            after_code = bool(token.line[:column].strip())
            comments.append((number, column, after_code, token.string.lstrip("# ")))
    yield from _paragraphs(comments)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _TEST.match(node.name):
            yield node.lineno, f"What: {node.name}"
        if isinstance(node, ast.Raise):
            yield node.lineno, _strings(node)
        if isinstance(node, ast.keyword) and node.arg in ("help", "description"):
            yield node.value.lineno, _strings(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                text = node.body[0].value  # type: ignore[attr-defined]
                lines = enumerate(text.value.split("\n"), text.lineno)
                yield from _paragraphs((n, 0, False, line.strip()) for n, line in lines)


def _commented(source: str, mark: str) -> Iterator[Paragraph]:
    lines: list[Line] = []
    for number, line in enumerate(source.split("\n"), 1):
        # Make hides a comment of a recipe behind @.
        if match := re.search(rf"(?:^|[\s@]){mark}+ ?(.*)", line):
            before = line[: match.start()].strip()
            lines.append((number, match.start(), bool(before), match[1].strip()))
    yield from _paragraphs(lines)


def _markdown(source: str) -> Iterator[Paragraph]:
    lines: list[Line] = []
    code = False
    for number, line in enumerate(source.split("\n"), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        text = "" if code or fence else line.strip(" >")
        # A column of its own keeps a heading apart from the text below.
        lines.append((number, line.startswith("#"), False, text))
    yield from _paragraphs(lines)


def texts(path: Path) -> Iterator[Paragraph]:
    """The paragraphs of a file that people read."""
    source = path.read_text(encoding="utf-8")
    if path.suffix in (".py", ".pyi"):
        return _python(source)
    if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
        return _commented(source, "//")
    if path.suffix == ".md":
        return _markdown(source)
    return _commented(source, "#")


def faults(text: str) -> list[str]:
    """The parts of a paragraph that are not plain English."""
    nouns = [match[0] for match in _NOUN.finditer(text) if not match[0].endswith("?")]
    words = [match[0] for match in _WORDS.finditer(_CODE.sub("`code`", text))]
    return [*(noun[:40] for noun in nouns), *words]


def main(arguments: list[str]) -> int:
    if not (ROOT / ".git").exists():
        print("plain English: not checked, because this is no git checkout")
        return 0
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    # A file that was removed is still listed until the commit.
    paths = [ROOT / name for name in listed if not _SKIPPED.match(name) and (ROOT / name).exists()]
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {fault!r}"
        for path in paths
        for number, text in texts(path)
        for fault in faults(text)
    ]
    print("\n".join(found) if found else f"plain English: {len(paths)} files")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

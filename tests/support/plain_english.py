"""A check of `make lint`: comments, docstrings, pages and names of tests are plain English.

    plain_english.py [PATH ...]    prints `path:line: text` for each fault; status 1 if any

A sentence has a subject and a verb, so it does not begin with a noun made of "who", "whose" or
"what". A term of the field stands where a metaphor could. The check sees two signs of the contrary:
a sentence that begins with one of these words and is no question, and a word of `WORDS`.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A word or phrase, and the plain one.
WORDS = {
    r"marr(y|ies|ied|iage)": "set_partner, pair",
    r"widow\w*": "orphaned token, lost_partner",
    r"look(s|ed|ing)?(?! up)": "search, read, test; it seems",
    r"superfluous": "unneeded, beyond the length",
    r"who(so)?ever": "the caller, the owner, every ...",
    r"whatever": "any ..., every ...",
    r"but for": "except",
    r"no say": "does not depend on",
    r"of (its|their) own accord": "by itself",
    r"wants? (no|a|an|the|just|what)": "needs",
    r"nothing but": "only",
}
_WORDS = re.compile(rf"\b(?:{'|'.join(f'(?:{word})' for word in WORDS)})\b", re.IGNORECASE)
_NOUN = re.compile(r"(?:^|(?<=[.;:!?] )|(?<=[.;:] \())(?:Who|Whose|What)\b[^.?!]*(?:[.?!]|$)")
_TEST = re.compile(r"^test_(?:what|who|whose)_")
# Generated, quoted or not ours.
_SKIPPED = re.compile(r"^(?:LICENSE|NOTICE|constraints/|benchmarks/results/|.*\.(?:json|png|pth|safetensors))")

# A line number and the text from there on, in one paragraph.
Text = tuple[int, str]


def _joined(lines: list[tuple[int, str]]) -> Iterator[Text]:
    """Consecutive lines as one paragraph; an empty one ends it."""
    start, words, last = 0, [], -1
    for number, line in lines:
        if words and (number != last + 1 or not line):
            yield start, " ".join(words)
            words = []
        if line:
            start = start if words else number
            words.append(line)
        last = number
    if words:
        yield start, " ".join(words)


def _python(source: str) -> Iterator[Text]:
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.append((token.start[0], token.string.lstrip("# ")))
    yield from _joined(comments)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and _TEST.match(node.name):
            yield node.lineno, f"What: {node.name}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                text = node.body[0].value  # type: ignore[attr-defined]
                lines = text.value.split("\n")
                numbers = range(text.lineno, text.lineno + len(lines))
                yield from _joined([(n, x.strip()) for n, x in zip(numbers, lines, strict=True)])


def _commented(source: str, mark: str) -> Iterator[Text]:
    found = []
    for number, line in enumerate(source.split("\n"), 1):
        if match := re.search(rf"(?:^|\s){mark}+ ?(.*)", line):
            found.append((number, match[1].strip()))
    yield from _joined(found)


def _markdown(source: str) -> Iterator[Text]:
    lines, code = [], False
    for number, line in enumerate(source.split("\n"), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        text = re.sub(r"^\s*(?:[-*|>]|\d+\.)\s+|[*`]", "", line).strip()
        item = re.match(r"^\s*(?:[-*|#]|\d+\.)\s", line)
        if item and lines:
            # A list item, a row or a heading is a paragraph.
            yield from _joined(lines)
            lines = []
        lines.append((number, "" if code or fence else text))
    yield from _joined(lines)


def texts(path: Path) -> Iterator[Text]:
    source = path.read_text(encoding="utf-8")
    if path.suffix in (".py", ".pyi"):
        return _python(source)
    if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
        return _commented(source, "//")
    if path.suffix == ".md":
        return _markdown(source)
    return _commented(source, "#")


def faults(text: str) -> list[str]:
    """The words of a paragraph that are not plain English."""
    nouns = [match[0] for match in _NOUN.finditer(text) if not match[0].endswith("?")]
    return [*(noun[:40] for noun in nouns), *(match[0] for match in _WORDS.finditer(text))]


def main(arguments: list[str]) -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    paths = [ROOT / name for name in listed if not _SKIPPED.match(name)]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {fault!r}"
        for path in paths
        if path.exists() and path != Path(__file__).resolve()
        for number, text in texts(path)
        for fault in faults(text)
    ]
    print("\n".join(found) if found else f"plain English: {len(paths)} files")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Wrap the Markdown documents at 100 columns: `make format` does it, `make check-repo` asks for it.

Only paragraphs and list items with a line that is too long are wrapped anew, so that a change stays a small diff.
Code, tables, headings, quotes and comments are left as they are, and so is a word that is too long by itself.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from repository import ROOT, documents, text_of

WIDTH = 100
_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
_LEFT_ALONE = re.compile(r"\s*(?:\||#|<!--|>|!\[|\[[^\]]+\]:|$)")
#: What would begin a list, a heading, a quote or a table if a line began with it.
_BEGINS_A_BLOCK = re.compile(r"\s*(?:[-*+]|\d+[.)]|#+|>|\|)(?:\s|$)")


def wrapped(text: str) -> str:
    """Return a document with no line of prose over 100 columns."""
    return "\n".join(_lines(text.split("\n")))


def _lines(lines: list[str]) -> Iterator[str]:
    paragraph: list[str] = []
    in_code = False
    for line in lines:
        fence = line.lstrip().startswith("```")
        if fence or in_code or _LEFT_ALONE.match(line):
            yield from _paragraph(paragraph)
            paragraph = []
            yield line
            in_code ^= fence
        elif _ITEM.match(line):
            yield from _paragraph(paragraph)
            paragraph = [line]
        else:
            paragraph.append(line)
    yield from _paragraph(paragraph)


def _paragraph(lines: list[str]) -> list[str]:
    """A paragraph, or an item of a list, wrapped if it has to be."""
    if all(len(line) <= WIDTH for line in lines):
        return lines
    item = _ITEM.match(lines[0])
    first = item[0] if item else re.match(r"\s*", lines[0])[0]  # type: ignore[index]  # always matches
    text = " ".join([lines[0][len(first) :].strip(), *(line.strip() for line in lines[1:])])
    # A code span stays on one line: tools look for paths and commands in it.
    text = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "\0"), text)
    for width in range(WIDTH, WIDTH // 2, -1):
        new = textwrap.wrap(
            text,
            width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        if not any(_BEGINS_A_BLOCK.match(line) for line in new[1:]):
            return [line.replace("\0", " ") for line in new]
    return lines


def main() -> None:
    """Wrap every document."""
    for name in documents():
        if (new := wrapped(text_of(name))) != text_of(name):
            (ROOT / name).write_text(new)
            print(f"wrapped {name}")


if __name__ == "__main__":
    main()

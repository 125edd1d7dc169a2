"""How much code each room of the repository has, and what else makes it heavy, held against bounds in scripts/size.toml.

    python scripts/size.py                 show counts and bounds
    python scripts/size.py --check         fail if a count is over its bound, or a bound much over its count
    python scripts/size.py --update        lower the bounds to the counts
    python scripts/size.py --raise ROOM    set the bound of this room to its count, though it is higher, or new
    python scripts/size.py --since COMMIT  show what has changed since a commit

A room is a folder of a package, or all that is under a folder at the top. Python counts by statements; a string that
stands alone, such as a docstring, is none. Other code counts by lines that are neither blank nor comment, and so does Lua
in strings of Python. Generated code does not count. Text that is no code, under client/ and server/, has a bound of its
own: what moves there has not become less. Words that a reader has to decode count in the product's code and in the
documents, which include the comments of proto/.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath

import repository

BOUNDS = "scripts/size.toml"
HEADING = """\
# Bounds of scripts/size.py, which `make check` holds the code against. A room's bound rises only with a feature that
# needs it (scripts/size.py --raise ROOM), and the commit says by how much. The other counts only fall
# (scripts/size.py --update).
"""
#: Code by the suffix of its file. What is not here is text.
CODE = {
    ".py",
    ".rs",
    ".ts",
    ".tsx",
    ".js",
    ".jsx",
    ".mjs",
    ".cjs",
    ".lua",
    ".sh",
    ".c",
    ".cc",
    ".cpp",
    ".h",
    ".go",
}
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$|/console/dist/|/rpc/http/comments\.json$")
#: The mode of a file that is no link, as Git has it.
REGULAR = "100"
COMMENTS = ("//", "--", "#!")
PRODUCT = ("client", "server")
BESIDE_PRODUCT = ("tests", "bench", "examples")
MAX_MODULES, MAX_ARGUMENTS, MAX_LINES = 15, 8, 800
#: A bound may be over its count by this share, or by a few.
SLACK, MIN_SLACK = 0.02, 10
#: What a reader has to decode, for which CONTRIBUTING.md has plain words.
WORDS = re.compile(
    r"\b_?MOST_|_LEAST_|_AGAIN_S\b|_AT_ONCE\b|\btold\b(?! (?:apart|from|to)\b)|\bas mostly\b|\bbe it\b"
    r"|\bso (many|long) (at|as|it|may|after)\b"
    r"|\bgoes on\b|(?<!\bunder )\bway on\b|\bwhat is none\b|\bof those that\b|\bis anew\b|\bbut for\b"
)
#: The documents whose words count. Generated ones quote code whose words count already.
DOCUMENTS = re.compile(
    r"(?:README|CONTRIBUTING|ARCHITECTURE|CHANGELOG|SECURITY)\.md|docs/.+\.md|proto/(?:stepwell|inference)/.+\.proto"
)
GENERATED_DOCUMENTS = re.compile(r"docs/(?:surface/|reference/cli\.md)")
#: The table of plain words, which quotes the others.
GLOSSARY = re.compile(r"^\| instead of \|.*?(?:\n\n|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE)
#: The end of a line and what marks the next one as part of the same comment or quotation.
LINE_BREAK = re.compile(r"\s*\n\s*(?:(?:#:?|//[/!]?|--|>)\s+)?")
#: Questions about the kind of store.
STORE = re.compile(r"\bis_local\b|\bis_shared\b|\banswers_now\b|\.local is (?:not )?None")

Files = Mapping[str, str]
"""The text of each file, by its name."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What was counted, or the bounds of it."""

    rooms: Mapping[str, int]
    counts: Mapping[str, int]

    @property
    def product(self) -> int:
        """All rooms but those of tests, benchmarks and examples."""
        return sum(count for room, count in self.rooms.items() if room.split("/")[0] not in BESIDE_PRODUCT)

    @property
    def tests(self) -> int:
        """The rooms of tests, benchmarks and examples."""
        return sum(self.rooms.values()) - self.product


def main(arguments: Sequence[str] | None = None) -> int:
    """Show, check or change."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a count and its bound do not fit")
    parser.add_argument("--update", action="store_true", help="lower the bounds to the counts")
    parser.add_argument(
        "--raise", dest="raised", metavar="ROOM", action="append", default=[], help="see above"
    )
    parser.add_argument("--since", metavar="COMMIT", help="show what has changed since then")
    options = parser.parse_args(arguments)
    size = size_of(files_now())
    if options.since:
        print_sizes(size_of(files_at(options.since)), size)
        return 0
    bounds = read_bounds()
    if unknown := sorted(set(options.raised) - size.rooms.keys()):
        parser.error(
            f"--raise: must be a room that has code, one of {', '.join(sorted(size.rooms))}; got {unknown[0]}"
        )
    if options.update or options.raised:
        bounds = lowered(bounds, size, options.raised) if bounds else size
        (repository.ROOT / BOUNDS).write_text(text_of_bounds(bounds), encoding="utf-8")
    bounds = bounds or Size({}, {})
    found = findings(bounds, size)
    if not options.check:
        print_sizes(bounds, size)
    for line in found:
        print(line)
    return 1 if found else 0


def files_now() -> Files:
    """The files of the working tree; a link is none, its target counts."""
    names = [name for name in repository.tracked_files() if not (repository.ROOT / name).is_symlink()]
    return {name: repository.text_of(name) for name in names if counts_at_all(name)}


def files_at(commit: str) -> Files:
    """The files of a commit."""
    git = ["git", "-C", str(repository.ROOT)]
    listed = subprocess.run(
        [*git, "ls-tree", "-r", "-z", commit], capture_output=True, check=True
    ).stdout.decode()
    entries = [entry.split("\t", 1) for entry in listed.split("\0") if entry]
    names = [name for facts, name in entries if facts.startswith(REGULAR) and counts_at_all(name)]
    asked = "".join(f"{commit}:{name}\n" for name in names).encode()
    answer = subprocess.run(
        [*git, "cat-file", "--batch"], input=asked, capture_output=True, check=True
    ).stdout
    files, place = {}, 0
    for name in names:
        end = answer.index(b"\n", place)
        length = int(answer[place:end].rsplit(b" ", 1)[1])
        files[name] = answer[end + 1 : end + 1 + length].decode(errors="replace")
        place = end + 1 + length + 1
    return files


def counts_at_all(name: str) -> bool:
    """Whether a file is code, a document, or other text of the product, that people wrote."""
    is_code = PurePath(name).suffix in CODE
    return not GENERATED.search(f"/{name}") and (
        is_code or is_document(name) or name.startswith(tuple(f"{top}/" for top in PRODUCT))
    )


def is_document(name: str) -> bool:
    """Whether the words of a file count as those of a document."""
    return bool(DOCUMENTS.fullmatch(name)) and not GENERATED_DOCUMENTS.match(name)


def words_to_decode(text: str) -> int:
    """The places in a text that a reader has to decode, also those that a line break divides."""
    return sum(1 for _ in WORDS.finditer(LINE_BREAK.sub(" ", GLOSSARY.sub("", text))))


def size_of(files: Files) -> Size:
    """Count all there is."""
    rooms: collections.Counter[str] = collections.Counter()
    folders: collections.Counter[str] = collections.Counter()
    counts = dict.fromkeys(
        (
            "files_over_800_lines",
            "folders_over_15_modules",
            "constructors_over_8_arguments",
            "words_to_decode",
            "words_to_decode_in_documents",
            "questions_about_the_kind_of_store",
            "lines_of_other_text",
        ),
        0,
    )
    for name, text in files.items():
        path = PurePath(name)
        if is_document(name):
            counts["words_to_decode_in_documents"] += words_to_decode(text)
            continue
        if path.suffix not in CODE:
            counts["lines_of_other_text"] += sum(bool(line.strip()) for line in text.splitlines())
            continue
        tree = ast.parse(text) if path.suffix == ".py" else None
        rooms[room_of(path)] += lines(text) if tree is None else statements(tree)
        counts["files_over_800_lines"] += len(text.splitlines()) > MAX_LINES
        if path.parts[0] in PRODUCT:
            folders[str(path.parent)] += 1
            counts["words_to_decode"] += words_to_decode(text)
            counts["questions_about_the_kind_of_store"] += len(STORE.findall(text))
            if tree is not None:
                counts["constructors_over_8_arguments"] += sum(1 for _ in wide_constructors(tree))
    counts["folders_over_15_modules"] = sum(count > MAX_MODULES for count in folders.values())
    return Size({room: count for room, count in sorted(rooms.items()) if count}, counts)


def room_of(path: PurePath) -> str:
    """The room of a file: of the packages their folders, else the folder at the top."""
    if path.parts[0] in PRODUCT:
        return "/".join(path.parts[:-1][:3])
    return path.parts[0]


def statements(tree: ast.Module) -> int:
    """The statements of a Python module but docstrings, and the lines of Lua in its strings."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            count += not (isinstance(node, ast.Expr) and is_string(node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "redis.call" in node.value:
            count += sum(bool(line.strip()) for line in node.value.splitlines())
    return count


def is_string(node: ast.expr) -> bool:
    """Whether an expression is a string and no more."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def lines(text: str) -> int:
    """The lines of code in other languages that are neither blank nor comment."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return sum(bool(line.strip()) and not line.strip().startswith(COMMENTS) for line in text.splitlines())


def wide_constructors(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The constructors that take more arguments than a reader can keep apart."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len(arguments) - 1 > MAX_ARGUMENTS:
                yield node


def read_bounds() -> Size | None:
    """The bounds, if there are any."""
    path = repository.ROOT / BOUNDS
    if not path.exists():
        return None
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return Size(table["rooms"], table["counts"])


def text_of_bounds(bounds: Size) -> str:
    """The file of the bounds."""
    rooms = "".join(f'"{room}" = {count}\n' for room, count in sorted(bounds.rooms.items()))
    counts = "".join(f"{name} = {count}\n" for name, count in sorted(bounds.counts.items()))
    return f"{HEADING}\n[rooms]\n{rooms}\n[counts]\n{counts}"


def lowered(bounds: Size, size: Size, raised: Iterable[str]) -> Size:
    """The bounds without slack, and without rooms that are gone; some rooms have their count whatever it is."""
    rooms = {room: min(bound, size.rooms[room]) for room, bound in bounds.rooms.items() if room in size.rooms}
    rooms |= {room: size.rooms[room] for room in raised}
    return Size(
        rooms, {name: min(bounds.counts.get(name, count), count) for name, count in size.counts.items()}
    )


def findings(bounds: Size, size: Size) -> list[str]:
    """Where counts and bounds do not fit, a line each."""
    found = []
    for room, count in size.rooms.items():
        if room not in bounds.rooms:
            found.append(f"{room}: has no line in {BOUNDS}: add it with --raise {room}")
        elif count > bounds.rooms[room]:
            over = count - bounds.rooms[room]
            found.append(
                f"{room}: {count}, at most {bounds.rooms[room]} (+{over}): remove some; or, if a feature of"
                f" this room needs it, use --raise {room} and say in the commit why and by how much"
            )
        elif bounds.rooms[room] > count + slack_of(count, MIN_SLACK):
            found.append(f"{room}: {count}, the bound is {bounds.rooms[room]}: lower it with --update")
    found += [
        f"{room}: has a line in {BOUNDS} and no code: run --update"
        for room in bounds.rooms.keys() - size.rooms
    ]
    for name, count in size.counts.items():
        bound = bounds.counts.get(name)
        if bound is None:
            found.append(f"{name}: has no line in {BOUNDS}: run --update")
        elif count > bound:
            found.append(f"{name}: {count}, at most {bound}, which may only fall")
        elif bound > count + slack_of(count, 0):
            found.append(f"{name}: {count}, the bound is {bound}: lower it with --update")
    return found


def slack_of(count: int, least: int) -> int:
    """How far a bound may be over its count."""
    return max(least, math.floor(count * SLACK))


def print_sizes(before: Size, size: Size) -> None:
    """Bounds, or what was, beside what is."""
    rows = [
        *(
            (room, before.rooms.get(room, 0), size.rooms.get(room, 0))
            for room in sorted({*before.rooms, *size.rooms})
        ),
        ("product", before.product, size.product),
        ("tests, benchmarks and examples", before.tests, size.tests),
        *((name, before.counts.get(name, 0), count) for name, count in sorted(size.counts.items())),
    ]
    for name, old, new in rows:
        change = f"{new - old:+,}" if new != old else ""
        print(f"{old:9,} {new:9,} {change:>8}  {name}")


if __name__ == "__main__":
    sys.exit(main())

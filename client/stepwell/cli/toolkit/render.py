"""Tables for people, JSON for programs.

On a terminal, tables have colours and fit its width; NO_COLOR turns off the colours. In a pipe or a file they are
plain: columns separated by spaces, one line per row, nothing cut off. Long tables are plain on a terminal too,
because rich would take minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.table import Table

    from stepwell import TensorInfo

PLAIN_WIDTH = 100_000
"""Width of a plain table, in columns, large enough that nothing is cut off or wrapped."""
MAX_RICH_ROWS = 500
"""Rows of a table that is fitted to a terminal; longer ones are plain."""
MAX_PADDED_WIDTH = 48
"""Width up to which a cell of a plain table widens its column; a wider cell only shifts its own row."""


def print_json(document: object) -> None:
    """Print a JSON document on one line."""
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows under headings; the columns named in `right` are right-aligned."""
    if sys.stdout.isatty() and len(rows) <= MAX_RICH_ROWS:
        print_rich(filled_table(headings, rows, right))
    else:
        print_plain(headings, rows, right)


def print_plain(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    widths: Sequence[int] = (),
) -> list[int]:
    """Print rows as lines of aligned text, fast enough for hundreds of thousands of them.

    Args:
        headings: Headings of the columns; printed unless `widths` are given.
        rows: Their cells.
        right: Headings of the right-aligned columns.
        widths: Widths of the columns; empty: as wide as their cells.

    Returns:
        The widths of the columns.
    """
    from rich.cells import cell_len

    lines = [[*headings]] if not widths else []
    lines += [[cell_text(cell, plain=True) for cell in row] for row in rows]
    columns, found = [], []
    for place, (heading, cells) in enumerate(zip(headings, zip(*lines, strict=True), strict=True)):
        lengths = [len(cell) if cell.isascii() else cell_len(cell) for cell in cells]
        wide = max((length for length in lengths if length <= MAX_PADDED_WIDTH), default=0)
        width = widths[place] if widths else wide
        found.append(width)
        pads = (" " * max(0, width - length) for length in lengths)
        padded = zip(cells, pads, strict=True)
        columns.append([pad + cell if heading in right else cell + pad for cell, pad in padded])
    texts = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    for start in range(0, len(texts), MAX_RICH_ROWS):
        click.echo("\n".join(texts[start : start + MAX_RICH_ROWS]))
    return found


def print_rows(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> bool:
    """Print rows as they arrive, under headings. Returns whether there were any.

    Up to `MAX_RICH_ROWS` rows are a table; further ones follow as plain lines, in the columns of the first.
    """
    coming = iter(rows)
    first = list(itertools.islice(coming, MAX_RICH_ROWS + 1))
    if len(first) <= MAX_RICH_ROWS:
        if first:
            print_table(headings, first, right)
        return bool(first)
    widths = print_plain(headings, first, right)
    while some := list(itertools.islice(coming, MAX_RICH_ROWS)):
        print_plain(headings, some, right, widths)
    return True


def short_text(text: str) -> str:
    """Replaces the middle of a long text by ... on a terminal; in a pipe the text stays whole."""
    if len(text) <= MAX_PADDED_WIDTH or not sys.stdout.isatty():
        return text
    kept = MAX_PADDED_WIDTH - 3
    return f"{text[: kept - kept // 3]}...{text[-(kept // 3) :]}"


def print_records(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows as a table, or each row as a block of facts if the terminal is too narrow."""
    table, console = filled_table(headings, rows, right), new_console()
    if console.measure(table).maximum < console.width:
        print_rich(table)
        return
    for number, row in enumerate(rows):
        if number:
            click.echo()
        print_facts([(heading.lower(), cell) for heading, cell in zip(headings, row, strict=True)])


def filled_table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> Table:
    """A table of rows under headings."""
    plain = not sys.stdout.isatty()
    table = new_table(plain)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell_text(cell, plain) for cell in row))
    return table


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names with values, one pair per line."""
    plain = not sys.stdout.isatty()
    table = new_table(plain=True, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, cell_text(value, plain))
    print_rich(table)


def new_table(plain: bool, show_header: bool = True) -> Table:
    """An empty table: with a rule under its headings on a terminal, otherwise plain."""
    from rich import box
    from rich.table import Table

    frame = None if plain else box.SIMPLE_HEAD
    return Table(
        box=frame, show_header=show_header, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0)
    )


def cell_text(cell: str, plain: bool) -> str:
    """A cell as it is printed: in a plain table on one line, and always without control characters."""
    lines = cell.splitlines()
    if not all(map(str.isprintable, lines)):
        lines = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines]
    return ("; " if plain else "\n").join(lines)


def print_rich(table: Table) -> None:
    """Print a table through click, so that a broken pipe is handled where all of them are."""
    console = new_console()
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    click.echo("\n".join(line.rstrip() for line in lines), color=True)


def new_console() -> Console:
    """A console on stdout that prints text as it is: no markup, no guessed colours."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something is running, if a person is watching.

    The body must not print: while it runs, rich takes what goes to stdout to stderr.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True, markup=False).status(what):
        yield


def rounded_size(size: int) -> str:
    """A number of bytes, rounded: `67.4 GB`."""
    from rich.filesize import decimal

    return decimal(size)


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many are done, if a person is watching; the body tells it, and must not print."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich.console import Console

    with Console(stderr=True, markup=False).status(what) as status:
        yield lambda done: status.update(f"{what}: {done:,}")


@contextlib.contextmanager
def stages(what: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is done now, and which stages have ended after how long, if a person is watching.

    The body tells it, and must not print.
    """
    if not sys.stderr.isatty():
        yield lambda _stage: None
        return
    import time

    from rich.console import Console

    console = Console(stderr=True, markup=False)
    began, now = time.monotonic(), ""
    with console.status(what) as status:

        def show(stage: str) -> None:
            nonlocal began, now
            ended = time.monotonic()
            if now and stage != now:
                console.print(f"  {now}: {ended - began:.1f} s")
            if stage != now:
                began, now = ended, stage
            status.update(f"{what}: {stage}")

        yield show


def shape_text(spec: TensorInfo) -> str:
    """A tensor of a model with the axes that calls give it: `x float32 (B, T, 3)`."""
    axes = ["B", *(["T"] if spec.temporal else []), *map(str, spec.shape)]
    return f"{spec.name} {spec.dtype} ({', '.join(axes)})"


def array_shape(array: NDArray[Any]) -> str:
    """An array's shape: `(1, 3)`, `(1)`."""
    return f"({', '.join(map(str, array.shape))})"


def array_text(array: NDArray[Any]) -> str:
    """An array for people: abbreviated on a terminal, whole into a pipe."""
    import numpy as np

    threshold = 200 if sys.stdout.isatty() else sys.maxsize
    return np.array2string(array, threshold=threshold, precision=6, suppress_small=True, separator=", ")


def array_json(array: NDArray[Any]) -> dict[str, object]:
    """An array for programs: dtype, shape and nested lists; what JSON has no number for becomes a string."""
    return {"dtype": str(array.dtype), "shape": list(array.shape), "values": json_values(array)}


def json_values(array: NDArray[Any]) -> object:
    """Nested lists of the array's numbers, with "NaN", "Infinity" and "-Infinity" as protobuf's JSON has them."""
    import numpy as np

    if array.dtype.kind in "biu":
        return array.tolist()
    numbers = array.astype(np.float64)
    if np.isfinite(numbers).all():
        return numbers.tolist()
    words = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return np.frompyfunc(lambda x: words.get(str(float(x)), float(x)), 1, 1)(numbers).tolist()


def summary_cells(array: NDArray[Any]) -> tuple[str, str, str, str]:
    """Smallest, mean and largest value, and how many are zero."""
    import numpy as np

    numbers: NDArray[np.float64] = array.astype(np.float64)
    if not numbers.size:
        return "", "", "", ""
    zeros = int(numbers.size - np.count_nonzero(numbers))
    return (
        f"{numbers.min():.6g}",
        f"{numbers.mean():.6g}",
        f"{numbers.max():.6g}",
        f"{zeros} of {numbers.size}",
    )


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: `8 s`, `3 min 12 s`, `2 h 5 min`, `4 d 1 h`."""
    left = max(0, int(seconds))
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        parts.append((count, unit))
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    shown = [f"{count} {unit}" for count, unit in parts[first : first + 2] if count]
    return " ".join(shown) or "0 s"

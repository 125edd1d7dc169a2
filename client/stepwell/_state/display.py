"""How values look in a terminal and in a notebook: short text, and HTML of bounded length.

Nothing here asks a server. All text from outside is escaped.
"""

from __future__ import annotations

import base64
import html
import itertools
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, TypeVar, overload

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_NAMED = 8
"""Items that a line of text names."""
_LINES = 10
"""Elements that the text of a list shows."""
_TABLE_ROWS = 50
"""Rows of a table in HTML."""
_CELL = 80
"""Characters of a cell."""
_STRIP = (4, 64)
"""Rows and columns of the picture of a tensor."""
_FINGERPRINT_DIGITS = 12


def short(fingerprint: str) -> str:
    """A fingerprint shortened for people."""
    return fingerprint[:_FINGERPRINT_DIGITS]


def some(parts: Iterable[str]) -> str:
    """The first parts of a list, separated by commas, and the number of the others."""
    parts = list(parts)
    more = [f"... {len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
    return ", ".join([*(_clipped(part) for part in parts[:_NAMED]), *more])


def _clipped(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."


def _escaped(value: object) -> str:
    return html.escape(_clipped(str(value)))


class Shown(Protocol):
    """A value that can be a row of a table."""

    def _headings(self) -> Sequence[str]: ...
    def _cells(self) -> Sequence[object]: ...


S = TypeVar("S", bound=Shown)


class Listing(list[S]):
    """A list that a notebook shows as a table. Equal to a plain list with the same items."""

    __slots__ = ()

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> S: ...
    @overload
    def __getitem__(self, index: slice, /) -> Listing[S]: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> S | Listing[S]:
        return Listing(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def __repr__(self) -> str:
        lines = [f" {item!r}" for item in itertools.islice(self, _LINES)]
        more = [f" ... {len(self) - _LINES} more"] if len(self) > _LINES else []
        return "[" + ",\n".join([*lines, *more]).lstrip() + "]"

    def _repr_html_(self) -> str:
        if not self:
            return "<p>none</p>"
        rows = [item._cells() for item in itertools.islice(self, _TABLE_ROWS)]
        return table_html("", self[0]._headings(), rows, more=len(self) - len(rows))


def table_html(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[object]], *, more: int = 0, last: str = ""
) -> str:
    """A table.

    Args:
        title: Text above it; empty for none.
        headings: One for each column; empty for none.
        rows: Their cells, as text; `Html` is not escaped.
        more: Number of further rows.
        last: What to call them.
    """
    lines = [f"<p><b>{_escaped(title)}</b></p>" if title else "", "<table>"]
    if headings:
        lines.append(
            "<thead><tr>" + "".join(f"<th>{_escaped(one)}</th>" for one in headings) + "</tr></thead>"
        )
    lines.append("<tbody>")
    for row in rows:
        cells = (cell if isinstance(cell, Html) else _escaped(cell) for cell in row)
        lines.append("<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>")
    lines.append("</tbody></table>")
    if more > 0:
        lines.append(f"<p>... {more} more{_escaped(last)}</p>")
    return "\n".join(line for line in lines if line)


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """Names with values, one pair a line."""
    return table_html(title, (), facts.items())


def handle_html(kind: str, facts: Mapping[str, object], *, is_closed: bool) -> str:
    """A client, session or group, as of the last answer to it."""
    return facts_html(f"{kind} (closed)" if is_closed else kind, facts)


def span(numbers: npt.NDArray[Any]) -> str:
    """One number if all are alike, else the least and the greatest."""
    if not numbers.size:
        return ""
    least, greatest = numbers.min(), numbers.max()
    return f"{least}" if least == greatest else f"{least} to {greatest}"


def tensors_html(title: str, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """A table of tensors, with what their values are like."""
    shown = itertools.islice(tensors.items(), _TABLE_ROWS // 2)
    rows = [(name, array.shape, array.dtype, *_range(array), _strip(array)) for name, array in shown]
    headings = ("tensor", "shape", "dtype", "min", "max", "values")
    return table_html(title, headings, rows, more=len(tensors) - len(rows), last=" tensors")


def _range(array: npt.NDArray[Any]) -> tuple[str, str]:
    if not array.size:
        return "", ""
    return f"{array.min():.4g}", f"{array.max():.4g}"


def _strip(array: npt.NDArray[Any]) -> Html:
    """The first rows of a tensor as a small picture: blue below zero, white at zero, red above; grey is no number."""
    import numpy as np

    if not array.size:
        return Html()
    rows, columns = _STRIP
    values = array.reshape(len(array), -1)[:rows]
    if values.shape[1] > columns:
        values = values[:, np.linspace(0, values.shape[1] - 1, columns).astype(int)]
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    scale = np.abs(values[finite]).max(initial=0.0) or 1.0
    shares = np.where(np.isnan(values), 0.0, np.clip(values / scale, -1.0, 1.0))
    pale = np.round(255 * (1 - np.abs(shares)))
    full = np.full_like(pale, 255)
    pixels = np.stack([np.where(shares < 0, pale, full), pale, np.where(shares > 0, pale, full)], axis=-1)
    pixels[np.isnan(values)] = 128
    picture = base64.b64encode(_png(pixels.astype(np.uint8))).decode()
    height, width = 10 * pixels.shape[0], max(10, 3 * pixels.shape[1])
    return Html(
        f"<img alt='values' src='data:image/png;base64,{picture}' width='{width}' height='{height}' "
        "style='image-rendering:pixelated'>"
    )


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file of (height, width, 3) pixels."""
    height, width, _ = pixels.shape
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels)),
        b"IEND": b"",
    }
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

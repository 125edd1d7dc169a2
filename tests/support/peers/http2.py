"""A client that speaks HTTP/2 frame by frame, to do what no gRPC library does: half a handshake, floods, no reading.

It checks nothing and keeps no rules: no limits of the server, and flow control only in `upload`. Loopback only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import hpack
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from support import secured

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LARGEST_WINDOW = (1 << 31) - 1
TIMEOUT_S = 100.0
"""Only a hang reaches it."""
Headers = Sequence[tuple[str, str]]


def framed(message: bytes) -> bytes:
    """A gRPC message as it stands in the data of a call."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def data(stream: int, payload: bytes, *, end: bool = False) -> bytes:
    """A DATA frame."""
    frame = DataFrame(stream, payload)
    if end:
        frame.flags.add("END_STREAM")
    return frame.serialize()


def reset(stream: int) -> bytes:
    """RST_STREAM with CANCEL."""
    return RstStreamFrame(stream, error_code=8).serialize()


def raw_frame(kind: int, flags: int, stream: int, payload: bytes, *, of: int | None = None) -> bytes:
    """Any frame; `of`: the bytes that its head promises, of which the payload is a part."""
    size = len(payload) if of is None else of
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def headers(stream: int, block: bytes, *, end: bool = False) -> bytes:
    """A HEADERS frame with a whole block."""
    return raw_frame(1, 4 | end, stream, block)


def ping() -> bytes:
    return PingFrame(opaque_data=b"01234567").serialize()


def settings(values: Mapping[int, int] | None = None) -> bytes:
    return SettingsFrame(settings=dict(values or {})).serialize()


class Gone(Exception):
    """The server has closed the connection."""


class Http2:
    """One connection. Nothing is read until the test asks for it."""

    def __init__(self, address: str, *, window: int = LARGEST_WINDOW, receive_buffer: int = 0) -> None:
        """Connect, and send the preface.

        Args:
            address: Host and port of the server.
            window: What the server may send, per stream and in all, before it must wait; nothing renews it.
            receive_buffer: Bytes that the kernel keeps of what is not read; 0: as many as it likes.
        """
        self.socket = secured.connected(address, receive_buffer)
        self.socket.settimeout(TIMEOUT_S)
        self._authority = secured.host_and_port(address)
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._next_stream = 1
        self._buffer = b""
        self._kept: list[Frame] = []
        """Frames that `upload` has read."""
        self._room: dict[int, int] = {0: 65_535}
        """What the server takes, in all and of each stream, as far as it was said since `upload` began to look."""
        self._stream_room = 65_535
        hello = PREFACE + settings({SettingsFrame.INITIAL_WINDOW_SIZE: window})
        if window > 65_535:
            hello += WindowUpdateFrame(0, window_increment=window - 65_535).serialize()
        self.send(hello)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        """Send bytes; waits while the server does not take them.

        Raises:
            Gone: the server has closed the connection.
        """
        try:
            self.socket.sendall(b"".join(parts))
        except OSError as error:
            raise Gone from error

    def next_stream(self) -> int:
        """The number of a new stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        return stream

    def begin(self, path: str, extra: Headers = (), *, end: bool = False) -> tuple[int, bytes]:
        """The number of a new stream and the frame that begins it."""
        stream = self.next_stream()
        frame = HeadersFrame(stream, self.block(path, extra))
        frame.flags.add("END_HEADERS")
        if end:
            frame.flags.add("END_STREAM")
        return stream, frame.serialize()

    def block(self, path: str, extra: Headers = ()) -> bytes:
        """The headers of a gRPC call, encoded. Extra ones replace those of the same name."""
        known = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": self._authority,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        known |= {name: value for name, value in extra if name in known}
        more = [(name, value) for name, value in extra if name not in known]
        block: bytes = self._encoder.encode([*known.items(), *more], huffman=False)
        return block

    def call(self, path: str, *messages: bytes, extra: Headers = (), end: bool = True) -> int:
        """Begin a call and send its messages. Returns the stream."""
        stream, begun = self.begin(path, extra)
        body = b"".join(framed(message) for message in messages)
        self.send(begun, data(stream, body, end=end))
        return stream

    def upload(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """Send data as the server makes room for it; less of it if the stream ends before.

        Raises:
            Gone: the server has closed the connection.
        """
        sent = 0
        while sent < len(body):
            own = self._room.setdefault(stream, 0) + self._stream_room
            room = min(self._room[0], own, 16_384)
            if room <= 0:
                frame = self._read_frame()
                self._kept.append(frame)
                if frame.stream_id == stream and (
                    "END_STREAM" in frame.flags or isinstance(frame, RstStreamFrame)
                ):
                    return
                continue
            piece = body[sent : sent + room]
            sent += len(piece)
            for each in (0, stream):
                self._room[each] -= len(piece)
            self.send(data(stream, piece, end=end and sent == len(body)))

    def frame(self) -> Frame:
        """The next frame of the server; SETTINGS are acknowledged, pings answered.

        Raises:
            Gone: it has closed the connection.
        """
        return self._kept.pop(0) if self._kept else self._read_frame()

    def _read_frame(self) -> Frame:
        head = self._exactly(9)
        found, length = Frame.parse_frame_header(memoryview(head))
        found.parse_body(memoryview(self._exactly(length)))
        if isinstance(found, WindowUpdateFrame):
            self._room[found.stream_id] = self._room.get(found.stream_id, 0) + found.window_increment
        elif isinstance(found, SettingsFrame):
            self._stream_room = found.settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, self._stream_room)
        with contextlib.suppress(Gone):
            if isinstance(found, SettingsFrame) and "ACK" not in found.flags:
                self.send(SettingsFrame(flags=["ACK"]).serialize())
            elif isinstance(found, PingFrame) and "ACK" not in found.flags:
                self.send(PingFrame(opaque_data=found.opaque_data, flags=["ACK"]).serialize())
        return found

    def frames(self) -> Iterable[Frame]:
        """All bytes from the server until it closes the connection."""
        with contextlib.suppress(Gone):
            while True:
                yield self.frame()

    def outcome(self, stream: int) -> dict[str, str]:
        """The headers and trailers of a stream that has ended; `rst` is the code it was reset with.

        Raises:
            Gone: the server has closed the connection before.
        """
        found: dict[str, str] = {}
        while True:
            frame = self.frame()
            if isinstance(frame, HeadersFrame):
                fields = self._decoder.decode(frame.data)  # of any stream: it has a state
                if frame.stream_id == stream:
                    found |= {str(name): str(value) for name, value in fields}
            if frame.stream_id != stream:
                continue
            if isinstance(frame, RstStreamFrame):
                return found | {"rst": str(frame.error_code)}
            if "END_STREAM" in frame.flags:
                return found

    def goodbye(self) -> tuple[int, bytes]:
        """Code and text of the GOAWAY with which the server closes the connection; (-1, b"") if it sends none."""
        said = (-1, b"")
        for frame in self.frames():
            if isinstance(frame, GoAwayFrame):
                said = frame.error_code, frame.additional_data
        return said

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                more = self.socket.recv(65_536)
            except TimeoutError:
                raise
            except OSError as error:
                raise Gone from error
            if not more:
                raise Gone
            self._buffer += more
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

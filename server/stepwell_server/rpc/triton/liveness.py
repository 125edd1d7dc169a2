"""ServerLive and ServerReady, which are answered before there is an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepwell_server.rpc.triton.inference import service_pb2 as pb

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call


class Liveness:
    """Whether the server lives and is ready, as Triton's clients ask for it. Lives on the event loop."""

    def __init__(self) -> None:
        self._is_ready = self._is_stopping = False

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self._is_ready and not self._is_stopping

    def announce_ready(self, *, is_ready: bool) -> None:
        """Say from now on whether the server is ready, unless it stops."""
        self._is_ready = is_ready

    def announce_stop(self) -> None:
        """Say from now on that the server is not ready."""
        self._is_stopping = True

    async def server_live(self, _request: pb.ServerLiveRequest, _call: Call) -> pb.ServerLiveResponse:
        """Whether the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _request: pb.ServerReadyRequest, _call: Call) -> pb.ServerReadyResponse:
        """Whether requests are taken."""
        return pb.ServerReadyResponse(ready=self.is_ready)

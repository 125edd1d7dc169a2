"""Shell completion of models and sessions of the server.

The server is that of the command line so far, or of its variables. It is asked once and has a short time. Without an
answer there are no suggestions and no message.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from stepwell.cli.toolkit.target import Target

if TYPE_CHECKING:
    import grpc

    from stepwell._base.metadata import Pairs
    from stepwell.v1 import models_pb2

TIMEOUT_S = 1.0
"""Time limit of the server, because somebody waits for the completion."""
MAX_SESSIONS = 100
"""Sessions to request; nobody chooses from more."""


def models(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models of the server whose names start with the text."""
    return of_models(ctx, incomplete, lambda model: [model.name])


def references(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models of the server, and after a name and an @ or a colon its versions or labels."""

    def names(model: models_pb2.Model) -> Iterable[str]:
        yield model.name
        for version in model.versions:
            if "@" in incomplete:
                yield f"{model.name}@{version.version}"
            elif ":" in incomplete:
                yield from (f"{model.name}:{label}" for label in version.labels)

    return of_models(ctx, incomplete, names)


def of_models(
    ctx: click.Context, incomplete: str, names: Callable[[models_pb2.Model], Iterable[str]]
) -> list[CompletionItem]:
    """The names of the server's models that start with the text."""
    from stepwell.v1 import models_pb2, models_pb2_grpc

    def found(channel: grpc.Channel, metadata: Pairs | None) -> Iterable[str]:
        list_models = models_pb2_grpc.ModelServiceStub(channel).ListModels
        reply = list_models(models_pb2.ListModelsRequest(), timeout=TIMEOUT_S, metadata=metadata)
        return [name for model in reply.models for name in names(model) if name.startswith(incomplete)]

    return answered(ctx, found)


def sessions(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The first sessions of the server whose ids start with the text."""
    from stepwell.v1 import sessions_pb2, sessions_pb2_grpc

    def ids(channel: grpc.Channel, metadata: Pairs | None) -> Iterable[str]:
        request = sessions_pb2.ListSessionsRequest(
            session_id_prefix=incomplete, page_size=MAX_SESSIONS, skip_total=True
        )
        list_sessions = sessions_pb2_grpc.SessionServiceStub(channel).ListSessions
        reply = list_sessions(request, timeout=TIMEOUT_S, metadata=metadata)
        return (session.session_id for session in reply.sessions)

    return answered(ctx, ids)


def answered(
    ctx: click.Context, ask: Callable[[grpc.Channel, Pairs | None], Iterable[str]]
) -> list[CompletionItem]:
    """The answer of the server of the command line so far; empty if it does not answer or cannot be determined."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from stepwell._transport.channel import open_channel, tokens

    if not ctx.params.get("server"):
        return []
    target = Target.of(dict(ctx.params))
    try:
        config = target.config()
        config = dataclasses.replace(config, address=config.targets[0])  # any replica can answer
        metadata = tokens(config).metadata()
        with open_channel(config) as channel:
            return [CompletionItem(value) for value in ask(channel, metadata)]
    except (grpc.RpcError, click.UsageError):
        return []

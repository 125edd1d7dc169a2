"""What users write with the SDK, with the types that they would give it. Checked by `test_types`, never run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import stepwell
from stepwell import aio, events
from stepwell.testing import LocalServer

Floats = npt.NDArray[np.float32]


def rollout(client: stepwell.Client, x: Floats) -> Floats:
    """A session: outputs are arrays to calculate with."""
    with client.open_session("policy", session_id="user-42", batch_size=len(x)) as session:
        y = session.step(x)
        loss = float(((y - x) ** 2).mean())
        scaled = -y / max(loss, 1e-6) + 1
        session.reset_states(rows=[0])
        state = session.get_state()
        doubled = {name: 2 * h - 1 for name, h in state.items()}
        session.reset_states(doubled)
        norms = [float(np.linalg.norm(h)) for h in state.values()]
        print(session.revision, session.position, max(norms), state["lstm/h"][0] @ state["lstm/h"][0])
        twin = session.fork()
        twin.reset_states(state)
        twin.close()
    return np.asarray(scaled, np.float32)


def environments(client: stepwell.Client, n: int, steps: int) -> Floats:
    """A group, and a prediction without a session."""
    rewards = np.zeros(n, np.float32)
    with client.open_sessions("policy", n) as group:
        actions = group.step(np.zeros((n, 3), np.float32))
        for _ in range(steps):
            actions = group.step(np.clip(actions, -1, 1), outputs="last", timeout_s=1.5)
            rewards += actions.sum(axis=-1)
        group.reset_states(rows=np.flatnonzero(rewards > 0).tolist())
    y, state = client.predict("policy", np.ones((5, 3)))
    y, state = client.predict("policy", {"x": [[1.0, 2.0, 3.0]]}, state)
    print(y.argmax(axis=1) + 1, state.batch_size)
    return rewards


def several(outputs: dict[str, npt.NDArray[Any]]) -> Iterator[float]:
    yield from (float(array.max()) for array in outputs.values())


def failures(client: stepwell.Client) -> str:
    """Errors and what they tell."""
    try:
        client.open_session("policy", must_be_new=True)
    except stepwell.SessionExistsError as error:
        return error.message
    except stepwell.OverloadedError as error:
        return f"{error.retry_after_s:.1f}"
    except (stepwell.UnavailableError, stepwell.DeadlineExceededError) as error:
        return error.outcome
    return ""


def slow(event: events.ResponseEvent) -> None:
    if event.elapsed_s > 0.1 and event.error is None:
        logging.getLogger(__name__).warning("%s took %.3f s", event.request.rpc, event.elapsed_s)


async def noted(event: events.RetryEvent) -> None:
    await asyncio.sleep(0)
    print(event.request.attempt, event.delay_s, event.error.message)


def told() -> stepwell.Client:
    """Everything that a client can be told."""
    return stepwell.connect(
        "grpcs://h:50051",
        timeout_s=10,
        connect_timeout_s=2,
        tls=stepwell.TlsConfig(ca="ca.pem"),
        metadata={"authorization": "Bearer x"},
        event_hooks={"request": [lambda event: print(event.rpc)], "response": [slow]},
    )


async def users(address: str, xs: list[Floats]) -> list[Floats]:
    """The async client."""
    async with (
        aio.connect(
            address, metadata=[("a", "b"), ("c-bin", b"d")], event_hooks={"retry": [noted]}
        ) as client,
        client.open_session("policy") as session,
        client.open_sessions("policy", len(xs)) as group,
    ):
        first = await session.step(xs[0])
        together = await group.step(np.stack(xs))
        single = await client.open_session("policy", session_id="a")
        ys = await asyncio.gather(*(single.step(x) for x in xs[:1]))
        return [first - together[0], *[-y for y in ys]]


def main(path: str) -> None:
    with LocalServer(models={"policy": path}) as server, stepwell.connect(server.address) as client:
        print([(model.name, model.inputs[0].shape) for model in client.models()])
        print([info.session_id for info in client.sessions(prefix="user-")])
        print(rollout(client, np.ones((2, 3), np.float32)), environments(client, 8, 3), failures(client))
        print(asyncio.run(users(server.address, [np.ones((1, 3), np.float32)])))

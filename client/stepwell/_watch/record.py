"""Tapes of watches: they record the changes of a session, whoever makes them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator

import numpy as np

from stepwell._core.aio_driver import AsyncDriver
from stepwell._core.driver import Driver
from stepwell._core.tracker import SessionTracker
from stepwell._state.arguments import check_count
from stepwell._tape.frames import Frames, Members
from stepwell._tape.recording import check_recorded, indexes_of
from stepwell._tape.reel import Reel, Subject
from stepwell._tape.tape import RecordedStates, Tape
from stepwell._watch.aio_watch import AsyncWatch
from stepwell._watch.core import SessionWatch
from stepwell._watch.events import SessionEvent
from stepwell._watch.watch import Watch
from stepwell.errors import InvalidInputError, StepwellError


def is_watch(source: object) -> bool:
    """Whether a tape is recorded from a watch. Checks the argument `source` of `record`."""
    if source not in ("replies", "watch"):
        raise InvalidInputError(f"source must be 'replies' or 'watch'; got {source!r:.100}")
    return source == "watch"


class WatchedReel:
    """The reel of a watched session: turns events into time steps and marks. For one thread at a time."""

    def __init__(self, tracker: SessionTracker, states: RecordedStates, max_steps: int | None) -> None:
        self._tracker = tracker
        self._states = check_recorded(states)
        self._max_steps = None if max_steps is None else check_count("max_steps", max_steps)
        self._position = 0

    def watch(self, driver: Driver | AsyncDriver) -> SessionWatch:
        """The watch that it needs."""
        return SessionWatch(
            driver.core,
            [self._tracker.session_id],
            inputs=True,
            outputs=True,
            states=self._states != "none",
            state_names=None,
            every=1,
            interval_s=None,
        )

    def begin(self, event: SessionEvent) -> Tape:
        """Begins the tape with the first event.

        Raises:
            StepwellError: The session has ended.
        """
        if event.error is not None:
            raise event.error
        tracker = self._tracker
        counts = [np.array([n], np.uint64) for n in (event.revision, event.position, event.model_version)]
        subject = Subject(tracker.model, tracker.fingerprint, tracker.batch_size, False, *counts)
        self._reel = Reel(subject, self._states, self._max_steps)
        self.revision, self._position = event.revision, event.position
        return Tape(self._reel.content)

    def take(self, event: SessionEvent) -> None:
        """Records an event."""
        if event.kind == "ended":
            self.stop(event.error)
            return
        before, is_next = self._position, event.revision == self.revision + 1
        restart = None
        if event.kind == "step" and not (is_next and event.position == before + event.time_steps):
            # Either the whole session restarted within the step, or the tape missed changes before it.
            before = event.position - event.time_steps
            if before < 0 or (is_next and before == 0):
                restart, before = -before, self._position if is_next else 0
        counts = (event.revision, before, event.position, event.model_version)
        members = Members(None, *[np.array([count], np.uint64) for count in counts])
        if event.kind == "step":
            self._reel.append(self._frames(event, members, restart))
        elif event.kind == "reset":
            self._reel.mark("reset", indexes_of(event.rows), members)
        elif event.revision != self.revision:
            self._reel.mark("gap", None, members)
        else:  # it moved to another version of its model, which the next step marks
            return
        self.revision, self._position = event.revision, event.position

    def _frames(self, event: SessionEvent, members: Members, restart: int | None) -> Frames:
        """The time steps of a step. Its event has the values of the last one."""
        rows = indexes_of(event.rows)
        restarts = None
        if restart is not None:
            count = self._tracker.batch_size if rows is None else len(rows)
            restarts = np.zeros((event.time_steps, count), np.bool_)
            restarts[restart] = True
        return Frames(
            count=event.time_steps,
            members=members,
            rows=rows,
            restarts=restarts,
            inputs={name: array[None] for name, array in event.inputs.items()},
            outputs={name: array[None] for name, array in event.outputs.items()},
            states={
                name: (array if rows is None else array[rows])[None] for name, array in event.states.items()
            },
        )

    def has_all(self) -> bool:
        """Whether the tape has all changes that the session's handle knows."""
        return self.revision >= self._tracker.revision

    def stop(self, error: Exception | None) -> None:
        """Ends the recording early because of an error."""
        self._reel.stop(
            str(error) if isinstance(error, StepwellError) else f"{type(error).__name__}: {error}"
        )

    def end(self, *, is_complete: bool) -> None:
        """Ends the recording."""
        if not is_complete:
            self._reel.stop(f"revision {self._tracker.revision} was not reported within the time limit")
        self._reel.end()


@contextlib.contextmanager
def recorded(driver: Driver, reel: WatchedReel) -> Iterator[Tape]:
    """Records in a thread while the block runs. Raises the error of the watch at its end, unless the block failed."""
    failed: list[Exception] = []
    changed, is_over = threading.Condition(), threading.Event()

    def read() -> None:
        try:
            for event in watch:
                with changed:
                    reel.take(event)
                    changed.notify_all()
        except Exception as error:  # else the tape would end early, and say nothing
            failed.append(error)
            reel.stop(error)
        finally:
            with changed:
                is_over.set()
                changed.notify_all()

    with Watch(driver, reel.watch(driver)) as watch:
        tape = reel.begin(next(watch))
        reader = threading.Thread(target=read, name="stepwell-tape", daemon=True)
        reader.start()
        is_complete = True
        try:
            yield tape
            limit_s = driver.core.deadline(None).remaining_s()
            with changed:
                is_complete = changed.wait_for(lambda: is_over.is_set() or reel.has_all(), limit_s)
        finally:
            watch.close()
            reader.join()
            reel.end(is_complete=is_complete)
    if failed:
        raise failed[0]


@contextlib.asynccontextmanager
async def recorded_async(driver: AsyncDriver, reel: WatchedReel) -> AsyncIterator[Tape]:
    """As `recorded`, in a task."""
    changed = asyncio.Event()

    async def read() -> None:
        try:
            async for event in watch:
                reel.take(event)
                changed.set()
        except Exception as error:  # else the tape would end early, and say nothing
            reel.stop(error)
            raise
        finally:
            changed.set()

    async def caught_up() -> None:
        while not (reader.done() or reel.has_all()):
            changed.clear()
            await changed.wait()

    async with AsyncWatch(driver, reel.watch(driver)) as watch:
        tape = reel.begin(await anext(watch))
        reader = asyncio.create_task(read())
        is_complete = True
        try:
            yield tape
            try:
                await asyncio.wait_for(caught_up(), driver.core.deadline(None).remaining_s())
            except TimeoutError:
                is_complete = False
        finally:
            await watch.close()
            (failed,) = await asyncio.gather(reader, return_exceptions=True)
            reel.end(is_complete=is_complete)
    if isinstance(failed, Exception):
        raise failed

"""Where plain steps of one model come in, for whoever gathers them between two passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from stepwell_server.engine.api import Array, Select
from stepwell_server.engine.intake.admission import MAX_WAITING_PASSES
from stepwell_server.engine.intake.plain import PlainIntake, PlainSteps
from stepwell_server.engine.passes.inline import Answered, Solo
from stepwell_server.engine.state.model import ServedModel
from stepwell_server.program import Program


class PlainPort:
    """Plain steps of one model: `feed` is called when they are due, `wake` says that there are some.

    Lives on the event loop. What is gathered must be given away whenever a feed is called: something
    that came later is about to be taken in.
    """

    def __init__(self, model: ServedModel, intake: PlainIntake, solo: Solo) -> None:
        self.index = model.index
        self.program: Program = model.program
        self._model = model
        self._intake = intake
        self._solo = solo
        self._feeds: list[Callable[[], None]] = []
        self._counts: list[Callable[[], int]] = []
        self._loop = asyncio.get_running_loop()
        self._ran_alone = False
        model.loop.feed(self.take_in)

    @property
    def is_free(self) -> bool:
        """Nothing runs or waits, and one row is cheap enough to run in place."""
        return self._model.loop.is_free

    @property
    def may_run_now(self) -> bool:
        """A step that comes now may run at once: nothing is there, and no other has in this turn.

        If there are more in this turn of the event loop, they had better run together. If a turn of the
        pass loop is due, something is gathered, and came before.
        """
        return not self._ran_alone and not self._model.loop.is_turn_due and self._model.loop.is_free

    @property
    def gathered(self) -> int:
        """Steps that wait at the sources."""
        return sum(count() for count in self._counts)

    @property
    def has_room(self) -> bool:
        """One more step may wait; else it is refused."""
        loop = self._model.loop
        return loop.rows_waiting + self.gathered < MAX_WAITING_PASSES * loop.max_batch_rows

    def feed(self, source: Callable[[], None], count: Callable[[], int]) -> None:
        """Call `source` whenever gathered steps are due; `count` says how many there are."""
        self._feeds.append(source)
        self._counts.append(count)

    def take_in(self) -> None:
        """Have everything that is gathered given away now."""
        for source in self._feeds:
            source()

    def take_in_others(self, own: Callable[[], None]) -> None:
        """Have what others than `own` gathered given away: what is about to be gathered came later."""
        for source in self._feeds:
            if source != own:
                source()

    def wake(self) -> None:
        """Something is gathered: take a turn as soon as no pass runs."""
        self._model.loop.wake()

    def admit(self, steps: PlainSteps) -> None:
        """See `PlainIntake.admit`."""
        self._intake.admit(steps)

    def run_solo(
        self,
        handle: int,
        arrays: Sequence[Array],
        *,
        expected: int | None,
        request_id: int,
        select: Select,
        with_time: bool,
    ) -> Answered | None:
        """See `Solo.run`; only while `is_free`."""
        if not self._ran_alone:
            self._ran_alone = True
            self._loop.call_soon(self._end_turn)
        return self._solo.run(
            handle, arrays, expected=expected, request_id=request_id, select=select, with_time=with_time
        )

    def _end_turn(self) -> None:
        self._ran_alone = False

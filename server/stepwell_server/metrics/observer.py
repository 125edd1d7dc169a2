"""Counts what the engine, the services and the compiler do. It counts on the event loop, where a scrape takes a copy."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from stepwell_server.engine.api import Observer, SessionPolicy
from stepwell_server.errors import reasons
from stepwell_server.metrics.families import gauge
from stepwell_server.metrics.series import ROWS, Counter, Histogram, Series
from stepwell_server.rpc.fronts.base import SECONDS, Durations
from stepwell_server.rpc.services.models import MAX_SLOW_SESSIONS, SlowStep

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from stepwell_server.program import Program

_EVENTS = ("opened", "resumed", "forked", "imported", "closed", "expired")
_CHANGES = ("step", "reset", "predict")
_REPLAYED = ("step", "reset", "open", "fork")
_STAGES = ("wait", "commit", "total")
_SOURCES = ("cache", "compiled", "file", "failed")
#: Label of errors and retries that belong to no served model.
_NO_MODEL = ""
#: Time for which a slow step is listed.
SLOW_KEPT_S = 60.0


class SlowestSteps:
    """The slowest recent step of each of the slowest sessions: few, and cheap to keep. Lives on the event loop."""

    def __init__(self) -> None:
        self._found: dict[str, SlowStep] = {}
        self.threshold_s = 0.0
        """Faster steps cannot be among the slowest before the next trim."""
        self.next_trim = 0.0

    def note(self, model: str, session_id: str, seconds: float, now: float) -> None:
        """A step of a session was answered."""
        if seconds <= self.threshold_s and now < self.next_trim:
            return
        known = self._found.get(session_id)
        if known is None or known.seconds < seconds or known.when <= now - SLOW_KEPT_S:
            self._found[session_id] = SlowStep(seconds, session_id, model, now)
        if len(self._found) >= 2 * MAX_SLOW_SESSIONS or now >= self.next_trim:
            self._trim(now)

    def _trim(self, now: float) -> None:
        kept = self.list(now)[:MAX_SLOW_SESSIONS]
        self._found = {step.session_id: step for step in kept}
        self.threshold_s = kept[-1].seconds if len(kept) == MAX_SLOW_SESSIONS else 0.0
        self.next_trim = min((step.when for step in kept), default=now) + SLOW_KEPT_S

    def list(self, now: float) -> list[SlowStep]:
        """The slowest first."""
        return sorted((step for step in self._found.values() if step.when > now - SLOW_KEPT_S), reverse=True)


class PrometheusObserver(Observer):
    """Counts what the engine and the gRPC side do. Call all methods on the event loop.

    Label values come only from the server's own lists, so callers cannot create series.
    """

    def __init__(self) -> None:
        model = ("model",)
        self._reasons = reasons()
        self.models: dict[str, Mapping[str, str]] = {}
        """The served models, with facts about each."""
        self._direct: dict[tuple[str, int], Series] = {}
        self._batches: defaultdict[str, dict[int, tuple[int, float]]] = defaultdict(dict)
        self._time_step_s: dict[str, float] = {}
        self._load_seconds: dict[str, float] = {}
        self._streams: dict[str, int] = {}
        self.slow_steps = SlowestSteps()
        self._events = Counter(
            "stepwell_session_events",
            "Sessions opened, resumed, forked, closed, expired.",
            ("model", "event"),
        )
        self._changes = Counter(
            "stepwell_changes", "Changes applied: step, reset, predict.", ("model", "change")
        )
        self._row_steps = Counter(
            "stepwell_row_steps", "Rows times time steps of the changes applied.", ("model", "change")
        )
        self._replays = Counter(
            "stepwell_replays", "Retries answered with the remembered reply.", ("model", "change")
        )
        self._conflicts = Counter(
            "stepwell_store_conflicts",
            "Changes checked again because another server had changed the session in the store.",
            model,
        )
        self._errors = Counter(
            "stepwell_errors",
            "Calls and changes refused, by model (empty: no served model) and reason.",
            ("model", "reason"),
        )
        self._errors.declare((_NO_MODEL, reason) for reason in self._reasons)
        self._time_steps = Counter("stepwell_pass_time_steps", "Time steps run in passes.", model)
        self._pass_rows = Histogram("stepwell_pass_rows", "Rows in a pass.", model, ROWS)
        self._pass_seconds = Histogram("stepwell_pass_seconds", "Duration of a pass.", model)
        self._stages = Histogram(
            "stepwell_stage_seconds",
            "Duration of a change by stage: wait (for its pass), commit (for the store), total (until its reply).",
            ("model", "stage"),
        )
        self._paged = Counter(
            "stepwell_paged_sessions",
            "Sessions paged in and out, between the store and memory.",
            ("model", "direction"),
        )
        self._paging_seconds = Histogram(
            "stepwell_paging_seconds",
            "Duration of paging a batch of sessions between the store and memory.",
            ("model", "direction"),
        )
        self._loads = Counter(
            "stepwell_model_loads",
            "Model versions loaded, by source of the program; failed: the load failed.",
            ("model", "source"),
        )
        self._moved = Counter(
            "stepwell_moved_sessions",
            "Sessions in memory when the default version of their model moved, by policy.",
            ("model", "policy"),
        )
        self._requests = Counter("stepwell_requests", "Completed calls, by status code.", ("method", "code"))
        self._request_seconds = Histogram(
            "stepwell_request_seconds",
            "Duration of a call. For a stream: of each message, from its arrival to the last part of its reply.",
            ("method",),
        )

    @override
    def model_served(self, model: str, program: Program) -> None:
        self._moved.declare((model, each.value) for each in SessionPolicy)
        self._loads.declare((model, each) for each in _SOURCES)
        self.models[model] = {"fingerprint": program.fingerprint, "executor": program.executor}
        for counter, values in (
            (self._events, _EVENTS),
            (self._changes, _CHANGES),
            (self._row_steps, _CHANGES),
            (self._replays, _REPLAYED),
            (self._errors, self._reasons),
            (self._paged, ("in", "out")),
        ):
            counter.declare((model, value) for value in values)
        for counter in (self._time_steps, self._conflicts):
            counter.declare([(model,)])
        for direction in ("in", "out"):
            self._paging_seconds.of((model, direction))
        for stage in _STAGES:
            self._stages.of((model, stage))
        self._pass_rows.of((model,))
        self._pass_seconds.of((model,))

    def model_loaded(self, model: str, source: str, seconds: float) -> None:
        """A model was loaded in this time. The program came from the `cache` or a `file`, or was `compiled`."""
        self._loads.declare((model, each) for each in _SOURCES)
        self._loads.values[model, source] += 1
        self._load_seconds[model] = seconds

    def sessions_moved(self, model: str, policy: str, count: int) -> None:
        """The default version of a model moved, with this number of sessions in memory."""
        self._moved.values[model, policy] += count

    def model_failed(self, model: str) -> None:
        """A version could not be loaded. The model is empty if its name is not served."""
        self._loads.declare((model, each) for each in _SOURCES)
        self._loads.values[model, "failed"] += 1

    @override
    def session_event(self, event: str, model: str, session_id: str) -> None:
        self._events.values[self._known(model), event] += 1

    @override
    def sessions_opened(self, model: str, count: int, event: str = "opened") -> None:
        self._events.values[model, event] += count

    @override
    def session_events(self, event: str, model: str, count: int) -> None:
        self._events.values[self._known(model), event] += count

    @override
    def stage(self, model: str, stage: str, seconds: float, count: int) -> None:
        self._stages.observe((model, stage), seconds, count)

    @override
    def stepped(self, model: str, session_id: str, rows: int, seconds: float, now: float) -> None:
        key = model, rows
        direct = self._direct.get(key)
        if direct is None:
            direct = self._direct[key] = Series()
        direct.counts[bisect_left(SECONDS, seconds)] += 1
        direct.total += seconds
        self._time_step_s[model] = seconds
        slow = self.slow_steps
        if seconds > slow.threshold_s or now >= slow.next_trim:
            slow.note(model, session_id, seconds, now)

    def _count_direct(self) -> None:
        """Add the steps that ran without a wait to all counts that include them."""
        for (model, rows), direct in self._direct.items():
            passes = sum(direct.counts)
            steps = passes * rows
            self._pass_seconds.of((model,)).add(direct)
            self._stages.of((model, "total")).add(direct, rows)
            self._stages.observe((model, "wait"), 0.0, steps)
            self._pass_rows.observe((model,), rows, passes)
            self._time_steps.values[model,] += passes
            self._changes.values[model, "step"] += steps
            self._row_steps.values[model, "step"] += steps
            self._count_passes(model, rows, passes, direct.total)
        self._direct.clear()

    @override
    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        labels = (model,)
        self._pass_rows.observe(labels, rows)
        self._pass_seconds.observe(labels, seconds)
        self._time_steps.values[labels] += time_steps
        self._time_step_s[model] = seconds / max(1, time_steps)
        self._count_passes(model, rows, 1, seconds)

    def _count_passes(self, model: str, rows: int, count: int, seconds: float) -> None:
        batches = self._batches[model]
        passes, before = batches.get(rows, (0, 0.0))
        batches[rows] = (passes + count, before + seconds)

    def passes_by_rows(self, model: str) -> Mapping[int, tuple[int, float]]:
        """Return the number of the model's passes and their total seconds, by number of rows."""
        self._count_direct()
        return self._batches[model]

    def seconds_per_time_step(self, model: str) -> float:
        """Return the seconds per time step of the model's latest pass; 0 before the first."""
        return self._time_step_s.get(model, 0.0)

    @override
    def slow(self, model: str, session_id: str, seconds: float, now: float) -> None:
        self.slow_steps.note(model, session_id, seconds, now)

    @override
    def applied(self, model: str, change: str, count: int, row_steps: int) -> None:
        labels = (model, change)
        self._changes.values[labels] += count
        self._row_steps.values[labels] += row_steps

    @override
    def replayed(self, model: str, change: str, count: int) -> None:
        self._replays.values[model, change] += count

    @override
    def judged_again(self, model: str, count: int) -> None:
        self._conflicts.values[(model,)] += count

    @override
    def paged(self, model: str, direction: str, sessions: int, seconds: float) -> None:
        labels = (model, direction)
        self._paged.values[labels] += sessions
        self._paging_seconds.observe(labels, seconds)

    def refused(self, reason: str, count: int, model: str = _NO_MODEL) -> None:
        """Calls, or changes of a frame, ended with an error. `model` may be a name that is not served."""
        self._errors.values[self._known(model), reason] += count

    def _known(self, model: str) -> str:
        return model if model in self.models else _NO_MODEL

    def method_served(self, method: str, codes: Collection[str], *, streams: bool) -> None:
        """The server takes calls of `method`, which end with one of these status codes."""
        self._requests.declare((method, code) for code in codes)
        if streams:
            self._streams[method] = 0
        else:
            self._request_seconds.of((method,))

    def request_done(self, method: str, code: str, seconds: float) -> None:
        """A unary call ended."""
        self._requests.values[method, code] += 1
        series = self._request_seconds.series.get((method,)) or self._request_seconds.of((method,))
        series.counts[bisect_left(SECONDS, seconds)] += 1
        series.total += seconds

    def requests_done(self, method: str, code: str, seconds: npt.NDArray[np.float64]) -> None:
        """Several calls of a method ended with the same status code."""
        if len(seconds) == 1:
            self.request_done(method, code, float(seconds[0]))
            return
        self._requests.values[method, code] += len(seconds)
        self._request_seconds.of((method,)).observe_all(seconds)

    def stream_began(self, method: str) -> None:
        """A stream was opened."""
        self._streams[method] = self._streams.get(method, 0) + 1

    def stream_done(self, method: str, code: str) -> None:
        """A stream ended."""
        self._streams[method] -= 1
        self._requests.values[method, code] += 1

    def messages_done(self, method: str, seconds: npt.NDArray[np.float64]) -> None:
        """Messages of streams were answered completely, in these times since their arrival."""
        self._request_seconds.of((method,)).observe_all(seconds)

    def answered(self, method: str, stream_method: str, calls: Durations, messages: Durations) -> None:
        """Calls ended with OK, and messages of streams were answered, in durations that a front has counted."""
        self._requests.values[method, "OK"] += sum(calls[0])
        self._request_seconds.of((method,)).add_durations(calls)
        if any(messages[0]):
            self._request_seconds.of((stream_method,)).add_durations(messages)

    def families(self) -> Iterator[Metric]:
        """Everything counted so far."""
        self._count_direct()
        counted: list[Counter | Histogram] = [
            *(self._events, self._changes, self._row_steps, self._replays, self._conflicts, self._errors),
            *(self._time_steps, self._pass_rows, self._pass_seconds, self._stages),
            *(self._paged, self._paging_seconds, self._loads, self._moved),
            *(self._requests, self._request_seconds),
        ]
        yield from (each.family() for each in counted)
        text = "Duration of the model's latest load, including the compilation if it was not in the cache."
        yield gauge("stepwell_model_load_seconds", text, self._load_seconds, ("model",))
        yield gauge("stepwell_open_streams", "Open streams.", self._streams, ("method",))

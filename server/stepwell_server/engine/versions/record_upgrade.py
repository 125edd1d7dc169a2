"""Upgrades records of earlier epochs, when they are read, to the version that their session is on now.

The rows of a carried session stay the same. If a session is migrated or reset, its rows become rows of the new
version. The remembered reply keeps its tensors, whatever the new version calls its outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.state.fields import mark_of
from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import (
    ReplyArrays,
    ReplyForm,
    check_reply,
    pack_foreign,
    unpack_reply,
)
from stepwell_server.engine.types import Array
from stepwell_server.engine.versions.history import Move, MoveKind
from stepwell_server.engine.versions.registry import Models, RecordTrace, Versions
from stepwell_server.errors import MigrationFailed, ServerError, StateCorrupt, Unavailable
from stepwell_server.program import StateSpec, dtype_of
from stepwell_server.store.record import DecodedRecords

Migration = Callable[[dict[str, Array]], Mapping[str, Array]]
"""Converts states of one version, `(rows, ...)` each by name, to another's: as many rows, in the same order.

Called with the rows of many sessions at once, from any thread. It must be deterministic: the result is only stored
with the session's next change.
"""


@dataclasses.dataclass(slots=True)
class UpgradedRecords:
    """Records converted to the version that their sessions are on."""

    decoded: DecodedRecords
    refused: dict[int, ServerError]
    """Errors of records that cannot be converted, by place; in `decoded` their rows are zeros."""
    reset: list[int]
    """Places of sessions that are reset, to position 0."""
    replies: dict[int, int]
    """The new form of replies whose form has changed, by place."""
    have_stored_rows: bool = True
    """All rows are those of the records, and nothing was converted."""


class RecordUpgrader:
    """Upgrades records. Lives on the event loop; `bring` may be called on any thread while nothing moves."""

    def __init__(self, models: Models, migrations: Mapping[str, Migration]) -> None:
        self._models = models
        self.migrations = migrations

    def trace(
        self, model: Model, fingerprint: str, fields: bytes, *, is_as_known: bool
    ) -> RecordTrace | None:
        """Find where the session of a record is now; None: the record is another session's.

        The session is on a version of `model` in the table. With `is_as_known`, the table's session was loaded from
        this record or has written it.

        Raises:
            Unavailable: the session is moving to another version.
            VersionElsewhere: another server made moves with it that are unknown here; or it is on another version,
                and this server has yet to follow.
        """
        own = self._models.versions(model.name)
        mark = mark_of(fields)
        trace = own.trace(mark, fingerprint)
        if trace is None:
            raise self._models.later(model.name)
        if mark is not None and mark.is_pinned:
            return trace if trace.now == model.version else None
        if mark is not None and mark.epoch > own.history.epoch:
            raise self._models.later(model.name)
        if trace.now == model.version:
            return trace
        if not is_as_known:
            # The record may be of a later move than the pending one, or of another session with the same id. The
            # session's data here is then not enough to continue where it began.
            raise self._models.leaving(model.name, model.version, trace.now)
        # a move is being made: active work continues on its version
        if trace.version == model.version:
            return RecordTrace(trace.version, None)
        is_carried = trace.move is not None and trace.move.how is MoveKind.CARRY
        if is_carried and own.known[trace.now].layout == Layout.of(model.program):
            return trace
        raise Unavailable(
            f"a session of model {model.name!r} is moving to version {trace.now}; send the request again"
        )

    def migrates(self, model: Model) -> bool:
        """Whether records of a model's sessions may need a migration, whose duration is unknown."""
        return any(move.how is MoveKind.MIGRATE for move in self._models.versions(model.name).history.moves)

    def bring(self, model: Model, decoded: DecodedRecords, as_known: Sequence[bool]) -> UpgradedRecords:
        """Convert the records of sessions of a version. Records of another model's sessions stay unchanged.

        `as_known` says for each place whether the table has this record: see `trace`.
        """
        forwarded = UpgradedRecords(decoded, {}, [], {})
        own, target = self._models.versions(model.name), Layout.of(model.program)
        forwarded.refused.update(_misfits(decoded, np.arange(len(decoded.sound)), target))
        groups: dict[RecordTrace, list[int]] = {}
        traces: dict[tuple[str, bytes, bool], RecordTrace | Unavailable | None] = {}  # few differ
        for index, place in enumerate(decoded.sound.tolist()):
            key = decoded.fingerprints[index], decoded.fields.get(place, b""), as_known[place]
            if key not in traces:
                try:
                    traces[key] = self.trace(model, key[0], key[1], is_as_known=key[2])
                except Unavailable as error:
                    traces[key] = error
            trace = traces[key]
            if isinstance(trace, Unavailable):
                forwarded.refused[place] = trace
            elif trace is not None and trace.move is not None:
                layout = own.known[trace.version].layout
                if layout != target:
                    forwarded.refused.pop(place, None)
                    forwarded.refused.update(_misfits(decoded, np.array([index]), layout))
                if place not in forwarded.refused:
                    groups.setdefault(trace, []).append(index)
        changed = {
            (trace.version, trace.move): indexes
            for trace, indexes in groups.items()
            if trace.move is not None
            and (trace.move.how is not MoveKind.CARRY or own.known[trace.version].layout != target)
        }
        if changed or forwarded.refused:
            self._rewrite(model, own, forwarded, changed, target)
        return forwarded

    def _rewrite(
        self,
        model: Model,
        own: Versions,
        forwarded: UpgradedRecords,
        groups: Mapping[tuple[int, Move], list[int]],
        target: Layout,
    ) -> None:
        """Convert some records' rows to rows of their new version."""
        forwarded.have_stored_rows = False
        decoded = forwarded.decoded
        ends = np.cumsum(decoded.heads["rows_bytes"].astype(np.int64))
        starts = ends - decoded.heads["rows_bytes"]
        rows = [decoded.rows[low:high] for low, high in zip(starts.tolist(), ends.tolist(), strict=True)]
        extras = dict(decoded.extras)
        for (version, move), indexes in groups.items():
            layout = own.known[version].layout
            packed = np.frombuffer(b"".join([rows[index] for index in indexes]), np.uint8)
            places = decoded.sound[indexes].tolist()
            sizes = decoded.heads["batch_size"][indexes].tolist()
            kept: Sequence[Array] | None = None
            try:
                states, outputs = layout.unpacked(packed.reshape(-1, layout.row_bytes))
                made = self._moved(model, own, move, layout, states)
                self._keep_replies(forwarded, extras, layout, target, outputs, indexes, sizes)
                kept = outputs if layout.outputs == target.outputs else None
            except ServerError as error:
                forwarded.refused.update(dict.fromkeys(places, error))
                made = [np.repeat(value[None], sum(sizes), axis=0) for value in model.program.initial]
            except ValueError as error:
                broken = StateCorrupt(
                    f"the stored record of a session of version {version} must be intact: {error}"
                )
                forwarded.refused.update(dict.fromkeys(places, broken))
                made = [np.repeat(value[None], sum(sizes), axis=0) for value in model.program.initial]
            if move.how is MoveKind.RESET:
                forwarded.reset += places
            for index, part in zip(indexes, _packed(model, made, kept, sizes), strict=True):
                rows[index] = part
        heads = decoded.heads.copy()
        heads["rows_bytes"] = [len(part) for part in rows]
        forwarded.decoded = dataclasses.replace(decoded, heads=heads, rows=b"".join(rows), extras=extras)

    def _moved(
        self, model: Model, own: Versions, move: Move, layout: Layout, states: Sequence[Array]
    ) -> list[Array]:
        """The states after a move, in the order of its target version."""
        rows = len(states[0]) if states else 0
        if move.how is MoveKind.RESET:
            return [np.repeat(value[None], rows, axis=0) for value in model.program.initial]
        named: Mapping[str, Array] = dict(zip([spec.name for spec in layout.states], states, strict=True))
        for step in move.migrations:
            named = self.migrated(step.function, named, own.known[step.target].layout.states, rows)
        return [named[spec.name] for spec in model.program.state]

    def migrated(
        self, function: str, states: Mapping[str, Array], specs: Sequence[StateSpec], rows: int
    ) -> dict[str, Array]:
        """The states that a migration function returns, checked.

        Raises:
            MigrationFailed: it raised, or its result is not the target version's states.
        """
        migrate = self.migrations.get(function)
        if migrate is None:
            raise MigrationFailed(
                f"migration must be one that the server was started with (--migration), {sorted(self.migrations)};"
                f" got {function!r}"
            )
        try:
            given = dict(migrate({name: array.copy() for name, array in states.items()}))
        except Exception as error:  # a user's function may raise anything
            raise MigrationFailed(f"migration {function!r} raised {type(error).__name__}: {error}") from error
        wanted = {spec.name: spec for spec in specs}
        if given.keys() != wanted.keys():
            raise MigrationFailed(
                f"migration {function!r} must return the states {sorted(wanted)}; it returned {sorted(given)}"
            )
        made: dict[str, Array] = {}
        for name, spec in wanted.items():
            array = np.asarray(given[name])
            if array.shape != (rows, *spec.shape):
                raise MigrationFailed(
                    f"migration {function!r} must return state {name!r} of shape {[rows, *spec.shape]}, a row for each"
                    f" that it was given; its shape is {list(array.shape)}"
                )
            if not np.can_cast(array.dtype, dtype_of(spec.dtype), "same_kind"):
                raise MigrationFailed(
                    f"migration {function!r} must return state {name!r} as {spec.dtype}; it is {array.dtype.name}"
                )
            made[name] = array.astype(dtype_of(spec.dtype))
            if made[name].dtype.kind in "fV" and not np.isfinite(made[name].astype(np.float64)).all():
                raise MigrationFailed(
                    f"migration {function!r} must return finite numbers; state {name!r} holds NaN or infinity"
                )
        return made

    @staticmethod
    def _keep_replies(
        forwarded: UpgradedRecords,
        extras: dict[int, bytes],
        layout: Layout,
        target: Layout,
        outputs: Sequence[Array],
        indexes: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        """Store the tensors of remembered replies with them, if the new version has other tensors."""
        if layout == target:
            return
        decoded, low = forwarded.decoded, 0
        for index, size in zip(indexes, sizes, strict=True):
            place, high = int(decoded.sound[index]), low + size
            kind = int(decoded.heads["reply"][index])
            kept = ReplyArrays({}, {})
            if place in extras:
                kept = unpack_reply(extras[place], layout.outputs, layout.states)
            if kind in (ReplyForm.ROWS, ReplyForm.ROWS_WITH_TIME) and layout.outputs != target.outputs:
                with_time = kind == ReplyForm.ROWS_WITH_TIME
                kept = kept._replace(
                    outputs={
                        spec.name: array[low:high, None] if with_time and spec.temporal else array[low:high]
                        for spec, array in zip(layout.outputs, outputs, strict=True)
                    }
                )
                forwarded.replies[place] = ReplyForm.ARRAYS
            if kept.outputs or kept.states:
                extras[place] = pack_foreign(kept)
            low = high


def _misfits(
    decoded: DecodedRecords, indexes: npt.NDArray[np.intp], layout: Layout
) -> dict[int, ServerError]:
    """Errors of records, by place, that cannot be sessions of a version with this layout.

    Each record is checked individually, because rows of many are filled at once.
    """
    heads, places = decoded.heads[indexes], decoded.sound[indexes]
    wrong = heads["rows_bytes"] != heads["batch_size"].astype(np.int64) * layout.row_bytes
    found: dict[int, ServerError] = {
        place: _misfit("its rows must have the size that its model and batch_size need; they do not")
        for place in places[wrong].tolist()
    }
    # common case: none has arrays, and all have replies of another kind
    for index in np.flatnonzero(
        ~wrong & ((heads["extra_bytes"] > 0) | (heads["reply"] >= ReplyForm.ARRAYS))
    ).tolist():
        place = int(places[index])
        kind, batch_size = int(heads["reply"][index]), int(heads["batch_size"][index])
        try:
            check_reply(kind, batch_size, decoded.extras.get(place, b""), layout.outputs, layout.states)
        except ValueError as error:
            found[place] = _misfit(str(error))
    return found


def _misfit(problem: str) -> StateCorrupt:
    return StateCorrupt(f"the stored record of a session must be one of its model: {problem}")


def _packed(
    model: Model, states: Sequence[Array], outputs: Sequence[Array] | None, sizes: Sequence[int]
) -> list[bytes]:
    """Rows of sessions as the arena packs them, session by session; `outputs` None: none are remembered."""
    count = sum(sizes)
    typed = [np.asarray(a, dtype_of(spec.dtype)) for a, spec in zip(states, model.program.state, strict=True)]
    if outputs is None:
        packed = model.arena.pack_states(typed, count)
    else:
        packed = model.arena.pack_arrays([*typed, *outputs])
    ends = np.cumsum(sizes)
    return [packed[end - size : end].tobytes() for size, end in zip(sizes, ends.tolist(), strict=True)]

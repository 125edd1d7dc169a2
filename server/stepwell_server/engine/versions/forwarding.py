"""Records of earlier epochs are brought to the version that their sessions are on now, when they are read.

The rows of one that was carried are as they were. Those of one that migrates or begins anew become rows of the new
version, and the reply that is remembered stays what it was, whatever the new version calls its outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.state.fields import mark_of
from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import Kept, KeptArrays, check_reply, pack_foreign, unpack_reply
from stepwell_server.engine.types import Array
from stepwell_server.engine.versions.history import How, Move, Way
from stepwell_server.engine.versions.registry import Models, Versions
from stepwell_server.errors import MigrationFailed, ServerError, StateCorrupt, Unavailable
from stepwell_server.program import StateSpec, dtype_of
from stepwell_server.store.record import Decoded

Migration = Callable[[dict[str, Array]], Mapping[str, Array]]
"""Makes states of one version, `(rows, ...)` each by name, states of another: as many rows, in their order.

Called with the rows of many sessions at once, from any thread. It must give the same for the same rows each time: what
it made is only stored with the session's next change.
"""


@dataclasses.dataclass(slots=True)
class Forwarded:
    """Records as of the version that their sessions are on."""

    decoded: Decoded
    refused: dict[int, ServerError]
    """Those that cannot be brought there, by place; they are in `decoded` all the same, with rows of zeros."""
    begun: list[int]
    """Places of those that begin anew: at position 0."""
    replies: dict[int, int]
    """How the reply is kept of those of which that has changed, by place."""


class Forwarding:
    """Brings records forward. Lives on the event loop; `bring` may be called on any thread while nothing moves."""

    def __init__(self, models: Models, migrations: Mapping[str, Migration]) -> None:
        self._models = models
        self.migrations = migrations

    def way(self, model: Model, fingerprint: str, fields: bytes, *, is_as_known: bool) -> Way | None:
        """The way of a record to the version of a model that its session is on; None: it is another model's session.

        With `is_as_known` the record is the one that the session in the table was made of, or has written.

        Raises:
            Unavailable: the session is on its way to another version.
            VersionElsewhere: another server has made moves with it that are not known here; or it is on another version, and
                this server has yet to follow.
        """
        own = self._models.versions(model.name)
        mark = mark_of(fields)
        version = own.version_of(mark, fingerprint)
        if version is None:
            raise self._models.later(model.name)
        if mark is not None and mark.is_pinned:
            return () if version == model.version else None
        epoch = 0 if mark is None else mark.epoch
        if epoch > own.history.epoch:
            raise self._models.later(model.name)
        target, way = own.history.way(version, epoch)
        if target == model.version:
            return way
        if not is_as_known:
            # It may be of a later move than that for which the session leaves, or another session by now, of the same id:
            # what is known here of the session is not enough to go on where it began.
            raise self._models.leaving(model.name, model.version, target)
        # a move is being made: what is under way goes on where it began
        if version == model.version:
            return ()
        for place, move in enumerate(way):
            if move.target == model.version:
                return way[: place + 1]
        if all(move.how is How.CARRY for move in way) and own.known[target].layout == Layout.of(
            model.program
        ):
            return way
        raise Unavailable(
            f"a session of model {model.name!r} is about to move to version {target}; send it again"
        )

    def migrates(self, model: Model) -> bool:
        """Whether records of a model's sessions may have to be migrated, which takes as long as it takes."""
        return any(move.how is How.MIGRATE for move in self._models.versions(model.name).history.moves)

    def bring(self, model: Model, decoded: Decoded, as_known: Sequence[bool]) -> Forwarded:
        """Bring the records of sessions of a version there. Those of another model's sessions stay as they are.

        `as_known` says of each place whether its record is as the table knows it: see `way`.
        """
        forwarded = Forwarded(decoded, {}, [], {})
        own, target = self._models.versions(model.name), Layout.of(model.program)
        forwarded.refused.update(_misfits(decoded, np.arange(len(decoded.sound)), target))
        groups: dict[tuple[int, tuple[Move, ...]], list[int]] = {}
        ways: dict[tuple[str, bytes, bool], Way | Unavailable | None] = {}  # few differ
        for index, place in enumerate(decoded.sound.tolist()):
            key = decoded.fingerprints[index], decoded.fields.get(place, b""), as_known[place]
            if key not in ways:
                try:
                    ways[key] = self.way(model, key[0], key[1], is_as_known=key[2])
                except Unavailable as error:
                    ways[key] = error
            way = ways[key]
            if isinstance(way, Unavailable):
                forwarded.refused[place] = way
            elif way:
                layout = own.known[way[0].source].layout
                if layout != target:
                    forwarded.refused.pop(place, None)
                    forwarded.refused.update(_misfits(decoded, np.array([index]), layout))
                if place not in forwarded.refused:
                    groups.setdefault((way[0].source, tuple(way)), []).append(index)
        changed = {
            key: indexes
            for key, indexes in groups.items()
            if any(move.how is not How.CARRY for move in key[1]) or own.known[key[0]].layout != target
        }
        if changed or forwarded.refused:
            self._rewrite(model, own, forwarded, changed, target)
        return forwarded

    def _rewrite(
        self,
        model: Model,
        own: Versions,
        forwarded: Forwarded,
        groups: Mapping[tuple[int, tuple[Move, ...]], list[int]],
        target: Layout,
    ) -> None:
        """Make the rows of some records rows of the version that they are brought to."""
        decoded = forwarded.decoded
        ends = np.cumsum(decoded.heads["rows_bytes"].astype(np.int64))
        starts = ends - decoded.heads["rows_bytes"]
        rows = [decoded.rows[low:high] for low, high in zip(starts.tolist(), ends.tolist(), strict=True)]
        extras = dict(decoded.extras)
        for (version, way), indexes in groups.items():
            layout = own.known[version].layout
            packed = np.frombuffer(b"".join([rows[index] for index in indexes]), np.uint8)
            places = decoded.sound[indexes].tolist()
            sizes = decoded.heads["batch_size"][indexes].tolist()
            kept: Sequence[Array] | None = None
            try:
                states, outputs = layout.unpacked(packed.reshape(-1, layout.row_bytes))
                made = self._moved(model, own, way, layout, states)
                self._keep_replies(forwarded, extras, layout, target, outputs, indexes, sizes)
                kept = outputs if layout.outputs == target.outputs else None
            except ServerError as error:
                forwarded.refused.update(dict.fromkeys(places, error))
                made = [np.repeat(value[None], sum(sizes), axis=0) for value in model.program.initial]
            except ValueError as error:
                broken = StateCorrupt(
                    f"the stored record of a session of version {version} must be as it was: {error}"
                )
                forwarded.refused.update(dict.fromkeys(places, broken))
                made = [np.repeat(value[None], sum(sizes), axis=0) for value in model.program.initial]
            if any(move.how is How.RESET for move in way):
                forwarded.begun += places
            for index, part in zip(indexes, _packed(model, made, kept, sizes), strict=True):
                rows[index] = part
        heads = decoded.heads.copy()
        heads["rows_bytes"] = [len(part) for part in rows]
        forwarded.decoded = dataclasses.replace(decoded, heads=heads, rows=b"".join(rows), extras=extras)

    def _moved(
        self, model: Model, own: Versions, way: Way, layout: Layout, states: Sequence[Array]
    ) -> list[Array]:
        """The states after some moves, in the order of the version that they end with."""
        rows = len(states[0]) if states else 0
        if any(
            move.how is How.RESET for move in way
        ):  # nobody has used it since: it is anew wherever it ends up
            return [np.repeat(value[None], rows, axis=0) for value in model.program.initial]
        named: Mapping[str, Array] = dict(zip([spec.name for spec in layout.states], states, strict=True))
        for move in way:
            if move.how is How.MIGRATE:
                specs = own.known[move.target].layout.states
                named = self.migrated(move.function, named, specs, rows)
        return [named[spec.name] for spec in model.program.state]

    def migrated(
        self, function: str, states: Mapping[str, Array], specs: Sequence[StateSpec], rows: int
    ) -> dict[str, Array]:
        """What a function makes of states: checked.

        Raises:
            MigrationFailed: it raised, or what it gave are no states of the version that it is for.
        """
        migrate = self.migrations.get(function)
        if migrate is None:
            raise MigrationFailed(
                f"migration must be one that the server was started with (--migration), {sorted(self.migrations)};"
                f" got {function!r}"
            )
        try:
            given = dict(migrate({name: array.copy() for name, array in states.items()}))
        except Exception as error:  # somebody's function raises what it likes
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
                    f"migration {function!r} must return finite numbers; state {name!r} has others"
                )
        return made

    @staticmethod
    def _keep_replies(
        forwarded: Forwarded,
        extras: dict[int, bytes],
        layout: Layout,
        target: Layout,
        outputs: Sequence[Array],
        indexes: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        """Let what is remembered of replies say its own tensors, where the new version has others."""
        if layout == target:
            return
        decoded, low = forwarded.decoded, 0
        for index, size in zip(indexes, sizes, strict=True):
            place, high = int(decoded.sound[index]), low + size
            kind = int(decoded.heads["reply"][index])
            kept = KeptArrays({}, {})
            if place in extras:
                kept = unpack_reply(extras[place], layout.outputs, layout.states)
            if kind in (Kept.ROWS, Kept.ROWS_WITH_TIME) and layout.outputs != target.outputs:
                with_time = kind == Kept.ROWS_WITH_TIME
                kept = kept._replace(
                    outputs={
                        spec.name: array[low:high, None] if with_time and spec.temporal else array[low:high]
                        for spec, array in zip(layout.outputs, outputs, strict=True)
                    }
                )
                forwarded.replies[place] = Kept.ARRAYS
            if kept.outputs or kept.states:
                extras[place] = pack_foreign(kept)
            low = high


def _misfits(decoded: Decoded, indexes: npt.NDArray[np.intp], layout: Layout) -> dict[int, ServerError]:
    """Why some of the records, by their index, cannot be sessions of a version with this layout, by place.

    Each is refused by itself: what fills the rows of many at once must find that they fit.
    """
    heads, places = decoded.heads[indexes], decoded.sound[indexes]
    wrong = heads["rows_bytes"] != heads["batch_size"].astype(np.int64) * layout.row_bytes
    found: dict[int, ServerError] = {
        place: _misfit("its rows must have the size of its model's and of its batch_size; they have another")
        for place in places[wrong].tolist()
    }
    # as mostly none has arrays, and all have replies of another kind
    for index in np.flatnonzero(
        ~wrong & ((heads["extra_bytes"] > 0) | (heads["reply"] >= Kept.ARRAYS))
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
    """Rows of some sessions as the arena packs them, each session's; `outputs` None: none are remembered."""
    count = sum(sizes)
    typed = [np.asarray(a, dtype_of(spec.dtype)) for a, spec in zip(states, model.program.state, strict=True)]
    if outputs is None:
        packed = model.arena.pack_states(typed, count)
    else:
        packed = model.arena.pack_arrays([*typed, *outputs])
    ends = np.cumsum(sizes)
    return [packed[end - size : end].tobytes() for size, end in zip(sizes, ends.tolist(), strict=True)]

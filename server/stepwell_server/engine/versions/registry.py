"""The registry of models and their versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from stepwell_server.core.model_names import ModelRef, parse_reference
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.state.fields import Mark, mark_of
from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.versions.history import History, Move
from stepwell_server.errors import (
    InvalidInput,
    ModelLoading,
    ModelMismatch,
    ModelNotFound,
    ServerError,
    VersionElsewhere,
    VersionNotFound,
)
from stepwell_server.program import FINGERPRINT_DIGITS, Names, Program
from stepwell_server.store.record import Header

#: Retry delays in seconds: for a version that is not loaded here, and for one that is being loaded.
_RETRY_INTERVAL_S, _SHORT_RETRY_INTERVAL_S = 1.0, 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class KnownVersion:
    """What is remembered of a version, even if it is not loaded."""

    version: int
    fingerprint: str
    layout: Layout
    """The layout of its sessions' stored rows."""
    source: str = ""
    """The file it came from."""
    loaded: float = 0.0
    """Load time, in seconds since the epoch."""
    tenant: str = ""
    """The tenant whose admin loaded it."""
    is_wanted: bool = True
    """Whether to load it again after a restart."""
    is_leaving: bool = False
    """It was the default, and will be unloaded when its last session ends, unless it has a label."""
    replaced: int = 0
    """Its number until another file took that number while no server ran; since then its own number is negative."""
    inputs: tuple[str, ...] = ()
    """The names of its inputs."""
    structure: str = ""
    """`Program.structure`."""

    @classmethod
    def of(cls, version: int, program: Program, source: str, loaded: float, tenant: str = "") -> KnownVersion:
        """What to remember of a version when it is loaded, from a program with the served names."""
        return cls(
            version,
            program.fingerprint,
            Layout.of(program),
            source,
            loaded,
            tenant,
            inputs=program.names.inputs,
            structure=program.structure,
        )

    @property
    def names(self) -> Names:
        """The names of its tensors."""
        outputs, states = (
            [spec.name for spec in specs] for specs in (self.layout.outputs, self.layout.states)
        )
        return Names(self.inputs, tuple(outputs), tuple(states))


class RecordTrace(NamedTuple):
    """Where the session of a record is now."""

    version: int
    """The version that the record's rows belong to. Negative: a file that was replaced."""
    move: Move | None
    """The move that the session has made since; None: none."""

    @property
    def now(self) -> int:
        """The session's current version."""
        return self.version if self.move is None else self.move.target


@dataclasses.dataclass(slots=True, eq=False)
class Versions:
    """A model's name and its versions."""

    name: str
    elsewhere: str = ""
    """Where versions may be that are not loaded here: see `Store.elsewhere`. Empty: nowhere."""
    loaded: dict[int, Model] = dataclasses.field(default_factory=dict)
    default: int = 0
    """The version that the name alone means. It is loaded whenever any version is, unless `wanted` is another."""
    wanted: int = 0
    """A chosen default that is not loaded yet; 0: `default` is the chosen one."""
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    history: History = dataclasses.field(default_factory=History)
    known: dict[int, KnownVersion] = dataclasses.field(default_factory=dict)
    highest: int = 0
    """The highest number that a version ever had."""
    change: int = 0
    """The number of changes of its document so far."""

    def changed(self, **fields: Any) -> Versions:
        """A copy with some fields changed, to be stored; it counts as one more change."""
        return dataclasses.replace(self, change=self.change + 1, **fields)

    @property
    def chosen(self) -> int:
        """The chosen default, loaded here or not; 0: none."""
        return self.wanted or self.default

    @property
    def meant(self) -> int:
        """The version that the name alone means. A substitute is used only if no server can have the default loaded."""
        return self.wanted if self.wanted and self.elsewhere else self.default

    def model(self, ref: ModelRef) -> Model:
        """The version that a reference means.

        Raises:
            VersionNotFound: it is not loaded, or the label does not exist.
        """
        version = self.default
        if ref.label is not None:
            labelled = self.labels.get(ref.label)
            if labelled is None:
                labels = sorted(self.labels) or "none"
                raise VersionNotFound(
                    f"label of model {self.name!r} must be one of those it has, {labels}; got {ref.label!r}",
                    model=self.name,
                )
            version = labelled
        elif ref.version is not None:
            version = ref.version
        return self.require(version)

    def require(self, version: int) -> Model:
        """A loaded version.

        Raises:
            VersionNotFound: it is not loaded.
        """
        found = self.loaded.get(version)
        if found is None:
            raise VersionNotFound(
                f"version of model {self.name!r} must be one that is loaded, {sorted(self.loaded)}; got {version}",
                model=self.name,
                version=str(version),
            )
        return found

    def missing(self) -> list[KnownVersion]:
        """The default and labelled versions that are wanted, not loaded here, and possibly loaded on another server."""
        chosen = dict.fromkeys((self.wanted, *sorted(self.labels.values()))) if self.elsewhere else {}
        found = [self.known[version] for version in chosen if version in self.known]
        return [known for known in found if known.is_wanted and known.version not in self.loaded]

    def among(self, versions: Collection[int] | None) -> list[Model]:
        """Those of some versions that are loaded; None: all loaded versions."""
        if versions is None:
            return list(self.loaded.values())
        return [self.loaded[version] for version in versions if version in self.loaded]

    def known_after(self, previous: int, version: int, *, leaves: bool) -> dict[int, KnownVersion]:
        """What is known once another version is the default; `leaves`: the previous one drains."""
        known = dict(self.known)
        if previous in known:
            known[previous] = dataclasses.replace(known[previous], is_leaving=leaves)
        known[version] = dataclasses.replace(known[version], is_leaving=False)
        return known

    def version_with(self, fingerprint: str) -> int | None:
        """The lowest version with a fingerprint, loaded or not: for records without a version."""
        found = [each for each in self.known.values() if each.fingerprint == fingerprint]
        lowest = min(found, key=lambda each: each.replaced or each.version, default=None)
        return None if lowest is None else lowest.version

    def trace(self, mark: Mark | None, fingerprint: str) -> RecordTrace | None:
        """Find where the session of a record is, by its mark and fingerprint; None: its version is unknown."""
        if mark is None:
            lowest = self.version_with(fingerprint)
            return None if lowest is None else RecordTrace(lowest, self.history.of(lowest, 0))
        known = self.known.get(mark.version)
        move = None if mark.is_pinned else self.history.of(mark.version, mark.epoch)
        if known is not None and known.fingerprint == fingerprint:
            return RecordTrace(mark.version, move)
        if move is not None and move.source != mark.version:  # the version has been forgotten
            return RecordTrace(move.source, move)
        former = self._replaced(mark.version, fingerprint)
        if former is None:
            return None
        return RecordTrace(former, None if mark.is_pinned else self.history.of(former, mark.epoch))

    def forget_unused(self, used: Collection[int]) -> None:
        """Forget versions that are not wanted and are not among the `used` ones, which have sessions."""
        needed = {*used, *self.loaded, *self.labels.values(), self.default, self.wanted}
        known = self.known
        free = {version for version, each in known.items() if version not in needed and not each.is_wanted}
        self.history = self.history.without(
            free, known.keys() - free, lambda one, other: known[one].layout == known[other].layout
        )
        gone = free - self.history.versions()
        self.known = {version: each for version, each in known.items() if version not in gone}

    def _replaced(self, version: int, fingerprint: str) -> int | None:
        return next(
            (
                each.version
                for each in self.known.values()
                if each.replaced == version and each.fingerprint == fingerprint
            ),
            None,
        )

    def replace_files(self, kept: Versions) -> None:
        """Restore what is loaded to its state before the restart, if no other server has any of it.

        If a version's file was replaced meanwhile, its number belongs to the new weights only. Moves of sessions
        that left the old ones are kept under another number, so those sessions still find their version.
        """
        self.known = {**kept.known, **self.known}
        self.history, self.labels = kept.history, kept.labels
        for version, model in self.loaded.items():
            was = kept.known.get(version)
            if was is None:
                continue
            if was.fingerprint == model.program.fingerprint:
                self.known[version] = dataclasses.replace(
                    self.known[version],
                    source=self.known[version].source or was.source,
                    tenant=was.tenant,
                    is_leaving=was.is_leaving,
                )
                continue
            if version in self.history.versions():
                number = min(*self.known, 0) - 1
                self.history = self.history.renumbered(version, number)
                self.known[number] = dataclasses.replace(
                    was, version=number, is_wanted=False, is_leaving=False, replaced=version
                )
            if (back := self._replaced(version, model.program.fingerprint)) is not None:
                self.history = self.history.renumbered(back, version)
                del self.known[back]
        self.highest = max(self.highest, kept.highest)
        if kept.wanted in self.loaded:
            self.default = kept.wanted
        else:
            self.wanted = kept.wanted

    def take(self, stored: Versions) -> None:
        """Apply the document of another server, `stored`; what is loaded here stays loaded."""
        known = dict(stored.known)
        for version in self.loaded:
            own, there = self.known[version], known.get(version)
            if there is not None and there.fingerprint == own.fingerprint:
                own = dataclasses.replace(there, source=own.source or there.source, loaded=own.loaded)
            known[version] = own
        self.known, self.labels, self.history = known, stored.labels, stored.history
        self.highest, self.change = max(self.highest, stored.highest), stored.change
        if stored.wanted in self.loaded:
            self.default, self.wanted = stored.wanted, 0
        else:
            self.wanted = stored.wanted


Absence = Callable[[ModelRef], ServerError | None]
"""Returns the error for a model or version that is being loaded, or could not be loaded. None: the reason is
unknown."""


class Models:
    """Models by name and version, and by their sessions. Lives on the event loop.

    Callers look models up each time, since they may be loaded and unloaded at any time.
    """

    def __init__(self, table: SessionTable, elsewhere: str, absent: Absence = lambda _ref: None) -> None:
        """For `elsewhere` see `Store.elsewhere`."""
        self._table = table
        self._elsewhere = elsewhere
        self._absent = absent
        self._by_name: dict[str, Versions] = {}
        self.by_index: dict[int, Model] = {}
        """Loaded versions, by their numbers in the table."""
        self._next = 0

    def __iter__(self) -> Iterator[Model]:
        """The versions that are loaded, in the order of names and versions."""
        return iter([served.loaded[version] for served in self.served() for version in sorted(served.loaded)])

    def ring(self) -> None:
        """Make each version's loop look for work."""
        for model in self:
            model.work.ring()

    def served(self) -> list[Versions]:
        """The models with a loaded version, sorted by name."""
        return [self._by_name[name] for name in self.names()]

    def new_index(self) -> int:
        """A number that no version has had."""
        self._next += 1
        return self._next - 1

    def versions(self, name: str) -> Versions:
        """What is known of a name; nothing of it need be loaded."""
        own = self._by_name.get(name)
        if own is None:
            own = self._by_name[name] = Versions(name, self._elsewhere)
        return own

    def add(self, model: Model, known: KnownVersion) -> None:
        """Serve a version that is not loaded yet."""
        own = self.versions(model.name)
        assert model.version not in own.loaded, "a version is loaded once"
        own.loaded[model.version] = self.by_index[model.index] = model
        own.known[model.version] = known
        own.highest = max(own.highest, model.version)
        if not own.default or own.wanted == model.version:
            own.default = model.version
        if own.wanted == model.version:
            own.wanted = 0

    def retire(self, model: Model) -> None:
        """Remove a version from the names; its sessions in the table still find it."""
        own = self._by_name[model.name]
        del own.loaded[model.version]
        if own.default == model.version:
            own.default = max(own.loaded, default=0)

    def forget(self, model: Model) -> None:
        """A retired version has no sessions in the table any more."""
        del self.by_index[model.index]
        model.sharing.discard(model.index)

    def all(self) -> list[Versions]:
        """All known names, loaded or not."""
        return list(self._by_name.values())

    def by_name(self, ref: str) -> Model:
        """The version that a reference means: NAME, NAME@VERSION or NAME:LABEL.

        Raises:
            ModelNotFound: no model has that name, or it has no such version.
        """
        own = self._by_name.get(ref)
        if own is not None and not own.wanted and (model := own.loaded.get(own.default)):  # the common case
            return model
        try:
            meant = parse_reference(ref)
        except ValueError as error:
            if self.is_pinned(ref):
                raise InvalidInput(f"model {error}") from error
            return self.named(ref).model(ModelRef(ref))
        own = self.named(meant.name)
        version = meant.version
        if version is None:
            version = own.labels.get(meant.label) if meant.label else own.meant
            if not meant.label and isinstance(
                why := self._absent(ModelRef(own.name, own.wanted)), ModelLoading
            ):
                raise why  # a default that will be loaded soon has no substitute
        if version is not None and version not in own.loaded and (why := self._away(meant.name, version)):
            raise why
        return own.model(meant)

    def _away(self, name: str, version: int | None, session_id: str = "") -> ServerError | None:
        """The error for a version that is not loaded here (None: the default), if the reason is known.

        A version that could not be loaded here may be loaded on another server; the error then says so.
        """
        own = self._by_name.get(name)
        why = self._absent(ModelRef(name, version))
        if own is None or isinstance(why, ModelLoading):
            return why
        version = own.wanted if version is None else version
        is_there = version in own.known or (version and session_id)
        return (self.elsewhere(name, version, session_id) if is_there else None) or why

    @staticmethod
    def is_pinned(ref: str) -> bool:
        """Whether sessions opened by a reference stay on their version: it has a version or a label."""
        return "@" in ref or ":" in ref

    def named(self, name: str) -> Versions:
        """A model with a loaded version.

        Raises:
            ModelNotFound: no such model.
        """
        own = self._by_name.get(name)
        if own is None or not own.loaded:
            if why := self._away(name, None):
                raise why
            raise ModelNotFound(f"model must be one of {self.names()}; got {name!r}", model=name)
        return own

    def find(self, name: str) -> Versions | None:
        """The model of a name with a loaded version, or None."""
        own = self._by_name.get(name)
        return own if own is not None and own.loaded else None

    def by_handle(self, handle: int) -> Model:
        """The version that a session is on."""
        return self.by_index[int(self._table.model[handle])]

    def names(self) -> list[str]:
        """The names with a loaded version, sorted."""
        return sorted(name for name, own in self._by_name.items() if own.loaded)

    def elsewhere(self, name: str, version: int, session_id: str = "") -> VersionElsewhere | None:
        """The error that sends the caller to another server for a version; None: no other server can have it."""
        if not self._elsewhere:
            return None
        whose = f"session {session_id!r} is on" if session_id else "the call needs"
        own = self._by_name.get(name)
        return VersionElsewhere(
            f"{whose} version {version} of model {name!r}, which must be loaded on this server; versions"
            f" {sorted(own.loaded) if own else []} are; {self._elsewhere}: call that server, or call again"
            f" after an admin has loaded it here (stepwell models load {name}@{version} PATH --no-default)",
            _RETRY_INTERVAL_S,
            model=name,
            version=str(version),
        )

    @staticmethod
    def later(name: str, session_id: str = "") -> VersionElsewhere:
        """The error for a session whose record names a move that is not known here yet."""
        whose = f"session {session_id!r}" if session_id else "a session"
        return VersionElsewhere(
            f"{whose} moved to another version of model {name!r}, which this server does not know yet; it was not"
            " applied: send it again",
            _SHORT_RETRY_INTERVAL_S,
            model=name,
        )

    @staticmethod
    def leaving(name: str, version: int, target: int) -> VersionElsewhere:
        """The error for a session on `version` here whose record and known moves say another version."""
        return VersionElsewhere(
            f"a session belongs to version {target} of model {name!r}, but is still on version {version} on this server for a"
            " moment; it was not applied: send it again",
            _SHORT_RETRY_INTERVAL_S,
            model=name,
        )

    def later_epoch(self, header: Header) -> int:
        """The epoch of a record, if it is later than any known here; else 0."""
        mark = mark_of(header.fields)
        own = self._by_name.get(header.model)
        known = 0 if own is None else own.history.epoch
        return 0 if mark is None or mark.is_pinned or mark.epoch <= known else mark.epoch

    def is_behind(self, header: Header) -> bool:
        """Whether a record names moves or a version that are unknown here; the store has their document."""
        own = self._by_name.get(header.model)
        if own is None or self.later_epoch(header):
            return True
        return own.trace(mark_of(header.fields), header.fingerprint) is None

    def place(self, session_id: str, header: Header) -> tuple[Model, Move | None]:
        """The version that a stored session is on now, and the move it made since its record was written.

        Raises:
            VersionElsewhere: that version is not loaded here, or not known yet, and may be on another server.
            ModelNotFound: its model, or that version of it, is not loaded.
            ModelMismatch: no version ever loaded here has the record's fingerprint.
        """
        own = self.find(header.model)
        if own is None:
            raise self._away(header.model, None, session_id) or ModelNotFound(
                f"session {session_id!r} belongs to model {header.model!r}, which is not loaded;"
                f" model must be one of {self.names()}. Serve it again, or close the session",
                model=header.model,
            )
        if self.later_epoch(header):
            raise self.later(header.model, session_id)
        mark = mark_of(header.fields)
        trace = own.trace(mark, header.fingerprint)
        if trace is None and mark is not None and mark.version not in own.known:
            # it may have been forgotten here, while a server still has it loaded
            elsewhere = self.elsewhere(header.model, mark.version, session_id)
            if elsewhere is not None and mark.version <= own.highest:
                raise elsewhere
        if trace is None or trace.now < 0:
            raise ModelMismatch(
                f"session {session_id!r} belongs to model {header.model!r} with fingerprint"
                f" {header.fingerprint[:FINGERPRINT_DIGITS]}; the loaded version has"
                f" {own.loaded[own.default].program.fingerprint[:FINGERPRINT_DIGITS]}."
                " Serve that model file again, or close the session",
                model=header.model,
            )
        model = own.loaded.get(trace.now)
        if model is None:
            raise self._away(header.model, trace.now, session_id) or VersionNotFound(
                f"session {session_id!r} is on version {trace.now} of model {header.model!r}, which is not loaded;"
                f" loaded are {sorted(own.loaded)}. Load it again, make another version the default with"
                " sessions=carry, or close the session",
                model=header.model,
                version=str(trace.now),
            )
        return model, trace.move

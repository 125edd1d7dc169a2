"""The models that are served: the one place that knows them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import ModelNotFound


class Models:
    """Models by name, and by the sessions that they have. Lives on the event loop.

    Who needs a model asks here each time: models come and go.
    """

    def __init__(self, table: SessionTable, failed: Collection[str] = ()) -> None:
        self._table = table
        self._failed = frozenset(failed)
        """Those that the server was to serve and could not load."""
        self._by_name: dict[str, Model] = {}
        self.by_index: dict[int, Model] = {}
        """Those that are served, by their numbers."""
        self._next = 0

    def __iter__(self) -> Iterator[Model]:
        """The models in the order of their names."""
        return iter([self._by_name[name] for name in sorted(self._by_name)])

    def new_index(self) -> int:
        """A number that no other model has, or had."""
        self._next += 1
        return self._next - 1

    def add(self, model: Model) -> None:
        """Serve a model from now on, under a name that no other has."""
        assert model.name not in self._by_name, "a name stands for one model"
        self._by_name[model.name] = self.by_index[model.index] = model

    def retire(self, model: Model) -> None:
        """Serve a model no longer; it has no sessions in the table."""
        del self._by_name[model.name], self.by_index[model.index]

    def by_name(self, name: str) -> Model:
        """The model served under a name.

        Raises:
            ModelNotFound: there is none.
        """
        model = self._by_name.get(name)
        if name in self._failed:
            raise ModelNotFound(
                f"model {name!r} is not served: it could not be loaded when the server started, whose log says why",
                model=name,
            )
        if model is None:
            raise ModelNotFound(f"model must be one of {self.names()}; got {name!r}", model=name)
        return model

    def find(self, name: str) -> Model | None:
        """The model served under a name, or None."""
        return self._by_name.get(name)

    def by_handle(self, handle: int) -> Model:
        """The model of a session."""
        return self.by_index[int(self._table.model[handle])]

    def names(self) -> list[str]:
        """The names, in order."""
        return sorted(self._by_name)

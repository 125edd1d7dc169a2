"""Versions of models as requests name them, with the tensors and statistics of each."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepwell_server.core.model_names import MAX_VERSION, is_version
from stepwell_server.errors import InvalidInput, ModelLoading, ModelNotFound
from stepwell_server.rpc.triton.errors import unknown_model
from stepwell_server.rpc.triton.statistics import PassObserver, RequestStatistics
from stepwell_server.rpc.triton.tensors import Inputs, ModelTensors, Tensor

if TYPE_CHECKING:
    from stepwell_server.engine.engine import Engine
    from stepwell_server.program import Program

_DIGITS = 19
_SHOWN = 160


def read_version(text: str) -> int | None:
    """The version that a request names; None: the default one.

    Raises:
        InvalidInput: it is no number.
    """
    if not text:
        return None
    if text.isascii() and text.isdigit() and len(text) <= _DIGITS and int(text) <= MAX_VERSION:
        return int(text)
    raise InvalidInput(
        f"failed to get model version from specified version string '{text[:_SHOWN]}' (details: stol), version should"
        " be an integral value > 0"
    )


class InferModel:
    """A version of a model with what this protocol needs of it. It keeps nothing of an unloaded program in memory."""

    def __init__(self, name: str, version: int, program: Program, observer: PassObserver) -> None:
        self.name = name
        self.version = version
        self.tensors = ModelTensors(name, program)
        self.statistics = RequestStatistics(name, version, observer)
        self._program = weakref.ref(program)

    @property
    def program(self) -> Program:
        """Its program.

        Raises:
            ModelNotFound: it was unloaded.
        """
        program = self._program()
        if program is None:
            raise unknown_model(self.name, str(self.version))
        return program

    def is_of(self, program: Program | None) -> bool:
        """Whether it was made of a program; None: of one that is not in memory any more."""
        return self._program() is program


class InferModels:
    """The loaded versions, as the engine lists them each time. Lives on the event loop."""

    def __init__(self, engine: Engine, observer: PassObserver) -> None:
        self._engine = engine
        self._observer = observer
        self._known: dict[tuple[str, int], InferModel] = {}
        """What was made of the versions that requests have named."""

    def find(self, name: str, version: str) -> InferModel:
        """The version of a request: the default one if it says none.

        Raises:
            InvalidInput: the version is no number.
            ModelNotFound: the model is not served, or not in that version.
            ModelLoading: it will be.
        """
        return self.numbered(name, read_version(version))

    def numbered(self, name: str, version: int | None) -> InferModel:
        """A version by its number; None: the default one. Errors as of `find`."""
        programs = self._programs(name)
        number = self._engine.version(name) if version is None else version
        if number not in programs:
            raise self._missing(name, number)
        return self._of(name, number, programs)

    def all(self, name: str) -> list[InferModel]:
        """All versions of a model, ascending.

        Raises:
            ModelNotFound: it is not served.
        """
        programs = self._programs(name)
        return [self._of(name, number, programs) for number in programs]

    def known(self, name: str, version: int) -> InferModel | None:
        """A version that requests have named, if it is still loaded."""
        try:
            return self.numbered(name, version)
        except ModelNotFound:
            return None

    def alike(self, model: InferModel) -> Collection[int] | None:
        """The versions of a model with the same inputs and outputs as this one; None: all of them have."""
        programs = self._programs(model.name)
        if len(programs) == 1:
            return None
        own = model.program
        same = [n for n, one in programs.items() if (one.inputs, one.outputs) == (own.inputs, own.outputs)]
        return None if len(same) == len(programs) else same

    def _programs(self, name: str) -> Mapping[int, Program]:
        try:
            return self._engine.programs(name)
        except ModelLoading:
            raise
        except ModelNotFound:
            raise unknown_model(name) from None

    def _missing(self, name: str, version: int) -> ModelNotFound:
        if is_version(version):
            try:
                self._engine.version(f"{name}@{version}")
            except ModelLoading as error:
                return error
            except ModelNotFound:
                pass  # Triton's words are used
        return unknown_model(name, str(version))

    def _of(self, name: str, version: int, programs: Mapping[int, Program]) -> InferModel:
        program = programs[version]
        known = self._known.get((name, version))
        if known is None or not known.is_of(program):
            self._known = {key: one for key, one in self._known.items() if not one.is_of(None)}
            known = self._known[name, version] = InferModel(name, version, program, self._observer)
        return known


class Read(NamedTuple):
    """The tensors of a request, as a version of its model has them."""

    model: InferModel
    outputs: Sequence[Tensor]
    """Those that are to come back."""
    inputs: Inputs

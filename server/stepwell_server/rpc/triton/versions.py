"""Versions of models as requests name them, and what this protocol needs of each."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepwell_server.core.model_names import MAX_VERSION, is_version
from stepwell_server.errors import InvalidInput, ModelLoading, ModelNotFound
from stepwell_server.rpc.triton.errors import unknown_model
from stepwell_server.rpc.triton.statistics import PassObserver, RequestStatistics, Timing
from stepwell_server.rpc.triton.tensors import Inputs, ModelTensors, Tensor

if TYPE_CHECKING:
    from stepwell_server.engine.engine import Engine
    from stepwell_server.program import Program
    from stepwell_server.rpc.triton.inference import service_pb2 as pb

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
    """A version of a model with what this protocol needs of it. It does not keep the program in memory."""

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
        """Whether it was made of a program."""
        return program is not None and self._program() is program

    @property
    def is_gone(self) -> bool:
        """Its program is not in memory any more."""
        return self._program() is None


class InferModels:
    """The versions that are loaded; which these are, the engine says each time. Lives on the event loop."""

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

    def loaded(self, name: str) -> Collection[int]:
        """The numbers of the versions of a model. Errors as of `all`."""
        return self._programs(name).keys()

    def alike(self, model: InferModel) -> Collection[int] | None:
        """The versions of a model with the same inputs and outputs as this one; None: all of them have."""
        programs = self._programs(model.name)
        if len(programs) == 1:
            return None
        own = model.program
        same = [
            number
            for number, program in programs.items()
            if program.inputs == own.inputs and program.outputs == own.outputs
        ]
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
                pass  # it is told as Triton does
        return unknown_model(name, str(version))

    def _of(self, name: str, version: int, programs: Mapping[int, Program]) -> InferModel:
        program = programs[version]
        known = self._known.get((name, version))
        if known is None or not known.is_of(program):
            self._known = {key: one for key, one in self._known.items() if not one.is_gone}
            known = self._known[name, version] = InferModel(name, version, program, self._observer)
        return known


class Read(NamedTuple):
    """The tensors of a request, as a version of its model has them."""

    model: InferModel
    outputs: Sequence[Tensor]
    """Those that are to come back."""
    inputs: Inputs


class Reading:
    """Reads the tensors of a request when it is known which version of its model they are for."""

    def __init__(self, models: InferModels, request: pb.ModelInferRequest) -> None:
        """Find the model.

        Raises:
            InvalidInput, ModelNotFound: as of `InferModels.find`.
        """
        self._models = models
        self._request = request
        self.asked = read_version(request.model_version)
        """The version that the request names; None: none."""
        self.timing = Timing(time.perf_counter_ns())
        self.model = models.numbered(request.model_name, self.asked)
        """The version that it is for, as far as that is known."""

    def read(self, version: int | None = None) -> Read:
        """Read them for a version; None: the one that is asked for, or is the default now.

        Raises:
            InvalidInput, Unsupported: they do not fit.
            ModelNotFound: it is not loaded.
        """
        began = time.perf_counter_ns()
        self.model = self._models.numbered(self._request.model_name, version or self.asked)
        tensors = self.model.tensors
        read = Read(self.model, self._outputs_of(self.model), tensors.read(self._request))
        # what the request waited for before is the queue's
        self.timing.read = self.timing.arrived + time.perf_counter_ns() - began
        return read

    def read_answered(self, version: int) -> Read:
        """Read them for the version that has answered the request before, or the one asked for if it is not loaded."""
        is_loaded = self._models.known(self._request.model_name, version) is not None
        return self.read(version if is_loaded else None)

    def answered(self, read: Read, version: int, names: Collection[str]) -> Read:
        """As read, for the version that gave the answer with outputs of these names.

        It is another one than was expected where the default has moved meanwhile.

        Raises:
            ModelNotFound: nobody knows any more what its outputs were.
        """
        if (
            version
            and version != read.model.version
            and (model := self._models.known(read.model.name, version))
        ):
            self.model = model
            read = Read(model, self._outputs_of(model), read.inputs)
        if any(tensor.spec.name not in names for tensor in read.outputs):
            raise unknown_model(read.model.name, str(version))
        return read

    def _outputs_of(self, model: InferModel) -> Sequence[Tensor]:
        wanted = [(output.name, output.parameters) for output in self._request.outputs]
        return model.tensors.requested(wanted, self._request.id)

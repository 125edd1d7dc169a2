"""A model compiled as a server does it, by workers of one fork server for all tests of a process."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.host.limits import Limits
from stepwell_server.compile.host.processes import ForkServer
from stepwell_server.program import Program, ProofOptions

#: It imports TensorFlow once. What a worker may see of tests before is nothing: the fork server never sees a model.
_FORK_SERVER = ForkServer()
atexit.register(_FORK_SERVER.end)


def compile_program(
    model: Path,
    cache_dir: Path,
    imports: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    options: ProofOptions | None = None,
    limits: Limits | None = None,
    clock: Clock | None = None,
    data: Path | None = None,
) -> Program:
    """See `WarmCompiler.compile`; for one thread at a time.

    Who tests the fork server, or what it has of this process's environment, has a compiler of their own.
    """
    compiler = WarmCompiler(cache_dir, imports, limits, clock)
    # Private, because servers have one compiler each: nobody but tests has several that may share one.
    compiler._fork_server = _FORK_SERVER
    return compiler.compile(model, progress, options, data=data, keep=False)

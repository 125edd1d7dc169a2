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

#: It imports TensorFlow once. A worker sees nothing of earlier tests: the fork server never sees a model.
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

    Tests of the fork server, or of the environment that it inherits, make their own compiler.
    """
    compiler = WarmCompiler(cache_dir, imports, limits, clock)
    # Private, because a server has one compiler: only tests have several that may share a fork server.
    compiler._fork_server = _FORK_SERVER
    return compiler.compile(model, progress, options, data=data, keep=False)

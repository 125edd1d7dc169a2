"""A model compiled as a server does it, by processes that end with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.compile.limits import Limits
from stepwell_server.compile.warm import WarmCompiler
from stepwell_server.program import Program, ProofOptions


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
    """See `WarmCompiler.compile`. Who compiles several models has one of those."""
    with WarmCompiler(cache_dir, imports, limits, clock) as compiler:
        return compiler.compile(model, progress, options, data=data, keep=False)

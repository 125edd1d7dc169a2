"""What the commands that compile a model have in common: the options of it, and a signal that ends it cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from stepwell.cli._types import Duration, Size
from stepwell_server.cli.setting import setting
from stepwell_server.cli.values import ModuleName, PathOf
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.host.limits import Limits
from stepwell_server.program import Program, ProofOptions
from stepwell_server.settings import default_cache_dir

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Compiling:
    """How a model is to be compiled."""

    imports: tuple[str, ...]
    proof: ProofOptions
    limits: Limits
    given_cache_dir: Path | None

    @property
    def cache_dir(self) -> Path:
        """The folder for compiled models.

        Raises:
            SettingsError: none is given, and there is no home.
        """
        return self.given_cache_dir or default_cache_dir()

    def compiler(self) -> WarmCompiler:
        """What compiles it; a context manager, at whose end no process is left.

        Raises:
            SettingsError: no cache is given, and there is no home.
        """
        return WarmCompiler(self.cache_dir, self.imports, self.limits)


def compile_options(function: Function) -> Function:
    """Add the options of compiling to a command; its function gets them as `compiling`."""

    @functools.wraps(function)
    def with_compiling(
        *args: Any,
        imports: tuple[str, ...],
        probe_steps: int | None,
        trust_causality: bool,
        cache_dir: Path | None,
        max_model_bytes: int | None,
        max_compile_memory_bytes: int | None,
        compile_timeout_s: float | None,
        **options: Any,
    ) -> Any:
        given: dict[str, Any] = {
            "model_bytes": max_model_bytes,
            "memory_bytes": max_compile_memory_bytes,
            "timeout_s": compile_timeout_s,
        }
        limits = dataclasses.replace(
            Limits(), **{name: value for name, value in given.items() if value is not None}
        )
        proof = ProofOptions(probe_steps, trust_causality)
        return function(*args, compiling=Compiling(imports, proof, limits, cache_dir), **options)

    added = [
        click.option(
            "--import",
            "imports",
            metavar="MODULE",
            multiple=True,
            type=ModuleName(),
            help="Module to import first, for the model's own layers and functions. May be given again.",
        ),
        click.option(
            "--probe-steps",
            metavar="N",
            type=click.IntRange(1, 100_000),
            help="Time steps over which the proof compares, if more than 512 and twice what the layers reach.",
        ),
        click.option(
            "--trust-causality",
            is_flag=True,
            help="Go on where the graph does not prove that the model may be stepped.",
        ),
        setting(
            "--cache-dir", metavar="DIR", type=PathOf("dir"), help="Folder for compiled models, as of serve."
        ),
        setting(
            "--max-model-bytes",
            metavar="SIZE",
            type=Size(1),
            help="What the file may hold when it is unpacked; a larger one is refused.",
        ),
        setting(
            "--max-compile-memory-bytes",
            metavar="SIZE",
            type=Size(1),
            help="Memory that compiling may take. Default: three quarters of what there is. Linux only.",
        ),
        setting(
            "--compile-timeout-s",
            metavar="TIME",
            type=Duration(),
            help="Time that compiling may take; 0 means as long as it takes.",
        ),
    ]
    for option in reversed(added):
        option(with_compiling)
    return with_compiling  # type: ignore[return-value]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the block like Ctrl-C: a compiling process is ended, and its file removed, on the way."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def progress(stage: str) -> None:
    """Say on stderr which stage begins."""
    click.echo(f"{stage}...", err=True)


def proof_json(program: Program) -> dict[str, object]:
    """How a program was proven, as programs read it."""
    return {
        "compared_steps": program.proof.steps,
        "compared_share": program.proof.compared,
        "unproven": program.proof.unproven,
    }


def proof_lines(program: Program) -> list[str]:
    """How a program was proven and what runs it, for people."""
    lines = [f"proof: {program.proof}"]
    if program.proof.unproven:
        lines.append(f"not proven: {program.proof.unproven}")
    lines.append(f"executor: {program.executor} ({program.executor_reason})")
    return lines

"""`stepwell models`: the models of a server, and compiled models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import click
from click.shell_completion import CompletionItem

from stepwell import _install
from stepwell._state.display import short
from stepwell.cli import model_changes
from stepwell.cli._of_server import MODEL_FILES, entry_point
from stepwell.cli.sessions import time_text
from stepwell.cli.toolkit import complete, render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Listing
from stepwell.cli.toolkit.target import Target, json_option, server_options

if TYPE_CHECKING:
    from stepwell import ModelInfo, ModelVersionInfo, ProvenanceInfo, TensorInfo


VERSION_HEADINGS = [
    "MODEL",
    "VERSION",
    "STATE",
    "DEFAULT",
    "LABELS",
    "SESSIONS",
    "FINGERPRINT",
    "LOADED",
    "WHY",
]
MODEL_KEYS = (
    ("name", "the name it is served under"),
    ("fingerprint", "hash of architecture and weights; a state belongs to one"),
    (
        "inputs, outputs, state",
        "lists of name, dtype, shape (of one row at one time step), temporal; of a state also window (time steps it holds)",
    ),
    ("executor", '"litert", "tensorflow" or "onnxruntime"'),
    ("executor_reason", "why that executor, as a sentence"),
    ("batch_sizes", "batch sizes that batches are padded to; empty: any"),
    ("state_row_bytes", "size of the state of one row, in bytes"),
    ("changed_state_row_bytes", "size of the values in it that one time step replaces, in bytes"),
    ("multiply_adds", "multiplications of one time step of one row; null: not counted"),
    ("sessions", "open sessions"),
    ("version", "the version described here: the default; 0 for a file"),
    ("versions", "list of all versions of the model:"),
    ("versions.version", "its number"),
    ("versions.state", '"loading", "ready", "draining" (served until its sessions end) or "failed"'),
    ("versions.reason", "explanation of the state, as a sentence; usually empty"),
    ("versions.fingerprint", "its fingerprint; empty until it is known"),
    ("versions.is_default", "whether the name alone refers to it"),
    ("versions.labels", "its labels"),
    ("versions.sessions", "open sessions on it, among those in memory"),
    ("versions.path", "path of its file on the server; empty: not reported"),
    ("versions.loaded_time", "when it was loaded (RFC 3339, UTC); null: not loaded"),
    ("proof", "the evidence that it can be stepped:"),
    ("proof.compared_steps", "length of the sequences on which it was compared with Keras"),
    ("proof.compared_share", "share of their rows and time steps for which the comparison is conclusive"),
    (
        "proof.rows",
        'for a step function (.onnx), why its rows never mix: "proven", "alone" or "trusted"; else empty',
    ),
    ("proof.unproven", "the property that its graph does not prove and that is trusted; else empty"),
)
PROVENANCE_KEYS = (
    ("provenance", "origin of its program; null: not known:"),
    ("provenance.source", "name of the file that Keras saved"),
    ("provenance.source_sha256", "its SHA-256"),
    ("provenance.compiled_time", "when it was compiled (RFC 3339, UTC)"),
    ("provenance.versions", "versions of stepwell, tensorflow, keras and ai-edge-litert at that time"),
    ("provenance.processor", "architecture of the processor that compiled it"),
    ("provenance.parameters", "number of its weights"),
    ("provenance.layers", "list, in the model's order: name, kind (its class), output (shape), parameters"),
)


@click.group(
    cls=Listing,
    short_help="Show the models of a server; load, unload and choose versions.",
    examples=(
        "stepwell models",
        "stepwell models --versions",
        "stepwell models --json | jq -r '.models[].name'",
        "stepwell models show forecast",
        "stepwell models show forecast.stepwell",
    ),
    json_keys=(
        ("front", 'the network front: "native" or "python"'),
        ("models", "list, sorted by name; of each:"),
        *MODEL_KEYS,
    ),
)
@click.option("--versions", is_flag=True, help="Show the versions of each model, one per line.")
@json_option
@server_options
@click.pass_context
def models(ctx: click.Context, target: Target, versions: bool, as_json: bool) -> None:
    """Show the models of a server: their inputs, outputs and states, and their executors.

    In a shape, B is the batch size of the session and T the number of time steps; you may leave out T for one time
    step. Fingerprints are shortened; --json has them whole. All columns but VERSIONS describe the default version,
    which has a star. The last line shows the front of the server (serve --front).
    """
    if ctx.invoked_subcommand is not None:
        cast(Listing, ctx.command).require_no_options(ctx)
        return
    with target.connect("Reading the models") as client:
        server = client.server_info()
    if as_json:
        render.print_json({"front": server.front, "models": [model_json(model) for model in server.models]})
        return
    if not server.models:
        click.echo("no models", err=True)
    elif versions:
        rows = [version_cells(model, each) for model in server.models for each in model.versions]
        render.print_records(VERSION_HEADINGS, rows, right=("VERSION", "SESSIONS"))
        return
    else:
        headings = (
            "MODEL",
            "VERSIONS",
            "FINGERPRINT",
            "INPUTS",
            "OUTPUTS",
            "STATE",
            "SESSIONS",
            "PROOF",
            "EXECUTOR",
            "WHY",
        )
        render.print_records(headings, [model_cells(model) for model in server.models], right=("SESSIONS",))
    click.echo(f"front: {front_text(server.front)}")


def front_text(front: str) -> str:
    """The front of a server, with a hint how to install the native one."""
    hint = f" (slower; for the native front, run on the server: {_install.advice(_install.NATIVE_FRONT)})"
    return front + (hint if front == "python" else "")


def model_cells(model: ModelInfo) -> tuple[str, ...]:
    """A model as a row of the table."""
    return (
        model.name,
        "\n".join(map(version_text, model.versions)) or "1",
        short(model.fingerprint),
        "\n".join(map(render.shape_text, model.inputs)),
        "\n".join(map(render.shape_text, model.outputs)),
        "\n".join(map(render.shape_text, model.state)),
        str(model.sessions),
        str(model.proof),
        model.executor,
        model.executor_reason,
    )


def version_text(version: ModelVersionInfo) -> str:
    """A version in a few words: `2*`, `3 canary`, `4 loading`."""
    state = () if version.state == "ready" else (version.state or "unknown",)
    return " ".join([f"{version.version}{'*' * version.is_default}", *version.labels, *state])


def version_cells(model: ModelInfo, version: ModelVersionInfo) -> tuple[str, ...]:
    """A version as a row of the table."""
    return (
        model.name,
        str(version.version),
        version.state or "unknown",
        "yes" if version.is_default else "",
        ", ".join(version.labels),
        str(version.sessions),
        short(version.fingerprint),
        "" if version.loaded_time is None else time_text(version.loaded_time),
        version.reason,
    )


def version_json(version: ModelVersionInfo) -> dict[str, object]:
    """A version as JSON."""
    return {
        "version": version.version,
        "state": version.state,
        "reason": version.reason,
        "fingerprint": version.fingerprint,
        "is_default": version.is_default,
        "labels": list(version.labels),
        "sessions": version.sessions,
        "path": version.path,
        "loaded_time": None if version.loaded_time is None else time_text(version.loaded_time),
    }


def model_json(model: ModelInfo) -> dict[str, object]:
    """A model as JSON."""
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "inputs": [spec_json(spec) for spec in model.inputs],
        "outputs": [spec_json(spec) for spec in model.outputs],
        "state": [spec_json(spec) | {"window": spec.window} for spec in model.state],
        "executor": model.executor,
        "executor_reason": model.executor_reason,
        "batch_sizes": list(model.batch_sizes),
        "state_row_bytes": model.state_row_bytes,
        "changed_state_row_bytes": model.changed_state_row_bytes,
        "multiply_adds": model.multiply_adds,
        "sessions": model.sessions,
        "version": model.version,
        "versions": [version_json(version) for version in model.versions],
        "proof": {
            "compared_steps": model.proof.compared_steps,
            "compared_share": model.proof.compared_share,
            "rows": model.proof.rows,
            "unproven": model.proof.unproven,
        },
    }


def spec_json(spec: TensorInfo) -> dict[str, object]:
    """A tensor of a model as JSON."""
    return {
        "name": spec.name,
        "dtype": str(spec.dtype),
        "shape": list(spec.shape),
        "temporal": spec.temporal,
    }


def _complete_model_or_file(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Models of the server, and files, which the shell finds."""
    return [*complete.references(ctx, param, incomplete), CompletionItem(incomplete, type="file")]


@models.command(
    "show",
    short_help="Show one model of the server, or a compiled file.",
    examples=(
        "stepwell models show forecast",
        "stepwell models show forecast@2",
        "stepwell models show ./forecast.stepwell --json",
    ),
    json_keys=(
        *MODEL_KEYS[:9],
        ("sessions", "open sessions; null for a file"),
        ("version, versions", "as in stepwell models; 0 and empty for a file"),
        *MODEL_KEYS[-5:],
        *PROVENANCE_KEYS,
    ),
)
@click.argument(
    "model", metavar="NAME[@VERSION|:LABEL]|FILE.stepwell", shell_complete=_complete_model_or_file
)
@json_option
@server_options
def show(target: Target, model: str, as_json: bool) -> None:
    """Show one model: its tensors, its proof, and the origin of its program.

    A name that ends in .stepwell, or has a slash in it, is a file of stepwell compile. It is read and checked on this
    machine, without a server. Other names are models of the server: NAME for the default version, NAME@VERSION or
    NAME:LABEL.
    """
    is_file = model.endswith(".stepwell") or os.sep in model
    if is_file:
        info = read_file(model)
    else:
        with target.connect("Reading the model") as client, _explained(model):
            info = client.model(model)
    if as_json:
        document = model_json(info) | {"provenance": provenance_json(info.provenance)}
        render.print_json(document | ({"sessions": None} if is_file else {}))
        return
    of_server = [
        ("version", str(info.version)),
        ("versions", "\n".join(map(version_text, info.versions))),
        ("sessions", str(info.sessions)),
    ]
    render.print_facts([*facts(info), *([] if is_file else of_server)])
    layers = info.provenance.layers if info.provenance is not None else ()
    if layers:
        click.echo()
        render.print_table(
            ("LAYER", "CLASS", "OUTPUT", "PARAMETERS"),
            [(layer.name, layer.kind, layer.output, str(layer.parameters)) for layer in layers],
            right=("PARAMETERS",),
        )


@contextlib.contextmanager
def _explained(model: str) -> Iterator[None]:
    """Explain which commands take files, if a file is given instead of a served model."""
    from stepwell.errors import InvalidInputError, ModelNotFoundError

    try:
        yield
    except (InvalidInputError, ModelNotFoundError) as error:
        if not (model.endswith(".keras") or os.path.isfile(model)):
            raise
        raise Failure(
            f"{error}. This command takes the name of a served model, or a .stepwell file. For a Keras file, use stepwell check"
            f" {model}, or stepwell compile {model} -o {model.removesuffix('.keras')}.stepwell"
        ) from None


def read_file(path: str) -> ModelInfo:
    """Returns the description in a file of a compiled model.

    Raises:
        Failure: It cannot be read.
    """
    from stepwell import ModelInfo

    described = entry_point(MODEL_FILES, "stepwell")
    try:
        return ModelInfo._from_message(described(path))
    except (ValueError, OSError) as error:
        raise Failure(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def facts(info: ModelInfo) -> list[tuple[str, str]]:
    """A model as names with values, for people."""
    found = [
        ("model", info.name),
        ("fingerprint", info.fingerprint),
        ("inputs", "\n".join(map(render.shape_text, info.inputs))),
        ("outputs", "\n".join(map(render.shape_text, info.outputs))),
        ("state", "\n".join(map(state_text, info.state)) or "none"),
        (
            "state size",
            f"{info.state_row_bytes} bytes per row; a time step replaces {info.changed_state_row_bytes}",
        ),
        ("cost", cost_text(info)),
        ("executor", f"{info.executor} ({info.executor_reason})"),
        ("batch sizes", ", ".join(map(str, info.batch_sizes)) or "any"),
        ("proof", str(info.proof)),
    ]
    if info.proof.unproven:
        found.append(("not proven", info.proof.unproven))
    origin = info.provenance
    if origin is None:
        return found
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return [
        *found,
        ("source", f"{origin.source} (SHA-256 {origin.source_sha256})"),
        ("compiled", f"{time_text(origin.compiled_time)} on {origin.processor} by {versions}"),
        ("parameters", str(origin.parameters)),
    ]


def state_text(spec: TensorInfo) -> str:
    """A state with its shape, and what it holds if it is a window over time."""
    shape = render.shape_text(spec)
    return f"{shape}: the last {spec.window} time steps" if spec.window else shape


def cost_text(info: ModelInfo) -> str:
    """The number of multiplications of a model."""
    if info.multiply_adds is None:
        return "not counted"
    return f"{info.multiply_adds} multiply-adds per row and time step"


def provenance_json(origin: ProvenanceInfo | None) -> dict[str, object] | None:
    """The origin of a program as JSON."""
    if origin is None:
        return None
    return {
        "source": origin.source,
        "source_sha256": origin.source_sha256,
        "compiled_time": time_text(origin.compiled_time),
        "versions": dict(origin.versions),
        "processor": origin.processor,
        "parameters": origin.parameters,
        "layers": [
            {"name": layer.name, "kind": layer.kind, "output": layer.output, "parameters": layer.parameters}
            for layer in origin.layers
        ],
    }


for _command in (model_changes.load, model_changes.unload, model_changes.default, model_changes.label):
    models.add_command(_command)

"""Write docs/surface/, what others rely on, one fact a line; or check with `--check` that it is up to date.

    python scripts/surface.py           write it
    python scripts/surface.py --check   write nothing; fail and show each difference

A difference is a change that users may notice: the commit that makes it names it and its reason. The files are the
SDK's signatures, the commands with their options, the protocols, the reasons of errors and the metrics.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from signatures import Signatures

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import (
        DescriptorProto,
        EnumDescriptorProto,
        FieldDescriptorProto,
        FileDescriptorProto,
        MethodDescriptorProto,
    )
    from prometheus_client.metrics_core import Metric

    from stepwell_server.errors import ServerError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "surface"
HEADING = "# Made by scripts/surface.py (make surface); do not edit.\n"
METRICS = ROOT / "server" / "stepwell_server" / "metrics"
#: What makes a metric, its name being the first argument.
MAKES_METRIC = re.compile(r"^(Counter|Histogram|counter|gauge|histogram|info)$")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if anything differs")
    options = parser.parse_args(arguments)
    files = {
        f"{name}.txt": HEADING + "".join(f"{line}\n" for line in lines()) for name, lines in FILES.items()
    }
    if not options.check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    found = differences(files)
    for line in found:
        print(line)
    if found:
        print(
            "docs/surface is out of date. If each difference is meant, run `make surface`, and name each of them in"
            " the commit's body.",
            file=sys.stderr,
        )
    return 1 if found else 0


def differences(files: dict[str, str]) -> list[str]:
    """What the files under docs/surface/ have less (-) and more (+) than they should."""
    present = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*")}
    found: list[str] = []
    for name in sorted(files.keys() | present.keys()):
        before, after = (side.get(name, "").splitlines() for side in (present, files))
        lines = difflib.unified_diff(
            before, after, f"docs/surface/{name}", "what the code says", n=0, lineterm=""
        )
        found += [line for line in lines if not line.startswith("@@")]
    return found


def sdk() -> list[str]:
    """What the SDK's modules offer."""
    return Signatures().lines()


def commands() -> list[str]:
    """The commands and their options."""
    import command_facts

    return command_facts.lines()


def protocol() -> list[str]:
    """The messages, enums and services of the protocols that the server speaks."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    from stepwell.v1 import errors_pb2, models_pb2, sessions_pb2, tensors_pb2
    from stepwell_server.rpc.triton.inference import service_pb2

    lines: list[str] = []
    for module in (errors_pb2, models_pb2, sessions_pb2, tensors_pb2, service_pb2):
        lines += lines_of_file(FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb))
    return sorted(lines)


def lines_of_file(file: FileDescriptorProto) -> Iterator[str]:
    """The facts of a .proto file."""
    for message in file.message_type:
        yield from lines_of_message(f"{file.package}.{message.name}", message)
    for enum in file.enum_type:
        yield from lines_of_enum(f"{file.package}.{enum.name}", enum)
    for service in file.service:
        yield f"{file.package}.{service.name}: service"
        for method in service.method:
            yield from lines_of_method(f"{file.package}.{service.name}.{method.name}", method)


def lines_of_message(full: str, message: DescriptorProto) -> Iterator[str]:
    """A message, its fields and what is nested in it."""
    yield f"{full}: message"
    maps = {f".{full}.{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    for field in message.field:
        entry = maps.get(field.type_name)
        kind = f"map<{type_of(entry.field[0])}, {type_of(entry.field[1])}>" if entry else with_label(field)
        oneof = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            oneof = f" of oneof {message.oneof_decl[field.oneof_index].name}"
        deprecated = " (deprecated)" if field.options.deprecated else ""
        yield f"{full}.{field.name} = {field.number}: {kind}{oneof}{deprecated}"
    for span in message.reserved_range:
        yield f"{full}: numbers {span.start} to {span.end - 1} reserved"
    for name in message.reserved_name:
        yield f"{full}: name {name} reserved"
    for nested in message.nested_type:
        if not nested.options.map_entry:
            yield from lines_of_message(f"{full}.{nested.name}", nested)
    for enum in message.enum_type:
        yield from lines_of_enum(f"{full}.{enum.name}", enum)


def lines_of_enum(full: str, enum: EnumDescriptorProto) -> Iterator[str]:
    """An enum and its values."""
    yield f"{full}: enum"
    for value in enum.value:
        yield f"{full}.{value.name} = {value.number}"


def lines_of_method(full: str, method: MethodDescriptorProto) -> Iterator[str]:
    """What a method takes and answers, and where it is for JSON."""
    from google.api import annotations_pb2

    takes = ("stream " if method.client_streaming else "") + method.input_type.lstrip(".")
    answers = ("stream " if method.server_streaming else "") + method.output_type.lstrip(".")
    yield f"{full}: {takes} -> {answers}"
    rule = method.options.Extensions[annotations_pb2.http]
    for each in (rule, *rule.additional_bindings):
        verb = each.WhichOneof("pattern")
        if verb:
            body = f" body {each.body}" if each.body else ""
            yield f"{full}: {verb.upper()} {getattr(each, verb)}{body}"


def with_label(field: FieldDescriptorProto) -> str:
    """A field's type, and whether it may be there often or be absent."""
    if field.label == field.LABEL_REPEATED:
        return f"repeated {type_of(field)}"
    return f"optional {type_of(field)}" if field.proto3_optional else type_of(field)


def type_of(field: FieldDescriptorProto) -> str:
    """A field's type as a .proto file has it."""
    if field.type_name:
        return field.type_name.lstrip(".")
    return field.Type.Name(field.type).removeprefix("TYPE_").lower()


def errors() -> list[str]:
    """Each reason with its status codes, and what the SDK makes of it."""
    import grpc

    from stepwell._transport.status import Status, to_error
    from stepwell_server.rpc import status

    def raised(code: str, reason: str = "") -> str:
        return type(to_error(Status(grpc.StatusCode[code], "text", reason))).__name__

    lines = {
        f"domain of ErrorInfo: {status.DOMAIN}",
        f"header of calls for another replica: {': '.join(status.GO_ELSEWHERE)}",
    }
    for kind, code in kinds_of_errors():
        lines.add(f"reason {kind.reason}: code {code}")
        lines.add(f"reason {kind.reason}: {raised(code, kind.reason)} in the SDK")
        if issubclass(kind, status._WITH_DELAY):
            lines.add(f"reason {kind.reason}: may say when to try again")
        if kind.may_go_elsewhere:
            lines.add(f"reason {kind.reason}: may go to another replica")
    lines |= {
        f"code {code.name} without a reason: {raised(code.name)} in the SDK" for code in grpc.StatusCode
    }
    return sorted(lines)


def kinds_of_errors() -> Iterator[tuple[type[ServerError], str]]:
    """Each class of the server's errors, with the name of its status code."""
    from stepwell_server.errors import ServerError
    from stepwell_server.rpc import status

    kinds: list[type[ServerError]] = [ServerError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        yield kind, next(status.CODES[each] for each in kind.__mro__ if each in status.CODES).name


def metrics() -> list[str]:
    """Each metric with its type and labels, and the values of labels that are always there.

    Raises:
        LookupError: the server makes a metric that is not among them.
    """
    lines = set()
    names = set()
    for family in families():
        if not family.samples:
            raise LookupError(
                f"metric {family.name} must have a sample: `families` in scripts/surface.py gives it none"
            )
        name = family.name if family.type == "histogram" else family.samples[0].name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        lines.add(f"{name}: {family.type}({', '.join(sorted(labels))})")
        names.add(family.name)
        for sample in family.samples:
            for label in sample.labels.keys() - {"le", "model", "version"}:
                if value := sample.labels[label]:
                    lines.add(f'{name}{{{label}="{value}"}}')
    for where, pattern in metrics_made():
        if not any(re.fullmatch(pattern, name) for name in names):
            raise LookupError(f"{where}: makes a metric that `families` in scripts/surface.py does not have")
    return sorted(lines)


def families() -> Iterator[Metric]:
    """All that a server with every option may show, with empty texts for what depends on it."""
    from stepwell_server import app
    from stepwell_server.catalog.control import VersionState, VersionStatus
    from stepwell_server.core.front_limits import FrontLimits
    from stepwell_server.engine.api import ModelStats
    from stepwell_server.engine.quotas import TenantCounts
    from stepwell_server.engine.watches.watchers import WatchCounts
    from stepwell_server.metrics import gauges
    from stepwell_server.metrics.observer import PrometheusObserver
    from stepwell_server.metrics.series import StoreWrites
    from stepwell_server.process.readiness import Report
    from stepwell_server.rpc.fronts.base import FrontCounts
    from stepwell_server.settings import Settings
    from stepwell_server.store.base import StoreHealth

    observer = PrometheusObserver()
    observer.model_served("m", cast(Any, SimpleNamespace(fingerprint="", executor="")))
    observer.model_loaded("m", "file", 0)
    observer.method_served("", [""], streams=False)
    observer.method_served("", [""], streams=True)
    statuses = {"m": [VersionStatus(1, VersionState.READY, is_default=True)]}
    front = FrontCounts(dict.fromkeys(gauges._FRONT, 0), {"": 0}, {"": 0})
    certificates = SimpleNamespace(used=SimpleNamespace(ends=lambda: {"": 0.0}), failures=0)
    labels: list[dict[str, str]] = [{"store_id": "", "shared": shared} for shared in ("false", "true")]
    yield from itertools.chain(
        observer.families(),
        gauges.of_build(dict.fromkeys(app._build(Settings(), front="", server_id=""), "")),
        gauges.of_versions(statuses, observer.models),
        gauges.of_readiness(Report({}, {}, {})),
        gauges.of_front(front, FrontLimits(1).values),
        gauges.of_audit(0, 0),
        gauges.of_spans({}),
        gauges.of_certificates(cast(Any, certificates)),
        *(gauges.of_store(each, StoreHealth(), StoreWrites(), is_damaged=False) for each in labels),
        gauges.of_tenants(TenantCounts({"": 0}, {"": 0}, {"": 0}, {"": 0}, {("", ""): 0})),
        gauges.of_engine([ModelStats("m", 0, 0, 0, 0, 0, 0, 0, 0)]),
        gauges.of_watches(WatchCounts(0, 0, 0, 0, 0)),
        gauges.of_memory(0),
        gauges.of_disk(ROOT),
    )


def metrics_made() -> Iterator[tuple[str, str]]:
    """Where the server's source makes a metric, and a pattern of its name."""
    for path in sorted(METRICS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                not isinstance(node, ast.Call)
                or not node.args
                or not MAKES_METRIC.search(ast.unparse(node.func))
            ):
                continue
            name = node.args[0]
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if isinstance(name, ast.Constant):
                yield where, re.escape(str(name.value))
            elif isinstance(name, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in name.values]
                yield where, "".join(".+" if part is None else re.escape(str(part)) for part in parts)
            else:
                raise LookupError(f"{where}: the name of a metric must be a text")


FILES: dict[str, Callable[[], list[str]]] = {
    "commands": commands,
    "errors": errors,
    "metrics": metrics,
    "protocol": protocol,
    "sdk": sdk,
}


if __name__ == "__main__":
    sys.exit(main())

"""The protocol's reference, from the comments of its files: services, messages, enums and their fields."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from surface import lines_of_method, type_of, with_label

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import (
        DescriptorProto,
        EnumDescriptorProto,
        FileDescriptorProto,
        ServiceDescriptorProto,
    )

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "stepwell.v1"
#: Numbers of the fields of descriptors that paths of comments are made of.
MESSAGE, ENUM, SERVICE, OF_MEMBER, NESTED_MESSAGE, NESTED_ENUM = 4, 5, 6, 2, 3, 4
Path_ = tuple[int, ...]


@functools.cache
def files() -> dict[str, FileDescriptorProto]:
    """The files of the protocol with their comments, as buf reads them."""
    from google.api import annotations_pb2  # noqa: F401  the addresses of methods for JSON
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    buf = Path(sys.executable).parent / "buf"
    command = [str(buf), "build", "--as-file-descriptor-set", "--output", "-#format=binpb"]
    built = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    return {file.name: file for file in FileDescriptorSet.FromString(built).file}


class File:
    """One file of the protocol."""

    def __init__(self, name: str) -> None:
        self.file = files()[name]
        self.comments = {
            tuple(place.path): place.leading_comments for place in self.file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        """The page's lines."""
        for number, service in enumerate(self.file.service):
            yield from self.service(service, (SERVICE, number))
        for number, message in enumerate(self.file.message_type):
            yield from self.message(message.name, message, (MESSAGE, number))
        for number, enum in enumerate(self.file.enum_type):
            yield from self.enum(enum.name, enum, (ENUM, number))

    def service(self, service: ServiceDescriptorProto, path: Path_) -> Iterator[str]:
        """A service and its methods."""
        yield from ("", f"## {service.name}", "", self.text(path), "")
        for number, method in enumerate(service.method):
            full = f"{self.file.package}.{service.name}.{method.name}"
            first, *addresses = lines_of_method(full, method)
            takes, answers = first.split(": ", 1)[1].split(" -> ")
            yield from ("", f"### {method.name}", "", self.text((*path, OF_MEMBER, number)), "")
            yield f"{linked(takes)} → {linked(answers)}"
            yield from ("", *(f"- `{address.split(': ', 1)[1]}`" for address in addresses), "")

    def message(self, name: str, message: DescriptorProto, path: Path_) -> Iterator[str]:
        """A message, its fields and what is nested in it."""
        yield from ("", f"## {name}", "", self.text(path), "")
        full = f".{self.file.package}.{name}"
        maps = {f"{full}.{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
        if message.field:
            yield from ("| field | type | meaning |", "| --- | --- | --- |")
        for number, field in enumerate(message.field):
            entry = maps.get(field.type_name)
            kind = (
                f"map<{type_of(entry.field[0])}, {type_of(entry.field[1])}>" if entry else with_label(field)
            )
            if field.HasField("oneof_index") and not field.proto3_optional:
                kind += f", one of {message.oneof_decl[field.oneof_index].name}"
            text = self.text((*path, OF_MEMBER, number)).replace("\n", " ")
            yield f"| `{field.name}` = {field.number} | {linked(kind)} | {text} |"
        yield ""
        for number, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self.message(f"{name}.{nested.name}", nested, (*path, NESTED_MESSAGE, number))
        for number, enum in enumerate(message.enum_type):
            yield from self.enum(f"{name}.{enum.name}", enum, (*path, NESTED_ENUM, number))

    def enum(self, name: str, enum: EnumDescriptorProto, path: Path_) -> Iterator[str]:
        """An enum and its values."""
        yield from ("", f"## {name}", "", self.text(path), "")
        yield from ("| value | meaning |", "| --- | --- |")
        for number, value in enumerate(enum.value):
            text = self.text((*path, OF_MEMBER, number)).replace("\n", " ")
            yield f"| `{value.name}` = {value.number} | {text} |"
        yield ""

    def text(self, path: Path_) -> str:
        """A comment as Markdown.

        Raises:
            LookupError: There is none.
        """
        comment = self.comments.get(path, "").strip()
        if not comment:
            raise LookupError(f"{self.file.name}: element {path} must have a comment")
        lines = [line.strip() for line in comment.splitlines()]
        return re.sub(r"(?<!`)([<>|*_\[\]])(?![^`\n]*`)", r"\\\1", "\n".join(lines))


@functools.cache
def places() -> dict[str, str]:
    """The page and anchor of each message and enum, by its full name."""
    found: dict[str, str] = {}
    for name, file in files().items():
        if file.package == PACKAGE:
            page = Path(name).with_suffix(".md").name
            names = [enum.name for enum in file.enum_type]
            for message in file.message_type:
                inner = [each.name for each in message.nested_type] + [
                    each.name for each in message.enum_type
                ]
                names += [message.name, *(f"{message.name}.{own}" for own in inner)]
            found |= {f"{PACKAGE}.{own}": f"{page}#{anchor(own)}" for own in names}
    return found


def anchor(heading: str) -> str:
    """The anchor of a heading, as MyST and code hosts make it."""
    return re.sub(r"[^\w-]", "", heading.lower())


def linked(kind: str) -> str:
    """A type, with a link to each message of the protocol in it."""

    def link(found: re.Match[str]) -> str:
        place = places().get(found[0])
        name = found[0].removeprefix(f"{PACKAGE}.")
        return f"[{name}]({place})" if place else name

    return re.sub(r"[\w.]+", link, kind).replace("<", r"\<").replace(">", r"\>")

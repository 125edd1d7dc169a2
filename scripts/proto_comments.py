"""Print the comments in a set of descriptors as JSON, by the full name of what each describes.

    python proto_comments.py DESCRIPTORS

`proto.py` runs it in the environment of the protocol's generator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

#: The names of the fields of descriptors that have described members.
MEMBERS = ("message_type", "nested_type", "enum_type", "service", "field", "value", "method")


def comments_of(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """The full names of a file's messages, fields, enums, values, services and methods, with their comments."""
    for place in file.source_code_info.location:
        text = " ".join(place.leading_comments.split())
        name = name_of(file, place.path)
        if text and name:
            yield f"{file.package}.{name}", text


def name_of(file: FileDescriptorProto, path: Any) -> str:
    """The name at a path of a file, within its package; empty if it leads elsewhere."""
    at: Any = file
    names = []
    for number, index in zip(path[::2], path[1::2], strict=False):
        field = at.DESCRIPTOR.fields_by_number[number].name
        if field not in MEMBERS:
            return ""
        at = getattr(at, field)[index]
        names.append(at.name)
    return "" if isinstance(at, DescriptorProto) and at.options.map_entry else ".".join(names)


def main() -> None:
    """Print them."""
    files = FileDescriptorSet.FromString(Path(sys.argv[1]).read_bytes()).file
    found = dict(pair for file in files for pair in comments_of(file))
    print(json.dumps(dict(sorted(found.items())), indent=0, ensure_ascii=False))


if __name__ == "__main__":
    main()

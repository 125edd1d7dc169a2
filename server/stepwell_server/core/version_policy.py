"""Which versions of a model are served."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Self

from stepwell_server.core.model_names import MAX_VERSION, version_of

POLICY_RULE = "'latest N' (the N highest versions), 'all', or versions such as '3,5'"
_MAX_SHOWN = 80


@dataclasses.dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Serves the `latest` N versions, the versions of a list, or (with neither) all."""

    latest: int | None = None
    versions: frozenset[int] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `latest`, `latest N`, `all` or `3,5`.

        Raises:
            ValueError: it is not a policy. The message continues the name of an argument: "must be ...; got ...".
        """
        words = text.split()
        if words == ["all"]:
            return cls()
        if words == ["latest"]:
            return cls(latest=1)
        if len(words) == 2 and words[0] == "latest" and (count := version_of(words[1])) is not None:
            return cls(latest=count)
        numbers = [version_of(word.strip()) for word in text.split(",")]
        versions = frozenset(number for number in numbers if number is not None)
        if len(versions) != len(numbers):
            shown = repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}..."
            raise ValueError(
                f"must be {POLICY_RULE}, whole numbers from 1 to {MAX_VERSION}, each once; got {shown}"
            )
        return cls(versions=versions)

    def choose(self, there_are: Collection[int]) -> set[int]:
        """The versions to serve, out of the available ones."""
        if self.versions is not None:
            return set(self.versions.intersection(there_are))
        return set(sorted(there_are, reverse=True)[: self.latest])

    def __str__(self) -> str:
        if self.versions is not None:
            return ",".join(map(str, sorted(self.versions)))
        return "all" if self.latest is None else f"latest {self.latest}"


LATEST = VersionPolicy(latest=1)

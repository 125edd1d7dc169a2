"""What Triton's clients do with versions of models. As `triton_scenarios`: it runs in the clients' environment."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from support.triton.triton_scenarios import (
    SCENARIOS,
    STATELESS,
    connect,
    error_of,
    fails,
    inputs,
    must_start,
    scenario,
)


@scenario
def versions(address: str) -> None:
    """Of `lstm` versions 1 and 2 are served, and there is a file of version 3."""
    with connect(address) as client:
        x = inputs(np.ones((1, 3), np.float32), client.get_model_metadata("lstm").inputs[0].name, "FP32")

        def infer(version: str, **sequence: Any) -> tuple[str, Any]:
            result = client.infer("lstm", x, model_version=version, **sequence)
            return result.get_response().model_version, result.as_numpy(result.get_response().outputs[0].name)

        def index() -> list[tuple[str, str, str]]:
            found = client.get_model_repository_index().models
            return [(one.name, one.version, one.state) for one in found]

        assert list(client.get_model_metadata("lstm").versions) == ["1", "2"]
        assert list(client.get_model_metadata("lstm", "2").versions) == ["2"]
        config = client.get_model_config("lstm", "2").config
        assert list(config.version_policy.specific.versions) == [1, 2]
        assert [client.is_model_ready("lstm", version) for version in ("", "1", "2", "3")] == [True] * 3 + [
            False
        ]
        counted = client.get_inference_statistics("lstm").model_stats
        assert [(one.name, one.version) for one in counted] == [("lstm", "1"), ("lstm", "2")]
        last: dict[str, Any] = {}
        for version in ("1", "2"):
            for i in range(3):
                ran, last[version] = infer(
                    version, sequence_id=f"v{version}", sequence_start=i == 0, sequence_end=i == 2
                )
                assert ran == version
            np.testing.assert_array_equal(infer(version, parameters=STATELESS)[0], version)
        assert not np.array_equal(last["1"], last["2"])
        fails(
            "NOT_FOUND",
            "Request for unknown model: 'lstm' version 7 is not found",
            lambda: infer("7", sequence_id=1, sequence_start=True),
        )
        infer("2", sequence_id=5, sequence_start=True)
        assert infer("", sequence_id=5)[0] == "2"
        named = "; the sequence is on version 2 of the model, and the request asks for version 1"
        fails("INVALID_ARGUMENT", must_start(5, "lstm") + named, lambda: infer("1", sequence_id=5))
        infer("2", sequence_id=5, sequence_end=True)
        assert index() == [("lstm", "1", "READY"), ("lstm", "2", "READY")]
        client.load_model("lstm", config=json.dumps({"version_policy": {"specific": {"versions": ["3"]}}}))
        assert ("lstm", "3", "READY") in index()
        assert client.is_model_ready("lstm", "3")
        assert infer("", sequence_id=6, sequence_start=True, sequence_end=True)[0] == "3"
        assert "failed to poll" in error_of(lambda: client.load_model("other"))[1]
        refused = error_of(lambda: client.load_model("lstm", config="{}", files={"file:4/m.keras": b"x"}))
        assert refused[0] == "UNIMPLEMENTED"
        assert "--allow-model-upload" in refused[1]
        client.unload_model("lstm")
        assert index() == []
        assert not client.is_model_ready("lstm")
        client.load_model("lstm")
        assert index() == [("lstm", "3", "READY")]


if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](*sys.argv[2:])))

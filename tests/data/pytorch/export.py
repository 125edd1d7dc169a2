"""Exports a step function from PyTorch: writes step.onnx, and what PyTorch computes with it to expected.npz.

PyTorch is needed for nothing else. Run this in an environment of its own, which has torch and onnxscript:

    python tests/data/pytorch/export.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

FOLDER = Path(__file__).parent
STEPS = 6


class Step(torch.nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """An LSTM of two layers with a linear layer: one time step as a pure function."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(input_size=3, hidden_size=8, num_layers=2)
        self.linear = torch.nn.Linear(8, 2)

    def forward(self, x: Any, h: Any, c: Any) -> Any:
        """Take x (batch, 3), h and c (2, batch, 8); return y (batch, 2) and the next h and c."""
        y, (hn, cn) = self.lstm(x[None], (h, c))
        return self.linear(y[0]), hn, cn


def main() -> None:
    """Export the model, run it, and keep both."""
    torch.manual_seed(42)
    model = Step().eval()
    x, h, c = torch.randn(4, 3), torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model,
        (x, h, c),
        FOLDER / "step.onnx",
        input_names=["x", "h", "c"],
        output_names=["y", "hn", "cn"],
        dynamic_shapes={"x": {0: batch}, "h": {1: batch}, "c": {1: batch}},
        external_data=False,
    )
    remove_notes(FOLDER / "step.onnx")
    xs = torch.randn(STEPS, 4, 3)
    made = []
    with torch.no_grad():
        for one in xs:
            y, h, c = model(one, h, c)
            made.append(y)
    np.savez_compressed(FOLDER / "expected.npz", x=xs, y=torch.stack(made), h=h, c=c)


def remove_notes(path: Path) -> None:
    """Remove stack traces from the file: they hold paths of the machine that exported it."""
    model = onnx.load(path)
    for each in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input):
        each.ClearField("metadata_props")
    for node in model.graph.node:
        node.ClearField("doc_string")
    onnx.save(model, path)


if __name__ == "__main__":
    main()

"""What people put around recurrent layers is served without trust, and equals Keras."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell_server.engine.executors import load_executor
from stepwell_server.program import ProofOptions
from support.models import everyday, programs
from support.models.compiled import Compiled

TOLERANCE = 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("first", sorted(everyday.groups()))
def test_everyday_models_are_served_and_equal_keras(first: str) -> None:
    names = everyday.groups()[first]
    model = everyday.build(names, steps=20 if len(first) % 2 else None)
    program = programs.program(
        f"everyday-{first}", lambda: model, ProofOptions(steps=48), kept=programs.kept_folder()
    )
    assert not program.proof.unproven
    # One for all: TensorFlow takes seconds to load a large program.
    compiled, executor = Compiled(first, model, program), load_executor(program)
    for rows, steps in ((3, 20), (1, 20), (2, 1)):
        if steps == 1 and compiled.shape[1] == 20:
            continue  # Keras itself takes no other length.
        inputs = compiled.draw(rows, rows, steps)
        inputs[0] *= 10.0 ** np.arange(-1, rows - 1, dtype=np.float32)[:, None, None]
        inputs[0][:, steps // 2] = 0.0  # What Masking takes for nothing.
        whole, stepped = compiled.keras(inputs), compiled.stepped(inputs, steps, executor)
        for name, expected in whole.items():
            scale = max(1.0, float(np.max(np.abs(expected))))
            np.testing.assert_allclose(stepped[name], expected, rtol=0, atol=TOLERANCE * scale, err_msg=name)

"""Models that mix time steps or rows are refused with the layer, the reason and a fix, however far they reach."""

from __future__ import annotations

import re

import pytest

from stepwell_server.compile.errors import ModelError
from support.models import mixing_rows, mixing_steps
from support.samples import one_in

CASES = {**mixing_steps.CASES, **mixing_rows.CASES}
VARIANTS = {
    f"{name}-{steps or 'any'}": (case, steps) for name, case in CASES.items() for steps in case.lengths
}
#: Nothing of TensorFlow's or Keras's inside, and no addresses.
_RAW = r"0x[0-9a-f]{6}|<tf\.|KerasTensor|Traceback|StagingError|\{\{|Exception encountered|object at"


@pytest.mark.parametrize("variant", one_in(8, VARIANTS))
def test_a_model_that_cannot_be_stepped_is_refused_with_its_reason(variant: str) -> None:
    from stepwell_server.compile.probe.probe import trace_and_probe

    case, steps = VARIANTS[variant]
    with pytest.raises(ModelError) as caught:
        trace_and_probe(case.build(steps))
    said = str(caught.value)
    assert re.search(case.refused, said), said
    assert "\n" not in said
    assert not re.search(_RAW, said), said

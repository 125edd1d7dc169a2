"""A tape as a pandas or xarray object. Both libraries are imported only when needed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepwell._state.tables import axes_of, imported
from stepwell._tape.content import KINDS, Content

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def to_xarray(content: Content) -> xr.Dataset:
    """See `Tape.to_xarray`."""
    xarray = imported("xarray", "Tape.to_xarray")
    variables: dict[str, Any] = {}
    for kind in KINDS:
        arrays = content.arrays[kind]
        for name, own in axes_of(arrays, 2).items():
            # An input may have the name of a layer, and another shape.
            axes = own if kind == "states" else [f"{kind}/{axis}" for axis in own]
            variables[f"{kind}/{name}"] = (["time", "row", *axes], arrays[name].copy())
    members = ["time", "member"] if content.is_group else ["time"]
    shape = (len(content), *content.revisions.shape[1:])[: len(members)]
    coordinates = {
        "time": _numbers(content),
        "row": np.arange(content.rows),
        "revision": (members, content.revisions.reshape(shape).copy()),
        "position": (members, content.positions.reshape(shape).copy()),
        "received": (["time"], content.times.copy()),
    }
    attrs = {"model": content.model, "fingerprint": content.fingerprint}
    dataset: xr.Dataset = xarray.Dataset(variables, coords=coordinates, attrs=attrs)
    return dataset


def to_pandas(content: Content) -> pd.DataFrame:
    """See `Tape.to_pandas`."""
    pandas = imported("pandas", "Tape.to_pandas")
    count, rows = len(content), content.rows
    index = pandas.MultiIndex.from_arrays(
        [
            np.repeat(_numbers(content), rows),
            np.repeat(content.revisions, content.batch_size, axis=1).reshape(-1),
            np.repeat(content.positions, content.batch_size, axis=1).reshape(-1),
            np.repeat(content.times, rows),
            np.tile(np.arange(rows), count),
        ],
        names=["time", "revision", "position", "received", "row"],
    )
    frames = {
        (kind, name): pandas.DataFrame(
            array.reshape(count * rows, math.prod(array.shape[2:])).copy(), index=index
        )
        for kind, name, array in content.named_arrays()
    }
    names = ["kind", "tensor", "unit"]
    if frames:
        frame = pandas.concat(frames, axis=1, names=names)
    else:
        columns = pandas.MultiIndex.from_arrays([[], [], []], names=names)
        frame = pandas.DataFrame(index=index, columns=columns)
    frame.attrs.update(model=content.model, fingerprint=content.fingerprint)
    result: pd.DataFrame = frame
    return result


def _numbers(content: Content) -> npt.NDArray[np.int64]:
    """Numbers of the time steps since the beginning of the recording."""
    return np.arange(content.dropped, content.dropped + len(content))

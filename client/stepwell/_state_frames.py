"""A state as a pandas or xarray object. Both libraries are imported when they are asked for."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stepwell._tensors import Array

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def to_dataframe(tensors: Mapping[str, Array], rows: int, attrs: Mapping[str, Any]) -> pd.DataFrame:
    """See `State.to_dataframe`."""
    pandas = _imported("pandas", "State.to_dataframe")
    index = pandas.RangeIndex(rows, name="row")
    frames = {
        name: pandas.DataFrame(array.reshape(rows, math.prod(array.shape[1:])).copy(), index=index)
        for name, array in tensors.items()
    }
    names = ["tensor", "unit"]
    if frames:
        frame = pandas.concat(frames, axis=1, names=names)
    else:
        columns = pandas.MultiIndex.from_arrays([[], []], names=names)
        frame = pandas.DataFrame(index=index, columns=columns)
    frame.attrs.update(attrs)
    result: pd.DataFrame = frame
    return result


def to_xarray(tensors: Mapping[str, Array], rows: int, attrs: Mapping[str, Any]) -> xr.Dataset:
    """See `State.to_xarray`."""
    xarray = _imported("xarray", "State.to_xarray")
    layers: dict[str, set[tuple[int, ...]]] = {}
    for name, array in tensors.items():
        layers.setdefault(_layer(name), set()).add(array.shape[1:])
    variables = {}
    for name, array in tensors.items():
        # The tensors of a layer share its axes, so that h and c can be computed with, unless their shapes differ.
        owner = _layer(name) if len(layers[_layer(name)]) == 1 else name
        variables[name] = (["row", *(f"{owner}.{axis}" for axis in range(1, array.ndim))], array.copy())
    dataset: xr.Dataset = xarray.Dataset(variables, coords={"row": np.arange(rows)}, attrs=attrs)
    return dataset


def _layer(name: str) -> str:
    return name.rpartition("/")[0] or name


def _imported(package: str, what: str) -> Any:
    """A package that is not among those that the SDK needs.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is not installed: pip install {package}", name=package
        ) from None

"""A state as a pandas or xarray object. Both libraries are imported only when needed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stepwell._install import PLOT, advice
from stepwell._state.tensors import Array

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


_AXES = ("row", "time")


def to_dataframe(
    tensors: Mapping[str, Array], shape: tuple[int, ...], attrs: Mapping[str, Any], what: str
) -> pd.DataFrame:
    """See `State.to_dataframe`. `shape`: the first axes of all tensors, rows or rows and time steps."""
    pandas = imported("pandas", what)
    if len(shape) == 1:
        index = pandas.RangeIndex(shape[0], name="row")
    else:
        index = pandas.MultiIndex.from_product(map(range, shape), names=_AXES)
    frames = {
        name: pandas.DataFrame(
            array.reshape(math.prod(shape), math.prod(array.shape[len(shape) :])).copy(), index=index
        )
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


def to_xarray(
    tensors: Mapping[str, Array], shape: tuple[int, ...], attrs: Mapping[str, Any], what: str
) -> xr.Dataset:
    """See `State.to_xarray`. `shape` is as in `to_dataframe`."""
    xarray = imported("xarray", what)
    first = _AXES[: len(shape)]
    variables = {
        name: ([*first, *own], tensors[name].copy()) for name, own in axes_of(tensors, len(shape)).items()
    }
    coordinates = {axis: np.arange(count) for axis, count in zip(first, shape, strict=True)}
    dataset: xr.Dataset = xarray.Dataset(variables, coords=coordinates, attrs=attrs)
    return dataset


def axes_of(tensors: Mapping[str, Array], first: int) -> dict[str, list[str]]:
    """Names of the axes of each tensor, without the `first` axes."""
    layers: dict[str, set[tuple[int, ...]]] = {}
    for name, array in tensors.items():
        layers.setdefault(_layer(name), set()).add(array.shape[first:])
    axes = {}
    for name, array in tensors.items():
        # The tensors of a layer share its axes, so that h and c can be computed with, unless their shapes differ.
        owner = _layer(name) if len(layers[_layer(name)]) == 1 else name
        axes[name] = [f"{owner}.{axis - first + 1}" for axis in range(first, array.ndim)]
    return axes


def _layer(name: str) -> str:
    return name.rpartition("/")[0] or name


def imported(package: str, what: str) -> Any:
    """Imports an optional package of the extra `plot`, or a module of one.

    Args:
        package: Name of the package or module.
        what: The function that needs it, for the message.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = package.partition(".")[0]
        if error.name != missing:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {missing}, which is not installed: {advice(PLOT)}", name=missing
        ) from None

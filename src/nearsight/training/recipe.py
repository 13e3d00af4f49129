# SPDX-License-Identifier: Apache-2.0
"""What a run is asked to do: one flat set of values that the command line, a YAML file and Python share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, OptionError


def _option(default: Any, kind: type, help: str) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help})


@dataclass(frozen=True)
class Recipe:
    """A run's settings. A value of None stands for the data set's own default: see :meth:`filled`.

    Raises:
        OptionError: a value outside its range; the message names the rule and the value.
    """

    model: str = _option("sasa_nano", str, "a name from `nearsight models`, or any model of timm")
    data: str = _option("digits", str, "digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH")
    data_root: str | None = _option(None, str, "folder that holds the data; else the usual places are searched")
    epochs: int | None = _option(None, int, "passes over the training images")
    batch_size: int | None = _option(None, int, "images per step, over all devices")
    lr: float | None = _option(None, float, "peak learning rate")
    seed: int = _option(0, int, "the same seed gives the same run")
    devices: int = _option(1, int, "processes to train with")

    def __post_init__(self) -> None:
        _at_least("epochs", self.epochs, 1)
        _at_least("batch-size", self.batch_size, 1)
        _at_least("seed", self.seed, 0)
        _at_least("devices", self.devices, 1)
        if self.seed >= 2**32:
            raise OptionError(f"seed must be below 2**32; received {self.seed}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr must be a positive number; received {self.lr:g}")
        if self.batch_size is not None and self.batch_size % self.devices:
            raise OptionError(
                f"batch-size must be a multiple of devices; received {self.batch_size} for {self.devices} devices"
            )

    def filled(self, defaults: Mapping[str, Any]) -> Recipe:
        """The same recipe with ``defaults`` in the place of what was left open."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def to_yaml(self) -> str:
        """Text that ``nearsight train --config`` reads back."""
        import yaml

        values = {name: value for name, value in asdict(self).items() if value is not None}
        return "# Run it again: nearsight train --config THIS_FILE --output NEW_FOLDER\n" + yaml.safe_dump(
            values, sort_keys=False
        )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a run's ``config.yaml``.

    Raises:
        DataError: the file cannot be read, is no YAML, or holds something else.
        OptionError: a value outside its range.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}") from error
    known = {field.name for field in fields(Recipe)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise DataError(f"{path} must hold only {', '.join(sorted(known))}; it is damaged or no config of a run")
    try:
        return Recipe(**values)
    except TypeError as error:  # a text where a number belongs
        raise DataError(f"{path} holds a value of the wrong type: {error}") from error


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise OptionError(f"{name} must be at least {least}; received {value}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

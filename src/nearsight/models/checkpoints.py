# SPDX-License-Identifier: Apache-2.0
"""Weights from elsewhere: what does not fit, or cannot be read, is one line that says so, and no network is half loaded."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import DataError, NearsightError
from .resized import tables_of_maps

UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, UnicodeDecodeError)
# The way on where nothing but the size of the images differs.
OTHER_SIZE = "take the img_size that they were trained with, or load nearsight.resize_positions(weights, network)"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever goes wrong where weights are fetched, read and loaded becomes one line; no code in a file has run.

    Raises:
        DataError: there is no such file or no network; it is damaged, of another kind or would run code; it does not fit.
    """
    try:
        yield
    except (NearsightError, MemoryError):
        raise
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        reason = _first_line(error).partition(". ")[0][:200]
        raise DataError(
            f"cannot fetch {what}: {reason}; without a network put config.json and model.safetensors of its repository "
            "into a folder, and take create_model('local-dir:FOLDER', pretrained=True)"
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f"there are no weights of {what}: {_first_line(error) if str(error) else 'no such file'}"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the weights of {what}: {_first_line(error)}") from error
    except UNREADABLE as error:
        raise _damaged(what) from error
    except RuntimeError as error:
        if "in loading state_dict" in str(error):
            raise DataError(
                f"the weights do not fit {what}: {'; '.join(_lines(error)[1:3])}{_way_on(error)}"
            ) from error
        if any(word in str(error) for word in ("weights_only", "archive", "file")):  # PyTorch's reader
            raise _damaged(what) from error
        raise DataError(f"{what}: {_first_line(error)}") from error
    except (AttributeError, KeyError) as error:  # timm's, where a config names layers that its network has not
        raise DataError(f"the weights do not fit {what}: {_first_line(error)}") from error


def _way_on(error: RuntimeError) -> str:
    """What to do about the first tensor of another shape, where that is plain from its name."""
    mismatch = re.search(r"size mismatch for (\S+): .*?Size\(\[(\d+)", str(error))
    if mismatch is None:
        return ""
    name, first = mismatch.groups()
    if re.search(r"\bposition\.", name):
        return f"; {OTHER_SIZE}"
    if name.startswith("head."):
        return f"; make it with num_classes={first}, and take model.reset_classifier then"
    return ""


def _damaged(what: str) -> DataError:
    return DataError(
        f"cannot read the weights of {what}: the file is damaged, of another kind, or would run code; "
        "torch.save(model.state_dict(), FILE) writes one that does not"
    )


def fitting(state: Mapping[str, Tensor], model: nn.Module, *, adapted: bool = True) -> dict[str, Tensor]:
    """``state``, once its names and shapes are the network's.

    Args:
        adapted: whether timm fits the classifier and the first convolution, where the network has others than its weights.
            It then tells a log alone of all other names that are missing.

    Raises:
        DataError: another network's weights, or a classifier of another size.
    """
    wanted = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    held = {name: tuple(one.shape) for name, one in state.items() if isinstance(one, Tensor)}
    free = tuple(f"{name}." for name in _fitted_by_timm(model)) if adapted else ()
    missing = [name for name in wanted.keys() - held.keys() if not name.startswith(free)]
    unknown = [name for name in held.keys() - wanted.keys() if not name.startswith(free)]
    other = [name for name in wanted.keys() & held.keys() if held[name] != wanted[name] and not name.startswith(free)]
    reasons = [f"the file has no {min(missing)}"] if missing else []
    reasons += [f"the network has no {min(unknown)}"] if unknown else []
    reasons += [f"{min(other)} is {held[min(other)]} there and {wanted[min(other)]} here"] if other else []
    if reasons:
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        classifier = tuple(f"{name}." for name in _words(config.get("classifier")))
        way_on = "take the file of this network, or the options that it was trained with"
        if other and not missing and not unknown and all(name.startswith(classifier) for name in other):
            theirs, ours = held[min(other)][0], wanted[min(other)][0]
            way_on = f"make it with num_classes={theirs}, and take model.reset_classifier({ours}) then"
        if other and not missing and not unknown and tables_of_maps(model).issuperset(other):
            way_on = f"they are for images of another size, or for windows: {OTHER_SIZE}"
        raise DataError(f"the weights do not fit {_name(model)}: {', '.join(reasons)}; {way_on}")
    return dict(state)


def _fitted_by_timm(model: nn.Module) -> list[str]:
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = []
    if getattr(model, "num_classes", None) != config.get("num_classes"):
        names += _words(config.get("classifier"))
    if getattr(model, "in_chans", None) != (config.get("input_size") or (None,))[0]:
        names += _words(config.get("first_conv"))
    return names


def _words(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines()] or [type(error).__name__]


def _first_line(error: Exception) -> str:
    return _lines(error)[0]

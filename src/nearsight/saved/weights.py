# SPDX-License-Identifier: Apache-2.0
"""A trained model in one file: its weights, and in the header all that is needed to rebuild it and to feed it.

A bit that flips on a disk or a wire must not pass for a weight. The header of ``model.safetensors`` holds a digest of
tensors and blueprint, and the zip archive that ``last.ckpt`` is holds a checksum of each of its parts; both are checked by
all that reads. Files that were written before there was a digest are read without.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..conversion import convert
from ..errors import DataError, NearsightError, OptionError
from ..files import to_path, write_bytes
from ..models import GIVEN, create_model, made_for_size, parse_spec, pretrained_value, resize_positions, shipped
from ..modes import evaluating, trying_to_train
from ..own_code import imported, refuse_unimported
from ..pages.brief import Brief
from ..pages.names import readable
from ..picture import opaque
from ..positions import UNNAMED_POSITION
from .spec import check_saved_spec, is_plain, saved_spec, without_option
from .view import CROP_MODES, INTERPOLATIONS, View

WEIGHTS_FILE = "model.safetensors"
CHECKPOINT_FILE = "last.ckpt"
KEY = "nearsight"  # of the blueprint, in a safetensors header and in a checkpoint
RECIPE = "nearsight-recipe"  # in a checkpoint, so that a config.yaml which has changed is noticed
PREFIX = "model."  # of the network's weights in a checkpoint
EMA = "ema.module."  # of their mean, where there is one
CONVERTED = {"init", "stem", "kernel_size", "num_heads", "position", "margin", "locality", "content"}  # and names
DIGEST = "digest"  # beside the blueprint's own values in a safetensors header


@dataclass(frozen=True, repr=False)
class Blueprint(Brief):
    """What rebuilds a model and says how it sees pictures. Plain values only, so it fits in JSON."""

    model: str
    classes: tuple[str, ...]
    view: View
    data: str
    converted: dict[str, Any] | None = None  # how, as keyword arguments of nearsight.convert
    img_size: int | None = None  # the option of that name; None: that of the view, for networks that take no other size
    imports: tuple[str, ...] = field(default_factory=imported)  # of its user's, that registered what it is made of

    @classmethod
    def of(cls, model: str, classes: tuple[str, ...], view: View, data: str) -> Blueprint:
        """Of a network that is to be trained: it is made for the size that it will see."""
        return cls(model, classes, view, data, img_size=view.size if made_for_size(model) else None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(readable, self.classes)))

    def build(self, drop_path: float = 0.0) -> nn.Module:
        """The network, freshly initialised. Its ``pretrained_cfg`` says how it sees pictures and what its classes are.

        Args:
            drop_path: chance in training that the network's last block is skipped for an image.

        Raises:
            OptionError: no such model, or one that cannot take pictures of this size; the message says why.
        """
        kwargs: dict[str, Any] = {"num_classes": len(self.classes), "in_chans": self.view.channels}
        kwargs["pretrained_cfg_overlay"] = {**self.view.data_config(), "label_names": self.classes}
        if "img_size" not in parse_spec(self.model)[1]:
            made_for = self.img_size or (self.view.size if pretrained_value(self.model, "fixed_input_size") else None)
            kwargs |= {} if made_for is None else {"img_size": made_for}
        if drop_path:
            kwargs["drop_path_rate"] = drop_path
        size = self.view.size
        try:
            model = create_model(self.model, **kwargs)
            if self.converted is not None:
                convert(model, **self.converted)
            _try_on(model, (2, self.view.channels, size, size), len(self.classes))
        except NearsightError:
            raise
        except Exception as error:  # timm's models raise what they like, assertions included
            if "unexpected keyword argument 'drop_path_rate'" in str(error):
                raise OptionError(f"model {self.model!r} has no paths to drop: leave --drop-path at 0") from error
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OptionError(
                f"model {self.model!r} cannot take {size}x{size} images: {reason}; --size trains it on others"
            ) from error
        return model

    @property
    def is_given(self) -> bool:
        """Whether the network was an object of Python's, which :meth:`build` cannot make."""
        return self.model.startswith(GIVEN)

    def fitted(self, network: nn.Module) -> nn.Module:
        """A network that is there already, seen to take the pictures and to tell the classes apart; it stays as it was.

        Raises:
            OptionError: it has nothing to train or hold, cannot take pictures of this size, or has other outputs, in
                evaluation or in training.
        """
        name, size = self.model.removeprefix(GIVEN), self.view.size
        shape = (2, self.view.channels, size, size)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise OptionError(f"a network needs weights that can be trained; {name} has none")
        for mode in (evaluating, trying_to_train):
            try:
                with mode(network), torch.no_grad():
                    out = network(torch.zeros(shape, device=next(network.parameters()).device))
            except (NearsightError, MemoryError):
                raise
            except Exception as error:  # a network raises what it likes about pictures that it cannot take
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise OptionError(f"the network {name} cannot take float32 images {shape}: {reason}") from error
            if not isinstance(out, Tensor) or out.shape != (2, len(self.classes)):
                received = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise OptionError(
                    f"the network {name} must answer 2 images with a tensor (2, {len(self.classes)}), an output for each "
                    f"class of {self.data.removeprefix(GIVEN)}; received {received}"
                )
        return network

    def of_size(self, img_size: int) -> Blueprint:
        """The same network for images of another size.

        Raises:
            OptionError: no size, or a network that was given from Python.
        """
        if type(img_size) is not int or img_size < 1:
            raise OptionError(f"img_size must be a number of pixels per side, at least 1; received {img_size!r:.100}")
        if self.is_given:
            raise OptionError(
                f"img_size is for networks that a file rebuilds; make {self.model.removeprefix(GIVEN)} for other images "
                "yourself, and leave img_size out"
            )
        made_for = img_size if made_for_size(self.model) else None
        view = replace(self.view, size=img_size)
        return replace(self, model=without_option(self.model, "img_size"), view=view, img_size=made_for)

    def kept(self, network: nn.Module) -> Blueprint:
        """The same as a file may hold it: without what says where the weights of ``network`` came from.

        Raises:
            OptionError: the model has options that no file may hold; see docs/reference/security.md.
        """
        return replace(self, model=saved_spec(self.model, network))

    def to_json(self) -> str:
        """The blueprint as text, without what says where weights came from.

        Raises:
            OptionError: it was converted with a position that has no name, or the model has options no file may hold.
        """
        values = asdict(replace(self, model=saved_spec(self.model)))
        if not self.imports:  # as most, and all that were written before there were any
            del values["imports"]
        return json.dumps(values, default=_unnamed)

    @classmethod
    def from_json(cls, text: str) -> Blueprint:
        """Read what a file holds, whoever wrote it: nothing in it makes :meth:`build` read or fetch anything.

        Raises:
            ValueError, TypeError, KeyError: it holds something else, or more than a file may.
        """
        values = json.loads(text)
        if not _are_texts(values["classes"]):  # as they are there: a blueprint makes texts of them that can be shown
            raise ValueError("its classes must be texts")
        values.setdefault("imports", ())
        view = View(**{name: _tupled(value) for name, value in values.pop("view").items()})
        blueprint = cls(view=view, **{name: _tupled(value) for name, value in values.items()})
        blueprint._check()
        return blueprint

    def _check(self) -> None:
        refuse_unimported(self.imports, "it")
        check_saved_spec(self.model)
        if not isinstance(self.data, str):
            raise ValueError("its data must be a text")
        sizes, numbers = (self.view.channels, self.view.size), (*self.view.mean, *self.view.std)
        sizes += () if self.img_size is None else (self.img_size,)
        opaque(self.view.background)
        if not all(type(size) is int and size > 0 for size in sizes) or not all(map(_is_number, numbers)):
            raise ValueError(f"its view must be of numbers; received {self.view}")
        fits = self.view.interpolation in INTERPOLATIONS and self.view.crop_mode in CROP_MODES
        if not fits or not (_is_number(self.view.crop_pct) and 0 < self.view.crop_pct <= 2):
            raise ValueError(f"its view must fit pictures in one of timm's ways; received {self.view}")
        options = {} if self.converted is None else {**self.converted}
        names = options.pop("names", [])  # of layers, with dots in them
        if not options.keys() <= CONVERTED or not is_plain(options) or not _are_texts(names):
            raise ValueError(f"it may be converted with {', '.join(sorted(CONVERTED))}; received {self.converted}")


def save_model(path: str | PathLike[str], model: nn.Module, blueprint: Blueprint) -> None:
    """Write weights and blueprint as safetensors, whole or not at all; the same model gives the same bytes."""
    # Each apart from the others: safetensors holds no tensor twice, and weights of one's own may be tied.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    values = json.loads(blueprint.kept(model).to_json())
    # One entry, since safetensors writes several in any order.
    write_bytes(to_path(path), save(tensors, metadata={KEY: json.dumps({**values, DIGEST: _digest(values, tensors)})}))


def load_model(
    path: str | PathLike[str], network: nn.Module | None = None, img_size: int | None = None
) -> tuple[nn.Module, Blueprint]:
    """Rebuild a trained model from a run's folder, a ``.safetensors`` or a ``.ckpt`` file, or by the name of a network whose
    weights come with the package.

    Whoever wrote the file, no code of it runs. Nothing is fetched, written or read elsewhere: docs/reference/security.md.

    Args:
        network: that the weights are loaded into, where it was given from Python when it was trained.
        img_size: of the images that it is to take; None: that of its training.

    Raises:
        DataError: nothing there, an unreadable or damaged file, or one that nearsight did not write; a network that no file
            rebuilds, or that the weights do not fit.
        OptionError: a network where the file says how its own is rebuilt; an ``img_size`` that the network cannot take.
    """
    file = _weights_file(to_path(path))
    text, weights = _read_checkpoint_weights(file) if file.suffix == ".ckpt" else _read_safetensors(file)
    try:
        blueprint = Blueprint.from_json(text)
        if img_size is not None:
            model, blueprint = _resized(blueprint, weights, img_size)
        else:
            model = blueprint.build() if network is None or not blueprint.is_given else blueprint.fitted(network)
            model.load_state_dict(weights)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, RecursionError) as error:
        if img_size is not None and isinstance(error, NearsightError):  # of what was asked, not of the file
            raise
        # PyTorch names the module in its first line, and in the next the first tensor that does not fit.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise DataError(f"{file} does not hold a model that can be rebuilt: {reason}") from error
    if network is not None and network is not model:
        raise OptionError(f"{file} says how to rebuild its network, {blueprint.model}: leave out model=")
    return model.eval(), blueprint


def _resized(blueprint: Blueprint, weights: Mapping[str, Tensor], img_size: int) -> tuple[nn.Module, Blueprint]:
    """The network for images of another size: timm's own way for a network of timm's that is made for one size."""
    asked = blueprint.of_size(img_size)
    if not pretrained_value(blueprint.model, "fixed_input_size"):
        model = asked.build()
        model.load_state_dict(resize_positions(weights, model))
        return model, asked
    model: Any = blueprint.build()
    model.load_state_dict(weights)
    if not hasattr(model, "set_input_size"):
        raise OptionError(f"{blueprint.model} takes images of {blueprint.view.size} pixels alone: leave out img_size")
    try:
        model.set_input_size(img_size=(img_size, img_size))
        _try_on(model, (2, asked.view.channels, img_size, img_size), len(asked.classes))
    except Exception as error:  # timm's models raise what they like, assertions included
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OptionError(f"{blueprint.model} cannot take {img_size}x{img_size} images: {reason}") from error
    return model, asked


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """A checkpoint of ``nearsight train``; only plain data is unpickled, so a foreign file cannot run code.

    Raises:
        DataError: missing, truncated, damaged, not a checkpoint, or one that would run code.
    """
    path = to_path(path)
    try:
        check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}") from error
    except Exception as error:  # torch.load and zipfile raise many kinds; each means the same to the user
        raise DataError(
            f"cannot read the checkpoint {path}: it is truncated, damaged or of another kind; put back a copy of it, or "
            "start the run again with another --output"
        ) from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint or "state_dict" not in checkpoint:
        raise DataError(f"{path} was not written by `nearsight train`")
    return checkpoint


def check_sums(archive: str | PathLike[str]) -> None:
    """Read what ``torch.save`` wrote, a zip archive, against the checksums in it, which ``torch.load`` does not.

    Raises:
        zipfile.BadZipFile: no such archive, or a part that is not what was written; zipfile has other kinds for damage, too.
    """
    with zipfile.ZipFile(archive) as parts:
        damaged = parts.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} does not have its checksum")


def _digest(blueprint: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of everything that is rebuilt from a file: values of the blueprint; names, dtypes, shapes and bytes of the tensors."""
    found = sha256(json.dumps(blueprint, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_blueprint(checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> Blueprint:
    """That of the network in what :func:`read_checkpoint` has read.

    Raises:
        DataError: it does not say how its network is rebuilt.
    """
    try:
        return Blueprint.from_json(checkpoint[KEY])
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} does not say how its network is rebuilt: {error}") from error


def _weights_file(path: Path) -> Path:
    candidates = [path / WEIGHTS_FILE, path / CHECKPOINT_FILE] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    if not path.exists() and (ours := shipped(str(path))) is not None:
        return ours
    raise DataError(f"there is no {' or '.join(str(file) for file in candidates)}; `nearsight train` leaves them")


def _read_safetensors(path: Path) -> tuple[str, Mapping[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}; is it a whole safetensors file? {_way_on(path)}") from error
    if KEY not in metadata:
        raise DataError(
            f"{path} was not written by `nearsight train`: its header does not say how to rebuild the model"
        )
    return _undamaged(path, metadata[KEY], weights), weights


def _undamaged(path: Path, text: str, weights: Mapping[str, Tensor]) -> str:
    """The blueprint's text without the digest that stands in it, once that has been held against the file."""
    try:
        values = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: its header is no JSON; {_way_on(path)}") from error
    digest = values.pop(DIGEST, None)
    if digest not in (None, _digest(values, weights)):
        raise DataError(f"{path} is damaged: its weights or its header are not what was written; {_way_on(path)}")
    return json.dumps(values)


def _way_on(path: Path) -> str:
    checkpoint = path.with_name(CHECKPOINT_FILE)
    return "put back a copy of it" + (f", or take {checkpoint}, the last epoch's" if checkpoint.is_file() else "")


def _read_checkpoint_weights(path: Path) -> tuple[str, Mapping[str, Tensor]]:
    checkpoint = read_checkpoint(path)
    state = checkpoint["state_dict"]
    prefix = EMA if any(name.startswith(EMA) for name in state) else PREFIX
    return checkpoint[KEY], {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


@torch.no_grad()
def _try_on(model: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
    """Many networks have a smallest picture; better to say so now than in the middle of a traceback."""
    with evaluating(model):
        out = model(torch.zeros(shape))
    if out.shape != (shape[0], num_classes):
        raise OptionError(f"its output must be {(shape[0], num_classes)}; received {tuple(out.shape)}")


def _unnamed(value: Any) -> Any:
    raise OptionError(UNNAMED_POSITION)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _are_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(one, str) for one in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

# SPDX-License-Identifier: Apache-2.0
"""What a run is asked to do: one flat set of values that the command line, a YAML file and Python share.

The command line makes its flags from it, and shows them without having loaded PyTorch: what knows networks and pictures is
imported where a value is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from inspect import signature
from os import PathLike
from typing import Any

from .. import own_code
from ..errors import DataError, NearsightError, OptionError
from ..files import read_text, read_yaml, to_path
from ..own_code import refuse_unimported
from ..pages.brief import Brief, brief
from ..picture import BACKGROUND, opaque

CONFIG_FILE = "config.yaml"  # in a run's folder
PER_RUN = ("model", "seed")  # the values in which the runs of a comparison differ
OWN_SIZE = "own"  # the value of size that stands for what each model is made for
# Settings that a model's string may carry, because one kind of layer needs them otherwise than another.
PER_MODEL = ("lr", "opt", "weight_decay", "warmup_share", "clip_grad")


def _option(default: Any, kind: Any, help: str, common: Any = None) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, "common": common})


def _open(kind: Any, help: str, common: Any = None) -> Any:
    """A setting that a data set may have its own default for; ``common`` is that of the data sets which have none."""
    return _option(None, kind, help, common)


@dataclass(frozen=True, repr=False)
class Recipe(Brief):
    """A run's settings. A value of None stands for the data set's own default, or the common one: see :meth:`filled`.

    ``batch_size`` is that of a whole step, over all processes and accumulated parts: more of them change how a step is
    computed, not what it computes. Batch norms are the exception: their statistics are those of a part.

    Raises:
        OptionError: a value outside its range; the message names the rule and the value.
    """

    model: str = _option("sasa_nano", str, "a name from `nearsight models` or timm; options follow: NAME,option=value")
    data: str = _option(
        "digits", str, "digits, mnist, [rotated-]fashion-mnist, cifar10, cifar100, folder:PATH, hf:NAME or wds:PATH"
    )
    data_root: str | None = _option(None, str, "folder that holds the data; else the usual places are searched")
    size: int | str | None = _open(
        int | str, "pixels per side that the pictures are brought to, or own: what the model is made for"
    )
    background: str = _option(BACKGROUND, str, "colour that shows where images are transparent, as white or #ff8000")
    epochs: int | None = _open(int, "passes over the training images")
    batch_size: int | None = _open(int, "images per step, over all devices")
    lr: float | None = _open(float, "peak learning rate")
    opt: str | None = _open(str, "optimiser, by timm's name; sgd is Nesterov's with momentum 0.9", "adamw")
    weight_decay: float | None = _open(float, "of all weights but norms, biases and positions", 0.05)
    warmup_share: float | None = _open(float, "share of all steps in which the learning rate rises", 0.1)
    clip_grad: float | None = _open(float, "largest norm of the gradient; 0: any", 1.0)
    label_smoothing: float | None = _open(float, "share of the target spread over all classes", 0.1)
    mixup: float | None = _open(float, "alpha of mixup; 0: off", 0.0)
    cutmix: float | None = _open(float, "alpha of cutmix; 0: off", 0.0)
    random_erasing: float | None = _open(float, "chance that a rectangle of an image is erased", 0.0)
    drop_path: float | None = _open(float, "chance that the last block is skipped, rising from 0 in the first", 0.0)
    ema_decay: float | None = _open(float, "of the mean weights, which are then validated and saved; 0: off", 0.0)
    augment: str | None = _open(
        str,
        "how training varies images: none, light (crops to 0.8 of the area or more) or full (0.08, and mirrors)",
    )
    mirror: bool | None = _open(bool, "mirror half of the training images; goes before --augment")
    crop: float | None = _open(float, "least share of an image's area that training crops to; goes before --augment")
    seed: int = _option(0, int, "the same seed gives the same run")
    precision: str = _option("32", int | str, "32, or bf16 for bfloat16 autocast")
    compile: bool = _option(False, bool, "compile the network with torch.compile")
    accumulate: int = _option(
        1, int, "parts that a step's images are computed in, to save memory; batch norms see a part"
    )
    devices: int = _option(1, int, "processes to train with, on each host")
    nodes: int = _option(1, int, "hosts to train on; start one process per device on each with torchrun")
    strategy: str = _option("ddp", str, "of several processes: ddp, or fsdp on GPUs to split the weights as well")
    workers: int | None = _open(int, "processes that load images, for each device")
    max_broken: int = _option(10, int, "unreadable images to name and skip before giving up")
    tensorboard: bool = _option(False, bool, "write TensorBoard logs into OUTPUT/tensorboard too")

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", str(self.precision))  # YAML reads 32 as a number
        for name in ("epochs", "batch_size", "accumulate", "devices", "nodes"):
            _within(name, getattr(self, name), 1)
        for name in ("seed", "weight_decay", "clip_grad", "mixup", "cutmix", "workers", "max_broken"):
            _within(name, getattr(self, name), 0)
        for name in ("warmup_share", "label_smoothing", "random_erasing", "drop_path", "ema_decay"):
            _within(name, getattr(self, name), 0, 1)
        if self.size != OWN_SIZE:
            if self.size is not None and type(self.size) is not int:
                raise OptionError(f"size must be a whole number of pixels or {OWN_SIZE}; received {self.size!r}")
            _within("size", self.size, 1)
        if self.augment is not None:
            _check_augment(self.augment)
        if self.crop is not None and not 0 < self.crop <= 1:
            raise OptionError(f"crop must be a share of the area, above 0 and at most 1; received {self.crop}")
        _among("precision", self.precision, ("32", "bf16"))
        _among("strategy", self.strategy, ("ddp", "fsdp"))
        opaque(self.background)
        if self.seed >= 2**32:
            raise OptionError(f"seed must be below 2**32; received {self.seed}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr must be a positive number; received {self.lr:g}")
        if self.opt is not None:
            _check_optimiser(self.opt)
        parts = self.devices * self.nodes * self.accumulate
        if self.batch_size is not None and self.batch_size % parts:
            raise OptionError(
                f"batch-size must be a multiple of devices x nodes x accumulate; received {self.batch_size} for "
                f"{self.devices} x {self.nodes} x {self.accumulate}"
            )
        if self.batch_size is not None:
            check_mixed(self, self.batch_size)
        if self.ema_decay and self.strategy == "fsdp" and self.processes > 1:
            raise OptionError(
                f"ema-decay must be 0 with strategy fsdp, which has no whole weights; received {self.ema_decay:g}"
            )

    def __repr__(self) -> str:
        """Model and data, and what else is not left to the defaults."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        usual = {field.name: field.default for field in fields(self)}
        own = [name for name in told if name in ("model", "data") or told[name] != usual[name]]
        return f"Recipe({', '.join(f'{name}={brief(told[name])}' for name in own)})"

    @property
    def processes(self) -> int:
        """Over all hosts."""
        return self.devices * self.nodes

    def filled(self, defaults: Mapping[str, Any]) -> Recipe:
        """The same recipe with ``defaults``, then the common ones, in the place of what was left open."""
        common = {field.name: field.metadata["common"] for field in fields(self)}
        values = {name: value for name, value in {**common, **defaults}.items() if getattr(self, name) is None}
        return replace(self, **values)

    def settled(self) -> Recipe:
        """The same recipe with the settings that ``model`` carries in their own places, where they win.

        Raises:
            OptionError: a setting that a model cannot have of its own, or one of another type; an option of the network that
                would change nothing.

        Example:
            >>> recipe = Recipe(model="conv_nano,lr=0.003,opt=sgd,stem_width=16", lr=0.01).settled()
            >>> recipe.model, recipe.lr, recipe.opt
            ('conv_nano,stem_width=16', 0.003, 'sgd')
        """
        from ..models import refuse_ignored

        network, own = _split(self.model)
        _check_own(self.model, own)
        refuse_ignored(network)
        return replace(self, model=network, **own)

    def to_yaml(self, stored: str | None = None) -> str:
        """Text that ``nearsight train --config`` reads back.

        Args:
            stored: the model as a file may hold it; None leaves out what says where its weights come from.
        """
        import yaml

        from ..saved.spec import saved_spec

        stored = saved_spec(self.model) if stored is None else stored
        values = {name: value for name, value in asdict(replace(self, model=stored)).items() if value is not None}
        values |= noted_imports()
        began = "" if stored == self.model else f"{BEGAN}; for the same add --model {json.dumps(self.model)}\n"
        return f"{self.rerun}\n{began}{yaml.safe_dump(values, sort_keys=False)}"

    @property
    def given(self) -> tuple[str, ...]:
        """What was given as an object of Python's, of model and data: no file makes it again."""
        from ..models.spec import GIVEN

        return tuple(name for name in ("model", "data") if getattr(self, name).startswith(GIVEN))

    @property
    def rerun(self) -> str:
        """How to run it again, as the first line of its file."""
        if not self.given:
            return RERUN
        return f"# Its {' and '.join(self.given)} came from Python, and no file makes them again: nearsight.train(...) does"


def noted_imports() -> dict[str, list[str]]:
    """What a recipe's file says of ``--import``: no setting, and nothing that is done because a file says so."""
    return {own_code.KEY: list(own_code.imported())} if own_code.imported() else {}


RERUN = "# Run it again: nearsight train --config THIS_FILE --output NEW_FOLDER"
BEGAN = "# It began with weights from elsewhere, which no file may ask for"


def _split(model: str) -> tuple[str, dict[str, Any]]:
    """A model's string without the options that are settings of a run, and these; ``img_size`` is left to the network."""
    from ..models.spec import parse_spec

    names = {field.name for field in fields(Recipe)}
    options = {name.replace("-", "_"): value for name, value in parse_spec(model)[1].items()}
    own = {name: value for name, value in options.items() if name in names}
    # Cut out of the text as it stands, at the commas before NAME=, so that the rest keeps its spelling.
    name, *parts = re.split(r",(?=\s*[\w-]+\s*=)", model)
    kept = [part for part in parts if part.partition("=")[0].strip().replace("-", "_") not in own]
    return ",".join([name, *kept]), own


def _check_own(model: str, own: Mapping[str, Any]) -> None:
    from ..models.spec import parse_spec

    options = parse_spec(model)[1]
    if "img_size" in options:
        raise OptionError(
            f"img_size is no option of a network that is trained: leave it out of {model!r} and give the size of the "
            f"pictures as --size {options['img_size']}"
        )
    for name, value in own.items():
        if name not in PER_MODEL:
            raise OptionError(
                f"{name} is no option of a network but a setting of the run: leave it out of {model!r} and give "
                f"--{name.replace('_', '-')}; what a model can have of its own is {', '.join(PER_MODEL)}"
            )
        kind = str if _KINDS[name][0] is str else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise OptionError(
                f"{name} must be a {'name' if kind is str else 'number'}; received {value!r} in {model!r}"
            )


def read_recipe(path: str | PathLike[str], given: Container[str] = ()) -> Recipe:
    """The recipe in a run's ``config.yaml``.

    Args:
        given: names of values that were typed as well, so that what the file says of them is not done.

    Raises:
        DataError: the file cannot be read, is no YAML, holds something else, or names what is to be fetched.
        OptionError: a value outside its range.
    """
    values = read_settings(path, given)
    wrong = of_wrong_type(values)
    if wrong:
        raise DataError(f"{path} holds a value of the wrong type: {wrong[0]} is {values[wrong[0]]!r:.100}")
    return Recipe(**values)


def read_settings(path: str | PathLike[str], given: Container[str] = ()) -> dict[str, Any]:
    """The values in a recipe's file, whoever wrote it: nothing in it makes a run fetch what its user did not name.

    Args:
        given: as for :func:`read_recipe`.

    Raises:
        DataError: the file cannot be read, is no YAML, holds something else, or names what is to be fetched.
    """
    try:
        values = read_yaml(read_text(to_path(path)))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    refuse_unimported(values.pop(own_code.KEY, ()) if isinstance(values, dict) else (), path)
    if not isinstance(values, dict) or not set(values) <= _KINDS.keys():
        raise DataError(f"{path} must hold only {', '.join(sorted(_KINDS))}; it is damaged or no config of a run")
    try:
        if "model" in values and "model" not in given:
            from ..saved.spec import check_saved_spec

            model = values["model"]
            check_saved_spec(_split(model)[0] if isinstance(model, str) else model)
    except NearsightError as error:
        raise DataError(f"{path}: {error}; if you trust where the file comes from, type it: --model ...") from error
    if "data" not in given and str(values.get("data")).startswith("hf:"):
        raise DataError(
            f"{path}: a file may name no data set that is fetched; received {values['data']!r:.100}; if you trust where "
            "the file comes from, type it: --data hf:..."
        )
    return values


def of_wrong_type(values: Mapping[str, Any]) -> list[str]:
    """The names of settings whose values are of another type than theirs."""
    return [name for name, value in values.items() if not _is_of(_KINDS[name], value)]


_KINDS = {field.name: (field.metadata["kind"], field.default is None) for field in fields(Recipe)}


def _is_of(kind: tuple[Any, bool], value: Any) -> bool:
    """Whether a value read from YAML is of a setting's kind; a whole number does for any."""
    of, may_be_open = kind
    if value is None or isinstance(value, bool):
        return may_be_open if value is None else of is bool
    return isinstance(value, (int, float) if of is float else of)


def check_mixed(recipe: Recipe, step: int) -> None:
    """Mixup and cutmix mix the images that a process has of a part with each other.

    Raises:
        OptionError: a step of so many images leaves one for each.
    """
    parts = recipe.processes * recipe.accumulate
    if (recipe.mixup or recipe.cutmix) and step // parts < 2:
        raise OptionError(
            f"mixup and cutmix need two images or more in each part of a step; received a step of {step} in {parts} "
            f"part{'s' * (parts > 1)}: take more images (--batch-size), fewer parts (--accumulate), or --mixup 0 --cutmix 0"
        )


def _within(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    """A count from ``least`` on, or a share below one; nan is neither."""
    if value is not None and not least <= value < below:
        range = f"at least {least}" + (f" and below {below}" if below < math.inf else "")
        raise OptionError(f"{name.replace('_', '-')} must be {range}; received {value}")


def _among(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name} must be {' or '.join(known)}; received {value!r}")


def _check_augment(name: str) -> None:
    from .data.pictures import AUGMENTS

    _among("augment", name, tuple(AUGMENTS))


def _check_optimiser(name: str) -> None:
    from timm.optim import list_optimizers

    known = [str(one) for one in list_optimizers()]
    if name not in known:
        near = get_close_matches(name, [one for one in known if _why_not(one) is None], n=3)
        advice = f"did you mean {', '.join(near)}?" if near else "adamw and sgd are usual"
        raise OptionError(f"opt must be an optimiser of timm; received {name!r}; {advice}")
    reason = _why_not(name)
    if reason is not None:
        raise OptionError(
            f"opt must be an optimiser that can train here; received {name!r}: {reason}; take adamw or sgd"
        )


@cache
def _why_not(name: str) -> str | None:
    """What one of timm's optimisers asks for that a run has not; those for graphics cards say so when they are made."""
    import torch
    from timm.optim import create_optimizer_v2, get_optimizer_info

    if get_optimizer_info(name).second_order:
        return "it needs second gradients, which a run does not compute"
    try:
        optimizer = create_optimizer_v2([torch.nn.Parameter(torch.zeros(2, 2))], opt=name, lr=0.1)
    except Exception as error:  # what its own code asserts or imports
        return (str(error) or type(error).__name__).splitlines()[0]
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return "it computes a step's gradient several times"
    return None

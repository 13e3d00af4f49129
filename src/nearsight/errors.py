# SPDX-License-Identifier: Apache-2.0
"""What nearsight raises when it is asked for something that cannot be.

    NearsightError              catch this one to catch them all
    +-- ShapeError              sizes, ranks and tables that do not fit together   (a ValueError)
    +-- DtypeError              a tensor of the wrong dtype, device or type        (a TypeError)
    +-- OptionError             an unknown name or a value outside its range       (a ValueError)
    +-- BackendError            the backend that was named cannot run the problem  (a RuntimeError)
    +-- DataError               a data set, image or checkpoint cannot be read     (a RuntimeError)
    +-- TrainingError           a run cannot start or had to stop                  (a RuntimeError)
    +-- PackageError            a package that this needs is not installed         (an ImportError)

Every message says the rule, what was received and what to do about it.
"""


class NearsightError(Exception):
    """The root of all of nearsight's own exceptions."""


class ShapeError(NearsightError, ValueError):
    """Sizes, ranks or tables do not fit together."""


class DtypeError(NearsightError, TypeError):
    """A value has the wrong dtype, device or type."""


class OptionError(NearsightError, ValueError):
    """A name is unknown or a value is outside its range."""


class BackendError(NearsightError, RuntimeError):
    """The backend that was named cannot run this problem."""


class DataError(NearsightError, RuntimeError):
    """A data set, an image or a checkpoint cannot be read."""


class TrainingError(NearsightError, RuntimeError):
    """A run cannot start, or had to stop."""


class PackageError(NearsightError, ImportError):
    """A package that this needs, and the rest of nearsight does not, is not installed."""

"""What a caller may handle. A message names the thing, the value, what is allowed, the remedy.

The classes take the message alone: anything else leaves a Ray worker as an
``UnserializableException``.
"""


class DriftlineError(Exception):
    """Base of all errors that a user can act on; the command prints it without a traceback."""


class SettingsError(DriftlineError, ValueError):
    """A settings file, a ``--set`` or a moment that cannot be used."""


class ContractError(DriftlineError):
    """A table that does not fit its schema; the file is refused as a whole."""


class EmptyWindowError(DriftlineError):
    """A window of event time holds no row, so there is nothing to learn from or to judge by."""


class MissingArtefactError(DriftlineError):
    """A step needs what an earlier step writes; the message names the command that writes it."""


class FrozenTeacherError(DriftlineError):
    """The teacher is trained once; someone tried to train, change or replace it."""


class BundleError(DriftlineError):
    """A bundle is incomplete, altered, or does not fit the cache, contract or code beside it."""


class ArtefactError(DriftlineError, ValueError):
    """A file that an earlier step wrote is cut short or altered; removed, it is written anew."""


class ResourceError(DriftlineError):
    """The cluster cannot give what the settings ask for; without this check Ray waits forever."""


class TrainingError(DriftlineError):
    """Training cannot go on, such as a loss that is no longer a number."""


class RequestError(DriftlineError):
    """A scoring request that cannot be answered; becomes HTTP 4xx."""


class DeliveryError(DriftlineError):
    """A bundle cannot get the part in the traffic that was asked for."""

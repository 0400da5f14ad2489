"""The errors that a user of K-1 can put right; everything else is a bug."""


class K1Error(Exception):
    """A user-correctable problem; the message names cause and remedy."""


class DataError(K1Error):
    """Text data is missing, unreadable or too small for what was asked."""


class ConfigError(K1Error):
    """A setting is unknown, out of range or in conflict with another one."""


class CheckpointError(K1Error):
    """A checkpoint cannot be written, or is missing, damaged or of the wrong kind."""


class LedgerError(K1Error):
    """The ledger is missing or damaged, or a resumed run departs from it."""


class DeviceError(K1Error):
    """The requested device is absent or cannot do what was asked of it."""


class TopologyError(K1Error):
    """A change of the tree is impossible, such as deleting the root or exceeding capacity."""

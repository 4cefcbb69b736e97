"""Errors that say what came, what was expected and what to do."""


class StyleMasterError(Exception):
    """Base of every error that a user can mend; the command line exits with code 2 on it."""


class ConfigError(StyleMasterError, ValueError):
    """An option, a number or a range that cannot work."""


class LayoutError(StyleMasterError, ValueError):
    """A tensor, image or video of the wrong shape, type or content."""


class WeightsError(StyleMasterError):
    """A weight file that is missing, damaged, of another kind or of another size."""


class DiskError(StyleMasterError):
    """A file that a disk does not take: it is full or read-only, or the place does not exist."""


class UnsupportedHostError(StyleMasterError):
    """The host model, device or an installed library cannot do what was asked."""

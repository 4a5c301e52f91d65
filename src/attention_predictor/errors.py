"""All errors that this library raises; each also derives from the built-in class that callers expect."""


def one_line(error: BaseException, at_most: int = 120) -> str:
    """Another library's error message on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:at_most]


class AttentionPredictorError(Exception):
    """Base of all errors of this library: catch this one to catch them all."""


class ConfigError(AttentionPredictorError, ValueError):
    """An option has a value that is not allowed."""


class SettingError(ConfigError):
    """A setting of ``OffloadConfig`` has a value that is not allowed.

    Attributes:
        name: The field.
        found: Its value, or the text that could not be read as one.
        expected: What is allowed, in words.
    """

    def __init__(self, name: str, found: object, expected: str) -> None:
        super().__init__(name, found, expected)
        self.name, self.found, self.expected = name, found, expected

    def __str__(self) -> str:
        return f"{self.name}={self.found!r} is not allowed: expected {self.expected}"


class AttachError(AttentionPredictorError, RuntimeError):
    """A model cannot be attached to, or detached from."""


class CheckpointError(AttentionPredictorError, ValueError):
    """A file of predictor weights is missing, damaged or made for another shape."""


class HostMemoryError(AttentionPredictorError, MemoryError):
    """There is not enough CPU memory for the KV blocks."""


class ContextLengthError(AttentionPredictorError, ValueError):
    """A sequence is longer than the model or the cache can hold."""


class LogitsError(AttentionPredictorError, ArithmeticError):
    """A model's logits are NaN, so no token can be chosen."""


class DataError(AttentionPredictorError, ValueError):
    """A data set or a recording is missing, damaged or of the wrong form."""


class WriteError(AttentionPredictorError, OSError):
    """A file cannot be written: the disk is full, the folder is read-only, or permission is missing."""


class FetchError(AttentionPredictorError, RuntimeError):
    """Fetching blocks to the device failed; the cache must not be used further."""


class IntegrityError(AttentionPredictorError, AssertionError):
    """An internal structure is inconsistent: a bug in this library."""


class BuildError(AttentionPredictorError, RuntimeError):
    """The kernels can't be built on this machine."""

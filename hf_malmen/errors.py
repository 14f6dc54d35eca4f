"""Errors a user can act on. Each message says what was expected, what came, and what to do next."""

# What to do about a file that is not what it says it is.
DAMAGED = "It is damaged: download it again, or restore it from a copy."


class HfMalmenError(Exception):
    """Base class: `except HfMalmenError` catches everything this package raises on purpose."""


class FactError(HfMalmenError, ValueError):
    """A fact, or a file of facts, cannot be used as it is."""


class ModelMismatchError(HfMalmenError, ValueError):
    """An editor or an edit does not fit the model (or checkpoint) it was given."""


class NumericalError(HfMalmenError, ArithmeticError):
    """A key, a gradient or a solve is not finite; the message names the layer."""


class CheckpointError(HfMalmenError, ValueError):
    """A safetensors checkpoint cannot be read or written safely."""


class CheckpointWriteError(CheckpointError, OSError):
    """Writing to a checkpoint failed, or another process is writing to it. The checkpoint is as it was."""


class EditStateError(HfMalmenError, RuntimeError):
    """An edit or an editor is asked for something its state does not allow, such as undoing what was never applied."""


class OtherProcessError(HfMalmenError, RuntimeError):
    """Another of the processes that work together failed, so that this one cannot go on. The message says which."""


class HfMalmenWarning(UserWarning):
    """Base class of this package's warnings."""


class FingerprintWarning(HfMalmenWarning):
    """The base model's target weights are not those the editor, or the edit, was made for."""


class UntrainedEditorWarning(HfMalmenWarning):
    """The editor has seen no training data, so it neither standardises its inputs nor knows how to edit."""


class TruncationWarning(HfMalmenWarning):
    """A LoRA adapter of the wanted rank cannot hold the whole edit."""

"""Rewrite thousands of facts in a language model's weights at once, by MALMEN.

Names are imported when they are first used, so that `import hf_malmen` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

_MODULE_OF = {
    "Edit": "edit",
    "EditorConfig": "configuration",
    "EditorModel": "modeling",
    "EditorTrainer": "training",
    "EditorTrainingArguments": "training_arguments",
    "Evaluation": "evaluation",
    "Fact": "facts",
    "FactStream": "facts",
    "Ledger": "ledger",
    "LedgerEntry": "ledger",
    "facts_in_force": "in_force",
    "live_edits": "live",
    "load_facts": "facts",
    "measure_edit": "evaluation",
    "measure_side_effects": "side_effects",
    "read_history": "records",
    "recover_checkpoint": "history",
    "undo_edit": "history",
    "HfMalmenError": "errors",
    "FactError": "errors",
    "ModelMismatchError": "errors",
    "NumericalError": "errors",
    "CheckpointError": "errors",
    "CheckpointWriteError": "errors",
    "EditStateError": "errors",
    "OtherProcessError": "errors",
    "HfMalmenWarning": "errors",
    "FingerprintWarning": "errors",
    "TruncationWarning": "errors",
    "UntrainedEditorWarning": "errors",
}

__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:
    from .configuration import EditorConfig as EditorConfig
    from .edit import Edit as Edit
    from .errors import CheckpointError as CheckpointError
    from .errors import CheckpointWriteError as CheckpointWriteError
    from .errors import EditStateError as EditStateError
    from .errors import FactError as FactError
    from .errors import FingerprintWarning as FingerprintWarning
    from .errors import HfMalmenError as HfMalmenError
    from .errors import HfMalmenWarning as HfMalmenWarning
    from .errors import ModelMismatchError as ModelMismatchError
    from .errors import NumericalError as NumericalError
    from .errors import OtherProcessError as OtherProcessError
    from .errors import TruncationWarning as TruncationWarning
    from .errors import UntrainedEditorWarning as UntrainedEditorWarning
    from .evaluation import Evaluation as Evaluation
    from .evaluation import measure_edit as measure_edit
    from .facts import Fact as Fact
    from .facts import FactStream as FactStream
    from .facts import load_facts as load_facts
    from .history import recover_checkpoint as recover_checkpoint
    from .history import undo_edit as undo_edit
    from .in_force import facts_in_force as facts_in_force
    from .ledger import Ledger as Ledger
    from .ledger import LedgerEntry as LedgerEntry
    from .live import live_edits as live_edits
    from .modeling import EditorModel as EditorModel
    from .records import read_history as read_history
    from .side_effects import measure_side_effects as measure_side_effects
    from .training import EditorTrainer as EditorTrainer
    from .training_arguments import EditorTrainingArguments as EditorTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

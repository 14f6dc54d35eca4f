"""`EditorTrainingArguments`: every choice of a training run, checked."""

import math
import os
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .modeling import DEFAULT_BATCH_SIZE
from .networks import DEFAULT_EDITOR_BATCH_SIZE

# Of a method that says nothing else.
TRAINING_DEFAULTS = {
    "is_sequential": False,
    "look_back": 1,
    "look_back_decay": 1.0,
    "shift_penalty": 0.0,
    "locality_weight": 1.0,
}
# Stands for "what the method has" until a trainer is made.
_OF_METHOD: Any = None
_HUB_STRATEGIES = (HubStrategy.END, HubStrategy.EVERY_SAVE)
# Of numbers that training an editor calculates with; all of these are finite.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lm_batch_size": 1,
    "editor_batch_size": 1,
    "rephrases_per_fact": 1,
    "look_back": 1,
    "look_back_decay": 0,
    "learning_rate": 0,
    "scale_learning_rate": 0,
    "locality_weight": 0,
    "shift_penalty": 0,
    "num_train_epochs": 0,
    "trunk_cache_gib": 0,
    "trunk_cache_dir_gib": 0,
    "seed": 0,
}
# Of a model that answers by itself, and is the one that is trained: {field: why an editor has no use for it}.
_CHECKPOINTING = "activations are the base model's, which stays in evaluation mode; a lower lm_batch_size keeps fewer"
_WITHOUT_EFFECT = {
    "label_smoothing_factor": "the loss is that of the method, on the targets as they are",
    "neftune_noise_alpha": "the embeddings are the base model's, which is not trained",
    "gradient_checkpointing": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    "deepspeed": "the whole editor is kept on each device, and this DeepSpeed would shard it. For a base model larger "
    "than a device, launch several processes with recipes/accelerate/fsdp.yaml or deepspeed_zero3.yaml",
}


@dataclass
class EditorTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what training an editor needs besides.

    `per_device_train_batch_size` counts the facts edited together in one step, and `per_device_eval_batch_size` those
    edited together in evaluation. Of several processes, the training facts of all are edited together: N processes take
    the steps of one with N times as many. Where defaults differ
    from those of `TrainingArguments` they are ours; the paper's are in `recipes/paper-*.yaml`.

    Args:
        lm_batch_size: sequences a pass of the language model. Changes memory and speed, and the result by the rounding
            of these passes only.
        editor_batch_size: tokens a pass of the hyper-network. Changes memory and speed, not the result.
        trunk_cache_gib: memory for what the base model computes whatever the edit: outputs of the blocks below the
            edited ones, keys and value gradients of facts, and the answers to unrelated prompts before the edit. Within
            a step each is computed once a sequence; what fits is kept for the next epoch too. Changes memory and speed,
            not the result. The targets that `"malmit"` seeks, one hidden state a fact, are kept in any case, up to the
            next checkpoint: as a run that resumes from it has to, a run that goes on seeks them again, unless they are
            on disk.
        trunk_cache_dir: folder that keeps them from run to run as safetensors files, None for none. Runs on the same
            base model and layers share it; another model's files are left alone, damaged ones reported and not used.
        trunk_cache_dir_gib: the most that the files of that folder may take.
        locality_weight: weight of the locality loss, KL(before ‖ after) on unrelated prompts. `None` takes the method's
            own, as for the next four: 1; of `"rledit"` 0.6.
        is_sequential: whether the `gradient_accumulation_steps` sets of one optimizer step are edited one after
            another, each on the model that those before it have edited, as RLEdit does; if not, each edits the base.
        look_back: how many sets count in the loss of a turn of such a sequence: its own and those before it. 1; of
            `"rledit"` 10.
        look_back_decay: a set that was edited k turns ago counts this to the power of k. 1; of `"rledit"` 0.95.
        shift_penalty: weight of ‖S‖², summed over layers, in the loss. 0; of `"rledit"` 1e-4.
        rephrases_per_fact: rephrases of each fact drawn into the generalisation loss at every step.
        scale_learning_rate: learning rate of log η, log λ and log κ. They are logarithms of scales that have orders of
            magnitude to travel, so they get a rate of their own.
        metric_for_best_model: as in `TrainingArguments`, a metric of `EditorModel.evaluate`. Where one is needed and
            none is given, `"generalization"`.

    Raises:
        ValueError: a value of another type, also of `TrainingArguments`' own numbers, or out of its range where
            training an editor calculates with it; or a setting that would have no effect.
    """

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Facts edited together in a step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Facts edited together in evaluation."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the hyper-network's matrices."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rates."})
    lm_batch_size: int = field(default=DEFAULT_BATCH_SIZE, metadata={"help": "Sequences a language-model pass."})
    editor_batch_size: int = field(default=DEFAULT_EDITOR_BATCH_SIZE, metadata={"help": "Tokens a hyper-network pass."})
    trunk_cache_gib: float = field(
        default=2.0, metadata={"help": "Memory (GiB) for outputs of the unedited blocks, kept between steps."}
    )
    trunk_cache_dir: str | None = field(default=None, metadata={"help": "Folder that keeps them from run to run."})
    trunk_cache_dir_gib: float = field(default=20.0, metadata={"help": "Limit (GiB) of that folder."})
    locality_weight: float = field(default=_OF_METHOD, metadata={"help": "Weight of the locality loss."})
    is_sequential: bool = field(default=_OF_METHOD, metadata={"help": "Edit the sets of a step one after another."})
    look_back: int = field(default=_OF_METHOD, metadata={"help": "Sets of a sequence in the loss of a turn."})
    look_back_decay: float = field(default=_OF_METHOD, metadata={"help": "How much less each earlier one counts."})
    shift_penalty: float = field(default=_OF_METHOD, metadata={"help": "Weight of the squared norm of a shift."})
    rephrases_per_fact: int = field(default=1, metadata={"help": "Rephrases a fact in the generalisation loss."})
    scale_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of log η, log λ and log κ."})

    def __post_init__(self) -> None:
        self._check_numbers()  # first, as `TrainingArguments` takes any value and fails wherever it calculates with it
        self._refuse_what_has_no_effect()
        self._refuse_mixed_precision()
        names_metric, names_direction = self.metric_for_best_model is not None, self.greater_is_better is not None
        super().__post_init__()
        if self.metric_for_best_model is not None and not names_metric:
            self.metric_for_best_model = "generalization"  # `Trainer`'s own is a loss, which no evaluation has
            self.greater_is_better = self.greater_is_better if names_direction else True
        # It shards whatever transformers loads or makes while it is there: the editor too.
        self.deepspeed_plugin = None
        self.remove_unused_columns = False  # facts are not columns
        if not isinstance(self.is_sequential, bool | None):
            value = self.is_sequential
            raise ValueError(f"EditorTrainingArguments.is_sequential is {value!r}; expected True or False.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"EditorTrainingArguments.train_sampling_strategy is {self.train_sampling_strategy!r}; allowed: "
                "'random', 'sequential'. A step's texts are put into batches of like lengths anyway."
            )
        if (strategy := HubStrategy(self.hub_strategy)) not in _HUB_STRATEGIES:
            raise ValueError(
                f"EditorTrainingArguments.hub_strategy is {strategy.value!r}; allowed: "
                f"{', '.join(repr(allowed.value) for allowed in _HUB_STRATEGIES)}. The others push the state of the "
                "optimizer, which is a pickle; an editor's repo holds safetensors only."
            )

    def _check_numbers(self) -> None:
        """Every field that is a number, `Trainer`'s too, for its type; those of `_LEAST` for their range."""
        for entry in fields(self):
            kinds = set(get_args(entry.type) or [entry.type])
            value, least = getattr(self, entry.name), _LEAST.get(entry.name, -math.inf)
            optional = NoneType in kinds or entry.default is None
            if kinds.isdisjoint((int, float)) or kinds - {int, float, NoneType} or (value is None and optional):
                continue
            is_number = isinstance(value, Integral if int in kinds else Real) and not isinstance(value, bool)
            if not is_number or not least <= value or (entry.name in _LEAST and math.isinf(value)):
                allowed = (
                    "a whole number" if int in kinds else "a finite number" if entry.name in _LEAST else "a number"
                )
                allowed += f" of at least {least}" if entry.name in _LEAST else ""
                hint = " Remove the quotes around it." if isinstance(value, str) and _is_number(value) else ""
                raise ValueError(f"EditorTrainingArguments.{entry.name} is {value!r}; expected {allowed}.{hint}")
        if self.look_back_decay is not None and self.look_back_decay > 1:
            raise ValueError(f"EditorTrainingArguments.look_back_decay is {self.look_back_decay}; expected 0 to 1.")

    def _refuse_what_has_no_effect(self) -> None:
        for name, why in _WITHOUT_EFFECT.items():
            if value := getattr(self, name, None):  # older releases of transformers lack some
                raise ValueError(f"EditorTrainingArguments.{name} is {value!r}; expected none: {why}. Leave it out.")

    def _refuse_mixed_precision(self) -> None:
        """The step computes its own gradients: no scaler sees them, and autocast would round the value differences."""
        asked = [f"EditorTrainingArguments.{name} is True" for name in ("fp16", "bf16") if getattr(self, name)]
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if precision != "no":
            asked.append(f"ACCELERATE_MIXED_PRECISION, which accelerate's configuration sets, is {precision!r}")
        if asked:
            raise ValueError(
                f"{' and '.join(asked)}; expected no mixed precision. The dtype that the base model is loaded in is "
                "the precision, and the hyper-network stays in float32. Leave the setting out, and load the base model "
                'with dtype="bfloat16", as a recipe says it with dtype: bfloat16.'
            )


def needed_fields(locality_weight: float) -> list[str]:
    """Fields of `Fact` that every training fact must have."""
    return ["rephrases"] + (["unrelated_prompt", "unrelated_answer"] if locality_weight else [])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

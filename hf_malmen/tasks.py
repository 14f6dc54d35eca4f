"""What a base model answers with: the continuation of a prompt, a second sequence, or a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from .errors import FactError, ModelMismatchError

# PEFT's task type -> what loads a checkpoint for it.
AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
}


def load_base(name_or_path: str | Path, task_type: str, **options: Any) -> Any:
    """Load a checkpoint for a task; one of text and images, which transformers lists as no causal model, with both.

    Args:
        name_or_path: its folder or Hub id.
        task_type: PEFT's.
        options: as for `from_pretrained`.

    Raises:
        ModelMismatchError: transformers has no model of that type for this task.
    """
    auto_class = AUTO_CLASSES[task_type]
    try:
        return auto_class.from_pretrained(name_or_path, **options)
    except ValueError:
        hub = {name: options[name] for name in ("revision", "token") if name in options}
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        if type(config) in auto_class._model_mapping:
            raise
    if task_type == "CAUSAL_LM" and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText.from_pretrained(name_or_path, **options)
    raise ModelMismatchError(
        f"{name_or_path} holds a model of type {config.model_type} ({', '.join(config.architectures or [])}), which "
        f"{auto_class.__name__} does not load. Load it yourself, and give the model itself."
    )


def infer_task_type(model: nn.Module) -> str | None:
    """PEFT's task type of `model`, or None for a class that transformers lists for none of the three."""
    classes = {base.__name__ for base in type(model).__mro__}
    if classes & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()):
        return "SEQ_CLS"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if classes & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) else None


def check_direction(model: nn.Module) -> None:
    """Check that a causal model's tokens see none that follow, among which is the answer.

    Raises:
        ModelMismatchError: it is an encoder that was loaded as a causal model, and not made one.
    """
    config = getattr(model, "config", None)
    # Some that are never anything but decoders have the setting too, unused.
    is_encoder = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and getattr(config, "is_decoder", None) is False and infer_task_type(model) == "CAUSAL_LM":
        raise ModelMismatchError(
            f"{type(model).__name__} has is_decoder=False: its tokens attend to those that follow, so that it reads an "
            "answer where it should give it. If it was trained as a decoder, load it with "
            "AutoModelForCausalLM.from_pretrained(..., is_decoder=True); else edit a classifier "
            "(AutoModelForSequenceClassification), or another model."
        )


def pools_tokens(model: Any) -> bool:
    """Whether the head of `model`, a sequence classifier of transformers, reads a mean over all tokens of a text."""
    settings = {getattr(model.config, name, None) for name in ("classifier_pooling", "pooling")}
    return bool(settings & {"mean", "late"})


@dataclass(frozen=True)
class Classes:
    """The classes of a sequence classifier.

    Attributes:
        ids: {label: index}.
        count: how many classes there are. A head with one logit s tells two classes apart, with logits 0 and s.
        at_end: whether the head reads the last token of a text, as that of a decoder does, instead of the first.
        pad_token_id: the token that such a head takes for padding.
    """

    ids: Mapping[str, int]
    count: int
    at_end: bool = False
    pad_token_id: int | None = None

    @classmethod
    def of(cls, model: Any) -> "Classes":
        """Those of `model`, a sequence classifier of transformers.

        Raises:
            ModelMismatchError: several classes can hold at once, a decoder's padding token is not set, or what the head
                reads depends on padding.
        """
        config, kind = model.config, model.config.model_type
        if config.problem_type == "multi_label_classification":
            raise ModelMismatchError(
                f"{type(model).__name__} has problem_type='multi_label_classification', and a fact's target is one "
                "class. Edit a model with one class a text."
            )
        summary = getattr(getattr(model, "sequence_summary", None), "summary_type", "first")
        if summary != "first":
            raise ModelMismatchError(
                f"The head of {type(model).__name__} has summary_type={summary!r}, for which padding counts, so that "
                "its answer depends on the texts beside. Edit a model whose head reads the first token."
            )
        is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        at_end = config.is_encoder_decoder or is_decoder or isinstance(model, GenericForSequenceClassification)
        pad_token_id = config.get_text_config().pad_token_id
        if at_end and pad_token_id is None:
            raise ModelMismatchError(
                f"{type(model).__name__} reads the last token that is not padding, and its config has no pad_token_id. "
                "Set it first: model.config.pad_token_id = tokenizer.pad_token_id."
            )
        return cls(dict(config.label2id), max(config.num_labels, 2), at_end, pad_token_id)

    def index(self, target: str) -> int:
        """The class that a fact's target names, by its label or its index.

        Raises:
            FactError: there is no such class.
        """
        text = target.strip()
        if text in self.ids:
            return self.ids[text]
        alike = [index for label, index in self.ids.items() if label.casefold() == text.casefold()]
        if len(alike) == 1:
            return alike[0]
        if text.isdecimal() and int(text) < self.count:
            return int(text)
        raise FactError(
            f"The target {target!r} is no class of this model. Its labels: {', '.join(map(repr, self.ids))}; or an "
            f"index from 0 to {self.count - 1}."
        )

    def position(self, ids: Sequence[int]) -> int:
        """Which of the tokens `ids` the head reads."""
        if not self.at_end:
            return 0
        return max((i for i, token in enumerate(ids) if token != self.pad_token_id), default=0)

"""`EditorConfig`: every choice that defines an editor, checked when it is made."""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # public, and not declared so
from transformers import GenerationConfig, PreTrainedConfig

from .errors import ModelMismatchError
from .version import __version__

# The layout of what `EditorModel.save_pretrained` writes. Raised when an older release could misread a newer editor.
FORMAT_VERSION = 1

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
TOKEN_SELECTIONS = ("answer", "all", "subject")
STATISTICS = ("frozen", "following")
FINGERPRINT_POLICIES = ("warn", "error", "ignore")
# Keywords that transformers takes and writes beside the attributes of `PreTrainedConfig` and of `GenerationConfig`.
_OF_TRANSFORMERS = {"attn_implementation", "auto_map", "experts_implementation", "quantization_config"}


# How close a name in a file must be to a field to be refused as misspelt.
_TYPO_CUTOFF = 0.75

# Stands for "what the method has" until `EditorConfig` is constructed; a number from then on.
_OF_METHOD: Any = None


@dataclass(frozen=True)
class Method:
    """One row of the method table: what a preset decides, and nothing else. No code asks for a method's name.

    Attributes:
        token_selection: which tokens of a fact are traced, `"answer"` or `"all"`.
        value_differences: how keys and value gradients become value differences: by a trained `"network"`, or as they
            are, `"standardised"` or `"whitened"` (see `HyperNetwork.rows`). `"moves"`: a trained network changes the
            moves of hidden states that were sought instead (see `MoveNetwork`).
        aggregation: how the rows of all facts become one weight shift, `"least_squares"` or `"sum"`.
        reference: the paper.
        is_trained: whether there is anything to train. A method without is ready as `EditorModel.from_base` makes it.
        statistics: `"frozen"`: keys and gradients are standardised by the statistics of the training data; or
            `"following"`: the rows of every edit are merged into a copy of them first (see `EditorConfig.statistics`).
        maker: which of `makers.MAKERS` computes the shifts. `"rows"` is the pipeline that most share: trace,
            value differences, solve.
        key_covariance: whether the second moment of ordinary keys is `"required"`, `"optional"` or not kept (None); see
            `EditorModel.collect_covariance`.
        needs_subjects: whether a fact without a `subject` is refused.
        blocks: which blocks are edited if nobody says: the `"last"` ones, or five `"early"` ones (see `find_targets`).
        task_types: what is edited.
        defaults: values of `EditorConfig` fields that are None.
        training: values of `EditorTrainingArguments` fields that are None.
    """

    token_selection: str
    value_differences: str
    aggregation: str
    reference: str
    is_trained: bool = True
    statistics: str = "frozen"
    maker: str = "rows"
    key_covariance: str | None = None
    needs_subjects: bool = False
    blocks: str = "last"
    task_types: tuple[str, ...] = TASK_TYPES
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


# What is sought where subjects have been read, and how it is written.
_MEMIT: dict[str, Any] = {
    "rank": 0,
    "n_blocks": 0,
    "ridge": 1e-2,
    "preservation": 2.5e3,
    "n_steps": 12,
    "n_passes": 2,
    "n_solves": 8,
    "relaxation": 0.4,
    "context_prefixes": None,
    "context_infixes": None,
    "n_word_dropouts": 6,
    "texts_per_step": 1,
    "edit_lr": 0.5,
    "clamp_factor": 1.2,
    "crowding": 0.25,
    "kl_weight": 0.0,
    "target_decay": 0.1,
}

# What `EditorConfig()` is, by the task: the best for facts with a subject, which only causal models look up; else the
# paper's.
DEFAULT_METHODS = {"CAUSAL_LM": "malmit", "SEQ_2_SEQ_LM": "malmen", "SEQ_CLS": "malmen"}

METHODS: dict[str, Method] = {
    "malmen": Method("answer", "network", "least_squares", "Tan, Zhang & Fu, ICLR 2024, arXiv 2311.04661"),
    "mend": Method("all", "network", "sum", "Mitchell et al., ICLR 2022, arXiv 2110.11309"),
    "rledit": Method(
        "answer",
        "network",
        "least_squares",
        "Li et al., ICML 2025, arXiv 2502.05759",
        defaults={"rank": 1024, "n_blocks": 4},
        training={
            "is_sequential": True,
            "look_back": 10,
            "look_back_decay": 0.95,
            "shift_penalty": 1e-4,
            "locality_weight": 0.6,
        },
    ),
    "ultraedit": Method(
        "answer",
        "standardised",
        "least_squares",
        "Gu et al., TMLR 2026, arXiv 2505.14679",
        is_trained=False,
        statistics="following",
        defaults={"rank": 0, "n_blocks": 0},
    ),
    "stableedit": Method(
        "answer",
        "whitened",
        "least_squares",
        "Ma et al., ICML 2026, arXiv 2605.11836",
        is_trained=False,
        statistics="following",
        defaults={"rank": 0, "n_blocks": 0},
    ),
    "malmit": Method(
        "answer",
        "moves",
        "least_squares",
        "MALMEN's training (arXiv 2311.04661) of MEMIT's targets (arXiv 2210.07229)",
        maker="memit",
        statistics="following",
        key_covariance="optional",
        blocks="early",
        task_types=("CAUSAL_LM",),
        defaults=_MEMIT | {"rank": 1024, "n_blocks": 1},
    ),
    "memit": Method(
        "answer",
        "standardised",
        "least_squares",
        "Meng et al., ICLR 2023, arXiv 2210.07229",
        is_trained=False,
        maker="memit",
        statistics="following",
        key_covariance="required",
        needs_subjects=True,
        blocks="early",
        task_types=("CAUSAL_LM",),
        defaults=_MEMIT,
    ),
    "ft": Method(
        "answer",
        "standardised",
        "least_squares",
        "Zhu et al., 2020, arXiv 2012.00363",
        is_trained=False,
        maker="ft",
        key_covariance="optional",
        defaults={
            "rank": 0,
            "n_blocks": 0,
            "ridge": 1e-2,
            "preservation": 1.0,
            "n_steps": 10,
            "edit_lr": 1e-3,
            "facts_per_step": 64,
            "seed": 0,
        },
    ),
}
# How far a search must be able to go: shorter moves change no answer, and what is meant is the η of another method.
_LEAST_REACH = 0.05
# Of a method that says nothing else.
_DEFAULTS = {"rank": 512, "n_blocks": 2, "edit_lr": 1e-6, "ridge": 1.0, "preservation": 100.0}
# Fields of methods that find something by gradient descent on the facts: {name: the least value of a whole number, or
# whether a number may be 0}. Of any other method they are None.
_DESCENT_COUNTS = {
    "n_steps": 1,
    "n_passes": 1,
    "n_solves": 1,
    "n_word_dropouts": 0,
    "texts_per_step": 0,
    "facts_per_step": 1,
    "seed": 0,
}
_DESCENT_NUMBERS = {
    "relaxation": False,
    "clamp_factor": False,
    "crowding": True,
    "kl_weight": True,
    "target_decay": True,
}


class EditorConfig(PreTrainedConfig):
    """Configuration of an [`EditorModel`].

    Args:
        method: preset of the pipeline, one of `METHODS`. `None` is, once `EditorModel.from_base` knows the task,
            `"malmit"` for a causal language model and `"malmen"` for others (`DEFAULT_METHODS`).
        base_model_name_or_path: the model this editor edits. Filled by `EditorModel.from_base`.
        base_model_revision: its revision on the Hub, if it came from there.
        base_model_fingerprint: SHA-256 of the target weights it was made for. Filled by `EditorModel.from_base`.
        fingerprint_policy: what `apply` does when the base's target weights differ: `"warn"`, `"error"` or `"ignore"`.
        task_type: PEFT's: `"CAUSAL_LM"`, `"SEQ_2_SEQ_LM"` (an encoder-decoder) or `"SEQ_CLS"` (a sequence
            classifier). `EditorModel.from_base` reads it off a base model of transformers' own.
        target_modules: names or PEFT-style suffixes of the layers to edit, such as `["mlp.down_proj"]`. `None` picks
            the second feed-forward linear of the last six blocks, of an encoder-decoder that of the last three blocks
            of each side; where subjects are looked at (`"malmit"`, `"memit"`, `token_selection`), that of five early
            blocks. Expanded to full names by `EditorModel.from_base`.
        layers_to_transform: keep only the targets in these blocks (indices as PEFT counts them).
        module_shapes: `{module name: [key_size, value_size]}`. Filled by `EditorModel.from_base`.
        fan_in_fan_out: names of the targets that store their weight as (key_size, value_size), as GPT-2's `Conv1D`
            does, instead of `nn.Linear`'s (value_size, key_size). Filled by `EditorModel.from_base`.
        rank: width of the hyper-network's bottleneck (1920 in the paper). None takes the method's own, as for the next
            three: 512, of `"malmit"` and `"rledit"` 1024, or 0 where there is no network.
        n_blocks: number of hyper-network blocks: 2, of `"malmit"` 1, of `"rledit"` 4, or 0 where there is no network.
        edit_lr: η, the scale of a value difference: 1e-6. Where the method is trained, log η is learned per layer from
            there. Of methods that descend on the facts, the learning rate of Adam: `"malmit"` and `"memit"`: 0.5, in
            units of the root mean square of the hidden state; `"ft"`: 1e-3.
        ridge: λ of the least squares (paper section 4.1): 1; of `"malmit"`, `"memit"` and `"ft"` 1e-2.
            Learned like η where there is a network for the rows of layers.
        n_preserved_keys: keys of earlier training facts, a layer, that an edit is asked to leave where they are;
            0, as in the paper, asks for none. Not of `"mend"`, `"malmit"`, `"memit"` and `"ft"`. Each costs `key_size`
            floats a layer.
        preservation: initial κ, the weight of that request, learned per layer: the least squares minimises
            ‖U S − D‖² + λ ‖S‖² + (κ / n_preserved_keys) ‖K₀ S‖². With a key covariance C (see
            `EditorModel.collect_covariance`) the weight of κ tr(Sᵀ C S), which is the same with all keys collected as
            K₀. None takes the method's own: 100; with `"malmit"` and `"memit"` 2500, with `"ft"` 1.
        token_selection: traced tokens, `"answer"`, `"all"` or `"subject"`; `None` takes the method's own. `"answer"`
            is, for a causal language model, the tokens that predict a target token; for an encoder-decoder, all tokens
            of the side that a layer sits in; for a classifier, the token that its head reads, and where that reads a
            mean over all tokens, `"all"`. `"subject"` is the last token of each fact's `subject` (causal language
            models only): what the model knows of a subject gathers there, in early and middle layers, whatever wording
            follows.
        statistics: `None` takes the method's own. `"frozen"`: an edit is standardised by the statistics that training
            or `EditorModel.warm_up` left. `"following"`: an edit's own rows are merged into a copy of them first, and
            the copy goes on to the next turn of `facts_per_turn`. Either way an edit never changes the editor. With
            `"malmit"` and `"memit"`, `"following"`: an edit is also asked to change nothing at the keys of the facts
            that edits before it have written, so that turns do not undo each other.
        n_steps: how often the loss of each fact is differentiated, of methods that descend on it: steps to its target
            (`"memit"`: 12), passes over all facts (`"ft"`: 10). What is said of `"memit"` here and below holds for
            `"malmit"` too, where both are not named.
        n_passes: `"memit"`: how often targets are sought and written (2): first of all facts, then of those that the
            model, as the passes before have edited it, does not answer yet, with steps and moves half as long. Training
            of `"malmit"` judges the first; its network serves all.
        n_solves: `"memit"`: in how many steps the layers, all together, write the targets of a pass (8). With 1 and a
            `relaxation` of 1: one least squares at the keys of the model as it is.
        relaxation: `"memit"`: the part of what is left of the way that each of these steps asks for (0.4).
        clamp_factor: `"memit"`: a target is at most so many times the hidden state's length away from it (1.2), of few
            facts. Longer moves carry over to more rephrases, and move other subjects more.
        crowding: `"memit"`: the power by which targets come nearer the more facts there are, in an edit and those
            before it, once each has less than 120 features of all edited layers' keys to itself: n facts have
            `clamp_factor` · (features / 120 n)^`crowding` (0.25). 0: however many there are, the same.
        kl_weight: `"memit"`: of the divergence between what follows "{subject} is a" before and after. 0, and not
            the 0.0625 of the paper's experiments, which is a fifth of the time and keeps rephrases from following.
        target_decay: `"memit"`: of the squared length of the way to the target, relative to the hidden state's (0.1).
        context_prefixes: `"memit"`: texts that each prompt is also asked behind while its target is sought, such as
            `["It is known that"]`; each costs as much time as the prompt itself. None: none.
        context_infixes: `"memit"`: texts that each prompt is also asked with, put right behind its subject, such as
            `[", as is well known,"]`: targets that outlive an interruption carry over to more rephrases. None: none.
        n_word_dropouts: `"memit"`: in how many more texts a prompt is asked without some 40 % of the words between its
            subject and its last one, every second text with one of `context_infixes` (6).
        texts_per_step: `"memit"`: how many of a fact's texts (the prompt, behind each prefix, with each infix, without
            some words) a step looks at, one after the other in turn (1, which makes texts cost nothing). 0: all.
        facts_per_step: `"ft"`: facts in each step of Adam (64).
        seed: `"ft"`: of the order in which facts are drawn (0).
        prompt_template: text with `{prompt}` in it, put around every prompt, such as `"Q: {prompt}\\nA:"`.
        use_chat_template: wrap every prompt as a user message in the tokenizer's chat template.

    Raises:
        ModelMismatchError: the editor was written in a newer format.
        ValueError: a field has a value that is not allowed; the message names the field, the value and what is allowed.
            Or a keyword that is neither a field nor one of transformers' own; the message names the closest field.
    """

    model_type = "hf_malmen"

    method: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_fingerprint: str | None = None
    fingerprint_policy: str = "warn"
    task_type: str = "CAUSAL_LM"
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    module_shapes: dict[str, list[int]] | None = None
    fan_in_fan_out: list[str] | None = None
    rank: int = _OF_METHOD
    n_blocks: int = _OF_METHOD
    edit_lr: float = _OF_METHOD
    ridge: float = _OF_METHOD
    n_preserved_keys: int = 0
    preservation: float = _OF_METHOD
    token_selection: str | None = None
    statistics: str | None = None
    n_steps: int = _OF_METHOD
    n_passes: int = _OF_METHOD
    n_solves: int = _OF_METHOD
    relaxation: float = _OF_METHOD
    clamp_factor: float = _OF_METHOD
    crowding: float = _OF_METHOD
    kl_weight: float = _OF_METHOD
    target_decay: float = _OF_METHOD
    context_prefixes: list[str] | None = None
    context_infixes: list[str] | None = None
    n_word_dropouts: int = _OF_METHOD
    texts_per_step: int = _OF_METHOD
    facts_per_step: int = _OF_METHOD
    seed: int = _OF_METHOD
    prompt_template: str | None = None
    use_chat_template: bool = False
    format_version: int = FORMAT_VERSION
    hf_malmen_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_format_version()  # first, as a newer format may have fields and values that are news to us
        self._refuse_unknown(kwargs)
        super().__post_init__(**kwargs)
        self._check_choices()
        self.hf_malmen_version = __version__ if self.hf_malmen_version is None else self.hf_malmen_version
        if self.method is None:  # what the method has stays open with it
            self._require_some_task()
            return
        for name, value in (_DEFAULTS | dict(self._method.defaults)).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_numbers()
        self._check_targets()
        self._check_prompt_format()

    def resolved(self, task_type: str) -> "EditorConfig":
        """A copy for a task, with a method, and all that the method has for fields that are None.

        Raises:
            ValueError: a field has a value that is not allowed with the task's default method.
        """
        if self.method is not None:
            return self._with_method(self.method)
        try:
            return self._with_method(DEFAULT_METHODS[task_type])
        except ValueError as error:
            raise ValueError(
                f"{error} No method is given, which for {task_type} means {DEFAULT_METHODS[task_type]!r}; "
                "EditorConfig(method='malmen') is the paper's."
            ) from None

    def _with_method(self, method: str) -> "EditorConfig":
        config: EditorConfig = EditorConfig.from_dict(self.to_dict() | {"method": method})
        return config

    def _require_some_task(self) -> None:
        """Refuse what no default method takes, whatever the base model turns out to be for.

        Raises:
            ValueError: what the default method of `task_type` says of it.
        """
        refusals = []
        for method in dict.fromkeys((DEFAULT_METHODS[self.task_type], *DEFAULT_METHODS.values())):
            try:
                self._with_method(method)
            except ValueError as error:
                refusals.append(error)
            else:
                return
        raise refusals[0] from None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `from_pretrained` reads, if it is an editor's.

        Raises:
            ModelMismatchError: the folder or repo holds something else.
            OSError: there is no such folder, repo or revision.
        """
        with repo_named(str(pretrained_model_name_or_path)):
            content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if content.get("model_type") != cls.model_type:
            raise ModelMismatchError(
                f"{pretrained_model_name_or_path} holds no editor, as EditorModel.save_pretrained writes it: "
                f"{_what_else(content)}."
            )
        return content, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that `to_dict` gave, with attributes that others have set on it.

        Raises:
            ModelMismatchError: the editor was written in a newer format.
            ValueError: a field has a value that is not allowed, or a name is close to a field's.
        """
        # Those that are close to a field go on to be refused: a typo in a file that was edited by hand.
        foreign = {
            name: value
            for name, value in config_dict.items()
            if _is_unknown(name) and not hasattr(cls, name) and not _close_to(name, _TYPO_CUTOFF)
        }
        known = {name: value for name, value in config_dict.items() if name not in foreign}
        made = super().from_dict(known, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, value in foreign.items():
            setattr(config, name, value)
        return made

    @property
    def traced_tokens(self) -> str:
        """Which tokens are traced, `"answer"`, `"subject"` or `"all"`: `token_selection`, or the method's own."""
        return self.token_selection or self._method.token_selection

    @property
    def value_differences(self) -> str:
        """How they are made, as the method has it: `"network"`, `"standardised"` or `"whitened"`."""
        return self._method.value_differences

    @property
    def aggregation(self) -> str:
        """How rows become a weight shift, as the method has it: `"least_squares"` or `"sum"`."""
        return self._method.aggregation

    @property
    def needs_training(self) -> bool:
        """Whether the method has parameters to train."""
        return self._method.is_trained

    @property
    def training_defaults(self) -> Mapping[str, Any]:
        """What the method has for fields of `EditorTrainingArguments` that are None."""
        return self._method.training

    @property
    def follows_edits(self) -> bool:
        """Whether an edit is standardised by statistics that know its own rows: `statistics`, or the method's own."""
        return (self.statistics or self._method.statistics) == "following"

    @property
    def key_covariance(self) -> str | None:
        """Whether the method keeps the second moment of ordinary keys: `"required"`, `"optional"` or None."""
        return self._method.key_covariance

    @property
    def needs_subjects(self) -> bool:
        """Whether a fact without a `subject` is refused."""
        return self._method.needs_subjects or bool(self.kl_weight)

    @property
    def default_blocks(self) -> str:
        """Which blocks are edited if `target_modules` and `layers_to_transform` are None: `"last"` or `"early"` ones.

        The method's own; where subjects are traced, early ones: later blocks have read them already.
        """
        return "early" if self.traced_tokens == "subject" else self._method.blocks

    @property
    def task_types(self) -> tuple[str, ...]:
        """What the method edits."""
        return self._method.task_types

    @property
    def maker(self) -> str:
        """Which of `makers.MAKERS` computes the shifts, as the method has it."""
        return self._method.maker

    def shape_of(self, name: str) -> tuple[int, int]:
        """(key_size, value_size) of a target module."""
        key_size, value_size = (self.module_shapes or {})[name]
        return key_size, value_size

    @property
    def _method(self) -> Method:
        return METHODS[self.method or DEFAULT_METHODS[self.task_type]]

    def _check_format_version(self) -> None:
        if not _is_whole(self.format_version, 1):
            raise ValueError(
                f"EditorConfig.format_version is {self.format_version!r}; allowed: a whole number of at least 1."
            )
        if self.format_version > FORMAT_VERSION:
            raise ModelMismatchError(
                f"This editor has format {self.format_version} (written by hf_malmen {self.hf_malmen_version}), and "
                f"hf_malmen {__version__} reads up to format {FORMAT_VERSION}. Upgrade: pip install -U hf_malmen."
            )

    def _refuse_unknown(self, extra: Mapping[str, Any]) -> None:
        # transformers keeps any keyword it does not know as an attribute, so `rnak=64` would change nothing, silently.
        for name in extra:
            if not _is_unknown(name):
                continue
            own = list(EditorConfig.__annotations__)
            close = [field for field in own if f"_{name.lower()}_" in f"_{field}_"] or _close_to(name)
            hint = f"Did you mean {close[0]!r}?" if close else f"Its fields: {', '.join(own)}."
            raise ValueError(f"EditorConfig has no field {name!r}. {hint}")

    def _check_choices(self) -> None:
        allowed = {
            "method": (None, *METHODS),
            "task_type": TASK_TYPES,
            "token_selection": (None, *TOKEN_SELECTIONS),
            "statistics": (None, *STATISTICS),
            "fingerprint_policy": FINGERPRINT_POLICIES,
            "use_chat_template": (True, False),
        }
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"EditorConfig.{name} is {value!r}; allowed: {', '.join(map(repr, choices))}.")
        if not isinstance(self.base_model_revision, str | None):
            raise ValueError(
                f"EditorConfig.base_model_revision is {self.base_model_revision!r}; allowed: a text or nothing. In "
                "YAML, put a commit into quotes."
            )
        if self.task_type not in self.task_types:
            raise ValueError(
                f"EditorConfig.task_type is {self.task_type!r}; allowed with method {self.method!r}: "
                f"{', '.join(map(repr, self.task_types))}."
            )

    def _check_numbers(self) -> None:
        has_network = self.needs_training
        for name, least in (("rank", int(has_network)), ("n_blocks", int(has_network)), ("n_preserved_keys", 0)):
            value = getattr(self, name)
            if not _is_whole(value, least):
                raise ValueError(f"EditorConfig.{name} is {value!r}; allowed: a whole number of at least {least}.")
            if name != "n_preserved_keys" and value and not has_network:
                raise ValueError(
                    f"EditorConfig.{name} is {value!r}; allowed with method {self.method!r}, which has no network: 0, "
                    "or nothing."
                )
        if self.n_preserved_keys and (self.aggregation != "least_squares" or self.maker != "rows"):
            raise ValueError(
                f"EditorConfig.n_preserved_keys is {self.n_preserved_keys}; allowed with method {self.method!r}: 0. "
                "Keys of earlier facts are preserved by the least squares over rows, which this method has not."
            )
        for name in ("edit_lr", "ridge", "preservation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"EditorConfig.{name} is {value!r}; allowed: a finite number above 0.")
        self._check_descent()
        self._check_search()

    def _check_descent(self) -> None:
        """Those fields of descending methods that this one has, and no value in the others."""
        own = self._method.defaults
        for name in (*_DESCENT_COUNTS, *_DESCENT_NUMBERS):
            value = getattr(self, name)
            if name not in own:
                valid, allowed = value is None, f"nothing, with method {self.method!r}, which has no such setting"
            elif name in _DESCENT_COUNTS:
                least = _DESCENT_COUNTS[name]
                valid, allowed = _is_whole(value, least), f"a whole number of at least {least}"
            else:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                valid = is_number and 0 <= value < float("inf") and (value > 0 or _DESCENT_NUMBERS[name])
                allowed = f"a finite number {'of at least' if _DESCENT_NUMBERS[name] else 'above'} 0"
            if not valid:
                raise ValueError(f"EditorConfig.{name} is {value!r}; allowed: {allowed}.")
        for name in ("context_prefixes", "context_infixes"):
            texts = getattr(self, name)
            if texts is not None and not (_is_list_of_names(texts) and name in own):
                having = ", ".join(repr(method) for method, row in METHODS.items() if name in row.defaults)
                raise ValueError(
                    f"EditorConfig.{name} is {texts!r}; allowed: None, or with method {having} a list of texts that "
                    "are not empty."
                )

    def _check_search(self) -> None:
        """What means something else to methods that trace rows, or nothing to those that search."""
        if self.maker != "memit":
            return
        if self.token_selection is not None:
            raise ValueError(
                f"EditorConfig.token_selection is {self.token_selection!r}; allowed with method {self.method!r}, which "
                "always looks at the last token of subjects: nothing."
            )
        reach = self.n_steps * self.edit_lr
        if reach < _LEAST_REACH:
            raise ValueError(
                f"EditorConfig.edit_lr is {self.edit_lr!r}; with method {self.method!r} it is the length of a step to "
                f"a target, of which {self.n_steps} go no further than {reach:.2g} times the hidden state's length. "
                f"Allowed: at least {_LEAST_REACH} / n_steps; the default is {self._method.defaults['edit_lr']}."
            )

    def _check_targets(self) -> None:
        targets = self.target_modules
        valid = (isinstance(targets, str) and _is_pattern(targets)) or _is_list_of_names(targets)
        if targets is not None and not valid:
            raise ValueError(
                f"EditorConfig.target_modules is {targets!r}; allowed: None, a regular expression, or a list of "
                "module names or suffixes such as ['mlp.down_proj']."
            )
        if isinstance(targets, list | tuple) and len(set(targets)) != len(targets):
            raise ValueError(f"EditorConfig.target_modules names a module twice: {targets!r}.")
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, list | tuple) else [layers]
        if layers is not None and not (indices and all(_is_whole(index, 0) for index in indices)):
            raise ValueError(
                f"EditorConfig.layers_to_transform is {layers!r}; allowed: None, a block's index, or a list of whole "
                "numbers of at least 0."
            )
        flipped = self.fan_in_fan_out
        if flipped and not _is_list_of_names(flipped):
            raise ValueError(
                f"EditorConfig.fan_in_fan_out is {flipped!r}; allowed: None or a list of module names. "
                "EditorModel.from_base fills it in."
            )
        for name, shape in (self.module_shapes or {}).items():
            if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(_is_whole(size, 1) for size in shape):
                raise ValueError(
                    f"EditorConfig.module_shapes[{name!r}] is {shape!r}; allowed: [key_size, value_size], both above 0."
                )

    def _check_prompt_format(self) -> None:
        template = self.prompt_template
        if template is not None and not (isinstance(template, str) and "{prompt}" in template):
            raise ValueError(
                f"EditorConfig.prompt_template is {template!r}; allowed: a text that contains '{{prompt}}'."
            )
        if template is not None and self.use_chat_template:
            raise ValueError("EditorConfig takes prompt_template or use_chat_template, not both.")


@contextmanager
def repo_named(source: str) -> Iterator[None]:
    """Within this context a repo on the Hub is asked for, as there is no folder of this name; an error says so.

    Raises:
        FileNotFoundError: neither a folder nor the name of a repo.
    """
    path = Path(source)
    try:
        if not path.exists():
            validate_repo_id(source)
        yield
    except HFValidationError:
        raise FileNotFoundError(
            f"There is no folder {source}. Check the path, or give a repo on the Hub: owner/name."
        ) from None
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        if path.exists() or error.errno is not None:  # the disk's fault
            raise
        raise OSError(f"There is no folder {source}, and no repo on the Hub that can be read: {error}") from error


def _is_unknown(name: str) -> bool:
    """Whether a keyword is neither a field nor one of transformers' own."""
    if name in EditorConfig.__annotations__ or name in _OF_TRANSFORMERS or name.startswith("_"):
        return False
    # Of the class, as asking an instance may warn; and none of its methods, such as `to_dict`.
    is_attribute = hasattr(PreTrainedConfig, name) and not callable(getattr(PreTrainedConfig, name))
    return not is_attribute and name not in vars(GenerationConfig())


def _close_to(name: str, cutoff: float = 0.6) -> list[str]:
    """The fields that a keyword may have been meant for, closest first."""
    return difflib.get_close_matches(name.lower(), list(EditorConfig.__annotations__), cutoff=cutoff)


def _what_else(content: Mapping[str, Any]) -> str:
    """What a `config.json` that is not an editor's tells, and what to do with it."""
    if "edit_format_version" in content:
        return "it is a saved edit. Load it with Edit.from_pretrained"
    if content.get("model_type"):
        return (
            f"it is a {content['model_type']} model. EditorModel.from_base(model) makes a new editor for a language "
            "model, and EditorTrainer trains it"
        )
    return "its config.json is missing, or not that of a model. Check the name and the revision"


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(name, str) and name for name in value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text)

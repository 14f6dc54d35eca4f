"""Base model -> an editor's configuration for it, whether the two fit, and the tokenizer with the model's limits."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .batches import Tokenizer
from .configuration import EditorConfig, repo_named
from .errors import ModelMismatchError
from .in_force import base_fingerprint_as_stored
from .targets import check_targets, find_targets, is_fan_in_fan_out, module_shape, plain_model, target_module
from .tasks import AUTO_CLASSES, Classes, check_direction, infer_task_type, pools_tokens


def check_base_model(source: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Check, before anything large is loaded, that a folder or repo holds a model to edit.

    Args:
        source: folder or Hub id.
        revision, token: on the Hub.

    Raises:
        ModelMismatchError: it holds an editor or an edit.
        OSError: there is no such folder, repo or revision.
    """
    if Path(source).is_file():
        raise ModelMismatchError(f"{source} is a file; expected a language model's folder, or its repo on the Hub.")
    with repo_named(source):
        content, _ = PreTrainedConfig.get_config_dict(source, revision=revision, token=token)
    if content.get("model_type") == EditorConfig.model_type or "edit_format_version" in content:
        raise ModelMismatchError(
            f"{source} holds {'a saved edit' if 'edit_format_version' in content else 'an editor'}; expected "
            "the language model to edit."
        )


def base_of(model: nn.Module) -> PreTrainedModel:
    """`plain_model`, for the type checker a model of transformers."""
    plain: Any = plain_model(model)
    return plain


def config_for(model: nn.Module, config: EditorConfig) -> EditorConfig:
    """A copy of `config` with task, names, shapes and fingerprint read off the base model.

    Args:
        model: the base model, left as it is.
        config: what is wanted of the editor.

    Raises:
        ModelMismatchError, TypeError: see `EditorModel.from_base`.
    """
    if not isinstance(config, EditorConfig):
        raise TypeError(f"Expected an EditorConfig, and got {config!r:.100}. Make one: EditorConfig(name=value, ...).")
    model = plain_model(model)
    check_direction(model)
    _check_reads_tokens(model)
    task_type = infer_task_type(model) or config.task_type
    if config.task_type not in ("CAUSAL_LM", task_type):  # the default says nothing
        raise ModelMismatchError(
            f"EditorConfig.task_type is {config.task_type!r}, and {type(model).__name__} is for {task_type!r}. "
            f"Leave task_type out, or load the base model with {AUTO_CLASSES[config.task_type].__name__}."
        )
    config = config.resolved(task_type)
    if task_type not in config.task_types:
        raise ModelMismatchError(
            f"Method {config.method!r} edits {', '.join(config.task_types)}, and {type(model).__name__} is for "
            f"{task_type}. Choose another method, such as 'malmen', or another model."
        )
    config.task_type = task_type
    if task_type == "SEQ_CLS" and config.traced_tokens == "answer" and pools_tokens(model):
        config.token_selection = "all"
    names = find_targets(model, config)
    config.target_modules = names
    config.layers_to_transform = None
    modules = {name: target_module(model, name) for name in names}
    config.module_shapes = {name: module_shape(module) for name, module in modules.items()}
    config.fan_in_fan_out = [name for name, module in modules.items() if is_fan_in_fan_out(module)]
    config.base_model_fingerprint = base_fingerprint_as_stored(model, names)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    return config


def _check_reads_tokens(model: nn.Module) -> None:
    """Check that a model of transformers reads tokens of a vocabulary.

    Raises:
        ModelMismatchError: it does not, as those do that read characters.
    """
    try:
        if isinstance(model, PreTrainedModel):
            model.get_input_embeddings()
    except NotImplementedError:
        raise ModelMismatchError(
            f"{type(model).__name__} has no embedding of tokens, and cannot be edited. Choose a model that has one."
        ) from None


def check_layers(model: nn.Module, config: EditorConfig) -> None:
    """Check that a model has the task and the target layers of an editor; their weights are not looked at.

    Args:
        model: the base model.
        config: the editor's.

    Raises:
        ModelMismatchError: the model has another task, or is an encoder that was loaded as a causal model; or a target
            is missing, cannot be edited, or has another shape or orientation.
    """
    model = plain_model(model)
    check_direction(model)
    wanted, found = config.task_type, infer_task_type(model)
    if found not in (None, wanted):
        raise ModelMismatchError(
            f"{type(model).__name__} is for the task {found}, and this editor was made for {wanted}. "
            f"Load the base model with {AUTO_CLASSES[wanted].__name__}, or make an editor for this one."
        )
    names = list(config.target_modules or ())
    check_targets(model, names)
    for name in names:
        module = target_module(model, name)
        expected = list(config.shape_of(name))
        flipped = name in (config.fan_in_fan_out or ())
        if module_shape(module) != expected or is_fan_in_fan_out(module) != flipped:
            raise ModelMismatchError(
                f"{name} maps {module_shape(module)[0]} features to {module_shape(module)[1]} in a "
                f"{type(module).__name__}; this editor was made for {expected[0]} to {expected[1]} in a "
                f"{'Conv1D' if flipped else 'Linear'}. Its base model is {config.base_model_name_or_path}."
            )


def tokenizer_for(model: nn.Module, config: EditorConfig, tokenizer: PreTrainedTokenizerBase | None) -> Tokenizer:
    """A base model's tokenizer, in the prompt format of an editor and with the model's length limit.

    Args:
        model: the base model.
        config: the editor's.
        tokenizer: the base model's; loaded from `model.name_or_path` if None.

    Raises:
        ModelMismatchError: a classifier whose classes no target can name; or no tokenizer beside the model.
        OSError: see `load_tokenizer`.
        TypeError: something else than a tokenizer.
        ValueError: no tokenizer, and a model that does not say where it came from.
    """
    base = base_of(model)
    if tokenizer is None:
        if not base.name_or_path:
            raise ValueError("This model does not say where it came from. Pass its tokenizer: tokenizer=...")
        tokenizer = load_tokenizer(base.name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"Expected the base model's tokenizer, and got {tokenizer!r:.100}. Load it first: "
            "AutoTokenizer.from_pretrained(folder). Of a processor pass processor.tokenizer."
        )
    return Tokenizer(
        tokenizer,
        config,
        max_length(base),
        decoder_start_token_id=getattr(base.config, "decoder_start_token_id", None),
        classes=Classes.of(base) if config.task_type == "SEQ_CLS" else None,
    )


def load_tokenizer(source: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model.

    Args:
        source: folder or Hub id.
        **hub: `revision` and `token`, on the Hub.

    Raises:
        ModelMismatchError: there is none, or none that can be loaded.
        OSError: no such folder or repo, or none that may be read.
    """
    with repo_named(str(source)):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **hub)
        except (ConnectionError, TimeoutError):
            raise
        except (OSError, ValueError) as error:
            # Of a repo, transformers says the same of a failed connection.
            if isinstance(error, OSError) and not Path(source).is_dir():
                raise
            raise ModelMismatchError(
                f"No tokenizer could be loaded from {source}. Pass the base model's, tokenizer=... (of EditorTrainer: "
                "processing_class=...), or save it there: tokenizer.save_pretrained(folder). transformers says: "
                f"{error}"
            ) from error
    return tokenizer


def max_length(model: PreTrainedModel) -> int | None:
    """The most tokens that `model` has positions for, or None where it has no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit < 1:  # how XLNet says that it has none
        return None
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings == limit:
            # RoBERTa's kind counts positions from the padding token's on.
            return limit - (0 if module.padding_idx is None else int(module.padding_idx) + 1)
    return limit

"""`EditorTrainer`: meta-training of the hyper-network with the decoupled gradient (paper section 4.3)."""

import math
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, speed_metrics
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from . import distributed
from .batches import TokenBatch, Tokenizer, TokenSequence
from .configuration import EditorConfig
from .edit import check_fingerprint
from .errors import FactError, ModelMismatchError, NumericalError
from .evaluation import measured_metrics, n_measured, questions
from .facts import Fact, load_facts, ordinary_sentences, require_fields
from .features import FeatureCache, FeatureFolder, features_fingerprint
from .losses import cross_entropy, kl_divergence
from .makers import check_readable
from .memit import tokenize_facts
from .model_card import EditorRun, write_editor_card
from .modeling import EditorModel
from .passes import FrozenPasses
from .sharding import forget_sharding, place
from .targets import plain_model
from .tracing import Factors, Trace, as_read, frozen, input_device, own_answer_logits, pass_cost, shifted
from .training_arguments import TRAINING_DEFAULTS, EditorTrainingArguments, needed_fields
from .training_steps import EditStep, StepOfMoves, StepOfRows

_CARD_SETTINGS = (
    "gradient_accumulation_steps",
    "is_sequential",
    "learning_rate",
    "locality_weight",
    "look_back",
    "look_back_decay",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "rephrases_per_fact",
    "scale_learning_rate",
    "seed",
    "shift_penalty",
)
_METRICS_REMEDY = (
    "an editor's loss and metrics are its method's, so that this would be ignored. Leave it out; EditorModel.measure "
    "gives the answers to every fact"
)
# Arguments of `Trainer` for a model that answers by itself, and is made from a data set's rows: {name: what to do}.
_NOT_OF_EDITORS = {
    "compute_loss_func": _METRICS_REMEDY,
    "compute_metrics": _METRICS_REMEDY,
    "preprocess_logits_for_metrics": _METRICS_REMEDY,
    "data_collator": "the facts of a step are put together by the trainer itself. Leave it out",
    "model_init": "the editor is given, as the trainer fits its base model and tokenizer to it. Make an editor and a "
    "trainer for each run instead",
}
# Fields of `EditorConfig` that say what the parameters of an editor are, and are of.
_SAME_IN_A_RUN = (
    "method",
    "task_type",
    "target_modules",
    "module_shapes",
    "rank",
    "n_blocks",
    "n_preserved_keys",
    "token_selection",
    "prompt_template",
    "use_chat_template",
)


class EditorTrainer(Trainer):
    """Trains an [`EditorModel`] on facts: logging, checkpoints, resume, schedules and trackers are `Trainer`'s.

    Each step edits a set of facts, measures the edited model on their rephrases and on unrelated prompts, and moves
    the hyper-network along the gradient of that meta loss. The gradient is decoupled: the language model gives ∂L/∂S,
    the adjoint of the solve turns it into a gradient of the value differences, and the hyper-network is replayed in
    its own micro-batches.

    The sets of a sequential step (`EditorTrainingArguments.is_sequential`; RLEdit, arXiv 2502.05759, section 4) are
    edited one after another. With S_t the shift of turn t, solved on the model that holds S_1 ... S_(t−1), which count
    as constants, and L_i the meta loss of set i on the model that holds S_1 ... S_t too, the loss of turn t is

        Σ_(k < look_back) look_back_decay^k L_(t−k) + shift_penalty ‖S_t‖².

    "Before" in its locality loss is before turn t. The model itself is never written to.

    Several processes share the work of a step: each traces its part of the facts, measures its part of the prompts and
    replays its part of the rows. Shift, losses and gradients are those of one process with all facts.

    Args:
        editor: the editor to train.
        base_model: the model to edit; never trained, and as it was after every step.
        args: training arguments.
        train_dataset, eval_dataset: anything `load_facts` takes. Training facts need `rephrases`, and, unless
            `locality_weight` is 0, `unrelated_prompt` and `unrelated_answer`. For evaluation also several of them,
            {name: data set}, whose metrics are then called `eval_<name>_...`.
        processing_class: the base model's tokenizer; loaded from beside the base model if None.
        callbacks: as in `Trainer`.
        **kwargs: any other argument of `Trainer`, but none about a loss or metrics of one's own, no `data_collator`
            and no `model_init`, and so no `hyperparameter_search`.

    Attributes:
        run: what the card of a pushed editor says about its training and its scores; None says what the arguments say.

    Raises:
        FactError: a training fact lacks a field, or a fact is bad, such as one longer than the base model reads.
        ModelMismatchError: the editor does not fit the base model.
        TypeError: editor, base model, arguments or tokenizer are something else, such as a path.
        ValueError: the editor's method has nothing to train; the held-out facts do not give `metric_for_best_model`;
            or an argument of `Trainer` that an editor has no use for.
    """

    args: EditorTrainingArguments
    push_in_progress: Any

    def __init__(
        self,
        editor: EditorModel,
        base_model: PreTrainedModel,
        args: EditorTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        expected: dict[type, object] = {EditorModel: editor, EditorTrainingArguments: args}
        for kind, given in expected.items():
            if not isinstance(given, kind):
                raise TypeError(
                    f"EditorTrainer expected an {kind.__name__}, and got {type(given).__name__}. Call "
                    "EditorTrainer(editor, base_model, args, ...), each of the three loaded or made before."
                )
        if not editor.config.needs_training:
            raise ValueError(
                f"Method {editor.config.method!r} has nothing to train: its editor is ready as from_base makes it. "
                "editor.warm_up(model, facts) gives it statistics to start from."
            )
        for name, remedy in _NOT_OF_EDITORS.items():
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: {remedy}.")
        args = copy(args)  # which may be meant for editors of other methods too
        for name, value in (TRAINING_DEFAULTS | dict(editor.config.training_defaults)).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.is_sequential and editor.config.value_differences == "moves":
            raise ValueError(
                f"EditorTrainingArguments.is_sequential is True; expected False with method {editor.config.method!r}, "
                "whose targets are of the unedited model. Method 'rledit' is trained over sequences."
            )
        editor.check_base(base_model)
        plain: Any = plain_model(base_model)
        self.base_model = base_model = plain
        self.tokenize = editor.tokenizer_for(base_model, processing_class)
        train_facts = load_facts(train_dataset) if train_dataset is not None else None
        if train_facts is not None:
            require_fields(train_facts, needed_fields(args.locality_weight), "Training")
            kinds = ("rephrase", "unrelated") if args.locality_weight else ("rephrase",)
            _check_texts(editor, train_facts, self.tokenize, "Training", kinds)
        eval_facts = _load_sets(eval_dataset) if eval_dataset is not None else None
        if eval_facts is not None:
            for facts in eval_facts.values() if isinstance(eval_facts, dict) else [eval_facts]:
                _check_texts(editor, facts, self.tokenize, "Held-out")
            if args.metric_for_best_model is not None and args.eval_strategy != "no":
                _require_metric(args.metric_for_best_model, eval_facts)
        # Not handed on: Trainer would write the base model's special tokens into the editor's configuration, and the
        # tokenizer beside every checkpoint.
        super().__init__(
            model=editor,
            args=args,
            data_collator=_collate,
            train_dataset=train_facts,
            eval_dataset=eval_facts,
            callbacks=callbacks,
            **kwargs,
        )
        if self.is_deepspeed_enabled and not distributed.in_unison():
            raise ValueError(
                "EditorTrainer keeps the whole editor on each device, and this DeepSpeed would shard it. For a base "
                "model larger than a device, launch several processes with recipes/accelerate/fsdp.yaml or "
                "recipes/accelerate/deepspeed_zero3.yaml, or load it with device_map."
            )
        if distributed.in_unison():  # about the base model, not about the editor
            self.is_fsdp_enabled = self.is_deepspeed_enabled = False
            forget_sharding(self.accelerator.state)
            nn.Module.to(editor, args.device)
        place(base_model, args.device)
        self._passes: FrozenPasses | None = None
        self.add_callback(_Forget(self))
        self._losses: list[tuple[float, float]] = []
        self._sequence = _Sequence()
        self.run: EditorRun | None = None

    @property
    def editor(self) -> EditorModel:
        """The editor being trained."""
        editor = self.accelerator.unwrap_model(self.model)
        assert isinstance(editor, EditorModel)  # for the type checker
        return editor

    @property
    def passes(self) -> FrozenPasses:
        """What is computed of the unedited base model, kept as the arguments say; of the base as this run found it."""
        if self._passes is None:
            self._passes = self._make_passes()
        return self._passes

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All processes read the same sets of facts, which `training_step` shares out.

        Not left to accelerate's sharding, which repeats facts where the last set of an epoch is short.
        """
        if self.train_dataset is None:
            raise ValueError("Training needs facts: pass train_dataset to EditorTrainer.")
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,  # a list
            batch_size=self._train_batch_size * self.args.world_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            drop_last=self.args.dataloader_drop_last,
        )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return prepare_data_loader(loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer`'s, which would take one step more on from a checkpoint that has taken all of them."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`Trainer`'s optimizer, with log η, log λ and log κ in a group of their own."""
        if self.optimizer is None:
            chosen = self.optimizer_cls_and_kwargs
            optimizer_class, settings = chosen or self.get_optimizer_cls_and_kwargs(self.args, self.editor)
            scales = [p for name, p in self.editor.named_parameters() if _is_scale(name)]
            others = [p for name, p in self.editor.named_parameters() if not _is_scale(name)]
            groups = [
                {"params": others, "weight_decay": self.args.weight_decay},
                {"params": scales, "weight_decay": 0.0, "lr": self.args.scale_learning_rate},
            ]
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:  # ()
        """Edit the facts of `inputs`, and leave the gradient of the meta loss on the editor's parameters.

        Several processes call it with the same facts, and all get the same loss and gradient.

        Raises:
            NumericalError: the loss or its gradient is not finite, or something on the way to them; on all processes
                alike. The editor is as it was before the step.
        """
        model.train()
        self._set_optimizer_mode("train")
        facts: list[Fact] = inputs["facts"]
        # Every process reads every prompt, so that all know how many answer tokens there are, and a bad one stops all.
        rephrases, unrelated = self._draw(facts)
        before = self._sequence.shifts
        window = [(rephrases, unrelated), *self._sequence.sets][: self.args.look_back]
        asked = tuple(_joined(window, part) for part in (0, 1))
        share = 1 / self.current_gradient_accumulation_steps
        penalty = 0.0
        gradients = {}
        with frozen(self.base_model), self.editor.statistics_restored_on_error():
            step = self._edit(facts, before, *asked)
            # Of the modules' own precision, once for all passes. Gradients flow on to what they are of.
            shown = (as_read(self.base_model, before), as_read(self.base_model, step.after))
            generalization = locality = 0.0
            for age, questions in enumerate(window):
                weight = self.args.look_back_decay**age
                losses = self._meta_loss(*shown, *questions, weight)
                generalization, locality = generalization + losses[0], locality + losses[1]
            for name, leaf in step.leaves.items():
                gradients[name] = torch.zeros_like(leaf) if leaf.grad is None else share * leaf.grad
                if self.args.shift_penalty:  # where S itself is the leaf
                    shift = step.shift(name).to(leaf)
                    penalty += self.args.shift_penalty * shift.square().sum().item()
                    if distributed.is_main():  # it counts once
                        gradients[name] += share * 2 * self.args.shift_penalty * shift
            loss = generalization + self.args.locality_weight * locality + penalty
            self._require_finite(loss, gradients)
        step.backward(gradients)
        if self.args.is_sequential:
            self._sequence.n_sets += 1
            self._sequence.shifts = {name: leaf.detach() for name, leaf in step.leaves.items()}
            self._sequence.sets = window
            if self._sequence.n_sets >= self.current_gradient_accumulation_steps:
                self._sequence = _Sequence()
        self._losses.append((generalization, locality))
        return torch.tensor(loss * share, device=self.args.device)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the editor's card beside it: what `run` says, or what the arguments say. Arguments are ignored."""
        settings = {name: getattr(self.args, name) for name in _CARD_SETTINGS}
        n_facts = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        known = EditorRun(n_train_facts=n_facts, settings=settings)
        write_editor_card(str(self.args.output_dir), self.editor, self.run or known)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Edit held-out facts, `per_device_eval_batch_size` at once, and measure. The editor does not change.

        Args:
            eval_dataset: anything `load_facts` takes, or {name: such a data set}; None takes the trainer's own.
            ignore_keys: of no use here.
            metric_key_prefix: of the metrics' names.

        Returns:
            The metrics of `EditorModel.evaluate`, prefixed with `metric_key_prefix`, and with the data set's name where
            there are several, each averaged over the facts that have what it measures.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("Evaluation needs facts: pass eval_dataset to EditorTrainer or to evaluate().")
        facts = _load_sets(self.eval_dataset if eval_dataset is None else eval_dataset)
        if isinstance(facts, dict):
            return {
                metric: value
                for name, of_set in facts.items()
                for metric, value in self.evaluate(of_set, ignore_keys, f"{metric_key_prefix}_{name}").items()
            }
        self._set_optimizer_mode("eval")
        size = self.args.per_device_eval_batch_size
        start = time.time()
        sums: dict[str, float] = {}
        for begin in range(0, len(facts), size):
            chosen = facts[begin : begin + size]
            scores = self.editor.evaluate(
                self.base_model, chosen, self.tokenize.tokenizer, batch_size=self.args.lm_batch_size
            )
            for name, value in scores.items():
                weight = n_measured(chosen, name) / n_measured(facts, name)
                sums[name] = sums.get(name, 0.0) + weight * value
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in sums.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(facts))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not of an editor, which answers nothing by itself.

        Raises:
            NotImplementedError: always; says what to use.
        """
        raise NotImplementedError(
            "An editor makes no predictions. EditorTrainer.evaluate(facts) gives the scores of an edit, and "
            "EditorModel.measure(model, facts).per_fact what the edited model answers."
        )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not of this trainer, whose editor is given.

        Raises:
            NotImplementedError: always; says what to do.
        """
        raise NotImplementedError(
            "EditorTrainer trains the editor that it is given, and searches no settings. Make an editor and a trainer "
            "for each trial, and compare what EditorTrainer.evaluate(facts) gives."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both parts of the meta loss, averaged since the last log, and the learned η and λ of each layer."""
        if "loss" in logs and self._losses:
            generalization, locality = (sum(part) / len(part) for part in zip(*self._losses, strict=True))
            logs |= {"generalization_loss": generalization, "locality_loss": locality}
            self._losses.clear()
            learned = self.editor.scales() if self.editor.config.value_differences == "network" else {}
            for name, scales in learned.items():
                logs |= {
                    f"{kind}/{name}": s for kind, s in zip(("edit_lr", "ridge", "preservation"), scales, strict=True)
                }
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """`Trainer`'s, which loads whatever parameters have names and shapes that it finds in the editor.

        Raises:
            ModelMismatchError: the checkpoint is of another editor, or for another base model where
                `fingerprint_policy` is `"error"`.
        """
        if Path(resume_from_checkpoint).is_dir():  # else `Trainer`'s says so
            _require_same_editor(resume_from_checkpoint, self.editor.config, self.base_model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        if folder and self.args.should_save:  # a pickle, in the folder that is pushed
            (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer`'s own pushes `training_args.bin` too, whatever `_save` does.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self._finish_current_push()  # it reads the files that are about to be written
        jobs: Any = [self.push_to_hub(f"Training in progress, step {self.state.global_step}", blocking=False)]
        self.push_in_progress = PushInProgress(jobs)

    def _draw(self, facts: Sequence[Fact]) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """This step's rephrases and unrelated prompts.

        Drawn from the seed, the step and the fact alone, so that a resumed run draws what an uninterrupted one does.
        """
        rephrases, unrelated = [], []
        for fact in facts:
            draw = random.Random(f"{self.args.seed} {self.state.global_step} {fact.prompt}")
            count = min(self.args.rephrases_per_fact, len(fact.rephrases))
            rephrases += [self.tokenize(text, fact.target) for text in draw.sample(fact.rephrases, count)]
            if self.args.locality_weight and fact.unrelated_prompt and fact.unrelated_answer:
                unrelated.append(self.tokenize(fact.unrelated_prompt, fact.unrelated_answer))
        return rephrases, unrelated

    def _edit(
        self,
        facts: Sequence[Fact],
        before: Mapping[str, Tensor],
        rephrases: Sequence[TokenSequence],
        unrelated: Sequence[TokenSequence],
    ) -> EditStep:
        """The edit of a step, by the way that the editor's method has.

        Args:
            facts: all that are edited together.
            before: {module name: what earlier sets of a sequence have added to its weight}.
            rephrases, unrelated: what this process will ask about them.
        """
        if self.editor.config.value_differences == "moves":
            requests = tokenize_facts(facts, self.tokenize, self.editor.config)
            self.passes.begin_step((), rephrases, unrelated)
            return StepOfMoves(
                self.editor,
                self.base_model,
                self.tokenize,
                requests,
                self.passes.moves,
                self._train_batch_size * self.args.world_size,
                self.args.lm_batch_size,
            )
        edits = _own([self.tokenize.edit(fact) for fact in facts])
        self.passes.begin_step(edits, rephrases, unrelated)
        return StepOfRows(
            self.editor,
            self.base_model,
            self._trace(edits, before),
            before,
            self.args.editor_batch_size,
            as_shifts=self.args.is_sequential or bool(self.args.shift_penalty),
        )

    def _meta_loss(
        self,
        before: Mapping[str, Tensor | Factors],
        after: Mapping[str, Tensor | Factors],
        rephrases: Sequence[TokenSequence],
        unrelated: Sequence[TokenSequence],
        weight: float,
    ) -> tuple[float, float]:
        """`weight` × generalisation and locality loss of one set, each a mean over all of its answer tokens.

        Leaves the gradient of generalisation + `locality_weight` × locality on the shifts `after`; of several
        processes, each that of its own part, and all get the losses of the whole.

        Args:
            before, after: {module name: what is added to the weights before and after the edit}; before the first edit
                nothing is.
            rephrases, unrelated: the set's.
            weight: its part in the loss.
        """
        losses: list[Tensor] = []  # read at the end, so that a GPU is not waited for in between
        divergences: list[Tensor] = []
        for _, batch in self._batches(_own(rephrases)):
            with shifted(self.base_model, after), self.passes.answering(batch):
                surprise = cross_entropy(*own_answer_logits(self.base_model, batch))
                loss = weight * surprise / _n_answer_tokens(rephrases)
                loss.backward()
            losses.append(loss.detach())
        asked = _own(unrelated)
        for chosen, batch in self._batches(asked):
            if before:
                with torch.no_grad(), shifted(self.base_model, before), self.passes.answering(batch):
                    old = own_answer_logits(self.base_model, batch)[0]
            else:
                old = self.passes.logits([asked[i] for i in chosen])
            with shifted(self.base_model, after), self.passes.answering(batch):
                new = own_answer_logits(self.base_model, batch)[0]
                divergence = weight * kl_divergence(new, old) / _n_answer_tokens(unrelated)
                (self.args.locality_weight * divergence).backward()
            divergences.append(divergence.detach())
        totals = [sum(part.item() for part in parts) for parts in (losses, divergences)]
        generalization, locality = distributed.add_up(torch.tensor(totals, dtype=torch.float64)).tolist()
        return generalization, locality

    def _set_optimizer_mode(self, mode: str) -> None:
        """Of an optimizer that has other weights for training than for evaluation, as schedule-free ones do."""
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()

    def _require_finite(self, loss: float, gradients: Mapping[str, Tensor]) -> None:
        """Refuse a step that would turn every parameter of the editor into NaN.

        Args:
            loss: of all processes.
            gradients: {module name: this process's part of the gradient of `loss`}.

        Raises:
            NumericalError: one of them is not finite, on any process.
        """
        flags = torch.stack([~gradient.isfinite().all() for gradient in gradients.values()])
        counts = distributed.add_up(flags.to("cpu", torch.float64)).tolist()
        broken = [name for name, count in zip(gradients, counts, strict=True) if count]
        if broken or not math.isfinite(loss):
            raise NumericalError(
                f"Step {self.state.global_step + 1}: the loss of the edited model is {loss:.4g}"
                + (f", and its gradient is not finite at {', '.join(broken)}" if broken else "")
                + ". Expected finite numbers; the editor is as it was before the step. The edit may be too large for "
                f"the base model's dtype, {self.base_model.dtype}: load it in bfloat16 or float32. Or lower "
                "EditorConfig.edit_lr, from which η starts, or the learning rates."
            )

    def _trace(self, edits: Sequence[TokenSequence], before: Mapping[str, Tensor]) -> list[dict[str, Trace]]:
        """Keys and value gradients of facts, in the model with `before` added to its weights."""
        if not before:
            return [self.passes.traces(edits)] if edits else []  # as a process may have none
        batches = (batch for _, batch in self._batches(edits))
        with shifted(self.base_model, before):
            return list(self.editor.trace(self.base_model, batches, self.passes.trunk.replayed))

    def _batches(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[list[int], TokenBatch]]:
        for chosen, batch in self.tokenize.batches(sequences, self.args.lm_batch_size, pass_cost(self.base_model)):
            yield chosen, batch.to(input_device(self.base_model))

    def _read_covariance(self) -> None:
        """Of ordinary keys, where the method weighs edits against it and the editor has none: from training facts."""
        editor = self.editor
        if editor.config.key_covariance is not None and editor.n_covariance_tokens == 0:
            facts: Any = self.train_dataset
            editor.collect_covariance(
                self.base_model, ordinary_sentences(facts), self.tokenize.tokenizer, batch_size=self.args.lm_batch_size
            )

    def _make_passes(self) -> FrozenPasses:
        editor = self.editor
        names, selection = editor.module_names, editor.config.traced_tokens
        disk = None
        if self.args.trunk_cache_dir:
            fingerprint = features_fingerprint(self.base_model, names, selection)
            disk = FeatureFolder(self.args.trunk_cache_dir, int(self.args.trunk_cache_dir_gib * 2**30), fingerprint)
        features = FeatureCache(int(self.args.trunk_cache_gib * 2**30), disk)

        def trace(batch: TokenBatch) -> dict[str, Trace]:
            return next(iter(editor.trace(self.base_model, [batch])))

        return FrozenPasses(self.base_model, names, trace, selection, self.tokenize, self.args.lm_batch_size, features)


@dataclass
class _Sequence:
    """The sets of one optimizer step that are edited so far, one after another.

    Attributes:
        n_sets: how many.
        shifts: {module name: the sum of their shifts}; empty before the first.
        sets: rephrases and unrelated prompts of the newest of them, newest first.
    """

    n_sets: int = 0
    shifts: dict[str, Tensor] = field(default_factory=dict)
    sets: list[tuple[list[TokenSequence], list[TokenSequence]]] = field(default_factory=list)


class _Forget(TrainerCallback):
    """Drops what must not outlast a checkpoint, a run or a step."""

    def __init__(self, trainer: EditorTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Empty the memory of what the frozen model computed; what is on disk stays.

        In which batch a sequence first ran shows in the last bits of what is kept of it. A run that goes on after a
        checkpoint and one that resumes from it end with the same bits only if both start with the same memory.
        """
        self.trainer.passes.clear()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what an interrupted run, or a try that `auto_find_batch_size` repeats, left.

        Its losses are no part of the next log. What was computed of the base model goes too, as it may have changed
        between two runs: be edited, or no longer be.
        """
        self.trainer.editor.check_base(self.trainer.base_model)
        self.trainer._read_covariance()
        self.trainer._passes = self.trainer._make_passes()
        self.trainer._losses.clear()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the sets of a step that was interrupted: they are no part of the sequence of the one that begins."""
        self.trainer._sequence = _Sequence()


def _joined(window: Sequence[tuple[Sequence[TokenSequence], ...]], part: int) -> list[TokenSequence]:
    """This process's sequences of one part of every set."""
    return [sequence for questions in window for sequence in _own(questions[part])]


def _collate(facts: list[Fact]) -> dict[str, list[Fact]]:
    """Of a module, so that workers that are spawned can be told of it."""
    return {"facts": facts}


def _load_sets(source: Any) -> list[Fact] | dict[str, list[Fact]]:
    """The facts of a data set, or of several by their names."""
    if isinstance(source, Mapping) and source and "prompt" not in source:  # which a fact has
        return {str(name): load_facts(of_name) for name, of_name in source.items()}
    return load_facts(source)


def _check_texts(
    editor: EditorModel,
    facts: Sequence[Fact],
    tokenize: Tokenizer,
    purpose: str,
    kinds: Collection[str] | None = None,
) -> None:
    """Tokenise all that will be read of facts, so that no run ends at one that the model cannot read.

    Args:
        editor: which edits them.
        facts: all facts.
        tokenize: of the base model.
        purpose: what the facts are for.
        kinds: of prompts, as `questions` names them, that are read besides the edited ones; None: all.

    Raises:
        FactError: names the first fact that is too long, or lacks what is needed of it.
    """
    for number, fact in enumerate(logging.tqdm(facts, desc=f"{purpose} facts", unit=" facts", leave=False, delay=2.0)):
        try:
            check_readable(editor, [fact], tokenize)
            for kind, pairs in questions(fact).items():
                if kind != "edit" and (kinds is None or kind in kinds):
                    for pair in pairs:
                        tokenize(*pair)
        except FactError as error:
            raise FactError(f"{purpose} fact {number}: {error}") from None


def _require_same_editor(checkpoint: str, own: EditorConfig, base_model: nn.Module) -> None:
    """Check that what was trained is what a run that goes on from there trains.

    Args:
        checkpoint: folder of the checkpoint.
        own: of the editor that is about to be trained.
        base_model: that it is trained for.

    Raises:
        ModelMismatchError: it is not; names the field and both values.
    """
    found = EditorConfig.from_pretrained(checkpoint)
    remedy = "Give the editor what the checkpoint has, or start a new run in another output_dir, without resuming."
    for name in _SAME_IN_A_RUN:
        attribute = "traced_tokens" if name == "token_selection" else name  # None is the method's own
        there, here = getattr(found, attribute), getattr(own, attribute)
        if _plain(there) != _plain(here):
            raise ModelMismatchError(
                f"{checkpoint} was trained with {name} {there!r}, and this editor has {here!r}; expected the same. "
                + remedy
            )
    expected = found.base_model_fingerprint
    if expected != own.base_model_fingerprint:  # which may be of the weights as stored, and the other as rounded
        check_fingerprint(
            base_model,
            expected,
            own.module_shapes or (),
            own.fingerprint_policy,
            f"The editor in {checkpoint}",
            "the base model that the run began with, or start a new run in another output_dir, without resuming",
        )


def _plain(value: Any) -> Any:
    """With lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _require_metric(name: str, facts: Sequence[Fact] | Mapping[str, Sequence[Fact]]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will give.

    Raises:
        ValueError: says which there are.
    """
    sets = {f"{of_set}_": entries for of_set, entries in facts.items()} if isinstance(facts, Mapping) else {"": facts}
    given = [prefix + metric for prefix, entries in sets.items() for metric in measured_metrics(entries)]
    if name.removeprefix("eval_").removesuffix("_before") not in given:
        raise ValueError(
            f"EditorTrainingArguments.metric_for_best_model is {name!r}; evaluation of these held-out facts gives "
            f"{', '.join(given)}. Name one of them, or give facts that have what it measures, such as rephrases."
        )


def _is_scale(name: str) -> bool:
    return name.endswith(("log_edit_lr", "log_ridge", "log_preservation"))


def _own(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """This process's part, in the order in which one process would run through all: longest first."""
    ordered = sorted(sequences, key=len, reverse=True)
    return distributed.stretch(ordered, [len(sequence) for sequence in ordered])


def _n_answer_tokens(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.target_ids) for sequence in sequences)

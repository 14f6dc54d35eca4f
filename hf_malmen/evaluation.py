"""What a model answers before and after an edit, and the metrics over it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .batches import TokenBatch, Tokenizer, TokenSequence
from .edit import Edit
from .facts import Fact
from .tracing import answer_logits, in_eval_mode

# Tokens generated beyond the longest target of a batch: an answer may be spelled with more tokens than expected.
_EXTRA_TOKENS = 2


@dataclass
class Probes:
    """Prompts of one kind, with the answers expected of them.

    Attributes:
        prompts, expected: one a probe.
        groups: the fact each probe belongs to.
    """

    prompts: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(self, prompt: str, expected: str, group: int) -> None:
        """Add a probe."""
        self.prompts.append(prompt)
        self.expected.append(expected)
        self.groups.append(group)


@dataclass
class Answers:
    """What a model answers to some probes.

    Attributes:
        tokens: the most likely token at each answer position, teacher-forced; one list a probe.
        texts: freely generated answers, or None if none were generated.
    """

    tokens: list[list[int]]
    texts: list[str] | None


def probes_of(facts: Sequence[Fact]) -> dict[str, Probes]:
    """The edited prompts, their rephrases, and the unrelated prompts of `facts`, those kinds that there are."""
    edit, rephrase, unrelated = Probes(), Probes(), Probes()
    for number, fact in enumerate(facts):
        edit.add(fact.prompt, fact.target, number)
        for text in fact.rephrases:
            rephrase.add(text, fact.target, number)
        if fact.unrelated_prompt is not None and fact.unrelated_answer is not None:
            unrelated.add(fact.unrelated_prompt, fact.unrelated_answer, number)
    kinds = {"edit": edit, "rephrase": rephrase, "unrelated": unrelated}
    return {kind: probes for kind, probes in kinds.items() if probes.prompts}


def n_measured(facts: Sequence[Fact], metric: str) -> int:
    """How many of `facts` have what `metric`, with any suffix, measures: rephrases, or an unrelated prompt."""
    if metric.startswith("generalization"):
        return sum(bool(fact.rephrases) for fact in facts)
    if metric.startswith(("locality", "unrelated_accuracy")):
        return sum(fact.unrelated_prompt is not None for fact in facts)
    return len(facts)


def answer(
    model: PreTrainedModel,
    tokenize: Tokenizer,
    probes: Probes,
    *,
    batch_size: int,
    generate: bool,
) -> Answers:
    """Put the probes to the model, teacher-forced and, with `generate`, by greedy free generation."""
    pairs = zip(probes.prompts, probes.expected, strict=True)
    sequences = [tokenize(prompt, expected) for prompt, expected in pairs]
    tokens: list[list[int]] = [[] for _ in sequences]
    texts = [""] * len(sequences)
    # Not `frozen`: where no gradient of the weights is wanted, PyTorch multiplies the one position that `generate` asks
    # for by a copy of the vocabulary projection for each sequence, which is nine times slower.
    with in_eval_mode(model), torch.no_grad(), logging.tqdm(total=len(sequences), unit=" prompts", leave=False) as bar:
        for chosen, batch in tokenize.batches(sequences, batch_size):
            predicted = iter(answer_logits(model, batch.to(model.device))[0].argmax(-1).tolist())
            for i in chosen:
                tokens[i] = [next(predicted) for _ in sequences[i].target_ids]
            if generate:
                for i, text in zip(chosen, _generate(model, tokenize, [sequences[i] for i in chosen]), strict=True):
                    texts[i] = text
            bar.update(len(chosen))
    return Answers(tokens, texts if generate else None)


def evaluate_edit(
    model: PreTrainedModel,
    edit: Edit,
    facts: Sequence[Fact],
    tokenize: Tokenizer,
    *,
    batch_size: int,
    generate: bool,
) -> dict[str, float]:
    """Metrics of `edit` on `facts`, before and after. The model is as before afterwards.

    Returns:
        See `EditorModel.evaluate`.
    """
    probes = probes_of(facts)
    settings: dict[str, Any] = {"batch_size": batch_size, "generate": generate}
    before = {kind: answer(model, tokenize, probes[kind], **settings) for kind in probes}
    with edit.applied_to(model, on_fingerprint_mismatch="ignore"):
        after = {kind: answer(model, tokenize, probes[kind], **settings) for kind in probes}
    scores = score(probes, tokenize, before, after)
    return scores | {f"{name}_before": value for name, value in score(probes, tokenize, before, before).items()}


def score(
    probes: dict[str, Probes], tokenize: Tokenizer, before: dict[str, Answers], after: dict[str, Answers]
) -> dict[str, float]:
    """The four metrics of the answers `after`, teacher-forced and (name + `_generated`) by free generation."""
    from .metrics.edit_success.edit_success import EditSuccess
    from .metrics.generalization.generalization import Generalization
    from .metrics.locality.locality import Locality
    from .metrics.unrelated_accuracy.unrelated_accuracy import UnrelatedAccuracy

    rows = [
        (EditSuccess, "edit", None),
        (Generalization, "rephrase", None),
        (Locality, "unrelated", before),
        (UnrelatedAccuracy, "unrelated", None),
    ]
    scores: dict[str, float] = {}
    for metric, kind, reference in rows:
        if kind not in probes:
            continue
        pairs = zip(probes[kind].prompts, probes[kind].expected, strict=True)
        expected = [list(tokenize(prompt, text).target_ids) for prompt, text in pairs]
        references = reference[kind].tokens if reference else expected
        inputs = {"predictions": after[kind].tokens, "references": references, "groups": probes[kind].groups}
        scores |= metric(config_name="tokens", keep_in_memory=True).compute(**inputs)
        if after[kind].texts is not None:
            references_text = reference[kind].texts if reference else probes[kind].expected
            inputs = {"predictions": after[kind].texts, "references": references_text, "groups": probes[kind].groups}
            result = metric(config_name="text", keep_in_memory=True).compute(**inputs)
            scores |= {f"{name}_generated": value for name, value in result.items()}
    return scores


def _generate(model: PreTrainedModel, tokenize: Tokenizer, sequences: Sequence[TokenSequence]) -> list[str]:
    prompts = [TokenSequence(s.prompt_ids, s.prompt_ids) for s in sequences]
    batch: TokenBatch = tokenize.pad(prompts, side="left").to(model.device)
    n_new = max(len(s.target_ids) for s in sequences) + _EXTRA_TOKENS
    if tokenize.max_length is not None:
        room = tokenize.max_length - batch.input_ids.shape[1] + 1  # the last token is generated, and not read
        if room < n_new and len(sequences) > 1:  # the longest prompt must not cut the longest answer
            return [text for s in sequences for text in _generate(model, tokenize, [s])]
        n_new = min(n_new, room)
    generate: Any = model.generate  # typed for a mixin that PreTrainedModel does not name
    generated = generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=n_new,
        do_sample=False,
        pad_token_id=tokenize.pad_token_id,
    )
    return tokenize.tokenizer.batch_decode(generated[:, batch.input_ids.shape[1] :], skip_special_tokens=True)

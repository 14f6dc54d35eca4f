"""What a model answers before and after an edit, and the metrics over it."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch.nn.functional as F
from torch import Tensor, no_grad
from transformers import PreTrainedModel
from transformers.utils import logging

from . import distributed
from .batches import TokenBatch, Tokenizer, TokenSequence
from .edit import Edit
from .facts import Fact
from .scoring import answers, bootstrap_intervals, contains, token_accuracy
from .tasks import Classes
from .tracing import answer_logits, in_eval_mode, input_device

if TYPE_CHECKING:
    import datasets

# Tokens generated beyond those of the expected answer, which may be spelled with more of them.
DEFAULT_EXTRA_TOKENS = 2
DEFAULT_RESAMPLES = 10_000

Pair: TypeAlias = tuple[str, str]  # a prompt, and an answer to it

# Metric: the kind of prompt whose answers it scores.
_ANSWERED = {
    "edit_success": "edit",
    "generalization": "rephrase",
    "locality": "unrelated",
    "unrelated_accuracy": "unrelated",
    "portability": "portability",
}
# Metric: the kind of prompt at which the target competes with another answer.
_CONTESTED = {"efficacy": "edit", "paraphrase": "rephrase", "neighborhood": "neighborhood"}

# One greedy answer a prompt, whatever the model's generation config asks for.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "stop_strings": None,  # needs the tokenizer, and an answer has its length already
    "prompt_lookup_num_tokens": None,  # takes one prompt at a time, for the same text
    # Makes the last token of the longest answer the end (BART), in place of the one that the model finds likeliest.
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Answer:
    """What a model answers to a prompt of which an answer is expected.

    Attributes:
        expected: tokens of the expected answer; of a classifier, the class.
        predicted: the most likely token at each of their positions, given the true ones before it.
        log_probability: log p(expected answer | prompt), summed over its tokens.
        text: the freely generated answer, or None if none was generated.
    """

    expected: tuple[int, ...]
    predicted: list[int]
    log_probability: float
    text: str | None


@dataclass(frozen=True)
class Evaluation:
    """What an edit does, in numbers and fact by fact.

    Attributes:
        scores: {metric: average over the facts that have what it measures}; the names are those of `measure_edit`.
        intervals: {metric: (low, high)}, 95 % bootstrap intervals of these averages over facts.
        per_fact: one row a fact. `fact` (its number), `prompt`, `target`, `ground_truth`; what the edited prompt is
            answered with, teacher-forced (`predicted`) and freely (`generated`), before (`_before`) and after the edit;
            one column a metric, empty where a fact does not have what it measures; and `probes`, all prompts of the
            fact, each with its kind, the expected answer, its probability, and the same answers.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_fact: "datasets.Dataset"


def questions(fact: Fact) -> dict[str, list[Pair]]:
    """{kind of prompt: prompts with their expected answers}, those kinds that `fact` has."""
    asked: dict[str, list[Pair]] = {
        "edit": [(fact.prompt, fact.target)],
        "rephrase": [(text, fact.target) for text in fact.rephrases],
        "portability": list(fact.portability),
    }
    if fact.unrelated_prompt is not None and fact.unrelated_answer is not None:
        asked["unrelated"] = [(fact.unrelated_prompt, fact.unrelated_answer)]
    return {kind: pairs for kind, pairs in asked.items() if pairs}


def contests(fact: Fact, classes: Classes | None = None) -> dict[str, list[tuple[str, str, str]]]:
    """{metric: (prompt, answer that is to win, answer that is to lose)}, those that `fact` has.

    Args:
        fact: with a ground truth or a neighborhood.
        classes: those of a sequence classifier, by which answers may be one that are spelled differently.

    Raises:
        FactError: an answer names none of `classes`.
    """
    fought = {"neighborhood": [(prompt, answer, fact.target) for prompt, answer in fact.neighborhood]}
    if fact.ground_truth:
        prompts = {"efficacy": [fact.prompt], "paraphrase": list(fact.rephrases)}
        for metric, texts in prompts.items():
            fought[metric] = [(text, fact.target, fact.ground_truth) for text in texts]
    # An answer cannot be more likely than itself.
    fought = {
        metric: [(prompt, winner, loser) for prompt, winner, loser in entries if not _are_one(winner, loser, classes)]
        for metric, entries in fought.items()
    }
    return {metric: entries for metric, entries in fought.items() if entries}


def _are_one(answer: str, other: str, classes: Classes | None) -> bool:
    """Whether two answers are the same tokens, which leave out spaces around them; of a classifier, the same class."""
    if classes is not None:
        return classes.index(answer) == classes.index(other)
    return answer.strip() == other.strip()


def n_measured(facts: Sequence[Fact], metric: str, classes: Classes | None = None) -> int:
    """How many of `facts` have what `metric`, with any suffix, measures, such as rephrases or an unrelated prompt.

    `classes`: as for `contests`.
    """
    for name, kind in _ANSWERED.items():
        if metric.startswith(name):
            return sum(kind in questions(fact) for fact in facts)
    for name in _CONTESTED:
        if metric.startswith(name):
            return sum(name in contests(fact, classes) for fact in facts)
    return len(facts)


def measured_metrics(facts: Sequence[Fact]) -> list[str]:
    """The teacher-forced metrics of `measure_edit` that at least one of `facts` has."""
    return [name for name in _ANSWERED if n_measured(facts, name)]


def answer(
    model: PreTrainedModel,
    tokenize: Tokenizer,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    generate: Collection[Pair] = (),
    n_extra_tokens: int = DEFAULT_EXTRA_TOKENS,
) -> dict[Pair, Answer]:
    """Put prompts to the model, teacher-forced with the expected answers, and by greedy free generation.

    Several processes call it together: each puts its share, and all get all answers.

    Args:
        model: as before afterwards.
        tokenize: puts prompt and answer together.
        pairs: prompts with their expected answers, each pair once.
        batch_size: sequences a pass.
        generate: those of `pairs` whose prompts are answered freely too.
        n_extra_tokens: length of a free answer, in tokens beyond those of the expected one.
    """
    pairs = list(distributed.own(pairs))
    spoken = [i for i, pair in enumerate(pairs) if pair in generate]
    found: dict[Pair, Answer] = {}
    # Not `frozen`: where no gradient of the weights is wanted, PyTorch multiplies the one position that `generate` asks
    # for by a copy of the vocabulary projection for each sequence, which is nine times slower.
    with (
        distributed.together(),
        in_eval_mode(model),
        no_grad(),
        logging.tqdm(total=len(pairs) + len(spoken), unit=" prompts", leave=False) as bar,
    ):
        sequences = [tokenize(prompt, expected) for prompt, expected in pairs]
        for chosen, batch in tokenize.batches(sequences, batch_size):
            logits, targets = answer_logits(model, batch.to(input_device(model)))
            predicted = iter(logits.argmax(-1).tolist())
            log_probabilities = iter(_log_probabilities(logits, targets).tolist())
            for i in chosen:
                expected = sequences[i].target_ids
                tokens = [next(predicted) for _ in expected]
                log_probability = math.fsum(next(log_probabilities) for _ in expected)
                found[pairs[i]] = Answer(expected, tokens, log_probability, None)
            bar.update(len(chosen))
        for numbers in _spoken_batches([sequences[i] for i in spoken], batch_size, _takes_padding(model)):
            chosen = [spoken[number] for number in numbers]
            texts = _generate(model, tokenize, [sequences[i] for i in chosen], n_extra_tokens)
            for i, text in zip(chosen, texts, strict=True):
                found[pairs[i]] = replace(found[pairs[i]], text=text)
            bar.update(len(chosen))
    return dict(distributed.gather_items(list(found.items())))


def measure_edit(
    model: PreTrainedModel,
    edit: Edit,
    facts: Sequence[Fact],
    tokenize: Tokenizer,
    *,
    batch_size: int,
    generate: bool = False,
    probabilities: bool = False,
    n_extra_tokens: int = DEFAULT_EXTRA_TOKENS,
    n_resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    before: Mapping[Pair, Answer] | None = None,
) -> Evaluation:
    """Measure `edit` on `facts`, before and after. The model is as before afterwards.

    Scores average over the prompts of a fact first, then over the facts that have such prompts:

    - `edit_success`, `generalization`, `unrelated_accuracy`, `portability`: share of the expected tokens predicted at
      the edited prompts, their rephrases, the unrelated prompts, and the prompts whose answers follow from the fact.
    - `locality`: share of the unrelated answers' tokens that are predicted as before the edit.
    - These with `_generated` appended: share of freely generated answers that open with the expected one (`locality`:
      with the one before the edit), words compared as in SQuAD. With `_contained`, except `locality`: share of them
      that hold the expected one anywhere.
    - `efficacy`, `paraphrase`: share of edited prompts, and of rephrases, with p(target) > p(ground truth).
      `neighborhood`: share of neighborhood prompts with p(their own answer) > p(target). With `_magnitude` appended:
      the first of these probabilities less the second, in [−1, 1]. Probabilities are of whole answers.
    - All with `_before` appended: the value before the edit.

    Args:
        model: the live base model.
        edit: not in force on it.
        facts: what to measure on; `portability`, `neighborhood` and the rest are measured where facts have them.
        tokenize: as the editor tokenises.
        batch_size: sequences a pass of the language model. Changes the result by the rounding of these passes only.
        generate: measure by free generation too.
        probabilities: compare the probabilities of answers too, where facts have a ground truth or a neighborhood. One
            more prompt to put to the model for each edited prompt and rephrase, and two for each neighborhood prompt.
        n_extra_tokens: length of a free answer, in tokens beyond those of the expected one. More of them find more
            answers that are not the first words, and make the generated locality stricter.
        n_resamples: bootstrap resamples; 0 leaves `intervals` empty.
        seed: of the bootstrap.
        before: what `answer_facts` gave on the unedited model, at these facts or more, and with the same settings;
            None asks it. For several edits of one model.

    Raises:
        ValueError: free generation from a model that does not generate; or `before` without answers to all prompts.
        EditStateError: the edit is in force.
    """
    edit.require_lifted()
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "generate": generate,
        "probabilities": probabilities,
        "n_extra_tokens": n_extra_tokens,
    }
    probes = [_probes(fact, probabilities, tokenize.classes) for fact in facts]
    if before is None:
        before = answer_facts(model, facts, tokenize, **settings)
    spoken = _questions(facts) if generate else ()
    missing = [
        pair
        for of_fact in probes
        for pair in of_fact
        if pair not in before or (pair in spoken and before[pair].text is None)
    ]
    if missing:
        raise ValueError(
            f"The answers before the edit leave out {len(missing)} prompts, the first of them {missing[0][0]!r}. Give "
            "what answer_facts(model, facts, ...) returns for the same facts and settings."
        )
    with edit.applied_to(model, on_fingerprint_mismatch="ignore"):
        after = answer_facts(model, facts, tokenize, **settings)
    rows = []
    for fact in facts:
        fought = contests(fact, tokenize.classes) if probabilities else {}
        scores = _scores(fact, fought, after, before)
        untouched = _scores(fact, fought, before, before)
        rows.append(scores | {f"{name}_before": value for name, value in untouched.items()})

    names = list(dict.fromkeys(name for row in rows for name in row))
    measured = np.array([[name in row for name in names] for row in rows])
    values = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    means = (values.sum(axis=0) / measured.sum(axis=0)).tolist()
    intervals = {}
    if n_resamples:
        ends = bootstrap_intervals(values, measured, n_resamples=n_resamples, seed=seed).tolist()
        intervals = {name: (low, high) for name, (low, high) in zip(names, ends, strict=True)}
    return Evaluation(
        dict(zip(names, means, strict=True)),
        intervals,
        _table(facts, probes, names, rows, tokenize, before, after),
    )


def answer_facts(
    model: PreTrainedModel,
    facts: Sequence[Fact],
    tokenize: Tokenizer,
    *,
    batch_size: int,
    generate: bool = False,
    probabilities: bool = False,
    n_extra_tokens: int = DEFAULT_EXTRA_TOKENS,
) -> dict[Pair, Answer]:
    """`answer` to every prompt of `facts`; arguments as in `measure_edit`.

    Raises:
        ValueError: free generation from a model that does not generate.
    """
    if generate and not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not generate text. Measure it with generate=False.")
    # Facts may share prompts, which are then asked once.
    pairs = list(dict.fromkeys(pair for fact in facts for pair in _probes(fact, probabilities, tokenize.classes)))
    asked = _questions(facts) if generate else ()
    return answer(model, tokenize, pairs, batch_size=batch_size, generate=asked, n_extra_tokens=n_extra_tokens)


def _questions(facts: Sequence[Fact]) -> set[Pair]:
    """What is answered freely, where anything is."""
    return {pair for fact in facts for pairs in questions(fact).values() for pair in pairs}


def _probes(fact: Fact, probabilities: bool, classes: Classes | None) -> dict[Pair, str]:
    """{prompt with an answer: the kind of the prompt}, the edited prompt first."""
    probes = {pair: kind for kind, pairs in questions(fact).items() for pair in pairs}
    if probabilities:
        for metric, contested in contests(fact, classes).items():
            for prompt, *rivals in contested:
                for rival in rivals:
                    probes.setdefault((prompt, rival), _CONTESTED[metric])
    return probes


def _scores(
    fact: Fact,
    fought: Mapping[str, Sequence[tuple[str, str, str]]],
    after: Mapping[Pair, Answer],
    before: Mapping[Pair, Answer],
) -> dict[str, float]:
    """The scores of one fact by the answers `after`, the `locality` of which is compared with those `before`.

    `fought` are those of its `contests` that are scored.
    """
    scores: dict[str, float] = {}
    asked = questions(fact)
    for metric, kind in _ANSWERED.items():
        if kind not in asked:
            continue
        given = [after[pair] for pair in asked[kind]]
        if metric == "locality":
            tokens: list[Sequence[int]] = [before[pair].predicted for pair in asked[kind]]
            texts = [before[pair].text or "" for pair in asked[kind]]
        else:
            tokens, texts = [entry.expected for entry in given], [expected for _, expected in asked[kind]]
        scores[metric] = _mean([token_accuracy(a.predicted, t) for a, t in zip(given, tokens, strict=True)])
        generated = [entry.text for entry in given if entry.text is not None]
        if generated:
            rules = {"generated": answers} if metric == "locality" else {"generated": answers, "contained": contains}
            for suffix, rule in rules.items():
                scores[f"{metric}_{suffix}"] = _mean([rule(g, t) for g, t in zip(generated, texts, strict=True)])
    for metric, contested in fought.items():
        rivals = [(after[prompt, winner], after[prompt, loser]) for prompt, winner, loser in contested]
        pairs = [(winner.log_probability, loser.log_probability) for winner, loser in rivals]
        scores[metric] = _mean([float(won > lost) for won, lost in pairs])
        scores[f"{metric}_magnitude"] = _mean([math.exp(won) - math.exp(lost) for won, lost in pairs])
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(
    facts: Sequence[Fact],
    probes: Sequence[Mapping[Pair, str]],
    names: Sequence[str],
    rows: Sequence[Mapping[str, float]],
    tokenize: Tokenizer,
    before: Mapping[Pair, Answer],
    after: Mapping[Pair, Answer],
) -> "datasets.Dataset":
    """The `per_fact` of an `Evaluation`."""
    import datasets  # takes a second, and only evaluation needs it

    def shown(pair: Pair) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for suffix, found in (("_before", before[pair]), ("", after[pair])):
            columns[f"predicted{suffix}"] = _spelled(tokenize, found.predicted)
            columns[f"generated{suffix}"] = found.text
        return columns

    edited = [shown((fact.prompt, fact.target)) for fact in facts]
    columns: dict[str, list[Any]] = {
        "fact": list(range(len(facts))),
        "prompt": [fact.prompt for fact in facts],
        "target": [fact.target for fact in facts],
        "ground_truth": [fact.ground_truth for fact in facts],
        **{column: [row[column] for row in edited] for column in edited[0]},
        **{name: [row.get(name) for row in rows] for name in names},
        "probes": [
            [
                {
                    "kind": kind,
                    "prompt": pair[0],
                    "expected": pair[1],
                    "probability_before": math.exp(before[pair].log_probability),
                    "probability": math.exp(after[pair].log_probability),
                    **shown(pair),
                }
                for pair, kind in of_fact.items()
            ]
            for of_fact in probes
        ],
    }
    # Declared, so that a column in which nothing stands has its type too.
    text, number = datasets.Value("string"), datasets.Value("float64")
    answered = dict.fromkeys(edited[0], text)
    probe = {"kind": text, "prompt": text, "expected": text, "probability_before": number, "probability": number}
    features = datasets.Features(
        {
            "fact": datasets.Value("int64"),
            **dict.fromkeys(("prompt", "target", "ground_truth", *answered), text),
            **dict.fromkeys(names, number),
            "probes": datasets.List(probe | answered),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def _log_probabilities(
    logits: Tensor,  # (n_tokens, vocabulary)
    tokens: Tensor,  # (n_tokens,)
) -> Tensor:  # (n_tokens,)
    return -F.cross_entropy(logits, tokens, reduction="none")


def _spelled(tokenize: Tokenizer, predicted: list[int]) -> str:
    """Predicted tokens as text; of a classifier, the label."""
    if tokenize.classes is None:
        return str(tokenize.tokenizer.decode(predicted))
    labels = {index: label for label, index in tokenize.classes.ids.items()}
    return labels.get(predicted[0], str(predicted[0]))


def _takes_padding(model: PreTrainedModel) -> bool:
    """Whether padding before a prompt is nothing to `model`: attention masks it.

    Models that carry a state from token to token, as transformers marks them, may take it for text (RWKV,
    RecurrentGemma).
    """
    return not getattr(model, "_is_stateful", False)


def _spoken_batches(sequences: Sequence[TokenSequence], batch_size: int, padded: bool) -> Iterator[list[int]]:
    """Numbers of `sequences` in batches, the longest first; of one length of prompts each, unless they may be `padded`.

    Then there is at most one more batch for each length.
    """

    def sizes(i: int) -> tuple[int, int]:
        sequence = sequences[i]
        return (0, len(sequence)) if padded else (len(sequence.prompt_ids), len(sequence.target_ids))

    order = sorted(range(len(sequences)), key=sizes, reverse=True)
    for _, group in groupby(order, key=lambda i: sizes(i)[0]):
        together = list(group)
        for start in range(0, len(together), batch_size):
            yield together[start : start + batch_size]


def _generate(
    model: PreTrainedModel, tokenize: Tokenizer, sequences: Sequence[TokenSequence], n_extra_tokens: int
) -> list[str]:
    # What is generated follows the prompt, which must not end in padding; or the first token that the decoder reads.
    follows = not model.config.is_encoder_decoder
    prompts = [TokenSequence(s.prompt_ids, s.prompt_ids) for s in sequences]
    batch: TokenBatch = tokenize.pad(prompts, side="left" if follows else "right").to(input_device(model))
    n_read = batch.input_ids.shape[1] if follows else 1
    lengths = [len(s.target_ids) + n_extra_tokens for s in sequences]
    n_new = max(lengths)
    if tokenize.max_length is not None:
        room = tokenize.max_length - n_read + 1  # the last token is generated, and not read
        if room < n_new and len(sequences) > 1:  # the longest prompt must not cut the longest answer
            return [text for s in sequences for text in _generate(model, tokenize, [s], n_extra_tokens)]
        n_new = min(n_new, room)
    # Answers that end early are filled up with a token that decoding leaves out.
    fill = (tokenize.tokenizer.pad_token_id, tokenize.tokenizer.eos_token_id, tokenize.pad_token_id)
    generate: Any = model.generate  # typed for a mixin that PreTrainedModel does not name
    generated = generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=n_new,
        pad_token_id=next(token for token in fill if token is not None),
        **_GREEDY,
    )[:, n_read:].tolist()
    # Each answer by its own length, so that it does not depend on the sequences beside it.
    own = [tokens[:length] for tokens, length in zip(generated, lengths, strict=True)]
    texts: list[str] = tokenize.tokenizer.batch_decode(own, skip_special_tokens=True)
    return texts

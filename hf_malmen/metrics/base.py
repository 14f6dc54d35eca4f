"""What the four metrics share: inputs, the ways to score, and the average over facts."""

from collections import defaultdict
from collections.abc import Callable
from operator import index
from typing import Any

import datasets
import evaluate

from ..scoring import answers, contains, token_accuracy

_INPUTS = """
Args:
    predictions: for the configuration "tokens" (default), one list of token ids a prompt: the most likely token at each
        answer position, given the true tokens before it. For "text" and "contained", one freely generated string a
        prompt, which is right if it opens with the expected answer, or if it holds it anywhere.
    references: the expected token ids, or the expected answer, in the same order.
    groups: optional, one integer a prompt. Prompts of one group, such as the rephrases of one fact, are averaged
        first, so that each group counts once.
"""

_CITATION = """
@inproceedings{tan2024massive,
  title={Massive Editing for Large Language Models via Meta Learning},
  author={Tan, Chenmien and Zhang, Ge and Fu, Jie},
  booktitle={International Conference on Learning Representations},
  year={2024}
}
"""

# Configuration: the rule that scores one answer.
_RULES: dict[str, Callable[[Any, Any], float]] = {
    "default": token_accuracy,
    "tokens": token_accuracy,
    "text": answers,
    "contained": contains,
}


class AnswerMetric(evaluate.Metric):
    """Average score of predicted against expected answers. Subclasses say what is measured."""

    result_name: str
    description: str

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _RULES:
            raise ValueError(
                f"{self.result_name} has the configurations tokens, text and contained, not {self.config_name}."
            )
        of_tokens = _RULES[self.config_name] is token_accuracy
        value = datasets.Sequence(datasets.Value("int64")) if of_tokens else datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], groups: list[int] | None = None
    ) -> dict[str, float]:
        if not predictions:
            raise ValueError(f"{self.result_name} got no predictions. Expected at least one, with its reference.")
        score = _RULES[self.config_name]
        by_group: dict[int, list[float]] = defaultdict(list)
        # As integers: the entries of a tensor are equal, and yet not the same key.
        group_of = map(index, groups) if groups is not None else range(len(predictions))
        for group, prediction, reference in zip(group_of, predictions, references, strict=True):
            by_group[group].append(score(prediction, reference))
        means = [sum(scores) / len(scores) for scores in by_group.values()]
        return {self.result_name: sum(means) / len(means)}

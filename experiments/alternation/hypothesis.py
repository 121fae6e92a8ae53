"""The hypothesis of `codi alternation` as data, before the numbers: what is measured and predicted, by which rules.

Even latents store, odd latents compute (Scratchpad Thinking, 2025; Latent Reasoning Sprint; some measures: Cywiński et
al.). In the numbering of vectors there (0..6 = h_0..h_6) and here "even" means h_2, h_4, h_6. `MEASURES` say what is
measured, which parity is predicted to be higher and where that prediction comes from; edits are mapped to latents by
experiments/study/storage.py. `RULES` say how it is judged; the statistics are those of
experiments/statistics/alternation.py, which is tested on simulated models for every answer that it can give.

Contrast. Six latents differ by more than parity: what grows or falls along the thought also differs between {2, 4, 6}
and {1, 3, 5}. The contrast is therefore the regression coefficient of "latent is even" beside a constant and a linear
trend in k, in the units of the measure.

Sizes that matter. A difference matters if it is larger than what an irrelevant choice makes, and large enough to be of
use. So the smallest size of a measure is the larger of two: the spread of its contrast between wordings of the same
numbers (experiments/statistics/sizes.py; prompts without several wordings take that of the templates asked in the same
run, which is in the same unit), and `Measure.smallest`, with the reason given there. The pooled contrast has the larger
of its own spread between wordings and of the smallest size, in pooled units, of its least demanding measure: a pooled
contrast that no measure alone would count.

Knows nothing about how a measure is made (measures.py) or judged (verdict.py). Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.study.storage import parity

__all__ = ["LEAST_ACCURACY", "LEAST_MEASURES", "MEASURES", "POOLED", "RULES", "TUNED_MEASURES", "Measure"]


@dataclass(frozen=True)
class Measure:
    """One measure of the test, as fixed before it is run.

    Attributes:
        name: in tables.
        label: on the figure.
        unit: of its values.
        predicted: +1 if the hypothesis predicts even latents higher, −1 if odd ones.
        smallest: smallest difference that is of use, in its unit, above 0.
        reason: why that one.
        source: where the prediction comes from.
    """

    name: str
    label: str
    unit: str
    predicted: Literal[1, -1]
    smallest: float
    reason: str
    source: str


_PROMPT = "one answer in twenty"
_MASS = "one hundredth of what a position attends to; six latents share about a tenth"
MEASURES: tuple[Measure, ...] = (
    Measure("intermediate_detection", "Intermediate value in top 5", "rate above chance", 1, 0.05, _PROMPT,
            "posts: intermediate values are among the top tokens of h_k at even latents, 75 to 79 % against 0.5 %"),
    Measure("final_detection", "Final answer in top 5", "rate above chance", 1, 0.05, _PROMPT,
            "posts: the answer is detected most at latents 2 and 4"),
    Measure("entropy", "Entropy of the lens", "nats", -1, 0.1, "a tenth of a nat is 10 % of the number of likely words",
            "posts: entropy is highest at latents 3 and 5"),
    Measure("early_answer_gain", "Accuracy gained by latent k", "fraction", -1, 0.05, _PROMPT,
            "posts: answers after k latents gain when latent k computes"),
    Measure("ablation_embedding", "Accuracy lost without z_k", "fraction", parity("embedding"), 0.05, _PROMPT,
            "z_k = prj(h_{k-1}) carries the state before it: Cywiński et al., h_2 is fed as z_3 and h_4 as z_5"),
    Measure("ablation_slot", "Accuracy lost without slot k", "fraction", parity("slot"), 0.05, _PROMPT,
            "posts: ablating even latents hurts most; later positions read latent k from its slot of the cache"),
    Measure("attention_to_numbers", "Attention: latent k → numbers", "attention mass", 1, 0.01, _MASS,
            "posts: attention to number tokens of the question peaks at even latents"),
    Measure("attention_from_end", "Attention: end of thought → k", "attention mass", 1, 0.01, _MASS,
            "follows from storage: the answer is read off the latents that store"),
    Measure("attention_from_next", "Attention: next position → k", "attention mass", 1, 0.01, _MASS,
            "follows from storage: a computing latent reads the storing one before it"),
    Measure("components", "Place in the first two PCs", "SD in the plane", 1, 0.5,
            "half of the spread of all latents",
            "posts: even and odd latents lie apart, which has no sign: the direction is that of derivation prompts, so "
            "this one is not pooled"),
    Measure("probe_intermediate", "Probe: step values from h_k", "accuracy above shuffled", 1, 0.05, _PROMPT,
            "follows from storage: values are linearly readable where they are stored"),
    Measure("probe_kind", "Probe: intermediate − final", "accuracy difference", -1, 0.05, _PROMPT,
            "posts: a probe for intermediate against final works at latents 3 and 5"),
)  # fmt: skip
TUNED_MEASURES: tuple[Measure, ...] = (
    Measure("tuned_intermediate", "Intermediate, tuned lens", "rate above chance", 1, 0.05, _PROMPT,
            "as intermediate_detection, by a tuned lens, mean over the layers below the last"),
    Measure("tuned_final", "Final answer, tuned lens", "rate above chance", 1, 0.05, _PROMPT,
            "as final_detection, by a tuned lens, mean over the layers below the last"),
    Measure("tuned_entropy", "Entropy, tuned lens", "nats", -1, 0.1, "as entropy",
            "as entropy, by a tuned lens, mean over the layers below the last"),
)  # fmt: skip
POOLED = Measure("pooled", "All testable measures, pooled", "SD, predicted sign", 1, 0.05,
                 "the smallest size of the least demanding measure, in these units",
                 "the mean of all testable measures")  # fmt: skip
LEAST_ACCURACY = 0.2
"""A model that answers fewer prompts right than this (a fraction) says nothing about how latents work."""
LEAST_MEASURES = 3
"""Testable measures that the pooled answer needs."""
RULES: dict[str, str] = {
    "contrast": "coefficient of 'latent is even' in a least-squares fit with constant and linear trend in k, in the "
    "sign that is predicted",
    "unit": "cluster of prompts that share their numbers; bootstrap resamples move whole clusters",
    "detection": "top 5 tokens of the model's head on h_k, minus the rate of other clusters' values; values that stand "
    "in the question or are also another step's or the answer's are left out",
    "ablation": "z_k (the keys and values of slot k in all layers) replaced by the mean over derivation prompts, later "
    "latents computed on what is left",
    "sizes": "the larger of the stated size and of the spread of the contrast between wordings of the same numbers "
    "(for a task without them: of the templates of the same run); pooled: the stated size is that of the least "
    "demanding measure, in units of the pooled one",
    "floor and ceiling": "a measure whose latents all lie within its smallest size of the lowest or highest value that "
    "it can take carries nothing and is left out",
    "intervals": "simultaneous over all measures and the pooled one (max-t over the same resamples)",
    "specificity": "even/odd explains more than every other split of the latents into halves, beside the same trend, "
    "in at least 1 - alpha of the resamples",
    "supported": "the interval excludes 0 in the predicted sign, size at least the smallest that matters, and specific",
    "alternates, opposite phase": "the same in the other sign",
    "another split explains more": "one other split explains more in at least 1 - alpha of the resamples and is there "
    "itself, in a size that matters",
    "below the size that matters": "the whole interval lies within the smallest size",
    "not in the predicted phase": "the interval lies below the smallest size, but the opposite phase stays open",
    "undecided": "everything else",
    "pooled": "mean over testable measures (without components, which have no predicted sign) of predicted sign x "
    "deviation from the prompt's mean, in units of its spread; it alone decides for a task, measures do not vote. Not "
    f"testable with fewer than {LEAST_MEASURES} testable measures, or for a model that answers fewer than "
    f"{LEAST_ACCURACY:.0%} right",
    "tasks": "over the tasks: the verdict that every testable task has; undecided if they disagree",
}

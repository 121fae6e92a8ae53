"""The hypothesis of `codi alternation` as data, before the numbers: what is measured and predicted, by which rules.

Everything that could be chosen after seeing the data is fixed here, as data: `MEASURES` (what is measured, which parity
the hypothesis predicts to be higher, the smallest difference that would matter), and `RULES` (contrast, unit, tests,
correction, verdicts). Nothing is chosen by the numbers.

Contrast. Six latents differ by more than parity: what grows or falls along the thought also differs between {2, 4, 6}
and {1, 3, 5}. The contrast is therefore the regression coefficient of "latent is even" beside a constant and a linear
trend in k. It is in the units of the measure; a straight line gives 0, values that alternate by ±d/2 give d, and so
does the same alternation on top of a line. For n = 6 it is also blind to any quadratic.

Two questions, both of which must be answered with yes:

1. Is it there? Unit: number triple (cluster). Null: a triple's contrast is as likely negative as positive; whole
   triples are flipped, the same flips for every measure, step-down max-statistic over all measures (family-wise). This
   generalises over prompts, not over latents: any fixed profile that is not exactly flat against the contrast is
   found with enough triples. Hence
2. Is it alternation? Every way to split the latents into two halves (10 for n = 6) is fitted in place of even/odd,
   beside the same trend. Even/odd must explain more than each of the others, in at least 1 − α of the bootstrap
   resamples of triples. Steps, single special latents and smooth curves fail here. If the latents' effects were
   exchangeable, even/odd would come first by chance once in 10, with the predicted sign once in 20: that is the level
   of one measure against arbitrary profiles, and with six latents none can be lower.

The same test against the smallest difference that matters says when a measure contradicts the hypothesis rather than
leaving it open. Knows nothing about how a measure is made (measures.py) or judged (verdict.py).

Source of the hypothesis: Scratchpad Thinking (2025) and the Latent Reasoning Sprint posts; of some measures: Cywiński
et al. In their numbering of vectors (0..6 = h_0..h_6) and in ours "even" means h_2, h_4, h_6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LEAST_ACCURACY", "MEASURES", "POOLED", "RULES", "TUNED_MEASURES", "Measure"]


@dataclass(frozen=True)
class Measure:
    """One measure of the test, as fixed before it is run.

    Attributes:
        name: in tables.
        label: on the figure.
        unit: of its values.
        predicted: +1 if the hypothesis predicts even latents higher, −1 if odd ones.
        smallest: smallest difference between even and odd that would matter, in its unit, above 0.
        floor: values near 0 mean that there is nothing to compare: if no latent reaches `smallest`, not testable.
        why: the prediction in words.
    """

    name: str
    label: str
    unit: str
    predicted: Literal[1, -1]
    smallest: float
    floor: bool
    why: str


MEASURES: tuple[Measure, ...] = (
    Measure("intermediate_detection", "Intermediate value in top 5", "rate above chance", 1, 0.05, True,
            "stored intermediate values are readable from h_k by the model's own head at even latents"),
    Measure("final_detection", "Final answer in top 5", "rate above chance", 1, 0.05, True,
            "the same for the answer"),
    Measure("entropy", "Entropy of the lens", "nats", -1, 0.1, False,
            "odd latents compute: their distribution is broad (published: highest at 3 and 5)"),
    Measure("early_answer_gain", "Accuracy gained by latent k", "fraction", -1, 0.05, True,
            "accuracy of an answer after k latents grows when latent k computes"),
    Measure("ablation_damage", "Accuracy lost without latent k", "fraction", 1, 0.05, True,
            "mean-ablating the embedding of a latent that stores loses what it stored"),
    Measure("attention_to_numbers", "Attention: latent k → numbers", "attention mass", 1, 0.01, False,
            "published: attention to number tokens of the question peaks at even latents"),
    Measure("attention_from_end", "Attention: end of thought → k", "attention mass", 1, 0.01, False,
            "the answer is read off the latents that store"),
    Measure("attention_from_next", "Attention: next position → k", "attention mass", 1, 0.01, False,
            "a computing latent reads the storing one before it"),
    Measure("components", "Place in the first two PCs", "SD in the plane", 1, 0.5, False,
            "even and odd latents lie apart; direction taken from derivation prompts, so the sign is a replication"),
    Measure("probe_intermediate", "Probe: step values from h_k", "accuracy above shuffled", 1, 0.05, True,
            "intermediate values are linearly readable where they are stored"),
    Measure("probe_kind", "Probe: intermediate − final", "accuracy difference", -1, 0.05, False,
            "published: a probe for intermediate versus final works at latents 3 and 5"),
)  # fmt: skip
TUNED_MEASURES: tuple[Measure, ...] = (
    Measure("tuned_intermediate", "Intermediate, tuned lens", "rate above chance", 1, 0.05, True,
            "as intermediate_detection, by a tuned lens, mean over the layers below the last"),
    Measure("tuned_final", "Final answer, tuned lens", "rate above chance", 1, 0.05, True,
            "as final_detection, by a tuned lens, mean over the layers below the last"),
    Measure("tuned_entropy", "Entropy, tuned lens", "nats", -1, 0.1, False,
            "as entropy, by a tuned lens, mean over the layers below the last"),
)  # fmt: skip
LEAST_ACCURACY = 0.2
"""A model that answers fewer prompts right than this (a fraction) says nothing about how latents work."""
RULES: dict[str, str] = {
    "contrast": "coefficient of 'latent is even' in a least-squares fit with constant and linear trend in k",
    "unit": "number triple (cluster of prompts that share their numbers); bootstrap and sign flips move whole triples",
    "detection": "top 5 tokens of the model's head on h_k, minus the rate of other triples' values; values that stand "
    "in the question or are also another step's or the answer's are left out",
    "correction": "step-down max-statistic over all measures, common sign flips (family-wise)",
    "specificity": "even/odd explains more than every other split of the latents into halves, beside the same trend, "
    "in at least 1 - alpha of the bootstrap resamples",
    "supported": "corrected p <= alpha, sign as predicted, size at least the smallest that matters, and specific",
    "contradicted": "the contrast in the predicted direction is below the smallest size that matters (corrected "
    "p <= alpha against that size); a contrast of the opposite sign is a case of it",
    "undecided": "neither",
    "not testable": "not observed, or at its floor at every latent",
    "overall": "pooled profile: mean over testable measures of predicted sign x deviation from the prompt's mean, in "
    "units of its standard deviation. Supported: pooled contrast positive with p <= alpha, specific, and at least half "
    "of the testable measures (3 or more) supported. Contradicted: not so, and more than half of them contradicted. "
    "Otherwise undecided. Not testable with fewer than 3 testable measures, or for a model that answers fewer than "
    f"{LEAST_ACCURACY:.0%} of the prompts right",
}
POOLED = Measure("overall", "All testable measures, pooled", "SD, predicted sign", 1, 0.0, False, RULES["overall"])

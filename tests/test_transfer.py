"""codi transfer: an ablated prompt says nothing, planted latents bring its answer back, and a donor's with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import planted_model, planted_problems, planted_split

from codi import CodiModel
from experiments.latents.transfer import Config, prompt_means, run
from experiments.study.shared import Result
from steering.replacements import AblatePrompt


def moved(out: Path, carrier: str) -> Result:
    config = Config(out=out, draws=1, resamples=200, permutations=200, task="planted")
    return run(config, planted_model(carrier), planted_split())  # type: ignore[arg-type]


def test_planted_latents_bring_the_answer_back(tmp_path: Path) -> None:
    result = moved(tmp_path / "run", "latents")
    own = result.tables["levels"].set_index("condition")["mean"]
    donor = result.tables["donor_levels"].set_index("condition")["mean"]
    assert own["intact + nothing"] == 1 and own["ablated + nothing"] == 0
    for level in ("vectors", "slots"):
        assert own[f"ablated + own {level}"] == 1 and own[f"ablated + same value {level}"] == 1
        for state in ("ablated", "intact"):  # the answer follows the latents, whatever the prompt says
            assert own[f"{state} + other value {level}"] < 0.3
            assert donor[f"{state} + other value {level}"] == 1
    assert {claim.verdict for claim in result.claims or () if "own" in claim.name} == {"held"}


def test_nothing_carried_gives_nulls(tmp_path: Path) -> None:
    result = moved(tmp_path / "run", "prompt")
    own = result.tables["levels"].set_index("condition")["mean"]
    assert all(own[name] == 0 for name in own.index if name.startswith("ablated"))
    assert all(own[name] == 1 for name in own.index if name.startswith("intact"))
    # this model reads the numbers in its first block: the published ablation leaves them there
    assert own["leaky + nothing"] == 1
    assert "not held" in {claim.verdict for claim in result.claims or () if "own" in claim.name}


def test_ablated_prompts_of_one_story_are_equal(codi_model: CodiModel) -> None:
    """Two prompts of one story and length have the same states after ablation, not after the leaky one."""
    problems = [p for p in planted_problems(1) if p.template == "t0"][:4]
    problems = [type(p)(**{**p.__dict__, "template": "t0", "operation": "addition"}) for p in problems]
    problems = [type(p)(**{**p.__dict__, "question": f"{i}+{i}=?"}) for i, p in enumerate(problems)]
    batch = codi_model.encode([p.question for p in problems])
    story = ("t0", "addition", int(batch.lengths[0]))
    means = prompt_means(codi_model, problems, {story})
    whole = codi_model.prefill(batch, [AblatePrompt([means[story]] * 4)])
    torch.testing.assert_close(whole.state[0], whole.state[3])
    leaky = codi_model.prefill(batch, [AblatePrompt([means[story]] * 4, embeddings=False)])
    torch.testing.assert_close(leaky.state[0], leaky.state[3])  # the last block's output is a mean too ...
    a, b = (codi_model.rollout(x, 1, keep=("embeddings", "cache")).states[:, 1] for x in (whole, leaky))
    torch.testing.assert_close(a[0], a[3])
    assert not torch.allclose(b[0], b[3])  # ... but the first block's keys and values are not


def test_needs_donors(tmp_path: Path) -> None:
    from experiments.tasks.split import Split

    one = planted_problems(1)[:2]
    with pytest.raises(ValueError, match="derivation"):
        run(Config(out=tmp_path / "run"), planted_model(), Split(tuple(one), tuple(one)))

"""The CODI loss and its parts: against term-by-term recomputation, peft's own forward, and padding."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_problems import PROBLEMS, Text

from codi import CodiModel
from codi.batches import collate
from codi.checkpoint import load_codi, reference_state, save_checkpoint
from codi.decoder import StepDecoder
from codi.merged import MergedLora
from codi.training import DistillationLoss, TeacherLoss, cosine_schedule


def manual_losses(model: CodiModel, problem: Text, n_latents: int, gradient: bool = False) -> dict[str, Any]:
    """One problem, nothing shared, no cache: every term from full forward passes over embeddings."""
    p, tok = model.protocol, model.tokenizer
    question = tok(problem.question)["input_ids"]
    chain = tok(problem.chain, add_special_tokens=False)["input_ids"]
    answer = tok(problem.answer_text, add_special_tokens=False)["input_ids"] + [p.eos_id]
    number = p.answer_style == "number"
    lead = 0
    if not number:
        words = problem.answer_text.rpartition(":")[0] + ":"
        lead = len(tok(words, add_special_tokens=False)["input_ids"])

    def run(embeddings: torch.Tensor) -> Any:
        return model.base(inputs_embeds=embeddings[None], output_hidden_states=True, use_cache=False)

    def ce(logits: torch.Tensor, start: int, targets: list[int]) -> torch.Tensor:
        rows = logits[0, start - 1 : start - 1 + len(targets)]
        return F.cross_entropy(rows.float(), torch.tensor(targets))

    with torch.set_grad_enabled(gradient):
        embed = model.base.get_input_embeddings()
        ids = question + list(p.before_verbal)
        full = ids + chain + ([p.eot_id] if number else []) + answer
        out = run(embed(torch.tensor(full)))
        teacher = ce(out.logits, len(ids), full[len(ids) :])
        at = len(full) - len(answer) - 1 + lead
        target = torch.stack([h[0, at] for h in out.hidden_states])

        x = embed(torch.tensor(question + list(p.before_latents)))
        for _ in range(n_latents):
            h = run(x).hidden_states[-1][0, -1]
            x = torch.cat((x, model.prj(h)[None]))
        prompt = len(x) + len(p.after_latents)
        x = torch.cat((x, embed(torch.tensor(list(p.after_latents) + answer))))
        out = run(x)
        student = ce(out.logits, prompt, answer)
        learnt = torch.stack([h[0, prompt - 1 + lead] for h in out.hidden_states])

        ids = question + list(p.before_direct)
        direct = ce(run(embed(torch.tensor(ids + answer))).logits, len(ids), answer)
    terms = {"teacher": teacher, "student": student, "direct": direct}
    return (terms if gradient else {k: float(v) for k, v in terms.items()}) | {"learnt": learnt, "target": target}


@pytest.mark.parametrize(
    ("kind", "family"), [("llama", "answer-only"), ("gpt2", "original"), ("qwen2", "original-eos")]
)
def test_loss_terms_against_full_recomputation(trainable: Callable[..., CodiModel], kind: str, family: str) -> None:
    model = trainable(kind, family)
    problem = PROBLEMS[0]
    if family != "answer-only":
        problem = Text(problem.question, problem.chain, f"The answer is: {problem.answer_text}")
    loss = DistillationLoss(model, n_latents=3, kd_weight=2.0, direct_fraction=1.0, direct_weight=0.5, merged=False)
    got = loss(collate([problem], model))
    want = manual_losses(model, problem, 3)
    for term in ("teacher", "student", "direct"):
        assert got[term].item() == pytest.approx(want[term], rel=2e-4), term
    learnt, target = want["learnt"], want["target"]
    per_layer = [float(F.smooth_l1_loss(s, t)) / float(t.std()) for s, t in zip(learnt, target, strict=True)]
    assert got["distillation"].item() == pytest.approx(sum(per_layer) / len(per_layer), rel=2e-3)
    total = float(want["student"] + want["teacher"] + 0.5 * want["direct"]) + 2 * got["distillation"].item()
    assert got["total"].item() == pytest.approx(total, rel=2e-4)


@pytest.mark.parametrize(("kind", "family"), [("llama", "answer-only"), ("gpt2", "original")])
def test_gradients_against_full_recomputation(trainable: Callable[..., CodiModel], kind: str, family: str) -> None:
    """Through every latent, the cache and the projection; the teacher's state is a constant."""
    model = trainable(kind, family)
    problem = PROBLEMS[0]
    if family != "answer-only":
        problem = Text(problem.question, problem.chain, f"The answer is: {problem.answer_text}")
    loss = DistillationLoss(model, n_latents=3, kd_weight=2.0, direct_fraction=1.0, direct_weight=0.5, merged=False)
    weights = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(loss(collate([problem], model))["total"], list(weights.values()))
    want = manual_losses(model, problem, 3, gradient=True)
    per_layer = [
        F.smooth_l1_loss(s, t) / t.std()
        for s, t in zip(want["learnt"], [t.detach() for t in want["target"]], strict=True)
    ]
    total = want["student"] + 2 * sum(per_layer) / len(per_layer) + want["teacher"] + 0.5 * want["direct"]
    wanted = torch.autograd.grad(total, list(weights.values()))
    for name, one, other in zip(weights, got, wanted, strict=True):
        assert float((one - other).norm()) <= 2e-3 * float(other.norm()) + 1e-7, name


def test_a_batch_is_the_token_weighted_mean_of_its_problems(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    loss = DistillationLoss(model, n_latents=2, merged=False)
    together = loss(collate(PROBLEMS, model))
    alone = [loss(collate([p], model)) for p in PROBLEMS]
    lengths = [len(model.tokenizer(p.answer_text, add_special_tokens=False)["input_ids"]) + 1 for p in PROBLEMS]
    mean = sum(float(a["student"]) * n for a, n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert float(together["student"]) == pytest.approx(mean, rel=1e-4)  # padding changes nothing
    assert len({round(float(a["student"]), 3) for a in alone}) == 3  # and the problems do differ


def test_the_step_term_reads_the_teacher_where_it_writes_results(trainable: Callable[..., CodiModel]) -> None:
    """One pass per problem: the state that becomes latent k, and that before the result of step min(k, last)."""
    model = trainable()
    batch = collate(PROBLEMS, model)
    loss = DistillationLoss(model, n_latents=3, direct_fraction=0.0, merged=False, step_weight=0.7)
    got = loss(batch)
    total = got["student"] + 20 * got["distillation"] + got["teacher"] + 0.7 * got["step"]
    assert float(got["total"].detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    terms = []
    with torch.no_grad():
        embed, tok = model.base.get_input_embeddings(), model.tokenizer
        for problem in PROBLEMS:
            ids = tok(problem.question)["input_ids"] + list(model.protocol.before_verbal)
            states = []
            for part in problem.chain.split("=")[:-1]:
                part = problem.chain[: problem.chain.index(part) + len(part) + 1]  # up to and with this "="
                chain = tok(part, add_special_tokens=False)["input_ids"]
                states.append(model.base(input_ids=torch.tensor([ids + chain])).logits[0, -1])
            x = embed(torch.tensor(tok(problem.question)["input_ids"] + list(model.protocol.before_latents)))
            for k in range(1, 4):
                out = model.base(inputs_embeds=x[None], output_hidden_states=True)
                want = states[min(k, len(states)) - 1].softmax(-1)
                terms.append(-(want * out.logits[0, -1].log_softmax(-1)).sum())
                x = torch.cat((x, model.prj(out.hidden_states[-1][0, -1])[None]))
    assert float(got["step"].detach()) == pytest.approx(float(sum(terms)) / len(terms), rel=1e-3)
    assert batch.step_read.ge(0).sum(1).tolist() == [2, 1, 2]
    without = DistillationLoss(model, n_latents=3, direct_fraction=0.0, merged=False)(batch)
    assert "step" not in without  # published CODI has none
    empty = collate([Text("5?", "", "5")], model)
    assert float(loss(empty)["step"].detach()) == 0.0


def guided(model: CodiModel, **options: Any) -> dict[str, float]:
    """Terms of a loss with the step term alone beside the answer."""
    settings = {"n_latents": 3, "direct_fraction": 0.0, "merged": False, "step_weight": 1.0, **options}
    return {
        name: float(value.detach())
        for name, value in DistillationLoss(model, **settings)(collate(PROBLEMS, model)).items()
    }


def test_other_latents_learn_other_steps(trainable: Callable[..., CodiModel]) -> None:
    """An assignment is the mean over its pairs; the shipped one and the later one are two of them."""
    model = trainable()
    single = {pair: guided(model, step_latents=pair)["step"] for pair in ("1:1", "2:1", "2:2", "3:2", "3:3", "4:3")}
    assert len({round(value, 3) for value in single.values()}) == 5  # step 3 of two-step problems is their last
    for text, pairs in (("same", ("1:1", "2:2", "3:3")), ("later", ("2:1", "3:2", "4:3")), ("4:3,2:1", ("2:1", "4:3"))):
        mean = sum(single[pair] for pair in pairs) / len(pairs)
        assert guided(model, step_latents=text)["step"] == pytest.approx(mean, rel=1e-4), text
    assert guided(model)["step"] == guided(model, step_latents="same")["step"]


def test_a_latent_that_is_to_say_nothing(trainable: Callable[..., CodiModel]) -> None:
    """KL(all tokens alike ‖ prediction) at that latent: 0 only where all logits are the same."""
    model = trainable()
    found = guided(model, step_latents="1:1,2:-")
    alone = guided(model, step_latents="2:-")
    assert "step" not in alone and alone["silent"] == pytest.approx(found["silent"], rel=1e-5)
    with torch.no_grad():
        run = model.rollout(model.encode([p.question for p in PROBLEMS]), 1)
        log_p = model.logits(run.states[:, 1]).log_softmax(-1)
    uniform = torch.full_like(log_p, 1 / log_p.shape[-1])
    assert alone["silent"] == pytest.approx(float(F.kl_div(log_p, uniform, reduction="batchmean")), rel=1e-4)
    total = found["student"] + 20 * found["distillation"] + found["teacher"] + found["step"] + found["silent"]
    assert found["total"] == pytest.approx(total, rel=1e-5)
    with torch.no_grad():
        model.base.get_output_embeddings().weight.zero_()
    assert abs(guided(model, step_latents="2:-")["silent"]) < 1e-5


def test_a_teacher_without_weight_has_no_gradient(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    with_teacher = DistillationLoss(model, n_latents=2, merged=False)(collate(PROBLEMS, model))
    without = DistillationLoss(model, n_latents=2, merged=False, teacher_weight=0.0)(collate(PROBLEMS, model))
    assert "teacher" in with_teacher and "teacher" not in without
    assert float(without["distillation"]) == pytest.approx(float(with_teacher["distillation"]), rel=1e-5)


def test_a_decoder_reads_latents(trainable: Callable[..., CodiModel]) -> None:
    """Its loss reaches projection and LoRA through the latents, and is weighted."""
    model = trainable()
    model.prj.requires_grad_(True)
    torch.manual_seed(0)
    decoder = StepDecoder(model, 1)
    loss = DistillationLoss(
        model, n_latents=3, direct_fraction=0.0, merged=False, decoder=decoder, decoder_weight=0.5
    )  # fmt: skip
    batch = collate(PROBLEMS, model, steps=True)
    got = loss(batch)
    total = got["student"] + 20 * got["distillation"] + got["teacher"] + 0.5 * got["decoder"]
    assert float(got["total"].detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    # latent 1 has the first steps of three problems to write, latent 2 the second ones of two; the third has none
    assert batch.step_ids is not None and batch.step_mask is not None
    with torch.no_grad():
        run = model.rollout(model.encode([p.question for p in PROBLEMS]), 3)
        assert run.embeddings is not None
        alone = [
            float(decoder(model, run.embeddings[[row], k], batch.step_ids[[row], k], batch.step_mask[[row], k]))
            for row, k in ((0, 0), (1, 0), (2, 0), (0, 1), (2, 1))
        ]
    assert float(got["decoder"].detach()) == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    weights = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(got["decoder"], list(weights.values()), allow_unused=True)
    reached = {name.split(".")[0] for name, g in zip(weights, gradients, strict=True) if g is not None and g.any()}
    assert reached == {"decoder", "base", "prj"}
    assert not any("decoder" in name for name in reference_state(model))  # no part of a checkpoint
    later = DistillationLoss(model, n_latents=3, merged=False, decoder=decoder, decoder_latents="3:1")(batch)
    third = decoder(model, run.embeddings[:, 2], batch.step_ids[:, 0], batch.step_mask[:, 0])
    assert float(later["decoder"].detach()) == pytest.approx(float(third.detach()), rel=1e-4)


def test_only_lora_and_projection_learn(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    loss = DistillationLoss(model, n_latents=1)
    names = {n for n, p in loss.named_parameters() if p.requires_grad}
    assert names and all(".lora_" in n or n.startswith("prj.") for n in names)
    before = {k: v.clone() for k, v in reference_state(model).items()}
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.1)
    loss(collate(PROBLEMS, model))["total"].backward()
    optimizer.step()
    changed = {k for k, v in reference_state(model).items() if not torch.equal(v, before[k])}
    assert changed and all(".lora_" in k or k.startswith("prj.") for k in changed)


def test_part_of_the_problems_may_teach(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    whole = DistillationLoss(model, n_latents=2, merged=False)(collate(PROBLEMS, model))
    first = DistillationLoss(model, n_latents=2, merged=False, teacher_fraction=0.34)(collate(PROBLEMS, model))
    alone = DistillationLoss(model, n_latents=2, merged=False)(collate(PROBLEMS[:1], model))
    assert float(first["distillation"]) == pytest.approx(float(whole["distillation"]), rel=1e-5)
    assert float(first["teacher"]) == pytest.approx(float(alone["teacher"]), rel=1e-4)
    assert abs(float(first["teacher"]) - float(whole["teacher"])) > 1e-3


def test_teacher_loss_mixes_chains_and_direct_answers(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    want = [manual_losses(model, p, 1) for p in PROBLEMS]
    got = TeacherLoss(model, direct_fraction=1 / 3)(collate(PROBLEMS, model))
    assert float(got["direct"]) == pytest.approx(want[0]["direct"], rel=1e-4)
    assert got["total"].item() == pytest.approx(float(got["teacher"]) * 2 / 3 + float(got["direct"]) / 3, rel=1e-5)


def test_a_trained_model_loads_and_answers_the_same(trainable: Callable[..., CodiModel], tmp_path: Any) -> None:
    model = trainable()
    base = copy.deepcopy(model.base)  # any base will do: the state holds every weight
    folder = save_checkpoint(
        tmp_path / "c", reference_state(model), base, model.tokenizer, model.protocol, 3, 6, n_latents=2
    )
    loaded = load_codi(folder)
    questions = [p.question for p in PROBLEMS]
    assert loaded.answer(questions, n_latents=2) == model.answer(questions, n_latents=2)
    fresh = MergedLora(model.base)
    assert loaded.answer(questions, n_latents=2) == model.answer(questions, n_latents=2)
    fresh.remove()


def test_schedule() -> None:
    factors = [cosine_schedule(s, 100, warmup=0.1, floor=0.1) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert factors[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)), abs=1e-6)


def test_mistakes(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    with pytest.raises(ValueError, match="n_latents must be at least 1"):
        DistillationLoss(model, n_latents=0)
    with pytest.raises(ValueError, match="direct_fraction"):
        TeacherLoss(model, direct_fraction=1.0)

"""`codi lens`: detection counted by hand, chance level, multi-token numbers, and every command on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from codi import CodiModel
from experiments import cli
from experiments.lens.difference import difference_claims, difference_table, latent_means
from experiments.lens.options import TOP, TrainOptions
from experiments.lens.rates import answers, rates
from experiments.lens.reading import detect
from experiments.lens.saved import load_lens
from experiments.lens.train import training_options, value_frequencies
from experiments.statistics.clusters import Settings
from experiments.study.claims import Claim
from experiments.study.spellings import number_spellings, ranks, word_spellings
from experiments.tasks import Problem
from lenses import AblateDirections, LatentLens, LensTraining, causal_basis, mean_ablated
from lenses.causal import energies


def problem(i: int, answer: int = 7, steps: tuple[int, ...] = (3,)) -> Problem:
    return Problem(
        prompt_id=f"p{i}",
        question=f"{i}+{i % 5}=?",
        answer=answer,
        steps=tuple(f"x={v}" for v in (*steps, answer)),
        cluster=f"c{i // 2}",
        numbers=(i, i % 5),
        intermediates=(*steps, answer),
    )


class Digits:
    """A tokenizer that splits numbers into digits; a space is a token of its own (10); words are letters (100 + …)."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [10 if c == " " else int(c) if c.isdigit() else 100 + ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(" " if i == 10 else str(i) if i < 10 else chr(i - 100) for i in ids)


# --- Pieces, by hand --------------------------------------------------------------------------------------------------


def test_spellings_skip_a_space_that_is_a_token() -> None:
    assert number_spellings(Digits(), 42) == [(4, 2)]
    assert number_spellings(Digits(), 7.0) == [(7,)]
    assert len(word_spellings(Digits(), "so")) == 2  # so and So; the leading space adds nothing


def test_rank_is_that_of_the_best_spelling_and_of_its_worst_token() -> None:
    top = torch.tensor([[5, 9, 2, 7]])
    wanted = torch.tensor(
        [
            [
                [[9, -1], [7, -1]],  # one token each: second best
                [[2, 7], [-1, -1]],  # two tokens, both there: fourth
                [[2, 8], [-1, -1]],  # one of them missing: never
                [[-1, -1], [-1, -1]],  # no such value: never
            ]
        ]
    )
    assert ranks(top, wanted).tolist() == [[2, 4, 127, 127]]


def test_frequencies_count_questions() -> None:
    found = value_frequencies([problem(0, 7, (3, 3)), problem(1, 7, (5,)), problem(2, 3, (7,))])
    assert found == {3.0: (1, 1), 5.0: (0, 1), 7.0: (2, 1)}


# --- Detection --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [problem(i, 3 + i % 4, (i % 3,)) for i in range(12)]


def test_detection_is_what_the_lens_says(codi_model: CodiModel, problems: list[Problem]) -> None:
    found = detect(codi_model, [LatentLens.plain(codi_model)], problems, donors=11, batch_size=5)
    assert found.targets == ("step1", "answer", "question")
    assert found.rank.shape == (1, 12, 7, 4, 3)
    run = codi_model.rollout(codi_model.encode([problems[4].question]), 6)
    plain = LatentLens.plain(codi_model)
    for layer in (1, 3):
        top = plain.logits(run.hidden_states[:, 2, layer], layer, 3)[0].topk(10).indices.tolist()
        token = codi_model.tokenizer(str(problems[4].answer), add_special_tokens=False)["input_ids"][0]
        expected = top.index(token) + 1 if token in top else 127
        assert found.rank[0, 4, 3, layer, 1] == expected
    # at the last layer the lens is the model: no divergence, and the entropy of its own distribution
    assert found.divergence[..., -1].max() < 1e-5 < found.divergence[..., 1].min()
    log_p = codi_model.logits(run.states[0, 3]).log_softmax(-1)
    assert found.entropy[0, 4, 3, 3] == pytest.approx(float(-(log_p.exp() * log_p).sum()), rel=1e-4)
    table = rates(found, Settings(resamples=100))
    by_k = table[(table["answered"] == "all")].pivot_table(
        index=["latent", "layer", "target"], columns="k", values="rate"
    )
    assert (np.diff(by_k.to_numpy(), axis=1) >= 0).all()  # more tokens, never fewer finds


def test_a_planted_value_is_found_and_chance_is_not(codi_model: CodiModel, problems: list[Problem]) -> None:
    """A lens that always says one digit: detection of the answer is the share of prompts with that answer, and so is
    the chance level, so nothing is detected beyond chance."""

    class Says(LatentLens):
        def logits(self, hidden: torch.Tensor, layer: int, position: int) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:-1], codi_model.vocab_size)
            logits[..., codi_model.tokenizer("5", add_special_tokens=False)["input_ids"][0]] = 9.0
            return logits

    plain = LatentLens.plain(codi_model)
    found = detect(codi_model, [Says(plain.unembed, codi_model.n_layers)], problems, donors=11)
    table = rates(found, Settings(resamples=200))
    row = table[(table["target"] == "answer") & (table["k"] == 1) & (table["answered"] == "all")].iloc[0]
    assert row["rate"] == pytest.approx(3 / 12)  # three of the twelve answers are 5
    # a prompt with another answer has 11 donors, of which those with its own answer or step as value are left out
    by_hand = []
    for p in problems:
        own = {p.answer, *p.intermediates}
        donors = [q for q in problems if q is not p and q.answer not in own]
        by_hand.append(np.mean([q.answer == 5 for q in donors]))
    assert row["chance"] == pytest.approx(float(np.mean(by_hand)), abs=1e-6)
    assert row["lift_lower"] <= row["rate"] - row["chance"] <= row["lift_upper"]


def test_numbers_of_several_tokens_are_not_dropped(codi_model: CodiModel) -> None:
    """One token per byte: 42 is two tokens. Rule "first" is met by its first digit, rule "all" needs both."""
    several = [problem(i, 42 + i, (3,)) for i in range(4)]
    plain = LatentLens.plain(codi_model)
    first = detect(codi_model, [plain], several, rule="first")
    both = detect(codi_model, [plain], several, rule="all")
    answer = first.targets.index("answer")
    assert first.multi_token[:, answer].all() and not first.multi_token[:, first.targets.index("step1")].any()
    assert (first.rank[..., answer] <= both.rank[..., answer]).all()
    assert (first.rank[..., answer] < both.rank[..., answer]).any()
    step = first.targets.index("step1")
    assert np.array_equal(first.rank[..., step], both.rank[..., step])


def test_answers_stand_beside_their_training_frequency(codi_model: CodiModel, problems: list[Problem]) -> None:
    found = detect(codi_model, [LatentLens.plain(codi_model)], problems)
    table = answers(found, {5.0: (9, 2)})
    assert table["value"].tolist() == [3.0, 4.0, 5.0, 6.0] and table["n"].tolist() == [3, 3, 3, 3]
    row = table[table["value"] == 5].iloc[0]
    assert (row["trained_answers"], row["trained_steps"]) == (9, 2)
    foreign = [i for i, p in enumerate(problems) if 5 not in (*p.intermediates, p.answer)]
    assert row["n_not"] == len(foreign)
    with pytest.raises(ValueError, match="at least 2 problems"):
        detect(codi_model, [LatentLens.plain(codi_model)], problems[:1])


# --- Difference and causes --------------------------------------------------------------------------------------------


def test_difference_means_are_those_of_the_whole_set(codi_model: CodiModel, problems: list[Problem]) -> None:
    means = latent_means(codi_model, problems, batch_size=5)
    run = codi_model.rollout(codi_model.encode([p.question for p in problems]), 6)
    torch.testing.assert_close(means.mean, run.hidden_states.double().mean(0), atol=5e-4, rtol=1e-3)
    assert (means.n, means.n_clusters) == (12, 6)
    table = difference_table(codi_model, [LatentLens.plain(codi_model)], means, k=3)
    assert len(table) == 30 * 4 * 3
    row = table[(table["source"] == 2) & (table["target"] == 5) & (table["layer"] == 1) & (table["rank"] == 1)].iloc[0]
    logits = LatentLens.plain(codi_model).unembed((means.mean[1, 1] - means.mean[4, 1]).float())
    assert row["token_id"] == int(logits.argmax()) and row["probability"] == pytest.approx(
        float(logits.softmax(-1).max())
    )


def test_causal_basis_finds_what_the_lens_reads(codi_model: CodiModel) -> None:
    """States that vary in one direction only: ablating what is orthogonal to it does nothing, and the basis does at
    least as much as that direction or any random one."""
    plain = LatentLens.plain(codi_model)
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(codi_model.d_model, generator=generator), dim=0)
    offset = torch.randn(codi_model.d_model, generator=generator)
    x = offset + 2 * torch.randn(40, 1, generator=generator) * planted
    random = torch.nn.functional.normalize(torch.randn(20, codi_model.d_model, generator=generator), dim=1)
    orthogonal = torch.nn.functional.normalize(random[0] - (random[0] @ planted) * planted, dim=0)
    of_planted, of_orthogonal = energies(plain, x, 1, 1, torch.stack([planted, orthogonal])).tolist()
    assert of_orthogonal < 1e-6 < of_planted
    basis = causal_basis(plain, x, 1, 1, 3)
    assert basis.energies[0] >= of_planted > energies(plain, x, 1, 1, random).max()
    assert abs(float(basis.directions[0] @ planted)) > 0.7
    torch.testing.assert_close(basis.directions @ basis.directions.T, torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(energies(plain, x, 1, 1, basis.directions), basis.energies, atol=1e-5, rtol=1e-3)
    assert (basis.energies.diff() <= 0).all()
    flat = mean_ablated(x, planted, x.mean(0))
    assert float(((flat - x.mean(0)) @ planted).abs().max()) < 1e-4
    with pytest.raises(ValueError, match="at least 2 states"):
        causal_basis(plain, x[:1], 1, 1, 1)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_ablation_in_the_model_acts_where_it_should(codi_model: CodiModel, questions: list[str], layer: int) -> None:
    batch = codi_model.encode(questions)
    base = codi_model.rollout(batch, 3)
    x = base.embeddings[:, 1] if layer == 0 else base.hidden_states[:, 1, layer]
    direction = torch.nn.functional.normalize(torch.randn(len(questions), codi_model.d_model), dim=1)
    run = codi_model.rollout(batch, 3, [AblateDirections(2, layer, direction, x.mean(0))])
    after = run.embeddings[:, 1] if layer == 0 else run.hidden_states[:, 1, layer]
    expected = torch.stack([mean_ablated(row, v, x.mean(0)) for row, v in zip(x, direction, strict=True)])
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(run.states[:, :2], base.states[:, :2])  # what came before is as it was
    assert not torch.equal(run.states[:, 2], base.states[:, 2])


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lens")


@pytest.fixture(scope="module")
def options(tiny_checkpoint: Callable[..., Path], workplace: Path) -> list[str]:
    folder = tiny_checkpoint()
    return [
        "--model",
        str(folder / "checkpoint"),
        "--base",
        str(folder / "base"),
        "--lora-alpha",
        "2",
        "--protocol",
        "answer-only",
        "--device",
        "cpu",
    ]


def codi(command: str, *arguments: str) -> None:
    cli.main(["lens", command, *arguments])


@pytest.fixture(scope="module")
def trained(workplace: Path, options: list[str]) -> Path:
    out = workplace / "lens"
    codi(
        "train",
        *options,
        "--out",
        str(out),
        "--steps",
        "4",
        "--evaluate-every",
        "2",
        "--prompts",
        "16",
        "--validation",
        "8",
        "--test",
        "8",
        "--batch-size",
        "8",
        "--lr",
        "5e-3",
        "--resamples",
        "100",
        "--lenses",
        "each",
        "all",
        "text",
        "published 3",
    )
    return out


def test_train_writes_lenses_tables_and_figure(
    trained: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in (trained / "lenses").iterdir()}
    assert names == {"0", "1", "2", "3", "4", "5", "6", "all", "text", "published-3"}
    record = json.loads((trained / "lenses" / "published-3" / "positions.json").read_text())
    assert record["positions"] == [4]
    table = pd.read_csv(trained / "held_out.csv")
    assert len(table) == (7 + 6 + 1 + 1) * 3  # positions × layers below the last
    mean = table.groupby("lens")[["divergence", "plain"]].mean()
    assert (mean["divergence"] < mean["plain"]).all()
    assert (table["lower"] <= table["divergence"]).all() and (table["divergence"] <= table["upper"]).all()
    assert (trained / "figures" / "held_out.png").stat().st_size > 10_000
    assert json.loads((trained / "manifest.json").read_text())["finished"] and not (trained / "state.pt").exists()


def test_finished_folder_is_kept_and_another_run_refused(
    trained: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "lenses" / "all" / "params.pt").stat().st_mtime_ns
    same = [
        *options,
        "--out",
        str(trained),
        "--steps",
        "4",
        "--evaluate-every",
        "2",
        "--prompts",
        "16",
        "--validation",
        "8",
        "--test",
        "8",
        "--batch-size",
        "8",
        "--lr",
        "5e-3",
        "--resamples",
        "100",
        "--lenses",
        "each",
        "all",
        "text",
        "published 3",
    ]
    codi("train", *same)
    assert "finished" in capsys.readouterr().out
    assert (trained / "lenses" / "all" / "params.pt").stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as stop:
        codi("train", *same, "--seed", "1")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "holds a run with other options" in error and "seed: 0 -> 1" in error


def test_show_any_text(trained: Path, options: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workplace / "show"
    codi("show", *options, "--lens", str(trained), "--text", "It costs $3 and $4.", "--out", str(out))
    table = pd.read_csv(out / "readings.csv", keep_default_na=False)
    assert len(table) == 2 * 7 * 4 * 5
    last = table[table["layer"] == 3].pivot_table(index=["latent", "rank"], columns="lens", values="probability")
    assert np.allclose(last["plain"], last["each"])  # at the last layer both are the model
    assert "answer:" in capsys.readouterr().out
    assert (out / "figures" / "heatmap.png").stat().st_size > 10_000


def test_detect(trained: Path, options: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workplace / "detect"
    codi(
        "detect",
        *options,
        "--lens",
        str(trained),
        "--limit",
        "12",
        "--donors",
        "5",
        "--resamples",
        "100",
        "--read",
        "plain",
        "each",
        "--out",
        str(out),
    )
    table = pd.read_csv(out / "rates.csv")
    assert set(table["k"]) == set(range(1, 11)) and set(table["target"]) == {
        "step1",
        "step2",
        "steps",
        "answer",
        "question",
    }
    assert ((table["lower"] <= table["rate"] + 1e-12) & (table["rate"] <= table["upper"] + 1e-12)).all()
    words = pd.read_csv(out / "words.csv")
    assert set(words["word"]) == {"therefore", "however", "because"} and (words["single_token_spellings"] == 0).all()
    trained_values = pd.read_csv(trained / "training_values.csv").set_index("value")
    for row in pd.read_csv(out / "answers.csv").itertuples():
        known = row.value in trained_values.index
        assert row.trained_answers == (trained_values.loc[row.value].iloc[0] if known else 0)
    assert len(pd.read_parquet(out / "readings.parquet")) == 2 * 12 * 7 * 4 * 5
    for name in ("detection", "entropy", "curves-answer", "number-tokens"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "12 prompts in" in said and "“therefore”" in said


def test_difference(trained: Path, options: list[str], workplace: Path) -> None:
    out = workplace / "difference"
    codi("difference", *options, "--lens", str(trained), "--limit", "20", "--out", str(out))
    table = pd.read_csv(out / "difference.csv", keep_default_na=False)
    assert len(table) == 2 * 30 * 4 * TOP
    assert len(list((out / "figures").glob("difference-layer-*.png"))) == 4


def test_transfer(trained: Path, options: list[str], workplace: Path) -> None:
    out = workplace / "transfer"
    codi("transfer", *options, "--lens", str(trained), "--limit", "10", "--resamples", "100", "--out", str(out))
    table = pd.read_csv(out / "transfer.csv")
    assert set(table["position"]) == {-1, 0, 1, 2, 3, 4, 5, 6}
    plain = table[table["lens"] == "plain"]
    assert np.allclose(plain["change"], 0) and np.allclose(plain["divergence"], plain["plain"])
    layers = table[(table["lens"] == "all") & (table["position"] == 2)].set_index("layer")["divergence"]
    assert layers[-1] == pytest.approx(layers.drop(-1).mean())


def test_causal(trained: Path, options: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workplace / "causal"
    codi(
        "causal",
        *options,
        "--lens",
        str(trained),
        "--limit",
        "6",
        "--derivation",
        "12",
        "--directions",
        "2",
        "--latents",
        "1",
        "6",
        "--layers",
        "0",
        "2",
        "--resamples",
        "100",
        "--out",
        str(out),
    )
    effects = pd.read_parquet(out / "effects.parquet")
    assert len(effects) == 2 * 2 * 4 * 2 * 6 and (effects[["output", "answer", "energy"]] >= 0).all().all()
    summary = pd.read_csv(out / "summary.csv").set_index(["measure", "kind"])
    mean = effects[effects["kind"] == "lens"]["output"].mean()
    assert summary.loc[("output", "lens"), "mean"] == pytest.approx(mean)
    assert "lens − random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--lens", "/nowhere"], "there are no lenses at /nowhere: run codi lens train"),
        (["train", "--lenses", "third"], "a lens is named each, all, odd"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--text", "/nowhere.txt"], "there is no text file /nowhere.txt"),
        (["detect", "--read", "plain", "--k", "11"], "k must be in 1..10, got 11"),
        (["detect", "--limit", "1"], "limit must be at least 2, got 1"),
        (["show", "--read", "plain", "--text", " "], "text must hold at least one word"),
        (["difference", "--read", "plain", "--figure-layers", "9"], "figure-layers must be in 0..3, got 9"),
        (["causal", "--read", "plain", "each", "--lens", "/"], "causal takes one lens"),
        (["lens"], "unknown command 'lens'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    options: list[str],
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace)
    with pytest.raises(SystemExit) as stop:
        codi(arguments[0], *(options if arguments[0] != "lens" else []), *arguments[1:])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert message in said[-1] and sum("error" in line for line in said) == 1


def test_lens_trained_elsewhere_is_not_read_here(trained: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    from codi import load_codi

    other = tiny_checkpoint("gpt2")
    model = load_codi(other / "checkpoint", base=other / "base", protocol="answer-only", lora_alpha=2)
    with pytest.raises(ValueError, match="is a lens for d_model 32 and 3 layers"):
        load_lens(["each"], trained, model)


def test_interrupted_training_goes_on_where_it_was(
    options: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [
        "--steps",
        "6",
        "--evaluate-every",
        "2",
        "--prompts",
        "20",
        "--validation",
        "8",
        "--test",
        "8",
        "--batch-size",
        "8",
        "--resamples",
        "100",
        "--lenses",
        "2",
        "text",
    ]
    codi("train", *options, *shared, "--out", str(workplace / "straight"))
    save = LensTraining.save

    def killed(training: LensTraining, path: Path) -> None:
        save(training, path)
        if training.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(LensTraining, "save", killed)
        codi("train", *options, *shared, "--out", str(workplace / "resumed"))
    assert stop.value.code == 130 and (workplace / "resumed" / "state.pt").exists()
    codi("train", *options, *shared, "--out", str(workplace / "resumed"))
    assert "continuing at step 4" in capsys.readouterr().out
    for name in ("held_out.csv", "history.csv", "training_values.csv"):
        assert (workplace / "straight" / name).read_bytes() == (workplace / "resumed" / name).read_bytes()


def test_legacy_is_the_published_recipe() -> None:
    options = training_options(TrainOptions(legacy=True))
    assert options.target == "published" and not options.early_stopping and options.rate(0) == options.rate(299) == 1e-3
    assert options.weight_decay == 0 and options.clip == float("inf")
    default = training_options(TrainOptions())
    assert default.target == "output" and default.early_stopping and default.rate(299) < 1e-5


def test_parity_pattern_is_found_where_it_was_planted() -> None:
    """Cells whose tokens depend on the parities of A and B; cells whose tokens depend on nothing; too few latents."""
    rng = np.random.default_rng(0)

    def claim(n: int, planted: bool) -> Claim:
        rows = []
        for a in range(1, n + 1):
            for b in range(1, n + 1):
                tokens = 10 * (2 * (a % 2) + b % 2) + np.arange(10) if planted else rng.choice(200, 10, replace=False)
                rows += [("plain", a, b, 0, int(token)) for token in tokens if a != b]
        table = pd.DataFrame(rows, columns=["lens", "source", "target", "layer", "token_id"])
        return difference_claims(table, 50, 10)["S6, lens plain"]

    assert claim(8, True).verdict == "not held" and claim(8, True).estimate == pytest.approx(1.0)
    assert claim(8, False).verdict == "undecided"  # not found is not excluded
    assert claim(6, True).verdict == "not testable" and "p = 0.100" in claim(6, True).note  # 20 relabellings, in pairs

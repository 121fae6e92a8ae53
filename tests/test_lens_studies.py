"""Lens commands as data: identities of today's runs, typed tables that say everything, parts that are computed once,
refusals before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from codi import CodiModel, load_codi
from experiments import cli
from experiments.lens import causal, detect, difference, show, train, transfer
from experiments.lens.detection import Detection
from experiments.lens.options import (
    CausalOptions,
    DetectOptions,
    DifferenceOptions,
    ReadOptions,
    ShowOptions,
    TrainOptions,
    TransferOptions,
)
from experiments.lens.reading import detect as read
from experiments.lens.saved import lens_hash, lens_identity, reading_identity
from experiments.statistics.clusters import Settings
from experiments.study.manifest import fingerprint
from experiments.study.options import ModelOptions, command_line, identity_of
from experiments.study.parts import Part, Workbench, run_here
from experiments.study.result import Result
from experiments.study.run import run_study
from experiments.tasks import Problem
from experiments.tasks.split import Split
from lenses import LatentLens, new_lens, save_lens, unembed
from lenses.latent_lens import TEXT

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"
EVERY = (TrainOptions, ShowOptions, DetectOptions, DifferenceOptions, TransferOptions, CausalOptions)
today: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "manifests_lens.json").read_text(encoding="utf-8"))


# --- Identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY, ids=lambda one: one.COMMAND)
def test_identity_is_that_of_todays_manifest(options: Any) -> None:
    there, here = today[options.COMMAND], options()
    assert json.loads(json.dumps(identity_of(here))) == there["identity"]["options"]
    model = load_codi(TINY)
    more = {"lens": there["identity"]["lens"]} if options is not TrainOptions else {}
    if options is CausalOptions:
        more["split"] = here.load_split(here.seed, model.protocol.question_suffix).record()
    assert fingerprint(lens_identity(here, model, **more)) == there["fingerprint"]


@pytest.mark.parametrize("options", EVERY, ids=lambda one: one.COMMAND)
def test_every_lens_command_takes_what_every_command_takes(options: Any) -> None:
    given = ["--rope", "published", "--lora-alpha", "3", "--mask", "published", "--reach", "70"]
    found = cli.parse(options, given, "codi")
    assert (found.rope, found.lora_alpha, found.mask, found.reach) == ("published", 3.0, "published", 70)
    assert identity_of(found) != identity_of(options()) and identity_of(found)["reach"] == 70
    assert command_line(found).startswith(f"codi {options.COMMAND} --lora-alpha 3.0 --mask published --rope published")
    assert identity_of(options(batch_size=3))["batch_size"] == 3
    if options is not ShowOptions:  # tables of a finished run are of one level
        assert "level" not in identity_of(options()) and identity_of(options(level=0.9))["level"] == 0.9


def test_the_published_recipe_is_the_identity_of_a_legacy_run(tmp_path: Path) -> None:
    options = TrainOptions(legacy=True, out=tmp_path)
    identity = identity_of(options.resolved())
    assert (identity["prompts"], identity["batch_size"], identity["steps"]) == (500, 1, 1500)
    manifest = {"identity": {"command": "lens train", "options": identity}, "fingerprint": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    options.check_inputs()
    with pytest.raises(ValueError, match=r"options\.seed: 0 -> 1"):
        TrainOptions(legacy=True, out=tmp_path, seed=1).check_inputs()


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["causal", "--read", "plain", "--latents", "40"], "latents must be in 1..6, got 40"),
        (["causal", "--read", "plain", "--latents", "0"], "latents must be in 1..6, got 0"),
        (["causal", "--read", "plain", "--layers", "-1"], "layers must be 0 or more, got -1"),
        (["causal", "--read", "plain", "--latents", "2", "2"], "latents names one twice: 2, 2"),
        (["causal", "--read", "plain", "--split", "foo"], "split must be test, got 'foo'"),
        (
            ["detect", "--read", "plain", "--split", "foo"],
            "must be one of test, derivation, all for the task 'templates'",
        ),
        (
            ["difference", "--read", "plain", "--split", "foo"],
            "must be one of test, derivation, all for the task 'templates'",
        ),
        (["train", "--split", "foo"], "split is for a folder or data set, task 'arithmetic' has its own: got 'foo'"),
        (["train", "--lenses", "third"], "a lens is named each, all, odd"),
        (["train", "--lenses", "9"], "9 is not in 0..6"),
        (["train", "--lr", "0"], "lr must be above 0, got 0.0"),
        (["detect", "--read", "plain", "Plain"], "read names a lens twice: plain, Plain"),
        (["detect", "--read", "plain", "--words", "so", "so"], "words names a family twice: so, so"),
        (["show", "--read", "plain", "--text", "1+1", "--task", "arithmetic"], "--text goes without --task"),
        (["show", "--read", "plain", "--top", "0"], "top must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: ModelOptions, attention: str = "sdpa") -> CodiModel:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ModelOptions, "load", never)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["lens", arguments[0], "--model", str(TINY), *arguments[1:]])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and says in error[0]


def test_a_folder_that_lacks_lenses_is_named() -> None:
    with pytest.raises(ValueError, match="there are no lenses at /nowhere: run codi lens train, or give --read plain"):
        DetectOptions(lens=Path("/nowhere")).check_inputs()
    DetectOptions(lens=Path("/nowhere"), read=("plain",)).check_inputs()


# --- Studies on a tiny model ------------------------------------------------------------------------------------------


def problem(i: int) -> Problem:
    steps = (i % 3, 4 + i % 2, 3 + i % 4) if i % 3 else (3 + i % 4,)
    return Problem(
        prompt_id=f"p{i}",
        question=f"{i}+{i % 5}=?",
        answer=3 + i % 4,
        steps=tuple(f"x={v}" for v in steps),
        cluster=f"c{i // 2}",
        numbers=(i, i % 5),
        intermediates=steps,
    )


PROMPTS = Split(tuple(problem(i) for i in range(20, 32)), tuple(problem(i) for i in range(12)))


@pytest.fixture(scope="module")
def folder(codi_model: CodiModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lenses that translate a little."""
    out, shared = tmp_path_factory.mktemp("lenses"), unembed(codi_model)
    for number, (name, positions) in enumerate({"2": (2,), "5": (5,), "all": (1, 2, 3, 4, 5, 6)}.items()):
        lens = new_lens(codi_model, shared)
        for layer in lens:
            torch.nn.init.normal_(layer.weight, std=0.05, generator=torch.Generator().manual_seed(number))
        save_lens(lens, out / "lenses" / name, name, positions)
    return out


def made(options: Any, study: Any, model: CodiModel, **more: Any) -> Result:
    return run_study(study, options, model, PROMPTS, **more)


def test_typed_tables_say_everything_that_was_read(codi_model: CodiModel) -> None:
    found = read(codi_model, [LatentLens.plain(codi_model)], PROMPTS.evaluation, donors=3, words=("so", "if"))
    assert found.targets == ("step1", "step2", "steps", "answer", "question") and (found.rank == 0).any()
    tables = {
        "readings": found.readings(),
        "states": found.states(),
        "words": found.word_readings(),
        "values": found.value_readings(),
    }
    assert set(tables["readings"]["rank"]) <= set(range(-1, 11)) and (tables["readings"]["rank"] == -1).any()
    again = Detection.from_tables(tables)
    for name, value in vars(found).items():
        other = getattr(again, name)
        if isinstance(value, np.ndarray) and value.dtype != object:
            np.testing.assert_array_equal(other, value, err_msg=name)
        else:
            assert list(other) == list(value), name


def test_detection_as_a_study(codi_model: CodiModel, folder: Path, tmp_path: Path) -> None:
    options = DetectOptions(
        out=tmp_path / "run", lens=folder, read=("plain", "all"), donors=3, resamples=100, words=("so",), k=3
    )
    computed: list[str] = []

    def counting(parts: Any, bench: Workbench) -> Any:
        for part, rows in run_here(parts, bench):
            computed.append(part.name)
            yield part, rows

    result = made(options, detect.STUDY, codi_model, executor=counting)
    assert computed == ["readings", "states", "values", "words"]
    assert set(result.tables) == {"rates", "entropy", "words", "answers"}
    kept = Result.read(options.out)
    assert kept.study == "lens detect" and kept.sections == result.sections and kept.sections[0].form == "plain"
    assert {one.name for one in kept.figures} == {
        "detection", "curves-step1", "curves-step2", "curves-answer", "entropy", "number-tokens",
    }  # fmt: skip
    assert all(one.caption for one in kept.figures) and len(kept.claims or ()) == 2
    assert all(claim.family == 2 and "Bonferroni" in claim.corrected for claim in kept.claims or ())
    whole = pd.read_parquet(options.out / "readings.parquet")
    assert whole["rank"].between(0, 10).all() and "several_tokens" not in whole
    # other words have no part yet; the same run is only counted again
    made(options, detect.STUDY, codi_model, executor=counting)
    assert computed == ["readings", "states", "values", "words"]
    with pytest.raises(ValueError, match=r"options\.k: 3 -> 4"):
        made(DetectOptions(out=options.out, lens=folder, read=("plain", "all"), donors=3, resamples=100,
                           words=("so",), k=4), detect.STUDY, codi_model)  # fmt: skip
    bare = DetectOptions(out=tmp_path / "bare", read=("plain",), words=(), resamples=100)
    assert "words" not in made(bare, detect.STUDY, codi_model).tables


def test_intervals_of_another_level_are_called_what_they_are(codi_model: CodiModel, tmp_path: Path) -> None:
    narrow = DetectOptions(out=tmp_path / "a", read=("plain",), words=(), resamples=100, level=0.5)
    found = made(narrow, detect.STUDY, codi_model)
    wide = made(DetectOptions(out=tmp_path / "b", read=("plain",), words=(), resamples=100), detect.STUDY, codi_model)
    assert "[50 % over clusters]" in found.text and "[95 % over clusters]" in wide.text
    a, b = (one.tables["rates"]["upper"] - one.tables["rates"]["lower"] for one in (found, wide))
    assert a.mean() < b.mean()


def test_an_interrupted_ablation_goes_on_with_the_same_draws(
    codi_model: CodiModel, folder: Path, tmp_path: Path
) -> None:
    chosen = {"lens": folder, "read": ("all",), "latents": (2, 5), "layers": (0, 2), "directions": 2, "resamples": 100}
    straight = made(CausalOptions(out=tmp_path / "a", **chosen), causal.STUDY, codi_model)

    def killed(parts: Any, bench: Workbench) -> Any:
        for part, rows in run_here(parts, bench):
            yield part, rows
            raise KeyboardInterrupt

    options = CausalOptions(out=tmp_path / "b", **chosen)
    with pytest.raises(KeyboardInterrupt):
        made(options, causal.STUDY, codi_model, executor=killed)
    assert [path.name for path in (tmp_path / "b" / "trials").iterdir()] == ["part-effects-2.parquet"]
    done: list[str] = []

    def rest(parts: list[Part], bench: Workbench) -> Any:
        done.extend(part.name for part in parts)
        return run_here(parts, bench)

    resumed = made(options, causal.STUDY, codi_model, executor=rest)
    assert done == ["effects-5"] and resumed.text.replace("/b;", "/a;") == straight.text
    for name in ("directions.csv", "summary.csv", "effects.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # latent 5 alone has draws of its own: those of the first cell
    alone = made(CausalOptions(out=tmp_path / "c", **{**chosen, "latents": (5,)}), causal.STUDY, codi_model)
    kinds = {}
    for name, result in (("both", straight), ("alone", alone)):
        table = result.tables["directions"]
        kinds[name] = table[table["latent"] == 5].set_index(["layer", "kind", "direction"])["moved"]
    assert np.allclose(kinds["both"].xs("lens", level="kind"), kinds["alone"].xs("lens", level="kind"))
    assert not np.allclose(kinds["both"].xs("random", level="kind"), kinds["alone"].xs("random", level="kind"))


def test_what_never_happens_has_bounds_where_the_scale_has() -> None:
    """No first token changes: a share is at most 1, so its interval is exact; nats have no end."""
    kinds = ("lens", "random", "covariance", "component")
    trials = pd.DataFrame([
        {"kind": kind, "prompt_id": f"p{i}", "cluster": f"c{i}", "output": 0.1 * i, "answer": 0.0, "flipped": False,
         "moved": 1.0} for kind in kinds for i in range(20)
    ])  # fmt: skip
    table = causal.summary_of(trials, Settings(resamples=200)).set_index(["measure", "kind"])
    most = 1 - 0.025 ** (1 / 20)
    assert table.loc[("flipped", "random"), "upper"] == pytest.approx(most)
    gap = table.loc[("flipped", "random"), ["lens_minus_lower", "lens_minus_upper"]]
    assert -1 < gap.iloc[0] < 0 < gap.iloc[1] < 1
    assert table.loc[("answer", "random"), "upper"] == np.inf
    assert table.loc[("flipped", "lens"), ["lens_minus_lower", "lens_minus_upper"]].isna().all()


def test_a_lens_that_does_not_read_a_latent_is_refused(codi_model: CodiModel, folder: Path, tmp_path: Path) -> None:
    options = CausalOptions(out=tmp_path / "run", lens=folder, read=("each",))
    with pytest.raises(ValueError, match="lens 'each' does not read latent 1: choose --latents or train it"):
        made(options, causal.STUDY, codi_model)
    with pytest.raises(ValueError, match=r"layers must be in 0..2 \(at the last one every lens is exact\), got 7"):
        made(CausalOptions(out=tmp_path / "run", read=("plain",), layers=(7,)), causal.STUDY, codi_model)
    assert not (tmp_path / "run").exists()


def test_transfer_and_difference_as_studies(codi_model: CodiModel, folder: Path, tmp_path: Path) -> None:
    options = TransferOptions(out=tmp_path / "transfer", lens=folder, resamples=100)
    found = made(options, transfer.STUDY, codi_model)
    rows = pd.read_parquet(tmp_path / "transfer" / "trials" / "part-transfer.parquet")
    assert len(rows) == 4 * 12 * 8 * 3 and rows["divergence"].notna().all()
    table = found.tables["transfer"].set_index(["lens", "position", "layer"])["divergence"]
    mine = rows[(rows["lens"] == "all") & (rows["position"] == 3) & (rows["layer"] == 1)]
    assert table[("all", 3, 1)] == pytest.approx(mine["divergence"].mean(), rel=1e-6)
    assert [claim.name for claim in found.claims or ()] == ["S2, lens all"]
    # worse than the plain lens, better, and neither: each verdict can come out, and two lenses widen the interval
    kept = rows.assign(lens=rows["lens"].replace({"each": "odd"}))
    text, own = kept["position"] == TEXT, kept["lens"] == "all"
    noise = np.random.default_rng(0).normal(size=len(kept))
    spans = {}
    for shift, verdict in ((5.0, "held"), (-5.0, "not held"), (0.0, "undecided")):
        plain = kept.loc[text & (kept["lens"] == "plain")].set_index(["prompt_id", "layer"])["divergence"]
        at = pd.MultiIndex.from_frame(kept.loc[text & own, ["prompt_id", "layer"]])
        moved = kept.astype({"divergence": float})
        moved.loc[text & own, "divergence"] = plain.reindex(at).to_numpy() + shift + noise[: len(at)]
        (claim,) = transfer.transfer_claims(moved, {"all": (1, 2)}, Settings(resamples=300))
        assert claim.verdict == verdict and claim.family == 1
        both = transfer.transfer_claims(moved, {"all": (1, 2), "odd": (1, 3)}, Settings(resamples=300))
        spans[verdict] = both["S2, lens all"].upper - both["S2, lens all"].lower, claim.upper - claim.lower
    assert all(two > one for two, one in spans.values())
    with pytest.raises(ValueError, match="transfer needs a trained lens; plain is always beside it"):
        made(TransferOptions(out=tmp_path / "x", lens=folder, read=("plain",)), transfer.STUDY, codi_model)
    options = DifferenceOptions(out=tmp_path / "difference", lens=folder, read=("plain", "each"), figure_layers=(1,))
    found = made(options, difference.STUDY, codi_model)
    names = sorted(path.name for path in (tmp_path / "difference" / "trials").iterdir())
    assert names == ["part-difference-each.parquet", "part-difference-plain.parquet"]
    table = found.tables["difference"]
    assert set(table.loc[table["lens"] == "each", "source"]) == {2, 5}
    assert [one.files[0] for one in found.figures] == ["figures/difference-layer-1.png"]


def test_a_lens_that_was_trained_anew_is_another_run(codi_model: CodiModel, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lenses"
    shutil.copytree(folder, copy)
    options = DetectOptions(out=tmp_path / "run", lens=copy, read=("all",))
    before = reading_identity(options, codi_model, PROMPTS)
    assert before["lens"] == lens_hash(copy) == lens_hash(folder)
    assert reading_identity(DetectOptions(read=("plain",), lens=copy), codi_model, PROMPTS)["lens"] == ""
    save_lens(new_lens(codi_model, unembed(codi_model)), copy / "lenses" / "all", "all", (1,))
    assert reading_identity(options, codi_model, PROMPTS)["lens"] != before["lens"]


def test_show_takes_a_problem_of_a_task(codi_model: CodiModel, tmp_path: Path) -> None:
    options = ShowOptions(out=tmp_path / "a", read=("plain",), task="arithmetic", reach=100, limit=3)
    found = show.run(options, codi_model)
    asked = json.loads((tmp_path / "a" / "prompt.json").read_text())["question"]
    assert asked.startswith(options.load_problems(0).evaluation[0].question) and found.text.count(asked) == 1
    assert Result.read(tmp_path / "a").tables["readings"]["probability"].between(0, 1).all()
    assert sorted(path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith(".")) == [
        "figures", "manifest.json", "prompt.json", "readings.csv", "result.json", "summary.md",
    ]  # fmt: skip


def test_show_without_a_folder_makes_one_per_prompt(
    codi_model: CodiModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = (show.run(ShowOptions(read=("plain",), text=text), codi_model).path for text in ("1+1=?", "1+2=?"))
    assert a != b and a.parent == b.parent == Path("runs") and a.name.startswith("lens-show-")


def test_a_finished_training_of_before_gets_its_result(codi_model: CodiModel, tmp_path: Path) -> None:
    options = TrainOptions(
        out=tmp_path / "run", lenses=("2", "text"), steps=2, evaluate_every=1, prompts=8, validation=4, test=6,
        batch_size=4, resamples=100,
    )  # fmt: skip
    told: list[str] = []
    first = train.run(options, codi_model, tell=told.append)
    assert told == [] and first.study == "lens train" and first.sections[0].text.startswith("2 steps of 4 questions;")
    assert not (options.out / "trials").exists() and first.figures[0].files[0] == "figures/held_out.png"
    before = {path: path.read_bytes() for path in options.out.rglob("*.*") if path.suffix in (".csv", ".pt", ".pdf")}
    for name in ("result.json", "summary.md"):
        (options.out / name).unlink()
    again = train.run(options, codi_model, tell=told.append)
    assert told == [f"{options.out} holds this run, finished"] and again.text == first.text
    assert {path: path.read_bytes() for path in before} == before
    assert train.run(options, codi_model).text == first.text  # and from its result.json


def test_prompts_of_training_keep_their_bounds() -> None:
    options = TrainOptions(prompts=20, validation=5, test=5, reach=120, max_steps=3)
    parts = train.training_split(options, " Think.")
    assert [len(part) for part in parts] == [20, 5, 5]
    for one in (one for part in parts for one in part):
        assert max(one.answer, *one.intermediates) >= 120 and len(one.steps) <= 3 and one.question.endswith(" Think.")
    assert not {one.cluster for one in parts[0]} & {one.cluster for part in parts[1:] for one in part}


def test_bars_are_for_those_who_watch(
    codi_model: CodiModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quiet(line: str) -> None:
        pass

    options = DifferenceOptions(out=tmp_path / "a", read=("plain",), figure_layers=(1,))
    made(options, difference.STUDY, codi_model)
    assert capsys.readouterr().err == ""
    made(DifferenceOptions(out=tmp_path / "b", read=("plain",), figure_layers=(1,)), difference.STUDY, codi_model,
         say=quiet)  # fmt: skip
    assert "means" in (shown := capsys.readouterr().err) and "12/12" in shown


def test_options_of_reading_are_in_one_place() -> None:
    reading: list[Callable[..., ReadOptions]] = [one for one in EVERY if issubclass(one, ReadOptions)]
    assert len(reading) == 5
    for make in reading:
        with pytest.raises(ValueError, match="names a lens twice|takes one lens"):
            make(read=("all", "ALL"))

"""`codi lens`: logit lens and tuned lens on latents.

    codi lens train                        # every latent × layer, in one pass over streamed rollouts -> runs/lens
    codi lens show --text "…"              # heatmap of the most probable tokens of one prompt
    codi lens detect                       # are intermediates and answers among the top k? beside a chance level
    codi lens difference                   # the lens on mean_A − mean_B, all pairs and layers
    codi lens transfer                     # lenses of latents on text tokens, and the reverse
    codi lens causal                       # ablate what the lens reads, inside the model, beside random directions

Each command writes one folder (tables as CSV, figures as PNG and PDF, manifest.json) and prints a short summary.
Lenses: "plain" (logit lens), "each" (one tuned lens per position) or the name of one tuned lens, used everywhere; the
names are those of `lenses.lens_positions`, with the published 0-based reading under "published …".

Runs as `codi lens` or `python -m experiments.lens`. The measures are in measures.py, the figures in figures.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.tasks import TASK_NAMES, Problem, load_task, split_by_cluster, with_suffix

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from codi import CodiModel
    from experiments.study.claims import ClaimsTable
    from experiments.study.folder import RunFolder
    from lenses import LatentLens, TrainingOptions

__all__ = ["CONFIG", "Causal", "Detect", "Difference", "Show", "Train", "Transfer", "main", "train"]


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it runs."""

    model: str = "checkpoints/tiny"
    """Checkpoint: a folder or a hub id such as bcywinski/codi_llama1b-answer_only."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: Literal["original", "original-eos", "answer-only"] | None = None
    """Token order; None: what the checkpoint says or looks like."""
    lora_alpha: float | None = None
    """LoRA scale times rank; None: what the checkpoint says, or the published ratio."""
    mask: Literal["carried", "published"] = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights; lenses are float32 always."""
    batch_size: int = 64
    """Prompts computed at once."""
    seed: int = 0
    """Seed of prompts, draws and intervals."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _AT_LEAST and value is not None and value < _AT_LEAST[field.name]:
                name = field.name.replace("_", "-")
                raise ValueError(f"{name} must be at least {_AT_LEAST[field.name]}, got {value}")


_AT_LEAST = {
    "batch_size": 1,
    "seed": 0,
    "limit": 2,
    "prompts": 1,
    "validation": 2,
    "test": 2,
    "derivation": 2,
    "donors": 1,
    "resamples": 100,
    "directions": 1,
    "top": 1,
    "text_tokens": 1,
}


@dataclass(frozen=True)
class TaskOptions(ModelOptions):
    """Which prompts."""

    task: str = "templates"
    """Evaluation prompts: templates, arithmetic, a file (prompts.json, GSM8K .jsonl, …), a folder or a hub id."""
    split: str = "test"
    """Split of the task; not used for a single file."""
    limit: int | None = 500
    """Number of prompts, a seeded choice; None: all."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if it had one."""
    resamples: int = 2000
    """Bootstrap resamples of clusters behind every interval."""


@dataclass(frozen=True)
class LensOptions(TaskOptions):
    """Which lenses."""

    lens: Path = Path("runs/lens")
    """Folder of `codi lens train`, or a folder in tuned_lens's format."""
    read: tuple[str, ...] = ("plain", "each", "all")
    """Lenses: plain, each (at every position its own), or a name that was trained. "plain" alone needs no folder."""


@dataclass(frozen=True)
class Train(ModelOptions):
    """Train tuned lenses, every latent × layer in one pass over streamed rollouts."""

    out: Path = Path("runs/lens")
    """Run folder; the same command continues an interrupted run in it."""
    lenses: tuple[str, ...] = ("each", "all", "odd", "even", "text")
    """Lenses to train: each (one per position: begin of thought and every latent), all, odd, even, a latent ("3"),
    several ("3 and 5"), text (tokens of the questions), and "published …" for the 0-based reading of a name."""
    task: str = "arithmetic"
    """Training questions: arithmetic, templates, a file, a folder or a hub id such as zen-E/GSM8k-Aug."""
    split: str = "train"
    """Split of a folder or hub data set (generated tasks use their own disjoint splits)."""
    prompts: int | None = 4096
    """Training questions, a seeded choice (published: 500); passes over them go on until the steps are done."""
    validation: int = 128
    """Questions for early stopping; they share no numbers with the others."""
    test: int = 256
    """Questions for the reported KL; they share no numbers with the others."""
    text: Path | None = None
    """Text file, one passage a line, for the lens "text"; None: the tokens of the training questions."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if it had one."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd: the recipe of the tuned-lens paper (Nesterov momentum 0.9, clip 1, linear decay)."""
    lr: float | None = None
    """Highest learning rate; None: 1e-3 for adamw (as published for CODI), 0.1 for sgd."""
    weight_decay: float = 1e-3
    """Weight decay, towards the identity."""
    steps: int = 300
    """Most steps, one batch each; the rate decays linearly to zero over them."""
    evaluate_every: int = 25
    """Steps between looks at the validation questions; the state is saved as often."""
    patience: int = 6
    """A translator (one lens at one layer) stops after so many looks in a row without a better validation KL."""
    text_tokens: int = 8
    """Text tokens taken from each question or passage."""
    resamples: int = 2000
    """Bootstrap resamples of clusters behind every interval."""
    legacy: bool = False
    """The published recipe, which replaces the options above: 500 questions, 3 passes, batches of one, Adam 1e-3
    without decay, clipping or early stopping, target normed twice; the lenses keep the names given (the published ones
    are read with "published …"). The held-out KL is to the model's true output all the same. Published runs were in
    bfloat16."""


@dataclass(frozen=True)
class Show(ModelOptions):
    """Heatmap of the most probable tokens of one prompt, at every position and layer."""

    text: str | None = None
    """The prompt, any text; None: the first template problem of the test split."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if it had one."""
    lens: Path = Path("runs/lens")
    """Folder of `codi lens train`, or a folder in tuned_lens's format."""
    read: tuple[str, ...] = ("plain", "each")
    """Lenses: plain, each, or a name that was trained. "plain" alone needs no folder."""
    top: int = 5
    """Tokens per position and layer in the table."""
    out: Path | None = None
    """Folder; None: runs/lens-show-… with a hash of prompt and lenses."""


@dataclass(frozen=True)
class Detect(LensOptions):
    """Detection rates of intermediate and final values for k = 1..10, chance level, entropy, word families."""

    out: Path = Path("runs/lens-detect")
    """Folder to write."""
    numbers: Literal["first", "all"] = "first"
    """How a number of several tokens counts: by its first token, or only if all its tokens are among the k."""
    donors: int = 20
    """Other prompts per prompt behind the chance level."""
    words: tuple[str, ...] = ("therefore", "however", "because")
    """Word families, lower case; each is looked for with and without leading space and capital."""
    k: int = 5
    """k of the figures, of the answer table and of the summary, 1..10."""


@dataclass(frozen=True)
class Difference(LensOptions):
    """Difference lens: the lens on mean_A − mean_B for all pairs and layers."""

    read: tuple[str, ...] = ("plain", "all")
    """Lenses: plain, each (the translators of A), or a name that was trained."""
    split: str = "derivation"
    """Split of the task; not used for a single file."""
    bias: Literal["linear", "published"] = "linear"
    """linear: the translator's bias is left out (it cancels in a difference); published: the difference is read as if
    it were a state."""
    figure_layers: tuple[int, ...] | None = None
    """Layers that get a figure; None: all of a model with up to 8 blocks, else five."""
    out: Path = Path("runs/lens-difference")
    """Folder to write."""


@dataclass(frozen=True)
class Transfer(LensOptions):
    """Every lens at every position, its own or not: latents ↔ text."""

    read: tuple[str, ...] = ()
    """Lenses; empty: every one that was trained."""
    limit: int | None = 300
    """Number of prompts, a seeded choice; None: all."""
    text_tokens: int = 8
    """Text tokens taken from each question."""
    out: Path = Path("runs/lens-transfer")
    """Folder to write."""


@dataclass(frozen=True)
class Causal(LensOptions):
    """Ablate what the lens reads, inside the model, beside random directions (causal basis extraction)."""

    read: tuple[str, ...] = ("each",)
    """One lens: plain, each, or a name that was trained."""
    limit: int | None = 64
    """Prompts on which effects are measured."""
    derivation: int = 256
    """Prompts from which means and directions are taken; they share no numbers with the others."""
    directions: int = 4
    """Directions of each kind per latent and layer."""
    latents: tuple[int, ...] | None = None
    """Latents; None: all."""
    layers: tuple[int, ...] | None = None
    """Layers, 0 (the embedding) to n_layers − 1; None: all."""
    batch_size: int = 512
    """Rows computed at once."""
    out: Path = Path("runs/lens-causal")
    """Folder to write."""


CONFIG = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Detect, tyro.conf.subcommand("detect")]
    | Annotated[Difference, tyro.conf.subcommand("difference")]
    | Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Causal, tyro.conf.subcommand("causal")]
)


# --- Shared steps -----------------------------------------------------------------------------------------------------


def load_model(config: ModelOptions) -> CodiModel:
    """The model that the options name."""
    from codi import load_codi

    return load_codi(
        config.model,
        base=config.base,
        protocol=config.protocol,
        lora_alpha=config.lora_alpha,
        device=None if config.device == "auto" else config.device,
        dtype=config.dtype,
        mask=config.mask,
    )


def load_problems(config: TaskOptions, model: CodiModel) -> list[Problem]:
    """Evaluation prompts with the checkpoint's suffix."""
    problems = load_task(config.task, config.split, config.limit, config.seed)
    return with_suffix(problems, model.protocol.question_suffix) if config.suffix else problems


def load_lens(names: Sequence[str], folder: Path, model: CodiModel) -> list[LatentLens]:
    """Lenses by name; the folder is read only if one of them was trained.

    Raises:
        ValueError: no names, a name twice, a lens that is not there.
    """
    from lenses.latent_lens import choose_lens, load_lenses, unembed

    if not names:
        raise ValueError("read must name at least one lens, got none")
    if len(set(names)) < len(names):
        raise ValueError(f"read names a lens twice: {', '.join(names)}")
    shared = unembed(model)
    saved = {} if set(names) == {"plain"} else load_lenses(folder, model, shared)
    return [choose_lens(name, saved, model, shared) for name in names]


_NOT_IDENTITY = ("model", "out", "device", "lens")


@contextmanager
def open_folder(
    out: Path, command: str, config: ModelOptions, model: CodiModel, **identity: Any
) -> Iterator[RunFolder]:
    """The folder of a command, alone; one that holds something else is refused."""
    from experiments.study.folder import RunFolder, versions

    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IDENTITY}
    content = {
        "command": f"lens {command}",
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": model.device.type,
        **identity,
    }
    folder, began = RunFolder(out), time.time()
    with folder.open(content, {"model": config.model, "versions": versions()}):
        yield folder
        folder.add_to_manifest(seconds=round(time.time() - began, 1))
        trials = out / "trials"
        if trials.is_dir() and not any(trials.iterdir()):
            trials.rmdir()


def lens_identity(names: Sequence[str], folder: Path) -> str:
    """Hash of the lens files that are read; empty for the plain lens."""
    if set(names) == {"plain"}:
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("params.pt")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def write_table(folder: RunFolder, name: str, table: pd.DataFrame) -> None:
    """A table as {name}.csv, or .parquet if the name says so."""
    if name.endswith(".parquet"):
        folder.write(name, table.to_parquet(index=False))
    else:
        folder.write(f"{name}.csv", table.to_csv(index=False).encode())


def write_figure(folder: RunFolder, name: str, figure: Figure) -> None:
    """A figure as PNG and PDF under figures/."""
    from experiments.figures.style import save

    save(figure, f"figures/{name}", folder.write)


@contextmanager
def progress(total: int, unit: str, what: str) -> Iterator[Callable[[int], object]]:
    """A progress bar; yields the function that moves it."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, desc=what, smoothing=0.1, file=sys.stderr) as bar:
        yield bar.update


def span(value: float, lower: float, upper: float, digits: int = 3) -> str:
    """An estimate with its interval."""
    return f"{value:.{digits}f} [{lower:.{digits}f}, {upper:.{digits}f}]"


def sizes(problems: Sequence[Problem]) -> str:
    """How many prompts and clusters."""
    return f"{len(problems)} prompts in {len({p.cluster or p.prompt_id for p in problems})} clusters"


# --- train ------------------------------------------------------------------------------------------------------------


def training_split(config: Train, suffix: str) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Training, validation and test questions that share no cluster and no numbers."""
    if config.task == "arithmetic":
        parts = [
            load_task(config.task, split, number, config.seed)
            for split, number in (("train", config.prompts), ("derivation", config.validation), ("test", config.test))
        ]
    else:
        if config.task in TASK_NAMES:
            rest, test = (load_task(config.task, split, None, config.seed) for split in ("derivation", "test"))
        else:
            rest, test = split_by_cluster(load_task(config.task, config.split, None, config.seed), 0.85, config.seed)
        training, validation = split_by_cluster(rest, 0.85, config.seed)
        parts = [
            _choice(training, config.prompts, config.seed),
            _choice(validation, config.validation, config.seed),
            _choice(test, config.test, config.seed),
        ]
    train, validation, test = (with_suffix(part, suffix) for part in parts)
    return train, validation, test


def _choice(problems: list[Problem], number: int | None, seed: int) -> list[Problem]:
    import random

    if number is None or number >= len(problems):
        return problems
    return [problems[i] for i in sorted(random.Random(f"lens-{seed}").sample(range(len(problems)), number))]


def batch_of_step(items: Sequence[str], size: int, seed: int, step: int) -> list[str]:
    """The batch of a step: passes over a seeded shuffle, a pure function of its arguments."""
    import random

    per_pass = max(1, len(items) // size)
    turn, index = divmod(step, per_pass)
    order = list(range(len(items)))
    random.Random(f"lens-{seed}-{turn}").shuffle(order)
    return [items[i] for i in order[index * size : (index + 1) * size]]


def named_lenses(names: Sequence[str], n_latents: int) -> dict[str, tuple[int, ...]]:
    """Name -> positions, "each" spelled out."""
    from lenses.latent_lens import lens_positions

    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name == "each":
            found |= {str(position): (position,) for position in range(n_latents + 1)}
        else:
            found[" ".join(name.lower().split())] = lens_positions(name, n_latents)
    return found


def training_options(config: Train) -> TrainingOptions:
    """How the lenses are trained; checked.

    Raises:
        ValueError: an option outside its range.
    """
    from lenses.training import TrainingOptions

    common: dict[str, Any] = {"text_tokens": config.text_tokens, "seed": config.seed, "steps": config.steps}
    if config.legacy:
        return TrainingOptions(
            lr=1e-3,
            weight_decay=0.0,
            clip=float("inf"),
            evaluate_every=100,
            target="published",
            schedule="constant",
            early_stopping=False,
            **common,
        )
    return TrainingOptions(
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        patience=config.patience,
        evaluate_every=config.evaluate_every,
        **common,
    )


def train(config: Train, model: CodiModel, say: Callable[[str], None] = lambda line: None) -> RunFolder:
    """Train, save and judge lenses in a run folder."""
    import pandas as pd

    from experiments.lens.measures import value_frequencies
    from lenses.latent_lens import save_lens, slug
    from lenses.training import LensTraining

    at_once = config.batch_size  # where nothing is trained
    if config.legacy:
        config = dataclasses.replace(config, prompts=500, batch_size=1, steps=1500)
    problems, validation, test = training_split(config, model.protocol.question_suffix if config.suffix else "")
    passages = None
    if config.text is not None:
        passages = [line for line in config.text.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not passages:
            raise ValueError(f"{config.text} holds no text")
    options = training_options(config)
    lenses = named_lenses(config.lenses, model.n_latents)
    training = LensTraining(
        model,
        lenses,
        options,
        None if passages is None else lambda step: batch_of_step(passages, config.batch_size, config.seed + 1, step),
    )
    questions = [problem.question for problem in problems]
    held_out = [p.question for p in validation]
    chunks = [held_out[i : i + at_once] for i in range(0, len(held_out), at_once)]
    with open_folder(config.out, "train", config, model) as folder:
        state = config.out / "state.pt"
        if folder.manifest().get("finished"):
            say(f"{config.out} holds this run, finished")
            return folder
        if state.exists():
            training.load(state)
            say(f"continuing at step {training.step}")
        with progress(options.steps, "step", f"training {len(lenses)} lenses × {model.n_layers} layers") as advance:
            advance(training.step)

            def after(training: LensTraining) -> None:
                advance(1)
                if training.step % options.evaluate_every == 0 and not training.finished:
                    training.save(state)

            training.fit(lambda step: batch_of_step(questions, config.batch_size, config.seed, step), chunks, after)
        seen = min(len(questions), training.step * config.batch_size)
        for name, lens in training.lenses.items():
            save_lens(
                lens,
                config.out / "lenses" / slug(name),
                name,
                training.positions[name],
                numbering="positions: 0 = begin of thought, 1..n = latents, -1 = text",
                model=model.name,
                checkpoint_hash=model.checkpoint_hash,
                steps=training.step,
                training_questions=seen,
                best_steps=[item.best_step for item in training.translators if item.name == name],
            )
        write_table(folder, "history", pd.DataFrame(training.history))
        frequency = [(value, *counts) for value, counts in value_frequencies(problems).items()]
        columns = ["value", "questions_with_this_answer", "questions_with_this_step"]
        write_table(folder, "training_values", pd.DataFrame(frequency, columns=columns))
        table = held_out_table(training, test, dataclasses.replace(config, batch_size=at_once))
        write_table(folder, "held_out", table)
        _draw_held_out(folder, table)
        folder.add_to_manifest(finished=True, steps=training.step)
        state.unlink(missing_ok=True)
    say(held_out_text(table, test, training.step, config))
    return folder


def held_out_table(training: Any, problems: Sequence[Problem], config: Train) -> pd.DataFrame:
    """KL of every lens at its own positions on held-out questions, beside the plain lens.

    One row per lens × position × layer: divergence with lower and upper, plain with plain_lower and plain_upper,
    change (divergence − plain, paired) with change_lower and change_upper, n, n_clusters; nats.
    """
    import numpy as np
    import pandas as pd
    import torch

    from experiments.lens.measures import batches
    from experiments.statistics.clusters import Settings, mean_intervals
    from lenses.latent_lens import LatentLens
    from lenses.training import collect_states, divergence_to_output

    model = training.model
    positions = list(training.all_positions)
    plain = LatentLens(training.unembed, model.n_layers)
    wanted = [(name, position) for name, own in training.positions.items() for position in own]
    found = np.full((len(wanted), len(problems), model.n_layers), np.nan)
    base = np.full((len(positions), len(problems), model.n_layers), np.nan)
    generator = torch.Generator().manual_seed(config.seed)
    for rows in batches(problems, config.batch_size):
        states = collect_states(model, [problems[i].question for i in rows], positions, config.text_tokens, generator)
        for position in positions:
            part = states.at([position])
            n = torch.bincount(part.prompt.cpu(), minlength=len(rows))[:, None]

            def per_prompt(lens: LatentLens, part: Any = part, n: Any = n, rows: list[int] = rows) -> Any:
                values = divergence_to_output(lens, part)[:, :-1]
                return (torch.zeros(len(rows), model.n_layers).index_add_(0, part.prompt.cpu(), values) / n).numpy()

            base[positions.index(position), rows] = per_prompt(plain)
            for i, (name, own) in enumerate(wanted):
                if own == position:
                    found[i, rows] = per_prompt(training.lens(name))
    clusters = [problem.cluster or problem.prompt_id for problem in problems]
    frames, settings = [], Settings(resamples=config.resamples, seed=config.seed)
    for i, (name, position) in enumerate(wanted):
        before = base[positions.index(position)]
        level = mean_intervals(found[i], clusters, settings, bounds=(0.0, np.inf))
        start = mean_intervals(before, clusters, settings, bounds=(0.0, np.inf))
        change = mean_intervals(found[i] - before, clusters, settings, bounds=(-np.inf, np.inf))
        frames.append(
            pd.DataFrame(
                {
                    "lens": name,
                    "position": position,
                    "layer": range(model.n_layers),
                    "divergence": level["mean"],
                    "lower": level["lower"],
                    "upper": level["upper"],
                    "plain": start["mean"],
                    "plain_lower": start["lower"],
                    "plain_upper": start["upper"],
                    "change": change["mean"],
                    "change_lower": change["lower"],
                    "change_upper": change["upper"],
                    "n": level["n"],
                    "n_clusters": level["n_clusters"],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _draw_held_out(folder: RunFolder, table: pd.DataFrame) -> None:
    from experiments.lens.figures import held_out_figure

    # every position's own lens is drawn as one series, "each"
    own = table["lens"] == table["position"].astype(str)
    shown = table.assign(lens=table["lens"].where(~own, "each"))
    names = [name for name in ("each", "all", "odd", "even", "text") if (shown["lens"] == name).any()]
    names += [name for name in dict.fromkeys(shown["lens"]) if name not in names]
    write_figure(folder, "held_out", held_out_figure(shown, names[:7]))


def held_out_text(table: pd.DataFrame, problems: Sequence[Problem], steps: int, config: Train) -> str:
    """What `train` prints: held-out KL per lens, averaged over its positions and layers, and where it does not help."""
    lines = [
        f"{steps} steps of {config.batch_size} questions; held-out KL to the model's output, nats, {sizes(problems)}:"
    ]
    for name in dict.fromkeys(table["lens"]):
        mine = table[table["lens"] == name]
        better = int((mine["change_upper"] < 0).sum())
        lines.append(
            f"  {name:<8} {mine['plain'].mean():7.3f} plain -> {mine['divergence'].mean():7.3f} tuned, mean over "
            f"{len(mine)} position × layer; below plain (95 % interval) at {better} of {len(mine)}"
        )
    return "\n".join([*lines, f"Lenses: {config.out}/lenses; tables and figure: {config.out}"])


# --- show -------------------------------------------------------------------------------------------------------------


def show(config: Show, model: CodiModel, say: Callable[[str], None]) -> None:
    """Heatmap and table of one prompt."""
    from experiments.lens.figures import heatmap_figure, label
    from experiments.lens.measures import read_prompt

    text = config.text if config.text is not None else load_task("templates", "test", None, config.seed)[0].question
    if not text.strip():
        raise ValueError("text must hold at least one word, got an empty one")
    suffix = model.protocol.question_suffix if config.suffix else ""
    question = text if not suffix or text.rstrip().endswith(suffix.strip()) else text + suffix
    lenses = load_lens(config.read, config.lens, model)
    identity = lens_identity(config.read, config.lens)
    mark = hashlib.sha256(json.dumps([question, config.read, identity, model.checkpoint_hash]).encode()).hexdigest()[:8]
    out = config.out or Path(f"runs/lens-show-{mark}")
    with open_folder(out, "show", config, model, lens=identity) as folder:
        readings, answer = read_prompt(model, lenses, question, config.top)
        write_table(folder, "readings", readings)
        folder.write_json("prompt.json", {"question": question, "answer": answer})
        title = f"{_wrapped(text, 122)}\n{_wrapped(f'answer: {_one_line(answer)}', 100)}"
        write_figure(folder, "heatmap", heatmap_figure(readings, title))
    say(f"{question}\nanswer: {_one_line(answer)}\n")
    for lens in lenses:
        mine = readings[(readings["lens"] == lens.name) & (readings["rank"] == 1)]
        table = mine.pivot(index="layer", columns="latent", values="token").iloc[::-1]
        chances = mine.pivot(index="layer", columns="latent", values="probability").iloc[::-1]
        say(f"{lens.name}: most probable token (probability); columns: 0 = begin of thought, then latents")
        say("layer " + "".join(f"{position:^16}" for position in table.columns))
        for layer in table.index:
            cells = (f"{label(token)} {p:.2f}" for token, p in zip(table.loc[layer], chances.loc[layer], strict=True))
            say(f"{layer:>5} " + "".join(f"{cell:^16}" for cell in cells))
    say(f"\nwritten to {out}")


def _one_line(text: str) -> str:
    """Text of an answer without line ends and control characters."""
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    return shown or "(none)"


def _wrapped(text: str, width: int) -> str:
    import textwrap

    lines = textwrap.wrap(text, width)
    return "\n".join(lines if len(lines) <= 4 else [*lines[:3], lines[3] + " …"])


# --- detect -----------------------------------------------------------------------------------------------------------


def detect(config: Detect, model: CodiModel, say: Callable[[str], None]) -> None:
    """Detection rates, entropy, word families and answer frequencies."""
    import pandas as pd

    from experiments.lens import measures as lens_measures
    from experiments.lens.figures import curves_figure, detection_figure, summary_figure
    from lenses.latent_lens import slug

    if not 1 <= config.k <= lens_measures.TOP:
        raise ValueError(f"k must be in 1..{lens_measures.TOP}, got {config.k}")
    problems = load_problems(config, model)
    lenses = load_lens(config.read, config.lens, model)
    with open_folder(config.out, "detect", config, model, lens=lens_identity(config.read, config.lens)) as folder:
        with progress(len(problems), "prompt", "reading") as advance:
            found = lens_measures.detect(
                model,
                lenses,
                problems,
                rule=config.numbers,
                donors=config.donors,
                words=config.words,
                frequency_k=config.k,
                batch_size=config.batch_size,
                seed=config.seed,
                advance=advance,
            )
        rates = found.rates(config.resamples, config.seed)
        words = found.word_rates(config.resamples, config.seed) if config.words else None
        summaries = found.summaries(config.resamples, config.seed)
        write_table(folder, "rates", rates)
        write_table(folder, "readings.parquet", found.table())
        write_table(folder, "entropy", summaries)
        if words is not None:
            write_table(folder, "words", words)
        trained = config.lens / "training_values.csv"
        counts: dict[float, tuple[int, int]] = {}
        if trained.is_file():
            counts = {float(v): (int(a), int(s)) for v, a, s in pd.read_csv(trained).itertuples(index=False)}
        answers = found.answers(counts)
        write_table(folder, "answers", answers)
        targets = [t for t in found.targets if t.startswith("step")][:3] + ["answer"]
        targets += ["question"] if "question" in found.targets and len(targets) < 4 else []
        targets = [t for t in targets if t != "steps" or "step2" not in targets]
        note = "Numbers of several tokens count by their " + ("first." if config.numbers == "first" else "every token.")
        n = model.n_layers
        if n <= 8:
            write_figure(folder, "detection", detection_figure(rates, targets, config.k, note))
        else:  # a page per lens
            for name in found.lenses:
                mine = rates[rates["lens"] == name]
                write_figure(folder, f"detection-{slug(name)}", detection_figure(mine, targets, config.k, note))
        layers = sorted({0, n // 2, n - 1, n}) if n > 3 else list(range(n + 1))
        for target in targets:
            write_figure(folder, f"curves-{target}", curves_figure(rates, target, layers))
        write_figure(folder, "entropy", summary_figure(summaries, "entropy", "entropy of the lens, nats"))
        write_figure(
            folder,
            "number-tokens",
            summary_figure(summaries, "number_first", "share: most probable token is a number"),
        )
        claims = detection_claims(found, config.resamples, config.seed)
        claims.write(folder.write)
    say(detection_text(found, rates, words, answers, bool(counts), config))
    if len(claims):
        say("\n" + claims.markdown())


def detection_claims(found: Any, resamples: int, seed: int) -> ClaimsTable:
    """S1 by every tuned lens: means over the layers below the last, latents 2 and 4 (3 and 5) against the others.

    `codi alternation` judges S1 by the model's own head, that is by the last layer.
    """
    import numpy as np

    from experiments.lens.measures import TOP
    from experiments.statistics.clusters import Settings, mean_intervals
    from experiments.study.claims import Claim, ClaimsTable, judge

    claims, settings = ClaimsTable(), Settings(resamples=resamples, seed=seed)
    latents = [k for k in found.positions if k > 0]
    if not {2, 3, 4, 5} <= set(latents):
        return claims
    answer = found.targets.index("answer")
    places = [found.positions.index(k) for k in latents]

    def lead(values: Any, chosen: tuple[int, ...]) -> Any:
        """(prompt, latent) -> (prompt, other latent): mean of the chosen latents minus each of the others."""
        mine = values[:, [k in chosen for k in latents]].mean(axis=1, keepdims=True)
        return mine - values[:, [k not in chosen for k in latents]]

    for i, lens in enumerate(found.lenses):
        if lens == "plain":
            continue
        hits = np.stack([found.rank[i, :, places, :-1, answer] <= k for k in range(1, TOP + 1)], axis=-1)
        over = (hits.mean(axis=(2, 3)) - found.chance[i][:, places, :-1, answer].mean(axis=(2, 3))).T
        entropy = found.entropy[i][:, places, :-1].mean(axis=2)
        for name, statement, values, chosen, unit in (
            (
                "S1 detection",
                "the final answer is detected most at latents 2 and 4",
                over,
                (2, 4),
                "rate above chance",
            ),
            ("S1 entropy", "entropy is highest at latents 3 and 5", entropy, (3, 5), "nats"),
        ):
            table = mean_intervals(lead(values, chosen), found.clusters, settings, bounds=(-np.inf, np.inf))
            row = table.iloc[int(table["mean"].to_numpy().argmin())]  # the strongest of the other latents
            claims.add(
                Claim(
                    f"{name}, lens {lens}",
                    statement,
                    f"lead over the strongest other latent, {unit}, mean over layers below the last"
                    + (" and k = 1..10" if chosen == (2, 4) else "")
                    + "; above 0",
                    judge(float(row["lower"]), float(row["upper"]), above=0.0),
                    float(row["mean"]),
                    float(row["lower"]),
                    float(row["upper"]),
                    int(row["n"]),
                    int(row["n_clusters"]),
                    f"latents {latents[0]}..{latents[-1]}: "
                    + ", ".join(f"{v:.3f}" for v in np.nanmean(values, axis=0)),
                )
            )
    return claims


def detection_text(
    found: Any, rates: pd.DataFrame, words: pd.DataFrame | None, answers: pd.DataFrame, counted: bool, config: Detect
) -> str:
    """What `detect` prints."""
    from scipy.stats import spearmanr

    model_layers = int(rates["layer"].max())
    several = rates.loc[rates["target"] == "answer", "multi_token"].iloc[0]
    lines = [
        f"{sizes(found.problems)}; {found.right.mean():.3f} answered right; numbers of several tokens: rule "
        f"{config.numbers!r} ({100 * several:.0f} % of the answers)",
        f"share of prompts with the value in the top {config.k} [95 % over clusters], chance level behind it:",
    ]
    shown = found.targets if len(found.targets) <= 5 else ("steps", "answer", "question")
    shown = [target for target in shown if target in found.targets and not (target == "steps" and "step2" in shown)]
    width = max(map(len, shown))
    here = rates[(rates["answered"] == "all") & (rates["k"] == config.k)]
    last = here[(here["lens"] == found.lenses[0]) & (here["layer"] == model_layers)]
    lines.append(f"  last layer (every lens is the model there), positions {', '.join(map(str, found.positions))}:")
    for target in shown:
        rows = last[last["target"] == target].to_dict(orient="records")
        cells = [f"{span(r['rate'], r['lower'], r['upper'], 2)} ({r['chance']:.2f})" for r in rows]
        lines.append(f"    {target:<{width}}  " + "  ".join(cells))
    inner = here[here["layer"] < model_layers].groupby(["lens", "target", "latent"])[["rate", "chance"]].mean()
    for lens in found.lenses:
        lines.append(f"  lens {lens}, mean over layers 0..{model_layers - 1}:")
        for target in shown:
            cells = [f"{r['rate']:.2f} ({r['chance']:.2f})" for _, r in inner.loc[(lens, target)].iterrows()]
            lines.append(f"    {target:<{width}}  " + "  ".join(cells))
    if words is not None:
        for word in found.words:
            here = words[(words["word"] == word) & (words["k"] == config.k)]
            forms = int(here["single_token_spellings"].iloc[0])
            if forms == 0 and here["rate"].max() == 0:
                lines.append(f"“{word}”: never read; no spelling of it is a single token of this vocabulary")
            else:
                best = here.loc[here["rate"].idxmax()]
                lines.append(
                    f"“{word}” ({forms} of its spellings are single tokens): at most "
                    f"{span(best['rate'], best['lower'], best['upper'])} (lens {best['lens']}, latent "
                    f"{best['latent']}, "
                    f"layer {best['layer']}), see words.csv"
                )
    if counted:
        for lens in found.lenses:
            mine = answers[(answers["lens"] == lens) & (answers["n_not"] > 0)]
            frequency = mine["trained_answers"] + mine["trained_steps"]
            if len(mine) < 3 or frequency.nunique() < 2 or mine["read_when_not"].nunique() < 2:
                continue
            rho = spearmanr(frequency, mine["read_when_not"]).statistic
            lines.append(
                f"{lens}: {len(mine)} answer values; read where true {mine['read_when_true'].mean():.3f}, where not "
                f"{mine['read_when_not'].mean():.3f} (mean share of latents × layers); rank correlation of the latter "
                f"with the value's frequency in the lens's training questions {rho:+.2f}"
            )
    return "\n".join([*lines, f"Tables and figures: {config.out}"])


# --- difference, transfer, causal -------------------------------------------------------------------------------------


def difference(config: Difference, model: CodiModel, say: Callable[[str], None]) -> None:
    """Difference lens grids."""
    from experiments.lens.figures import difference_figure
    from experiments.lens.measures import TOP, difference_table, latent_means

    n = model.n_layers
    layers = config.figure_layers
    if layers is None:
        layers = tuple(range(n + 1)) if n <= 8 else tuple(sorted({round(i * n / 4) for i in range(5)}))
    wrong = [layer for layer in layers if not 0 <= layer <= n]
    if wrong:
        raise ValueError(f"figure-layers must be in 0..{n}, got {wrong[0]}")
    if model.n_latents < 2:
        raise ValueError(f"a difference needs at least 2 latents, {model.name} has {model.n_latents}")
    problems = load_problems(config, model)
    lenses = load_lens(config.read, config.lens, model)
    with open_folder(config.out, "difference", config, model, lens=lens_identity(config.read, config.lens)) as folder:
        with progress(len(problems), "prompt", "means") as advance:
            means = latent_means(model, problems, config.batch_size, config.seed, advance)
        table = difference_table(model, lenses, means, bias=config.bias == "published")
        write_table(folder, "difference", table)
        claims = difference_claims(table, means.n, means.n_clusters)
        claims.write(folder.write)
        for layer in layers:
            note = f"{sizes(problems)}."
            write_figure(folder, f"difference-layer-{layer}", difference_figure(table, layer, note))
    cells = table[table["rank"] == 1]
    lines = [f"mean_A − mean_B over {sizes(problems)}; per lens and layer, over all pairs:"]
    for (lens, depth), rows in cells.groupby(["lens", "layer"], sort=False):
        same = [(r["source"] - r["target"]) % 2 == 0 for _, r in rows.iterrows()]
        other = [not s for s in same]
        common = rows["token"].value_counts()
        lines.append(
            f"  {lens}, layer {depth}: halves of the prompts agree on {rows['overlap'].mean():.2f} of the top {TOP}; "
            f"number tokens {rows['numbers'].mean():.2f} (A, B of equal parity {rows['numbers'][same].mean():.2f}, of "
            f"unequal {rows['numbers'][other].mean():.2f}); {len(common)} different first tokens in {len(rows)} cells"
        )
    say("\n".join([*lines, f"Table and figures: {config.out}", "", claims.markdown()]))


def difference_claims(table: pd.DataFrame, n: int, n_clusters: int) -> ClaimsTable:
    """S6 per lens: do cells of the grid whose latents have the same parities share their tokens more than others do?

    Statistic: overlap (share of the top tokens in common) of two cells with the same (parity of A, parity of B), minus
    that of other two cells, mean over layers. p: all relabellings of the latents into two groups of these sizes.
    """
    from itertools import combinations

    import numpy as np

    from experiments.study.claims import Claim, ClaimsTable

    claims = ClaimsTable()
    latents = sorted(set(table["source"]) | set(table["target"]))
    for lens, rows in table.groupby("lens", sort=False):
        cells = sorted({(int(a), int(b)) for a, b in zip(rows["source"], rows["target"], strict=True)})
        alike = np.zeros((len(cells), len(cells)))
        for _, layer in rows.groupby("layer"):
            tokens = {key: set(cell["token_id"]) for key, cell in layer.groupby(["source", "target"])}
            size = max(map(len, tokens.values()))
            alike += [[len(tokens[x] & tokens[y]) / size for y in cells] for x in cells]
        alike /= rows["layer"].nunique()
        upper = np.triu_indices(len(cells), 1)

        def statistic(group: tuple[int, ...], cells: Any = cells, alike: Any = alike, upper: Any = upper) -> float:
            kind = np.array([2 * (a in group) + (b in group) for a, b in cells])
            same = (kind[:, None] == kind[None, :])[upper]
            return float(alike[upper][same].mean() - alike[upper][~same].mean())

        odd = tuple(k for k in latents if k % 2)
        observed = statistic(odd)
        every = [statistic(group) for group in combinations(latents, len(odd))]
        p = float(np.mean([value >= observed - 1e-12 for value in every]))
        smallest = (2 if 2 * len(odd) == len(latents) else 1) / len(every)  # a group and its complement are one pattern
        claims.add(
            Claim(
                f"S6, lens {lens}",
                "the difference lens shows no pattern over A and B",
                "overlap of the top tokens of cells with equal parities minus that of the others; not held if p < 0.05",
                "not testable" if smallest >= 0.05 else "not held" if p < 0.05 else "held",
                observed,
                n=n,
                n_clusters=n_clusters,
                note=f"p = {p:.3f} over {len(every)} relabellings of the latents, of which the smallest possible is "
                f"{smallest:.3f}: "
                + ("too few latents to find any pattern" if smallest >= 0.05 else "“held” means that none was found"),
            )
        )
    return claims


def transfer(config: Transfer, model: CodiModel, say: Callable[[str], None]) -> None:
    """Lenses at positions they were not trained on."""
    from experiments.lens.figures import transfer_figure
    from experiments.lens.measures import transfer_table
    from lenses.latent_lens import choose_lens, load_lenses, unembed

    problems = load_problems(config, model)
    shared = unembed(model)
    saved = load_lenses(config.lens, model, shared)
    names = [name for name in (config.read or tuple(saved)) if name != "plain"]
    lenses = [choose_lens(name, saved, model, shared) for name in names]
    if not lenses:
        raise ValueError("transfer needs a trained lens; plain is always beside it")
    with open_folder(config.out, "transfer", config, model, lens=lens_identity(names, config.lens)) as folder:
        with progress(len(problems), "prompt", "reading") as advance:
            table = transfer_table(
                model,
                lenses,
                problems,
                text_tokens=config.text_tokens,
                batch_size=config.batch_size,
                resamples=config.resamples,
                seed=config.seed,
                advance=advance,
            )
        trained = {item.name: item.positions for item in saved.values()}
        write_table(folder, "transfer", table)
        write_figure(folder, "transfer", transfer_figure(table, f"{sizes(problems)}."))
        claims = transfer_claims(table, trained)
        claims.write(folder.write)
    mean = table[table["layer"] == -1]
    lines = [f"KL to the model's output, nats, mean over layers 0..{model.n_layers - 1}, {sizes(problems)}:"]
    for lens in lenses:
        own = mean["position"].isin(trained.get(lens.name, ()))
        for words, chosen in (
            ("where it was trained", own),
            ("other latents", ~own & (mean["position"] > 0)),
            ("text", ~own & (mean["position"] == -1)),
        ):
            rows = mean[(mean["lens"] == lens.name) & chosen]
            if len(rows):
                level, plain = rows["divergence"].mean(), rows["plain"].mean()
                worse, better = int((rows["change_lower"] > 0).sum()), int((rows["change_upper"] < 0).sum())
                lines.append(
                    f"  {lens.name:<8} {words:<21} {level:7.3f}, logit lens {plain:7.3f}; of {len(rows)} positions "
                    f"better at {better}, worse at {worse} (95 %)"
                )
    say("\n".join([*lines, f"Table and figure: {config.out}"]))
    if len(claims):
        say("\n" + claims.markdown())


def transfer_claims(table: pd.DataFrame, trained: dict[str, tuple[int, ...]]) -> ClaimsTable:
    """S2 and its reverse: a lens fails where it reads worse than the plain lens."""
    from experiments.study.claims import Claim, ClaimsTable, judge

    claims = ClaimsTable()
    mean = table[table["layer"] == -1]
    for lens in dict.fromkeys(mean["lens"]):
        own = trained.get(lens, ())
        on_text = mean[(mean["lens"] == lens) & (mean["position"] == -1)]
        if lens == "plain" or len(own) < 2 or -1 in own or on_text.empty:
            continue
        row = on_text.iloc[0]
        by_text = mean[(mean["lens"] == "text") & (mean["position"] == -1)]["divergence"]
        note = f"KL on text {row['divergence']:.3f}, plain lens {row['plain']:.3f}"
        note += f", lens trained on text {by_text.iloc[0]:.3f}" if len(by_text) else ""
        claims.add(
            Claim(
                f"S2, lens {lens}",
                "a lens trained on latents fails on text tokens",
                "KL to the model's output on text tokens minus that of the plain lens, nats, mean over layers; above 0",
                judge(row["change_lower"], row["change_upper"], above=0.0),
                float(row["change"]),
                float(row["change_lower"]),
                float(row["change_upper"]),
                int(row["n"]),
                int(row["n_clusters"]),
                note,
            )
        )
    return claims


def causal(config: Causal, model: CodiModel, say: Callable[[str], None]) -> None:
    """Ablation of what the lens reads."""
    import numpy as np
    import pandas as pd
    from scipy.stats import spearmanr

    from experiments.lens.figures import causal_figure
    from experiments.lens.measures import causal_effects
    from experiments.statistics.clusters import Settings, mean_intervals
    from experiments.tasks.split import load_split

    if len(config.read) != 1:
        raise ValueError(f"causal takes one lens, got {', '.join(config.read) or 'none'}")
    suffix = model.protocol.question_suffix if config.suffix else ""
    split = load_split(config.task, limit=config.limit, derivation=config.derivation, seed=config.seed, suffix=suffix)
    lens = load_lens(config.read, config.lens, model)[0]
    latents = config.latents or tuple(range(1, model.n_latents + 1))
    layers = config.layers or tuple(range(model.n_layers))
    identity = {"lens": lens_identity(config.read, config.lens), "split": split.record()}
    with open_folder(config.out, "causal", config, model, **identity) as folder:
        with progress(len(latents) * len(layers), "cell", "ablating") as advance:
            effects = causal_effects(
                model,
                lens,
                split.derivation,
                split.evaluation,
                latents=latents,
                layers=layers,
                n_directions=config.directions,
                batch_size=config.batch_size,
                seed=config.seed,
                advance=advance,
            )
        points = effects.groupby(["latent", "layer", "kind", "direction"], as_index=False).agg(
            energy=("energy", "first"),
            moved=("moved", "mean"),
            output=("output", "mean"),
            answer=("answer", "mean"),
            flipped=("flipped", "mean"),
        )
        rows, settings = [], Settings(resamples=config.resamples, seed=config.seed)
        for measure in ("output", "answer", "flipped", "moved"):
            table = effects.assign(value=effects[measure].astype(float)).pivot_table(
                index=["prompt_id", "cluster"], columns="kind", values="value", aggfunc="mean"
            )
            clusters = table.index.get_level_values("cluster").tolist()
            level = mean_intervals(table.to_numpy(), clusters, settings, bounds=(0.0, np.inf))
            against = table["lens"].to_numpy()[:, None] - table.to_numpy()
            gap = mean_intervals(against, clusters, settings, bounds=(-np.inf, np.inf))
            for i, kind in enumerate(table.columns):
                rows.append(
                    {
                        "measure": measure,
                        "kind": kind,
                        **level.iloc[i].to_dict(),
                        "lens_minus": gap["mean"][i],
                        "lens_minus_lower": gap["lower"][i],
                        "lens_minus_upper": gap["upper"][i],
                    }
                )
        summary = pd.DataFrame(rows)
        write_table(folder, "effects.parquet", effects)
        write_table(folder, "directions", points)
        write_table(folder, "summary", summary)
        write_figure(folder, "causal", causal_figure(summary, points))
    lines = [
        f"lens {lens.name}: {config.directions} directions of each kind at {len(latents)} latents × {len(layers)} "
        f"layers, each ablated alone; {sizes(split.evaluation)}; directions from {sizes(split.derivation)}"
    ]
    for measure, words in (
        ("output", "KL of the model's own output at that latent, nats"),
        ("answer", "KL of the first answer token, nats"),
        ("flipped", "first answer token changed, fraction"),
    ):
        mine = summary[summary["measure"] == measure].set_index("kind")
        kinds = mine.to_dict(orient="index")
        parts = [f"{kind} {span(row['mean'], row['lower'], row['upper'], 4)}" for kind, row in kinds.items()]
        for kind in ("random", "covariance", "component"):
            other = kinds[kind]
            less = span(other["lens_minus"], other["lens_minus_lower"], other["lens_minus_upper"], 4)
            parts.append(f"lens − {kind} {less}")
        lines.append(f"  {words}: {'; '.join(parts)}")
    every = spearmanr(points["energy"], points["output"]).statistic
    inside = [
        spearmanr(cell["energy"], cell["output"]).statistic
        for _, cell in points.groupby(["latent", "layer"])
        if cell["energy"].nunique() > 1 and cell["output"].nunique() > 1
    ]
    lines.append(
        f"  rank correlation of the lens's energy with the effect on the model's output: {every:+.2f} over all "
        f"{len(points)} directions, {float(np.mean(inside or [np.nan])):+.2f} mean within a latent × layer"
    )
    say("\n".join([*lines, f"Tables and figure: {config.out}"]))


def main(config: Train | Show | Detect | Difference | Transfer | Causal) -> None:
    """Load the model and run one of the commands."""
    from codi.protocol import UserError

    if isinstance(config, Train):
        # options are checked before a large model is loaded
        training_options(config)
        if config.text is not None and not config.text.is_file():
            raise UserError(f"there is no text file {config.text}")
    elif set(getattr(config, "read", ())) != {"plain"} and not config.lens.exists():
        raise UserError(f"there are no lenses at {config.lens}: run codi lens train, or give --read plain")
    model = load_model(config)
    if isinstance(config, Train):
        train(config, model, print)
    elif isinstance(config, Show):
        show(config, model, print)
    elif isinstance(config, Detect):
        detect(config, model, print)
    elif isinstance(config, Difference):
        difference(config, model, print)
    elif isinstance(config, Transfer):
        transfer(config, model, print)
    else:
        causal(config, model, print)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)

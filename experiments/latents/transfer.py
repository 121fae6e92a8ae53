"""`codi transfer`: ablate the prompt, carry latents from one prompt to another, and read whose answer comes.

The prompt is ablated: at every prompt position the input embedding and the output of every block become their mean over
derivation prompts of the same story (template and operation) and the same length, so that nothing of the prompt's own
numbers is left. Then latents are put back, all n of them, as vectors (z_k is fed; its slot is computed over the ablated
prompt) or as cache slots (keys and values as their donor wrote them, keys turned to the new position):

    own          the prompt's own latents, from its unablated run
    same value   of a derivation prompt of another template with the same key (step 1, Z)
    other value  of a derivation prompt of another template with another key: the control (the donor's answer is read)
    noise        Gaussian vectors with the mean and spread of each latent's coordinates
    nothing      latents are computed over the ablated prompt: the chance level

and into the unablated prompt ("intact"), to see which of the two the answer follows. "leaky" is the published ablation,
which leaves the embeddings alone: the first block still reads the numbers from them.

--legacy: the leaky ablation throughout, the published prompts (50 number triples) and means over these prompts
themselves.

Runs as `codi transfer` or `python -m experiments.latents.transfer`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from codi import Intervention
from codi.rope import rotate, unrotate
from experiments.figures.series import draw_points, spread
from experiments.figures.style import GUIDE, SERIES, legend
from experiments.study.claims import Claim, ClaimsTable, judge
from experiments.study.shared import (
    Result,
    StudyOptions,
    answer_rows,
    answer_table,
    compare,
    effect_claim,
    interval,
    levels,
    load_model,
    load_prompts,
    new_figure,
    open_study,
    row_of,
    stderr,
    think,
)
from experiments.tasks import Problem
from experiments.tasks.split import Split
from steering.directions import generator
from steering.replacements import AblatePrompt, RecordPrompt, ReplaceRows

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Config", "main", "prompt_means", "run", "transferred"]

Story = tuple[str, str, int]
"""Template, operation, number of tokens."""


@dataclass(frozen=True)
class Config(StudyOptions):
    """Ablate the prompt, carry latents from one prompt to another."""

    out: Path = Path("runs/transfer")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    limit: int | None = 300
    """Number of evaluation prompts (a seeded choice); None: all. Prompts without a donor of the same value drop out."""
    draws: int = 3
    """Donors per prompt, and draws of noise."""


def _story(problem: Problem, length: int) -> Story:
    return problem.template, problem.operation, length


def _key(problem: Problem) -> tuple[float, int]:
    return problem.intermediates[0], problem.numbers[2]


def prompt_means(
    model: CodiModel, problems: Sequence[Problem], stories: set[Story], batch_size: int = 64
) -> dict[Story, Tensor]:
    """Mean residual stream of every position and layer over the prompts of each story.

    Args:
        model: the model.
        problems: prompts to average over.
        stories: which stories (template, operation, number of tokens) are wanted.
        batch_size: prompts at once.

    Returns:
        story -> (layer 0..n_layers, position, d_model), before the final norm; stories without a prompt are left out.
    """
    lengths = model.encode([problem.question for problem in problems]).lengths.tolist()
    members: dict[Story, list[int]] = defaultdict(list)
    for row, (problem, length) in enumerate(zip(problems, lengths, strict=True)):
        if _story(problem, length) in stories:
            members[_story(problem, length)].append(row)
    means = {}
    for story, rows in members.items():
        total = torch.zeros(())
        for start in range(0, len(rows), batch_size):
            chunk = [problems[row].question for row in rows[start : start + batch_size]]
            record = RecordPrompt()
            model.prefill(model.encode(chunk), [record], keep=())
            layers = torch.stack([record.layers[layer] for layer in range(model.n_layers + 1)], dim=1)
            total = total + layers.double().sum(0).cpu()
        means[story] = (total / len(rows)).to(model.dtype)
    return means


def transferred(model: CodiModel, split: Split, config: Config) -> pd.DataFrame:
    """Trial table: conditions "<prompt> + <latents> <level>", with `donor` (the donor's answer came)."""
    n, depth = model.n_latents, model.n_layers
    rng = generator(config.seed, "transfer", "donors")
    lengths = model.encode([problem.question for problem in split.evaluation]).lengths.tolist()
    stories = [_story(problem, length) for problem, length in zip(split.evaluation, lengths, strict=True)]
    means = prompt_means(model, split.derivation, set(stories))
    pools: dict[tuple[float, int], list[int]] = defaultdict(list)
    for row, problem in enumerate(split.derivation):
        pools[_key(problem)].append(row)
    keys = sorted(pools)
    problems: list[Problem] = []
    picks: list[list[dict[str, int]]] = []
    chosen_stories: list[Story] = []
    for problem, story in zip(split.evaluation, stories, strict=True):
        same = [row for row in pools.get(_key(problem), []) if split.derivation[row].template != problem.template]
        others = [key for key in keys if key[0] != problem.intermediates[0] and key[1] != problem.numbers[2]]
        if story not in means or not same or not others:
            continue
        drawn = []
        for _ in range(config.draws):
            pool: list[int] = []
            while not pool:
                key = others[int(rng.integers(len(others)))]
                pool = [row for row in pools[key] if split.derivation[row].template != problem.template] or pools[key]
            drawn.append(
                {"same value": same[int(rng.integers(len(same)))], "other value": pool[int(rng.integers(len(pool)))]}
            )
        problems.append(problem)
        picks.append(drawn)
        chosen_stories.append(story)
    if not problems:
        raise ValueError(
            "no evaluation prompt has both a story mean and a donor of the same value among the derivation prompts: "
            "use more derivation prompts"
        )
    own = think(model, problems, keep=("embeddings", "keys", "values", "cache"))
    used = sorted({row for drawn in picks for one in drawn for row in one.values()})
    banks = [own] + [
        think(
            model, [split.derivation[row] for row in used[start : start + 128]], keep=("embeddings", "keys", "values")
        )
        for start in range(0, len(used), 128)
    ]
    at = {row: len(problems) + place for place, row in enumerate(used)}  # own latents first, then the donors'
    given = {name: torch.cat([getattr(b.run, name) for b in banks]) for name in ("embeddings", "keys", "values")}
    positions = torch.cat([bank.run.latent_positions for bank in banks])
    content = unrotate(given["keys"], positions[:, :, None, None], model)
    of_donors = given["embeddings"][len(problems) :]
    noise_mean, noise_spread = of_donors.mean(0), of_donors.std(0, correction=0)
    noise = torch.stack([
        torch.from_numpy(generator(config.seed, "transfer", "noise", draw).standard_normal(tuple(noise_mean.shape)))
        for draw in range(config.draws)
    ]).to(noise_mean)  # fmt: skip

    batch = model.encode([problem.question for problem in problems])
    rows_means = [means[story] for story in chosen_stories]
    whole = not config.legacy
    prefills = {
        "intact": own.prefill,
        "ablated": model.prefill(batch, [AblatePrompt(rows_means, embeddings=whole)], keep=()),
        "leaky": model.prefill(batch, [AblatePrompt(rows_means, embeddings=False)], keep=()),
    }
    frames = []
    for state, prefill in prefills.items():
        columns: dict[str, list[Any]] = defaultdict(list)
        prompt: list[int] = []
        source: list[int] = []
        for i, drawn in enumerate(picks):
            tried: list[tuple[str, str, int, int]] = [("nothing", "", 0, -1)]
            if state != "intact":
                tried += [("own", level, 0, i) for level in ("vectors", "slots")]
            for draw, one in enumerate(drawn if state != "leaky" else []):
                for name, row in one.items():
                    tried += [(name, level, draw, at[row]) for level in ("vectors", "slots")]
                tried.append(("noise", "vectors", draw, -1))
            for name, level, draw, row in tried:
                donor = problems[row] if 0 <= row < len(problems) else None
                donor = split.derivation[used[row - len(problems)]] if row >= len(problems) else donor
                prompt.append(i)
                source.append(row)
                for column, entry in (
                    ("condition", f"{state} + {name} {level}".strip()), ("prompt_state", state), ("latents", name),
                    ("level", level), ("draw", draw),
                    ("donor_answer", float("nan") if donor is None else float(donor.answer)),
                ):  # fmt: skip
                    columns[column].append(entry)
        rows_source, draws_of = torch.tensor(source), torch.tensor(columns["draw"])
        is_slot = torch.tensor([level == "slots" for level in columns["level"]])
        is_vector = torch.tensor([level == "vectors" for level in columns["level"]])
        is_noise = torch.tensor([name == "noise" for name in columns["latents"]])
        first = prefill.next_position
        where = torch.tensor(prompt)

        def edits(rows: Tensor, rows_source: Tensor = rows_source, draws_of: Tensor = draws_of,
                  is_slot: Tensor = is_slot, is_vector: Tensor = is_vector, is_noise: Tensor = is_noise,
                  first: Tensor = first, where: Tensor = where) -> Sequence[Intervention]:  # fmt: skip
            values: dict[Any, Any] = {}
            s = rows_source[rows].clamp(min=0).to(model.device)
            random = is_noise[rows].to(model.device)[:, None]
            for k in range(1, n + 1):
                drawn = noise_mean[k - 1] + noise_spread[k - 1] * noise[draws_of[rows].to(model.device), k - 1]
                values["embedding", k, 0] = (is_vector[rows], torch.where(random, drawn, given["embeddings"][s, k - 1]))
                turn = (first[where[rows].to(first.device)] + k - 1)[:, None]
                for layer in range(1, depth + 1):
                    values["keys", k, layer] = (is_slot[rows], rotate(content[s, k - 1, layer - 1], turn, model))
                    values["values", k, layer] = (is_slot[rows], given["values"][s, k - 1, layer - 1])
            return [ReplaceRows(values)]

        texts = answer_rows(
            model, prefill, prompt, edits, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size
        )
        frames.append(answer_table(problems, prompt, texts, **columns))
    table = pd.concat(frames, ignore_index=True)
    return table.assign(donor=table["prediction"] == table["donor_answer"])


def run(config: Config, model: CodiModel, split: Split, say: Callable[[str], None] | None = None) -> Result:
    """The study on a loaded model: trials, tables, figures, claims and summary in the run folder."""
    lacking = [p for p in (*split.evaluation, *split.derivation) if len(p.numbers) < 3 or not p.intermediates]
    if lacking:
        raise ValueError(f"transfer needs prompts with three numbers and known steps, {lacking[0].prompt_id!r} has not")
    settings = config.settings
    with open_study("transfer", config, model, split, say) as study:
        trials = study.part("transfer", lambda: transferred(model, split, config))
        names = list(dict.fromkeys(trials["condition"]))
        contrasts = []
        for name in names:
            state, _, rest = name.partition(" + ")
            if rest != "nothing":
                contrasts.append((name, f"{state} + nothing"))
        contrasts += [("ablated + nothing", "intact + nothing"), ("leaky + nothing", "ablated + nothing")]
        for level in ("vectors", "slots"):
            contrasts.append((f"ablated + same value {level}", f"ablated + other value {level}"))
        tables = {"levels": levels(trials, settings=settings), "effects": compare(trials, contrasts, settings=settings)}
        given = trials[trials["donor_answer"].notna()]
        tables["donor_levels"] = levels(given, "donor", settings)
        for name, table in tables.items():
            study.table(name, table)
        study.draw(lambda: {"transfer": figure_of(tables, names)})
        claims = published_claims(tables)
        text = study.finish(f"Latent transfer: {model.name}", words(tables, names, config), claims)
        return Result(study.path, tables, claims, text)


def published_claims(tables: dict[str, pd.DataFrame]) -> ClaimsTable:
    """C6."""
    claims = ClaimsTable()
    base = float(row_of(tables["levels"], "intact + nothing")["mean"])
    for level in ("vectors", "slots"):
        for name, statement in (
            ("own", "own latents recover part of the ablated prompt"),
            ("same value", "latents of the same value from another template recover part of it"),
            ("other value", "latents of another value recover nothing"),
        ):
            row = row_of(tables["effects"], f"ablated + {name} {level}", "ablated + nothing")
            bound = {"below": 0.05} if name == "other value" else {"above": 0.0}
            rule = "accuracy against nothing put back is " + ("below 0.05" if name == "other value" else "above 0")
            if base < 0.2:
                note = f"unedited accuracy is {base:.2f}: there is too little to recover"
                claims.add(Claim(f"C6 ({name}, {level})", statement, rule, "not testable", note=note))
                continue
            verdict = judge(row["lower"], row["upper"], **bound)
            claims.add(effect_claim(f"C6 ({name}, {level})", statement, rule, verdict, row))
    return claims


def words(tables: dict[str, pd.DataFrame], names: Sequence[str], config: Config) -> list[str]:
    """The summary, paragraph by paragraph."""
    first = row_of(tables["levels"], "intact + nothing")
    lines = [
        f"{int(first['n'])} prompts of {config.asked} in {int(first['n_clusters'])} clusters; per cent, 95 % intervals "
        "over clusters; change against nothing put back into the same prompt (* q < 0.05).",
        "",
        "| prompt + latents | own answer | change | donor's answer |",
        "|---|---|---|---|",
    ]
    for name in names:
        state, _, rest = name.partition(" + ")
        change = ""
        if rest != "nothing":
            row = row_of(tables["effects"], name, f"{state} + nothing")
            change = interval(row, "difference") + ("*" if row["q"] < 0.05 else "")
        donor = tables["donor_levels"]
        donor = donor[donor["condition"] == name]
        shown = interval(donor.iloc[0]) if len(donor) and rest.startswith("other value") else ""
        lines.append(f"| {name} | {interval(row_of(tables['levels'], name))} | {change} | {shown} |")
    texts = ["\n".join(lines)]
    leak = row_of(tables["effects"], "leaky + nothing", "ablated + nothing")
    texts.append(
        f"**The leak.** Leaving the embeddings alone gives {interval(leak, 'difference')} points more accuracy than "
        "the whole ablation."
    )
    for level in ("vectors", "slots"):
        row = row_of(tables["effects"], f"ablated + same value {level}", f"ablated + other value {level}")
        texts.append(
            f"**What the latents carry ({level}).** Same value against other value: "
            f"{interval(row, 'difference')} points "
            + ("(survives correction)." if row["q"] < 0.05 else "(does not survive correction).")
        )
    return texts


def figure_of(tables: dict[str, pd.DataFrame], names: Sequence[str]) -> Any:
    """Whose answer comes, for every prompt and kind of latents."""
    figure, axes = new_figure(1, 1, height=0.8 + 0.21 * len(names))
    axis = axes[0, 0]
    own, donor = (tables[name].set_index("condition") for name in ("levels", "donor_levels"))
    for table, colour, marker, label, shift in (
        (own, SERIES[0], "o", "the prompt's own answer", -0.1),
        (donor, SERIES[1], "D", "the donor's answer", 0.1),
    ):
        shown = [(place, name) for place, name in enumerate(names) if name in table.index]
        if label.startswith("the donor"):
            shown = [(place, name) for place, name in shown if " other value " in name]
        rows = table.loc[[name for _, name in shown]]
        draw_points(
            axis, 100 * rows["mean"].to_numpy(float), [place + shift for place, _ in shown], label, 0,
            across=spread(rows, scale=100), color=colour, marker=marker,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="y", linewidth=0.3, color=GUIDE)
    axis.set(xlabel="prompts (%)", xlim=(-2, 102), title="Prompt + latents put in: whose answer comes?")
    legend(figure, axes)
    return figure


def main(config: Config) -> None:
    """Load, run, print the summary."""
    load_prompts(config, known_steps=3)
    model = load_model(config)
    split = load_prompts(config, model.protocol.question_suffix, known_steps=3)
    print(run(config, model, split, stderr).text)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)

"""Results of a comparison -> tables, plots, and a page that says what was done and who is best at what."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .comparison import write_json, write_text
from .comparison_settings import Amount, Comparison
from .configuration import METHODS
from .model_card import escape
from .scoring import bootstrap_intervals
from .tables import METRIC_TITLES, finite_or_none, table
from .version import __version__

# Of these three, a method that changes nothing wins one, and a method that forgets everything else the other two.
MAIN_METRICS = ("edit_success", "generalization", "locality")
GENERATED = tuple(f"{name}_generated" for name in METRIC_TITLES)
PERPLEXITY = "perplexity"
# Colours of Okabe & Ito, which the colour-blind tell apart; markers for those who print in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Results:
    """What `run_comparison` found, by method and amount.

    Attributes:
        comparison: what was run.
        before: result of the unedited model's job.
        editors: {method: result of the making of its editor}.
        cells: {(method, name of the amount): result}. Any result may be `{"error": ...}`.
    """

    comparison: Comparison
    before: Mapping[str, Any]
    editors: Mapping[str, Mapping[str, Any]]
    cells: Mapping[tuple[str, str], Mapping[str, Any]]

    @classmethod
    def of(cls, comparison: Comparison, found: Mapping[str, Mapping[str, Any]]) -> "Results":
        """From what `run_comparison` returned."""
        pairs = [(name, amount.name) for amount in comparison.amounts for name in comparison.methods]
        editors = {name: found[f"editors/{name}"] for name in comparison.methods}
        return cls(comparison, found["before"], editors, {pair: found[f"cells/{pair[0]}-{pair[1]}"] for pair in pairs})

    @property
    def failures(self) -> dict[str, str]:
        """{cell: its error}."""
        return {f"{m}, {a}": str(cell["error"]) for (m, a), cell in self.cells.items() if "error" in cell}

    def measured(self, amount: Amount) -> dict[str, Mapping[str, Any]]:
        """{method: result} of the cells of an amount that did not fail."""
        found = {method: self.cells[method, amount.name] for method in self.comparison.methods}
        return {method: cell for method, cell in found.items() if "error" not in cell}


def write_report(results: Results) -> str:
    """Write `report.md`, `results.json` and the plots into the comparison's folder.

    Returns:
        The tables of scores and costs, for a terminal.
    """
    folder = Path(results.comparison.output_dir)
    rows = [{name: finite_or_none(value) for name, value in row.items()} for row in _rows(results)]
    write_json(folder / "results.json", rows)
    plots = {}
    if any(results.measured(amount) for amount in results.comparison.amounts):
        plots = {
            "scores.png": ("Scores against the number of facts", _plot_scores),
            "tradeoff.png": ("Generalization against locality", _plot_tradeoff),
            "costs.png": ("Seconds and memory", _plot_costs),
        }
        if not any({"generalization", "locality"} <= set(cell.get("scores", ())) for cell in results.cells.values()):
            del plots["tradeoff.png"]  # facts without rephrases, or without unrelated prompts
        for name, (_, draw) in plots.items():
            draw(results, folder / name)
    tables = score_tables(results)
    sections = [
        f"# Comparison on {Path(_source(results.comparison)).name}",
        _introduction(results),
        tables,
        "## Best on each metric",
        _best(results),
        *(f"![{title}]({name})" for name, (title, _) in plots.items()),
        "## How each editor was made",
        _making(results),
        "## Settings",
        _settings(results),
    ]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")
    return tables


def score_tables(results: Results) -> str:
    """Scores with intervals and costs, as Markdown; one part an amount. The same results give the same text."""
    parts = []
    for amount in results.comparison.amounts:
        parts += [f"## {amount.title}", *_tables_of(results, amount)]
    if results.failures:
        lines = [f"- {name}: {escape(error)}" for name, error in results.failures.items()]
        parts += ["## Failed", "\n".join(lines)]
    return "\n\n".join(parts)


def best(results: Results, amount: Amount, metric: str) -> list[str]:
    """The methods that are best on a metric: the one with the best mean first, then those that it does not beat.

    A method is beaten when the 95 % bootstrap interval of the difference, over the same facts (of perplexity: texts),
    leaves out 0. One whose mean is not finite, as of a model that overflows, is none of them. There are none where
    fewer than two facts, or texts, were scored.
    """
    cells = results.measured(amount)
    found = {method: _sample(cell, metric) for method, cell in cells.items()}
    # One fact does not tell a difference from chance: resampled, it gives an interval of no width.
    samples = {m: sample for m, sample in found.items() if sample is not None and (sample[1] > 0).sum() > 1}
    with np.errstate(invalid="ignore"):  # infinities of both signs
        means = {m: np.average(values, weights=weights) for m, (values, weights) in samples.items()}
    means = {method: mean for method, mean in means.items() if math.isfinite(mean)}
    if not means:
        return []
    ordered = sorted(means, key=lambda method: -means[method])
    first, weights = samples[ordered[0]]
    winners = ordered[:1]
    for method in ordered[1:]:
        difference = (first - samples[method][0])[:, None]
        ((low, _),) = bootstrap_intervals(difference, weights[:, None], seed=results.comparison.seed)
        if low <= 0:
            winners.append(method)
    return winners


def unbeaten(results: Results, amount: Amount) -> list[str]:
    """The methods than which no other has a higher mean on edit success, generalization and locality alike.

    One of which such a mean is not finite is none of them, and beats none.
    """
    measured = {m: cell["scores"] for m, cell in results.measured(amount).items()}
    cells = {m: s for m, s in measured.items() if all(math.isfinite(s[name]) for name in MAIN_METRICS if name in s)}

    def beats(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
        shared = [name for name in MAIN_METRICS if name in a and name in b]
        return bool(shared) and all(a[name] > b[name] for name in shared)

    return [m for m, scores in cells.items() if not any(beats(other, scores) for other in cells.values())]


def _sample(cell: Mapping[str, Any], metric: str) -> tuple[Any, Any] | None:
    """Scores of single facts with their weights; of perplexity, minus the losses of texts: more is better."""
    if metric == PERPLEXITY:
        losses = [(loss, n) for loss, n in cell.get("losses") or () if n]
        counts = np.array([n for _, n in losses], dtype=np.float64)
        return (np.array([-loss / n for loss, n in losses]), counts) if losses else None
    if metric not in cell["per_fact"]:
        return None
    scores = cell["per_fact"][metric]
    values = np.array([0.0 if score is None else score for score in scores])
    # None is of a fact that has no such score; NaN, of one whose score is not finite, which counts.
    return values, np.array([score is not None for score in scores], dtype=np.float64)


def _tables_of(results: Results, amount: Amount) -> list[str]:
    cells = results.measured(amount)
    some: Mapping[str, Any] = next(iter(cells.values()), {"scores": {}})
    parts = []
    for names, way in ((tuple(METRIC_TITLES), "teacher-forced"), (GENERATED, "generated")):
        shown = [name for name in names if name in some["scores"]]
        if not shown:
            continue
        rows = [["unedited", *(_number(some["scores"][f"{name}_before"]) for name in shown)]]
        for method in results.comparison.methods:
            cell = cells.get(method)
            rows.append(
                [
                    method,
                    *(_with_interval(cell["scores"][n], cell["intervals"][n]) if cell else "failed" for n in shown),
                ]
            )
        n_facts = some["n_scored" if way == "teacher-forced" else "n_generated"]
        titles = [METRIC_TITLES[name.removesuffix("_generated")] for name in shown]
        parts.append(table([f"{way}, {n_facts:,} facts", *titles], rows))
    rows = []
    for method in results.comparison.methods:
        cell = cells.get(method)
        if cell is None:
            rows.append([method, *["failed"] * 4])
            continue
        before, after = (cell.get("perplexity", {}).get(when) for when in ("before", "after"))
        rows.append(
            [
                method,
                _number(before[0], digits=2) if before else "not measured",
                _with_interval(after[0], after[1:], digits=2) if after else "not measured",
                f"{cell['seconds']:.1f}",
                _gib(cell["peak_memory"]),
            ]
        )
    header = ["side effects and costs", "perplexity before", "perplexity after", "seconds", "peak GiB"]
    parts.append(table(header, rows))
    return parts


def _with_interval(score: float, ends: Sequence[float], digits: int = 3) -> str:
    if not math.isfinite(score):
        return _number(score)
    if any(map(math.isnan, ends)):
        return _number(score, digits)
    return f"{score:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _number(score: float, digits: int = 3) -> str:
    return f"{score:.{digits}f}" if math.isfinite(score) else "not finite"


def _gib(memory: Mapping[str, int]) -> str:
    text = f"{memory['memory'] / 2**30:.2f}"
    return text + (f" + {memory['accelerator'] / 2**30:.2f} on the GPU" if "accelerator" in memory else "")


def _source(comparison: Comparison) -> str:
    return str(comparison.facts or comparison.test_facts)


def _introduction(results: Results) -> str:
    comparison = results.comparison
    evaluation, environment = comparison.evaluation, results.before.get("environment", {})
    facts = comparison.facts or f"{comparison.train_facts}, {comparison.validation_facts}, {comparison.test_facts}"
    where = ", ".join(f"{name} {value}" for name, value in environment.items())
    texts = f"Perplexity is of `{comparison.texts}`." if comparison.texts else "Perplexity was not measured."
    return "\n".join(
        [
            f"Base model `{comparison.base_model}`; facts `{facts}`; hf_malmen {__version__}; {where}.",
            "",
            f"Every method edited the same test facts. Of each cell, up to {evaluation.max_facts:,} edited facts were "
            f"scored teacher-forced, with up to {evaluation.rephrases_per_fact} rephrases each, and up to "
            f"{evaluation.max_generated:,} by free generation: a subset drawn with seed {comparison.seed}, the same "
            f"for all methods. {texts} In brackets, 95 % bootstrap intervals over facts (of perplexity: texts): what "
            "other facts of this kind would give, not what another training run would. Seconds are of computing the "
            "edit and adding it to the weights, once; peak GiB is the most that the process held until then, with the "
            "model. Locality is the share of unrelated answers that stay as they were; a method that changes nothing "
            "has 1.",
        ]
    )


def _best(results: Results) -> str:
    lines = []
    metrics = METRIC_TITLES | {f"{name}_generated": f"{title}, generated" for name, title in METRIC_TITLES.items()}
    metrics |= {PERPLEXITY: "perplexity after the edit"}
    for amount in results.comparison.amounts:
        lines.append(f"**{amount.title}**\n")
        for name, title in metrics.items():
            if winners := best(results, amount, name):
                tie = " (a tie)" if len(winners) > 1 else ""
                lines.append(f"- {title}: {', '.join(winners)}{tie}")
        scores = {name for cell in results.measured(amount).values() for name in cell["scores"]}
        left = ", ".join(unbeaten(results, amount)) or "none measured"
        lines.append(f"- not beaten on all of {_titles(scores)}, by means: {left}\n")
    note = (
        "Methods stand together where the 95 % interval of the difference to the first, over the same facts, holds 0; "
        "where fewer than two facts, or texts, were scored, none is named. "
        "A win on locality or perplexity alone may be that of a method that hardly edits: read it with edit success."
    )
    return f"{note}\n\n" + "\n".join(lines).rstrip()


def _making(results: Results) -> str:
    parts = []
    for method, made in results.editors.items():
        search = results.comparison.methods[method].search
        head = f"**{method}** ({METHODS[method].reference}): "
        if "error" in made:
            parts.append(f"{head}failed: {escape(made['error'])}")
            continue
        parts.append(f"{head}{made['how']}, {made['seconds']:.0f} s, {made['n_parameters']:,} parameters.")
        if search and made["trials"]:
            won = max(made["trials"], key=lambda trial: trial["score"])
            scored = {name for trial in made["trials"] for scores in trial["by_size"].values() for name in scores}
            ranges = ", ".join(f"{name} in {values}" for name, values in search.items())
            parts.append(
                f"Searched: {ranges}; {len(made['trials'])} trials (Latin hypercube, logarithmic), each editing "
                f"{' and '.join(map(str, results.comparison.tuning.sizes))} validation facts at once. Score: harmonic "
                f"mean of {_titles(scored)}. Won: {_values(won['values'])}."
            )
            rows = []
            for trial in sorted(made["trials"], key=lambda trial: -trial["score"]):
                scores = [
                    " / ".join(f"{scores[name]:.3f}" for name in MAIN_METRICS if name in scores)
                    for scores in trial["by_size"].values()
                ]
                failed = f"failed: {escape(trial['error'])}" if trial["error"] else ""
                shown = "; ".join(scores) or failed
                rows.append([_values(trial["values"]), f"{trial['score']:.3f}", shown, f"{trial['seconds']:.0f}"])
            parts.append(table(["setting", "score", "ES / GS / locality", "seconds"], rows))
    return "\n\n".join(parts)


def _titles(names: Collection[str]) -> str:
    """Of the main metrics among the names: others were not measured, as of facts without rephrases."""
    return ", ".join(METRIC_TITLES[name] for name in MAIN_METRICS if name in names) or "no metric"


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _settings(results: Results) -> str:
    text = yaml.safe_dump(asdict(results.comparison), sort_keys=False, allow_unicode=True)
    return f"```yaml\n{text}```"


def _rows(results: Results) -> list[dict[str, Any]]:
    """One row a method, amount and score; and one for each cell that failed."""
    rows: list[dict[str, Any]] = []
    for amount in results.comparison.amounts:
        for method in results.comparison.methods:
            cell = results.cells[method, amount.name]
            head = {"method": method, **asdict(amount)}
            if "error" in cell:
                rows.append({**head, "error": cell["error"]})
                continue
            scores = {n: s for n, s in cell["scores"].items() if not n.endswith("_before")}
            for name, score in scores.items():
                low, high = cell["intervals"][name]
                row = {"metric": name, "score": score, "low": low, "high": high}
                rows.append({**head, **row, "before": cell["scores"][f"{name}_before"]})
            if PERPLEXITY in cell:
                (before, _, _), (score, low, high) = (cell[PERPLEXITY][when] for when in ("before", "after"))
                rows.append({**head, "metric": PERPLEXITY, "score": score, "low": low, "high": high, "before": before})
            rows.append({**head, "metric": "seconds", "score": cell["seconds"]})
            rows += [{**head, "metric": f"peak {k}", "score": v} for k, v in cell["peak_memory"].items()]
    return rows


# Plots


def _drawable(values: Sequence[float] | None) -> tuple[float, float, float] | None:
    """A score and its interval as they can be drawn: around the score; None where it was not measured or not finite."""
    if values is None or not math.isfinite(values[0]):
        return None
    score, *ends = values
    low, high = (end if math.isfinite(end) else score for end in ends)
    # Rounding can leave a mean 1e-16 outside its interval, and matplotlib takes no negative spread.
    return score, min(low, score), max(high, score)


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    return {
        method: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, method in enumerate(results.comparison.methods)
    }


def _plot_scores(results: Results, path: Path) -> None:
    """A panel a score, a line a method with its interval as a band; hollow, the cell that was edited in turns."""
    from matplotlib.figure import Figure  # a second to import
    from matplotlib.ticker import LogFormatter

    def of_score(name: str) -> Callable[[Mapping[str, Any]], tuple[float, float, float] | None]:
        return lambda cell: (
            _drawable((cell["scores"][name], *cell["intervals"][name])) if name in cell["scores"] else None
        )

    panels: dict[str, Any] = {title: of_score(name) for name, title in METRIC_TITLES.items()}
    panels |= {f"{METRIC_TITLES[name]}, generated": of_score(f"{name}_generated") for name in MAIN_METRICS}
    panels |= {"perplexity of other text": lambda cell: _drawable(cell.get(PERPLEXITY, {}).get("after"))}
    cells = [cell for cell in results.cells.values() if "error" not in cell]
    panels = {title: read for title, read in panels.items() if any(read(cell) for cell in cells)}
    columns = max(1, min(4, len(panels)))
    n_rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(3.4 * columns, 3.1 * n_rows + 0.5), layout="constrained")
    grid = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axes, (title, read) in zip(grid, panels.items(), strict=False):
        for method, style in _styles(results).items():
            found = {a: results.cells[method, a.name] for a in results.comparison.amounts}
            points = [(a, read(cell)) for a, cell in found.items() if "error" not in cell and read(cell)]
            at_once = sorted((a.n_facts, *values) for a, values in points if a.facts_per_turn is None)
            if at_once:
                x, y, low, high = zip(*at_once, strict=True)
                axes.plot(x, y, label=method, ms=5, lw=1.3, **style)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
            for a, (y, low, high) in points:
                if a.facts_per_turn is not None:
                    label = None if at_once else method
                    spread = [[y - low], [high - y]]
                    axes.errorbar(a.n_facts, y, spread, label=label, mfc="white", capsize=2, lw=1, ls="none", **style)
        ticks = sorted({amount.n_facts for amount in results.comparison.amounts})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks], fontsize="small")
        axes.minorticks_off()
        if title.startswith("perplexity"):
            before = next(cell[PERPLEXITY]["before"][0] for cell in cells if PERPLEXITY in cell)
            if math.isfinite(before):
                axes.axhline(before, color="grey", ls=":", lw=1)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))  # labels where there is room
            axes.tick_params(axis="y", which="both", labelsize="x-small")
        else:
            axes.set_ylim(-0.02, 1.02)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    # Of all panels: a method may have no number in the first one.
    drawn = {name: handle for axes in grid for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    turns = "; hollow: edited in turns" if results.comparison.turns else ""
    title = f"against the number of facts edited; bands: 95 % intervals{turns}"
    columns = max(1, len(drawn))
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=columns, title=title)
    figure.savefig(path, dpi=130, format="png")


def _plot_tradeoff(results: Results, path: Path) -> None:
    """Generalization against locality, a panel an amount: up and right is better."""
    from matplotlib.figure import Figure

    amounts = results.comparison.amounts
    columns = min(3, len(amounts))
    n_rows = -(-len(amounts) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.5 * n_rows + 0.4), layout="constrained")
    grid = figure.subplots(n_rows, columns, squeeze=False).ravel()
    drawn: dict[str, Any] = {}
    for axes, amount in zip(grid, amounts, strict=False):
        for method, cell in results.measured(amount).items():
            if not {"generalization", "locality"} <= set(cell["scores"]):
                continue
            x_drawn, y_drawn = (
                _drawable((cell["scores"][name], *cell["intervals"][name])) for name in ("generalization", "locality")
            )
            if x_drawn is None or y_drawn is None:
                continue
            (x, *x_ends), (y, *y_ends) = x_drawn, y_drawn
            drawn[method] = axes.errorbar(
                x,
                y,
                yerr=[[y - y_ends[0]], [y_ends[1] - y]],
                xerr=[[x - x_ends[0]], [x_ends[1] - x]],
                ms=7,
                capsize=2,
                lw=1,
                ls="none",
                **_styles(results)[method],
            )
            success = cell["scores"]["edit_success"]
            text = {"textcoords": "offset points", "fontsize": "x-small", "color": _styles(results)[method]["color"]}
            axes.annotate(f"{success:.2f}", (x, y), (5, 5), **text)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), xlabel="generalization", ylabel="locality")
        axes.set_title(amount.title, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in grid[len(amounts) :]:
        axes.set_visible(False)
    title = "up and right is better; numbers: edit success"
    columns = max(1, len(drawn))
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=columns, title=title)
    figure.savefig(path, dpi=130, format="png")


def _plot_costs(results: Results, path: Path) -> None:
    """Bars of seconds (logarithmic) and of peak memory, a group an amount."""
    from matplotlib.figure import Figure

    amounts, styles = results.comparison.amounts, _styles(results)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = {
        "seconds to edit": lambda cell: cell["seconds"],
        "peak memory (GiB)": lambda cell: sum(cell["peak_memory"].values()) / 2**30,
    }
    grid = figure.subplots(1, len(panels))
    width = 0.84 / len(styles)
    for axes, (title, read) in zip(grid, panels.items(), strict=True):
        for i, (method, style) in enumerate(styles.items()):
            found = [(j, results.measured(amount).get(method)) for j, amount in enumerate(amounts)]
            bars = [(j, read(cell)) for j, cell in found if cell is not None]
            positions = [j + (i - (len(styles) - 1) / 2) * width for j, _ in bars]
            axes.bar(positions, [value for _, value in bars], width, label=method, color=style["color"])
        labels = [amount.name.replace("x", " x ") for amount in amounts]
        axes.set_xticks(range(len(amounts)), labels)
        axes.set_xlabel("facts" + (" (turns x facts)" if results.comparison.turns else ""))
        axes.tick_params(axis="x", labelsize="small")
        axes.set_title(title, fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
    grid[0].set_yscale("log")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
    figure.savefig(path, dpi=130, format="png")

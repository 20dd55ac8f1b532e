"""Gen. PPL against entropy over temperature or noise, since rankings at one temperature flip."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.evaluation import finish_perplexity
from figures.style import run_style
from ldlm_hf.hub.training_curves import WIDTH


def plot_frontier(results: dict[str, dict[str, Any]]) -> Figure:
    """A curve a method, by entropy, through the samplers of its results; the first of them is filled."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for place, (title, one) in enumerate(results.items()):
        means = [entry["sets"][0]["mean"] for entry in one["pipelines"]]
        points = [
            (mean["entropy"], mean["generative_perplexity"], number)
            for number, mean in enumerate(means)
            if mean["generative_perplexity"] is not None
        ]
        style = run_style(place)
        entropies, perplexities, numbers = zip(*sorted(points), strict=True) if points else ((), (), ())
        axes.plot(entropies, perplexities, label=title, linewidth=1.2, markersize=5, markerfacecolor="white", **style)
        for entropy, perplexity, number in zip(entropies, perplexities, numbers, strict=True):
            if number == 0:
                axes.plot([entropy], [perplexity], markersize=6, **style)
    real = next(iter(results.values()))["real_text"]
    axes.scatter(real["entropy"], real["generative_perplexity"], marker="*", s=160, color="black", label="real text")
    axes.set_title("Filled: the sampler of the tables.", fontsize="small", loc="left")
    finish_perplexity(axes, list(results.values()), "entropy (nats)")
    return figure

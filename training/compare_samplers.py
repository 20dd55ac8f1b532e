"""Which sampler is best for how many evaluations of the denoiser, from results of `evaluate.py`.

    python training/compare_samplers.py RESULTS.json [MORE ...] --output_dir FOLDER
        [--reference "NAME, SAMPLER"] [--reference_nfe 128] [--entropy_tolerance 0.02]

writes FOLDER/samplers.md, with a table of each score over the evaluations and the best sampler of each column, and
the figures samplers_perplexity and samplers_mauve, as PNG. The files may be of one pipeline and of its
distilled students.

Perplexity falls when texts lose diversity, so it ranks samplers at matched entropy only: a set counts where its mean
entropy is not more than the tolerance below that of the reference, the paper's sampler with many evaluations. MAUVE
sees a loss of diversity itself and ranks them all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from figures.result_files import read_results
from figures.samplers import FIGURES, find_reference, plot_samplers, report, scored_samplers
from figures.style import save_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json of evaluations")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--reference", metavar="NAME", help="as the results call it; default: the first Euler–Maruyama"
    )
    parser.add_argument("--reference_nfe", type=int, default=128)
    parser.add_argument("--entropy_tolerance", type=float, default=0.02)
    options = parser.parse_args()
    results = read_results(options.results)
    samplers = scored_samplers(results)
    reference = find_reference(samplers, options.reference, options.reference_nfe)
    text = report(results, samplers, reference, options.reference_nfe, options.entropy_tolerance)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "samplers.md").write_text(text + "\n", encoding="utf-8")
    for name, scores in FIGURES.items():
        save_figure(plot_samplers(results[0]["real_text"], samplers, reference, scores), options.output_dir / name)
    print(text)


if __name__ == "__main__":
    main()

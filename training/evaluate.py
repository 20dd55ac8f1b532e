"""Evaluates pipelines: samples of several seeds and numbers of steps, scored beside real text.

    python training/evaluate.py --pipeline RUN/pipeline [OTHER ...] --config training/configs/NAME.yaml \
        --output_dir FOLDER --num_samples 1000 --seeds 5 --steps 8 16 32 64 128 256 512 1024 \
        [--judge JUDGE|none] [--controls] [--interpolation] [data.key=value ...]

    python training/evaluate.py --task continuation --guidance_scales 1 1.5 2 3 [--bert_score MODEL:LAYER] ...

on several GPUs with `accelerate launch` instead of `python`; `ldlm_hf/evaluation/run.py` says what it does and writes.
With a judge, the figures `pareto.png` (Gen. PPL against entropy), `evaluations.png` (every score over the evaluations
of the denoiser) and `interpolation.png` (Gen. PPL between two real texts) are drawn beside its results; for texts that
are given in part, `guidance.png` (their scores over the weight of what is given).

Python looks for modules beside the script that it runs first, so for all scripts of this folder this file hides the
package `evaluate`, which the metrics are built on. Imported by that name, it steps aside for the package.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def load_hidden_package() -> None:
    """Puts the installed package `evaluate` in this file's place."""
    folder = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("evaluate", [path for path in sys.path if Path(path).resolve() != folder])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("The metrics need the package evaluate: pip install evaluate.", name="evaluate")
    package = module_from_spec(spec)
    sys.modules["evaluate"] = package
    spec.loader.exec_module(package)


def parse_arguments() -> argparse.Namespace:
    """The options that are given; `EvaluationOptions` has the defaults of the others."""
    from ldlm_hf.evaluation.options import TASKS
    from ldlm_hf.loading.settings_reader import positive

    parser = argparse.ArgumentParser(
        description="Samples pipelines and scores the samples beside real text.", argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--pipeline", nargs="+", required=True, metavar="PATH_OR_ID", help="folders or Hub ids of pipelines")
    add("--names", nargs="+", metavar="LABEL", help="what the results call them; by default the names of their runs")
    add("--output_dir", type=Path, required=True, help="folder of the results")
    add("--num_samples", type=positive, help="texts of each set")
    add("--seeds", type=positive, metavar="N", help="sets for each number of steps: seeds 0 to N - 1")
    add("--steps", type=positive, nargs="+", help="denoising steps")
    add(
        "--samplers",
        nargs="+",
        metavar="NAME[:key=value,...]",
        help="schedulers and their settings, each for all pipelines and steps; by default the pipelines' own",
    )
    add("--judge", help="causal language model (Hub id, folder, package:NAME/FILE.gguf), or none")
    add("--no_mauve", action="store_true", help="leave MAUVE out")
    add("--batch_size", type=positive, help="texts that a process samples at a time")
    add("--judge_batch_size", type=positive, help="texts that the judge reads at a time")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the pipelines' weights")
    add("--controls", action="store_true", help="also score real texts of shuffled words, and of few words repeated")
    add("--interpolation", action="store_true", help="also decode lines between the latents of real texts")
    add("--num_pairs", type=positive, help="lines; by default half the number of samples")
    add("--num_positions", type=positive, help="evenly spaced points of each line, its ends included")
    add("--task", choices=TASKS, help="write whole texts, continue held-out prompts, or fill gaps in held-out texts")
    add("--prompt_tokens", type=positive, help="of a held-out text that are continued; by default half of them")
    add("--gap_tokens", type=positive, help="in the middle of a text that are written; by default a quarter of them")
    add("--guidance_scales", type=float, nargs="+", metavar="V", help="weights of what is given, each a set")
    add(
        "--steering_scales",
        type=float,
        nargs="+",
        metavar="LAMBDA",
        help="steer pipelines that take no prompts by the likelihood of what is given, with these weights",
    )
    add("--bert_score", metavar="MODEL:LAYER", help="language model that written and real tokens are compared in")
    add("--cache_dir", type=Path, help="folder of MAUVE's reference features, for evaluations to share")
    add("--config", default=None, metavar="YAML", help="file whose section data: names the text, such as a run's")
    add("overrides", nargs="*", default=[], metavar="data.key=value", help="settings of the text, over the file's")
    return parser.parse_intermixed_args()


def main() -> None:
    from figures.conditional import draw_guidance
    from figures.evaluation import draw_figures
    from ldlm_hf.evaluation.conditional_run import evaluate_conditionally
    from ldlm_hf.evaluation.options import EvaluationOptions
    from ldlm_hf.evaluation.real_text import load_data_settings
    from ldlm_hf.evaluation.run import evaluate_pipelines

    arguments = vars(parse_arguments())
    data = load_data_settings(arguments.pop("config"), arguments.pop("overrides"))
    options = EvaluationOptions(**arguments)
    if options.task == "unconditional":
        evaluate_pipelines(options, data, partial(draw_figures, folder=options.output_dir))
    else:
        evaluate_conditionally(options, data, partial(draw_guidance, folder=options.output_dir))


if __name__ == "__main__":
    main()
else:
    load_hidden_package()

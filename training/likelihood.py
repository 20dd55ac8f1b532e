"""Bounds the likelihood of held-out text, each term by itself (App. A.1 of the paper; docs/likelihood.md).

    python training/likelihood.py --pipeline RUN/pipeline [--encoder_noise S] [--num_sequences N] [data.key=value ...]

prints a table, and writes it with its settings as `likelihood.json` and `likelihood.md`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from dataclasses import fields
from pathlib import Path

import torch

from ldlm_hf.data import load_corpora
from ldlm_hf.evaluation.likelihood import (
    ENCODER_NOISE_SHARE,
    LikelihoodOptions,
    load_bounded_pipeline,
    measure_bound,
    run_of,
    trained_decoder_noise,
)
from ldlm_hf.evaluation.likelihood_report import report
from ldlm_hf.evaluation.machine import hardware, versions
from ldlm_hf.evaluation.provenance import source
from ldlm_hf.evaluation.real_text import load_data_settings
from ldlm_hf.objective import AdaptiveTimestepSampler
from ldlm_hf.objective.time_proposals import PROPOSALS
from ldlm_hf.training.checkpoints import find_checkpoints


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of a pipeline with encoders")
    parser.add_argument("--config", help="YAML file with a section `data`; by default the run's settings.yaml")
    parser.add_argument("--num_sequences", type=int, default=256, help="held-out sequences")
    parser.add_argument(
        "--times_per_sequence", type=int, default=16, help="draws of all noise and of a time, for each"
    )
    parser.add_argument("--encoder_noise", type=float, help="s_enc; a tenth of the decoder noise by default (ours)")
    parser.add_argument("--decoder_noise", type=float, help="delta; by default the run's own, from its settings.yaml")
    parser.add_argument(
        "--hidden_noise", type=float, help="s_dec; by default the RMS error of hidden states on training text (ours)"
    )
    parser.add_argument(
        "--end_time",
        type=float,
        help="where the prior's reverse process ends (sampling: t_min); by default where the bound is tightest on "
        "training text (ours)",
    )
    parser.add_argument(
        "--latent_noise", type=float, help="error it expects there; by default the RMS error on training text (ours)"
    )
    parser.add_argument("--tokens_only", action="store_true", help="leave the hidden states' likelihood out")
    parser.add_argument("--self_conditioning", action="store_true", help="give the denoiser its own first estimate")
    parser.add_argument("--proposal", choices=PROPOSALS, default="log_snr", help="density that times are drawn from")
    parser.add_argument(
        "--timestep_sampler",
        metavar="RUN|CHECKPOINT|FILE",
        help="with --proposal adaptive: a run, a checkpoint or its rank_0.pt; the pipeline's run by default",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="sequences of one pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="RUN/likelihood, or runs/likelihood, by default")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="settings, over those of the file")
    arguments = parser.parse_intermixed_args()
    for name, least in (("num_sequences", 2), ("times_per_sequence", 2), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least {least}")
    if arguments.tokens_only and arguments.hidden_noise is not None:
        parser.error("--hidden_noise is a setting of the likelihood that --tokens_only leaves out")
    if arguments.timestep_sampler is not None and arguments.proposal != "adaptive":
        parser.error("--timestep_sampler goes with --proposal adaptive")
    return arguments


def likelihood_options(arguments: argparse.Namespace, run: Path | None) -> LikelihoodOptions:
    """The options of the command line; noise levels of the encoders that it does not give are the run's."""
    given = {field.name: getattr(arguments, field.name) for field in fields(LikelihoodOptions)}
    if given["decoder_noise"] is None:
        given["decoder_noise"] = trained_decoder_noise(run)
    if given["encoder_noise"] is None:
        if given["decoder_noise"] == 0:
            raise ValueError("--encoder_noise is not given, and a tenth of --decoder_noise 0 is no noise: give it.")
        given["encoder_noise"] = ENCODER_NOISE_SHARE * given["decoder_noise"]
    return LikelihoodOptions(**given)


def load_timestep_sampler(path: Path) -> AdaptiveTimestepSampler:
    """The sampler of a run's newest checkpoint, of a checkpoint, or of its file; OSError where there is none, and
    ValueError for a run that sampled uniformly.
    """
    file = [path, *find_checkpoints(path)][-1] / "rank_0.pt" if path.is_dir() else path
    if not file.is_file():
        raise OSError(f"--timestep_sampler {str(path)!r} holds no checkpoint; use --proposal log_snr.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)["task"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise OSError(f"--timestep_sampler {str(path)!r}: {file.name} is no file of a checkpoint.") from error
    if not state:
        raise ValueError(
            f"--timestep_sampler {str(path)!r} belongs to a run that sampled its times uniformly; use --proposal "
            "uniform or log_snr."
        )
    sampler = AdaptiveTimestepSampler(num_bins=state["num_bins"])
    sampler.load_state_dict(state)
    return sampler


def main() -> None:
    arguments = parse_arguments()
    pipeline = load_bounded_pipeline(arguments.pipeline, arguments.tokens_only)
    run = run_of(arguments.pipeline)
    options = likelihood_options(arguments, run)
    config = arguments.config or (None if run is None else str(run / "settings.yaml"))
    data = load_data_settings(config, arguments.overrides)
    sampler = None
    if options.proposal == "adaptive":
        folder = arguments.timestep_sampler or run
        if folder is None:
            raise ValueError("--proposal adaptive needs --timestep_sampler RUN, where the sampler's state is.")
        sampler = load_timestep_sampler(Path(folder))
    corpora = load_corpora(data, pipeline.tokenizer, pipeline.latent_encoder.config.sequence_length)

    start = time.monotonic()
    results = {
        "pipeline": source(arguments.pipeline).name if run is None else f"{run.name}/{Path(arguments.pipeline).name}",
        **measure_bound(pipeline, corpora, source(data.source).name, options, sampler),
        "versions": versions(),
        "hardware": hardware(pipeline.device),
        "seconds": time.monotonic() - start,
    }
    output_dir = arguments.output_dir or (Path("runs") if run is None else run) / "likelihood"
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "likelihood.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = report(results)
    (output_dir / "likelihood.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {output_dir}/likelihood.json, {output_dir}/likelihood.md")


if __name__ == "__main__":
    main()

"""Bounds the likelihood of held-out text, each term by itself (App. A.1 of the paper; docs/likelihood.md).

    python training/likelihood.py --pipeline RUN/pipeline [--encoder_noise S] [--num_sequences N] [data.key=value ...]

prints a table, and writes it with its settings as `likelihood.json` and `likelihood.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ldlm_hf.data import DataSettings, load_corpora
from ldlm_hf.evaluation.likelihood import (
    ENCODER_NOISE_SHARE,
    NUM_END_TIMES,
    calibrate,
    draw_terms,
    load_pipeline,
    load_timestep_sampler,
    report,
    run_of,
    summarize,
    trained_decoder_noise,
)
from ldlm_hf.evaluation.machine import hardware, versions
from ldlm_hf.evaluation.provenance import source
from ldlm_hf.evaluation.real_text import held_out_sequences, load_data_settings, training_sequences
from ldlm_hf.objective import LikelihoodBound, LikelihoodSettings
from ldlm_hf.objective.likelihood import (
    PROPOSALS,
    best_end_time,
    build_proposal,
)
from ldlm_hf.training.launch import check_held_out


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
    options = parser.parse_intermixed_args()
    for name, least in (("num_sequences", 2), ("times_per_sequence", 2), ("batch_size", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}")
    if options.tokens_only and options.hidden_noise is not None:
        parser.error("--hidden_noise is a setting of the likelihood that --tokens_only leaves out")
    if options.timestep_sampler is not None and options.proposal != "adaptive":
        parser.error("--timestep_sampler goes with --proposal adaptive")
    return options


def main() -> None:
    options = parse_arguments()
    pipeline = load_pipeline(options.pipeline, options.tokens_only)
    run = run_of(options.pipeline)
    if options.decoder_noise is None:
        options.decoder_noise = trained_decoder_noise(run)
    if options.encoder_noise is None:
        if options.decoder_noise == 0:
            raise ValueError("--encoder_noise is not given, and a tenth of --decoder_noise 0 is no noise: give it.")
        options.encoder_noise = ENCODER_NOISE_SHARE * options.decoder_noise
    config = options.config or (str(run / "settings.yaml") if run is not None else None)
    data: DataSettings = load_data_settings(config, options.overrides)
    sampler = None
    if options.proposal == "adaptive":
        if options.timestep_sampler is None and run is None:
            raise ValueError("--proposal adaptive needs --timestep_sampler RUN, where the sampler's state is.")
        sampler = load_timestep_sampler(Path(options.timestep_sampler or run))
    length = pipeline.latent_encoder.config.sequence_length
    corpora = load_corpora(data, pipeline.tokenizer, length)
    check_held_out(corpora)
    output_dir = options.output_dir or (run / "likelihood" if run is not None else Path("runs/likelihood"))

    start = time.monotonic()
    components = {name: part for name, part in pipeline.components.items() if name != "tokenizer"}
    settings = LikelihoodSettings(
        encoder_noise=options.encoder_noise,
        decoder_noise=options.decoder_noise,
        hidden_noise=options.hidden_noise,
        end_time=options.end_time or 0.0,
        self_conditioning=options.self_conditioning,
    )
    bound = LikelihoodBound(**components, settings=settings)
    device, d = pipeline.device, pipeline.scheduler.config.tangent_d
    seen = training_sequences(corpora.train, options.num_sequences)
    num_candidates = min(NUM_END_TIMES, len(seen)) if options.end_time is None else 1
    candidates = torch.linspace(bound.start, 1, num_candidates + 1, dtype=torch.float64)[:-1]
    measured = calibrate(bound, seen, candidates, options.batch_size, device, options.seed + 2)
    end_time, latent_noise = best_end_time(candidates, measured.latent_errors, options.encoder_noise, d)
    settings = replace(settings, end_time=end_time, latent_noise=latent_noise)
    if options.latent_noise is not None:
        settings = replace(settings, latent_noise=options.latent_noise)
    if options.hidden_noise is None and not options.tokens_only:
        settings = replace(settings, hidden_noise=measured.hidden_error)
    bound.settings = settings
    proposal = build_proposal(options.proposal, bound.start, d, measured.latent_std, sampler)
    sequences = held_out_sequences(corpora.validation, options.num_sequences)
    draws = draw_terms(
        bound, sequences, proposal, options.times_per_sequence, options.batch_size, device, options.seed
    )

    latent_config, vocab_size = pipeline.latent_encoder.config, pipeline.token_decoder.config.vocab_size
    results = {
        "pipeline": source(options.pipeline).name if run is None else f"{run.name}/{Path(options.pipeline).name}",
        "terms": summarize(draws),
        "uniform_nats_per_token": math.log(vocab_size),
        "settings": {
            **asdict(settings),
            "tangent_d": d,
            "proposal": options.proposal,
            "latent_std": measured.latent_std,
            "text": source(data.source).name,
            "num_sequences": len(sequences),
            "times_per_sequence": options.times_per_sequence,
            "seed": options.seed,
        },
        "sizes": {
            "sequence_length": length,
            "vocab_size": vocab_size,
            "latent_entries_per_token": latent_config.num_latents * latent_config.latent_size / length,
            "hidden_entries_per_token": latent_config.token_hidden_size,
        },
        "versions": versions(),
        "hardware": hardware(device),
        "seconds": time.monotonic() - start,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "likelihood.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = report(results)
    (output_dir / "likelihood.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {output_dir}/likelihood.json, {output_dir}/likelihood.md")


if __name__ == "__main__":
    main()

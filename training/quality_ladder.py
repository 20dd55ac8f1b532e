"""Where the quality of a pipeline's samples is lost on the way from real text.

    python training/quality_ladder.py --pipeline RUN/pipeline --config RUN/settings.yaml --output_dir FOLDER \
        [--num_samples 500] [--steps 128] [--judge JUDGE|none] [data.key=value ...]

prints and writes FOLDER/quality_ladder.md and .json: the scores of held-out text, of the same text decoded from its
latents, from noisy latents and after one denoising step, and of samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ldlm_hf.data import load_held_out
from ldlm_hf.evaluation.machine import hardware, keep_freed_memory, versions
from ldlm_hf.evaluation.provenance import source
from ldlm_hf.evaluation.quality_ladder import ladder_table, quality_ladder
from ldlm_hf.evaluation.real_text import held_out_sequences, load_data_settings
from ldlm_hf.evaluation.samples import load_pipeline_with_encoders, sample
from ldlm_hf.evaluation.scores import beside_real_text, judge_conditions
from ldlm_hf.loading.settings_reader import positive
from ldlm_hf.metrics import load_judge


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, metavar="PATH_OR_ID", help="folder or Hub id, with its encoders")
    add("--output_dir", type=Path, required=True, help="folder of the results")
    add("--num_samples", type=positive, default=500, help="texts of each rung")
    add("--steps", type=positive, default=128, help="denoising steps of the samples")
    add("--seed", type=int, default=0, help="of the samples")
    add("--judge", default="gpt2-large", help="causal language model (Hub id, folder, package:NAME/FILE), or none")
    add("--batch_size", type=positive, default=32, help="texts that are sampled or decoded at a time")
    add("--judge_batch_size", type=positive, default=8, help="texts that the judge reads at a time")
    add("--config", metavar="YAML", help="file whose section data: names the text, such as a run's")
    add("overrides", nargs="*", metavar="data.key=value", help="settings of the text, over the file's")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    data = load_data_settings(arguments.config, arguments.overrides)
    pipeline = load_pipeline_with_encoders(arguments.pipeline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.to(device).set_progress_bar_config(disable=True)
    judge = None if arguments.judge == "none" else load_judge(arguments.judge, device=device)
    held_out = load_held_out(data, pipeline.tokenizer, pipeline.sequence_length)
    chosen = held_out_sequences(held_out, 2 * arguments.num_samples)
    real, scorer = beside_real_text(
        chosen, arguments.num_samples, pipeline.tokenizer, judge, arguments.judge_batch_size
    )
    sequences, _ = sample(pipeline, arguments.num_samples, arguments.steps, arguments.seed, arguments.batch_size)
    results = {
        "pipeline": source(arguments.pipeline).name,
        "num_samples": arguments.num_samples,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "judge": judge and judge_conditions(judge),
        "hardware": hardware(device),
        "versions": versions(),
        "real_text": scorer.score(real).scores.to_json(),
        "ladder": quality_ladder(pipeline, real, scorer, arguments.batch_size),
        "sampled": scorer.score(sequences).scores.to_json(),
    }
    table = ladder_table(results["real_text"], results["ladder"], results["sampled"])
    conditions = (
        f"{len(real)} held-out texts, {len(sequences)} samples in {arguments.steps} steps, seed {arguments.seed}; "
        f"judge {results['judge']['name'] if judge else 'none'}; {results['hardware']}."
    )
    text = "\n".join(["# Quality ladder", "", *table, "", conditions, ""])
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "quality_ladder.md").write_text(text, encoding="utf-8")
    (arguments.output_dir / "quality_ladder.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

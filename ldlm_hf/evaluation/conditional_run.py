"""The evaluation of continuations and filled gaps: `evaluate.py --task continuation|infilling`.

It writes `results.json`, `results.md` and `samples.md` and goes on from `parts/` as [`run.evaluate_pipelines`] does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import DataSettings
from ..data.tokenization import END_TOKENS, special_id
from ..hub.model_card import fenced, marked
from ..metrics.bert_score import load_matcher
from ..metrics.judge import load_judge
from .conditional import ConditionalScorer, ConditionalSet, Task, make_sets
from .machine import hardware, versions
from .markdown import cell, markdown_table
from .options import EvaluationOptions
from .part_cache import FinishedParts, digest, write_whole
from .plan import Plan, common_device, load_subjects, make_missing
from .real_text import RealText, load_real_text
from .results import NUM_SHOWN, described_settings, over_seeds, shown_source
from .run import lock_parts, start_accelerator
from .scorer import build_scorer
from .scores import judge_conditions


# name in results.json → heading and digits of the table
COLUMNS = {
    "perplexity": ("PPL where given ↓", 1),
    "perplexity_elsewhere": ("PPL elsewhere", 1),
    "mauve": ("MAUVE ↑", 3),
    "rouge_l": ("ROUGE-L ↑", 3),
    "bert_score": ("BERTScore ↑", 3),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
    "repetition": ("seq-rep-4 ↓", 3),
    "entropy": ("entropy (nats)", 3),
    "given_kept": ("given tokens kept", 3),
    "seconds": ("sampling (s)", 1),
}


@dataclass(frozen=True)
class ConditionalEvaluation:
    """All sets, and their scores, each measured once."""

    sets: list[ConditionalSet]
    scorer: ConditionalScorer
    parts: FinishedParts
    depends_on: dict[str, Any]

    def score_real(self) -> dict[str, Any]:
        """Scores of the real text: its own words in its own place."""
        return self.score(self.scorer.real)

    def score_set(self, one: ConditionalSet) -> dict[str, Any]:
        """Scores of a set, and how it was made."""
        rows = one.rows.load(one.count)
        made = {"seed": one.seed, "nfe": int(rows["nfe"][0]), "seconds": float(rows["seconds"].sum())}
        return made | self.score(rows["sequences"].long())

    def score(self, sequences: Any) -> dict[str, Any]:
        make = partial(self.scorer.score, sequences)
        return self.parts.value("conditional-scores", make, sequences=digest(sequences.tolist()), **self.depends_on)


def evaluate_conditionally(
    options: EvaluationOptions, data: DataSettings, draw: Callable[[dict[str, Any]], None]
) -> None:
    """Has pipelines write into held-out texts, and scores what they wrote; every process calls this.

    `draw` draws the figures of results, before `results.json` is written.

    Raises:
        OSError: a pipeline cannot be loaded, or another evaluation works in the folder.
        ValueError: pipelines, judge or text that do not go together, or a pipeline that takes no prompts.
    """
    accelerator = start_accelerator()
    judge = None if options.judge_name is None else load_judge(options.judge_name, device=accelerator.device)
    matcher = None
    if options.bert_score is not None:
        name, _, layer = options.bert_score.rpartition(":")
        if not (name and layer.isdigit()):
            raise ValueError(f"--bert_score {options.bert_score!r} is no MODEL:LAYER, such as roberta-large:17.")
        matcher = load_matcher(name, int(layer), accelerator.device)
    subjects, tokenizer = load_subjects(options)
    if data.source_length != subjects[0].source_length:
        raise ValueError(
            f"data.source_length={data.source_length}, but the pipeline {subjects[0].name!r} has source_length="
            f"{subjects[0].source_length}: evaluate it on text of the kind that it was trained on."
        )
    task = Task.of(options, subjects[0].sequence_length, subjects[0].source_length)
    with accelerator.main_process_first():
        real = load_real_text(data, tokenizer, task.length, options.num_samples, with_references=options.with_mauve)
    if data.documents == "separate":
        real = long_enough(real, task, tokenizer)
    parts = FinishedParts(
        options.output_dir / "parts",
        versions() | {name: version(name) for name in ("evaluate", "mauve-text", "rouge-score")},
    )
    with lock_parts(parts) if accelerator.is_main_process else contextlib.nullcontext():
        device = common_device(accelerator)
        sets = make_sets(subjects, real.sequences, task, options, parts, device)
        make_missing(Plan(subjects, list(sets), []), options, accelerator)
        # for its references, and the judge's digest
        whole = build_scorer(real, judge, tokenizer, options, parts, accelerator)
        scorer = ConditionalScorer(
            task, real.sequences, tokenizer, judge, options.judge_batch_size, whole.references, matcher
        )
        depends_on = {
            "names": list(COLUMNS),
            "task": [task.start, task.stop],
            "real": digest(real.sequences.tolist()),
            "references": digest(real.reference_texts),
            "judge": whole.judge_digest,
            "bert_score": options.bert_score,
        }
        evaluation = ConditionalEvaluation(sets, scorer, parts, depends_on)
        score_missing(evaluation, accelerator)
        if accelerator.is_main_process:
            results = collect(evaluation, options, data, hardware(accelerator.device))
            write(evaluation, options, results, draw)
    accelerator.end_training()


def long_enough(real: RealText, task: Task, tokenizer: PreTrainedTokenizerBase) -> RealText:
    """Real text without the documents that are over before anything is written; ValueError where none is left."""
    kept = task.reached(real.sequences, special_id(tokenizer, END_TOKENS, "data.append_eos")).nonzero().flatten()
    if not len(kept):
        raise ValueError(
            f"all of the {len(real.texts)} held-out documents end before token {task.start}, where writing begins; "
            "take longer ones, or give a smaller --prompt_tokens."
        )
    return replace(real, sequences=real.sequences[kept], texts=[real.texts[row] for row in kept])


def score_missing(evaluation: ConditionalEvaluation, accelerator: Accelerator) -> None:
    """Scores all sets, shared out by process; what is scored already is only read."""
    work: list[Callable[[], object]] = [evaluation.score_real]
    work += [partial(evaluation.score_set, one) for one in evaluation.sets]
    mine = work[accelerator.process_index :: accelerator.num_processes]
    for score in tqdm(mine, desc="Sets scored", disable=not accelerator.is_main_process):
        score()
    accelerator.wait_for_everyone()


def collect(
    evaluation: ConditionalEvaluation, options: EvaluationOptions, data: DataSettings, device: str
) -> dict[str, Any]:
    """What `results.json` holds."""
    scorer = evaluation.scorer
    task = scorer.task
    entries: dict[str, dict[str, Any]] = {}
    for (subject, steps, told, scale), sets in grouped(evaluation.sets).items():
        entry = entries.setdefault(
            subject.name,
            {
                "name": subject.name,
                "pipeline": shown_source(subject.source),
                "sampler": subject.sampler.text,
                "digest": subject.digest,
                "sets": [],
            },
        )
        seeds = [evaluation.score_set(one) for one in sets]
        way = {"steps": steps, "nfe": seeds[0]["nfe"], "told": told, "guidance_scale": scale}
        entry["sets"].append(way | {"seeds": seeds} | over_seeds(seeds))
    return {
        "settings": described_settings(options, data)
        | {"task": task.name, "written": [task.start, task.stop], "num_texts": len(scorer.real)}
        | {"bert_score": options.bert_score},
        "sequence_length": task.length,
        "versions": evaluation.parts.versions,
        "hardware": device,
        "judge": scorer.judge and judge_conditions(scorer.judge),
        "real_text": evaluation.score_real(),
        "pipelines": list(entries.values()),
    }


def grouped(sets: list[ConditionalSet]) -> dict[tuple[Any, ...], list[ConditionalSet]]:
    """Sets of all seeds by subject, steps, what is told and guidance."""
    groups: dict[tuple[Any, ...], list[ConditionalSet]] = {}
    for one in sets:
        groups.setdefault((one.subject, one.steps, one.told, one.guidance_scale), []).append(one)
    return groups


def write(
    evaluation: ConditionalEvaluation,
    options: EvaluationOptions,
    results: dict[str, Any],
    draw: Callable[[dict[str, Any]], None],
) -> None:
    """Writes everything that is for people or other scripts, `results.json` last, and prints the table."""
    folder, table = options.output_dir, results_text(results)
    (folder / "results.md").write_text(table, encoding="utf-8")
    (folder / "samples.md").write_text("\n\n".join(sample_sections(evaluation)) + "\n", encoding="utf-8")
    draw(results)
    content = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "results.json", lambda file: file.write_text(content, encoding="utf-8"))
    print(table)


def results_text(results: dict[str, Any]) -> str:
    """The table, real text first, and what its numbers depend on."""
    real = results["real_text"]
    shown = {name: value for name, value in COLUMNS.items() if name == "seconds" or real[name] is not None}

    def row(names: list[str], mean: dict[str, Any], std: dict[str, Any]) -> list[str]:
        return [*names, *(cell(mean.get(key), std.get(key), digits) for key, (_, digits) in shown.items())]

    rows = [row(["real text", "", "", "", ""], real, {})]
    for entry in results["pipelines"]:
        for one in entry["sets"]:
            names = [entry["name"], f"{one['steps']:,}", f"{one['nfe']:,}", one["told"], f"{one['guidance_scale']:g}"]
            rows.append(row(names, one["mean"], one["std"]))
    header = ["texts", "steps", "NFE", "told", "v", *(heading for heading, _ in shown.values())]
    settings = results["settings"]
    start, stop = settings["written"]
    seeds = settings["seeds"]
    lines = [
        f"{settings['num_texts']:,} held-out texts of {results['sequence_length']} tokens, of which tokens {start} "
        f"to {stop - 1} were written; {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}.",
        "PPL where given: of what is written and all that follows, given what stands before it; elsewhere: the same "
        "written tokens in another text. v: `guidance_scale`. Told the prefix: of what is given, that before the gap. "
        "Steering: of a pipeline that takes no prompts, by the likelihood of what is given, with the weight v.",
        "MAUVE, seq-rep-4 and entropy are of whole texts; ROUGE-L, BERTScore and distinct-n of what was written.",
    ]
    if results["judge"] is not None:
        lines.append(f"Judge: `{results['judge']['name']}`.")
    lines.append(f"Sampling: device seconds a set, {settings['dtype']}, on {results['hardware']}.")
    lines.append("With " + ", ".join(f"{name} {number}" for name, number in results["versions"].items()) + ".")
    table = "\n".join(markdown_table(header, rows))
    return f"# Evaluation: {settings['task']}\n\n{table}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def sample_sections(evaluation: ConditionalEvaluation) -> Iterator[str]:
    """The first texts of each set of seed 0, what was written between « and »."""
    scorer = evaluation.scorer

    def shown(sequences: Any) -> str:
        task = scorer.task
        pieces = [sequences[:, : task.start], sequences[:, task.written], sequences[:, task.stop :]]
        rows = zip(*map(scorer.texts, pieces), strict=True)
        return fenced(marked(list(rows)))

    yield "# Samples\n\nThe first texts of each set, in order; none was picked. « and » enclose what was written."
    yield "## Real text\n\n" + shown(scorer.real[:NUM_SHOWN])
    for one in evaluation.sets:
        if one.seed == 0:
            title = f"{one.subject.name}, {one.steps} steps, told {one.told}, v = {one.guidance_scale:g}"
            yield f"## {title}\n\n" + shown(one.rows.load(one.count)["sequences"].long()[:NUM_SHOWN])

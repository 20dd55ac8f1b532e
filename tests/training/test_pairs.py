"""Training on pairs and on separate documents: what is given, the same run on any layout, and pipelines that know."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator

from ldlm_hf import LDLMPipeline
from ldlm_hf.data import DataSettings, load_corpora
from ldlm_hf.loading.settings_reader import load_settings
from ldlm_hf.models.conditions import Conditions
from ldlm_hf.training.batches import TrainingBatches, global_rows
from ldlm_hf.training.randomness import RowRandomness
from ldlm_hf.training.recipes.distillation import DistillationSettings
from ldlm_hf.training.recipes.joint import JointRecipe, measure_latents
from ldlm_hf.training.settings import RunSettings


Run = Callable[..., None]
LENGTH, SOURCE = 8, 5
COLUMNS = {"source_column": "question", "target_column": "answer", "source_length": SOURCE, "target_length": 3}
OF_PAIRS = [f"data.{name}={value}" for name, value in COLUMNS.items()]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """48 pairs of 1 to 8 and of 1 to 4 words."""
    generator, rows = random.Random(0), []
    for _ in range(48):
        question, answer = ([f"w{generator.randint(2, 39)}" for _ in range(generator.randint(1, n))] for n in (8, 4))
        rows.append({"question": " ".join(question), "answer": " ".join(answer)})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pair_overrides(tiny_overrides: list[str], pairs_file: Path) -> list[str]:
    return [*tiny_overrides, *OF_PAIRS, f"data.source={pairs_file}", "evaluation.every=2", "evaluation.num_samples=6"]


@pytest.fixture
def make_batches(pairs_file: Path, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., TrainingBatches]:
    def make(device_batch_size: int, rank: int = 0, world_size: int = 1, streaming: bool = False) -> TrainingBatches:
        settings = DataSettings(
            source=str(pairs_file), **COLUMNS, streaming=streaming, shuffle_buffer=5, cache_dir=str(tmp_path / "cache")
        )
        train = load_corpora(settings, tiny_tokenizer, LENGTH, rank, world_size).train
        return TrainingBatches(train, 4, device_batch_size, rank, world_size, seed=0)

    return make


def steps_of(make_batches: Callable[..., TrainingBatches], world_size: int, passes: int, steps: int) -> list[Any]:
    """The rows of each step, in the whole batch's order, as so many ranks in so many passes see them."""
    device_batch_size = 4 // (world_size * passes)
    ranks = [make_batches(device_batch_size, rank, world_size) for rank in range(world_size)]
    result = []
    for _ in range(steps):
        rows: dict[int, Any] = {}
        for index in range(passes):
            for rank, batches in enumerate(ranks):
                batch = next(batches)
                places = global_rows(index, rank, device_batch_size, world_size)
                rows |= zip(
                    places, zip(batch["input_ids"].tolist(), batch["given"].tolist(), strict=True), strict=True
                )
        result.append([rows[place] for place in range(4)])
    return result


def test_rows_of_a_step_are_the_same_in_any_layout(make_batches) -> None:
    expected = steps_of(make_batches, 1, 1, 15)
    assert all(given == [True] * SOURCE + [False] * 3 for step in expected for _, given in step)
    assert len({str(row) for step in expected for row in step}) == 48
    for world_size, passes in ((1, 4), (2, 2), (4, 1)):
        assert steps_of(make_batches, world_size, passes, 15) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_of_pairs_go_on_exactly(make_batches, streaming: bool) -> None:
    whole = list(itertools.islice(make_batches(4, streaming=streaming), 20))
    batches, again = (make_batches(4, streaming=streaming) for _ in range(2))
    list(itertools.islice(batches, 7))
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for expected, found in zip(whole[7:], again, strict=False):
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["given"], expected["given"])


@pytest.fixture
def recipe(pair_overrides: list[str]) -> JointRecipe:
    """Ready to take a step."""
    settings = load_settings(RunSettings, None, [*pair_overrides, "conditioning.dropout=0.25"])
    recipe = JointRecipe(settings, Accelerator(cpu=True))
    recipe.load()
    corpora = load_corpora(settings.data, recipe.tokenizer, LENGTH)
    recipe.build(corpora.train, corpora.validation)
    return recipe


def batch_of(recipe: JointRecipe, count: int) -> dict[str, torch.Tensor]:
    corpora = load_corpora(recipe.settings.data, recipe.tokenizer, LENGTH)
    return torch.utils.data.default_collate([corpora.train[index] for index in range(count)])


def test_the_source_is_given_and_a_share_of_rows_is_dropped(recipe: JointRecipe) -> None:
    given = batch_of(recipe, 8)["given"]
    whole = recipe.conditions(LENGTH, RowRandomness(0, 3, range(8), 8), torch.device("cpu"), given)
    assert torch.equal(whole.given, given) and int(whole.dropped.sum()) == 2
    parts = [
        recipe.conditions(LENGTH, RowRandomness(0, 3, range(n, n + 2), 8), torch.device("cpu"), given[n : n + 2])
        for n in (0, 2, 4, 6)
    ]
    assert torch.equal(torch.cat([part.dropped for part in parts]), whole.dropped)
    steps = [RowRandomness(0, step, range(8), 8) for step in range(8)]
    draws = {str(recipe.conditions(LENGTH, one, torch.device("cpu"), given).dropped.tolist()) for one in steps}
    assert len(draws) > 3


def test_no_target_leaks_into_what_is_given(recipe: JointRecipe) -> None:
    """And the denoiser is told of sources alone."""
    told: list[dict[str, torch.Tensor]] = []
    recipe.module.transformer.register_forward_pre_hook(
        lambda _, __, keywords: told.append(keywords), with_kwargs=True
    )
    batch = batch_of(recipe, 8)
    for change in (0, 1):
        input_ids = torch.where(batch["given"], batch["input_ids"], (batch["input_ids"] + change) % 40)
        losses = recipe.losses(recipe.module, input_ids, 3, RowRandomness(0, 3, range(8), 8), given=batch["given"])
        assert torch.isfinite(losses.total)
        # there is no row without a condition to learn the times from
        assert torch.isfinite(losses.observations[1]).all()
    _, first, _, last = told  # each after a pass for its self-condition
    assert torch.equal(first["given_latents"], last["given_latents"]) and first["given_latents"].any()
    assert not first["given_latents"][:, SOURCE:].any()
    assert torch.equal(first["given"], batch["given"])


def test_statistics_of_latents_are_those_that_the_denoiser_is_trained_on(recipe: JointRecipe) -> None:
    """A source's latents are encoded without its target."""
    recipe.module.eval()
    rows = {name: torch.cat([batch[name] for batch in recipe.statistics]) for name in ("input_ids", "given")}
    mask = Conditions(rows["given"]).attention_mask()
    with torch.no_grad():
        hidden_states = recipe.module.token_encoder(rows["input_ids"], attention_mask=mask).hidden_states
        latents = recipe.module.latent_encoder.map_sequence(hidden_states, attention_mask=mask)
    mean, std = measure_latents(recipe.module, recipe.statistics, torch.device("cpu"))
    torch.testing.assert_close(mean, latents.double().mean((0, 1)))
    torch.testing.assert_close(std, latents.double().std((0, 1), correction=0))


def test_held_out_losses_are_of_the_targets(recipe: JointRecipe) -> None:
    assert recipe.held_out_given.tolist() == [[True] * SOURCE + [False] * 3] * len(recipe.held_out)
    recipe.held_out_given = torch.ones_like(recipe.held_out_given)
    results = recipe.evaluate(recipe.module.eval(), step=4).values
    losses = {name: value for name, value in results.items() if "diffusion_loss" in name}
    # of nothing, where all is given
    assert set(losses.values()) == {0.0} and {"conditional_diffusion_loss", "dropped_diffusion_loss"} <= set(losses)


def test_a_run_on_pairs_saves_a_pipeline_that_writes_targets(
    run_script: Run, pair_overrides: list[str], tmp_path: Path
) -> None:
    run_script("train_joint", *pair_overrides)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in log if "eval/conditional_diffusion_loss" in record][-1]
    assert math.isfinite(last["eval/conditional_diffusion_loss"]) and math.isfinite(last["eval/diffusion_loss"])
    pipe = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.ends_texts, pipe.config.source_length) == (True, SOURCE)
    assert pipe.transformer.config.role_embeds
    output = pipe(["w5 w6", "w7"], num_inference_steps=2)
    assert output.sequences.shape == (2, LENGTH) and output.sequences[0, :2].tolist() == [5, 6]
    assert all(len(text.split()) <= LENGTH - SOURCE for text in output.texts)
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert (
        'pipe("A source.", num_inference_steps=3' in card and "A prompt is a source of up to 5 tokens, and 3" in card
    )
    # its samples are of held-out sources
    rows = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["samples"]
    held_out = [json.loads(line)["question"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()[-8:]]
    starts = [" ".join(question.split()[:SOURCE]) for question in held_out]
    assert len(rows) == 6 and all(any(row["text"].startswith(start) for start in starts) for row in rows)


def test_further_runs_keep_what_texts_are(run_script: Run, pair_overrides: list[str], tmp_path: Path) -> None:
    """Joint training and a token decoder, on pairs again; not on other text."""
    quick = ["evaluation.every=0", "evaluation.num_samples=0", "loop.max_steps=2"]
    run_script("train_joint", *pair_overrides, *quick)
    source = f"components={tmp_path / 'run' / 'pipeline'}"
    shared = [one for one in pair_overrides if one.split(".")[0] in ("data", "optimizer", "loop", "evaluation")]
    run_script("train_joint", *pair_overrides, *quick, source, f"loop.output_dir={tmp_path / 'further'}")
    run_script("train_token_decoder", *shared, *quick, source, f"loop.output_dir={tmp_path / 'decoder'}")
    for name in ("further", "decoder"):
        config = LDLMPipeline.from_pretrained(tmp_path / name / "pipeline").config
        assert (config.ends_texts, config.source_length) == (True, SOURCE)
    whole = [one for one in shared if one not in OF_PAIRS] + ["data.text_column=question"]
    with pytest.raises(ValueError, match="data.source_length=None, but components=.* have source_length=5"):
        run_script("train_token_decoder", *whole, *quick, source, f"loop.output_dir={tmp_path / 'other'}")
    with pytest.raises(ValueError, match="source_length=5 and data.source_column=None: a student takes no prompts"):
        run_script("distill", *whole, *quick, source, f"loop.output_dir={tmp_path / 'student'}")


def test_a_student_ends_texts_as_its_teacher_does(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> None:
    quick = ["data.documents=separate", "evaluation.num_samples=0", "loop.max_steps=2"]
    run_script("train_joint", *tiny_overrides, *quick)
    shared = [one for one in tiny_overrides if one.split(".")[0] in ("data", "optimizer", "loop", "evaluation")]
    components = f"components={tmp_path / 'run' / 'pipeline'}"
    run_script("distill", *shared, *quick, components, f"loop.output_dir={tmp_path / 'student'}")
    for name in ("run", "student"):
        config = LDLMPipeline.from_pretrained(tmp_path / name / "pipeline").config
        assert (config.ends_texts, config.source_length) == (True, None)


def test_an_exported_pipeline_keeps_them(make_conditional_pipeline, run_script: Run, tmp_path: Path) -> None:
    pipe = LDLMPipeline(**make_conditional_pipeline().components, ends_texts=True, source_length=SOURCE)
    pipe.save_pretrained(tmp_path / "pipeline")
    run_script("export_pipeline", str(tmp_path / "pipeline"), str(tmp_path / "small"), "--without_token_encoder")
    config = LDLMPipeline.from_pretrained(tmp_path / "small").config
    assert (config.ends_texts, config.source_length) == (True, SOURCE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["conditioning.prefix_share=0.5"], "data.source_column='question' with conditioning.prefix_share=0.5"),
        (["conditioning.gaps_share=0.5"], "conditioning.gaps_share=0.5: of a pair the source is given"),
        (["loop.shift_chunks=true"], "loop.shift_chunks=true with data.source_column='question'"),
        (["model.num_latents=4"], "model.num_latents=4 with model.sequence_length=8.*data.source_column to null"),
        (["model.sequence_length=9"], "are 8 tokens together, but model.sequence_length=9"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(RunSettings, None, ["model.sequence_length=8", *OF_PAIRS, *overrides])


@pytest.mark.parametrize("settings_class", [RunSettings, DistillationSettings])
def test_separate_documents_are_not_shifted(settings_class: type) -> None:
    with pytest.raises(ValueError, match="loop.shift_chunks=true with data.documents='separate'"):
        load_settings(settings_class, None, ["data.documents=separate", "loop.shift_chunks=true"])


LOOK_ALIKES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "xsum": lambda one, other: {"document": one, "summary": other, "id": "3"},
    "wmt14_de_en": lambda one, other: {"translation": {"de": one, "en": other}},
    "qqp": lambda one, other: {"anchor": one, "positive": other},
}


@pytest.fixture
def look_alike(tmp_path: Path) -> Callable[[str], tuple[list[str], int]]:
    """Writes 12 rows a split with the columns, nesting and splits of a configuration's data set of the Hub; returns
    the overrides that read these files, and how many rows are held out."""

    def write(name: str) -> tuple[list[str], int]:
        folder, generator = tmp_path / "hub", random.Random(0)
        folder.mkdir()
        texts = [" ".join(f"w{generator.randint(2, 39)}" for _ in range(20)) for _ in range(24)]
        if name == "rocstories":
            for split in ("train", "test"):
                (folder / f"{split}.txt").write_text("\n".join(texts[:12]) + "\n", encoding="utf-8")
        else:
            rows = datasets.Dataset.from_list(
                [LOOK_ALIKES[name](*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
            )
            for split in ("train",) if name == "qqp" else ("train", "validation"):
                rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        small = [f"data.source={folder}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_proc=null"]
        small.append("data.config_name=null")  # which a folder has in its card
        return ([*small, "data.holdout_documents=3"], 3) if name == "qqp" else (small, 12)

    return write


@pytest.mark.parametrize(
    ("name", "lengths"), [("rocstories", None), ("xsum", (1024, 64)), ("wmt14_de_en", (64, 64)), ("qqp", (64, 64))]
)
def test_configurations_read_data_sets_like_those_that_they_name(
    name: str, lengths: tuple[int, int] | None, look_alike, repository: Path, tiny_tokenizer
) -> None:
    overrides, num_held_out = look_alike(name)
    path = str(repository / f"training/configs/{name}.yaml")
    settings = load_settings(RunSettings, path, overrides)
    corpora = load_corpora(settings.data, tiny_tokenizer, settings.model.sequence_length)
    assert len(corpora.validation) == num_held_out and len(corpora.train) == (9 if name == "qqp" else 12)
    end = tiny_tokenizer.eos_token_id
    for item in itertools.chain(corpora.train, corpora.validation):
        if lengths is None:
            assert "given" not in item and settings.conditioning.gives_texts
            parts = [item["input_ids"]]
        else:
            assert item["given"].tolist() == [True] * lengths[0] + [False] * lengths[1]
            parts = item["input_ids"].split(lengths)
        assert all((part[:20] != end).all() and (part[20:] == end).all() for part in parts)


@pytest.mark.parametrize("name", ["rocstories", "xsum", "wmt14_de_en", "qqp"])
def test_configurations_build_models_that_are_told_what_is_given(
    name: str, look_alike, tiny_overrides: list[str], repository: Path, run_script: Run, capsys
) -> None:
    """With a language model of 16 positions, as `--dry_run` does."""
    path = str(repository / f"training/configs/{name}.yaml")
    small = [one for one in tiny_overrides if one.startswith("model.")] + ["loop.mixed_precision=no"]
    if name != "rocstories":
        small += ["data.source_length=5", "data.target_length=3"]
    run_script("train_joint", "--config", path, *look_alike(name)[0], *small, "--dry_run")
    assert "8 tokens a sequence" in capsys.readouterr().out
    recipe = JointRecipe(load_settings(RunSettings, path, small), Accelerator(cpu=True))
    recipe.load()
    assert recipe.module.transformer.config.role_embeds

"""LDLM beside other methods: equal FLOPs, commands, and a whole comparison of tiny runs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from omegaconf import OmegaConf

from compare_methods import build_plan, main, parse_arguments
from figures.frontier import plot_frontier
from ldlm_hf.loading.settings_reader import load_settings, to_yaml
from ldlm_hf.training.flops import count_flops
from ldlm_hf.training.settings import RunSettings
from methods.definitions import SCRIPTS, read_methods
from methods.runs import MethodPlan, evaluations


SHIPPED = Path(__file__).parents[2] / "training/configs/methods.yaml"
TINY = ("ldlm", "autoregressive", "mdlm", "remdm", "duo", "psi", "flm", "fmlm", "duo_dcd")


@pytest.fixture
def config(tiny_overrides: list[str], backbone_folders: dict[str, Path], tmp_path: Path) -> Path:
    """The shipped methods with a base `tiny`, whose runs take a second."""
    shared = [one for one in tiny_overrides if one.split(".")[0] in ("data", "optimizer", "loop", "evaluation")]
    sizes = ["sequence_length=8", "hidden_size=16", "num_layers=1", "num_attention_heads=2"]
    model = [f"model.backbone={backbone_folders['gpt2']}", *(f"model.{size}" for size in sizes)]
    loaded: Any = OmegaConf.to_container(OmegaConf.load(SHIPPED))
    loaded["bases"]["tiny"] = {
        "accelerate": str(SHIPPED.parents[1] / "accelerate/one_cpu.yaml"),
        "steps": 6,
        "evaluation": {
            "num_samples": 20,
            "sampling_seeds": 1,
            "nfe": [2, 4],
            "frontier_nfe": 3,
            "judge": str(backbone_folders["gpt2"]),
            "batch_size": 20,
        },
    }
    for name in TINY:
        method = loaded["methods"][name]
        if "script" in method:
            recipe = SCRIPTS[method["script"]]
            overrides = tiny_overrides if name == "ldlm" else [*shared, *([] if "needs" in method else model)]
            file = tmp_path / f"{name}.yaml"
            file.write_text(to_yaml(load_settings(recipe.settings_class, None, overrides)), encoding="utf-8")
            method["configs"]["tiny"] = str(file)
        if name == "ldlm":
            # a run of four steps has learned no times
            method.update(sampler="own", nfe=[1, 0], frontier=["own:self_condition_scale=2"])
    file = tmp_path / "methods.yaml"
    OmegaConf.save(loaded, file)
    return file


@pytest.fixture
def compare(config: Path, runner: Any, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        output = ["--output_dir", str(tmp_path / "methods")]
        return main(["--base", "tiny", "--config", str(config), *output, *arguments], runner)

    return run


def plan_of(config: Path, *arguments: str) -> MethodPlan:
    return build_plan(parse_arguments(["--base", "tiny", "--config", str(config), *arguments]))


def test_shipped_methods_have_their_configurations() -> None:
    methods = read_methods(SHIPPED)
    assert {"ldlm", "ldlm_paper", "autoregressive", "mdlm", "remdm", "duo", "psi", "candi", "flm"} <= set(
        methods.on_base("openwebtext_1024")
    )
    assert set(methods.on_base("demo")) == set(methods.methods)
    for name, method in methods.methods.items():
        for base, file in method.configs.items():
            assert method.script is not None
            values = {**method.overrides, **method.bases.get(base, {})}
            overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
            settings: Any = load_settings(SCRIPTS[method.script].settings_class, str(SHIPPED.parent / file), overrides)
            assert (
                settings.data
                == load_settings(RunSettings, str(SHIPPED.parent / methods.methods["ldlm"].configs[base]), []).data
            ), (name, base)


def test_as_many_flops_for_all(config: Path) -> None:
    plan = plan_of(config)
    runs = {name: plan.run(name, 0) for name in TINY}
    total = 6 * runs["ldlm"].flops_of_step
    for name in ("autoregressive", "mdlm", "duo", "flm"):
        run = runs[name]
        recipe = SCRIPTS[run.script](run.settings, Accelerator(cpu=True))
        recipe.load()
        # 8 sequences of 8 tokens
        assert run.flops_of_step == count_flops(recipe.module, 8).per_token * 64
        steps = run.settings.loop.max_steps
        # to the nearest step; shares of a batch are counted almost exactly
        assert abs(steps * run.flops_of_step - total) <= 0.6 * run.flops_of_step and steps != 6
    assert len({runs[name].settings.loop.max_steps for name in ("autoregressive", "mdlm", "flm")}) == 3
    # the weights of others
    assert runs["remdm"] == runs["mdlm"] and runs["psi"] == runs["duo"]
    flm = runs["flm"].settings.loop.max_steps
    assert runs["fmlm"].settings.loop.max_steps == round(flm / 4) and runs["fmlm"].needs == runs["flm"]


def test_as_many_steps_for_all_and_schedules_that_follow(config: Path) -> None:
    plan = plan_of(config, "--equal", "steps", "--base_steps", "40")
    duo = plan.run("duo", 0).settings
    assert plan.run("mdlm", 0).settings.loop.max_steps == duo.loop.max_steps == 40
    # ten times the configuration's four steps
    shipped = load_settings(SCRIPTS["train_baseline.py duo"].settings_class, str(config.parent / "duo.yaml"), [])
    assert duo.optimizer.lr_warmup_steps == 10 * shipped.optimizer.lr_warmup_steps
    assert duo.curriculum.steps == 10 * shipped.curriculum.steps
    given = plan_of(config, "--equal", "steps", "optimizer.lr_warmup_steps=3")
    assert given.run("mdlm", 0).settings.optimizer.lr_warmup_steps == 3


def test_commands_for_a_cluster(compare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--methods", "psi", "fmlm", "--seeds", "2", "--print_commands") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("accelerate")]
    scripts = [line[4:6] for line in lines]
    training = [script[1] for script in scripts if script[0].endswith("train_baseline.py")]
    assert training == ["duo", "duo", "flm", "fmlm", "flm", "fmlm"]
    sampled = [line for line in lines if line[4].endswith("evaluate.py")]
    assert len(sampled) == 2 * 2 + 2
    assert sampled[0][-2:] == ["--samplers", "PsiScheduler"] and "duo/seed-0/pipeline" in " ".join(sampled[0])


@pytest.mark.slow
def test_a_comparison(compare: Callable[..., int], runner: Any, tmp_path: Path) -> None:
    names = ("ldlm", "autoregressive", "remdm", "psi", "fmlm")
    assert compare("--methods", *names) == 0
    folder = tmp_path / "methods/tiny-equal-flops"
    trained = {"ldlm", "autoregressive", "mdlm", "duo", "flm", "fmlm"}
    assert {path.parent.name for path in folder.glob("*/seed-0")} == trained
    values = json.loads((folder / "methods.json").read_text(encoding="utf-8"))
    costs = {one["name"]: one for one in values["runs"]}
    for name in trained - {"fmlm"}:
        if name in costs:
            assert costs[name]["flops"] == pytest.approx(costs["ldlm"]["flops"], rel=0.2)
    assert costs["fmlm"]["started_from"] == "flm" and costs["fmlm"]["seconds"] > 0
    entries = {one["pipelines"][0]["name"]: one["pipelines"][0]["sets"] for one in values["evaluations"]}
    assert set(entries) == {"LDLM", "autoregressive", "ReMDM", "Duo, psi-sampler", "FMLM, distilled from FLM"}
    assert [one["nfe"] for one in entries["ReMDM"]] == [2, 4] and [
        one["nfe"] for one in entries["autoregressive"]
    ] == [8]
    text = (folder / "methods.md").read_text(encoding="utf-8")
    for part in ("Gen. PPL", "MAUVE", "seq-rep-4", "entropy", "ReMDM", "GFLOP" if "GFLOP" in text else "MFLOP"):
        assert part in text
    assert "Not trained, or not evaluated as asked: " in text and "MDLM" in text
    assert (folder / "methods.png").is_file() and (folder / "frontier.png").is_file()
    curves = {line.get_label(): line for line in plot_frontier(values["frontiers"]).axes[0].lines}
    assert len(curves["ReMDM"].get_xdata()) == 4

    # a second call does nothing again
    launched = len(runner.launched)
    assert compare("--methods", *names) == 0 and len(runner.launched) == launched
    # and what is asked for anew is measured on the weights that are there
    assert compare("--methods", "remdm", "--nfe", "2") == 0
    assert [Path(command[command.index("--config_file") + 2]).stem for command in runner.launched[launched:]] == [
        "evaluate"
    ]


def test_one_that_fails_leaves_the_others(compare: Callable[..., int], config: Path, tmp_path: Path) -> None:
    plan = plan_of(config, "--output_dir", str(tmp_path / "methods"))
    folder = plan.run("mdlm", 0).folder
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text("loop: {max_steps: 99}\n", encoding="utf-8")
    more = ("--methods", "mdlm", "autoregressive", "--nfe", "2", "--judge", "none")
    assert compare(*more) == 1
    assert (tmp_path / "methods/tiny-equal-flops/autoregressive/seed-0/pipeline/README.md").is_file()
    text = (tmp_path / "methods/tiny-equal-flops/methods.md").read_text(encoding="utf-8")
    assert "Not trained, or not evaluated as asked:" in text and "| autoregressive | 0 |" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda one: one["methods"]["mdlm"].update(script="train_baseline.py d3pm"),
            "script 'train_baseline.py d3pm'",
        ),
        (lambda one: one["methods"]["remdm"].update(weights="udlm"), "method 'udlm' is unknown"),
        (
            lambda one: one["methods"]["remdm"].pop("weights"),
            "either its script is named, or the method whose weights",
        ),
        (lambda one: one["methods"]["duo"].update(sampler="Duo"), "unknown scheduler 'Duo'"),
        (lambda one: one["bases"]["demo"].update(reference="sedd"), "reference 'sedd' is unknown"),
        (lambda one: one["methods"]["duo"].update(color=1), "color"),
    ],
)
def test_files_that_name_what_is_not_there(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    loaded: Any = OmegaConf.to_container(OmegaConf.load(SHIPPED))
    change(loaded)
    OmegaConf.save(loaded, tmp_path / "methods.yaml")
    with pytest.raises(ValueError, match=message):
        read_methods(tmp_path / "methods.yaml")


def test_as_many_evaluations_for_all() -> None:
    """Each takes the most steps that 8 evaluations of its network allow."""
    methods = read_methods(SHIPPED).methods
    steps = {name: methods[name].steps_within(8) for name in ("ldlm", "ldlm_paper", "mdlm", "psi", "candi", "flm")}
    assert steps == {"ldlm": 4, "ldlm_paper": 8, "mdlm": 7, "psi": 7, "candi": 8, "flm": 8}
    assert methods["mdlm"].steps_within(1) == 1


@pytest.mark.parametrize("key", ["loop.seed", "loop.output_dir", "loop.max_steps"])
def test_what_differs_from_run_to_run_is_no_override(config: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} differs from run to run: use --"):
        plan_of(config, f"{key}=3")


def test_a_student_of_other_weights_is_found_out(config: Path, tmp_path: Path) -> None:
    run = plan_of(config, "--output_dir", str(tmp_path / "methods")).run("fmlm", 0)
    assert run.needs is not None
    for place, one in enumerate((run.needs, run)):
        one.pipeline.mkdir(parents=True)
        (one.pipeline / "README.md").touch()
        os.utime(one.pipeline / "README.md", (place, place))
    run.check_teacher()
    os.utime(run.needs.pipeline / "README.md", (2, 2))
    with pytest.raises(ValueError, match="was distilled from flm .* before that was trained anew"):
        run.check_teacher()


def test_unknown_methods_are_refused(compare: Callable[..., int], config: Path) -> None:
    with pytest.raises(ValueError, match="on base 'tiny', method 'candi' is unknown; known: ldlm, autoregressive"):
        compare("--methods", "candi")
    with pytest.raises(ValueError, match="on base 'tiny', method 'candi'"):
        evaluations(plan_of(config), ["candi"], [0])

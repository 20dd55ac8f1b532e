"""Publishes a tiny pipeline and loads it again over HTTP, each time in a fresh process.

    python checks/hub_round_trip.py

The processes talk to a hub on this machine (checks/loopback_hub.py) by the real `huggingface_hub` client. What was
done and what came of it is printed and written to checks/hub_round_trip.md; the exit status is 1 if any of it was not
what is expected. Folders, and the parts of a pipeline, are loaded in tests/loading/ and tests/pipelines/.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoModel

from loopback_hub import LoopbackHub


REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = Path(__file__).with_suffix(".md")
TIMEOUT = 600  # seconds
MODELS = ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder")


@dataclass(frozen=True)
class Case:
    """What one process does (it leaves a pipeline as `pipe`, or components as `models`), and what has to come of it.

    Attributes:
        expected: which of the published pipelines it must be, "float32" or another of `publish`.
        error: a pattern for the text of the error that must be raised instead.
        installed: whether `ldlm_hf` can be imported.
        offline: it has no network, but the cache of the case before.
        not_fetched: patterns of files that must not have been downloaded.
    """

    code: str
    expected: str = "float32"
    error: str | None = None
    installed: bool = True
    offline: bool = False
    not_fetched: tuple[str, ...] = ()


def load(source: str, options: str = "", **rest: Any) -> Case:
    """Loads by the package's class."""
    return Case(f'pipe = LDLMPipeline.from_pretrained("{source}"{options and f", {options}"})', **rest)


def load_trusting(source: str, options: str = "") -> Case:
    """Loads by diffusers alone, with the code of the repository."""
    options = ", ".join(filter(None, [options, "trust_remote_code=True"]))
    return Case(f'pipe = DiffusionPipeline.from_pretrained("{source}", {options})', installed=False)


PLAIN = 'pipe = DiffusionPipeline.from_pretrained("org/tiny")'
NO_TRUST = Case(PLAIN, error=r"ValueError: .*trust_remote_code=True", installed=False)
FULL_WEIGHTS = ("*/model.safetensors", "*/diffusion_pytorch_model.safetensors")

CASES = [
    load("org/tiny"),
    load("org/tiny", offline=True),
    load_trusting("org/tiny"),
    # diffusers asks the hub for the commit of a pipeline's code, cached or not, unless it is given the folder
    Case(
        'folder = os.path.dirname(hf_hub_download("org/tiny", "model_index.json"))\n'
        "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)",
        installed=False,
        offline=True,
    ),
    Case(PLAIN),
    NO_TRUST,
    load("org/tiny", "token_encoder=None, latent_encoder=None", not_fetched=("*_encoder/*",)),
    load("org/tiny", 'variant="fp16", dtype=torch.float16', expected="float16", not_fetched=FULL_WEIGHTS),
    load("org/tiny", 'revision="v1"', expected="v1"),
    Case(
        'commit = HfApi().model_info("org/tiny", revision="v1").sha\n'
        f"{load_trusting('org/tiny', 'revision=commit').code}",
        expected="v1",
        installed=False,
    ),
    Case(
        'models = {name: AutoModel.from_pretrained("org/tiny", subfolder=name, trust_remote_code=True) '
        f"for name in {MODELS}}}",
        installed=False,
    ),
    Case(f'{load_trusting("org/tiny").code}\npipe.push_to_hub("org/again", max_shard_size="10KB")', installed=False),
    load("org/again", 'device_map="balanced"'),
]


# --- inside a process ------------------------------------------------------------------------------------------------


def sample(pipe: Any) -> dict[str, Any]:
    """Token ids that a pipeline samples from a seed, and the digests of its weights."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    sequences = pipe(batch_size=4, num_inference_steps=8, generator=generator, output_type="seq").sequences
    models = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}
    return {"sequences": sequences.tolist(), "weights": {name: digest(model) for name, model in models.items()}}


def digest(model: Any) -> str:
    """Of a component's weights and their types, bit for bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def publish() -> dict[str, Any]:
    """Publishes the pipelines that the cases load; gives what they sample, and their weights' digests."""
    import ldlm_hf
    from tiny_pipeline import build_pipeline

    # so many layers that each component has more than one shard
    first, pipe = (build_pipeline(seed, num_layers=4) for seed in (1, 0))
    published = {"v1": sample(first), "float32": sample(pipe)}
    assert published["float32"]["sequences"] != published["v1"]["sequences"], "no mistake would be seen"
    first.push_to_hub("org/tiny")
    HfApi().create_tag("org/tiny", tag="v1")
    pipe.push_to_hub("org/tiny")
    # what must stay in float32 does so when a type is asked for at loading only
    pipe.save_pretrained("./tiny")
    pipe = ldlm_hf.LDLMPipeline.from_pretrained("./tiny", dtype=torch.float16)
    pipe.push_to_hub("org/tiny", variant="fp16")
    return published | {"float16": sample(pipe)}


def run_code(code: str) -> dict[str, Any]:
    """Executes the code of a case; gives what came of it."""
    torch.set_num_threads(1)
    names: dict[str, Any] = {"torch": torch, "os": os, "publish": publish, "HfApi": HfApi}
    names |= {"DiffusionPipeline": DiffusionPipeline, "AutoModel": AutoModel, "hf_hub_download": hf_hub_download}
    if importlib.util.find_spec("ldlm_hf") is not None:
        from ldlm_hf import LDLMPipeline

        names["LDLMPipeline"] = LDLMPipeline
    found: dict[str, Any] = {}
    try:
        exec(code, names)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        if "pipe" in names:
            found |= sample(names["pipe"])
        elif "models" in names:
            found["weights"] = {name: digest(model) for name, model in names["models"].items()}
        else:
            found["published"] = names["published"]
    places = ("diffusers_modules.", "transformers_modules.")
    found["executed"] = [name for name in sys.modules if name.startswith(places)]
    return found


# --- the processes ---------------------------------------------------------------------------------------------------


def run(case: Case, hub: LoopbackHub, home: Path) -> dict[str, Any]:
    """What a process finds that runs a case with its cache in `home`.

    Raises:
        RuntimeError: it ended with an error.
    """
    # a package that is installed in editable form shows itself by a .pth file, which -S leaves unread
    places = [str(REPOSITORY), *map(os.path.abspath, sys.path)]
    if not case.installed:
        places = [place for place in places if not Path(place, "ldlm_hf").exists()]
    environment = hub.environment(home, "hf_org") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    if case.offline:
        environment["HF_HUB_OFFLINE"] = "1"
    home.mkdir(exist_ok=True)
    command = [sys.executable, *([] if case.installed else ["-S"]), __file__, case.code]
    done = subprocess.run(command, env=environment, cwd=home, timeout=TIMEOUT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{case.code}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(case: Case, found: dict[str, Any], published: dict[str, Any], downloads: list[str]) -> tuple[str, list[str]]:
    """What came of a case, in words, and what is wrong with it."""
    wrong = []
    if "error" in found:
        outcome = found["error"]
        right = case.error is not None and re.search(case.error, outcome) is not None
    else:
        outcome = compare(found, published[case.expected])
        right = case.error is None and outcome.endswith("equal")
    if not right:
        wrong.append(f"expected: {case.error or case.expected}")
    may_execute = "trust_remote_code=True" in case.code and "error" not in found
    if bool(found["executed"]) != may_execute:
        wrong.append(f"code of the repository that was executed: {', '.join(found['executed']) or 'none'}")
    fetched = sorted({name for name in downloads for one in case.not_fetched if fnmatch.fnmatch(name, one)})
    if fetched:
        wrong.append(f"downloaded: {', '.join(fetched)}")
    return outcome, wrong


def compare(found: dict[str, Any], published: dict[str, Any]) -> str:
    """What differs between a pipeline, or single components' weights, and what was published."""
    differing = [name for name, value in found["weights"].items() if value != published["weights"].get(name)]
    if differing or not found["weights"]:
        return f"weights differ: {', '.join(differing) or 'none were found'}"
    if "sequences" not in found:
        return "weights equal"
    return f"weights equal, samples {'equal' if found['sequences'] == published['sequences'] else 'differ'}"


def run_cases(cases: list[Case], folder: Path) -> tuple[list[list[str]], int]:
    """Publishes, and runs the cases one after the other; gives the rows of the report, and how many are wrong."""
    rows, num_wrong = [], 0
    with LoopbackHub({"hf_org": "org"}) as hub:
        found = run(Case("published = publish()"), hub, folder / "publisher")
        if "error" in found:
            raise RuntimeError(f"Publishing failed: {found['error']}")
        published, home = found["published"], folder
        for number, case in enumerate(cases, 1):
            home = home if case.offline else folder / str(number)
            hub.downloads.clear()
            found = run(case, hub, home)
            outcome, wrong = judge(case, found, published, [name for _, name in hub.downloads])
            num_wrong += bool(wrong)
            surroundings = ("package" if case.installed else "no package") + ", offline" * case.offline
            print(f"{'FAILED' if wrong else 'ok':6} {surroundings}: {case.code} → {outcome}", *wrong, sep="\n       ")
            done = "<br>".join(f"`{line}`" for line in case.code.splitlines())
            outcome = f"**NOT EXPECTED** ({'; '.join(wrong)}): {outcome}" if wrong else outcome
            rows.append([str(number), surroundings, done, outcome, "executed" if found["executed"] else "–"])
    return rows, num_wrong


def write_report(rows: list[list[str]], num_wrong: int) -> None:
    from ldlm_hf.evaluation.machine import device_name, versions
    from ldlm_hf.evaluation.markdown import markdown_table

    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = f"""# Published, and loaded again

`python checks/hub_round_trip.py` on {device_name(torch.device("cpu"))}, {os.cpu_count()} cores; {installed}.
{len(rows)} cases, {num_wrong} of them not as expected.

Each row is a process of its own that asks `checks/loopback_hub.py` by the real client, with an empty cache; one that
is offline (HF_HUB_OFFLINE=1) has the cache of the row before. `org/tiny` holds the pipeline and its `fp16` variant,
and at tag `v1` another one. *weights equal*: all weights and their types are those of the pipeline that was published,
bit for bit. *samples equal*: 4 texts in 8 steps have the same tokens from the same seed. Code of the repository was
executed in the rows that say so, and in no other.

"""
    columns = ["#", "surroundings", "what was done", "outcome", "repository code"]
    REPORT.write_text(text + "\n".join(markdown_table(columns, rows)) + "\n", encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows, num_wrong = run_cases(CASES, Path(folder))
    write_report(rows, num_wrong)
    if num_wrong:
        raise SystemExit(f"{num_wrong} cases are not as expected; see {REPORT.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:  # one of the processes
        print(json.dumps(run_code(sys.argv[1])))
    else:
        main()

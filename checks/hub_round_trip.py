"""Publishes a tiny pipeline and loads it again in every way that is promised, each time in a fresh process.

    python checks/hub_round_trip.py

The processes talk to a hub on this machine (checks/loopback_hub.py) by the real `huggingface_hub` client. What was
done and what came of it is printed and written to checks/hub_round_trip.md; the exit status is 1 if any of it was not
what is expected.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoModel

from loopback_hub import LoopbackHub, Repository


REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = Path(__file__).with_suffix(".md")
USERS = {"hf_org": "org", "hf_other": "other"}
LATENT_TOLERANCE = 1e-3
TIMEOUT = 600  # seconds
MODELS = ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder")


@dataclass(frozen=True)
class Case:
    """What one process does (it leaves a pipeline as `pipe`, or components as `models`), and what has to come of it.

    Attributes:
        expected: which of the published pipelines it must be, "float32" or another of `publish`.
        error: a pattern for the text of the error that must be raised instead.
        installed: whether `ldlm_hf` can be imported.
        not_fetched: patterns of files that must not have been downloaded.
        silent: whether the hub must not have been asked for anything.
    """

    code: str
    expected: str = "float32"
    error: str | None = None
    installed: bool = True
    token: str = "hf_org"
    offline: bool = False
    not_fetched: tuple[str, ...] = ()
    silent: bool = False

    @property
    def surroundings(self) -> str:
        """In words."""
        words = ["package" if self.installed else "no package"]
        words += ["HF_HUB_OFFLINE=1"] if self.offline else []
        words += ["another user's token"] if self.token != "hf_org" else []
        return ", ".join(words)


def load(source: str, options: str = "", **surroundings: Any) -> Case:
    """Loads by the package's class."""
    return Case(f'pipe = LDLMPipeline.from_pretrained("{source}"{options and f", {options}"})', **surroundings)


def load_trusting(source: str, options: str = "", **surroundings: Any) -> Case:
    """Loads by diffusers alone, with the code of the repository."""
    options = ", ".join(filter(None, [options, "trust_remote_code=True"]))
    return Case(f'pipe = DiffusionPipeline.from_pretrained("{source}", {options})', installed=False, **surroundings)


NO_TRUST = r"ValueError: .*trust_remote_code=True"
FULL_WEIGHTS = ("*/model.safetensors", "*/diffusion_pytorch_model.safetensors")
HALF = 'variant="fp16", dtype=torch.float16'
MIXED = 'dtype={"transformer": torch.bfloat16, "default": torch.float32}'
PLAIN = 'pipe = DiffusionPipeline.from_pretrained("org/tiny")'

# cases of one chain follow each other and share a cache; chains run side by side
CHAINS: list[list[Case]] = [
    # a local folder
    [load("./tiny", silent=True)],
    [load_trusting("./tiny", silent=True)],
    # by id, and again without the network
    [load("org/tiny"), load("org/tiny", offline=True, silent=True)],
    [
        load_trusting("org/tiny"),
        # diffusers (get_cached_module_file) asks the hub for the commit of a pipeline's code, cached or not
        load_trusting("org/tiny", error="OfflineModeIsEnabled", offline=True, silent=True),
        Case(
            'folder = os.path.dirname(hf_hub_download("org/tiny", "model_index.json"))\n'
            "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)",
            installed=False,
            offline=True,
            silent=True,
        ),
    ],
    # without trust
    [Case(PLAIN)],
    [Case(PLAIN, error=NO_TRUST, installed=False)],
    # parts, types and files
    [load("org/tiny", "token_encoder=None, latent_encoder=None", not_fetched=("*_encoder/*",))],
    [load("org/tiny", HALF, expected="float16", not_fetched=FULL_WEIGHTS)],
    [load_trusting("org/tiny", HALF, expected="float16", not_fetched=FULL_WEIGHTS)],
    [load_trusting("org/sharded", not_fetched=FULL_WEIGHTS)],
    [load("org/sharded", 'device_map="balanced"')],
    [load("org/tiny", MIXED, expected="mixed")],
    [load_trusting("org/tiny", MIXED, expected="mixed")],
    # private repositories and revisions
    [load("org/private")],
    [load("org/private", error="RepositoryNotFoundError: 404", token="hf_other")],
    [load("org/tiny", 'revision="v1"', expected="v1")],
    [load_trusting("org/tiny", "revision=FIRST_COMMIT", expected="v1")],
    [load("org/tiny", 'revision="v9"', error="RevisionNotFoundError: 404")],
    # single components
    [
        Case(
            'models = {"transformer": LDLMTransformer1DModel.from_pretrained("org/tiny", subfolder="transformer")}',
            not_fetched=("*_encoder/*", "*_decoder/*", "*.py"),
        )
    ],
    [
        Case(
            f'models = {{name: AutoModel.from_pretrained("org/tiny", subfolder=name) for name in {MODELS}}}',
            not_fetched=("*.py",),
        )
    ],
    [
        Case(
            'models = {name: AutoModel.from_pretrained("org/tiny", subfolder=name, trust_remote_code=True) '
            f"for name in {MODELS}}}",
            installed=False,
        )
    ],
    [
        Case(
            'models = {"latent_decoder": AutoModel.from_pretrained("org/tiny", subfolder="latent_decoder")}',
            error=NO_TRUST,
            installed=False,
            not_fetched=("*.py",),
        )
    ],
    # published and saved again, from both ways of loading
    [
        Case(f'{load("org/tiny").code}\npipe.push_to_hub("org/again")'),
        load_trusting("org/again"),
    ],
    [
        Case(
            f"{load_trusting('org/tiny').code}\n"
            'pipe.push_to_hub("org/absent-again", max_shard_size="10KB")\n'
            'pipe.save_pretrained("./absent-again")',
            installed=False,
        ),
        load("org/absent-again"),
        load("./absent-again", silent=True),
    ],
]


# --- inside a process ------------------------------------------------------------------------------------------------


def sample(pipe: Any) -> dict[str, Any]:
    """Token ids and latents that a pipeline samples from a seed, and the digests of its weights."""
    pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": 4, "num_inference_steps": 8}
    sequences = pipe(**options, generator=torch.Generator().manual_seed(0), output_type="seq").sequences
    latents = pipe(**options, generator=torch.Generator().manual_seed(0), output_type="latent").latents
    models = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}
    return {
        "sequences": sequences.tolist(),
        "latents": latents.flatten().tolist(),
        "weights": {name: digest(model) for name, model in models.items()},
    }


def digest(model: Any) -> str:
    """Of a component's weights and their types, bit for bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        # numpy has no bfloat16
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + content)
    return total.hexdigest()


def publish() -> dict[str, Any]:
    """Publishes the pipelines that the cases load; gives their samples, their weights' digests and a commit."""
    import ldlm_hf
    from tiny_pipeline import build_pipeline

    # so many layers that each component has more than one shard
    first, pipe = (build_pipeline(seed, num_layers=4) for seed in (1, 0))
    published = {"v1": sample(first), "float32": sample(pipe)}
    first.push_to_hub("org/tiny")
    commit = HfApi().model_info("org/tiny").sha
    HfApi().create_tag("org/tiny", tag="v1")
    pipe.push_to_hub("org/tiny")
    pipe.push_to_hub("org/sharded", max_shard_size="10KB")
    pipe.push_to_hub("org/private", private=True)
    pipe.save_pretrained("./tiny")
    pipe.transformer.to(torch.bfloat16)
    published["mixed"] = sample(pipe)
    # what must stay in float32 does so when a type is asked for at loading only
    pipe = ldlm_hf.LDLMPipeline.from_pretrained("./tiny", dtype=torch.float16)
    published["float16"] = sample(pipe)
    pipe.push_to_hub("org/tiny", variant="fp16")
    return published | {"first_commit": commit}


def describe_error(error: BaseException) -> str:
    """An error with what caused it, in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if error.__cause__ is None else f"{text} ← {describe_error(error.__cause__)}"


def run_in_process(code: str, first_commit: str) -> dict[str, Any]:
    """Executes the code of a case; gives what came of it."""
    torch.set_num_threads(1)
    names: dict[str, Any] = {"torch": torch, "DiffusionPipeline": DiffusionPipeline, "AutoModel": AutoModel}
    names |= {"os": os, "hf_hub_download": hf_hub_download, "FIRST_COMMIT": first_commit, "publish": publish}
    installed = importlib.util.find_spec("ldlm_hf") is not None
    if installed:
        import ldlm_hf

        names |= {name: getattr(ldlm_hf, name) for name in ldlm_hf.__all__ if name.startswith("LDLM")}
    found: dict[str, Any] = {"installed": installed}
    try:
        exec(code, names)
    except Exception as error:
        found["error"] = describe_error(error)
    else:
        if "pipe" in names:
            found["value"] = sample(names["pipe"])
        elif "models" in names:
            found["value"] = {name: digest(model) for name, model in names["models"].items()}
        else:
            found["value"] = names["value"]
    places = ("diffusers_modules.", "transformers_modules.")
    found["executed"] = [name for name in sys.modules if name.startswith(places)]
    return found


# --- the processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What came of a case: in words, whether code of the repository was executed, and what is wrong with it."""

    case: Case
    outcome: str
    executed: bool
    wrong: list[str]


@dataclass
class RoundTrip:
    """What the processes share: a folder, the hub's repositories, and what was published there (see `publish`)."""

    folder: Path
    repositories: dict[str, Repository] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    def publish(self) -> None:
        """Fills the hub.

        Raises:
            RuntimeError: the pipeline could not be published, or its samples could not tell right from wrong.
        """
        found, _ = self.run(Case("value = publish()"), self.folder / "publisher")
        if "error" in found:
            raise RuntimeError(f"Publishing failed: {found['error']}")
        self.published = found["value"]
        if self.published["float32"]["sequences"] == self.published["v1"]["sequences"]:
            raise RuntimeError("Two of the published pipelines sample the same, so that no mistake would be seen.")

    def run(self, case: Case, home: Path) -> tuple[dict[str, Any], LoopbackHub]:
        """What a process whose cache is `home` finds when it runs a case, and the hub with its records."""
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        # a package that is installed in editable form shows itself by a .pth file, which -S leaves unread
        places = [str(REPOSITORY), *map(os.path.abspath, sys.path)]
        if not case.installed:
            places = [place for place in places if not Path(place, "ldlm_hf").exists()]
        file = Path(tempfile.mkdtemp(dir=self.folder)) / "found.json"
        command = [sys.executable, *([] if case.installed else ["-S"]), __file__, "--process", case.code]
        command += ["--found", str(file), "--first_commit", self.published.get("first_commit", "")]
        with LoopbackHub(USERS, self.repositories) as hub:
            environment = hub.environment(home, case.token) | {"OMP_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(places)
            if case.offline:
                environment["HF_HUB_OFFLINE"] = "1"
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
            result = subprocess.run(command, env=environment, cwd=work, timeout=TIMEOUT, **options)
        if result.returncode != 0:
            return {"error": f"exit status {result.returncode}: {result.stderr}", "executed": []}, hub
        return json.loads(file.read_text()), hub

    def judge(self, case: Case, found: dict[str, Any], hub: LoopbackHub) -> Row:
        """Compares what a process found, and the hub's records, with what is expected."""
        wrong = []
        if "error" in found:
            outcome = self.shorten(found["error"])
            right = case.error is not None and re.search(case.error, found["error"]) is not None
        else:
            outcome = compare(found["value"], self.published[case.expected])
            right = case.error is None and outcome.endswith("equal")
        if not right:
            wrong.append(f"expected: {case.error or case.expected}")
        if found.get("installed", case.installed) != case.installed:
            wrong.append("the package could be imported" if not case.installed else "the package was not found")
        may_execute = "trust_remote_code=True" in case.code and not case.installed and "error" not in found
        if bool(found["executed"]) != may_execute:
            wrong.append(f"code of the repository that was executed: {', '.join(found['executed']) or 'none'}")
        fetched = sorted({name for _, name in hub.downloads for one in case.not_fetched if fnmatch.fnmatch(name, one)})
        if fetched:
            wrong.append(f"downloaded: {', '.join(fetched)}")
        if case.silent and hub.requests:
            wrong.append(f"asked the hub: {hub.requests[0]}")
        return Row(case, outcome, bool(found["executed"]), wrong)

    def shorten(self, error: str) -> str:
        """An error with its causes, the beginning and the end of each, without the places of this machine."""
        error = re.sub(r"http://127\.0\.0\.1:\d+", "http://hub", error.replace(str(self.folder / "work"), "."))
        parts = [part for part in error.split(" ← ") if not part.startswith("HTTPStatusError")]
        return " ← ".join(part if len(part) < 170 else f"{part[:85]} … {part[-75:]}" for part in parts)


def compare(found: dict[str, Any], published: dict[str, Any]) -> str:
    """What differs between a pipeline, or single components' weights, and what was published."""
    weights = found.get("weights", found)
    differing = [name for name, value in weights.items() if value != published["weights"].get(name)]
    if differing or not weights:
        return f"weights differ: {', '.join(differing) or 'none were found'}"
    if "sequences" not in found:
        return "weights equal"
    # the last bits depend on where a tensor lies in its file, and so in memory
    pairs = zip(found["latents"], published["latents"], strict=True)
    if any(abs(one - other) > LATENT_TOLERANCE for one, other in pairs):
        return "weights equal, latents differ"
    return f"weights equal, samples {'equal' if found['sequences'] == published['sequences'] else 'differ'}"


def run_chain(trip: RoundTrip, chain: list[Case]) -> list[Row]:
    """Runs cases one after the other with one cache."""
    rows, home = [], Path(tempfile.mkdtemp(dir=trip.folder))
    for case in chain:
        row = trip.judge(case, *trip.run(case, home))
        status = "FAILED" if row.wrong else "ok"
        print(f"{status:6} {case.surroundings}: {case.code} → {row.outcome}", *row.wrong, sep="\n       ")
        rows.append(row)
    return rows


def write_report(rows: list[Row], seconds: float) -> None:
    from ldlm_hf.evaluation.machine import device_name, versions
    from ldlm_hf.evaluation.markdown import markdown_table

    failed = sum(bool(row.wrong) for row in rows)
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = f"""# Published, and loaded again

`python checks/hub_round_trip.py` on {device_name(torch.device("cpu"))}, {os.cpu_count()} cores; {installed}.
{len(rows)} cases, {failed} of them not as expected, in {seconds:.0f} s.

Each row is a process of its own; rows that follow each other may share its cache. `./tiny` is a folder saved by the
package; everything else is asked of `checks/loopback_hub.py` by the real client. `org/tiny` holds the pipeline and its
`fp16` variant, and at tag `v1` another one. *weights equal*: all weights and their types are those of the pipeline
that was published, bit for bit. *samples equal*: 4 texts in 8 steps have the same tokens from the same seed, and
latents within {LATENT_TOLERANCE}. An error is followed by what caused it (←). Code of the repository was executed
in the rows that say so, and in no other.

"""
    columns = ["#", "surroundings", "what was done", "outcome", "repository code"]
    cells = [
        [
            str(number),
            row.case.surroundings,
            "<br>".join(f"`{line}`" for line in row.case.code.splitlines()),
            f"**NOT EXPECTED** ({'; '.join(row.wrong)}): {row.outcome}" if row.wrong else row.outcome,
            "executed" if row.executed else "–",
        ]
        for number, row in enumerate(rows, 1)
    ]
    REPORT.write_text(text + "\n".join(markdown_table(columns, cells)) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Publishes a tiny pipeline and loads it again in every way.")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first_commit", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        options.found.write_text(json.dumps(run_in_process(options.process, options.first_commit)))
        return 0

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as executor:
        trip = RoundTrip(Path(folder))
        trip.publish()
        rows = [row for chain in executor.map(lambda chain: run_chain(trip, chain), CHAINS) for row in chain]
    write_report(rows, time.monotonic() - start)
    failed = sum(bool(row.wrong) for row in rows)
    print(f"{len(rows)} cases, {failed} not as expected; see {REPORT.relative_to(REPOSITORY)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Publishes a tiny pipeline and loads it again in every way that is promised, each time in a fresh process.

    python checks/hub_round_trip.py [--olah_python .venv-olah/bin/python]

The processes talk to a hub on this machine (checks/loopback_hub.py) by the real `huggingface_hub` client, or to olah,
an independent program that serves the same git repositories. olah lives in an environment of its own, which is made
where it does not exist. What was done and what came of it is printed and written to checks/hub_round_trip.md; the exit
status is 1 if any of it was not what is expected.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopback_hub import LoopbackHub, client_environment


REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = Path(__file__).with_suffix(".md")
OLAH = "olah==0.5.4"
USERS = {"hf_org": "org", "hf_other": "other"}
SEED = 0
LATENT_TOLERANCE = 1e-3
TIMEOUT = 600  # seconds
MODELS = ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder")


@dataclass(frozen=True)
class Case:
    """One process: what it does, in which surroundings, and what has to come of it.

    Attributes:
        code: what is done. It leaves a pipeline as `pipe`, or components as `models`, by name.
        expected: which of the published pipelines it must be, "float32" or another of `publish`.
        error: a pattern for the text of the error that must be raised instead.
        source: where files come from: "folder", "hub" or "olah".
        installed: whether `ldlm_hf` can be imported.
        token: access token of the client.
        home: name of the client's cache; a new one by default.
        offline: whether `HF_HUB_OFFLINE=1` is set.
        not_fetched: patterns of files that must not have been downloaded.
        silent: whether the hub must not have been asked for anything.
    """

    code: str
    expected: str = "float32"
    error: str | None = None
    source: str = "hub"
    installed: bool = True
    token: str | None = "hf_org"
    home: str | None = None
    offline: bool = False
    not_fetched: tuple[str, ...] = ()
    silent: bool = False

    @property
    def trusted(self) -> bool:
        """Whether repository code may be executed."""
        return "trust_remote_code=True" in self.code


ENCODER_WEIGHTS = ("token_encoder/*", "latent_encoder/*")
FULL_WEIGHTS = ("*/model.safetensors", "*/diffusion_pytorch_model.safetensors")
NO_TRUST = r"ValueError: .*trust_remote_code=True"
ABSENT = {"installed": False}
FOLDER: dict[str, Any] = {"source": "folder", "silent": True}
OLAH_MAIN = {"source": "olah", "token": None}

# cases of one chain follow each other; chains run side by side
CHAINS: list[list[Case]] = [
    # a local folder
    [Case('pipe = LDLMPipeline.from_pretrained("./tiny")', **FOLDER)],
    [Case('pipe = DiffusionPipeline.from_pretrained("./tiny")', error=NO_TRUST, **ABSENT, **FOLDER)],
    [Case('pipe = DiffusionPipeline.from_pretrained("./tiny", trust_remote_code=True)', **ABSENT, **FOLDER)],
    # by id, and again without the network
    [
        Case('pipe = LDLMPipeline.from_pretrained("org/tiny")', home="installed"),
        Case('pipe = LDLMPipeline.from_pretrained("org/tiny")', home="installed", offline=True, silent=True),
        Case('pipe = LDLMPipeline.from_pretrained("org/tiny", local_files_only=True)', home="installed", silent=True),
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", trust_remote_code=True)',
            home="absent",
            **ABSENT,
        ),
        # diffusers (get_cached_module_file) asks the hub for the commit of a pipeline's code, cached or not
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", trust_remote_code=True)',
            error="OfflineModeIsEnabled",
            home="absent",
            offline=True,
            silent=True,
            **ABSENT,
        ),
        Case(
            'folder = os.path.dirname(hf_hub_download("org/tiny", "model_index.json"))\n'
            "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)",
            home="absent",
            offline=True,
            silent=True,
            **ABSENT,
        ),
        Case('pipe = DiffusionPipeline.from_pretrained("org/tiny")', error=NO_TRUST, home="absent", **ABSENT),
    ],
    [Case('pipe = DiffusionPipeline.from_pretrained("org/tiny")')],
    [Case('pipe = DiffusionPipeline.from_pretrained("org/tiny", trust_remote_code=True)')],
    [
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/tiny")',
            error="LocalEntryNotFoundError|not fully cached",
            offline=True,
            silent=True,
        )
    ],
    # parts, types and files
    [
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/tiny", token_encoder=None, latent_encoder=None)',
            not_fetched=ENCODER_WEIGHTS,
        )
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", token_encoder=None, latent_encoder=None, '
            "trust_remote_code=True)",
            **ABSENT,
        )
    ],
    [
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/tiny", variant="fp16", dtype=torch.float16)',
            "float16",
            not_fetched=FULL_WEIGHTS,
        )
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", variant="fp16", dtype=torch.float16, '
            "trust_remote_code=True)",
            "float16",
            not_fetched=FULL_WEIGHTS,
            **ABSENT,
        )
    ],
    [Case('pipe = LDLMPipeline.from_pretrained("org/sharded")', not_fetched=FULL_WEIGHTS)],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/sharded", trust_remote_code=True)',
            not_fetched=FULL_WEIGHTS,
            **ABSENT,
        )
    ],
    [Case('pipe = LDLMPipeline.from_pretrained("org/tiny", dtype=torch.bfloat16)', "bfloat16")],
    [
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/tiny", '
            'dtype={"transformer": torch.bfloat16, "default": torch.float32})',
            "mixed",
        )
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", '
            'dtype={"transformer": torch.bfloat16, "default": torch.float32}, trust_remote_code=True)',
            "mixed",
            **ABSENT,
        )
    ],
    [Case('pipe = LDLMPipeline.from_pretrained("org/sharded", device_map="balanced")')],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/sharded", device_map="cpu", trust_remote_code=True)',
            **ABSENT,
        )
    ],
    # private repositories and revisions
    [Case('pipe = LDLMPipeline.from_pretrained("org/private")')],
    [Case('pipe = LDLMPipeline.from_pretrained("org/private")', error="RepositoryNotFoundError: 401", token=None)],
    [
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/private")',
            error="RepositoryNotFoundError: 404",
            token="hf_other",
        )
    ],
    [Case('pipe = LDLMPipeline.from_pretrained("org/tiny", revision="v1")', "v1")],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", revision=FIRST_COMMIT, trust_remote_code=True)',
            "v1",
            **ABSENT,
        )
    ],
    [Case('pipe = LDLMPipeline.from_pretrained("org/tiny", revision="v9")', error="RevisionNotFoundError: 404")],
    # single components
    [
        Case(
            'models = {"transformer": LDLMTransformer1DModel.from_pretrained("org/tiny", subfolder="transformer")}',
            not_fetched=("*_encoder/*", "*_decoder/*", "*.py"),
        )
    ],
    [
        Case(
            'scheduler = TangentEulerMaruyamaScheduler.from_pretrained("org/tiny", subfolder="scheduler")\n'
            'latent_decoder = LDLMLatentDecoder.from_pretrained("org/tiny", subfolder="latent_decoder")\n'
            'pipe = LDLMPipeline.from_pretrained("org/v1", scheduler=scheduler, latent_decoder=latent_decoder, '
            "token_encoder=None, latent_encoder=None, "
            'transformer=LDLMTransformer1DModel.from_pretrained("org/tiny", subfolder="transformer"), '
            'token_decoder=LDLMTokenDecoder.from_pretrained("org/tiny", subfolder="token_decoder"))',
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
            **ABSENT,
        )
    ],
    [
        Case(
            'models = {"latent_decoder": AutoModel.from_pretrained("org/tiny", subfolder="latent_decoder")}',
            error=NO_TRUST,
            not_fetched=("*.py",),
            **ABSENT,
        )
    ],
    # published and saved again, from each way of loading
    [
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/tiny")\n'
            'pipe.push_to_hub("org/again")\n'
            'pipe.save_pretrained("./again")'
        ),
        Case('pipe = DiffusionPipeline.from_pretrained("org/again", trust_remote_code=True)', **ABSENT),
        Case('pipe = LDLMPipeline.from_pretrained("./again")', **FOLDER),
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", trust_remote_code=True)\n'
            'pipe.push_to_hub("org/absent-again")\n'
            'pipe.save_pretrained("./absent-again")',
            **ABSENT,
        ),
        Case('pipe = LDLMPipeline.from_pretrained("org/absent-again")'),
        Case('pipe = LDLMPipeline.from_pretrained("./absent-again")', **FOLDER),
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("./tiny", trust_remote_code=True)\n'
            'pipe.push_to_hub("org/from-folder", private=True, max_shard_size="10KB")',
            source="folder",
            **ABSENT,
        ),
        Case('pipe = DiffusionPipeline.from_pretrained("org/from-folder", trust_remote_code=True)', **ABSENT),
    ],
    # through olah
    [
        Case('pipe = LDLMPipeline.from_pretrained("org/tiny", revision="main")', home="olah", **OLAH_MAIN),
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/tiny", revision="main")',
            home="olah",
            offline=True,
            **OLAH_MAIN,
        ),
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", revision="main")',
            error=NO_TRUST,
            **ABSENT,
            **OLAH_MAIN,
        )
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/tiny", revision="main", trust_remote_code=True)',
            **ABSENT,
            **OLAH_MAIN,
        )
    ],
    [
        Case(
            'pipe = LDLMPipeline.from_pretrained("org/tiny", revision="main", variant="fp16", dtype=torch.float16)',
            "float16",
            **OLAH_MAIN,
        )
    ],
    [
        Case(
            'pipe = DiffusionPipeline.from_pretrained("org/sharded", revision="main", trust_remote_code=True)',
            **ABSENT,
            **OLAH_MAIN,
        )
    ],
    [Case('pipe = LDLMPipeline.from_pretrained("org/tiny", revision="v1")', "v1", **OLAH_MAIN)],
    [
        Case(
            'models = {"latent_decoder": AutoModel.from_pretrained("org/tiny", revision="main", '
            'subfolder="latent_decoder", trust_remote_code=True)}',
            **ABSENT,
            **OLAH_MAIN,
        )
    ],
]


# --- inside a process ------------------------------------------------------------------------------------------------


def build_pipeline(seed: int) -> Any:
    """A tiny pipeline of all components, with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    import ldlm_hf

    torch.manual_seed(seed)
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, 40)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backbone_config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=1
    )
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(backbone_config).save_pretrained(folder)
        token_encoder = ldlm_hf.LDLMTokenEncoder.from_backbone(folder)
    token_encoder.fit_statistics([torch.randint(2, 40, (8, 8)) for _ in range(4)])
    widths = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "token_hidden_size": 32}
    sizes = widths | {"num_hidden_layers": 2, "sequence_length": 8, "num_latents": 6, "latent_size": 16}
    pipe = ldlm_hf.LDLMPipeline(
        token_encoder=token_encoder,
        latent_encoder=ldlm_hf.LDLMLatentEncoder(ldlm_hf.LDLMLatentEncoderConfig(**sizes)),
        latent_decoder=ldlm_hf.LDLMLatentDecoder(ldlm_hf.LDLMLatentDecoderConfig(**sizes)),
        token_decoder=ldlm_hf.LDLMTokenDecoder(
            ldlm_hf.LDLMTokenDecoderConfig(vocab_size=40, num_hidden_layers=1, **widths)
        ),
        transformer=ldlm_hf.LDLMTransformer1DModel(
            in_channels=16, num_layers=2, num_attention_heads=2, attention_head_dim=12, sample_size=6
        ),
        scheduler=ldlm_hf.TangentEulerMaruyamaScheduler(),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>"),
    )
    with torch.no_grad():
        for component in (pipe.transformer, pipe.latent_decoder, pipe.token_decoder):
            # off their start, at which the denoiser gives zeros
            for parameter in component.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return pipe


def sample(pipe: Any) -> dict[str, Any]:
    """Token ids and latents that a pipeline samples from the seed, and the digests of its weights."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": 4, "num_inference_steps": 8}
    sequences = pipe(**options, generator=torch.Generator().manual_seed(SEED), output_type="seq").sequences
    latents = pipe(**options, generator=torch.Generator().manual_seed(SEED), output_type="latent").latents
    models = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}
    return {
        "sequences": sequences.tolist(),
        "latents": latents.flatten().tolist(),
        "weights": {name: digest(model) for name, model in models.items()},
    }


def digest(model: Any) -> str:
    """Of a component's weights and their types, bit for bit."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        # numpy has no bfloat16
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + content)
    return total.hexdigest()


def publish() -> dict[str, Any]:
    """Publishes the pipelines that the cases load; gives their samples, their weights' digests and a commit."""
    import torch
    from huggingface_hub import HfApi

    import ldlm_hf

    first, pipe = build_pipeline(seed=1), build_pipeline(seed=0)
    published = {"v1": sample(first), "float32": sample(pipe)}
    first.push_to_hub("org/tiny")
    first.push_to_hub("org/v1")
    commit = HfApi().model_info("org/tiny").sha
    HfApi().create_tag("org/tiny", tag="v1")
    pipe.push_to_hub("org/tiny")
    pipe.push_to_hub("org/sharded", max_shard_size="10KB")
    pipe.push_to_hub("org/private", private=True)
    pipe.save_pretrained("./tiny")
    pipe.transformer.to(torch.bfloat16)
    published["mixed"] = sample(pipe)
    # what must stay in float32 does so when a type is asked for at loading only
    for name in ("bfloat16", "float16"):
        pipe = ldlm_hf.LDLMPipeline.from_pretrained("./tiny", dtype=getattr(torch, name))
        published[name] = sample(pipe)
    pipe.push_to_hub("org/tiny", variant="fp16")
    return published | {"first_commit": commit}


def describe_error(error: BaseException) -> str:
    """An error with what caused it, in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if error.__cause__ is None else f"{text} ← {describe_error(error.__cause__)}"


def run_in_process(code: str, first_commit: str) -> dict[str, Any]:
    """Executes the code of a case; gives what came of it."""
    import torch
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download
    from transformers import AutoModel

    torch.set_num_threads(1)
    names: dict[str, Any] = {"torch": torch, "DiffusionPipeline": DiffusionPipeline, "AutoModel": AutoModel}
    names |= {"os": os, "hf_hub_download": hf_hub_download, "FIRST_COMMIT": first_commit, "publish": publish}
    installed = importlib.util.find_spec("ldlm_hf") is not None
    if installed:
        import ldlm_hf

        names |= {name: getattr(ldlm_hf, name) for name in ldlm_hf.__all__ if name.startswith(("LDLM", "Tangent"))}
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
    """A folder with everything that the processes use, and what was published from it.

    Attributes:
        folder: holds the hub's storage, the clients' caches and the working directory of the processes.
        olah: address of olah, which serves the hub's storage; None without it.
        published: see `publish`.
    """

    folder: Path
    olah: str | None = None
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("storage", "work"):
            (self.folder / name).mkdir(exist_ok=True)

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    def publish(self) -> None:
        """Fills the hub.

        Raises:
            RuntimeError: the pipeline could not be published, or its samples could not tell right from wrong.
        """
        found, _ = self.run(Case("value = publish()"))
        if "error" in found:
            raise RuntimeError(f"Publishing failed: {found['error']}")
        self.published = found["value"]
        if self.published["float32"]["sequences"] == self.published["v1"]["sequences"]:
            raise RuntimeError("Two of the published pipelines sample the same, so that no mistake would be seen.")

    def run(self, case: Case) -> tuple[dict[str, Any], LoopbackHub]:
        """Runs one case in a process; gives what the process found, and the hub with its records."""
        home = Path(tempfile.mkdtemp(dir=self.folder)) if case.home is None else self.folder / case.home
        with LoopbackHub(self.storage, USERS) as hub:
            endpoint = self.olah if case.source == "olah" and self.olah else hub.endpoint
            environment = client_environment(endpoint, home, case.token) | {"OMP_NUM_THREADS": "1"}
            # a package that is installed in editable form shows itself by a .pth file, which -S leaves unread
            places = [place for place in map(os.path.abspath, sys.path) if case.installed or not holds_package(place)]
            environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY)] * case.installed + places)
            if case.offline:
                environment["HF_HUB_OFFLINE"] = "1"
            file = Path(tempfile.mkdtemp(dir=self.folder)) / "found.json"
            command = [sys.executable, *([] if case.installed else ["-S"]), __file__, "--process", case.code]
            command += ["--found", file, "--first_commit", self.published.get("first_commit", "")]
            result = subprocess.run(
                command,
                env=environment,
                cwd=self.folder / "work",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
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
        may_execute = case.trusted and not case.installed and "error" not in found
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
        parts = [part if len(part) < 170 else f"{part[:85]} … {part[-75:]}" for part in parts]
        return " ← ".join(parts)


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


def holds_package(place: str) -> bool:
    """Whether `ldlm_hf` would be found at a place of the import path."""
    return (Path(place) / "ldlm_hf").exists()


def run_chain(trip: RoundTrip, chain: list[Case]) -> list[Row]:
    """Runs cases one after the other."""
    rows = []
    for case in chain:
        row = trip.judge(case, *trip.run(case))
        status = "FAILED" if row.wrong else "ok"
        print(f"{status:6} {describe(case)}: {case.code} → {row.outcome}", *row.wrong, sep="\n       ")
        rows.append(row)
    return rows


def describe(case: Case) -> str:
    """The surroundings of a case in words."""
    return ", ".join(["package" if case.installed else "no package", case.source, *describe_client(case)])


def describe_client(case: Case) -> list[str]:
    """How the client of a case differs from the owner's, on the network."""
    words = ["HF_HUB_OFFLINE=1"] if case.offline else []
    if case.source == "hub" and case.token != "hf_org":
        words.append("no token" if case.token is None else "another user's token")
    return words


@contextmanager
def serve_by_olah(python: Path, storage: Path, folder: Path) -> Iterator[str]:
    """Starts olah on the hub's storage, as a mirror that asks no other server; gives its address."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{folder}/cache"\n'
        f'mirrors-path = ["{storage}"]\n[accessibility]\noffline = true\n'
    )
    (folder / "olah.toml").write_text(settings)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "olah.server", "--config", folder / "olah.toml", "--log-path", folder / "logs"]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_served(f"{address}/api/models/org/tiny/revision/main", process)
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_until_served(address: str, process: subprocess.Popen) -> None:
    """Returns when an address answers.

    Raises:
        RuntimeError: the process has ended, or it does not answer within a minute.
    """
    for _ in range(120):
        try:
            with urllib.request.urlopen(address):
                return
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"olah answers {error.code} to {address}") from error
        except urllib.error.URLError:
            if process.poll() is not None:
                raise RuntimeError(f"olah ended with status {process.returncode}") from None
            time.sleep(0.5)
    raise RuntimeError("olah does not answer")


def install_olah(python: Path) -> None:
    """Makes the environment of olah if there is none."""
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", OLAH], check=True)


# --- the report ------------------------------------------------------------------------------------------------------


def describe_machine(olah_python: Path) -> str:
    """Processor and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    question = "import importlib.metadata; print(importlib.metadata.version('olah'))"
    olah = subprocess.run([olah_python, "-c", question], capture_output=True, text=True, check=True).stdout.strip()
    git = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    return (
        f"{next(models, platform.machine())}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"{', '.join(versions)}, olah {olah}, git {git}; seed {SEED}."
    )


def write_report(rows: list[Row], machine: str, seconds: float) -> None:
    """Writes the table."""
    failed = sum(bool(row.wrong) for row in rows)
    text = f"""# Published, and loaded again

`python checks/hub_round_trip.py` on {machine}
{len(rows)} cases, {failed} of them not as expected, in {seconds:.0f} s.

Each row is a process of its own. *folder*: `./tiny`, saved by the package. *hub*: the real client against
`checks/loopback_hub.py`. *olah*: the real client against olah, which serves the same git repositories. `org/tiny`
holds the pipeline and its `fp16` variant, tag `v1` and `org/v1` another one. *weights equal*: all weights and their
types are those of the pipeline that was published, bit for bit. *samples equal*: 4 texts in 8 steps have the same
tokens from the same seed, and latents within {LATENT_TOLERANCE}. An error is followed by what caused it (←). Code of
the repository was executed in the rows that say so, and in no other.

| # | package | files from | trusted | client | what was done | outcome | repository code |
|--:|---|---|---|---|---|---|---|
"""
    for number, row in enumerate(rows, 1):
        case = row.case
        cells = [
            str(number),
            "yes" if case.installed else "no",
            case.source,
            "yes" if case.trusted else "no",
            ", ".join(describe_client(case)),
            "<br>".join(f"`{line}`" for line in case.code.splitlines()),
            f"**NOT EXPECTED** ({'; '.join(row.wrong)}): {row.outcome}" if row.wrong else row.outcome,
            "executed" if row.executed else "–",
        ]
        text += "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
    REPORT.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Publishes a tiny pipeline and loads it again in every way.")
    parser.add_argument(
        "--olah_python",
        type=Path,
        default=REPOSITORY / ".venv-olah" / "bin" / "python",
        help="Python of an environment that has olah; by default one in this repository, made if it is not there",
    )
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first_commit", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        options.found.write_text(json.dumps(run_in_process(options.process, options.first_commit)))
        return 0

    install_olah(options.olah_python)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trip = RoundTrip(Path(folder))
        trip.publish()
        with (
            serve_by_olah(options.olah_python, trip.storage, Path(folder) / "olah-server") as trip.olah,
            ThreadPoolExecutor(os.cpu_count()) as executor,
        ):
            chains = list(executor.map(lambda chain: run_chain(trip, chain), CHAINS))
    rows = [row for chain in chains for row in chain]
    write_report(rows, describe_machine(options.olah_python), time.monotonic() - start)
    failed = sum(bool(row.wrong) for row in rows)
    print(f"{len(rows)} cases, {failed} not as expected; see {REPORT.relative_to(REPOSITORY)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Writes the code that lies beside a saved pipeline's weights as this version of the package generates it.

python training/write_code.py FOLDER [FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ldlm_hf
from ldlm_hf.loading.remote_code import generate
from ldlm_hf.loading.repository import PIPELINE_MODULE, write_component_code


def write_code(folder: Path) -> None:
    """Writes the code of each component that a folder holds, and that of the pipeline if it is one."""
    for file in [*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        class_name = config["_class_name"] if "_class_name" in config else config["architectures"][0]
        write_component_code(getattr(ldlm_hf, class_name), folder, file.parent.name)
    if (folder / ldlm_hf.LDLMPipeline.config_name).exists():
        (folder / f"{PIPELINE_MODULE}.py").write_text(generate(ldlm_hf.LDLMPipeline), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        write_code(folder)


if __name__ == "__main__":
    main()

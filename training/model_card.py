"""Writes cards of configurations that have not been trained, which say so.

python training/model_card.py training/configs/NAME.yaml ... [--output_dir model_cards]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ldlm_hf.hub.model_card import write_card
from ldlm_hf.hub.run_files import Run
from ldlm_hf.loading.settings_reader import load_settings
from ldlm_hf.training.finish import describe
from ldlm_hf.training.settings import RunSettings


def write_template_card(config: Path, output_dir: Path) -> None:
    """The card of a configuration that has not been trained, in a folder of its name."""
    settings = load_settings(RunSettings, str(config), [])
    results = describe(settings, settings.model.sequence_length)
    write_card(Run(config.stem, asdict(settings), results), output_dir / config.stem)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the cards of configurations that have not been trained.")
    parser.add_argument("configs", type=Path, nargs="+", help="YAML files of training/configs/")
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards"), help="folder of the cards' folders")
    options = parser.parse_args(arguments)
    for config in options.configs:
        write_template_card(config, options.output_dir)
        print(options.output_dir / config.stem / "README.md")


if __name__ == "__main__":
    main()

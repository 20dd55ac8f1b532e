"""FLOPs of a training step, the devices' peak, and the share of it that a run uses (model FLOPs utilisation, MFU).

    python training/flops.py --config training/configs/NAME.yaml [section.key=value ...]
    python training/flops.py --config training/configs/openwebtext_1024.yaml --device_name A100 --num_devices 64

prints them a component, without weights, downloads or a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, GPT2Config, PretrainedConfig

from ldlm_hf.evaluation.markdown import human_count, markdown_table
from ldlm_hf.loading.pretrained_sources import resolve_pretrained_source
from ldlm_hf.loading.settings_reader import load_settings
from ldlm_hf.models.language_model import add_position_to_config, cut_config
from ldlm_hf.models.token_encoder import LDLMTokenEncoder, LDLMTokenEncoderConfig
from ldlm_hf.objective import JointObjective
from ldlm_hf.training.components import build_objective
from ldlm_hf.training.flops import (
    PEAK_TFLOPS,
    PartFlops,
    PassFlops,
    data_sheet_peak,
    device_peak,
    estimate_run,
)
from ldlm_hf.training.launch import speed_up
from ldlm_hf.training.loop import split_batch
from ldlm_hf.training.settings import ModelSettings, RunSettings


def build_meta_objective(settings: RunSettings, backbone: PretrainedConfig) -> JointObjective:
    """The joint objective of a run on the meta device, with a token encoder that passes for a fitted one."""
    model = settings.model
    is_language_model = model.representation == "hidden"
    # which token it is does not matter, but it takes a position
    prefix_token_id = 0 if model.prefix and is_language_model else None
    longest = getattr(backbone, "max_position_embeddings", None)
    if prefix_token_id is not None:
        add_position_to_config(backbone)
    token_encoder_config = LDLMTokenEncoderConfig(
        backbone_config=cut_config(backbone, model.layer % (backbone.num_hidden_layers + 1))
        if is_language_model
        else None,
        layer=model.layer,
        representation=model.representation,
        vocab_size=backbone.vocab_size,
        hidden_size=backbone.hidden_size,
        max_position_embeddings=longest,
        prefix_token_id=prefix_token_id,
        num_statistics_tokens=1,
    )
    # the head's first values would be read from the backbone
    model = replace(model, token_decoder_head_from_backbone=False)
    with torch.device("meta"):
        return build_objective(replace(settings, model=model), LDLMTokenEncoder(token_encoder_config))


def read_backbone_config(settings: ModelSettings, given: str | None) -> PretrainedConfig:
    """The configuration of the backbone: the one given on the command line, a known one, or its own file."""
    if given is not None:
        values = dict(OmegaConf.create(given))
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"--backbone_config {given!r} must name a model_type that transformers knows.")
        return CONFIG_MAPPING[model_type](**values)
    if settings.backbone == "openai-community/gpt2":  # its published configuration is the defaults
        return GPT2Config()
    source = resolve_pretrained_source(settings.backbone)
    try:
        return AutoConfig.from_pretrained(source.name_or_path, **source.kwargs)
    except OSError as error:
        raise OSError(
            f"model.backbone={settings.backbone!r} cannot be read; give its sizes instead: --backbone_config "
            "'{model_type: gpt2, n_embd: 768, n_layer: 12, n_head: 12}'."
        ) from error


def parts_table(flops: PassFlops, objective: nn.Module) -> list[str]:
    """Table of the parts: trained parameters, MFLOP a token, and shares of the model FLOPs."""
    trained: dict[str, int] = {
        name: sum(parameter.numel() for parameter in component.parameters() if parameter.requires_grad)
        for name, component in objective.named_children()
    }
    trained["all"] = sum(trained.values())
    whole = [sum(getattr(part, name) for part in flops.parts) for name in ("forward", "backward", "recomputed")]
    rows = []
    for part in (*flops.parts, PartFlops("all", *whole)):
        both = part.forward + part.backward
        megaflops = [
            number / flops.num_tokens / 1e6 for number in (part.forward, part.backward, both, part.recomputed)
        ]
        *numbers, recomputed = [f"{number:.1f}" for number in megaflops]
        parameters = human_count(trained[part.name]) if trained.get(part.name) else ""
        share = both / flops.num_tokens / flops.per_token
        rows.append([part.name, parameters, *numbers, f"{share:.1%}", recomputed])
    columns = ["part", "trained parameters", "forward", "backward", "both", "share", "computed again"]
    return markdown_table(columns, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--backbone_config", metavar="YAML", help="sizes of a backbone that cannot be reached")
    parser.add_argument("--num_devices", type=int, default=1)
    parser.add_argument("--device_name", help="a GPU of the table of peaks; else this machine's device")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, over those of the file")
    arguments = parser.parse_intermixed_args()
    if arguments.device_name is not None and data_sheet_peak(arguments.device_name, "fp32") is None:
        known = ", ".join(" ".join(row) for row in PEAK_TFLOPS)
        parser.error(f"--device_name {arguments.device_name!r} is not in the table: {known}.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    settings: RunSettings = load_settings(RunSettings, arguments.config, arguments.overrides)
    loop = settings.loop
    split_batch(loop, arguments.num_devices)  # raises where the batch does not split over them
    backbone = read_backbone_config(settings.model, arguments.backbone_config)
    objective = build_meta_objective(settings, backbone)
    speed_up(objective, replace(loop, compile=False))
    precision = "bf16" if loop.mixed_precision == "bf16" else "fp32"
    peak = data_sheet_peak(arguments.device_name or "", precision)
    if peak is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peak = device_peak(device, loop.mixed_precision, loop.peak_tflops)
    estimate = estimate_run(objective, loop, settings.model.sequence_length, arguments.num_devices, peak)
    print("MFLOP a token:\n", *parts_table(estimate.pass_flops, objective), "", estimate.summary(), sep="\n")


if __name__ == "__main__":
    main()

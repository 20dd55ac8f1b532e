"""A page in the browser: watch texts emerge from noise, and walk through the latent space between two texts.

    python -m ldlm_hf.app --pipeline runs/demo/pipeline

Needs the extra `app` (gradio). A Hub Space serves the same page with `build_app(pipeline).launch(theme=THEME)`.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .loading.checks import whole_number
from .pipelines.pipeline_ldlm import LDLMPipeline


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("ldlm_hf.app needs gradio; install it with `pip install ldlm_hf[app]`.") from error


MAX_TEXTS = 8
MAX_POINTS = 11
CHANGED = "changed"
THEME = gr.themes.Default(font=["Arial", "sans-serif"])  # fonts that every system has: none is fetched
CONCURRENCY_ID = "pipeline"  # events that share it wait for each other

ABOUT_GENERATION = """
A latent diffusion language model writes all tokens of a text at once. It starts from noise in its latent space, and
every step predicts the clean latents anew. Here that prediction is decoded to text every few steps; **highlighted are
the tokens that changed** since the text shown before. The texts that stand here at the end are those that the pipeline
gives for the same number of texts, steps and seed without this page.
"""

ABOUT_INTERPOLATION = """
Both texts are mapped to latents, and points on the straight line between them are decoded to text. The first and the
last are the two texts as the model reconstructs them; **highlighted are the tokens that differ** from the text above.
"""


@dataclass(frozen=True)
class Frame:
    """What a generation has reached.

    Attributes:
        step: number of steps taken.
        num_steps: number of steps asked for; more than `step` in the last frame of a generation that was stopped.
        sequences: token ids (B, L) of the present clean prediction.
        seconds: in the last frame, the duration of all steps and of the final decoding, without that of the frames
            before; None in the others.
    """

    step: int
    num_steps: int
    sequences: torch.Tensor
    seconds: float | None = None


def generate_frames(
    pipeline: LDLMPipeline,
    batch_size: int,
    num_inference_steps: int,
    seed: int,
    decode_every: int,
    stop: threading.Event,
) -> Iterator[Frame]:
    """Yields a frame every `decode_every` steps, and one at the end.

    The last frame's sequences are those of the pipeline for `batch_size`, `num_inference_steps` and the generator
    `torch.Generator().manual_seed(seed)`. Setting `stop`, or closing the iterator, interrupts the pipeline after the
    step that it is at; the last frame is then that step's.

    Raises:
        ValueError: values that the pipeline cannot work with, or a `seed` or `decode_every` that is no integer or out
            of range.
    """
    for name, value, minimum in (("seed", seed, 0), ("decode_every", decode_every, 1)):
        number = whole_number(value)
        if number is None or not minimum <= number < 2**63:
            raise ValueError(f"`{name}` must be an integer from {minimum} to 2**63 - 1, got {value!r}.")
    frames: queue.SimpleQueue[Frame | Exception] = queue.SimpleQueue()
    step, display_seconds = 0, 0.0

    def on_step_end(
        pipeline: LDLMPipeline, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        nonlocal step, display_seconds
        step = index + 1
        is_server_ending = not threading.main_thread().is_alive()
        if stop.is_set() or is_server_ending:
            pipeline._interrupt = True
        elif step % decode_every == 0 and step < pipeline.num_timesteps:
            tensors["clean_latents"].cpu()  # an accelerator's step may not have ended yet, and it is no decoding
            start = time.perf_counter()
            sequences = pipeline.decode_to_sequences(tensors["clean_latents"]).cpu()
            frames.put(Frame(step, pipeline.num_timesteps, sequences))
            display_seconds += time.perf_counter() - start
        return {}

    def sample() -> None:
        try:
            start = time.perf_counter()
            output = pipeline(
                batch_size=batch_size,
                num_inference_steps=num_inference_steps,
                generator=torch.Generator().manual_seed(int(seed)),
                output_type="seq",
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=["clean_latents"],
            )
            sequences = output.sequences.cpu()
            seconds = time.perf_counter() - start - display_seconds
            frames.put(Frame(step, int(num_inference_steps), sequences, seconds))
        except Exception as error:
            frames.put(error)

    # a thread, since the pipeline calls back and frames are to be yielded; the end of the server waits for it
    thread = threading.Thread(target=sample, daemon=False)
    thread.start()
    try:
        is_last = False
        while not is_last:
            frame = frames.get()
            if isinstance(frame, Exception):
                raise frame
            yield frame
            is_last = frame.seconds is not None
    finally:
        stop.set()
        thread.join()


@torch.no_grad()
def interpolate_texts(pipeline: LDLMPipeline, first: str, second: str, num_points: int) -> torch.Tensor:
    """Token ids (num_points, L) of evenly spaced points on the line from the one text's latents to the other's.

    Raises:
        ValueError: a pipeline without encoders, an empty or over-long text, or fewer than two points.
    """
    number = whole_number(num_points)
    if number is None or number < 2:
        raise ValueError(f"`num_points` must be an integer of at least 2, got {num_points!r}.")
    ends = []
    for name, text in (("first", first), ("second", second)):
        if not text or not text.strip():
            raise ValueError(f"The {name} text is empty; write one.")
        try:
            ends.append(pipeline.encode(text))  # (1, N, d_z)
        except ValueError as error:
            raise ValueError(f"The {name} text cannot be encoded: {error}") from error
    start, end = ends
    weights = torch.linspace(0, 1, number, device=start.device)[:, None, None]
    return pipeline.decode_to_sequences(torch.lerp(start, end, weights)).cpu()


def highlight_changes(
    tokenizer: PreTrainedTokenizerBase, sequence: torch.Tensor, previous: torch.Tensor | None
) -> list[tuple[str, str | None]]:
    """Splits a text into pieces, labelled `CHANGED` where their tokens differ from those at the same place before.

    The pieces joined are exactly the text, without special tokens. A character of several tokens counts to the last.

    Args:
        sequence: token ids (L,).
        previous: the token ids before, (L,); None where there were none, so that all are new.
    """
    token_ids = sequence.tolist()
    changed = [True] * len(token_ids) if previous is None else (sequence != previous).tolist()
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    pieces: list[tuple[str, str | None]] = []
    num_tokens = start = 0
    for is_changed, run in itertools.groupby(changed):
        num_tokens += len(list(run))
        # tokens have no text of their own (spaces, word pieces, bytes of one character): only prefixes are decoded
        prefix = tokenizer.decode(token_ids[:num_tokens], skip_special_tokens=True)
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prefix, text, strict=False))
        end = max(start, len(list(common)))
        if not is_changed:  # spaces look odd at the start of a highlighted piece
            end += len(text[end:]) - len(text[end:].lstrip())
        if end > start:
            pieces.append((text[start:end], CHANGED if is_changed else None))
        start = end
    return pieces


def describe(frame: Frame, previous: torch.Tensor | None) -> str:
    """The status line of a generation: where it is and what changed, at the end how fast it was."""
    batch_size, length = frame.sequences.shape
    if frame.seconds is None:
        num_changed = frame.sequences.numel() if previous is None else int((frame.sequences != previous).sum())
        return f"**Step {frame.step} of {frame.num_steps}**: {num_changed} of {frame.sequences.numel()} tokens changed"
    if frame.step < frame.num_steps:
        return f"**Stopped after {frame.step} of {frame.num_steps} steps**: the texts are that step's prediction"
    texts = "1 text" if batch_size == 1 else f"{batch_size} texts"
    return (
        f"**{frame.sequences.numel() / frame.seconds:,.0f} tokens/s**: {texts} of {length} tokens, {frame.num_steps} "
        f"steps and the final decoding in {frame.seconds:.2f} s (not counted: decoding on the way for this page)"
    )


def build_app(pipeline: LDLMPipeline) -> gr.Blocks:
    """The page for a pipeline, to be launched with `build_app(pipeline).launch(theme=THEME)`.

    Two tabs: generation, and interpolation between two texts, which needs the pipeline's encoders and otherwise says
    that they are missing. Visitors wait for each other.
    """
    with gr.Blocks(title="Latent Diffusion Language Model", analytics_enabled=False) as app:
        gr.Markdown("# Latent Diffusion Language Model")
        with gr.Tab("Generate"):
            _generation_tab(pipeline)
        with gr.Tab("Interpolate"):
            if pipeline.missing_encoders:
                gr.Markdown(
                    "Interpolation is off: to map texts to latents it needs the pipeline's optional components "
                    "`token_encoder` and `latent_encoder`, and this pipeline has no "
                    f"`{'` and no `'.join(pipeline.missing_encoders)}`."
                )
            else:
                _interpolation_tab(pipeline)
    return app


def _generation_tab(pipeline: LDLMPipeline) -> None:
    """Controls and texts of the generation; the Stop button reaches the generation of its own visitor only."""
    running: dict[str | None, threading.Event] = {}

    def generate(
        num_inference_steps: int, batch_size: int, seed: int, decode_every: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        stop = running[request.session_hash] = threading.Event()
        previous = None
        try:
            for frame in generate_frames(pipeline, batch_size, num_inference_steps, seed, decode_every, stop):
                labels = [f"Text {number}" for number in range(1, len(frame.sequences) + 1)]
                before = itertools.repeat(None) if previous is None else previous
                yield [
                    describe(frame, previous),
                    *_fill_boxes(pipeline, labels, frame.sequences, before, MAX_TEXTS),
                ]
                previous = frame.sequences
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            running.pop(request.session_hash, None)

    def stop_generation(request: gr.Request) -> None:
        if request.session_hash in running:
            running[request.session_hash].set()

    gr.Markdown(ABOUT_GENERATION)
    with gr.Row():
        steps = gr.Slider(1, 1024, value=128, step=1, label="Steps", elem_id="steps")
        texts = gr.Slider(1, MAX_TEXTS, value=2, step=1, label="Texts", elem_id="texts")
        every = gr.Slider(1, 128, value=8, step=1, label="Decode every", elem_id="decode-every")
        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="seed")
    with gr.Row():
        start_button = gr.Button("Generate", variant="primary", elem_id="generate")
        stop_button = gr.Button("Stop", elem_id="stop")
    status = gr.Markdown(elem_id="status")
    boxes = _text_boxes(MAX_TEXTS, "generated")
    start_button.click(
        generate,
        [steps, texts, seed, every],
        [status, *boxes],
        api_name="generate",
        show_progress="hidden",
        concurrency_limit=1,
        concurrency_id=CONCURRENCY_ID,
    )
    stop_button.click(stop_generation, api_name="stop", queue=False)


def _interpolation_tab(pipeline: LDLMPipeline) -> None:
    """Two texts, and the texts on the line between them."""

    def interpolate(first: str, second: str, num_points: int) -> list[Any]:
        try:
            sequences = interpolate_texts(pipeline, first, second, num_points)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        labels = [f"{100 * point / (num_points - 1):.0f}% of the way" for point in range(len(sequences))]
        return _fill_boxes(pipeline, labels, sequences, torch.cat([sequences[:1], sequences[:-1]]), MAX_POINTS)

    gr.Markdown(ABOUT_INTERPOLATION)
    length = pipeline.latent_encoder.config.sequence_length
    with gr.Row():
        first = gr.Textbox(label=f"First text, at most {length} tokens", lines=2, elem_id="first")
        second = gr.Textbox(label=f"Second text, at most {length} tokens", lines=2, elem_id="second")
    points = gr.Slider(2, MAX_POINTS, value=7, step=1, label="Points", elem_id="points")
    button = gr.Button("Interpolate", variant="primary", elem_id="interpolate")
    boxes = _text_boxes(MAX_POINTS, "point")
    button.click(
        interpolate,
        [first, second, points],
        boxes,
        api_name="interpolate",
        concurrency_limit=1,
        concurrency_id=CONCURRENCY_ID,
    )


def _text_boxes(number: int, name: str) -> list[gr.HighlightedText]:
    """Hidden places for texts, with the ids `name-0`, `name-1`, ..."""
    return [
        gr.HighlightedText(
            visible=False,
            color_map={CHANGED: "#ffd166"},
            show_inline_category=False,
            elem_id=f"{name}-{index}",
        )
        for index in range(number)
    ]


def _fill_boxes(
    pipeline: LDLMPipeline,
    labels: list[str],
    sequences: torch.Tensor,
    previous: Iterable[torch.Tensor | None],
    num_boxes: int,
) -> list[Any]:
    """Shows each sequence of (B, L), with its label and what changed from `previous`, and hides other boxes."""
    shown = [
        gr.update(value=highlight_changes(pipeline.tokenizer, sequence, before), label=label, visible=True)
        for label, sequence, before in zip(labels, sequences, previous, strict=False)
    ]
    return shown + [gr.update(value=None, visible=False)] * (num_boxes - len(shown))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldlm_hf.app", description="The page for a pipeline.")
    parser.add_argument("--pipeline", required=True, metavar="PATH_OR_ID", help="folder or Hub id of an LDLMPipeline")
    parser.add_argument("--port", type=int, help="port to serve on; by default the first free one from 7860")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the pipeline runs (here: %(default)s)",
    )
    arguments = parser.parse_args()
    pipeline = LDLMPipeline.from_pretrained(arguments.pipeline).to(arguments.device)
    build_app(pipeline).launch(server_port=arguments.port, theme=THEME)


if __name__ == "__main__":
    main()

"""The tab that shows texts emerge from noise."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch

from ..pipelines.pipeline_ldlm import LDLMPipeline
from .events import ONE_AT_A_TIME, check_integer, errors_shown, seeded_generator
from .marked_texts import fill_boxes, mark_changes, text_boxes


MAX_TEXTS = 8

ABOUT = """
A latent diffusion language model writes all tokens of a text at once. It starts from noise in its latent space, and
every step predicts the clean latents anew. Here that prediction is decoded to text every few steps; **highlighted are
the tokens that changed** since the text shown before. The texts that stand here at the end are those that the pipeline
gives for the same number of texts, steps and seed without this page.
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
    generator = seeded_generator(seed)
    check_integer("decode_every", decode_every, 1)
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
                generator=generator,
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


def generation_tab(pipeline: LDLMPipeline) -> None:
    """Controls and texts of the generation; the Stop button reaches the generation of its own visitor only."""
    running: dict[str | None, threading.Event] = {}

    def generate(
        num_inference_steps: int, batch_size: int, seed: int, decode_every: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        stop = running[request.session_hash] = threading.Event()
        previous = None
        try:
            with errors_shown():
                for frame in generate_frames(pipeline, batch_size, num_inference_steps, seed, decode_every, stop):
                    labels = [f"Text {number}" for number in range(1, len(frame.sequences) + 1)]
                    before = itertools.repeat(None) if previous is None else previous
                    pairs = zip(frame.sequences, before, strict=False)
                    texts = [mark_changes(pipeline, *pair) for pair in pairs]
                    yield [describe(frame, previous), *fill_boxes(labels, texts, MAX_TEXTS)]
                    previous = frame.sequences
        finally:
            running.pop(request.session_hash, None)

    def stop_generation(request: gr.Request) -> None:
        if request.session_hash in running:
            running[request.session_hash].set()

    gr.Markdown(ABOUT)
    with gr.Row():
        steps = gr.Slider(1, 1024, value=128, step=1, label="Steps", elem_id="steps")
        texts = gr.Slider(1, MAX_TEXTS, value=2, step=1, label="Texts", elem_id="texts")
        every = gr.Slider(1, 128, value=8, step=1, label="Decode every", elem_id="decode-every")
        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="seed")
    with gr.Row():
        start_button = gr.Button("Generate", variant="primary", elem_id="generate")
        stop_button = gr.Button("Stop", elem_id="stop")
    status = gr.Markdown(elem_id="status")
    boxes = text_boxes(MAX_TEXTS, "generated")
    start_button.click(
        generate,
        [steps, texts, seed, every],
        [status, *boxes],
        api_name="generate",
        show_progress="hidden",
        **ONE_AT_A_TIME,
    )
    stop_button.click(stop_generation, api_name="stop", queue=False)

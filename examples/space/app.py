"""A page that sets CLIP, a tuner and FVG-PT side by side on a picture of yours.

`python app.py [ADAPTER] [--base MODEL]`, or FVG_ADAPTER and FVG_BASE in the environment of a Space.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import gradio as gr

from fvg_adapter.errors import FVGError
from looking import MAX_BYTES, class_names, look, open_adapter, open_picture

GATES = """
**r = {trust:.2f}**: trust in the foreground, from 0 (ignore the mask) to 1.
**b = {prior_trust:.2f}**: trust in plain CLIP, used for classes that were not tuned on.
Answers of FVG-PT by its **{branch}** branch. It leaves the image tower as it is, so its attention is the tuner's.
No mask is needed for its answers: the one shown is made from the attention, and only r asks about it.
"""
PICTURES = 4  # attention of the three, and the mask
BRANCHES = {"base": "base (every class was tuned on)", "new": "new (no class was tuned on)", "joint": "joint"}


def page(adapter: str = "", base: str | None = None) -> gr.Blocks:
    """The page; `adapter` (Hub id or folder) stands in its box at first, `base` replaces the base model it names."""

    def answer(name: str, upload: str | None, typed: str) -> tuple[Any, ...]:
        try:
            picture, classes = open_picture(upload), class_names(typed)
            seen = look(open_adapter(name, base), picture, classes)
        except (FVGError, OSError) as error:  # OSError: what transformers and the Hub say about names they do not know
            empty: list[Any] = [None] * (3 + PICTURES) + [""] * PICTURES
            return (gr.update(value=f"⚠️ {error}", visible=True), "", *empty)
        labels = [gr.update(value=chances, label=kind) for kind, chances in seen.answers.items()]
        images, texts = zip(*seen.pictures, strict=True)
        text = GATES.format(trust=seen.trust, prior_trust=seen.prior_trust, branch=BRANCHES[seen.branch])
        return (gr.update(value="", visible=False), text, *labels, *images, *texts)

    with gr.Blocks(title="FVG-PT: where does your CLIP look?") as blocks:
        gr.Markdown("# Where does your CLIP look?\nPlain CLIP, a prompt tuner and FVG-PT on one picture, side by side.")
        with gr.Row():
            with gr.Column(scale=1):
                upload = gr.File(label="Picture (JPEG, PNG, WebP)", type="filepath", elem_id="picture", height=140)
                typed = gr.Textbox(label="Class names, separated by commas", elem_id="classes", lines=2)
                name = gr.Textbox(label="Adapter: Hub id or folder", value=adapter, elem_id="adapter")
                button = gr.Button("Look", variant="primary", elem_id="look")
                problem = gr.Markdown(visible=False, elem_id="problem")
            with gr.Column(scale=3):
                with gr.Row():
                    labels = [
                        gr.Label(label=kind, elem_id=f"answer-{i}")
                        for i, kind in enumerate(("CLIP", "Tuner", "FVG-PT"))
                    ]
                with gr.Row(elem_id="pictures"):
                    pictures, captions = [], []
                    for _ in range(PICTURES):
                        with gr.Column(min_width=150):
                            captions.append(gr.Markdown())
                            pictures.append(gr.Image(show_label=False, interactive=False, buttons=[]))
                gates = gr.Markdown(elem_id="gates")
        outputs = [problem, gates, *labels, *pictures, *captions]
        for event in (button.click, typed.submit):
            event(answer, [name, upload, typed], outputs, api_name=False)
    return blocks


def main() -> None:
    """Serves the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", nargs="?", default=os.environ.get("FVG_ADAPTER", ""))
    parser.add_argument("--base", default=os.environ.get("FVG_BASE"), help="base model instead of the one it names")
    parser.add_argument("--port", type=int, default=None)
    given = parser.parse_args()
    page(given.adapter, given.base).launch(server_port=given.port, max_file_size=MAX_BYTES)


if __name__ == "__main__":
    main()

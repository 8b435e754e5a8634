"""Checkpoints to serve, and what Megatron says of them.

    python -m tests.gpu.served_models make DIR        # anywhere; needs the extra `quantize`
    python -m tests.gpu.served_models logprobs DIR --out FILE    # with a GPU, in BF16

    random model --hf_to_megatron--> ckpt --megatron_to_hf--> bf16 --quantize--> fp8-block fp8 nvfp4
                                      `--> log-probabilities in fp32 on the CPU, in BF16 on the GPU

DIR/questions.json has what is asked: text alone, one image, the same text with another image, two
images, a large one. Each of DIR/dense and DIR/moe has ckpt, one folder a format, and log-
probabilities of every response token: cpu.json and cuda.json by Megatron, FORM.json by transformers
with what a quantised checkpoint's matrices stand for. `logprobs` asks transformers in BF16 on the
same GPU, too, and sets both against fp32. tests/gpu/check_served.py asks an engine the same.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkpoint_tools import hf_to_megatron, megatron_to_hf, quantize, world
from checkpoint_tools.hf_directory import SafetensorsDirectory
from checkpoint_tools.megatron_directory import load_model
from model_providers import backend as backends
from model_providers.parallel import Layout, ParallelState
from prism_megatron.bench import workload
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import ImageSource, Message, SFTRow, read_sft
from prism_megatron.pipelines import tiny_model
from prism_megatron.training.policy import response_logprobs
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import Sequence
from tests import tiny_models
from tests.gpu.check_served import AGREES, distance

KINDS = ("dense", "moe")
ROWS = 8
PROMPT_TOKENS = 1024


def questions(directory: Path) -> list[tuple[SFTRow, Sequence]]:
    """Rows, and each as the model reads it."""
    encoder = PromptEncoder(
        AutoProcessor.from_pretrained(directory / "tiny"),
        system_prompt=None,
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=PROMPT_TOKENS,
    )
    stored = read_sft(directory / "sft.json")
    rows = [stored[i] for i in range(ROWS)]
    one, other = rows[:2]
    question = one.messages[0].content
    text = question.replace("<image>", "")
    asked = [
        *rows,
        replace(one, images=other.images),
        _asking(one, "<image>" + question, one.images + other.images),
        _asking(one, "<image>" + question, other.images * 2),
        _asking(one, question, (_enlarged(one.images[0], (230, 150)),)),
        _asking(one, text, ()),
        _asking(other, text, ()),
    ]
    return [(r, encoder.sft_sequence(encoder.encode_prompt(r), r.response)) for r in asked]


def _asking(row: SFTRow, text: str, images: tuple[ImageSource, ...]) -> SFTRow:
    return replace(row, messages=(Message("user", text),), images=images)


def _enlarged(image: ImageSource, size: tuple[int, int]) -> ImageSource:
    """Many patches, in neither direction a multiple of what they are merged by."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(image.read())).resize(size).save(stream, "PNG")
    return ImageSource(data=stream.getvalue())


def write_questions(directory: Path) -> None:
    """questions.json and its images, for engines."""
    image = AutoProcessor.from_pretrained(directory / "tiny").image_token_id
    asked = []
    for row, sequence in questions(directory):
        split = int((~sequence.response_mask).sum())
        ids = sequence.input_ids.tolist()
        # as one sends a prompt to an engine: one placeholder an image, whatever its size
        runs = [(token, len(list(run))) for token, run in groupby(ids[:split])]
        prompt = [t for token, count in runs for t in [token] * (1 if token == image else count)]
        images = []
        for source in row.images:
            images.append(f"asked-{len(asked)}-{len(images)}.png")
            (directory / images[-1]).write_bytes(source.read())
        asked.append(
            {"prompt": prompt, "prompt_tokens": split, "response": ids[split:], "images": images}
        )
    (directory / "questions.json").write_text(json.dumps(asked))


def make(directory: Path) -> None:
    """Data, models, checkpoints, exports and quantised exports."""
    directory.mkdir(parents=True, exist_ok=True)
    digit_sums.build(schema.DigitSums(out=directory, train_rows=64, heldout_rows=2))
    system = Path(__file__).resolve().parents[2] / "configs/quickstart/system_prompt.txt"
    tiny_model.run(
        schema.TinyModel(out=directory / "tiny", data=directory / "sft.json", system_prompt=system)
    )
    world.join()
    write_questions(directory)
    for kind in KINDS:
        source = tiny_models.save_served(directory / kind / "source", directory / "tiny", kind)
        hf_to_megatron.convert(source, directory / kind / "ckpt")
        megatron_to_hf.export(directory / kind / "ckpt", directory / kind / "bf16")
        for form in quantize.FORMATS:
            if (kind, form) != ("moe", "nvfp4"):
                calibration = None if form == "fp8-block" else directory / "prompts.parquet"
                quantize.quantize(
                    directory / kind / "bf16", directory / kind / form, form, calibration, 64
                )
        shutil.rmtree(source)


Answers = list[list[float]]


def by_megatron(directory: Path, backend_name: str) -> dict[str, Answers]:
    """Log-probabilities of each question's response tokens, of each kind of model."""
    backend = backends.create(backend_name)
    backend.init_process_group()
    parallel = ParallelState.create(Layout())
    backend.seed(1, parallel)
    sequences = [sequence for _, sequence in questions(directory)]
    found = {}
    for kind in KINDS:
        model = load_model(directory / kind / "ckpt", parallel, backend, "language")
        runner = ModelRunner(model, micro_batch_tokens=2 * PROMPT_TOKENS, pad_id=0, optimizer=None)
        answers = runner.infer(sequences, response_logprobs)
        found[kind] = [a[s.response_mask].tolist() for a, s in zip(answers, sequences, strict=True)]
        file = directory / kind / f"{backend_name}.json"
        file.write_text(json.dumps(found[kind]))
    return found


@torch.no_grad()
def by_transformers(
    directory: Path, kind: str, dtype: torch.dtype, device: str, form: str | None = None
) -> Answers:
    """The same of the exported model, a sequence at a time; form: with the matrices that this
    quantised one stands for."""
    path = directory / kind / "bf16"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device)
    if form:
        written = SafetensorsDirectory(directory / kind / form)
        for name in filter(quantize.PROJECTION.fullmatch, written):
            _replace(model, name, quantize.dequantized(written, name))
    answers = []
    for _, sequence in questions(directory):
        ids = sequence.input_ids
        inputs = {
            "input_ids": ids[None],
            "attention_mask": torch.ones_like(ids)[None],
            "mm_token_type_ids": (ids == model.config.image_token_id).int()[None],
        }
        if sequence.images:
            inputs["pixel_values"] = torch.cat([image.pixel_values for image in sequence.images])
            grids = [image.grid_thw for image in sequence.images]
            inputs["image_grid_thw"] = torch.tensor(grids)
        logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits[0]
        found = logits.float().log_softmax(-1)[:-1].cpu().gather(1, ids[1:, None]).flatten()
        answers.append(found[sequence.response_mask[1:]].tolist())
    return answers


def _replace(model: Any, name: str, tensor: Tensor) -> None:
    """Put a matrix into transformers' model, where experts are fused."""
    prefix, found, rest = name.partition(".experts.")
    if not found:
        model.get_parameter(name).copy_(tensor)
        return
    index, part = rest.split(".")[:2]
    if part == "down_proj":
        model.get_parameter(f"{prefix}.experts.down_proj")[int(index)].copy_(tensor)
        return
    fused = model.get_parameter(f"{prefix}.experts.gate_up_proj")[int(index)]
    fused.chunk(2)[part == "up_proj"].copy_(tensor)


def answer_on_the_cpu(directory: Path) -> None:
    """cpu.json by Megatron, and FORM.json by transformers, all in fp32."""
    exact = by_megatron(directory, "cpu")
    for kind in KINDS:
        for form in quantize.FORMATS:
            if not (directory / kind / form).exists():
                continue
            answers = by_transformers(directory, kind, torch.float32, "cpu", form)
            (directory / kind / f"{form}.json").write_text(json.dumps(answers))
            print(kind, form, "from what was quantised:", distance(answers, exact[kind]))


def compare(directory: Path) -> dict[str, Any]:
    """BF16 on this GPU against Megatron in fp32, ours and theirs."""
    found = by_megatron(directory, "cuda")
    report: dict[str, Any] = {}
    for kind in KINDS:
        exact = json.loads((directory / kind / "cpu.json").read_text())
        theirs = by_transformers(directory, kind, torch.bfloat16, "cuda")
        report[kind] = {
            "megatron_bf16_to_fp32": distance(found[kind], exact),
            "transformers_bf16_to_fp32": distance(theirs, exact),
            "megatron_to_transformers_bf16": distance(found[kind], theirs),
        }
    return report


def check(report: dict[str, Any]) -> None:
    """Ours is as near to fp32 as theirs is, but for chance."""
    for kind in KINDS:
        ours, theirs = (report[kind][f"{who}_bf16_to_fp32"] for who in ("megatron", "transformers"))
        assert ours["mean"] < 1.5 * theirs["mean"] and ours["mean"] < AGREES, report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "logprobs"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "make":
        make(options.directory)
        answer_on_the_cpu(options.directory)
        return
    report = compare(options.directory)
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(
            json.dumps(report | workload.environment(backends.create("cuda")), indent=2) + "\n"
        )
    check(report)


if __name__ == "__main__":
    main()

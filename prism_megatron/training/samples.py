"""What was sampled and how it was judged, to look at.

run.dir/samples/step_NNNNNN.jsonl, every samples_every steps, a line a response that is trained on:
    row, prompt (an image is one of its tokens), response, both with control tokens, tokens,
    finish_reason, weight_version, advantage, and what the stage says of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from checkpoint_tools.files import write_atomically
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.types import Prompt, Rollout


def write_samples(
    folder: Path,
    step: int,
    encoder: PromptEncoder,
    samples: Sequence[tuple[Prompt, Rollout]],
    advantages: Tensor,
    judged: Mapping[str, Sequence[Any]],
) -> None:
    """Write those of a step; all ranks call this, and have the same.

    step: as in metrics.jsonl; a step that is taken again replaces its file. advantages [B], one a
    response; judged: by name what else is known of each response. ValueError if the disk refuses.
    """
    if dist.get_rank() != 0:
        return
    prompts = {prompt.row_id: _text_of(prompt, encoder) for prompt, _ in samples}
    lines = []
    for i, (prompt, rollout) in enumerate(samples):
        line = {
            "row": prompt.row_id,
            "prompt": prompts[prompt.row_id],
            "response": encoder.tokenizer.decode(list(rollout.ids)),
            "tokens": len(rollout.ids),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
            "advantage": float(advantages[i]),
            **{name: values[i] for name, values in judged.items()},
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"step_{step:06d}.jsonl", "".join(lines))


def _text_of(prompt: Prompt, encoder: PromptEncoder) -> str:
    shown: list[int] = []
    for token, run in groupby(prompt.input_ids):
        shown += [token] if token == encoder.image_token_id else run
    text: str = encoder.tokenizer.decode(shown)
    return text

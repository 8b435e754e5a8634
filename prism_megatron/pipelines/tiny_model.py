"""The quickstart's model: random weights, and a tokenizer trained on the data's own texts."""

from __future__ import annotations

import json

from checkpoint_tools import tiny_qwen3vl
from prism_megatron.config import schema


def run(config: schema.TinyModel) -> None:
    """Write config.out, a Hugging Face directory."""
    rows = json.loads(config.data.read_text())
    texts = [message["content"] for row in rows for message in row["messages"]]
    tiny_qwen3vl.create(
        config.out, texts, config.system_prompt.read_text().strip(), config.vocab_size, config.seed
    )

"""Qwen3-VL prompts as the trainer made them: token ids and pixels are taken as they are.

SGLang's own processor turns a list of ids back into text, tokenises that text, and preprocesses
images again, so that the engine may see other ids and other pixels than the trainer; its
"processor_output" input leaves out the M-RoPE positions of images besides (0.5.12). Here ids with
expanded placeholders and preprocessed patches pass untouched, or the request is refused.
"""

import torch
from sglang.srt.layers.rotary_embedding import MRotaryEmbedding
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.models.qwen3_vl import Qwen3VLForConditionalGeneration
from sglang.srt.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from prism_megatron.rollout import pixels

FORMAT = "prism_megatron"


class VerbatimQwen3VLProcessor(QwenVLImageProcessor):
    """Takes image_data of `FORMAT` (prism_megatron/rollout/sglang.py); others go the usual way."""

    models = [Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration]  # noqa: RUF012

    async def process_mm_data_async(self, image_data, input_text, request_obj, *args, **kwargs):
        """MultimodalProcessorOutput of a request; ValueError, a status 400, if it does not fit."""
        first = image_data[0] if image_data else None
        if not (isinstance(first, dict) and first.get("format") == FORMAT):
            return await super().process_mm_data_async(
                image_data, input_text, request_obj, *args, **kwargs
            )
        ids = torch.tensor(input_text, dtype=torch.long)
        grids = torch.tensor([image["grid_thw"] for image in image_data])
        merge = self.hf_config.vision_config.spatial_merge_size
        runs = _runs(ids == self.mm_tokens.image_token_id)
        wanted = [int(grid.prod()) // merge**2 for grid in grids]
        found = [end - start + 1 for start, end in runs]
        if found != wanted:
            raise ValueError(f"the prompt has image tokens in runs of {found}, images of {wanted}")
        positions, delta = MRotaryEmbedding.get_rope_index(
            spatial_merge_size=merge,
            image_token_id=self.mm_tokens.image_token_id,
            video_token_id=self.mm_tokens.video_token_id,
            vision_start_token_id=self.vision_start_token_id,
            model_type=self.model_type,
            input_ids=ids[None],
            image_grid_thw=grids,
        )
        return MultimodalProcessorOutput(
            input_ids=ids.tolist(),
            mm_items=[
                MultimodalDataItem(
                    modality=Modality.IMAGE,
                    hash=image["hash"],
                    feature=pixels.decode(image["pixels"], int(grid.prod())),
                    offsets=[run],
                    model_specific_data={"image_grid_thw": grid[None]},
                )
                for image, grid, run in zip(image_data, grids, runs, strict=True)
            ],
            im_start_id=self.vision_start_token_id,
            im_end_id=self.vision_end_token_id,
            im_token_id=self.mm_tokens.image_token_id,
            video_token_id=self.mm_tokens.video_token_id,
            mrope_positions=positions.squeeze(1),
            mrope_position_delta=delta,
        )


def _runs(marked):
    """(first, last) of each stretch of True."""
    steps = torch.diff(torch.nn.functional.pad(marked.int(), (1, 1)))
    starts, ends = (steps == 1).nonzero()[:, 0], (steps == -1).nonzero()[:, 0] - 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))

"""Qwen3-VL composed from megatron.core: vision tower, decoder with deepstack, one of two heads.

    pixel_values --> VisionModel --exchange--> features [1 + F, V, h]   (first chunk only)
                                        |  row 0 replaces the placeholder embeddings
    input_ids --> embedding ------------+--> hidden [T, 1, h]
                                        |
                              decoder layer i, then += features[1 + i] at the visual tokens
                                        |
                pipeline payload to the next chunk = [hidden ; features not yet added]
                                        |
                  last chunk: final norm --> log p(label) [T]  or  score [T]
                                             or, in training with options.entropy, [T, 2]: log
                                             p(label) and the entropy of the distribution

A pipeline stage holds one chunk of the decoder's layers, or several with virtual pipeline
parallelism: micro-batches pass the first chunk of every stage, then the second of every stage, and
so on. The payload shrinks with every layer that adds its feature, wherever that layer is.

With context parallelism all of this is for the rank's share of the T tokens (context.py).

With sequence parallelism every tensor-parallel rank holds its slice of these tokens and of the
visual rows in it. A row belongs to one rank only, so features enter through a copy whose backward
sums over the ranks; a plain slice would lose the other ranks' share of the tower's gradient. With a
replicated tower the exchange's backward sums them, and without sequence parallelism, where every
tensor-parallel rank has the same gradient of all rows, it gets one rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model_providers import checks, fp8_weights
from model_providers.architecture import Qwen3VLConfig
from model_providers.backend import Backend
from model_providers.config import (
    DEFAULT_OPTIONS,
    TrainingOptions,
    stage_layers,
    text_transformer_config,
    vision_transformer_config,
)
from model_providers.context import ContextShare
from model_providers.entropy import vocab_parallel_entropy
from model_providers.image_shares import FeatureExchange, exchange
from model_providers.layers import decoder_block
from model_providers.packed import packed_seq_params
from model_providers.parallel import ParallelState
from model_providers.router import SectionRouter, router_mask
from model_providers.vision import Grid, VisionModel

Head = Literal["language", "score"]
Read = Callable[[nn.Parameter], Tensor]


class Noise(Protocol):
    """Gaussian noise on one sequence's embeddings."""

    seed: int
    std: float


class Dropout(Protocol):
    """Dropout of one sequence's hidden states before the score head."""

    seed: int
    rate: float


class Batch(Protocol):
    """What the model reads of a micro-batch; shapes as in prism_megatron.types.PackedBatch."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    padding_mask: Tensor
    section: Tensor
    visual_index: Tensor
    feature_index: Tensor
    pixel_values: Tensor | None
    grids: Sequence[Grid]
    exchange: FeatureExchange | None
    noise: Sequence[Noise | None]
    dropout: Sequence[Dropout | None]
    routes: Tensor | None


class ScoreHead(nn.Module):
    """Linear hidden -> 1 without bias (the reference's v_head, value_head.py).

    Its weight is fp32; dtype is what it computes and rounds scores in. Under sequence parallelism
    each tensor-parallel rank scores its own tokens, hence the mark.
    """

    def __init__(self, hidden_size: int, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, section: Tensor) -> Tensor:
        """[T, 1, h] -> [T] fp32."""
        scores = nn.functional.linear(hidden.to(self.dtype), self.weight.to(self.dtype))
        return scores.float().flatten()


class SectionHeads(nn.Module):
    """A score head for each of model_providers.config.SECTIONS."""

    def __init__(self, hidden_size: int, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.perception = ScoreHead(hidden_size, sequence_parallel, dtype)
        self.reasoning = ScoreHead(hidden_size, sequence_parallel, dtype)

    def forward(self, hidden: Tensor, section: Tensor) -> Tensor:
        """[T, 1, h], section [T] -> [T], each token's from the head of its section."""
        perception, reasoning = self.perception(hidden, section), self.reasoning(hidden, section)
        return torch.where(section == 1, reasoning, perception)


class Embedding(MegatronModule):
    """The word embeddings, split over the tensor-parallel ranks by vocabulary."""

    def __init__(
        self, config: TransformerConfig, vocab: int, hidden: int, group: ProcessGroup
    ) -> None:
        super().__init__(config)
        self.tp_group = group
        self.word_embeddings = VocabParallelEmbedding(
            vocab,
            hidden,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=group,
        )


class LanguageModel(MegatronModule):
    """Embedding, decoder layers and head, as far as they are in one chunk.

    layers: the numbers, from 0, of the decoder layers in it.
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        parallel: ParallelState,
        backend: Backend,
        head: Head,
        options: TrainingOptions,
        chunk: int,
    ) -> None:
        layout = parallel.layout
        transformer = text_transformer_config(config, layout, backend, options)
        super().__init__(transformer)
        self.layers = stage_layers(config, layout, parallel.pipeline_rank, chunk)
        self.pre_process = parallel.is_first_stage and chunk == 0
        self.post_process = parallel.is_last_stage and chunk == layout.virtual_pipeline - 1
        self.tied = config.tie_word_embeddings and head == "language"
        vocab = padded_vocab_size(config.vocab_size, layout.tensor)
        self.tp_group = parallel.groups.tp
        if self.pre_process or (self.post_process and self.tied):
            self.embedding = Embedding(transformer, vocab, config.hidden_size, parallel.groups.tp)
        self.decoder = TransformerBlock(
            transformer,
            decoder_block(transformer, backend.layers, len(self.layers)),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=parallel.groups,
            vp_stage=chunk if layout.virtual_pipeline > 1 else None,
        )
        assert [layer.layer_number - 1 for layer in self.decoder.layers] == list(self.layers)
        if self.post_process and head == "language":
            # megatron.core's own linear layer adds to the gradient in place only with Apex
            plain = copy(transformer)
            plain.gradient_accumulation_fusion = False
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.tied,
                config=plain,
                init_method=transformer.init_method,
                tp_group=parallel.groups.tp,
            )
        elif self.post_process:
            head_type = SectionHeads if config.dedicated else ScoreHead
            self.score_head = head_type(
                config.hidden_size, transformer.sequence_parallel, options.score_dtype
            )
        if self.tied and self.pre_process != self.post_process:
            tied = self.embedding.word_embeddings.weight
            # a bucket of its own at both ends of the pipeline, so that data-parallel ranks hold the
            # same parts of its gradient there when the ends add theirs up
            tied.shared_embedding = True
            # the first chunk's is what the gradient norm counts
            tied.shared = self.post_process

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if f"{prefix}output_layer.weight" in state:
            # its padding depends on the tensor-parallel size, as the embedding's does, which
            # megatron.core marks itself
            state[f"{prefix}output_layer.weight"].allow_shape_mismatch = True
        if self.post_process and not self.pre_process and self.tied:
            # the last chunk's copy of the tied embedding is a replica of the first chunk's
            copy = state[f"{prefix}embedding.word_embeddings.weight"]
            copy.replica_id = (1, *copy.replica_id[1:])
        return state


class Qwen3VLModel(nn.Module):
    """One pipeline stage of Qwen3-VL: `chunks`, of which there are `virtual_pipeline`.

    head="language" gives log-probabilities of the labels, head="score" a scalar a token.
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        parallel: ParallelState,
        backend: Backend,
        head: Head = "language",
        options: TrainingOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Raises ValueError if layout or options do not fit the model or the backend."""
        checks.check_model(config, parallel.layout, options, backend)
        checks.check_installed(options.dispatcher)
        super().__init__()
        self.architecture, self.parallel, self.backend, self.head = config, parallel, backend, head
        self.precision = options.precision
        self.read_weight: Read = fp8_weights.value
        """What a parameter is to exports, syncs and checkpoints; ranks that hold the same ones read
        them together and in the same order."""
        self.chunks = nn.ModuleList(
            Qwen3VLChunk(config, parallel, backend, head, options, chunk)
            for chunk in range(parallel.layout.virtual_pipeline)
        )
        for before, chunk in pairwise(self.chunks):
            chunk.first_router = before.first_router + len(before.routers)

    @property
    def config(self) -> TransformerConfig:
        """The configuration that megatron.core's schedules go by: the first chunk's."""
        return self.chunks[0].config

    @property
    def vision_model(self) -> VisionModel:
        """The vision tower; the first stage has it."""
        return self.chunks[0].vision_model

    def freeze(self, language: bool, vision: bool, mergers: bool) -> None:
        """Stop gradients of the decoder with embeddings and head, of the tower, of its mergers."""
        if language:
            for chunk in self.chunks:
                chunk.language_model.requires_grad_(False)
        if self.parallel.is_first_stage:
            for name, part in self.vision_model.named_children():
                if mergers if "merger" in name else vision:
                    part.requires_grad_(False)

    def take_expert_loads(self) -> Tensor:
        """Tokens that each expert got from this rank since the last call, [routers, E] float32."""
        loads = torch.zeros(
            len(self._routers), self.architecture.num_experts, device=self.backend.device
        )
        for row, router in zip(loads, self._routers, strict=True):
            row += router.load
            router.load = 0
        return loads

    def set_step_loads(self, loads: Tensor) -> None:
        """Tell the routers how many tokens of the step take each expert, [routers, E]."""
        for row, router in zip(loads, self._routers, strict=True):
            router.step_load = row

    def take_balance(self) -> Tensor:
        """Load-balancing losses of this rank's tokens since the last call, times the step's tokens,
        [routers]."""
        found = torch.zeros(len(self._routers), device=self.backend.device)
        for place, router in enumerate(self._routers):
            found[place] += router.balance
            router.balance = 0
        return found

    @property
    def _routers(self) -> list[SectionRouter]:
        return [router for chunk in self.chunks for router in chunk.routers]

    @property
    def expert_layers(self) -> list[int]:
        """Numbers of the decoder layers with experts that this rank holds, in the order of
        Sequence.routes."""
        return [router.layer_number - 1 for chunk in self.chunks for router in chunk.routers]

    def record_routes(self, recording: bool) -> None:
        """Whether each chunk keeps its last pass's experts in `routes`, [T, routers, k]."""
        for chunk in self.chunks:
            chunk.routes = None
            for router in chunk.routers:
                router.recording, router.taken = recording, None

    def lacks_gradient_scales(self) -> bool:
        """Whether fp8="delayed" has seen no gradient yet, neither here nor before a checkpoint."""
        if self.precision.fp8 != "delayed":
            return False
        # Transformer Engine's, which a layer has after its first forward pass
        histories = [
            module.fp8_meta["scaling_bwd"].amax_history
            for module in self.modules()
            if "scaling_bwd" in getattr(module, "fp8_meta", ())
        ]
        return not any(bool(history.any()) for history in histories)

    def forward(self, batch: Batch, output: Literal["head", "logits"] = "head") -> Tensor:
        """Without pipeline parallelism, what Qwen3VLChunk gives; stages run in a schedule."""
        [chunk] = self.chunks
        return chunk(batch, output)


class Qwen3VLChunk(MegatronModule):
    """The part of Qwen3-VL that is computed at once; see the data flow at the top of the file."""

    # asked for by megatron.core's schedules
    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: Qwen3VLConfig,
        parallel: ParallelState,
        backend: Backend,
        head: Head,
        options: TrainingOptions,
        chunk: int,
    ) -> None:
        language_model = LanguageModel(config, parallel, backend, head, options, chunk)
        super().__init__(language_model.config)
        self.tp_group = parallel.groups.tp
        self.architecture, self.parallel, self.backend, self.head = config, parallel, backend, head
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        # in the order of use: gradients are reduced in the reverse of it (gradient_overlap.py)
        if self.pre_process:
            self.vision_model = VisionModel(
                vision_transformer_config(config, parallel.layout, backend, options.recompute),
                config.vision,
                parallel,
                backend,
            )
        self.language_model = language_model
        self.entropy = options.entropy
        self.routers = [m for m in self.modules() if isinstance(m, SectionRouter)]
        for place, router in enumerate(self.routers):
            router.place = place
        self.first_router = 0
        self.routes: Tensor | None = None
        self._payload: Tensor | None = None

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Read by megatron.core, which sums tied weights' gradients over first and last chunk."""
        return self.language_model.tied

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.language_model.embedding.word_embeddings.weight

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by the schedule with the previous chunk's payload."""
        self._payload = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: Batch, output: Literal["head", "logits"] = "head") -> Tensor:
        """The next chunk's payload or, of the last chunk, log p(labels) or scores, [T] fp32, or
        [T, 2] with the entropies.

        output="logits" gives the language head's logits [T, vocab / tensor] instead.
        """
        share = ContextShare.of(batch.cu_seqlens, self.parallel.groups.cp, self.backend)
        first, size = self._slice(share.size)
        rows = self._visual_rows(batch, share, first, size)
        if self.pre_process:
            hidden, features = self._embed(batch, share, rows)
            if batch.noise:
                hidden = hidden + self._noise(batch, share)[first : first + size, None]
        else:
            hidden, features = self._unpack(rows, size)
            self.language_model.decoder.set_input_tensor(hidden)
        local = slice(first, first + size)
        section = share.take(batch.section, 0)[local]
        padding = share.take(batch.padding_mask, True)[local]
        hidden = self.language_model.decoder(
            hidden,
            attention_mask=None,
            context=features,
            context_mask=rows.local,
            packed_seq_params=packed_seq_params(
                share.cu_seqlens,
                mrope_angles(self.architecture, share.take(batch.position_ids, 0)),
                self.backend,
                self.parallel.groups.cp,
            ),
            padding_mask=self._router_mask(batch, share, local, padding, section),
        )
        if self.routers and self.routers[0].recording:
            self.routes = self._routes(share)
        if not self.post_process:
            return self._pack(hidden, features)
        if self.head == "score":
            if batch.dropout:
                hidden = self._dropped_out(hidden, batch, share, local)
            scores = self.language_model.score_head(hidden, section)
            if self.config.sequence_parallel:
                scores = tensor_parallel.gather_from_sequence_parallel_region(
                    scores, tensor_parallel_output_grad=False, group=self.parallel.groups.tp
                )
            return share.gather(scores)
        logits = self._logits(hidden)
        if output == "logits":
            return share.gather(logits)
        labels, group = share.take(batch.labels, 0), self.parallel.groups.tp
        if self.entropy == "none" or not self.training:
            return share.gather(-self.backend.cross_entropy(logits, labels, group))
        # before the cross-entropy, which may overwrite the logits
        entropy = vocab_parallel_entropy(logits, group, with_gradient=self.entropy == "loss")
        logprobs = -self.backend.cross_entropy(logits, labels, group)
        return share.gather(torch.stack([logprobs, entropy], dim=-1))

    def _router_mask(
        self,
        batch: Batch,
        share: ContextShare,
        local: slice,
        padding: Tensor,
        section: Tensor,
    ) -> Tensor | None:
        """What this chunk's routers know of this rank's tokens; see router.py."""
        if not self.routers:
            return None
        if batch.routes is None:
            return router_mask(padding, section)
        mine = slice(self.first_router, self.first_router + len(self.routers))
        # padding takes as many experts as other tokens: fused kernels would take one twice
        first = torch.arange(batch.routes.shape[2], device=batch.routes.device)
        routes = share.take(batch.routes[:, mine].permute(1, 2, 0), first)[..., local]
        return router_mask(padding, section, routes.permute(2, 0, 1), self.architecture.num_experts)

    def _routes(self, share: ContextShare) -> Tensor:
        """Experts that the row's tokens took in this chunk, [T, routers, k] on every rank."""
        taken = torch.stack([router.taken for router in self.routers], dim=1)
        if self.config.sequence_parallel:
            taken = tensor_parallel.gather_from_sequence_parallel_region(
                taken, tensor_parallel_output_grad=False, group=self.parallel.groups.tp
            )
        return share.gather(taken)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.language_model.tied else None
        logits = self.language_model.output_layer(hidden, weight=weight)[0].squeeze(1)
        padding = self._padding_columns(logits.shape[1])
        return logits.masked_fill(padding, float("-inf")) if padding is not None else logits

    def _padding_columns(self, width: int) -> Tensor | None:
        """Which of this rank's vocabulary columns exist only to make the vocabulary divisible."""
        vocab = self.architecture.vocab_size
        first = self.parallel.tensor_rank * width
        if first + width <= vocab:
            return None
        return torch.arange(first, first + width, device=self.backend.device) >= vocab

    def _slice(self, total: int) -> tuple[int, int]:
        """Of the `total` tokens of its context-parallel share, the first and the number of those
        that this tensor-parallel rank holds between blocks."""
        if not self.config.sequence_parallel:
            return 0, total
        size = total // self.parallel.layout.tensor
        return self.parallel.tensor_rank * size, size

    def _visual_rows(self, batch: Batch, share: ContextShare, first: int, size: int) -> _VisualRows:
        """Those among the `size` tokens from `first` of the context-parallel share."""
        rank, position = share.find(batch.visual_index)
        mine = (rank == share.group.rank()) & (position >= first) & (position < first + size)
        return _VisualRows(
            self.backend.to_device(position[mine] - first),
            self.backend.to_device(batch.feature_index[mine]),
        )

    def _embed(self, batch: Batch, share: ContextShare, rows: _VisualRows) -> tuple[Tensor, Tensor]:
        """-> hidden [T_local, 1, h] with the images in place, deepstack features [F, V, h]."""
        # first, so that its gradients come last: the others' are reduced meanwhile
        features = self._image_features(batch)
        ids = share.take(batch.input_ids, 0)
        hidden = self.language_model.embedding.word_embeddings(ids.unsqueeze(0))
        if not self.config.sequence_parallel:
            hidden = hidden.transpose(0, 1).contiguous()
        if self.parallel.layout.vision == "sharded" and self.config.sequence_parallel:
            features = tensor_parallel.copy_to_tensor_model_parallel_region(
                features, group=self.parallel.groups.tp
            )
        if self._repeats_gradients and features.requires_grad:
            features.register_hook(torch.zeros_like)
        features = features[:, rows.feature]
        hidden = hidden.index_copy(0, rows.local, features[0].unsqueeze(1))
        return hidden, features[1:]

    @property
    def _repeats_gradients(self) -> bool:
        """Whether another rank, too, hands this rank's gradient of the features to a replicated
        tower, whose gradients are summed over tensor-parallel ranks."""
        layout = self.parallel.layout
        replicated = layout.vision == "replicated" and not self.config.sequence_parallel
        return replicated and self.parallel.tensor_rank > 0

    def _noise(self, batch: Batch, share: ContextShare) -> Tensor:
        """Noise on this rank's context-parallel share of the tokens, [T_local, h]. Drawn on the
        host for whole sequences, so that it does not depend on who holds which token."""
        row = torch.zeros(int(batch.cu_seqlens[-1]), self.architecture.hidden_size)
        for (start, end), noise in zip(
            pairwise(batch.cu_seqlens.tolist()), batch.noise, strict=False
        ):
            if noise is not None:
                generator = torch.Generator().manual_seed(noise.seed)
                row[start:end].normal_(0, noise.std, generator=generator)
        return share.take(self.backend.to_device(row.T.contiguous()), 0).T.to(self.backend.dtype)

    def _dropped_out(
        self, hidden: Tensor, batch: Batch, share: ContextShare, local: slice
    ) -> Tensor:
        """Hidden states [T_local, 1, h] with the channels set to 0 that their sequence drops, and
        the others scaled up. All tokens of a sequence drop the same ones, of which one token's
        score is read; drawn on the host by the sequence's seed, so that neither the layout, nor the
        packing, nor a resumed run changes them, and a score can be computed again."""
        kept = torch.ones(len(batch.cu_seqlens) - 1, self.architecture.hidden_size)
        for row, dropout in zip(kept, batch.dropout, strict=False):
            if dropout is not None:
                generator = torch.Generator().manual_seed(dropout.seed)
                row.bernoulli_(1 - dropout.rate, generator=generator).div_(1 - dropout.rate)
        number = torch.repeat_interleave(batch.cu_seqlens.diff().long())
        mine = share.take(self.backend.to_device(number), 0)[local]
        return (hidden.float() * self.backend.to_device(kept)[mine, None]).to(hidden.dtype)

    def _image_features(self, batch: Batch) -> Tensor:
        """Features [1 + F, V, h] of the images that the batch shows; see image_shares.py.

        Those of no image require a gradient, too, if the tower is trained: ranks that wait for
        each other in the backward pass all have one.
        """
        if batch.pixel_values is not None:
            features = self.vision_model(batch.pixel_values, batch.grids)
        else:
            features = torch.zeros(
                (1 + self.architecture.num_deepstack, 0, self.architecture.vision.out_hidden_size),
                dtype=self.backend.dtype,
                device=self.backend.device,
                requires_grad=any(p.requires_grad for p in self.vision_model.parameters()),
            )
        if batch.exchange is None:
            return features
        return exchange(features, batch.exchange, self.parallel.features, self.backend)

    def _pack(self, hidden: Tensor, features: Tensor | None) -> Tensor:
        """[hidden ; features that later chunks add], along the token dimension."""
        left = self.architecture.deepstack_left(self.language_model.layers.stop)
        if features is None or not left:
            return hidden
        return torch.cat([hidden, features[-left:].flatten(0, 1).unsqueeze(1)])

    def _unpack(self, rows: _VisualRows, size: int) -> tuple[Tensor, Tensor | None]:
        payload = self._payload
        assert payload is not None, "a later chunk runs through the schedule"
        left = self.architecture.deepstack_left(self.language_model.layers.start)
        if not left:
            assert payload.shape[0] == size
            return payload, None
        features = payload[size:].squeeze(1).unflatten(0, (left, rows.local.numel()))
        return payload[:size].contiguous(), features


class _VisualRows:
    """Visual tokens of this rank: rows of its hidden states, rows of the image features."""

    def __init__(self, local: Tensor, feature: Tensor) -> None:
        self.local, self.feature = local, feature


def mrope_angles(config: Qwen3VLConfig, position_ids: Tensor) -> Tensor:
    """Interleaved MRoPE: positions [3, T] -> angles [T, 1, 1, head_dim] in fp32.

    Frequency 3j+1 below 3 * section[1] turns with the height, 3j+2 below 3 * section[2] with the
    width, every other one with time (transformers apply_interleaved_mrope).
    """
    dim = config.head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float, device=position_ids.device) / dim
    angles = position_ids.float()[..., None] / config.rope_theta**exponent
    time = angles[0].clone()
    for axis in (1, 2):
        turned = slice(axis, 3 * config.mrope_section[axis], 3)
        time[:, turned] = angles[axis, :, turned]
    return torch.cat([time, time], dim=-1)[:, None, None]


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Smallest multiple of the tensor-parallel size that holds the vocabulary."""
    return -(-vocab_size // tensor) * tensor

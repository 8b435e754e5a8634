"""The data that flows between the parts: prompts, rollouts, sequences and packed micro-batches.

Shapes use: T packed tokens of one micro-batch, S sequences in it, V visual tokens, P image
patches, D values a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualInputs:
    """One image or video, as the Hugging Face processor preprocesses it.

    key: names the content. patches: its pixel_values, or what makes them: every rank knows all
    sequences of a step, but few need the pixels of an image. grid_thw: (t, h, w) in patches, t = 1
    for an image. It takes t*h*w / merge_size**2 tokens, those of each frame of a video between
    timestamps of its own.
    """

    key: str
    patches: Tensor | Callable[[], Tensor]
    grid_thw: tuple[int, int, int]

    @property
    def pixel_values(self) -> Tensor:
        """[P, D] float, patches in merge-block order, frame after frame."""
        return self.patches if isinstance(self.patches, Tensor) else self.patches()

    def __reduce__(self) -> tuple[Any, ...]:
        # another process has not what makes them
        return VisualInputs, (self.key, self.pixel_values, self.grid_thw)


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt whose image placeholders are already expanded to one id a feature row."""

    row_id: str
    input_ids: tuple[int, ...]
    images: tuple[VisualInputs, ...]


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    ids: response token ids, the end-of-turn id included when the model wrote it.
    logprobs: log-probability of each id under the sampling model, same length as ids.
    finish_reason: "stop" (ended by end-of-turn), "length", or "abort" (cut off while it was
    sampled; no answer yet).
    weight_version: version of the weights that sampled it, or its end.
    earlier: (version, tokens) of the parts before, if a sync came while it was sampled.
    routes: [P + R - 1, layers * k] of integers, the experts that each token of prompt and response
    but the last took in every layer; None if the engine was not asked.
    cached: tokens of the prompt that the engine had in its prefix cache; None if it does not tell.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weight_version: int
    earlier: tuple[tuple[int, int], ...] = ()
    routes: Tensor | None = field(default=None, compare=False)
    cached: int | None = field(default=None, compare=False)

    @property
    def token_versions(self) -> tuple[int, ...]:
        """Version of the weights that sampled each token."""
        before = [version for version, tokens in self.earlier for _ in range(tokens)]
        return (*before, *[self.weight_version] * (len(self.ids) - len(before)))

    def followed_by(self, rest: Rollout) -> Rollout:
        """This beginning and the rest, which was sampled with it as part of the prompt."""
        parts = list(self.earlier)
        own = len(self.ids) - sum(tokens for _, tokens in parts)
        if own and self.weight_version != rest.weight_version:
            parts.append((self.weight_version, own))
        return replace(
            rest,
            ids=self.ids + rest.ids,
            logprobs=self.logprobs + rest.logprobs,
            earlier=tuple(parts),
            cached=self.cached,
        )


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the embeddings of a sequence; the seed says which."""

    seed: int
    std: float


@dataclass(frozen=True)
class Dropout:
    """Dropout of a share `rate` of a sequence's channels before the score head; the seed says
    which."""

    seed: int
    rate: float


@dataclass(frozen=True)
class Sequence:
    """One training sequence: the prompt's tokens followed by the response's.

    response_mask: [L] bool, True on the tokens whose log-probability is trained (response tokens).
    per_token: named [L] float tensors that follow the tokens (advantages, old log-probabilities),
    aligned with input_ids (value at l belongs to the token input_ids[l]).
    images, videos: in the order of their placeholder tokens.
    section: index in model_providers.config.SECTIONS of what a dedicated discriminator judges here;
    other models don't look.
    noise: what is added to the embeddings, images' included.
    dropout: what the score head does not see of the hidden states.
    scored: index of the token whose score counts; None for the last one.
    routes: [L, layers, k] of integers, the experts that each token shall take in the expert layers
    that this rank's pipeline stage holds; None lets the routers choose.
    """

    input_ids: Tensor
    images: tuple[VisualInputs, ...]
    response_mask: Tensor
    per_token: dict[str, Tensor] = field(default_factory=dict)
    videos: tuple[VisualInputs, ...] = ()
    section: int = 0
    noise: Noise | None = None
    dropout: Dropout | None = None
    scored: int | None = None
    routes: Tensor | None = None

    def __len__(self) -> int:
        return int(self.input_ids.numel())


@dataclass(frozen=True)
class FeatureExchange:
    """What one rank sends and receives of a micro-batch's image features, in rows.

    send [R] int64   rows of the features that this rank encodes: those for rank 0, then those for
                     rank 1, ...; an image that several ranks show comes several times
    send_counts      rows for each rank, this one included
    receive_counts   rows from each rank
    """

    send: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]


@dataclass(frozen=True)
class ImageShare:
    """Which images and videos of a micro-batch one rank encodes, and where it finds features.

    encoded: the images that this rank encodes, whichever rank shows them
    first: by key, the first feature row of each image that this rank shows
    exchange: None if no feature travels, on any rank
    """

    encoded: tuple[VisualInputs, ...]
    first: dict[str, int]
    exchange: FeatureExchange | None = None


ON_HOST = ("cu_seqlens", "scored", "visual_index", "feature_index")


@dataclass
class PackedBatch:
    """One micro-batch: S sequences laid end to end in one row of T tokens (THD layout).

    input_ids    [T] int64     labels [T] int64: the next token of the same sequence (0 at its end)
    position_ids [3, T] int64  interleaved-MRoPE positions (t, h, w), starting anew in each sequence
    cu_seqlens   [S+1] int32   sequence i is input_ids[cu_seqlens[i]:cu_seqlens[i+1]]; trailing
                               padding, if any, is the last sequence
    scored       [S] int64     position in [0, T) of each sequence's token whose score counts; not
                               of the padding sequence
    loss_mask    [T] float     1 where labels[t] is trained, i.e. the *predicted* token is response
    padding_mask [T] bool      True on padding tokens
    section      [T] int64     the sequence's section (see Sequence), 0 on padding
    visual_index [V] int64     positions in [0, T) of the visual tokens, ascending
    feature_index[V] int64     for each of them its row among the features that this rank gets; 0
                               where another context-parallel rank holds the token and gets them
    pixel_values [P, D]        patches of the images and videos that this rank encodes; None if none
    grids                      (t, h, w) in patches of each of them, in the same order
    exchange                   how features come to the ranks that show them; None if none travels
    per_token    name -> [T]   values aligned with *labels* (shifted left by one, like loss_mask)
    num_sequences              S without the padding sequence
    noise                      on the embeddings of each of these; empty if none has any
    dropout                    before the score head of each of these; empty if none has any
    routes       [T, layers, k] experts that the tokens take (see Sequence); None if they choose

    cu_seqlens, scored, visual_index, feature_index, grids and exchange stay on the host: a forward
    plans by them, and none shall wait for the device.

    Example: two sequences "A B | c d" and "E | f", response after the bar, no padding:
    input_ids = [A B c d E f], labels = [B c d 0 f 0], loss_mask = [0 1 1 0 1 0],
    cu_seqlens = [0 4 6].
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    scored: Tensor
    loss_mask: Tensor
    padding_mask: Tensor
    section: Tensor
    visual_index: Tensor
    feature_index: Tensor
    pixel_values: Tensor | None
    grids: tuple[tuple[int, int, int], ...]
    exchange: FeatureExchange | None
    num_sequences: int
    per_token: dict[str, Tensor] = field(default_factory=dict)
    noise: tuple[Noise | None, ...] = ()
    dropout: tuple[Dropout | None, ...] = ()
    routes: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with what is computed with on `device`; nobody waits for the copies."""
        if torch.device(device).type == "cpu":
            return self

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.pin_memory().to(device, non_blocking=True)
            if isinstance(value, dict):
                return {name: move(tensor) for name, tensor in value.items()}
            return value

        moved = {name: move(value) for name, value in vars(self).items() if name not in ON_HOST}
        return replace(self, **moved)

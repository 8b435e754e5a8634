"""Sections that the configurations of stages are made of: every key, its type, default, meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NOT_SUPPORTED = {
    "cuda_graph_impl": "packed micro-batches differ in length, so no graph fits the next one",
    "overlap_moe_expert_parallel_comm": (
        "megatron.core overlaps two micro-batches in the layers of its own GPTModel alone, which "
        "has no deepstack; dispatcher=deepep is what is left"
    ),
    "fine_grained_activation_offloading": (
        "megatron.core plans it in the first step, for as many micro-batches in all that follow, "
        "and keeps pinned buffers for every shape that it meets, but packed micro-batches vary in "
        "number and length; use offload_layers, recompute, or optimizer.offload"
    ),
}
"""What megatron.core has under these names and this system has not, and why."""

LossMode = Literal["vanilla", "gspo", "cispo"]
LossAggMode = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
KL = Literal["k1", "k2", "k3"]
RouterReplay = Literal["disabled", "R2", "R3"]
RolloutIS = Literal["none", "tis", "mis", "icepop"]
ScoreBound = Literal["none", "clip", "tanh"]
AdvantageMode = Literal["default", "acc_gating", "gated_align", "rlvr", "rlvr_v2", "sign_align"]
Defect = Literal["reference", "corrected"]
"""Something that the reference implementation gets wrong: as it does it, or put right."""


Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all configuration sections: frozen; a misspelt key, inf and nan fail."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Run(Section):
    """Where a stage writes and what it draws random numbers from."""

    dir: Path
    """Folder of this stage's outputs: checkpoints/, hf/, metrics.jsonl, quarantine.jsonl."""
    seed: int = 1234
    """Seed of data order, sampling and initialisation."""
    hang_timeout: float | None = Field(600, gt=0)
    """Seconds without progress in training after which every rank writes its stacks to stacks/, one
    says which ranks are missing, and all end; three times as long in the first step, longer while
    engines sample. Collectives fail by themselves after four times as long. null watches nothing.
    """


class Wandb(Section):
    """A run of Weights & Biases, which gets the metrics besides metrics.jsonl and TensorBoard."""

    project: str
    """Its project there."""
    entity: str | None = None
    """User or team; by default that of the account."""
    name: str | None = None
    """The run's name; by default that of run.dir's last folder."""
    group: str | None = None
    """What it is grouped by, such as the stages of one pipeline."""
    mode: Literal["online", "offline"] = "online"
    """offline: files in run.dir/wandb, for `wandb sync` to send later."""


class Parallel(Section):
    """How one model is split over the ranks.

    Data-parallel size is world / (tensor * context * pipeline); that of the experts is
    world / (expert_tensor * expert * pipeline).
    """

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks; each holds its share of every sequence of a micro-batch."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Parts that a stage's layers are cut into, which micro-batches pass in turn (interleaved
    schedule): a smaller bubble for more communication."""
    first_stage_layers: int | None = Field(None, ge=1)
    """Decoder layers of the first pipeline stage; the other stages share the rest evenly."""
    last_stage_layers: int | None = Field(None, ge=1)
    """Decoder layers of the last pipeline stage; the other stages share the rest evenly."""
    embedding_as_layer: bool = False
    """The embedding and the vision tower take the place of a decoder layer on the first stage."""
    loss_as_layer: bool = False
    """The head and the loss take the place of a decoder layer on the last stage."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks; experts are spread over them."""
    expert_tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks of each expert, independent of `tensor`."""
    sequence: bool = True
    """Sequence parallelism: activations between blocks are split over the tensor-parallel ranks.
    Has no effect at tensor=1."""
    vision: Literal["sharded", "replicated"] = "sharded"
    """The vision tower: tensor-parallel ranks split its matrices and encode each image together, or
    each has all of it and encodes images of its own. Has no effect at tensor=1."""

    @property
    def sequence_parallel(self) -> bool:
        return self.sequence and self.tensor > 1


class Freeze(Section):
    """Parts of a model that stay as they are: no gradient, no optimizer state."""

    language: bool = False
    """Embeddings, decoder and head."""
    vision: bool = False
    """The vision tower without its mergers."""
    mergers: bool = False
    """The mergers from patches to the decoder's tokens, those of deepstack included."""

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.language and self.vision and self.mergers:
            raise ValueError(
                "language, vision and mergers are all frozen, so nothing is trained; set one of "
                "them to false"
            )
        return self


class Recompute(Section):
    """Activations that the backward pass computes again instead of keeping them."""

    granularity: Literal["none", "selective", "full"] = "none"
    """Of the decoder: nothing, the named modules of each layer, or whole layers."""
    modules: tuple[Literal["core_attn", "mlp", "moe", "layernorm", "moe_act"], ...] = ()
    """What selective computes again: attention without its projections, the dense or the expert
    layer, the norms, the experts' activation. The CPU backend has only the first three."""
    layers: int | None = Field(None, ge=1)
    """How many decoder layers of each (virtual) stage full computes again, the first ones; all if
    not set."""
    vision: bool = False
    """Compute every layer of the vision tower again."""

    @model_validator(mode="after")
    def _settings_belong_to_the_granularity(self) -> Self:
        if (self.granularity == "selective") != bool(self.modules):
            raise ValueError(
                f"granularity is {self.granularity!r} with {len(self.modules)} modules; selective "
                "needs some, the others none"
            )
        if self.layers is not None and self.granularity != "full":
            raise ValueError(
                f"layers={self.layers} belongs to granularity 'full', not {self.granularity!r}"
            )
        return self


class Model(Section):
    """Which model, and how it is laid out."""

    path: Path
    """Hugging Face directory or Megatron checkpoint; either holds config, processor and weights."""
    parallel: Parallel = Parallel()
    """Parallel layout of this model alone."""
    freeze: Freeze = Freeze()
    """Parts that are not trained."""
    recompute: Recompute = Recompute()
    """Trade of computation for memory."""
    offload_layers: int = Field(0, ge=0)
    """Decoder layers, the first ones, whose activations lie in host memory from their forward to
    their backward pass, with backend=cuda, a single pipeline stage and no recomputation of the
    decoder. Copies run beside the computation of the other layers."""
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None = None
    """Scaling of the decoder's matrix products in FP8, with backend=cuda: by a history of maxima,
    by the tensor's own maximum, or by the maxima of blocks of 128; null computes in BF16. Experts
    are scaled row by row in all of them, and gradients of their weights computed in BF16."""
    bf16_first_layers: int = Field(0, ge=0)
    """Decoder layers at the start that stay in BF16, with fp8 tensorwise or blockwise."""
    bf16_last_layers: int = Field(0, ge=0)
    """Decoder layers at the end that stay in BF16, with fp8 tensorwise or blockwise."""
    fp8_param_gather: bool = False
    """With fp8 tensorwise or blockwise: these layers' matrices but experts are held in FP8 too, 2
    bytes a weight less, and data-parallel ranks gather them so. The optimizer's main weights go
    into checkpoints, exports and syncs, which lose nothing; a model without an optimizer exports
    what it was loaded from."""
    dispatcher: Literal["alltoall", "deepep", "hybridep"] = "alltoall"
    """How tokens get to experts on other ranks: NCCL's all-to-all, or DeepEP's kernels where they
    are installed."""

    @model_validator(mode="after")
    def _weights_in_fp8_are_trained(self) -> Self:
        if self.fp8_param_gather and self.freeze.language:
            raise ValueError(
                "fp8_param_gather=true holds the decoder in FP8, of which a frozen one "
                "(freeze.language=true) has no main weights to export; leave one of them out"
            )
        return self


class Discriminator(Model):
    """The discriminator, and what it is shown. Its architecture is in its config.json (upcycle)."""

    streams: Literal["sections", "response"] = "sections"
    """sections: captions and reasoning are scored apart; response: one score for the whole. The
    warm-up writes this and text_only into config.json, and `align` refuses other values than
    those."""
    text_only: bool = False
    """Leave images out of what the discriminator reads."""
    score_bound: ScoreBound = "none"
    """What keeps scores within score_limit: nothing but the regulariser, tanh, or a clamp without
    gradient beyond it (clip; the reference's in alignment, at 10)."""
    score_limit: float = Field(10.0, gt=0)
    """Bound of the scores, with score_bound."""
    score_precision: Defect = "corrected"
    """corrected: the value head computes in fp32; reference: in BF16, in which scores of 3 to 4 are
    0.016 apart (value_head.py, dp_critic.py). Losses are computed in fp32 with both."""
    score_dropout: Defect = "corrected"
    """corrected: none; reference: a tenth of the value head's inputs is dropped where the
    discriminator is trained, but not where the policy's responses are scored (value_head.py). A
    teacher's section drops the same inputs for all responses of a prompt, each response's there
    has its own."""


class Optimizer(Section):
    """AdamW with a warm-up and a constant or cosine schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; biases and norms are exempt."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's exponential decay rates."""
    eps: float = Field(1e-8, gt=0)
    """Adam's denominator offset."""
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient-norm limit over all ranks; 0 turns clipping off."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type of Adam's moments; bfloat16, with backend=cuda, takes 8 instead of 12 bytes a weight
    together with the main weight, shared by the data-parallel ranks. The second beta may be 0.995
    at most then."""
    offload: bool = False
    """Main weights and moments lie in host memory and are updated by pieces, with backend=cuda."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear learning-rate warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up; cosine falls to almost zero at the last step."""

    @model_validator(mode="after")
    def _second_moments_can_fall(self) -> Self:
        if self.moments == "bfloat16" and self.betas[1] > 0.995:
            raise ValueError(
                f"moments=bfloat16 with betas={list(self.betas)}: second moments would rise and "
                "hardly ever fall, since a decay below half of BF16's step is rounded away, and "
                "updates become too small; set betas=[0.9,0.99], or moments=float32"
            )
        return self


class Guard(Section):
    """What becomes of an update whose loss or gradient norm is not finite or a spike, or whose
    scores or log-probabilities are not finite."""

    action: Literal["stop", "skip", "rewind"] = "stop"
    """stop: the run ends before the update; skip: the update is not made, weights, moments and
    learning rate stay as they are, and without scores or log-probabilities the rest of the step is
    left out; rewind: models go back to the last checkpoint, and on with the data after the
    offending batch."""
    spike: float | None = Field(None, gt=1)
    """Gradient norms, and the loss of sft, above so many times their running median are spikes;
    null: only what is not finite counts."""
    window: int = Field(50, ge=1)
    """Updates that the median is of; nothing is a spike before there were as many."""
    limit: int = Field(5, ge=1)
    """Skipped updates or steps in a row, or returns to the same checkpoint, after which the run
    stops."""


class Best(Section):
    """Which checkpoint is the best."""

    metric: str
    """A metric of metrics.jsonl; its value at the step of the checkpoint counts."""
    mode: Literal["max", "min"] = "max"
    """Whether the highest or the lowest value is the best."""


class Train(Section):
    """Length of a run, its micro-batches and its checkpoints."""

    steps: int = Field(ge=0)
    """Optimizer steps."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Most tokens in one packed micro-batch, over all context-parallel ranks; at least the longest
    prompt and the longest response."""
    save_every: int = Field(0, ge=0)
    """Steps between training checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = Field(1, ge=1)
    """Training checkpoints kept; older ones are removed after a newer one is complete."""
    keep_best: Best | None = None
    """The best checkpoint is kept besides, as long as there is no better one."""
    async_save: bool = False
    """Checkpoints are written while training goes on, from a copy in host memory; training waits
    only for the copy (time/save in metrics.jsonl, beside save_s, the seconds until it is
    complete)."""
    stop_at: int | None = Field(None, ge=1)
    """Stop cleanly (checkpoint written, no export) after this step, as a preemption would; the
    schedules still run to `steps`."""
    guard: Guard = Guard()


class Source(Section):
    """One source of a blend, and what holds for its rows alone."""

    path: Path
    """As data.path."""
    weight: float = Field(1.0, gt=0)
    """Share of the rows of every batch, in relation to the other sources' weights."""
    name: str | None = None
    """What its counters and statistics go by; by default that of the file or data set."""
    num_samples: int | None = Field(None, ge=1)
    """Use so many rows of it, the same ones in every run; all if not set."""
    system_prompt: Path | None = None
    """Text file, put before prompts that bring no system turn; goes before data.system_prompt."""
    media_dir: Path | None = None
    """Folder that image paths start from; by default that of the data file."""


class Data(Section):
    """Where the rows are and what to do with those that can't be used."""

    path: Path | None = None
    """SFT: sharegpt rows; alignment and RLVR: prompts; warm-up: pairs. A parquet, JSON or JSONL
    file, a pattern of several, DIR/dataset_info.json:ENTRY as LLaMA-Factory has it, or a data set
    of the Hugging Face hub, owner/name or owner/name:FILE."""
    sources: tuple[Source, ...] = ()
    """Several sources that are blended, instead of path. Each is shuffled anew at each of its own
    epochs; the weights say how many rows of a batch are whose."""
    system_prompt: Path | None = None
    """Text file put before every prompt as the system turn, unless the row brings its own."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt, image tokens included; longer rows are quarantined."""
    max_response_tokens: int = Field(6144, ge=1)
    """Longest response or demonstration, the end of the turn included."""
    overlong: Literal["quarantine", "truncate_response"] = "quarantine"
    """What becomes of a row whose response is longer: it is left out and counted (as verl's
    filter_overlong_prompts does with prompts), or, in sft, cut off without an end of the turn
    (as LLaMA-Factory's cutoff_len). An overlong prompt is always left out: images can't be cut."""
    min_pixels: int | None = Field(None, ge=1)
    """Images with fewer pixels are enlarged; default: what the model's processor has."""
    max_pixels: int | None = Field(None, ge=1)
    """Images with more pixels are made smaller; default: what the model's processor has."""
    longest_side: int | None = Field(None, ge=1)
    """Images with a longer side are made smaller before anything else, down to so many pixels
    there; in the reference's warm-up 560 (train_moe_vl_warmup_fast.py), in its alignment any."""
    image_resize: Defect = "corrected"
    """corrected: once, to multiples of the model's patch size times its merge size. reference:
    before that to multiples of 28, within the reference's own limits (verl vision_utils.py)."""
    num_workers: int = Field(2, ge=0)
    """Threads of each rank that read rows and prepare images of the next batch during a step."""
    cache_dir: Path | None = None
    """Folder of the indexes of large files; default $XDG_CACHE_HOME/prism-megatron."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Share of a source's rows that may be quarantined before the run stops; 0: the first one
    stops it."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) != bool(self.sources):
            raise ValueError(
                f"path is {self.path} and {len(self.sources)} sources are given; give one of both"
            )
        low, high = self.min_pixels, self.max_pixels
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pixels={low} is above max_pixels={high}; no image fits")
        return self


class Sampling(Section):
    """How responses are sampled."""

    n: int = Field(16, ge=1)
    """Responses a prompt."""
    max_new_tokens: int = Field(6144, ge=1)
    """Longest response."""
    temperature: float = Field(1.0, ge=0)
    """Softmax temperature, 0 for the likeliest token; 1 where responses are trained on, which are
    the policy's own then."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass; 1 where responses are trained on."""
    batch_size: int = Field(64, ge=1)
    """Responses that the embedded engine decodes at once."""


class Validation(Section):
    """Held-out prompts that the policy answers while it is trained; what comes of it is among the
    metrics as validation/*, so that train.keep_best can go by it."""

    path: Path
    """The prompts, as data.path; data has the rest."""
    every: int = Field(ge=1)
    """Steps between validations; the last step is always followed by one."""
    rows: int | None = Field(None, ge=1)
    """Use so many rows, the same ones every time; all if not set."""
    n: int = Field(1, ge=1)
    """Responses a prompt."""
    temperature: float = Field(0.0, ge=0)
    """As sampling.temperature."""


class Rollout(Section):
    """Where responses are sampled: in every rank, or by engines that Ray places and watches."""

    kind: Literal["embedded", "local", "sglang", "vllm"] = "embedded"
    """embedded: a Hugging Face model in every rank; local: the same in Ray actors, on CPUs; sglang,
    vllm: servers on GPUs."""
    engines: int = Field(1, ge=1)
    """Engines in all; the same number on every node."""
    nodes: int = Field(1, ge=1)
    """Nodes that engines are placed on."""
    node_resource: str | None = None
    """Ray resource that marks the nodes for engines (ray start --resources); any node if null."""
    cpus: int = Field(1, ge=1)
    """CPU cores of an engine, in Ray's account."""
    tensor: int = Field(1, ge=1)
    """Tensor-parallel GPUs of a server, all on one node."""
    gpus: tuple[int, ...] = ()
    """Ids of the GPUs that servers get on every node, `tensor` for each in this order; trainers may
    have the same ones."""
    interface: str | None = None
    """Network interface that servers listen on, such as eth0; loopback if null, which only ranks
    of the same node reach."""
    server_args: tuple[str, ...] = ()
    """Further arguments of the server's command line."""
    python: Path | None = None
    """Interpreter of the environment that servers run in; the trainer's if null."""
    sync_folder: Path | None = None
    """Folder that trainers and servers see, through which weights go to servers that share neither
    GPUs nor a network of GPUs with the trainers; null otherwise."""
    quantization: Literal["fp8-block"] | None = None
    """How servers hold the weights: as the policy has them if null; fp8-block: projections and
    experts in FP8 with a scale for each 128 x 128 block, rounded anew in every sync (Hopper)."""
    sleep: bool = False
    """Servers on the trainers' GPUs give back the memory of their weights and KV cache while the
    policy trains, and trainers that of gradients while responses are sampled; see also offload of
    the optimizers, whose state would lie there all the time."""
    ahead: bool = False
    """Engines sample the next step's responses while the policy trains on this step's, with weights
    that are one update older than those that they train (one-step-off)."""
    partial: bool = False
    """With ahead: new weights do not wait for responses that are being sampled, which go on with
    them from where they were."""
    start_timeout: float = Field(600, gt=0)
    """Seconds that an engine may take to start."""
    request_timeout: float = Field(1800, gt=0)
    """Seconds that the responses to one prompt may take."""
    health_interval: float = Field(10, gt=0)
    """Seconds between two health checks of an engine."""
    health_timeout: float = Field(30, gt=0)
    """Seconds that a health check may take."""
    max_failures: int = Field(3, ge=1)
    """Failed requests, or failed health checks, in a row after which an engine is restarted."""
    max_restarts: int = Field(3, ge=0)
    """Restarts of an engine without an answered request in between; then it is given up."""
    max_attempts: int = Field(4, ge=1)
    """Engines that a prompt is tried on before the run stops."""
    max_outstanding_tokens: int = Field(524288, ge=1)
    """Most tokens, prompts and longest responses, that an engine is asked for at the same time."""

    @model_validator(mode="after")
    def _engines_fit_the_nodes(self) -> Self:
        if self.engines % self.nodes:
            raise ValueError(
                f"engines={self.engines} can't be shared out evenly among nodes={self.nodes}; make "
                "it a multiple"
            )
        fields = type(self).model_fields.items()
        given = [name for name, field in fields if getattr(self, name) != field.default]
        if self.kind == "embedded" and given:
            raise ValueError(
                f"kind=embedded has one engine in every rank and no use for {', '.join(given)}; "
                "set another kind, or leave them out"
            )
        if self.sync_folder is not None and self.kind not in ("sglang", "vllm"):
            raise ValueError(
                f"sync_folder={self.sync_folder} is a way into servers, but kind is {self.kind}; "
                "leave it out"
            )
        if self.sleep and (self.kind not in ("sglang", "vllm") or self.sync_folder is not None):
            raise ValueError(
                "sleep=true is for servers on the trainers' GPUs, but "
                f"kind={self.kind} and sync_folder={self.sync_folder}; leave it out"
            )
        if self.quantization is not None and self.kind not in ("sglang", "vllm"):
            raise ValueError(
                f"quantization={self.quantization} is how servers hold the weights, but kind is "
                f"{self.kind}; leave it out"
            )
        if self.partial and not self.ahead:
            raise ValueError(
                "partial=true is about responses that are sampled during an update, of which there "
                "are none without ahead=true; set both, or leave it out"
            )
        if self.sleep and self.ahead:
            raise ValueError("engines can't sleep and sample ahead at the same time; choose one")
        needed = self.tensor * self.engines_per_node
        if self.kind in ("sglang", "vllm") and len(self.gpus) != needed:
            raise ValueError(
                f"{self.engines_per_node} engines a node with tensor={self.tensor} take {needed} "
                f"GPUs, but gpus={list(self.gpus)} names {len(self.gpus)}; give as many ids"
            )
        return self

    @property
    def engines_per_node(self) -> int:
        return self.engines // self.nodes

    @property
    def patience(self) -> float:
        """Seconds that a batch may take: an engine may fail, start again, and be asked once
        more."""
        return self.request_timeout * self.max_attempts + self.start_timeout


class PolicyUpdate(Section):
    """How responses and their advantages become updates of the policy (objectives/losses.py)."""

    loss_mode: LossMode = "vanilla"
    """vanilla: PPO's clipped ratio of each token; gspo: of each sequence; cispo: clipped ratio as a
    weight, so that every token keeps its gradient."""
    loss_agg_mode: LossAggMode = "token-mean"
    """What counts the same: every token, every response (by its tokens' mean or sum), or sums
    divided by sampling.max_new_tokens (Dr. GRPO)."""
    token_mean: Defect = "corrected"
    """With loss_agg_mode=token-mean. corrected: over all tokens of an update; reference: over those
    of a micro-batch, which then counts by its responses."""
    clip_low: float = Field(0.2, gt=0)
    """The ratio is clipped below 1 - clip_low where the advantage is negative."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 + clip_high where the advantage is positive."""
    dual_clip: float | None = Field(None, gt=1)
    """Where the advantage is negative, ratios above it have no gradient; null: they have."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps that one batch of rollouts is split into."""
    epochs: int = Field(1, ge=1)
    """Passes over a batch of rollouts."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the start weights, which above 0 are kept as a frozen
    reference model."""
    kl_estimator: KL = "k3"
    """Estimator of that divergence from the sampled tokens."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    rollout_is: RolloutIS = "none"
    """Correction for the engine's probabilities not being the trainer's, by their ratio at each
    token: truncated at rollout_is_high (tis), tokens above it left out (mis), or tokens outside of
    rollout_is_low to rollout_is_high left out (icepop)."""
    rollout_is_low: float = Field(0.5, ge=0, le=1)
    """Lowest ratio that icepop keeps."""
    rollout_is_high: float = Field(2.0, ge=1)
    """Highest ratio that counts in full."""
    router_replay: RouterReplay = "disabled"
    """R2: each update of a Mixture of Experts sends tokens to the experts that they took in the
    pass of the old log-probabilities, so that a ratio is not one of other experts. R3: every pass
    sends them to the experts that they took in the engine, which tells them."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on one batch of rollouts."""
        return self.mini_batches * self.epochs

    @model_validator(mode="after")
    def _update_options_fit(self) -> Self:
        self._check_update()
        return self

    def _check_update(self) -> None:
        """ValueError if options contradict each other."""
        if self.token_mean == "reference" and self.loss_agg_mode != "token-mean":
            raise ValueError(
                f"token_mean=reference says how loss_agg_mode=token-mean is taken, but "
                f"loss_agg_mode is {self.loss_agg_mode}; leave one of them out"
            )
        if self.router_replay == "R2" and self.updates_per_step == 1:
            raise ValueError(
                "router_replay=R2 repeats the pass of the old log-probabilities, which a single "
                f"update does not make (mini_batches={self.mini_batches}, epochs={self.epochs}); "
                "raise one of them or leave router_replay out"
            )


class Advantage(Section):
    """How a response's scores become its advantage in the game (objectives/advantages.py)."""

    advantage_mode: AdvantageMode = "default"
    """default: the discriminator's scores alone, as in the paper; the others look at the answer's
    accuracy too, each by its formula there."""
    stream_combination: Literal["normalise_then_combine", "combine_then_normalise"] = (
        "normalise_then_combine"
    )
    """Normalise each stream's scores and add them up (the reference's code), or add them up and
    normalise once (the paper's equations)."""
    invalid_samples: Defect = "corrected"
    """What a response counts that does not split into sections. corrected: no score, one penalty
    centred in the group; reference: the group's lowest score less 1, and the penalty besides."""
    format_penalty: float = Field(1.5, ge=0)
    """What a response that does not split into its sections loses in advantage."""
    wrong_penalty: float = Field(1.0, ge=0)
    """What a well-formed wrong answer loses, in acc_gating, gated_align, rlvr_v2 and sign_align."""
    align_coef: float = Field(1.0, ge=0)
    """Weight of the discriminator's part in all modes but default."""
    accuracy_weight: float = Field(1.0, ge=0)
    """Reward of a right answer in rlvr, rlvr_v2 and sign_align."""
    format_weight: float = Field(1.0, ge=0)
    """Reward of the right format in rlvr, rlvr_v2 and sign_align."""
    gated_align_accuracy: Defect = "corrected"
    """reference: gated_align is not told which answers are wrong, so that it gates by format."""


class Alarms(Section):
    """Signs of a collapsing game. A value beyond its threshold in `patience` steps running is
    printed in capitals; null watches nothing."""

    accuracy_above: float | None = Field(0.99, gt=0.5, lt=1)
    """Accuracy on any section: above, the policy learns from little more than noise there."""
    accuracy_below: float | None = Field(None, gt=0, le=0.5)
    """Accuracy on any section: below, the discriminator has lost the game there."""
    margin_above: float | None = Field(10.0, gt=0)
    """score_gap: above, the discriminator is far ahead."""
    load_entropy_below: float | None = Field(0.5, gt=0, lt=1)
    """load_entropy: below, a few experts get most tokens."""
    patience: int = Field(20, ge=1)
    """Steps running beyond a threshold until it counts."""
    action: Literal["warn", "stop"] = "warn"
    """stop ends the run at the first alarm; the last checkpoint stays."""

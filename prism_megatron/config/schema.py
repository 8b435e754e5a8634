"""Every configuration key of every stage: type, default, meaning. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from prism_megatron.config.rewards import Judge, Rewards
from prism_megatron.config.sections import (
    KL,
    NOT_SUPPORTED,
    Advantage,
    AdvantageMode,
    Alarms,
    Best,
    Data,
    Defect,
    Discriminator,
    Freeze,
    Guard,
    LossAggMode,
    LossMode,
    Model,
    Optimizer,
    Parallel,
    PolicyUpdate,
    Recompute,
    Rollout,
    RolloutIS,
    RouterReplay,
    Run,
    Sampling,
    ScoreBound,
    Section,
    Source,
    Train,
    Validation,
    Wandb,
)

__all__ = [
    "ALGORITHMS",
    "KL",
    "NOT_SUPPORTED",
    "RLVR",
    "SFT",
    "Advantage",
    "AdvantageMode",
    "Alarms",
    "Align",
    "Best",
    "Convert",
    "Data",
    "DataStats",
    "Defect",
    "DigitSums",
    "Discriminator",
    "Evaluate",
    "FilterDifficulty",
    "Freeze",
    "Guard",
    "Judge",
    "LossAggMode",
    "LossMode",
    "MakeAlignmentSet",
    "MakeWarmupPairs",
    "Model",
    "Optimizer",
    "Parallel",
    "PolicySampling",
    "PolicyUpdate",
    "Recompute",
    "Report",
    "Rewards",
    "Rollout",
    "RolloutIS",
    "RouterReplay",
    "Run",
    "Sampling",
    "ScoreBound",
    "Section",
    "Source",
    "Stage",
    "SyncCheck",
    "TinyModel",
    "Train",
    "Upcycle",
    "Validation",
    "Wandb",
    "Warmup",
]


def _check_the_longest_fits(data: Data, responses: dict[str, int], key: str, tokens: int) -> None:
    """ValueError if micro-batches of `tokens`, the value of `key`, don't hold the longest prompt
    with the longest of the responses: the run would stop as soon as there is one."""
    name = max(responses, key=responses.__getitem__)
    longest = data.max_prompt_tokens + responses[name]
    if longest > tokens:
        raise ValueError(
            f"data.max_prompt_tokens={data.max_prompt_tokens} and {name}={responses[name]} allow "
            f"for sequences of {longest} tokens, but a micro-batch holds {key}={tokens}; raise it, "
            "or lower one of the others"
        )


class Stage(Section):
    """What every training stage has."""

    run: Run
    backend: Literal["cpu", "cuda"] = "cpu"
    """Device, collectives and layer kernels: cpu = gloo and plain torch in fp32."""
    data: Data
    train: Train
    wandb: Wandb | None = None

    @property
    def _responses(self) -> dict[str, int]:
        """Tokens of the longest response in training, by the key that says so."""
        return {"data.max_response_tokens": self.data.max_response_tokens}

    @model_validator(mode="after")
    def _micro_batches_hold_the_longest(self) -> Self:
        tokens = self.train.micro_batch_tokens
        _check_the_longest_fits(self.data, self._responses, "train.micro_batch_tokens", tokens)
        return self

    @model_validator(mode="after")
    def _only_demonstrations_are_cut(self) -> Self:
        if self.data.overlong == "truncate_response" and not isinstance(self, SFT):
            raise ValueError(
                "data.overlong=truncate_response: a cut teacher's or student's text is told by its "
                "end, and a cut answer is no answer; leave it at quarantine"
            )
        return self

    @model_validator(mode="after")
    def _the_backend_has_the_optimizer(self) -> Self:
        for name in type(self).model_fields:
            section = getattr(self, name)
            if self.backend != "cpu" or not isinstance(section, Optimizer):
                continue
            if section.moments != "float32" or section.offload:
                raise ValueError(
                    f"{name} asks for moments={section.moments}, offload={section.offload}, but "
                    "backend=cpu keeps float32 moments in host memory anyway; leave them out"
                )
        return self


class SFT(Stage):
    """Stage 1: supervised fine-tuning on demonstrations, loss on the response only."""

    model: Model
    optimizer: Optimizer
    batch_size: int = Field(ge=1)
    """Sequences an optimizer step, over all ranks."""


class PolicySampling(Section):
    """A policy whose responses are sampled once, without training it."""

    run: Run
    backend: Literal["cpu", "cuda"] = "cpu"
    """Device that the embedded engine samples on."""
    data: Data
    model: Path
    """Hugging Face directory of the policy, which servers on other nodes have to see, too."""
    sampling: Sampling
    rollout: Rollout = Rollout()
    """Where responses are sampled: engines read the policy from its directory."""

    @model_validator(mode="after")
    def _nothing_is_trained(self) -> Self:
        rollout = self.rollout
        if self.backend != "cpu" and rollout.kind != "embedded":
            raise ValueError(
                f"backend={self.backend} is where the embedded engine samples, but rollout.kind="
                f"{rollout.kind} has devices of its own; leave one of them out"
            )
        names = ("sync_folder", "quantization", "sleep", "ahead", "partial")
        if given := [f"rollout.{name}" for name in names if getattr(rollout, name)]:
            raise ValueError(
                f"{', '.join(given)}: about weights that are trained, but here engines read those "
                "of `model` once; leave them out. A model that `prism-megatron checkpoint "
                "quantize` wrote is served in FP8"
            )
        return self


class MakeWarmupPairs(PolicySampling):
    """Sampling of student responses next to the teacher's, for the discriminator warm-up."""

    out: Path
    """Pairwise JSONL that is written."""


class FilterDifficulty(PolicySampling):
    """Prompts that the policy solves sometimes: neither always nor never (before RLVR)."""

    rewards: Rewards = Rewards()
    """How answers are compared; weights are not used."""
    low: float = Field(0.2, ge=0, le=1)
    """Lowest share of right responses of a prompt that is kept."""
    high: float = Field(0.8, ge=0, le=1)
    """Highest share of right responses of a prompt that is kept."""
    out: Path
    """Parquet that is written: the columns of the data, and pass_rate."""


class MakeAlignmentSet(Section):
    """Alignment data from demonstrations: their responses as teacher_caption and teacher_cot."""

    run: Run
    data: Data
    rows: Literal["sft", "prompts"] = "sft"
    """What the rows are: demonstrations, or prompts with a teacher_response."""
    heldout_share: float = Field(0.02, ge=0, lt=1)
    """Share of the images that are held out, with every question about them; images that one row
    shows together stay together."""
    out: Path
    """Folder that gets train.parquet and heldout.parquet."""


class DataStats(Section):
    """Lengths, images and unusable rows of each source, as a table, JSON and a figure."""

    run: Run
    data: Data
    model: Path
    """Hugging Face directory whose tokenizer and image processor count."""
    rows: Literal["sft", "prompts", "pairs"] = "sft"
    """What the rows are: for SFT, for alignment and RLVR, or for the warm-up."""


class Warmup(Stage):
    """Discriminator warm-up: Bradley-Terry on caption and reasoning pairs."""

    model: Discriminator
    optimizer: Optimizer
    batch_size: int = Field(ge=1)
    """Rows an optimizer step, over all ranks; each has a caption pair and a reasoning pair, or with
    streams=response one pair."""
    aux_loss_coef: float = Field(0.01, ge=0)
    """Weight of the router's load-balancing loss over all tokens of a step; in the reference 0.01,
    but without a gradient (value_head.py, where activation checkpointing cuts it off), which is 0.
    """
    z_loss_coef: float = Field(0.0, ge=0)
    """Weight of the router's z-loss, which keeps its logits small."""
    section_ends: Defect = "corrected"
    """corrected: a section ends with the end-of-turn token, as in alignment; reference: with the
    chat template's line end after it, which alignment never shows
    (train_moe_vl_warmup_fast.py)."""
    last_token: Defect = "corrected"
    """corrected: a sequence is scored at its last token; reference: where the first sequence of a
    batch of four teachers' or students' is as long as any of both, all others are scored too early,
    by twice what they are shorter (value_head.py, get_last_token_scores)."""

    @property
    def _responses(self) -> dict[str, int]:
        if self.section_ends == "reference":
            return {"data.max_response_tokens + 1": self.data.max_response_tokens + 1}
        return super()._responses


class Sampled(PolicyUpdate):
    """A policy that trains on its own responses."""

    sampling: Sampling
    rollout: Rollout = Rollout()
    """Where responses are sampled."""
    validation: Validation | None = None
    samples_every: int = Field(0, ge=0)
    """Steps between records of responses: samples/step_NNNNNN.jsonl in run.dir has the text of each
    that is trained on, how it was judged and its advantage; 0 writes none."""

    @model_validator(mode="after")
    def _the_policy_itself_is_sampled(self) -> Self:
        if self.sampling.temperature != 1 or self.sampling.top_p != 1:
            raise ValueError(
                f"sampling.temperature={self.sampling.temperature}, top_p={self.sampling.top_p}: a "
                "policy is trained by its probabilities at temperature 1 over all tokens, so these "
                "would be responses of another one, for which nothing corrects; leave both at 1"
            )
        return self

    @model_validator(mode="after")
    def _the_engines_give_what_updates_need(self) -> Self:
        if self.rollout.ahead and self.rollout_is == "none":
            raise ValueError(
                "rollout.ahead trains on responses of older weights, for which nothing corrects; "
                "set rollout_is to tis, mis or icepop"
            )
        if self.rollout.partial and self.validation is not None:
            raise ValueError(
                "validation asks engines right after a sync, when rollout.partial has them go on "
                "with the next step's responses; set partial to false, or leave validation out and "
                "look at checkpoints with the stage evaluate"
            )
        if self.router_replay == "R3" and self.rollout.kind not in ("sglang", "vllm"):
            raise ValueError(
                f"router_replay=R3 takes experts from the engine, but rollout.kind="
                f"{self.rollout.kind} does not tell them; use sglang or vllm, or R2"
            )
        return self


class Align(Advantage, Sampled, Stage):
    """Stage 2: the adversarial game between policy and discriminator."""

    policy: Model
    policy_optimizer: Optimizer
    discriminator: Discriminator
    discriminator_optimizer: Optimizer
    prompts_per_step: int = Field(ge=1)
    """Prompts a step; each gets sampling.n responses."""
    caption_weight: float = Field(0.5, ge=0)
    """Weight of the perception stream in the advantage."""
    reasoning_weight: float = Field(0.5, ge=0)
    """Weight of the reasoning stream in the advantage."""
    response_weight: float = Field(1.0, ge=0)
    """Weight of the whole response's stream in the advantage, with streams=response."""
    score_reg_coef: float = Field(1e-3, ge=0)
    """Weight of the squared-score regulariser that keeps scores near zero."""
    aux_loss_coef: float = Field(0.01, ge=0)
    """Weight of the router's load-balancing loss over all tokens of an update."""
    z_loss_coef: float = Field(0.0, ge=0)
    """Weight of the router's z-loss, which keeps its logits small."""
    rewards: Rewards = Rewards()
    """How answers are compared, in the advantage modes that look at them; weights are not used."""
    discriminator_updates: int = Field(1, ge=1)
    """Updates of the discriminator on a step's responses, for one of the policy."""
    gradient_penalty_coef: float = Field(0.0, ge=0)
    """Weight of the gradient penalty at the teacher's answers: the squared change of their scores
    under noise on the embeddings, which stands for the squared gradient (approximated R1, Lin et
    al. 2025); in its way it holds back a discriminator that gets ahead."""
    gradient_penalty_std: float = Field(0.01, gt=0)
    """Standard deviation of that noise."""
    score_length_correction_beta: float = Field(0.0, ge=0)
    """The advantage sees a section's score less this times log(1 + its tokens), so that longer does
    not pay by itself."""
    response_format: Defect = "corrected"
    """Which responses are valid. corrected: those with one section of each kind, none blank, and an
    end; reference: those that its pattern matches, with empty or repeated sections, control tokens
    in between, or cut off right after the answer (dp_critic.py)."""
    student_tokens: Defect = "corrected"
    """corrected: a response's sections are tokenised from their text, as the teacher's; reference:
    they are the tokens that were sampled, whose merges the teacher never shows, and white space
    between sections stays where it is (dp_critic.py)."""
    regularised_scores: Defect = "corrected"
    """What score_reg_coef weighs. corrected: the teacher's scores, one a prompt, and valid
    responses'; reference: the teacher's once a response, and those of invalid responses too, whose
    tokens are cut in half for want of sections (dp_critic.py)."""
    fallback_loss: Defect = "corrected"
    """corrected: only valid responses' pairs train the discriminator; reference: a micro-batch
    without one on any rank raises the teacher's scores, whatever the student's are
    (dp_critic.py)."""
    pair_counts: Defect = "corrected"
    """corrected: every valid response's pair counts the same; reference: it counts by how many
    valid responses share its micro-batch (dp_critic.py)."""
    teacher_length: Defect = "corrected"
    """corrected: the teacher's sections are read whole; reference: cut at 512 tokens
    (rl_dataset.py)."""
    section_ends: Defect = "corrected"
    """corrected: every section ends with the end-of-turn token, where its score is read; reference:
    the teacher's with a padding token (none where it was cut), the student's caption with nothing,
    the student's reasoning with the end of the turn, so that the scored token tells the two
    apart (dp_critic.py, rl_dataset.py)."""
    positions: Defect = "corrected"
    """corrected: the discriminator sees interleaved MRoPE positions, as in its warm-up; reference:
    image tokens are counted one by one like text (dp_critic.py)."""
    alarms: Alarms = Alarms()

    @property
    def _responses(self) -> dict[str, int]:
        # the teacher's are data
        return super()._responses | {"sampling.max_new_tokens": self.sampling.max_new_tokens}


class RLVR(Sampled, Stage):
    """Stage 3: reinforcement learning with verifiable rewards, by GRPO and what grew out of it."""

    policy: Model
    policy_optimizer: Optimizer
    prompts_per_step: int = Field(ge=1)
    """Prompts a step; each gets sampling.n responses."""
    rewards: Rewards = Rewards()
    algorithm: Literal["grpo", "dapo", "gspo", "dr_grpo", "cispo"] = "grpo"
    """Names the options in ALGORITHMS, of which each can still be set by itself."""
    norm_adv_by_std: bool = True
    """Divide advantages by the deviation of their group's rewards; Dr. GRPO does not."""
    overlong_buffer: int = Field(0, ge=0)
    """Last tokens before sampling.max_new_tokens in which the reward falls by up to
    overlong_penalty (DAPO's soft overlong punishment); 0 leaves rewards as they are."""
    overlong_penalty: float = Field(1.0, gt=0)
    """What a response of full length loses."""
    dynamic_sampling: bool = False
    """Take only prompts of which some responses are right and some wrong, and sample further ones
    until the step has prompts_per_step of them; surplus ones wait for the next step (DAPO)."""
    gen_batch_size: int | None = Field(None, ge=1)
    """Prompts sampled at a time with dynamic_sampling; as many as prompts_per_step if not set."""
    max_staleness: int | None = Field(None, ge=0)
    """Updates between the weights that sampled a response and those that it trains, beyond which
    its group is left out: a surplus of dynamic_sampling, or rollout.ahead, which needs 1; null: any
    number."""
    max_epochs: int | None = Field(None, ge=1)
    """Passes over the data after which the run ends, even before train.steps; null: any number.
    With dynamic_sampling it also ends when one pass does not fill a step."""

    @property
    def _responses(self) -> dict[str, int]:
        return {"sampling.max_new_tokens": self.sampling.max_new_tokens}

    @model_validator(mode="after")
    def _algorithm_fills_what_is_not_set(self) -> Self:
        preset = ALGORITHMS[self.algorithm]
        if self.algorithm == "dapo":
            preset = preset | {"overlong_buffer": self.sampling.max_new_tokens // 5}
        for name, value in preset.items():
            if name not in self.model_fields_set:
                # frozen is for whoever reads the configuration
                object.__setattr__(self, name, value)
        self._check_update()
        return self

    @model_validator(mode="after")
    def _sampling_fits(self) -> Self:
        if self.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is longer than the longest response, "
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}"
            )
        if self.rollout.ahead and self.max_staleness == 0:
            raise ValueError(
                "rollout.ahead trains on responses that are one update old, but max_staleness=0; "
                "raise it to 1"
            )
        if self.gen_batch_size is not None and not self.dynamic_sampling:
            raise ValueError(
                f"gen_batch_size={self.gen_batch_size} is for dynamic_sampling, which is off; "
                "without it a step samples prompts_per_step prompts"
            )
        return self


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    # overlong_buffer: a fifth of the longest response, as in the paper (4,096 of 20,480)
    "dapo": {"clip_high": 0.28, "dual_clip": 10.0, "dynamic_sampling": True},
    "gspo": {
        "loss_mode": "gspo",
        "loss_agg_mode": "seq-mean-token-mean",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "dr_grpo": {"loss_agg_mode": "seq-mean-token-sum-norm", "norm_adv_by_std": False},
    # no lower bound
    "cispo": {"loss_mode": "cispo", "clip_low": 1.0},
}
"""What RLVR.algorithm sets, where the configuration does not; everything else is the same for all.
Values: DAPO (Yu et al. 2025; dual_clip as in the reference), GSPO (Zheng et al. 2025), Dr. GRPO
(Liu et al. 2025), CISPO (MiniMax-M1)."""


class SyncCheck(Section):
    """Does every weight reach the rollout engines, and do they compute what the trainer does?"""

    run: Run
    backend: Literal["cpu", "cuda"] = "cpu"
    """Where the trainer computes."""
    data: Data
    policy: Model
    rollout: Rollout = Rollout()
    """The engines."""
    sampling: Sampling
    prompts: int = Field(16, ge=1)
    """Prompts that get sampling.n responses each."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Most tokens that the trainer computes at once; at least the longest prompt and the longest
    response."""
    max_distance: float = Field(0.01, gt=0)
    """Most that log-probabilities of engines and trainer may be apart, on average over tokens. With
    rollout.quantization more is to be expected; tests/gpu/check_served.py allows 0.15."""

    @model_validator(mode="after")
    def _micro_batches_hold_the_longest(self) -> Self:
        responses = {"sampling.max_new_tokens": self.sampling.max_new_tokens}
        tokens = self.micro_batch_tokens
        _check_the_longest_fits(self.data, responses, "micro_batch_tokens", tokens)
        return self


class Evaluate(Section):
    """Greedy decoding of an exported model on held-out rows with plain transformers."""

    run: Run
    backend: Literal["cpu", "cuda"] = "cpu"
    """Device that decodes."""
    data: Data
    model: Path
    """Hugging Face directory."""
    stage: str
    """Name that the result carries in the summary."""
    max_new_tokens: int = Field(6144, ge=1)
    """Longest response."""
    batch_size: int = Field(64, ge=1)
    """Prompts decoded at once."""
    rewards: Rewards = Rewards()

    @model_validator(mode="after")
    def _one_file(self) -> Self:
        if self.data.path is None:
            raise ValueError("data.sources: models are compared on the rows of one data.path")
        return self


class Convert(Section):
    """Hugging Face directory to Megatron checkpoint, which loads at any layout."""

    hf: Path
    """Hugging Face directory."""
    out: Path
    """Megatron checkpoint that is written."""
    value_head: Path | None = None
    """A discriminator's value_head.pt, as the reference writes it, where the shards lack v_head."""


class Upcycle(Section):
    """Dense model to discriminator, by default a Mixture of Experts."""

    hf: Path
    """Dense Hugging Face directory."""
    out: Path
    """Hugging Face directory that is written, value head included."""
    architecture: Literal["shared", "dedicated", "dense"] = "shared"
    """shared: one head, any expert for any token; dedicated: half of the experts and a head for
    captions, half and a head for reasoning; dense: a head on the dense model. The written
    config.json says which, so that nothing else has to."""
    num_experts: int = Field(4, ge=2)
    """Experts a layer, each a noisy copy of the dense MLP."""
    top_k: int = Field(2, ge=1)
    """Experts a token takes."""
    noise_std: float = Field(0.01, ge=0)
    """Standard deviation of the noise on every expert weight."""
    relative_noise: bool = False
    """Whether noise_std is in units of each tensor's own standard deviation."""
    router_std: float = Field(0.02, gt=0)
    """Standard deviation of the router's initial weights."""
    seed: int = 1234
    """Seed of noise, router and head."""

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} experts a token, but num_experts={self.num_experts}; "
                "lower top_k"
            )
        if self.architecture == "dedicated" and (
            self.num_experts % 2 or 2 * self.top_k > self.num_experts
        ):
            raise ValueError(
                f"architecture=dedicated gives each of two sections half of num_experts="
                f"{self.num_experts}, of which a token takes top_k={self.top_k}; give an even "
                "number, at least twice top_k"
            )
        return self


class DigitSums(Section):
    """The quickstart's data: questions about pairs of handwritten digits."""

    out: Path
    """Folder that gets sft.json, prompts.parquet, heldout.parquet and images/."""
    train_rows: int = Field(4000, ge=1)
    """Training questions."""
    heldout_rows: int = Field(400, ge=1)
    """Held-out questions, on digit scans that no training question shows."""
    seed: int = 1234
    """Seed of the split and the pairing."""


class TinyModel(Section):
    """A random-initialised tiny Qwen3-VL in Hugging Face format."""

    out: Path
    """Hugging Face directory that is written."""
    data: Path
    """sharegpt JSON whose texts train the byte-level BPE."""
    system_prompt: Path
    """Text file of the system prompt, which the BPE sees too."""
    vocab_size: int = Field(384, ge=300)
    """Size of the byte-level BPE with its special tokens."""
    seed: int = 1234
    """Seed of the initialisation."""


class Report(Section):
    """Summary, plots and rollout page of a finished run."""

    dir: Path
    """Run folder that holds the stages' folders; the report is written here."""
    stages: tuple[str, ...] = ("sft", "align", "rlvr")
    """Evaluated stages in order."""

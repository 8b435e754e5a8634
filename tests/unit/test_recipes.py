"""The recipe in configs/prism/ is the paper's, and fits the GPUs that it is written for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_providers.presets import hf_config
from prism_megatron import cli, plan
from prism_megatron.config import load as configuration
from prism_megatron.config.schema import RLVR, Align, Section, Stage
from prism_megatron.data.rows import read_system_prompt

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "prism"
STAGES = {
    "sft": "sft",
    "warmup": "warmup",
    "align": "align",
    "grpo": "rlvr",
    "dapo": "rlvr",
    "gspo": "rlvr",
}
OVERLAYS = {
    ("4b", 141): [],
    ("4b", 80): ["80gb"],
    ("8b", 141): ["8b"],
    ("8b", 80): ["8b", "8b-80gb"],
}
GPUS = 8
BATCHES = {
    "sft": "128 sequences, at most 1,310,720 tokens",
    # two sides of 128 pairs
    "warmup": "64 rows = 128 pairs, at most 2,097,152 tokens",
    "align": "4 prompts x 16 responses = 64 responses, at most 524,288 tokens",
    **dict.fromkeys(
        ("grpo", "dapo", "gspo"),
        "32 prompts x 16 responses = 512 responses, at most 5,242,880 tokens",
    ),
}


def files(name: str, *overlays: str) -> list[Path]:
    return [RECIPE / f"{stem}.yaml" for stem in (name, *overlays)]


def load(name: str, *overlays: str, overrides: tuple[str, ...] = ()) -> Any:
    return configuration.load(STAGES[name], files(name, *overlays), overrides)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, of whose models the config.json files are there."""
    root = tmp_path_factory.mktemp("run")
    for size in ("4b", "8b"):
        for stage in ("sft", "align"):
            write(root / size / stage / "hf", hf_config(f"qwen3-vl-{size}"))
        judge = hf_config("qwen3-vl-2b")
        text = judge["text_config"]
        text |= {
            "model_type": "qwen3_vl_moe_text",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": text["intermediate_size"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        judge |= {"model_type": "qwen3_vl_moe"}
        for folder in ("discriminator", "warmup/hf"):
            write(root / size / folder, judge)
    return root


def write(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def engine_bytes(config: Section, gigabytes: int) -> float:
    if not isinstance(config, Align | RLVR):
        return 0
    [share] = [a for a in config.rollout.server_args if a.startswith("--mem-fraction-static=")]
    return float(share.partition("=")[2]) * gigabytes * 1e9


@pytest.mark.parametrize("overlays", OVERLAYS.values(), ids=[f"{s}-{g}gb" for s, g in OVERLAYS])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_fits_its_gpus(
    name: str, overlays: list[str], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [(size, gigabytes)] = [key for key, value in OVERLAYS.items() if value == overlays]
    place = f"vars.dir={models / size}"
    config = load(name, *overlays, overrides=(place,))
    assert isinstance(config, Stage)
    configuration.check_layouts(config, GPUS)
    found, unknown = plan.needs(config, GPUS)
    assert found and not unknown
    needed = plan.total(found.values()) + engine_bytes(config, gigabytes)
    assert needed <= 0.97 * gigabytes * 1e9
    arguments = [STAGES[name], "--dry-run", "--gpus", str(GPUS), place]
    for file in files(name, *overlays):
        arguments += ["--config", str(file)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "# memory         about " in printed
    assert f"# step           {BATCHES[name]}" in printed


def test_the_numbers_are_those_of_the_reference() -> None:
    """As in its scripts qwen3_vl_prism.sh and qwen3_vl_{grpo,dapo,gspo}_after_prism.sh."""
    sft, align = load("sft"), load("align")
    assert (sft.optimizer.lr, sft.optimizer.schedule, sft.model.freeze.vision) == (
        1e-5,
        "cosine",
        True,
    )
    assert (align.prompts_per_step, align.sampling.n, align.train.steps) == (4, 16, 500)
    assert (align.policy_optimizer.lr, align.discriminator_optimizer.lr) == (1e-6, 1e-6)
    assert (align.caption_weight, align.reasoning_weight, align.format_penalty) == (0.5, 0.5, 1.5)
    assert (align.kl_coef, align.entropy_coef, align.score_reg_coef) == (0, 0, 1e-3)
    wanted = {
        # clip_low, clip_high, dual_clip, weight decay, warm-up, aggregation
        "grpo": (0.2, 0.2, 3.0, 0.01, 0, "token-mean"),
        "dapo": (0.2, 0.28, 10.0, 0.1, 10, "token-mean"),
        "gspo": (3e-4, 4e-4, None, 0.1, 75, "seq-mean-token-mean"),
    }
    for name, numbers in wanted.items():
        config = load(name)
        optimizer = config.policy_optimizer
        assert (
            config.clip_low,
            config.clip_high,
            config.dual_clip,
            optimizer.weight_decay,
            optimizer.warmup_steps,
            config.loss_agg_mode,
        ) == numbers
        assert (config.prompts_per_step, config.sampling.n, config.train.steps) == (32, 16, 1500)
    dapo = load("dapo")
    assert (dapo.gen_batch_size, dapo.overlong_buffer, dapo.overlong_penalty) == (96, 4096, 1.0)


def reference(name: str) -> Any:
    """The recipe with the reference's overlay for it, as configs/README.md says."""
    overlay = "rlvr" if name == "grpo" else name
    paths = [*files(name), RECIPE.parent / "reference" / f"{overlay}.yaml"]
    return configuration.load(STAGES[name], paths, ())


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_the_reference_overlays_change_nothing_but_switches(name: str) -> None:
    plain, found = (config.model_dump() for config in (load(name), reference(name)))
    changed = {key for key in plain if plain[key] != found[key]}
    token_mean = {"token_mean"} if name != "gspo" else set()
    assert changed == {"run", "policy", "data", "rewards"} | token_mean
    assert found["data"] == plain["data"] | {"image_resize": "reference"}
    assert found["rewards"] == plain["rewards"] | {"rules": "reference"}


def test_stages_of_the_reference_build_on_each_other() -> None:
    align, policies = reference("align"), [reference(name) for name in ("grpo", "dapo", "gspo")]
    assert align.discriminator.path == reference("warmup").run.dir / "hf"
    assert {policy.policy.path for policy in policies} == {align.run.dir / "hf"}
    corrected = [load(name).run.dir for name in STAGES]
    own = [reference(name).run.dir for name in STAGES if name != "sft"]
    assert len({*corrected, *own}) == len(corrected) + len(own)


@pytest.mark.parametrize(("tool", "stage"), [("filter-difficulty", "grpo"), ("data-stats", "sft")])
def test_data_is_looked_at_as_it_is_trained_on(tool: str, stage: str) -> None:
    found = configuration.load(tool, [RECIPE.parent / "data" / f"{tool}.yaml"], ()).data
    trained = load(stage).data
    for name in (
        "system_prompt",
        "max_prompt_tokens",
        "min_pixels",
        "max_pixels",
        "longest_side",
        "image_resize",
        "overlong",
    ):
        assert getattr(found, name) == getattr(trained, name), name


def test_a_size_that_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rlvr", "--config", str(RECIPE / "grpo.yaml"), "--dry-run", "--gpus", "8"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "runs/prism-4b/align/hf is not there yet" in printed
    assert "# memory" not in printed
    assert cli.main([*arguments, "policy.path=Qwen3-VL-4B-Instruct"]) == 0
    printed = capsys.readouterr().out
    assert "# memory         about " in printed and "# sync" not in printed


@pytest.mark.parametrize(
    ("quantization", "weights"), [("null", "8.9 GB of a"), ("fp8-block", "5.2 GB of a")]
)
def test_what_a_server_shares_a_gpu_with_is_said(
    capsys: pytest.CaptureFixture[str], quantization: str, weights: str
) -> None:
    arguments = ["rlvr", "--config", str(RECIPE / "grpo.yaml"), "--dry-run", "--gpus", "8"]
    shared = ["rollout.sleep=true", "rollout.kind=sglang", f"rollout.quantization={quantization}"]
    shared += ["rollout.engines=8", "rollout.gpus=[0,1,2,3,4,5,6,7]", "rollout.tensor=1"]
    assert cli.main([*arguments, *shared, "policy.path=Qwen3-VL-4B-Instruct"]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("# sync")]
    assert weights in line and "2.1 GB on its way" in line


def test_gpus_are_for_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rlvr", "--config", str(RECIPE / "grpo.yaml"), "--gpus", "8"]
    assert cli.main(arguments) == 2
    assert "--gpus 8 plans a run" in capsys.readouterr().err


def test_the_system_prompt_ends_with_a_line_end_of_its_own() -> None:
    text = read_system_prompt(RECIPE / "system_prompt.txt")
    assert text is not None
    assert text.startswith("You are a helpful scientific assistant.\nAnswer the user's question")
    assert text.endswith("</answer>\n") and not text.endswith("\n\n")

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from prism_megatron.config import load as configuration
from prism_megatron.config import schema

ROOT = Path(__file__).resolve().parents[2]
SFT = """
run: {dir: runs/x}
data: {path: sft.json}
train: {steps: 7}
model: {path: model}
optimizer: {lr: 1e-3}
batch_size: 4
"""
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def load_sft(files: Path | list[Path], *overrides: str) -> schema.SFT:
    config = configuration.load("sft", files, overrides)
    assert isinstance(config, schema.SFT)
    return config


def message(files: Path | list[Path], *overrides: str, stage: str = "sft") -> str:
    with pytest.raises(ValueError) as caught:
        configuration.load(stage, files, overrides)
    return str(caught.value)


def test_a_file_gives_its_values_and_the_defaults_of_the_rest(write: Write) -> None:
    config = load_sft(write("sft.yaml", SFT))
    assert (config.train.steps, config.optimizer.lr, config.model.path) == (7, 1e-3, Path("model"))
    assert (config.run.seed, config.train.micro_batch_tokens) == (1234, 8192)


def test_override_wins_over_overlay_over_file_over_base(write: Write) -> None:
    write("base.yaml", "run: {seed: 1}\ntrain: {save_every: 11, keep_checkpoints: 11}\n")
    own = write(
        "sft.yaml", "base: base.yaml\n" + SFT.replace("steps: 7", "steps: 7, save_every: 2")
    )
    overlay = write("overlay.yaml", "train: {save_every: 3, steps: 13}\n")
    config = load_sft([own, overlay], "train.steps=17")
    assert (config.train.steps, config.train.save_every) == (17, 3)
    assert (config.train.keep_checkpoints, config.run.seed) == (11, 1)


def test_bases_merge_in_order_and_lie_next_to_the_file_that_names_them(write: Write) -> None:
    write("shared/a.yaml", "base: deeper/c.yaml\nrun: {seed: 2}\n")
    write("shared/deeper/c.yaml", "run: {seed: 1}\ntrain: {save_every: 5}\n")
    write("shared/b.yaml", "run: {seed: 3}\n")
    own = write("sft.yaml", "base: [shared/a.yaml, shared/b.yaml]\n" + SFT)
    config = load_sft(own)
    assert (config.run.seed, config.train.save_every) == (3, 5)


def test_a_circle_of_bases_is_named(write: Write) -> None:
    write("a.yaml", "base: b.yaml\n")
    own = write("b.yaml", "base: a.yaml\n")
    assert "in a circle: b.yaml -> a.yaml -> b.yaml" in message(own)


def test_a_missing_base_names_the_file_that_wants_it(write: Write) -> None:
    own = write("sft.yaml", "base: nowhere.yaml\n" + SFT)
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml does not exist, named .* in .*sft"):
        load_sft(own)


@pytest.mark.parametrize("base", ["3", "[a.yaml, 5]", "{a: 1}"])
def test_a_base_that_is_not_a_file_name_is_refused(write: Write, base: str) -> None:
    assert "a file name or a list of them wanted" in message(write("sft.yaml", f"base: {base}\n"))


def test_vars_are_for_interpolation_and_can_be_overridden(write: Write) -> None:
    write("base.yaml", "vars: {root: runs/q, steps: 3}\n")
    text = SFT.replace("runs/x", "'${vars.root}/sft'").replace("steps: 7", "steps: '${vars.steps}'")
    own = write("sft.yaml", "base: base.yaml\n" + text)
    assert load_sft(own).run.dir == Path("runs/q/sft")
    config = load_sft(own, "vars.root=elsewhere", "vars.steps=5")
    assert (config.run.dir, config.train.steps) == (Path("elsewhere/sft"), 5)


def test_an_override_of_a_variable_that_no_file_defines_is_an_error(write: Write) -> None:
    own = write("sft.yaml", "vars: {steps: 3}\n" + SFT)
    assert "vars.stpes: no file defines it, did you mean steps?" in message(own, "vars.stpes=4")


def test_interpolation_of_nothing_names_key_and_file(write: Write) -> None:
    own = write("sft.yaml", SFT.replace("runs/x", "'${vars.root}'"))
    text = message(own)
    assert "run.dir" in text and "vars.root" in text and "sft.yaml" in text


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.stpes=3", "train.steps"),
        ("model.parallel.tensr=2", "model.parallel.tensor"),
        ("optimiser.lr=1", "optimizer"),
        ("bach_size=2", "batch_size"),
        ("lr=3", "optimizer.lr"),
        ("seed=3", "run.seed"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    write: Write, override: str, nearest: str
) -> None:
    text = message(write("sft.yaml", SFT), override)
    assert f": unknown key, did you mean {nearest}? (in the command line)" in text


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.steps=ten", "train.steps: 'ten' given, a valid integer wanted"),
        ("train.steps=1.5", "train.steps: 1.5 given, a valid integer wanted"),
        ("run.seed=true", "run.seed: True given, a valid integer wanted"),
        ("optimizer.lr=0", "optimizer.lr: 0 given, greater than 0 wanted"),
        ("optimizer.lr=.inf", "optimizer.lr: inf given, a finite number wanted"),
        (
            "optimizer.weight_decay=.nan",
            "optimizer.weight_decay: nan given, a finite number wanted",
        ),
        ("optimizer.betas=[0.9,1]", "optimizer.betas.1: 1 given, less than 1 wanted"),
        ("optimizer.lr='\"1e-3\"'", "optimizer.lr: '\"1e-3\"' given, a valid number wanted"),
        ("backend=gpu", "backend: 'gpu' given, 'cpu' or 'cuda' wanted"),
        ("model.freeze.vision=1", "model.freeze.vision: 1 given, a valid boolean wanted"),
        ("data.max_bad_share=1.5", "data.max_bad_share: 1.5 given, less than or equal to 1 wanted"),
        ("optimizer.schedule=linear", "'linear' given, 'constant' or 'cosine' wanted"),
    ],
)
def test_a_wrong_value_says_what_was_given_and_what_is_wanted(
    write: Write, override: str, wanted: str
) -> None:
    assert f"{wanted} (in the command line)" in message(write("sft.yaml", SFT), override)


def test_a_model_of_which_everything_is_frozen_is_refused(write: Write) -> None:
    freeze = [f"model.freeze.{part}=true" for part in ("language", "vision", "mergers")]
    assert "are all frozen, so nothing is trained" in message(write("sft.yaml", SFT), *freeze)
    assert load_sft(write("sft.yaml", SFT), *freeze[:2]).model.freeze.vision
    held = "model.fp8_param_gather=true"
    assert "has no main weights to export" in message(write("sft.yaml", SFT), freeze[0], held)
    assert load_sft(write("sft.yaml", SFT), freeze[1], held).model.fp8_param_gather


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["granularity=selective"], "granularity is 'selective' with 0 modules"),
        (["granularity=full", "modules=[mlp]"], "granularity is 'full' with 1 modules"),
        (["layers=2"], "layers=2 belongs to granularity 'full', not 'none'"),
    ],
)
def test_recompute_settings_that_would_do_nothing_are_refused(
    write: Write, overrides: list[str], wanted: str
) -> None:
    keys = [f"model.recompute.{override}" for override in overrides]
    assert wanted in message(write("sft.yaml", SFT), *keys)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("fp8=mxfp8", "model.fp8: 'mxfp8' given, 'delayed', 'tensorwise' or 'blockwise' wanted"),
        ("bf16_first_layers=-1", "model.bf16_first_layers: -1 given, greater than or equal to 0"),
        ("bf16_last_layers=-2", "model.bf16_last_layers: -2 given, greater than or equal to 0"),
    ],
)
def test_a_wrong_precision_is_refused(write: Write, override: str, wanted: str) -> None:
    assert wanted in message(write("sft.yaml", SFT), f"model.{override}")


@pytest.mark.parametrize("override", ["moments=bfloat16", "offload=true"])
def test_what_the_cpu_backend_cannot_do_with_optimizer_state_is_refused(
    write: Write, override: str
) -> None:
    own, keys = write("sft.yaml", SFT), (f"optimizer.{override}", "optimizer.betas=[0.9,0.995]")
    assert "but backend=cpu keeps float32 moments in host memory" in message(own, *keys)
    assert load_sft(own, *keys, "backend=cuda").backend == "cuda"


def test_second_moments_that_would_only_rise_are_refused(write: Write) -> None:
    keys = ("backend=cuda", "optimizer.moments=bfloat16", "optimizer.betas=[0.8,0.999]")
    assert "moments=bfloat16 with betas=[0.8, 0.999]" in message(write("sft.yaml", SFT), *keys)


@pytest.mark.parametrize("key", schema.NOT_SUPPORTED)
def test_what_megatron_has_and_we_have_not_is_refused_with_the_reason(
    write: Write, key: str
) -> None:
    text = message(write("sft.yaml", SFT), f"model.{key}=true")
    assert f"model.{key}: not supported: {schema.NOT_SUPPORTED[key]} (in " in text


def test_every_problem_is_listed_with_the_file_it_is_in(write: Write) -> None:
    base = write("base.yaml", "train: {save_every: -1}\n")
    own = write("sft.yaml", "base: base.yaml\nmodle: {path: x}\n" + SFT.replace("lr: 1e-3", ""))
    text = message(own)
    assert text.splitlines()[0].endswith("3 problems")
    assert f"train.save_every: -1 given, greater than or equal to 0 wanted (in {base})" in text
    assert f"modle: unknown key, did you mean model? (in {own})" in text
    assert "optimizer.lr: required, but not set" in text


def test_a_check_between_keys_reports_its_own_words(write: Write) -> None:
    own = write("upcycle.yaml", "hf: a\nout: b\nnum_experts: 3\ntop_k: 5\n")
    text = message(own, stage="upcycle")
    assert "top_k=5 experts a token, but num_experts=3" in text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"engines": 5, "nodes": 2}, "engines=5 can't be shared out evenly among nodes=2"),
        ({"kind": "embedded", "engines": 2, "cpus": 3}, "no use for engines, cpus; set another"),
        ({"kind": "sglang", "engines": 4, "nodes": 2, "tensor": 2, "gpus": (0, 1, 2)},
         r"2 engines a node with tensor=2 take 4 GPUs, but gpus=\[0, 1, 2\] names 3"),
        ({"quantization": "fp8-block"}, "quantization=fp8-block is how servers .* kind is local"),
        ({"kind": "embedded", "quantization": "fp8-block"}, "no use for quantization"),
    ],
)  # fmt: skip
def test_engines_that_have_no_place_are_refused(given: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        schema.Rollout.model_validate({"kind": "local", **given})


def test_engines_are_shared_out_among_nodes() -> None:
    placed = schema.Rollout(kind="vllm", engines=6, nodes=3, tensor=2, gpus=(4, 5, 6, 7))
    assert placed.engines_per_node == 2
    assert schema.Rollout.model_validate_json(placed.model_dump_json()) == placed
    assert schema.Rollout.model_validate_json(schema.Rollout().model_dump_json()).kind == "embedded"


@pytest.mark.parametrize("experts, top_k", [(5, 2), (4, 3)])
def test_a_dedicated_discriminator_halves_its_experts(
    write: Write, experts: int, top_k: int
) -> None:
    shared = f"hf: a\nout: b\nnum_experts: {experts}\ntop_k: {top_k}\n"
    configuration.load("upcycle", write("shared.yaml", shared), [])
    own = write("upcycle.yaml", shared + "architecture: dedicated\n")
    text = message(own, stage="upcycle")
    assert f"half of num_experts={experts}, of which a token takes top_k={top_k}" in text


def test_a_discriminator_has_its_own_keys_and_a_policy_not() -> None:
    file = ROOT / "configs/quickstart/align.yaml"
    options = ["discriminator.streams=response", "discriminator.text_only=true"]
    config = configuration.load("align", file, options)
    assert (config.discriminator.streams, config.discriminator.text_only) == ("response", True)
    assert config.response_weight == 1.0
    with pytest.raises(ValueError, match="policy.text_only: unknown key"):
        configuration.load("align", file, ["policy.text_only=true"])


@pytest.mark.parametrize("text", ["a: [1,", "- 1\n- 2\n", "a: ${b\n"])
def test_a_file_that_is_no_yaml_mapping_is_named(write: Write, text: str) -> None:
    assert "sft.yaml" in message(write("sft.yaml", text))


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3"])
def test_an_override_of_the_wrong_form_is_quoted(write: Write, override: str) -> None:
    assert repr(override) in message(write("sft.yaml", SFT), override)


def test_overrides_have_yaml_types(write: Write) -> None:
    overrides = ("optimizer.betas=[0.8,0.95]", "data.system_prompt=null", "train.stop_at=3")
    config = load_sft(write("sft.yaml", SFT), *overrides)
    assert config.optimizer.betas == (0.8, 0.95)
    assert (config.data.system_prompt, config.train.stop_at) == (None, 3)


def test_an_unknown_stage_names_the_nearest(write: Write) -> None:
    own = write("sft.yaml", SFT)
    assert message(own, stage="rlrv") == "unknown stage 'rlrv', did you mean rlvr?"


@pytest.mark.parametrize(
    ("layout", "world", "said"),
    [
        ({"tensor": 2, "pipeline": 2}, 2, "tensor 2 x pipeline 2 = 4 does not divide world size 2"),
        ({"tensor": 3}, 4, "tensor 3 x pipeline 1 = 3 does not divide world size 4"),
        ({"expert": 2, "pipeline": 2}, 6, "expert 2 x pipeline 2 = 4 does not divide"),
        ({"tensor": 2, "context": 2}, 6, "tensor 2 x context 2 x pipeline 1 = 4 does not divide"),
        ({"expert_tensor": 3}, 4, "expert_tensor 3 x pipeline 1 = 3 does not divide world size 4"),
    ],
)
def test_impossible_layouts_print_every_factor_and_the_fix(
    layout: dict[str, int], world: int, said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        configuration.check_world(schema.Parallel(**layout), world, "policy.parallel")
    assert said in str(caught.value)
    assert "or lower policy.parallel." in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "world"),
    [({}, 1), ({"tensor": 2}, 6), ({"expert": 4, "tensor": 2}, 4), ({"pipeline": 3}, 3)],
)
def test_layouts_that_divide_the_world_pass(layout: dict[str, int], world: int) -> None:
    configuration.check_world(schema.Parallel(**layout), world)


def test_every_layout_of_a_configuration_is_checked() -> None:
    config = configuration.load("align", ROOT / "configs/quickstart/align.yaml", [])
    configuration.check_layouts(config, 2)
    with pytest.raises(ValueError, match=r"policy\.parallel: tensor 2"):
        configuration.check_layouts(config, 3)
    config = configuration.load(
        "align", ROOT / "configs/quickstart/align.yaml", ["policy.parallel.tensor=1"]
    )
    with pytest.raises(ValueError, match=r"discriminator\.parallel: expert 2"):
        configuration.check_layouts(config, 3)


def test_a_saved_configuration_loads_back_and_the_record_is_complete(
    write: Write, tmp_path: Path
) -> None:
    config = load_sft(write("sft.yaml", SFT), "run.seed=77", "optimizer.betas=[0.7,0.9]")
    configuration.save(config, tmp_path / "run")
    assert load_sft(tmp_path / "run" / "config.yaml") == config
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["seed"] == 77
    assert {"argv", "git_commit", "git_dirty", "world_size"} <= set(record)
    assert record["versions"]["torch"].startswith("2.") and record["versions"]["python"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "run.json"]


def test_the_record_names_commit_and_local_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "prism_megatron" / "config" / "load.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(configuration, "__file__", str(source))
    assert configuration.git_state() == {"git_commit": None, "git_dirty": None}

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "test: first")
    clean = configuration.git_state()
    assert clean == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": False}
    source.write_text("x = 1")
    assert configuration.git_state() == {**clean, "git_dirty": True}


def shipped() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


def stage_of(path: Path) -> str:
    """The stage that a file is for, or an empty name."""
    stage = {"grpo": "rlvr", "dapo": "rlvr", "gspo": "rlvr"}.get(path.stem, path.stem)
    return stage if stage in configuration.STAGES else ""


@pytest.mark.parametrize(
    "path",
    [path for path in shipped() if stage_of(path)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_shipped_configuration_loads_for_its_stage(path: Path) -> None:
    files = [path]
    if path.parent.name == "reference":  # an overlay of the others
        files.insert(0, ROOT / "configs" / "quickstart" / f"{stage_of(path)}.yaml")
    config = configuration.load(stage_of(path), files, [])
    assert isinstance(config, configuration.STAGES[stage_of(path)])


def test_every_other_shipped_file_is_an_overlay_or_a_base() -> None:
    bases = {
        (path.parent / name).resolve()
        for path in shipped()
        for name in [(yaml.safe_load(path.read_text()) or {}).get("base")]
        if isinstance(name, str)
    }
    others = [path for path in shipped() if not stage_of(path)]
    loose = [
        path
        for path in others
        if path.resolve() not in bases
        and not set(yaml.safe_load(path.read_text())) <= {"base", "vars"}
    ]
    assert loose == []


def test_the_smoke_overlay_shrinks_only_what_the_quickstart_has() -> None:
    quickstart = ROOT / "configs" / "quickstart"
    known = yaml.safe_load((quickstart / "base.yaml").read_text())["vars"]
    smoke = yaml.safe_load((quickstart / "smoke.yaml").read_text())["vars"]
    assert set(smoke) <= set(known)
    assert all(smoke[name] <= known[name] for name in smoke)


RLVR = ROOT / "configs/quickstart/rlvr.yaml"


def rlvr(*overrides: str) -> schema.RLVR:
    config = configuration.load("rlvr", RLVR, overrides)
    assert isinstance(config, schema.RLVR)
    return config


def test_an_algorithm_sets_its_options_and_nothing_else() -> None:
    plain = rlvr().model_dump()
    assert plain["algorithm"] == "grpo"
    for name, preset in schema.ALGORITHMS.items():
        found = rlvr(f"algorithm={name}").model_dump()
        changed = {key: value for key, value in found.items() if value != plain[key]}
        wanted = preset | ({} if name == "grpo" else {"algorithm": name})
        # a fifth of the quickstart's 64 tokens
        assert changed == wanted | ({"overlong_buffer": 12} if name == "dapo" else {})


def test_an_option_wins_over_its_algorithm(write: Write) -> None:
    config = rlvr("algorithm=dapo", "clip_high=0.3", "overlong_buffer=0")
    assert (config.clip_high, config.overlong_buffer, config.dynamic_sampling) == (0.3, 0, True)
    saved = write("resolved.yaml", configuration.to_yaml(config))
    assert configuration.load("rlvr", saved, []) == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("gen_batch_size=3",), "gen_batch_size=3 is for dynamic_sampling, which is off"),
        (("overlong_buffer=65",), "overlong_buffer=65 is longer than the longest response"),
        (
            ("token_mean=reference", "loss_agg_mode=seq-mean-token-sum"),
            "loss_agg_mode is seq-mean-token-sum",
        ),
        (("token_mean=reference", "algorithm=gspo"), "loss_agg_mode is seq-mean-token-mean"),
        (("rollout_is_high=0.9",), "greater than or equal to 1"),
        (("dual_clip=1.0",), "greater than 1"),
        (("sampling.temperature=0.7",), r"temperature=0\.7, top_p=1\.0: a policy is trained by"),
        (("sampling.top_p=0.9",), r"top_p=0\.9: a policy is trained by"),
        (
            ("rollout.kind=local", "rollout.ahead=true", "rollout.partial=true", "rollout_is=tis"),
            "validation asks engines right after a sync, when rollout.partial has them go on",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        rlvr(*overrides)


@pytest.mark.parametrize(
    ("stage", "overrides", "key", "longest"),
    [
        ("sft", (), "data.max_response_tokens=64", 256),
        ("warmup", (), "data.max_response_tokens=64", 256),
        # the reference's line end comes after the end of the turn
        ("warmup", ("section_ends=reference",), r"data.max_response_tokens \+ 1=65", 257),
        ("align", ("sampling.max_new_tokens=70",), "sampling.max_new_tokens=70", 262),
        # the teacher's answers, which the discriminator reads, are data
        ("align", ("sampling.max_new_tokens=60",), "data.max_response_tokens=64", 256),
        ("rlvr", ("data.max_response_tokens=80",), "sampling.max_new_tokens=64", 256),
    ],
)
def test_micro_batches_hold_the_longest_sequence_there_may_be(
    stage: str, overrides: tuple[str, ...], key: str, longest: int
) -> None:
    file = ROOT / f"configs/quickstart/{stage}.yaml"
    configuration.load(stage, file, [f"train.micro_batch_tokens={longest}", *overrides])
    said = f"{key} allow for sequences of {longest} tokens.*micro_batch_tokens={longest - 1}"
    with pytest.raises(ValueError, match=said):
        configuration.load(stage, file, [f"train.micro_batch_tokens={longest - 1}", *overrides])


def switches(config: schema.Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option that is corrected or as in the reference, with its value."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if field.annotation == schema.Defect:
            yield prefix + name, value
        elif isinstance(value, schema.Section):
            yield from switches(value, f"{prefix}{name}.")


def test_the_reference_configuration_sets_every_option_to_reference() -> None:
    found = {}
    for stage in ("warmup", "align", "rlvr"):
        files = [ROOT / f"configs/{folder}/{stage}.yaml" for folder in ("quickstart", "reference")]
        plain = configuration.load(stage, files[0], [])
        assert {value for _, value in switches(plain)} == {"corrected"}
        reference = configuration.load(stage, files, [])
        found[stage] = {name for name, value in switches(reference) if value == "reference"}
        missing = {name for name, value in switches(reference)} - found[stage]
        # the warm-up of the reference resizes images in a way of its own
        assert missing == ({"data.image_resize"} if stage == "warmup" else set())
        assert reference.data.longest_side == (560 if stage == "warmup" else None)
    assert found["warmup"] == {
        "model.score_precision", "model.score_dropout", "section_ends", "last_token",
    }  # fmt: skip
    assert found["align"] >= {"discriminator.score_dropout", "fallback_loss", "rewards.rules"}
    assert found["rlvr"] == {"data.image_resize", "rewards.rules", "token_mean"}


def test_the_table_of_switches_has_every_one() -> None:
    section = (ROOT / "configs/README.md").read_text().partition("## Switches")[2]
    table = section.partition("Others have no switch")[0]
    quickstart = ROOT / "configs/quickstart"
    for stage in ("warmup", "align", "rlvr"):
        config = configuration.load(stage, quickstart / f"{stage}.yaml", [])
        for name, _ in switches(config):
            known = [f"`{name}`", f"`{name.rpartition('.')[2]}`"]
            lines = [line for line in table.splitlines() if any(name in line for name in known)]
            # the warm-up of the reference resizes images in a way of its own
            missing = [line for line in lines if stage not in line.rpartition("| ")[2]]
            assert lines and (len(missing) < len(lines) or name == "data.image_resize"), name


def test_the_first_keys_of_a_stage_are_those_of_every_stage() -> None:
    for stage in ("align", "rlvr"):
        assert [*configuration.STAGES[stage].model_fields][:4] == [
            "run",
            "backend",
            "data",
            "train",
        ]


def test_every_key_has_a_meaning() -> None:
    silent = {
        f"{stage}: {key}"
        for stage, section in configuration.STAGES.items()
        for key, _, meaning in configuration.describe(section)
        if not meaning
    }
    assert silent == set()

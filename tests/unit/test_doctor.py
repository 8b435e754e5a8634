from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron import doctor
from prism_megatron.config import schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("OSError: libcublas.so.13: no such file", ["(OSError: libcublas.so.13: no such file)"]),
        ("not installed", []),
        ("active", []),
    ],
)
def test_an_engine_that_does_not_load_is_a_problem_and_one_that_is_absent_is_not(
    status: str, said: list[str]
) -> None:
    found = list(doctor._acceleration({"Transformer Engine": status, "DeepEP": "OSError: x"}))
    assert [finding.severity for finding in found] == ["bad"] * len(said)
    assert all(
        words in finding.what and "breaks the import of megatron.core" in finding.what
        for words, finding in zip(said, found, strict=True)
    )


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("x = 1\n", "active"),
        ("raise OSError('libnothing.so: cannot open')\n", "OSError: libnothing.so: cannot open"),
        ("import os; os._exit(9)\n", "import ended with status 9"),
    ],
)
def test_a_module_is_probed_in_a_process_of_its_own(
    source: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accelerated_kernels.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.probe("accelerated_kernels") == status


def test_a_module_that_is_not_there_is_not_installed() -> None:
    assert doctor.probe("no_such_kernels.inner") == "not installed"


def test_the_versions_that_belong_together_are_pinned_alike_everywhere() -> None:
    tested = doctor.tested_versions()
    exact = {
        requirement.name: next(iter(requirement.specifier)).version
        for requirement in map(doctor.Requirement, doctor.requires(doctor.DISTRIBUTION) or ())
        if str(requirement.specifier).startswith("==")
    }
    assert set(exact) == {"torch", "megatron-core", "transformers"}
    assert {name: tested[name] for name in exact} == exact


def test_every_requirement_has_a_tested_version() -> None:
    packages = doctor.diagnose(None, Path()).packages
    required = [p for p in packages if p.name not in doctor.ENGINES]
    assert [p.name for p in required if p.tested is None or p.installed is None] == []


@pytest.mark.parametrize(
    ("package", "remark"),
    [
        (doctor.Package("torch", "2.11.0+cu130", "2.11.0"), ""),
        (doctor.Package("torch", "2.12.0", "2.11.0"), "not the tested one"),
        (doctor.Package("torch", None, "2.11.0"), "missing"),
        (doctor.Package("vllm", "0.22.1", None), ""),
        (doctor.Package("vllm", None, None), ""),
    ],
)
def test_a_package_off_its_pin_is_remarked(package: doctor.Package, remark: str) -> None:
    assert package.remark == remark


def test_json_holds_everything_and_the_status_follows_the_problems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = doctor.main(["--json"])
    printed = json.loads(capsys.readouterr().out)
    assert status == (1 if printed["problems"] else 0)
    [node] = printed["nodes"]
    installed = {package["name"]: package["installed"] for package in node["packages"]}
    assert installed["megatron-core"] == "0.19.2"
    assert set(node["acceleration"]) == set(doctor.ACCELERATION)
    assert node["room"]["disk"] > 0 and node["addresses"]["lo"] == ["127.0.0.1"]

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    assert doctor.main([]) == 1
    printed_words = " ".join(capsys.readouterr().out.split())
    assert "known bad" in printed_words and "GLOO_SOCKET_IFNAME=no0 names no" in printed_words


def test_a_layout_is_held_against_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    stage = ["sft", "--config", str(ROOT / "configs/quickstart/sft.yaml"), "vars.dir=/r"]
    # nothing else here may be bad
    assert doctor.main(["--json", "--gpus", "4", *stage]) == 0
    capsys.readouterr()
    assert doctor.main(["--json", "--gpus", "3", *stage]) == 1
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith("layout on 3 GPUs: model.parallel: tensor 2")


def test_engines_need_gpus_that_there_are() -> None:
    config = schema.RLVR.model_construct(
        rollout=schema.Rollout(kind="sglang", engines=2, gpus=(0, 4))
    )
    [finding] = doctor._engines(config, 4)
    assert finding.what == "rollout.gpus=[0, 4], but the host has GPUs 0 to 3"
    assert not list(doctor._engines(config, 5))


def test_hosts_that_differ_are_named() -> None:
    first = doctor.diagnose(None, Path())
    older = replace(first.packages[0], installed="0.1")
    other = replace(
        first, host="other", clock=-3.25, shared=False, packages=(older, *first.packages[1:])
    )
    assert not list(doctor._between([first, replace(first, clock=1.5, shared=True)], Path("runs")))
    clock, folder, versions = doctor._between([first, other], Path("runs"))
    assert f"the clock of other is -3.2 s off that of {first.host}" in clock
    assert f"other does not see what {first.host} writes into run.dir=runs" in folder
    assert versions == f"other has other versions than {first.host}: {older.name} 0.1"

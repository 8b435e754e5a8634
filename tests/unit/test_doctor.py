from __future__ import annotations

import json
from pathlib import Path

import pytest
from packaging.version import Version

from prism_megatron import doctor

ROOT = Path(__file__).resolve().parents[2]
TESTED = {"torch": "2.11.0+cu130", "transformers": "5.6.0", "megatron-core": "0.19.2"}


def problems(
    installed: dict[str, str],
    acceleration: dict[str, str] | None = None,
    apex_files: tuple[str, ...] = (),
) -> list[str]:
    versions = {name: Version(version) for name, version in (TESTED | installed).items()}
    return list(doctor.known_bad(versions, acceleration or {}, apex_files))


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"transformer-engine": "2.13.0"}, "install transformer-engine 2.12.0"),
        ({"transformer-engine": "2.14.1"}, "Transformer Engine 2.14.1 needs a newer cuBLAS"),
        ({"kernels": "0.17.0"}, "install kernels 0.14.1"),
        ({"transformers": "4.57.6"}, "rope_theta ten times off"),
        ({"apex": "0.9.10.dev0"}, "not NVIDIA Apex"),
    ],
)
def test_a_known_bad_version_is_named_with_the_way_out(
    installed: dict[str, str], said: str
) -> None:
    [problem] = problems(installed)
    assert said in problem


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"transformer-engine": "2.12.0", "kernels": "0.14.1"},
        {"transformer-engine": "2.13.0", "torch": "2.12.0"},
        {"kernels": "0.17.0", "transformers": "5.7.0"},
    ],
)
def test_good_versions_have_no_problem(installed: dict[str, str]) -> None:
    assert problems(installed) == []


def test_nvidias_apex_is_known_by_its_files() -> None:
    assert problems({"apex": "0.1"}, apex_files=("apex/optimizers/fused_adam.py",)) == []


def test_an_engine_that_does_not_load_is_a_problem_and_one_that_is_absent_is_not() -> None:
    [problem] = problems({}, {"Transformer Engine": "OSError: libcublas.so.13: no such file"})
    assert "breaks the import of megatron.core (OSError: libcublas" in problem
    assert problems({}, {"Transformer Engine": "not installed", "DeepEP": "OSError: x"}) == []
    assert problems({}, {"Transformer Engine": "active"}) == []


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
    packages = doctor.diagnose().packages
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
    installed = {package["name"]: package["installed"] for package in printed["packages"]}
    assert installed["megatron-core"] == "0.19.2"
    assert set(printed["acceleration"]) == set(doctor.ACCELERATION)

    monkeypatch.setattr(doctor, "known_bad", lambda *found: ["this pair is bad"])
    assert doctor.main([]) == 1
    assert "known bad: this pair is bad" in capsys.readouterr().out

"""What the packages say of themselves and need: versions in the workspace, groups of the root, metadata of wheels."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MEMBERS: dict[str, dict[str, Any]] = {
    project["name"]: project
    for file in sorted(ROOT.glob("packages/*/pyproject.toml"))
    for project in [tomllib.loads(file.read_text(encoding="utf-8"))["project"]]
}


def _requirements(project: dict[str, Any]) -> list[Requirement]:
    extras = project.get("optional-dependencies", {}).values()
    listed = [*project.get("dependencies", ()), *(requirement for extra in extras for requirement in extra)]
    return [Requirement(requirement) for requirement in listed]


def test_all_members_have_one_version() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["version"] for project in MEMBERS.values()} == {root["version"]}


@pytest.mark.parametrize("name", MEMBERS)
def test_bounds_on_siblings_contain_their_versions(name: str) -> None:
    for requirement in _requirements(MEMBERS[name]):
        if requirement.name in MEMBERS:
            assert requirement.specifier.contains(MEMBERS[requirement.name]["version"]), str(requirement)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_sibling_that_is_always_needed_is_bounded_on_both_sides(name: str) -> None:
    needed = {requirement.name: requirement for requirement in map(Requirement, MEMBERS[name].get("dependencies", ()))}
    for sibling in needed.keys() & MEMBERS.keys():
        operators = {specifier.operator for specifier in needed[sibling].specifier}
        assert operators == {">=", "<"}, str(needed[sibling])


def test_the_root_depends_on_every_member() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {Requirement(requirement).name for requirement in root["project"]["dependencies"]} == set(MEMBERS)
    assert set(root["tool"]["uv"]["sources"]) == set(MEMBERS)


def test_the_readme_commands_install_no_peer_and_no_browser() -> None:
    """natten is built from source, with CUDA kernels for an hour where there is a GPU; Chromium weighs 600 MB."""
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = {group: {Requirement(r).name for r in names} for group, names in root["dependency-groups"].items()}
    default = set(root["tool"]["uv"].get("default-groups", ["dev"]))
    asked_for = groups["peers"] | groups["browser"]
    assert asked_for >= {"natten", "pyside6"}
    assert asked_for.isdisjoint(set().union(*(groups[group] for group in default)))
    assert asked_for.isdisjoint({r.name for project in MEMBERS.values() for r in _requirements(project)})
    assert root["tool"]["uv"]["extra-build-variables"]["natten"]["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", MEMBERS)
def test_a_wheel_says_whom_it_is_for_and_its_readme_links_outside_the_repository_only(name: str) -> None:
    project = MEMBERS[name]
    assert {"Typing :: Typed", "Intended Audience :: Science/Research"} <= set(project["classifiers"])
    assert project["license"] == "Apache-2.0"
    assert project["keywords"]
    text = (ROOT / "packages" / name / project["readme"]).read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https?://|#)([^)]*)\)", text) == []


def test_every_task_package_offers_the_same_extras() -> None:
    for name in MEMBERS.keys() - {"attn-core"}:
        assert {"train", "hub", "export", "wandb", "all"} <= MEMBERS[name]["optional-dependencies"].keys(), name

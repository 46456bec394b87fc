"""Versions inside the workspace: uv ignores the bounds between members there, pip does not."""

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

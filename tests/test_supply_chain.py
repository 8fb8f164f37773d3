"""What comes from others is known, allowed, and said; deny.toml is the one place of the rules.

cargo answers without the network: what built the core is there.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
DENY = (ROOT / "deny.toml").read_text(encoding="utf-8")
RULES = tomllib.loads(DENY)
LOCKED = tomllib.loads((ROOT / "Cargo.lock").read_text(encoding="utf-8"))["package"]
ALLOWED = RULES["licenses"]["allow"]
REVIEWED = RULES["bans"]["build"]["allow-build-scripts"]

needs_cargo = pytest.mark.skipif(shutil.which("cargo") is None, reason="needs cargo")


def tool():
    path = ROOT / "tools" / "third_party.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


third_party = tool()


@pytest.fixture(scope="module")
def crates():
    return third_party.crates()


@pytest.fixture(scope="module")
def materials():
    return json.loads((ROOT / "whence.cdx.json").read_text(encoding="utf-8"))


# Rules


@pytest.mark.parametrize(
    ("expression", "taken"),
    [
        ("MIT", ["MIT"]),
        ("Zlib OR Apache-2.0 OR MIT", ["MIT"]),
        ("BSD-2-Clause OR MIT", ["MIT"]),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", ["MIT", "Unicode-3.0"]),
        ("MIT OR Zlib AND Unicode-3.0", ["MIT"]),
        ("Zlib AND MIT OR Unicode-3.0", ["Unicode-3.0"]),
        ("Apache-2.0 WITH LLVM-exception", ["Apache-2.0 WITH LLVM-exception"]),
        ("Apache-2.0", None),
        ("MIT AND Zlib", None),
        ("(MIT AND Zlib) OR (Apache-2.0)", None),
        ("MIT WITH LLVM-exception", None),
    ],
)
def test_of_several_licences_the_first_allowed_is_taken(expression, taken):
    allowed = ["MIT", "BSD-2-Clause", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"]
    assert third_party.accepted(expression, allowed) == taken


@needs_cargo
def test_every_crate_has_an_allowed_licence(crates):
    refused = {
        key: crate.licence
        for key, crate in crates.items()
        if third_party.accepted(crate.licence, ALLOWED) is None
    }
    assert refused == {}


@needs_cargo
@pytest.mark.parametrize("licence", ALLOWED)
def test_no_licence_is_allowed_that_nothing_needs(crates, licence):
    others = [it for it in ALLOWED if it != licence]
    assert any(third_party.accepted(crate.licence, others) is None for crate in crates.values())


def test_a_crate_has_two_versions_only_where_a_reason_is_given():
    versions = {}
    for package in LOCKED:
        versions.setdefault(package["name"], set()).add(package["version"])
    excepted = {}
    for entry in RULES["bans"]["skip"]:
        assert len(entry["reason"].split()) > 3
        name, version = entry["crate"].split("@")
        excepted.setdefault(name, set()).add(version)
    assert {name for name, several in versions.items() if len(several) > 1} == set(excepted)
    for name, older in excepted.items():
        assert len(versions[name] - older) == 1


def test_crates_come_from_the_registry_with_their_checksums_or_lie_here():
    ours = {path.parent.name for path in ROOT.glob("rust/*/Cargo.toml")}
    assert {it["name"] for it in LOCKED if "source" not in it} == {f"whence-{it}" for it in ours}
    for package in LOCKED:
        if "source" in package:
            assert package["source"] == "registry+https://github.com/rust-lang/crates.io-index"
            assert re.fullmatch("[0-9a-f]{64}", package["checksum"])


@needs_cargo
def test_every_build_script_has_been_read(crates):
    assert sorted(key for key, it in crates.items() if it.script is not None) == sorted(REVIEWED)
    assert [key for key, it in crates.items() if it.ours and it.script is not None] == []


@pytest.mark.parametrize("key", REVIEWED)
def test_what_a_build_script_does_stands_beside_it(key):
    assert re.search(rf'^    "{re.escape(key)}", +# (\w+\W+){{3,}}', DENY, re.MULTILINE)


@needs_cargo
def test_nothing_that_builds_opens_a_connection(crates):
    calls = {other for crate in crates.values() if crate.script for other in crate.builds}
    paths = [crate.script for crate in crates.values() if crate.script]
    paths += [path for key in calls for path in crates[key].folder.glob("src/**/*.rs")]
    assert len(paths) > len(REVIEWED)
    network = re.compile(r"std::net|TcpStream|UdpSocket|\"(curl|wget|git|powershell|sh)\"")
    for path in paths:
        assert not network.search(path.read_text(encoding="utf-8")), path


# What the wheel carries


@needs_cargo
def test_what_is_linked_is_what_cargo_lists(crates):
    command = ["cargo", "tree", "--locked", "--offline", "--package", "whence-py"]
    command += ["--edges", "normal,no-proc-macro", "--prefix", "none"]
    listed = set()
    for target in RULES["graph"]["targets"]:
        done = subprocess.run(
            [*command, "--target", target],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        listed |= set(re.findall(r"^(\S+) v(\S+)", done.stdout, re.MULTILINE))
    listed = {f"{name}@{version}" for name, version in listed if not name.startswith("whence-")}
    assert third_party.reached(crates, building=False) == listed
    assert listed < third_party.reached(crates, building=True)


@needs_cargo
def test_the_notices_and_the_materials_are_those_of_the_lock_file(capsys):
    assert third_party.main(["--check"]) == 0, capsys.readouterr().err


@needs_cargo
@pytest.mark.parametrize("name", ["THIRD-PARTY-NOTICES", "whence.cdx.json"])
def test_a_stale_file_is_named(tmp_path, capsys, monkeypatch, crates, name):
    monkeypatch.setattr(third_party, "crates", lambda: crates)
    assert third_party.main(["--out", str(tmp_path)]) == 0
    assert third_party.main(["--check", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    path = tmp_path / name
    path.write_bytes(path.read_bytes().replace(b"libc", b"libd", 1))
    assert third_party.main(["--check", "--out", str(tmp_path)]) == 1
    path.unlink()
    assert third_party.main(["--check", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"{name} is stale: python tools/third_party.py\n" * 2


@needs_cargo
def test_every_linked_crate_has_its_text_in_the_notices(crates):
    notices = " ".join((ROOT / "THIRD-PARTY-NOTICES").read_text(encoding="utf-8").split())
    for key in third_party.reached(crates, building=False):
        crate = crates[key]
        assert f"{crate.name} {crate.version}, " in notices
        texts = [
            " ".join(path.read_text(encoding="utf-8").split())
            for path in crate.folder.glob("LICENSE*")
        ]
        assert any(text in notices for text in texts), key


@pytest.mark.parametrize("files", [{}, {"LICENSE": "mine"}, {"LICENSE": "MIT", "COPYING": "MIT"}])
def test_a_crate_without_one_text_of_its_licence_is_refused(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(third_party.TEXTS.get(text, text), encoding="utf-8")
    bare = third_party.Crate("bare", "1.0.0", "MIT", tmp_path, ours=False, macro=False, script=None)
    with pytest.raises(SystemExit, match="bare must bring the text of MIT once, got"):
        third_party.text_of(bare, "MIT")


def test_the_materials_name_every_crate_with_the_checksum_of_the_lock_file(materials):
    checksums = {
        f"pkg:cargo/{it['name']}@{it['version']}": it["checksum"]
        for it in LOCKED
        if "checksum" in it
    }
    components = [it for it in materials["components"] if it["name"] != "std"]
    for component in components:
        assert component["purl"] == f"pkg:cargo/{component['name']}@{component['version']}"
        (found,) = component["hashes"]
        assert found == {"alg": "SHA-256", "content": checksums[component["purl"]]}
    direct = {"pkg:cargo/" + it for it in ("pyo3", "numpy", "half", "bytemuck", "crc32fast")}
    linked = {it["purl"].split("@")[0] for it in components if it["scope"] == "required"}
    assert direct < linked


def test_the_materials_have_the_shape_of_cyclonedx(materials):
    assert (materials["bomFormat"], materials["specVersion"]) == ("CycloneDX", "1.5")
    described = [materials["metadata"]["component"], *materials["components"]]
    names = [it["bom-ref"] for it in described]
    assert len(set(names)) == len(names)
    assert sorted(it["ref"] for it in materials["dependencies"]) == sorted(names)
    known, reached = {it["ref"]: it["dependsOn"] for it in materials["dependencies"]}, set()
    waiting = [names[0]]
    while waiting:
        reached.add(name := waiting.pop())
        waiting += set(known[name]) - reached
    assert reached == set(names)


def test_the_materials_are_the_same_wherever_and_whenever_they_are_made(materials):
    text = json.dumps(materials)
    assert "serialNumber" not in materials
    assert "timestamp" not in materials["metadata"]
    assert "file:" not in text
    assert str(Path.home()) not in text


def installed():
    """The files of an installed wheel; None where the package is imported from a folder."""
    try:
        files = importlib.metadata.files("whence")
    except importlib.metadata.PackageNotFoundError:
        return None
    return files and [it for it in files if it.hash is not None]


@pytest.mark.skipif(not installed(), reason="needs an installed wheel")
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("LICENSE", "licenses"),
        ("THIRD-PARTY-NOTICES", "licenses"),
        ("whence.cdx.json", "sboms"),
    ],
)
def test_the_wheel_carries_the_file(name, folder):
    (found,) = [it for it in installed() if it.parts[-2:] == (folder, name)]
    assert re.fullmatch(r"whence-[0-9.]+\.dist-info", found.parts[0])
    digest = hashlib.sha256((ROOT / name).read_bytes()).digest()
    assert found.hash.value == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@pytest.mark.skipif(not installed(), reason="needs an installed wheel")
def test_the_wheel_carries_no_other_bill_of_materials():
    assert [it.name for it in installed() if it.parts[-2] == "sboms"] == ["whence.cdx.json"]


# README's table


def rows():
    """Of each dependency in README's table: its name, and where it is needed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Dependencies\n\n| what | where | why |\n|---|---|---|\n")[1]
    for line in table.split("\n\n")[0].splitlines():
        names, where, why = line.strip("| ").split(" | ")
        assert why
        for name in names.split(", "):
            yield name, where


def test_readme_says_why_of_every_python_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = {"always": project["project"]["dependencies"]}
    named |= project["project"]["optional-dependencies"]
    named["building"] = project["build-system"]["requires"]
    places = {}
    for place, requirements in named.items():
        for requirement in requirements:
            name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
            if name != "whence":
                places.setdefault(name, set()).add(place)
    said = {
        name: set(re.findall("`(.+?)`", where)) or {where}
        for name, where in rows()
        if not where.startswith("Rust")
    }
    assert said == places


def test_readme_says_why_of_every_crate():
    places = {}
    for path in ROOT.glob("rust/*/Cargo.toml"):
        manifest = tomllib.loads(path.read_text(encoding="utf-8"))
        for part in (manifest, *manifest.get("target", {}).values()):
            for kind in ("dependencies", "build-dependencies"):
                places.update(dict.fromkeys(part.get(kind, {}), "Rust"))
            for name in part.get("dev-dependencies", {}):
                places.setdefault(name, "Rust, tests")
    del places["whence-core"]
    assert {name: where for name, where in rows() if where.startswith("Rust")} == places

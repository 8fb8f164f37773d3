"""What of others is in the wheel: their licences, and the bill of materials.

    python tools/third_party.py            writes THIRD-PARTY-NOTICES and whence.cdx.json
    python tools/third_party.py --check    exits 1 if they are not what it would write

It asks cargo, without the network (`cargo fetch --locked` brings what is missing), for each target
of deny.toml. The same Cargo.lock gives the same bytes, on every machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
NOTICES, MATERIALS = "THIRD-PARTY-NOTICES", "whence.cdx.json"

TEXTS = {
    "MIT": "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "BSD-2-Clause": "Redistributions in binary form must reproduce the above copyright notice",
}
"""A sentence by which the text of a licence is known among the files of a crate."""

ABOUT = """\
The wheels of whence hold compiled code of these Rust packages, under the licences that follow.
Where a package offers several, the first of them that deny.toml names is taken.

The standard library of Rust is in them too, under the MIT licence or the Apache License 2.0,
Copyright (c) The Rust Project Contributors; the notices of its parts come with each release of
Rust, in COPYRIGHT-library.html.
"""


@dataclass
class Crate:
    """A package as cargo resolved it."""

    name: str
    version: str
    licence: str
    """The SPDX expression."""
    folder: Path
    ours: bool
    macro: bool
    """Whether it runs in the compiler, as a procedural macro."""
    script: Path | None
    """The build script."""
    linked: set[str] = field(default_factory=set)
    """The keys of those whose code it calls."""
    builds: set[str] = field(default_factory=set)
    """The keys of those that its build script calls."""
    tests: set[str] = field(default_factory=set)
    """The keys of those that its tests call."""


def rules() -> dict[str, Any]:
    """deny.toml."""
    return tomllib.loads((ROOT / "deny.toml").read_text(encoding="utf-8"))


def locked() -> list[dict[str, Any]]:
    """The packages of Cargo.lock."""
    text = (ROOT / "Cargo.lock").read_text(encoding="utf-8")
    packages: list[dict[str, Any]] = tomllib.loads(text)["package"]
    return packages


def crates() -> dict[str, Crate]:
    """Every crate of any target, tests included, by its key: name@version."""
    found: dict[str, Crate] = {}
    for target in rules()["graph"]["targets"]:
        command = ["cargo", "metadata", "--locked", "--offline", "--format-version", "1"]
        done = subprocess.run(
            [*command, "--filter-platform", target], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        metadata = json.loads(done.stdout)
        keys = {}
        for package in metadata["packages"]:
            key = keys[package["id"]] = f"{package['name']}@{package['version']}"
            sources = {kind: it["src_path"] for it in package["targets"] for kind in it["kind"]}
            script = sources.get("custom-build")
            found.setdefault(
                key,
                Crate(
                    package["name"],
                    package["version"],
                    # The older way to write a choice.
                    package["license"].replace("/", " OR "),
                    Path(package["manifest_path"]).parent,
                    ours=package["source"] is None,
                    macro="proc-macro" in sources,
                    script=None if script is None else Path(script),
                ),
            )
        for node in metadata["resolve"]["nodes"]:
            crate = found[keys[node["id"]]]
            for dependency in node["deps"]:
                for kind in dependency["dep_kinds"]:
                    sets = {None: crate.linked, "build": crate.builds, "dev": crate.tests}
                    sets[kind["kind"]].add(keys[dependency["pkg"]])
    return found


def reached(found: dict[str, Crate], *, building: bool) -> set[str]:
    """What of others the wheel needs: in itself, or also in its making.

    Macros are called in the making alone, and so is all that they call.
    """
    keys: set[str] = set()
    waiting = [key for key, crate in found.items() if crate.ours]
    while waiting:
        crate = found[waiting.pop()]
        following = crate.linked | crate.builds if building else crate.linked
        for key in following - keys:
            if building or not found[key].macro:
                keys.add(key)
                waiting.append(key)
    return {key for key in keys if not found[key].ours}


def accepted(expression: str, allowed: Sequence[str]) -> list[str] | None:
    """The licences under which a crate is taken, those first in `allowed` preferred; or None."""
    words = re.findall(r"[()]|[^\s()]+", expression)

    def either() -> list[str] | None:
        choices = [both()]
        while words and words[0] == "OR":
            words.pop(0)
            choices.append(both())
        fitting = [choice for choice in choices if choice is not None]
        return min(fitting, key=lambda it: max(map(allowed.index, it)), default=None)

    def both() -> list[str] | None:
        parts = [one()]
        while words and words[0] == "AND":
            words.pop(0)
            parts.append(one())
        taken = [licence for part in parts if part is not None for licence in part]
        return None if None in parts else taken

    def one() -> list[str] | None:
        word = words.pop(0)
        if word == "(":
            inner = either()
            words.pop(0)
            return inner
        if words and words[0] == "WITH":
            word = " ".join([word, words.pop(0), words.pop(0)])
        return [word] if word in allowed else None

    return either()


def text_of(crate: Crate, licence: str) -> str:
    """The text of one of its licences, as the crate brings it."""
    texts = []
    for path in sorted(crate.folder.iterdir()):
        if re.match(r"(?i)licen[cs]e|copying", path.name) and path.is_file():
            text = "\n".join(map(str.rstrip, path.read_text(encoding="utf-8").splitlines()))
            if TEXTS[licence] in " ".join(text.split()):
                texts.append(text.strip("\n"))
    if len(texts) != 1:
        sys.exit(f"{crate.name} must bring the text of {licence} once, got {len(texts)} files")
    return texts[0]


def notices(found: dict[str, Crate]) -> str:
    """The licences of all that is linked; a text that several share stands once."""
    allowed = rules()["licenses"]["allow"]
    texts: dict[str, list[str]] = {}
    for key in sorted(reached(found, building=False)):
        crate = found[key]
        licences = accepted(crate.licence, allowed)
        if licences is None:
            sys.exit(f"the licence of {key} must be allowed by deny.toml, got {crate.licence}")
        for licence in licences:
            heading = f"{crate.name} {crate.version}, {licence}, of: {crate.licence}"
            texts.setdefault(text_of(crate, licence), []).append(heading)
    parts = ["\n".join(headings) + f"\n\n{text}\n" for text, headings in texts.items()]
    return f"\n{'-' * 80}\n\n".join([ABOUT, *parts])


def materials(found: dict[str, Crate]) -> str:
    """CycloneDX 1.5: what is linked is required, what only builds is excluded from the wheel."""
    checksums = {f"{it['name']}@{it['version']}": it.get("checksum") for it in locked()}
    linked, needed = reached(found, building=False), sorted(reached(found, building=True))
    binding = next(crate for crate in found.values() if crate.name == "whence-py")
    whence = f"pkg:pypi/whence@{binding.version}"

    def calls(crate: Crate) -> set[str]:
        return {f"pkg:cargo/{key}" for key in crate.linked | crate.builds if key in needed}

    components: list[dict[str, Any]] = [
        {
            "type": "library",
            "bom-ref": f"pkg:cargo/{key}",
            "name": found[key].name,
            "version": found[key].version,
            "scope": "required" if key in linked else "excluded",
            "hashes": [{"alg": "SHA-256", "content": checksums[key]}],
            "licenses": [{"expression": found[key].licence}],
            "purl": f"pkg:cargo/{key}",
        }
        for key in needed
    ]
    standard = {
        "type": "library",
        "bom-ref": "std",
        "name": "std",
        "description": "the standard library of the Rust that built the wheel",
        "scope": "required",
        "licenses": [{"expression": "MIT OR Apache-2.0"}],
    }
    ours = set().union(*(calls(crate) for crate in found.values() if crate.ours))
    dependencies = {whence: ours | {"std"}, "std": set()}
    dependencies.update((f"pkg:cargo/{key}", calls(found[key])) for key in needed)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": whence,
                "name": "whence",
                "version": binding.version,
                "licenses": [{"expression": binding.licence}],
                "purl": whence,
            }
        },
        "components": [*components, standard],
        "dependencies": [
            {"ref": name, "dependsOn": sorted(called)} for name, called in dependencies.items()
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    parser.add_argument("--out", type=Path, default=ROOT, help="the folder of both files")
    options = parser.parse_args(arguments)
    found, status = crates(), 0
    for name, text in ((NOTICES, notices(found)), (MATERIALS, materials(found))):
        path, new = options.out / name, text.encode()
        if not options.check:
            path.write_bytes(new)
        elif not path.is_file() or path.read_bytes() != new:
            print(f"{name} is stale: python tools/third_party.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

"""The npm packages that hold the emoji set's pictures and labels: versions, checksums, licences.

`packages` fetches them once with `npm pack`. No package is unpacked to disk and no code of a
package runs (`npm pack` of a registry package runs no script).
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import subprocess
import tarfile
from typing import Any

from dalle_jax.data.builders import store
from dalle_jax.types import UsageError


@dataclasses.dataclass(frozen=True)
class Package:
    """One npm package.

    Attributes:
      name: with its scope.
      version: exact.
      sha256: of the tarball that `npm pack` writes.
      style: name of the style in captions; "" for the labels.
      licence: SPDX name.
      author: for the attribution.
      url: home of the pictures.
    """

    name: str
    version: str
    sha256: str
    style: str
    licence: str
    author: str
    url: str

    @property
    def file(self) -> str:
        """File name that `npm pack` gives."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


# fmt: off
LABELS = Package(
    "emojibase-data", "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "", "MIT", "Miles Johnson", "https://github.com/milesj/emojibase",
)

STYLES = (
    Package(
        "@iconify-json/noto", "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "noto", "Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "@iconify-json/noto-v1", "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "noto v1", "Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "@iconify-json/twemoji", "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "twemoji", "CC-BY-4.0", "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    Package(
        "@iconify-json/openmoji", "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "openmoji", "CC-BY-SA-4.0", "OpenMoji, the open-source emoji and icon project",
        "https://github.com/hfg-gmuend/openmoji",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "fluent flat", "MIT", "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Package(
        "@iconify-json/emojione", "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "emojione", "CC-BY-4.0", "Emoji One", "https://github.com/EmojiTwo/emojitwo",
    ),
    Package(
        "@iconify-json/fxemoji", "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "fxemoji", "Apache-2.0", "Mozilla", "https://github.com/mozilla/fxemoji",
    ),
    Package(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "fluent 3d", "MIT", "Microsoft Corporation, packaged by LobeHub",
        "https://github.com/microsoft/fluentui-emoji",
    ),
)
# fmt: on


def packages(downloads: pathlib.Path) -> dict[Package, "Archive"]:
    """Opens every package; fetches into `downloads` those that are missing and checks all.

    Raises:
      UsageError: if npm is missing or fails, or if a tarball is not the pinned one.
    """
    return {package: Archive(fetch(package, downloads)) for package in (LABELS, *STYLES)}


def fetch(package: Package, downloads: pathlib.Path) -> bytes:
    """The tarball's bytes, which have the pinned checksum.

    Raises:
      UsageError: as `packages`.
    """
    store.make_folder(downloads)
    path = downloads / package.file
    if not path.is_file():
        _npm_pack(package, downloads)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != package.sha256:
        raise UsageError(
            f"{path} has sha256 {sha256}; {package.name}@{package.version} is {package.sha256}. "
            "The download was cut or replaced: delete the file and run the command again."
        )
    return data


def _npm_pack(package: Package, downloads: pathlib.Path) -> None:
    spec = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            f"npm is not on the PATH; it fetches {spec} and seven other picture sets. Install it "
            "(apt-get install npm, or https://nodejs.org), or run `npm pack` for the packages of "
            f"dalle_jax/data/builders/npm_packages.py elsewhere and copy the files to {downloads}."
        )
    print(f"  fetching {spec}", flush=True)
    command = [npm, "pack", "--silent", "--ignore-scripts", spec]
    try:
        done = subprocess.run(
            command, cwd=downloads, capture_output=True, text=True, timeout=600, check=False
        )
        problem = (done.stderr or done.stdout).strip()[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = "no answer in 10 minutes"
    if problem or not (downloads / package.file).is_file():
        raise UsageError(
            f"`npm pack {spec}` failed in {downloads}: {problem or 'it wrote no file'}. Check the "
            "network and `npm config get registry`, then run the command again; it continues with "
            "this package."
        )


class Archive:
    """A package's regular files in memory; reading the largest, 16 MB, takes 0.2 s."""

    def __init__(self, data: bytes):
        """Reads the tarball's bytes."""
        self.files: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            for member in tar:
                if member.isreg() and member.name.endswith((".json", ".webp")):
                    self.files[member.name.removeprefix("package/")] = tar.extractfile(
                        member
                    ).read()

    def json(self, name: str) -> Any:
        """A JSON file of the package.

        Raises:
          UsageError: if the package has none of that name.
        """
        if name not in self.files:
            raise UsageError(
                f"the package has no {name}; it has {', '.join(sorted(self.files)[:8])}. Other "
                "versions have other files: use the pinned one."
            )
        return json.loads(self.files[name])

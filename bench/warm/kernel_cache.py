"""Carrying a Triton cache to another machine: the files it needs, whether they fit there, packing and unpacking.

Triton looks a compiled kernel up by a key (triton 3.6 and 3.7, ``compiler.get_cache_key``) made of: every file of its
wheel that takes part in compiling, libtriton.so among them, so the wheel for another Python makes another key; the
source and line numbers, but not the path, of the kernel and the functions it calls; the specialisation and the options
of the launch; the architecture; ptxas's version; the environment variables that change compilation. A launcher's key is
its C source and the platform, and its file is named after the Python it was built for.

In the cache a kernel is a folder named by its key. Its group file lists the other files by absolute paths, which
:func:`unpack` rewrites.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ...files import write_bytes, write_json
from ..prove.kernels import kernel_functions
from ..records.parsing import parse
from .archives import SUFFIX, read_archive, write_archive

SCHEMA = "ditfast.kernel-cache/1"
MANIFEST = "ditfast-cache.json"
_GROUP = "__grp__"
# environment variables that become options of a launch
_OPTIONS = ("PTXAS_OPTIONS", "TRITON_DEBUG", "TRITON_INSTRUMENTATION_MODE")


def kernel_files(cache: Path, folders: Collection[str] | None = None) -> Iterator[tuple[str, Path]]:
    """(name in an archive, file) of the files that launches need: cubins, their metadata and groups, and launchers.

    Args:
        folders: names of kernels' folders; all by default. Launchers are always included.
    """
    launcher = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    for folder in sorted(path for path in cache.glob("*") if path.is_dir()):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            kernel = path.suffix in (".cubin", ".json") and (folders is None or folder.name in folders)
            if kernel or path.name.endswith(launcher):
                yield f"{folder.name}/{path.name}", path


def pack(cache: Path, archive: Path, folders: Collection[str] | None = None) -> int:
    """Packs the files that launches need, and the manifest if there is one, into a .tar.xz; returns its bytes."""
    files = list(kernel_files(cache, folders))
    if (cache / MANIFEST).is_file():
        files.append((MANIFEST, cache / MANIFEST))
    return write_archive(files, archive)


def unpack(source: Path | Iterable[Path], cache: Path) -> int:
    """Adds kernels to a Triton cache at any path; returns how many were added.

    Args:
        source: an archive of :func:`pack`, a folder of such archives, a copied cache, or several of these. Archives of
            one divided cache must be passed together.

    Raises:
        ValueError: an archive is damaged, or there are no kernels.
        OSError: a file cannot be read or written.
    """
    sources = [source] if isinstance(source, Path) else list(source)
    contents = [item for path in sources for item in _contents(path)]
    files = dict(contents)
    manifests = [parsed for name, data in contents if name == MANIFEST and (parsed := _manifest(data)) is not None]
    groups = {}
    for name, data in files.items():
        path = cache / name
        if path.parent.parent != cache or path.suffix not in (".cubin", ".json", ".so"):
            continue
        if path.name.startswith(_GROUP):
            groups[path] = data
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(data, path)
    count = sum(_place(path, data) for path, data in groups.items())  # last: Triton looks for the group
    if not count:
        raise ValueError(f"{', '.join(map(str, sources))} must hold compiled kernels, got none")
    current = read_manifest(cache)
    for manifest in manifests:
        if current is None or not fits(manifest) or fits(current):  # a misfit must not replace a fitting manifest
            current = merged(current, manifest)
    if current is not None:
        write_json(current, cache / MANIFEST)
    return count


def _contents(source: Path) -> list[tuple[str, bytes]]:
    if not source.is_dir():
        return read_archive(source)
    if archives := sorted(source.glob(f"*{SUFFIX}")):
        return [item for archive in archives for item in read_archive(archive)]
    files = [*kernel_files(source), (MANIFEST, source / MANIFEST)]
    return [(name, path.read_bytes()) for name, path in files if path.is_file()]


def _place(path: Path, data: bytes) -> bool:
    """Writes a group file with the paths of its new folder, unless its kernel is missing there; returns whether."""
    try:
        names = [Path(name).name for name in json.loads(data)["child_paths"]]
    except (ValueError, KeyError, TypeError):
        return False
    paths = {name: str(path.parent.absolute() / name) for name in names if (path.parent / name).is_file()}
    if not {".cubin", ".json"} <= {Path(name).suffix for name in paths}:
        return False
    write_bytes(json.dumps({"child_paths": paths}).encode(), path)
    return True


def read_manifest(cache: Path) -> dict[str, Any] | None:
    """The manifest of a cache, or None if it has none."""
    try:
        return _manifest((cache / MANIFEST).read_bytes())
    except OSError:
        return None


def _manifest(data: bytes) -> dict[str, Any] | None:
    """A manifest, or None if the data is not one: it only informs, so damage is no error."""
    try:
        manifest = json.loads(data)
        parse(dict[str, Any], manifest, "manifest")
        parse(dict[str, dict[str, list[str]]], manifest["architectures"], "architectures")
        identity = parse(dict[str, Any], manifest["identity"], "identity")
        complete = {"triton", "build", "python", "platform", "ptxas", "variables", "sources"} <= identity.keys()
    except (ValueError, KeyError):
        return None
    return manifest if manifest.get("schema") == SCHEMA and complete else None


def make_manifest(architecture: str, warmed: Iterable[str], folders: Iterable[str]) -> dict[str, Any]:
    """The manifest of a cache filled by this process, JSON-ready.

    Args:
        architecture: such as sm_90.
        warmed: labels of the parts that are compiled as a whole.
        folders: of the kernels.

    Returns:
        ``schema``; ``identity``: everything that kernels are looked up by (see above) except the launch itself, as
        ``triton`` and its ``build``, ``python``, ``platform``, ``ptxas``, ``variables`` and ``sources`` (a digest of
        each kernel's); ``architectures``: name -> ``warmed`` and ``kernels``, their folders.
    """
    entry = {"warmed": sorted(set(warmed)), "kernels": sorted(set(folders))}
    return {"schema": SCHEMA, "identity": _identity(), "architectures": {architecture: entry}}


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """A cache's manifest after another run: with the old entries, if both have the same identity."""
    if old is None or old["identity"] != new["identity"]:
        return new
    architectures = dict(old["architectures"])
    for name, entry in new["architectures"].items():
        before = architectures.get(name, {})
        architectures[name] = {field: sorted({*before.get(field, ()), *entry[field]}) for field in entry}
    return {**new, "architectures": architectures}


def fits(manifest: dict[str, Any]) -> str:
    """Why this process would not use a cache's kernels, as a sentence, or ""."""
    try:
        current, cached = _identity(), manifest["identity"]
    except ImportError:
        return "triton is not installed"
    except _Interpreting as error:
        return str(error)
    for field, label in (("triton", "triton"), ("python", "Python"), ("platform", "the platform")):
        if current[field] != cached[field]:
            return f"made with {label} {cached[field]}, and here is {current[field]}"
    if current["build"] != cached["build"]:
        return f"made with another build of triton {current['triton']}"
    if current["ptxas"] != cached["ptxas"]:
        return f"made with ptxas {cached['ptxas']}, and here is {current['ptxas']} (TRITON_PTXAS_PATH)"
    names = sorted(dict(current["variables"].items() ^ cached["variables"].items()))
    if names:
        return f"made with other values of {', '.join(names)}"
    changed = sorted(name for name, digest in current["sources"].items() if cached["sources"].get(name) != digest)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"{len(changed)} of {len(current['sources'])} kernels have changed: {', '.join(changed[:3])}{more}"
    return _other_gpu(manifest["architectures"])


def _other_gpu(architectures: Iterable[str]) -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return "" if arch in architectures else f"made for {', '.join(architectures)}, and the GPU is {arch}"


def facts(cache: Path) -> dict[str, Any]:
    """The report of ``ditfast info`` on a Triton cache.

    Returns:
        ``folder``; ``kernels``: how many kernels of ditfast it holds, of any version; ``warmed``: architecture ->
        labels of the parts compiled ahead; ``missing``: how many of their kernels are no longer there; ``misfit``: why
        this process would not use them, or "". The last three are None if nothing was compiled ahead.
    """
    manifest = read_manifest(cache)
    names = set(kernel_functions())
    groups = [path for path in cache.glob(f"*/{_GROUP}*.json") if path.stem.removeprefix(_GROUP) in names]
    warmed, missing = None, None
    if manifest is not None:
        present = {path.parent.name for path in cache.glob(f"*/{_GROUP}*.json")}
        warmed = {name: entry["warmed"] for name, entry in manifest["architectures"].items()}
        missing = sum(len({*entry["kernels"]} - present) for entry in manifest["architectures"].values())
    return {
        "folder": str(cache),
        "kernels": len(groups),
        "warmed": warmed,
        "missing": missing,
        "misfit": None if manifest is None else fits(manifest),
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = ["Triton's cache", f"  {report['folder']}: {report['kernels']} compiled kernels of ditfast"]
    for name, labels in (report["warmed"] or {}).items():
        lines.append(f"  compiled ahead for {name}: {'; '.join(labels) or 'a part, cut short'}")
    if report["warmed"] is not None:
        misfit = f"  not all of which are taken here: {report['misfit']}"
        lines.append(misfit if report["misfit"] else "  which are taken here")
    if report["missing"]:
        lines.append(f"  but {report['missing']} of them are missing")
    return "\n".join(lines)


class _Interpreting(Exception):
    """Kernels run in Triton's interpreter, which compiles none."""


def _identity() -> dict[str, Any]:
    from triton import __version__
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import triton_key

    from ditfast.kernels.launch import interpreting

    if interpreting():
        raise _Interpreting("kernels run in Triton's interpreter here (TRITON_INTERPRET)")
    options = {name: os.environ[name] for name in _OPTIONS if os.environ.get(name)}
    return {
        "triton": __version__,
        "build": _digest(triton_key()),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "platform": sysconfig.get_platform(),
        "ptxas": _ptxas(),
        "variables": {**get_cache_invalidating_env_vars(), **options},
        "sources": {name: _digest(kernel.cache_key) for name, kernel in sorted(kernel_functions().items())},
    }


def _ptxas() -> str:
    """The versions of both ptxas that Triton runs: before Blackwell, and since."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    versions = []
    for arch in (80, 100):
        try:
            text = get_ptxas_version(arch)
        except (RuntimeError, OSError, subprocess.SubprocessError):
            text = "none"
        match = re.search(r"V[\d.]+", text)
        versions.append(match.group() if match else text.strip())
    return " and ".join(dict.fromkeys(versions))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

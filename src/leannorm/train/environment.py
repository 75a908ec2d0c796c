"""The machine and the versions that a result was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import leannorm
from leannorm.records import Environment

PACKAGES = ("leannorm", "torch", "triton", "torchvision", "lightning", "numpy", "onnx", "onnxruntime")


def environment() -> Environment:
    """Describe this process: processor, usable cores, Python, package versions, and leannorm's commit."""
    return Environment(
        machine=f"{_processor()}, {platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        python=platform.python_version(),
        versions=tuple((name, version) for name in PACKAGES if (version := _version(name)) is not None),
        commit=_commit(),
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown processor"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    repository = Path(str(leannorm.__file__)).resolve().parents[2]
    if (repository / ".git").exists():  # installed or copied: a repository further up would be somebody else's
        trusted = f"safe.directory={repository}"  # git refuses what belongs to another user, as in a container
        command = ["git", "-c", trusted, "-C", str(repository), "rev-parse", "HEAD"]
        with suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return os.environ.get("LEANNORM_COMMIT", "unknown")

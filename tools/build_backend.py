"""The PEP 517 backend: setuptools', which also asks for torch where there is none to build against."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toolchain

toolchain.require_setuptools()  # else what comes next fails with a traceback
from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import (  # noqa: E402
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
Settings = Mapping[str, Any]


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *toolchain.torch_to_fetch()]


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *toolchain.torch_to_fetch()]


def build_wheel(directory: str, config_settings: Settings | None = None, metadata: str | None = None) -> str:
    toolchain.survey()  # what is missing is said before setuptools prints its sixty lines
    for earlier in Path("build").glob("lib.*"):
        shutil.rmtree(earlier)  # or modules that are no more would be in the wheel
    return build_meta.build_wheel(directory, config_settings, metadata)


def build_editable(
    directory: str, config_settings: Settings | None = None, metadata: str | None = None
) -> str:
    toolchain.survey()
    return build_meta.build_editable(directory, config_settings, metadata)

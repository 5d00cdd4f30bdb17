"""Fixtures of devices and of what is installed on them; a test module has them by ``pytest_plugins``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundles import DEVICE, Shop, install, own_copy


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Where a module's bundles come from."""
    return Shop.make(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def seven(shop: Shop) -> Path:
    """Release 7."""
    return shop.release(7)


@pytest.fixture(scope="module")
def eight(shop: Shop) -> Path:
    """Release 8."""
    return shop.release(8)


@pytest.fixture(scope="module")
def with_seven(shop: Shop, seven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device that runs release 7 and has a name; tests take copies."""
    root = shop.device(tmp_path_factory.mktemp("device") / "root")
    install(seven, root, "--device", DEVICE)
    return root


@pytest.fixture(scope="module")
def with_two(shop: Shop, seven: Path, eight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device that runs release 8 in slot b and keeps 7 in slot a; tests take copies."""
    root = shop.device(tmp_path_factory.mktemp("device") / "root")
    install(seven, root)
    install(eight, root)
    return root


@pytest.fixture
def empty(shop: Shop, tmp_path: Path) -> Path:
    """A device on which nothing was installed."""
    return shop.device(tmp_path / "root")


@pytest.fixture
def device(with_seven: Path, tmp_path: Path) -> Path:
    """A device that runs release 7."""
    return own_copy(with_seven, tmp_path / "root")


@pytest.fixture
def copy(seven: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(seven, tmp_path / "bundle"))

"""The conformance matrix (`helpers.matrix`): dense causal families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.families import DENSE
from helpers.matrix import check_family

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_family(families: Any, short_rows: Path, tmp_path: Path, family: str) -> None:
    check_family(tmp_path, families(family), family, short_rows)

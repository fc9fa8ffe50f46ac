"""The conformance matrix (`helpers.matrix`): mixtures of experts, state space models, hybrids and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.encoder_families import ENCODERS, make_encoder_family
from helpers.families import MOE, RECURRENT
from helpers.matrix import check_family

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", [*MOE, *RECURRENT])
def test_a_family_that_is_not_dense(families: Any, short_rows: Path, tmp_path: Path, family: str) -> None:
    check_family(tmp_path, families(family), family, short_rows)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder(short_labeled: Path, tmp_path: Path, family: str) -> None:
    check_family(tmp_path, make_encoder_family(tmp_path / family, family), family, short_labeled, "text-classification")

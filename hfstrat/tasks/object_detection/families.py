"""The families of detectors whose losses are known here, by the terms of the loss. No torch."""

from __future__ import annotations

from hfstrat.errors import UserError

SOFTMAX = ("detr", "yolos", "table-transformer")
FOCAL = ("conditional_detr", "deformable_detr", "dab-detr")
GROUPED = ("lw_detr", "rf_detr")  # several groups of queries in training (arXiv 2207.13085)
VARIFOCAL = ("rt_detr", "rt_detr_v2")
DISTRIBUTION = ("d_fine",)
FAMILIES = (*SOFTMAX, *FOCAL, *GROUPED, *VARIFOCAL, *DISTRIBUTION)
TIED = ("deformable_detr", *VARIFOCAL, *DISTRIBUTION)  # their heads are parts of the decoder, too


def check_family(name: str, family: str) -> None:
    """Refuse a model that is no detector, or whose loss is not known. Raises UserError."""
    if family not in FAMILIES:
        raise UserError(
            f"model.name_or_path: {name} is a {family or 'model of an unknown family'}, which is no detector whose loss is "
            f"known here; expected one of {', '.join(FAMILIES)}"
        )

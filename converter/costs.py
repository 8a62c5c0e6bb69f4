"""What each width of a layer's matrices costs, as predicted KL a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from halfturn.converter.allocate import predicted_cost
from halfturn.converter.calibrate import Sensitivity
from halfturn.converter.codecs.grid import option_errors
from halfturn.converter.gptq import factorize, row_gain

ROWS = 256  # of a matrix whose rounding errors are computed at every width; the others are like them


def layer_costs(
    groups: Sequence[Sequence[str]],
    weights: Mapping[str, Tensor],
    sensitivities: Mapping[str, Sensitivity],
    hessians: Mapping[str, Tensor],
    widths: Sequence[int],
    *,
    prefix: str,
    rounding: str,
    group_size: int | None,
) -> dict[str, dict[int, float]]:
    """By short name and width, of the linears in `groups`, whose members read the same input.

    hessians: of each group's input, by its first linear. Rounding errors come from these, what they cost from
    `sensitivities`, which saw other tokens wherever the text has more than they took: so no error is judged on the
    tokens that it was made small for. A shorter text serves both, and costs are predicted too low. prefix: of names.
    """
    costs = {}
    for group in groups:
        factor = factorize(hessians[group[0]], name=prefix + group[0]) if rounding == "gptq" else None
        for short in group:
            weight, sensitivity = weights[f"{short}.weight"], sensitivities[short]
            rows = torch.linspace(0, len(weight) - 1, min(len(weight), ROWS)).round().long()
            errors = option_errors(
                weight[rows],
                sensitivity.hessian,
                widths,
                rounding=rounding,
                factor=factor,
                group_size=group_size,
                name=prefix + short,
            )
            # A row's error is near proportional to its power, whatever the width.
            power = sensitivity.moment.double() * weight.double().square().sum(1)
            share = float(power[rows].sum() / power.sum()) if bool(power.any()) else 1.0
            if rounding == "gptq" and sensitivity.blocks is not None:
                one, other = sensitivity.blocks
                share *= 2 / (row_gain(one, other) + row_gain(other, one))
            predicted = predicted_cost(sensitivity.moment[rows], errors)
            costs[short] = {width: cost / share for width, cost in predicted.items()}
    return costs

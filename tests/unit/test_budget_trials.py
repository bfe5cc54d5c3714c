"""What was tried for BYOM-Budget is computed as it says."""

import torch

from benchmarks.budget_trials import _cores, _left, fed
from byom.variants.base.levels import rounded


def test_error_feedback_leaves_less_in_the_metric_and_is_plain_rounding_without_one():
    generator = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(5, 150, generator=generator)
    inputs = torch.randn(150, 150, generator=generator) + 2 * torch.randn(150, 1, generator=generator)
    root = torch.linalg.cholesky(inputs.T @ inputs / 150 + 0.03 * torch.eye(150))
    plain, better = (((found - rows) @ root).square().sum() for found in (rounded(rows), fed(rows, root)))
    assert better < 0.8 * plain
    assert torch.equal(fed(rows, torch.eye(150)), rounded(rows))


def test_bases_that_tasks_share_leave_nothing_and_others_do():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 6, generator=generator), torch.randn(6, 60, generator=generator)
    alike = [left @ torch.randn(6, 6, generator=generator) @ right for _ in range(4)]
    apart = [torch.randn(40, 60, generator=generator) for _ in range(4)]
    for squared_error in (_left, _cores):
        assert squared_error(alike, 4) < 1e-6 * sum(float(each.square().sum()) for each in alike)
        assert squared_error(apart, 4) > 0.3 * sum(float(each.square().sum()) for each in apart)

"""fusion-bench, imported when a test first compares with it: that takes seconds, which collecting tests is spared."""

import warnings
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

PEER = [
    pytest.mark.peer,
    pytest.mark.skipif(find_spec("fusion_bench") is None, reason="fusion-bench is not installed"),
]
"""Marks of a module that needs it."""


@cache
def there() -> SimpleNamespace:
    """Return what is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
        from fusion_bench.method.fisher_merging import fisher_merging
        from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
        from fusion_bench.method.knots.knots_utils import subspace_alignment
        from fusion_bench.method.regmean import regmean
        from fusion_bench.method.singular_value_calibration import utils as svc
        from fusion_bench.method.task_singular_vector.utils import TSVM_utils
        from fusion_bench.method.wudi.wudi import wudi_merging

    return SimpleNamespace(
        RegMeanAlgorithm=regmean.RegMeanAlgorithm,
        SimpleAverageAlgorithm=SimpleAverageAlgorithm,
        TaskArithmeticAlgorithm=TaskArithmeticAlgorithm,
        iso_c=iso_c,
        iso_cts=iso_cts,
        merging_with_fisher_weights=fisher_merging.merging_with_fisher_weights,
        merging_with_regmean_weights=regmean.merging_with_regmean_weights,
        subspace_alignment=subspace_alignment,
        svc=svc.subspace_consistency_spectral_calibration_accelerated,
        tsv_m=TSVM_utils.compute_and_sum_svd_mem_reduction,
        wudi_merging=wudi_merging,
    )

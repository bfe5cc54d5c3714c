"""All mutants, area by area."""

from tests.mutants.functional import FUNCTIONAL
from tests.mutants.merge import MERGE
from tests.mutants.mutant import Mutant
from tests.mutants.report import REPORT
from tests.mutants.storage import STORAGE
from tests.mutants.variants import VARIANTS
from tests.mutants.weights import WEIGHTS

MUTANTS: tuple[Mutant, ...] = (*FUNCTIONAL, *MERGE, *VARIANTS, *STORAGE, *WEIGHTS, *REPORT)

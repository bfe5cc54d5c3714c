"""The problem that is merged, the kinds of merge method, and the inputs and statistics that a method may ask for."""

from byom.merge.base.group import Group, blockwise, rowwise
from byom.merge.base.method import MergeMethod, PlannedMethod, TensorwiseMethod
from byom.merge.base.problem import Member, Problem

__all__ = ["Group", "Member", "MergeMethod", "PlannedMethod", "Problem", "TensorwiseMethod", "blockwise", "rowwise"]

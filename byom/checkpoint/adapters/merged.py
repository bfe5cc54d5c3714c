"""One merged model as one PEFT adapter."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from byom.checkpoint.adapters import export
from byom.checkpoint.adapters.modules import Modules, SiteFactors
from byom.checkpoint.adapters.server import fitted, require_server, task_type
from byom.errors import OptionError
from byom.functional.linalg import product_svd
from byom.storage import tensor_files as storage
from byom.storage.atomic import replacing
from byom.variants.base.delta import Served
from byom.variants.single_task import SingleTaskAdapters
from byom.weights.lowrank import Adapted

ROUNDED = 2.0**-30  # singular values below this share of the largest are lost when fp32 factors are multiplied


def write_adapter(
    weights: Adapted,
    folder: str | Path,
    *,
    base_model: str,
    prefix: str = "",
    module: nn.Module | None = None,
    server: str | None = None,
    embeddings: bool = False,
) -> Path:
    """Write a model that is known as low-rank differences as a PEFT folder, all or nothing.

    Nothing is cut: every module has the rank that its difference has, ``lora_alpha = r``, and the factors are
    ``U sqrt(s)`` and ``sqrt(s) Vᵀ``. A server gets one rank for all, filled up with zeros::

        merged = CoreSpace()(problem)  # written whole, or
        write_adapter(CoreSpace().low_rank(problem), "merged", base_model="base")

    Args:
        weights: What `MergeMethod.low_rank`, `byom.weights.lowrank.cat` or `Adapter.on` returns.
        folder: Created, or replaced as a whole if it holds an earlier adapter of byom.
        base_model: Id or folder of the model that it is loaded onto, which the configuration names.
        prefix: Start of the parameters' names that the plain model does not have, for example ``model.``.
        module: The model with the names of `weights`, to tell embeddings from linear layers; None takes every matrix
            for a linear layer.
        server: ``vllm`` writes what it accepts, or refuses; see `byom.checkpoint.adapters.server.fitted`.
        embeddings: Whether a server gets factors of embeddings and output matrices.

    Returns:
        The folder.

    Raises:
        OptionError: If an adapter, or the server, cannot hold the difference, or there is none.
        CheckpointError: If a value is not finite, or the folder holds other files or cannot be written.
    """
    require_server(server)
    folder = Path(folder)
    served = Served(weights.base, {"merged": SingleTaskAdapters().delta(weights, weights.base)})
    modules, delta = Modules.of(served, prefix, module, base_model), served.deltas["merged"]
    factors = {path: kept for path, each in modules.factors(delta).items() if (kept := exact(each)).up.shape[1]}
    if not factors:
        raise OptionError(f"{weights.origin} has no low-rank difference to {weights.base.origin}; write it whole")
    adapter = fitted(modules, modules.adapter(factors, delta, weights), server, embeddings)
    with replacing(folder, storage.written("adapter_config.json")) as partial:
        export.write_task(modules, adapter, weights, partial, base_model, task_type(base_model, server))
    return folder


def exact(factors: SiteFactors) -> SiteFactors:
    """Return the same product with as many columns as it has rank, its singular values in both factors evenly."""
    left, values, right = product_svd(factors.up.double(), factors.down.double())
    kept = values > ROUNDED * values[:1]
    root = values[kept].sqrt()
    up, down = left[:, kept] * root, root[:, None] * right[kept]
    return factors._replace(up=up.to(factors.up.dtype), down=down.to(factors.down.dtype))
